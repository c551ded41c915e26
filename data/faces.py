"""FACES: 25×25 patches of rotated and scaled faces, real valued.

Hinton and Salakhutdinov (Science 2006, supplement, as remembered) made 165,600 patches from the 400 Olivetti faces
(40 persons) "by rotating (−90° to +90°), scaling (1.4 to 1.8), cropping, and subsampling", shifted every pixel to zero
mean and scaled all by one number to an average pixel variance of 1. Martens' file `newfaces_rot_single.mat` holds them;
his code trains on the first 25 persons (103,500) and tests on the last 10 (41,400). Where `data.root` has that file it
is used. Otherwise the same is done here to the Olivetti faces; the original's random draws are unknown, so that
set is a surrogate and says so. Departure: mean and scale are the training patches'.

A crop of 64 × 64 pixels of the scaled face spans at most 64/1.4 = 45.7 pixels of the original, whose diagonal 64.6 just
fits into the face: no rotation shows a border.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.batches import Dataset, Split
from data.checksums import DataError, cached, ensure

ORIGINAL = "newfaces_rot_single.mat"
OLIVETTI = "olivetti/olivettifaces.mat"
OLIVETTI_URL = "https://ndownloader.figshare.com/files/5976027"  # scikit-learn's source
SIZE = 25  # pixels a side of a patch
PER_FACE = 414  # patches of each of the 400 faces: 4,140 a person
FACES_PER_PERSON = 10
TRAIN_PERSONS, TEST_PERSONS = 25, 10  # the first and the last of the 40
ROTATION = 90.0  # degrees, to either side
SCALE = (1.4, 1.8)
VERSION = 1  # of the surrogate; raised when its patches change


def faces(root: Path, cache: Path, seed: int) -> Dataset:
    """Patches `(n, 625)`, which are their own targets: 103,500 for training, 41,400 for test.

    Args:
        root: folder with Martens' file, or with `olivetti/olivettifaces.mat`.
        cache: folder where the surrogate is kept.
        seed: seed of the surrogate's rotations and scales; part of the task, not of a run.

    Raises:
        DataError: if the files are missing and not to be had, or damaged.
    """
    if (root / ORIGINAL).is_file():
        patches, surrogate = _original(root / ORIGINAL), None
    else:
        path = cache / "faces" / f"v{VERSION}-{seed}.pt"
        patches = cached(path, lambda: surrogate_patches(olivetti(root, cache), seed))
        surrogate = "patches of the Olivetti faces with rotations and scales drawn here, in place of FACES"
    splits = {name: Split((x,), x) for name, x in patches.items()}
    return Dataset(splits["train"], splits["test"], None, None, surrogate, "FACES")


def olivetti(root: Path, cache: Path) -> Tensor:
    """The 400 upright faces, ten of each person in a row, `(400, 64, 64)` in [0, 255].

    Raises:
        DataError: if the file is missing and not to be had, or damaged.
    """
    from scipy.io import loadmat

    path = root / OLIVETTI

    def download() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(OLIVETTI_URL, str(path), progress=False)

    ensure("Olivetti faces", root, cache, download=download, instead="autoencoder_curves_small")
    columns = torch.from_numpy(loadmat(path)["faces"]).float()  # a face per column, itself in column order
    return columns.T.reshape(-1, 64, 64).transpose(1, 2)


def surrogate_patches(images: Tensor, seed: int) -> dict[str, Tensor]:
    """Patches of the training and test persons, zero mean per pixel and unit average variance over the training set.

    Args:
        images: the faces `(400, 64, 64)`.
        seed: seed of rotations and scales.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(2, len(images), PER_FACE, generator=generator)
    angles = math.radians(ROTATION) * (2 * draws[0] - 1)
    scales = SCALE[0] + (SCALE[1] - SCALE[0]) * draws[1]
    train, test = TRAIN_PERSONS * FACES_PER_PERSON, TEST_PERSONS * FACES_PER_PERSON
    chosen = {"train": slice(train), "test": slice(len(images) - test, None)}
    patches = {
        name: torch.cat([crop(*face) for face in zip(images[s], angles[s], scales[s], strict=True)])
        for name, s in chosen.items()
    }
    mean = patches["train"].mean(0)
    scale = patches["train"].var(0, correction=0).mean().sqrt()
    return {name: (x - mean) / scale for name, x in patches.items()}


def crop(image: Tensor, angles: Tensor, scales: Tensor) -> Tensor:
    """Patches `(k, 625)` of one image, turned about its centre by `angles` and enlarged by `scales`, both `(k,)`.

    A patch samples the middle 64 × 64 pixels of the enlarged image at 25 × 25 places, between pixels bilinearly.

    Args:
        image: `(64, 64)`.
        angles: in radians, counter-clockwise.
        scales: at least √2, or the patch leaves the image.
    """
    # Coordinates run from −1 to 1 over the image; a sample stands for the cell around it.
    axis = (2 * torch.arange(SIZE) + 1) / SIZE - 1
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = (f(angles)[:, None, None] / scales[:, None, None] for f in (torch.cos, torch.sin))
    # grid_sample takes (column, row), rows downwards.
    grid = torch.stack([cos * column - sin * row, sin * column + cos * row], dim=-1)
    sampled = F.grid_sample(image[None, None], grid.view(1, -1, SIZE, 2), align_corners=False)
    return sampled.view(len(angles), -1)


def _original(path: Path) -> dict[str, Tensor]:
    """Martens' split of the original file; no checksum of it is published, so its shape is what is checked."""
    from scipy.io import loadmat

    columns = torch.from_numpy(loadmat(path)["newfaces_single"])
    train = TRAIN_PERSONS * FACES_PER_PERSON * PER_FACE
    test = TEST_PERSONS * FACES_PER_PERSON * PER_FACE
    expected = (SIZE**2, 400 * PER_FACE)
    if tuple(columns.shape) != expected:
        raise DataError(
            f"{path} holds an array of {tuple(columns.shape)}, not {expected}; delete it to use a surrogate"
        )
    patches = columns.T.float()
    return {"train": patches[:train].contiguous(), "test": patches[-test:].contiguous()}
