"""Deep autoencoder of fully connected layers (Hinton and Salakhutdinov, Science 2006)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from models.parts import ACTIVATIONS, NORMALISATIONS_1D, chosen


class Autoencoder(nn.Sequential):
    """Encoder `sizes[0] … sizes[-1]` and its mirror, linear code and output.

    Initialisation is PyTorch's default for linear layers.

    Args:
        sizes: layer sizes from the input to the code, e.g. `[784, 1000, 500, 250, 30]`.
        activation: of the other layers: `relu`, `tanh`, `gelu` or `silu`.
        normalisation: before each activation: `batch`, `layer`, or None.

    Raises:
        ValueError: no such activation or normalisation.
    """

    def __init__(self, sizes: Sequence[int], activation: str = "relu", normalisation: str | None = None) -> None:
        activate = chosen("activation", activation, ACTIVATIONS)
        normalise = chosen("normalisation", normalisation, NORMALISATIONS_1D)
        widths = [*sizes, *reversed(sizes[:-1])]
        code, output = len(sizes) - 1, len(widths) - 1
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, len(widths)):
            layers[f"linear{i}"] = nn.Linear(widths[i - 1], widths[i])
            if i in (code, output):
                continue
            if normalisation:
                layers[f"{normalisation[0]}n{i}"] = normalise(widths[i])
            layers[f"{activation}{i}"] = activate()
        super().__init__(layers)
