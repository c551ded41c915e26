"""Data sets as tensors on the device, and minibatches taken from them.

A `Split` holds examples, a `Dataset` its splits, `Batches` walks over one split. Everything is a tensor that already
lies on the training device: a batch is one gather, without worker processes or collation. What does not fit there has
splits of another kind, which make the same batches from files: `data.imagenet.Stream`.

`Batches` alone draws random numbers: it plans an epoch (which examples make each batch, and what each one's
augmentation is to use), and the split loads what is planned. So a run that goes on within an epoch loads nothing twice,
one of several processes loads only its own part of each batch, and none of it changes a bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One minibatch: the model's inputs, the targets, and for a graph the labelled rows of the outputs."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    rows: Tensor | None


class Augmentation(Protocol):
    """A random change of training examples, whose random numbers are drawn apart from their use."""

    def draw(self, m: int, generator: torch.Generator | None) -> Tensor:
        """What `m` examples need, a row each; on the split's device."""

    def __call__(self, examples, draws: Tensor):
        """Examples changed as drawn: a split's first input, or where they come one by one, one of them."""


class Part(NamedTuple):
    """A batch as it is planned: which examples of the split (None: all), and the draws of their augmentation."""

    index: Tensor | slice | None
    draws: Tensor | None


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

    @property
    def device(self) -> torch.device:
        """Where examples are when they are taken and augmented."""
        return self.targets.device

    def load(self, plan: Iterable[Part], augment: Augmentation | None) -> Iterator[Batch]:
        """The planned batches; without `augment`, the examples as they are."""
        for index, draws in plan:
            part = self if index is None else self.take(index)
            inputs = part.inputs if augment is None else (augment(part.inputs[0], draws), *part.inputs[1:])
            yield Batch(inputs, part.targets, part.rows)

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
        augment: for training batches, or None.
        surrogate: what the data stand in for, in words, where they are not the original; otherwise None.
        name: the data set's name.
        evaluated: how many training examples `train_loss` is measured on; None: all.
    """

    train: Split
    test: Split
    validation: Split | None
    augment: Augmentation | None
    surrogate: str | None
    name: str
    evaluated: int | None = None

    @property
    def measured(self) -> Split:
        """The training examples that `train_loss` is measured on, evenly spaced over their order."""
        n, m = len(self.train), self.evaluated
        return self.train if m is None or m >= n else self.train.take(torch.arange(m) * n // m)

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
        split: examples.
        batch_size: examples per batch; None for the whole split, in its own order and without a copy.
        shuffle: draw a new order every epoch.
        drop_last: leave out a last batch that would be smaller than the others.
        augment: of training examples.
        generator: CPU generator of the order.
        augment_generator: generator of the augmentation, on the split's device.
        share: `(rank, ranks)`: this process's part of each batch, of so many equal ones.

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
        augment: Augmentation | None = None,
        generator: torch.Generator | None = None,
        augment_generator: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
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
        self.share = share

    def __len__(self) -> int:
        if self.batch_size is None:
            return 1
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()

    def epoch(self, skip: int = 0) -> Iterator[Batch]:
        """One epoch's batches, less the first `skip`; the generators end where they would with them."""
        return self.split.load(self._plan(skip), self.augment)

    def _plan(self, skip: int) -> Iterator[Part]:
        rank, ranks = self.share
        n, order = len(self.split), None
        if self.shuffle and self.batch_size is not None:
            order = torch.randperm(n, generator=self.generator).to(self.split.device)
        for number in range(len(self)):
            start = number * (self.batch_size or n)
            size = min(self.batch_size or n, n - start)
            draws = None if self.augment is None else self.augment.draw(size, self.augment_generator)
            if number < skip:
                continue
            if self.batch_size is None:
                yield Part(None, draws)
                continue
            first, last = size * rank // ranks, size * (rank + 1) // ranks
            index = slice(start + first, start + last)
            yield Part(index if order is None else order[index], None if draws is None else draws[first:last])


def _mover(device: torch.device | str, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    # Tensors hash by identity: one that several splits share is moved once and stays shared.
    return functools.cache(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))
