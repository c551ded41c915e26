"""Data sets as tensors on the device, and minibatches taken from them.

A `Split` holds examples, a `Dataset` its splits, `Batches` walks over one split. Everything is a tensor that already
lies on the training device: a batch is one gather, without worker processes or collation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One minibatch: the model's inputs, the targets, and for a graph the labelled rows of the outputs."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    rows: Tensor | None


@dataclass(frozen=True)
class Split:
    """Examples of one kind (training, validation or test).

    Attributes:
        inputs: what the model is called with; the first dimension runs over examples, except for graphs, where the
            inputs are the whole graph (features, adjacency) and are shared by all splits.
        targets: labels `(n,)`, or for autoencoders the very tensor of the inputs `(n, pixels)`.
        rows: for graphs, the nodes that the targets label `(n,)`; otherwise None.
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, index: Tensor | slice) -> Split:
        """The examples at `index` (a graph keeps its inputs whole)."""
        if self.rows is not None:
            return Split(self.inputs, self.targets[index], self.rows[index])
        inputs = tuple(x[index] for x in self.inputs)
        targets = inputs[0] if self.targets is self.inputs[0] else self.targets[index]
        return Split(inputs, targets)

    def map(self, function: Callable[[Tensor], Tensor]) -> Split:
        """The split with `function` applied to each of its tensors."""
        rows = None if self.rows is None else function(self.rows)
        return Split(tuple(function(x) for x in self.inputs), function(self.targets), rows)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Split:
        """The split on `device`, its real numbers in `dtype`; a tensor that occurs twice is moved once."""
        return self.map(_mover(device, dtype))


@dataclass(frozen=True)
class Dataset:
    """The splits of one data set.

    Attributes:
        train: all training examples, until `holdout` takes some away.
        test: test examples.
        validation: the data set's own validation examples, or those held out.
        augment: `augment(images, generator) -> images` for training batches, or None.
        surrogate: what the data stand in for, in words, where they are not the original; otherwise None.
        name: the data set's name.
    """

    train: Split
    test: Split
    validation: Split | None
    augment: Callable[[Tensor, torch.Generator | None], Tensor] | None
    surrogate: str | None
    name: str

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Dataset:
        """The data set on `device`, its real numbers in `dtype`; tensors shared by splits stay shared."""
        move = _mover(device, dtype)
        validation = None if self.validation is None else self.validation.map(move)
        return replace(self, train=self.train.map(move), test=self.test.map(move), validation=validation)

    def holdout(self, fraction: float = 0.1, generator: torch.Generator | None = None) -> Dataset:
        """Move a random `fraction` of the training examples to the validation split.

        A data set that has validation examples of its own is returned as it is.

        Args:
            fraction: share of the training examples to hold out, in (0, 1).
            generator: CPU generator that chooses them.

        Raises:
            ValueError: if either part would be empty.
        """
        if self.validation is not None:
            return self
        n = len(self.train)
        held = round(n * fraction)
        if not 0 < held < n:
            raise ValueError(f"cannot hold out {fraction} of {n} training examples: a part would be empty")
        order = torch.randperm(n, generator=generator).to(self.train.targets.device)
        return replace(self, train=self.train.take(order[held:]), validation=self.train.take(order[:held]))


class Batches:
    """Minibatches of a split; each iteration is one epoch.

    Index tensors are drawn on the CPU, so that every device sees the same batches, and moved once per epoch.

    Args:
        split: examples, already on the device where the batches shall be.
        batch_size: examples per batch; None for the whole split, in its own order and without a copy.
        shuffle: draw a new order every epoch.
        drop_last: leave out a last batch that would be smaller than the others.
        augment: applied to a batch's first input, with `augment_generator`.
        generator: CPU generator of the order.
        augment_generator: generator of the augmentation, on the split's device.

    Raises:
        ValueError: if the batch size is not positive, or larger than the split with `drop_last`.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int | None,
        *,
        shuffle: bool,
        drop_last: bool,
        augment: Callable[[Tensor, torch.Generator | None], Tensor] | None = None,
        generator: torch.Generator | None = None,
        augment_generator: torch.Generator | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use a positive integer, or None for all")
        if batch_size is not None and drop_last and batch_size > len(split):
            raise ValueError(f"batch_size is {batch_size}, but there are {len(split)} examples; use at most that")
        self.split = split
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.augment = augment
        self.generator = generator
        self.augment_generator = augment_generator

    def __len__(self) -> int:
        if self.batch_size is None:
            return 1
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        for part in self._parts():
            inputs = part.inputs
            if self.augment is not None:
                inputs = (self.augment(inputs[0], self.augment_generator), *inputs[1:])
            yield Batch(inputs, part.targets, part.rows)

    def _parts(self) -> Iterator[Split]:
        if self.batch_size is None:
            yield self.split
            return
        slices = [slice(i * self.batch_size, (i + 1) * self.batch_size) for i in range(len(self))]
        if not self.shuffle:
            yield from (self.split.take(s) for s in slices)
            return
        order = torch.randperm(len(self.split), generator=self.generator).to(self.split.targets.device)
        yield from (self.split.take(order[s]) for s in slices)


def _mover(device: torch.device | str, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    # Tensors hash by identity: one that several splits share is moved once and stays shared.
    return functools.cache(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))
