"""What the layer-wise search remembers of past measurements."""

from __future__ import annotations

import math
from collections import UserDict

import torch
from torch import Tensor


class Averages(UserDict):
    """Running averages in a plain dictionary, which ``state_dict`` carries.

    Args:
        values: where they are kept. ``measured`` counts measurements; ``resolved`` is below 1 where the present batch's
            loss is down to rounding, and nothing is learnt from it.
        averaging: weight of the past when a step's measurement is added, in [0, 1).
        span: steps that a measurement stands for, once settled.
        settling: measurements that stand for one step each.
    """

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

    def add(self, name: str, value: Tensor, count: int = 1) -> None:
        """Add a measurement, which stands for ``count``, to an average over all so far that no start biases."""
        late = max(self["measured"] - self.settling, 0)
        absent = self.averaging ** (self["measured"] - late + late * self.span)
        past = ((self.past - absent) / (1 - absent)) ** count
        self.remember(name, value.lerp(self[name], past) if name in self else value)

    def remember(self, name: str, value: Tensor) -> None:
        """Keep ``value``, unless the batch's loss is down to rounding: then what was known."""
        self[name] = value.where(self["resolved"] == 1, self[name]) if name in self else value

    def add_loss(self, loss: Tensor) -> None:
        """To the average loss, that average's own average, and how far single losses are from it."""
        self.add("loss_deviation", (loss - self.get("loss", loss)).abs())
        self.add("loss", loss)
        self.add("past_loss", self["loss"])

    def rise(self) -> Tensor:
        """How far the average loss is above its own average, in standard deviations of what noise makes of that.

        With weight ``β`` on the past the two averages of independent losses of variance ``v`` differ by a variance of
        ``(1−β) v / 4``, to first order in ``1−β``. Of few examples single losses have heavy tails, so ``v`` is by the
        mean deviation: ``√(π/2)`` of it is a normal law's standard deviation.
        """
        noise = (math.pi / 8 * (1 - self.past)) ** 0.5 * self["loss_deviation"]
        return (self["loss"] - self["past_loss"]) / noise.clamp_min(torch.finfo(noise.dtype).tiny)
