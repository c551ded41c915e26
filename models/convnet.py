"""A small convolutional network for 8×8 digits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from models.parts import ACTIVATIONS, NORMALISATIONS_2D, chosen


class ConvNet(nn.Sequential):
    """3×3 convolutions, each normalised and activated, and a linear layer: logits `(m, classes)` of images.

    All but the first have stride 2 and halve the images, rounding up; they have biases where nothing normalises.

    Args:
        channels: outputs of the convolutions, at least one.
        classes: number of classes.
        in_channels: channels of the images `(m, in_channels, size, size)`.
        size: height and width of the images.
        activation: `relu`, `tanh`, `gelu` or `silu`.
        normalisation: `batch`, `group` (four groups), or None.

    Raises:
        ValueError: no such activation or normalisation.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        in_channels: int,
        size: int,
        activation: str = "relu",
        normalisation: str | None = "batch",
    ) -> None:
        activate = chosen("activation", activation, ACTIVATIONS)
        normalise = chosen("normalisation", normalisation, NORMALISATIONS_2D)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (width, last) in enumerate(zip(channels, (in_channels, *channels), strict=False), 1):
            stride = 1 if i == 1 else 2
            layers[f"conv{i}"] = nn.Conv2d(last, width, 3, stride, padding=1, bias=normalisation is None)
            if normalisation:
                layers[f"{normalisation[0]}n{i}"] = normalise(width)
            layers[f"{activation}{i}"] = activate()
            size = -(-size // stride)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(channels[-1] * size**2, classes)
        super().__init__(layers)
