"""MNIST, CIFAR-10, CIFAR-100 and SVHN, read by torchvision from checked files.

For classification each channel has zero mean and unit variance over the training pixels; for autoencoders pixels are
in [0, 1] and flattened.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import Dataset, Split
from data.checksums import ensure

Labelled = tuple[Tensor, Tensor]  # uint8 images (n, channels, height, width) and their labels (n,)


def mnist_pixels(root: Path, cache: Path) -> Dataset:
    """MNIST for autoencoders: `(n, 784)` in [0, 1], which are their own targets.

    Args:
        root: folder with `MNIST/raw`.
        cache: folder where results of checks are kept.

    Raises:
        DataError: if files are missing and not to be had, or damaged.
    """
    train, test = (
        images.flatten(1).float().div_(255) for images, _ in _mnist(root, cache, instead="autoencoder_curves_small")
    )
    return Dataset(Split((train,), train), Split((test,), test), None, None, None, "MNIST")


def mnist(root: Path, cache: Path) -> Dataset:
    """MNIST with labels, `(n, 1, 28, 28)`; arguments and errors as for `mnist_pixels`."""
    return _classification("MNIST", *_mnist(root, cache, instead="cnn_digits"))


def cifar10(root: Path, cache: Path, padding: int) -> Dataset:
    """CIFAR-10 `(n, 3, 32, 32)`, training images cropped at random and flipped.

    Args:
        root: folder with `cifar-10-batches-py`.
        cache: folder where results of checks are kept.
        padding: black border in pixels around an image before it is cropped.

    Raises:
        DataError: if files are missing and not to be had, or damaged.
    """
    return _cifar("CIFAR-10", root, cache, padding)


def cifar100(root: Path, cache: Path, padding: int) -> Dataset:
    """CIFAR-100, as `cifar10`, from `cifar-100-python` under `root`."""
    return _cifar("CIFAR-100", root, cache, padding)


def svhn(root: Path, cache: Path, padding: int) -> Dataset:
    """SVHN (73,257 training and 26,032 test digits), as `cifar10`, from two .mat files under `root`."""
    from torchvision.datasets import SVHN

    def read(split: str, download: bool = False) -> Labelled:
        source = SVHN(str(root), split, download=download)
        return torch.from_numpy(source.data), torch.from_numpy(source.labels)

    ensure("SVHN", root, cache, download=lambda: [read(s, True) for s in ("train", "test")], instead="cnn_digits")
    return _classification("SVHN", read("train"), read("test"), padding)


def _mnist(root: Path, cache: Path, instead: str) -> tuple[Labelled, Labelled]:
    from torchvision.datasets import MNIST

    def read(train: bool) -> Labelled:
        source = MNIST(str(root), train, download=False)
        return source.data.unsqueeze(1), source.targets

    ensure("MNIST", root, cache, download=lambda: MNIST(str(root), download=True), instead=instead)
    return read(True), read(False)


def _cifar(name: str, root: Path, cache: Path, padding: int) -> Dataset:
    from torchvision import datasets

    kind = {"CIFAR-10": datasets.CIFAR10, "CIFAR-100": datasets.CIFAR100}[name]

    def read(train: bool) -> Labelled:
        source = kind(str(root), train, download=False)
        return torch.from_numpy(source.data).permute(0, 3, 1, 2), torch.tensor(source.targets)

    ensure(name, root, cache, download=lambda: kind(str(root), download=True), instead="cnn_digits")
    return _classification(name, read(True), read(False), padding)


def _classification(name: str, train: Labelled, test: Labelled, padding: int | None = None) -> Dataset:
    """Normalised splits; with `padding`, training images are cropped and flipped."""
    mean, std = channel_statistics(train[0])
    splits = [Split((images.float().sub_(mean).div_(std),), labels) for images, labels in (train, test)]
    black = (-mean / std).flatten().tolist()
    return Dataset(*splits, None, None if padding is None else CropFlip(padding, black), None, name)


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of uint8 images, `(1, channels, 1, 1)`, in [0, 255]."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256).double()
    mean = counts @ values / counts.sum(1)
    std = (counts @ values.square() / counts.sum(1) - mean.square()).sqrt()
    return mean.float().view(1, -1, 1, 1), std.float().view(1, -1, 1, 1)


@dataclass(frozen=True)
class CropFlip:
    """A random crop of each padded image, back to its size, and a flip of every second one on average.

    Attributes:
        padding: border in pixels.
        fill: value of the border in each channel.
    """

    padding: int
    fill: list[float]

    def draw(self, m: int, generator: torch.Generator | None) -> Tensor:
        """Each image's first row and column in its padded self, and whether it is flipped: `(m, 3)`."""
        device = generator.device if generator is not None else None
        corner = torch.randint(2 * self.padding + 1, (2, m), device=device, generator=generator)
        flip = torch.rand(m, device=device, generator=generator) < 0.5
        return torch.stack([*corner, flip], dim=1)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Augmented images `(m, channels, height, width)`."""
        m, _, height, width = images.shape
        top, left, flip = draws.unbind(1)
        border = [self.padding] * 4
        padded = torch.stack([F.pad(images[:, c], border, value=v) for c, v in enumerate(self.fill)], dim=1)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view of every crop, (m, c, top, left, h, w)
        cropped = windows[torch.arange(m, device=images.device), :, top, left]
        return torch.where(flip.view(m, 1, 1, 1) > 0, cropped.flip(3), cropped)
