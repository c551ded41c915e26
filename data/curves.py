"""CURVES by generator: 28×28 images of smooth curves through three random points.

The original file (Hinton and Salakhutdinov 2006, in Martens' Hessian-free code) is no longer to be had, and its
curve type, stroke and distribution of points are not on record. What is known is kept: three random points in the
plane, hence intrinsic dimension 6; intensities between 0 and 1 and far from Gaussian; 20,000 training and 10,000
test images. The rest is chosen here, so the set is a surrogate and says so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from data.batches import Dataset, Split
from data.checksums import cached

SIZE = 28  # pixels a side
BOX = 20.0  # side of the centred square of the points: a parabola leaves it by at most 1/8 of it
HALF_WIDTH = 0.9  # of the stroke, in pixels
SAMPLES = 160  # points along a curve, less than a pixel apart
REACH = 2  # pixels around a curve's point that the stroke can touch
VERSION = 1  # of the generator; raised when its images change


def curves(root: Path, cache: Path, train: int, test: int, seed: int) -> Dataset:
    """Flattened images `(n, 784)` in [0, 1], which are their own targets.

    Args:
        root: unused: the data are generated.
        cache: folder where generated images are kept.
        train: number of training images.
        test: number of test images.
        seed: seed of the points; part of the task, not of a run.
    """

    def build() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"train": draw(random_points(train, generator)), "test": draw(random_points(test, generator))}

    images = cached(cache / "curves" / f"v{VERSION}-{train}-{test}-{seed}.pt", build)
    splits = {name: Split((x,), x) for name, x in images.items()}
    surrogate = "curves through three random points, generated in place of CURVES"
    return Dataset(splits["train"], splits["test"], None, None, surrogate, "CURVES")


def random_points(n: int, generator: torch.Generator) -> Tensor:
    """Three points for each of `n` curves, uniform in the box, in pixels from the centre `(n, 3, 2)`."""
    return BOX * (torch.rand(n, 3, 2, generator=generator) - 0.5)


def draw(points: Tensor, chunk: int = 500) -> Tensor:
    """Images `(n, 784)` of the parabolas through the points `(n, 3, 2)` at times 0, ½ and 1.

    A pixel's intensity falls linearly over the stroke's edge, one pixel wide, with the distance to the curve.

    Args:
        points: row and column of each point, in pixels from the image's centre.
        chunk: curves per pass; bounds the memory.
    """
    t = torch.linspace(0, 1, SAMPLES)
    lagrange = torch.stack([(1 - t) * (1 - 2 * t), 4 * t * (1 - t), t * (2 * t - 1)], dim=1)
    return torch.cat([_strokes(lagrange @ part) for part in points.split(chunk)])


def _strokes(curve: Tensor) -> Tensor:
    """Images of curves given by points `(n, samples, 2)`: each touches the pixels within `REACH` of it alone."""
    canvas = SIZE + 2 * REACH  # strokes may leave the image a little
    position = curve + (canvas - 1) / 2
    pixels = position.round().long().unsqueeze(-1) + torch.arange(-REACH, REACH + 1)  # (n, samples, 2, neighbours)
    offset = pixels - position.unsqueeze(-1)
    distance = torch.hypot(offset[:, :, 0, :, None], offset[:, :, 1, None, :]).flatten(1)
    index = (canvas * pixels[:, :, 0, :, None] + pixels[:, :, 1, None, :]).flatten(1)
    intensity = (HALF_WIDTH + 0.5 - distance).clamp(0, 1)
    image = torch.zeros(len(curve), canvas**2).scatter_reduce_(1, index, intensity, "amax")
    return image.view(-1, canvas, canvas)[:, REACH:-REACH, REACH:-REACH].flatten(1)
