"""A small convolutional network with batch normalisation for 8×8 digits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn


class ConvNet(nn.Sequential):
    """Bias-free 3×3 convolutions, each with BatchNorm and ReLU, and a linear layer: logits `(m, classes)` of images.

    All but the first have stride 2 and halve the images, rounding up.

    Args:
        channels: outputs of the convolutions, at least one.
        classes: number of classes.
        in_channels: channels of the images `(m, in_channels, size, size)`.
        size: height and width of the images.
    """

    def __init__(self, channels: Sequence[int], classes: int, in_channels: int, size: int) -> None:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (width, last) in enumerate(zip(channels, (in_channels, *channels), strict=False), 1):
            stride = 1 if i == 1 else 2
            layers[f"conv{i}"] = nn.Conv2d(last, width, 3, stride, padding=1, bias=False)
            layers[f"bn{i}"] = nn.BatchNorm2d(width)
            layers[f"relu{i}"] = nn.ReLU()
            size = -(-size // stride)
        layers["flatten"] = nn.Flatten()
        layers["linear"] = nn.Linear(channels[-1] * size**2, classes)
        super().__init__(layers)
