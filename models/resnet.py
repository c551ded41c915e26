"""Residual networks (He, Zhang, Ren and Sun, CVPR 2016): for 32×32 images (section 4.2), and ResNet-50."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class ResNet(nn.Module):
    """A 3×3 convolution, three stages of residual blocks, global average pooling and a linear layer.

    It has `6·blocks + 2` layers: 5 blocks make ResNet-32, 1 block the net of 7 convolutions. Convolutions have no bias;
    all weights, the linear layer's too, start Kaiming normal.

    Args:
        blocks: residual blocks of each stage.
        widths: channels of the three stages.
        classes: number of classes.
    """

    def __init__(self, blocks: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv = _conv(3, widths[0], stride=1)
        self.bn = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.stages = nn.Sequential()
        channels = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.stages.append(Block(channels, width, stride))
                channels = width
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(m, classes)` of images `(m, 3, height, width)`."""
        hidden = self.stages(self.relu(self.bn(self.conv(images))))
        return self.linear(hidden.mean((2, 3)))


class Block(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (option A).

    Args:
        inputs: input channels.
        outputs: output channels, `inputs` or more.
        stride: stride of the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs, stride=1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = OptionA(outputs - inputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu1(self.bn1(self.conv1(x)))
        return self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class OptionA(nn.Module):
    """The identity, subsampled by `stride` and padded with `extra` channels of zeros, half on either side."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.extra == 0:
            return x
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], [0, 0, 0, 0, before, self.extra - before])


def resnet50(classes: int) -> nn.Module:
    """torchvision's ResNet-50 (the stride in the 3×3 convolutions: v1.5), for images of any size from about 32 pixels.

    Args:
        classes: number of classes.
    """
    import torchvision

    return torchvision.models.resnet50(weights=None, num_classes=classes)


def _conv(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
