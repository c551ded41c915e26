r"""Gradient accumulation: a batch in parts, evaluated one after another, for batches whose activations do not fit.

::

    parts = zip(inputs.chunk(4), targets.chunk(4))
    loss = optimizer.step(accumulate(objective(x, y) for x, y in parts))

Loss and gradient are the means over all parts; so is whatever follows from them, clipping included. What a layer-wise
method measures besides, curvature and noise, it measures on the last part: estimates of the same quantities from fewer
examples, the noise divided by ``√k``, for a mean over ``k`` parts has that much less. BatchNorm sees every part by
itself, as it does in any loop that accumulates. No more than two parts' activations are held at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor

from optimizers.objective import Minibatch


def accumulate(parts: Iterable[Minibatch]) -> Minibatch:
    """One minibatch of several, of equal size and of one objective.

    Raises:
        ValueError: there is none, or their sizes differ, so that the mean over parts is not that over examples.
        NotImplementedError: graphs' batches, whose rows depend on one another, or those that processes share.
    """
    parts = list(parts)
    sizes = [part.size for part in parts]
    if len(set(sizes)) != 1:
        raise ValueError(f"a batch is accumulated from parts of one size, not of {sizes or 'none'}")
    if any(part.rows is not None or part.ranks > 1 for part in parts):
        raise NotImplementedError("neither graphs nor batches that processes share are accumulated from parts")
    return Accumulated(parts)


class Accumulated(Minibatch):
    """The last of several minibatches, with the gradient of all."""

    def __init__(self, parts: list[Minibatch]) -> None:
        *self.others, last = parts
        super().__init__(last.objective, last.inputs, last.targets, None)
        self.others = [copy.copy(part) for part in self.others]
        self.drawn = self.size * self.parts
        for part in (*self.others, self):
            part.weight = 1 / self.parts

    @property
    def parts(self) -> int:
        return len(self.others) + 1

    def evaluate(self) -> Tensor:
        return sum((part.evaluate() for part in self.others), super().evaluate()) / self.parts

    def finish(self, loss: Tensor) -> Tensor:
        """``.grad`` and the loss become the means over all parts; then as ever."""
        loss = sum((part.add_gradient() for part in self.others), loss)
        torch._foreach_div_([p.grad for p in self.objective.model.parameters() if p.grad is not None], self.parts)
        return super().finish(loss / self.parts)
