"""What the layer-wise search remembers of past measurements."""

from __future__ import annotations

import math
from collections import UserDict
from functools import cached_property

import torch
from torch import Tensor


class Averages(UserDict):
    """Running averages in a plain dictionary, which ``state_dict`` carries. A tensor stays in its place in memory.

    Args:
        values: where they are kept. ``measured`` counts measurements; ``resolved`` is below 1 where the present batch's
            loss is down to rounding, and nothing is learnt from it.
        averaging: weight of the past when a step's measurement is added, in [0, 1).
        span: steps that a measurement stands for, once settled.
        settling: measurements that stand for one step each.
    """

    #: By how much shorter steps would have stopped a rise of the loss that they make.
    ENOUGH = 10.0

    def __init__(self, values: dict, averaging: float, span: float, settling: int) -> None:
        self.data = values  # itself, not a copy
        self.averaging, self.span, self.settling = averaging, span, settling

    @property
    def settled(self) -> bool:
        return self["measured"] > self.settling

    @property
    def past(self) -> float:
        """Weight of the past in an average when a measurement is added."""
        return self.averaging ** (self.span if self.settled else 1)

    @cached_property
    def _learns(self) -> Tensor:
        """Whether the batch's loss is more than rounding."""
        return self["resolved"] == 1

    def weight(self, count: int = 1) -> float:
        """Weight of the past when a measurement that stands for ``count`` is added, so that no start biases."""
        late = max(self["measured"] - self.settling, 0)
        absent = self.averaging ** (self["measured"] - late + late * self.span)
        return ((self.past - absent) / (1 - absent)) ** count

    def add(self, name: str, value: Tensor, past: float | Tensor) -> None:
        """Add a measurement to an average in which the past has that ``weight``."""
        self.remember(name, value.lerp(self[name], past) if name in self else value)

    def remember(self, name: str, value: Tensor) -> None:
        """Keep ``value``, unless the batch's loss is down to rounding: then what was known."""
        if name in self:
            torch.where(self._learns, value, self[name], out=self[name])
        else:
            self.keep(name, value)

    def keep(self, name: str, value: Tensor) -> None:
        """Keep a copy of ``value``."""
        if name in self:
            self[name].copy_(value)
        else:
            self[name] = value.clone()

    def add_loss(self, loss: Tensor, past: float | Tensor) -> None:
        """To the average loss, that average's own average, and how far single losses are from it.

        A rise that goes on while step sizes were ``braked`` enough is not of their making: what is past starts anew.
        """
        if "braked" in self:
            for name in ("loss", "past_loss"):
                self.remember(name, torch.where(self["braked"] >= self.ENOUGH, loss, self[name]))
        self.add("loss_deviation", (loss - self.get("loss", loss)).abs(), past)
        self.add("loss", loss, past)
        self.add("past_loss", self["loss"], past)

    def rise(self) -> Tensor:
        """How far the average loss is above its own average, in standard deviations of what noise makes of that.

        With weight ``β`` on the past the two averages of independent losses of variance ``v`` differ by a variance of
        ``(1−β) v / 4``, to first order in ``1−β``. Of few examples single losses have heavy tails, so ``v`` is by the
        mean deviation: ``√(π/2)`` of it is a normal law's standard deviation.
        """
        noise = (math.pi / 8 * (1 - self.past)) ** 0.5 * self["loss_deviation"]
        return (self["loss"] - self["past_loss"]) / noise.clamp_min(torch.finfo(noise.dtype).tiny)
