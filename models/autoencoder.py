"""Deep autoencoder of fully connected layers (Hinton and Salakhutdinov, Science 2006)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


class Autoencoder(nn.Sequential):
    """Encoder `sizes[0] … sizes[-1]` and its mirror, ReLU between, linear code and output.

    Initialisation is PyTorch's default for linear layers.

    Args:
        sizes: layer sizes from the input to the code, e.g. `[784, 1000, 500, 250, 30]`.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        widths = [*sizes, *reversed(sizes[:-1])]
        code, output = len(sizes) - 1, len(widths) - 1
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i in range(1, len(widths)):
            layers[f"linear{i}"] = nn.Linear(widths[i - 1], widths[i])
            if i not in (code, output):
                layers[f"relu{i}"] = nn.ReLU()
        super().__init__(layers)
