"""VGG for 32×32 images (Simonyan and Zisserman, ICLR 2015), without dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn


class VGG(nn.Module):
    """Five stages of 3×3 convolutions, each ended by a max pooling, then fully connected layers.

    Convolution weights start normal with variance `2 / (k² c_out)` and biases zero; fully connected layers have
    PyTorch's default.

    Args:
        convolutions: convolutions of each stage: VGG11 `[1, 1, 2, 2, 2]`, VGG13 `[2, 2, 2, 2, 2]`,
            VGG16 `[2, 2, 3, 3, 3]`.
        widths: channels of each stage.
        hidden: widths of the hidden fully connected layers.
        classes: number of classes.
        batch_norm: put a BatchNorm after each convolution.
    """

    def __init__(
        self,
        convolutions: Sequence[int],
        widths: Sequence[int],
        hidden: Sequence[int],
        classes: int,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential()
        channels = 3
        for count, width in zip(convolutions, widths, strict=True):
            for _ in range(count):
                self.features.append(nn.Conv2d(channels, width, 3, padding=1))
                if batch_norm:
                    self.features.append(nn.BatchNorm2d(width))
                self.features.append(nn.ReLU())
                channels = width
            self.features.append(nn.MaxPool2d(2))
        self.classifier = nn.Sequential()
        for width in hidden:
            self.classifier.append(nn.Linear(channels, width))
            self.classifier.append(nn.ReLU())
            channels = width
        self.classifier.append(nn.Linear(channels, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=math.sqrt(2 / (9 * module.out_channels)))
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(m, classes)` of images `(m, 3, 32, 32)`."""
        return self.classifier(self.features(images).flatten(1))
