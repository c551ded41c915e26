"""The 1,797 handwritten 8×8 digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from data.batches import Dataset, Split


def digits(root: Path, cache: Path, test: int, seed: int) -> Dataset:
    """Digits with zero mean and unit variance over the training pixels, inputs `(n, 1, 8, 8)`.

    Args:
        root: unused: the data are embedded.
        cache: unused.
        test: number of test examples, drawn at random.
        seed: seed of that draw; part of the task, not of a run.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1)
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    std, mean = torch.std_mean(images[order[test:]], correction=0)
    every = Split(((images - mean) / std,), labels)
    return Dataset(every.take(order[test:]), every.take(order[:test]), None, None, None, "digits")
