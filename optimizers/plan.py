"""A step as far as the host knows it: what is decided and counted, apart from what the device holds."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor


class Due(NamedTuple):
    """What a layer-wise method measures of a batch beside its gradients."""

    noise: bool
    ahead: bool
    """the model is compared with the loss along this step, once it is done"""
    back: bool
    """the same along the last step, of whose direction this batch knows nothing"""
    curvature: bool
    count: int
    """measurements that the curvature's stands for"""


class Plan(NamedTuple):
    """What an optimizer's ``plan(closure)`` tells, and its ``carry_out(plan, closure)`` does.

    One that decides and counts nothing on the host needs neither: its steps are all of this default's kind.
    """

    kind: Hashable = None
    """steps of one kind do the same, but for ``numbers`` and the groups' settings"""
    numbers: dict[str, float | Tensor] = {}  # noqa: RUF012 - never changed in place
    """what changes from step to step by counting alone"""
    due: Due | None = None
    """None: nothing is measured"""
