"""A small convolutional network with batch normalisation for 8×8 digits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class ConvNet(nn.Module):
    """Two bias-free 3×3 convolutions, each with BatchNorm and ReLU, the second with stride 2, and a linear layer.

    Args:
        channels: outputs of the two convolutions.
        classes: number of classes.
        in_channels: channels of the images.
        size: height and width of the images, even.
    """

    def __init__(self, channels: Sequence[int], classes: int, in_channels: int, size: int) -> None:
        super().__init__()
        first, second = channels
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(first, second, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(second * (size // 2) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(m, classes)` of images `(m, in_channels, size, size)`."""
        hidden = self.relu1(self.bn1(self.conv1(images)))
        hidden = self.relu2(self.bn2(self.conv2(hidden)))
        return self.linear(hidden.flatten(1))
