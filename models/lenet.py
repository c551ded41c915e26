"""LeNet in the form of Caffe's MNIST example (as remembered: the framework of Singh et al.'s experiments)."""

from __future__ import annotations

from torch import Tensor, nn


class LeNet(nn.Module):
    """Two 5×5 convolutions of 20 and 50 channels, each with a 2×2 max pooling, and 500 hidden units.

    Initialisation is PyTorch's default.

    Args:
        classes: number of classes.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.pool2 = nn.MaxPool2d(2)
        self.linear1 = nn.Linear(50 * 4 * 4, 500)
        self.relu = nn.ReLU()
        self.linear2 = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(m, classes)` of images `(m, 1, 28, 28)`."""
        hidden = self.pool2(self.conv2(self.pool1(self.conv1(images))))
        return self.linear2(self.relu(self.linear1(hidden.flatten(1))))
