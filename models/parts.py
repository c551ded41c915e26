"""What nets are put together from, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}

#: Of vectors `(m, width)` and of images `(m, width, …)`, called with the width.
NORMALISATIONS_1D = {None: nn.Identity, "batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
NORMALISATIONS_2D = {None: nn.Identity, "batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 4)}


def chosen(what: str, name: str | None, choices: Mapping[str | None, Callable[..., nn.Module]]):
    """The maker of that name.

    Raises:
        ValueError: there is none; says which there are.
    """
    if name not in choices:
        there_are = ", ".join("null" if choice is None else choice for choice in choices)
        raise ValueError(f"no {what} '{name}'; there are {there_are}")
    return choices[name]
