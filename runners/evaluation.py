"""Losses and metrics over whole splits, in evaluation mode."""

from __future__ import annotations

import torch

from data.batches import Batches, Split
from optimizers.objective import Likelihood

CUDA_CHUNK = 1000  # examples per forward pass; the CPU's cache prefers the training batch size


@torch.no_grad()
def measure(model: torch.nn.Module, likelihood: Likelihood, split: Split, batch_size: int | None) -> list[float]:
    """Mean loss and mean metric of a split; one wait for the device.

    Args:
        model: in evaluation mode.
        likelihood: of the task; it also has the metric.
        split: examples on the model's device; rows of a graph's outputs for graphs.
        batch_size: that training uses.
    """
    device = split.targets.device
    if batch_size is not None and device.type == "cuda":
        batch_size = max(batch_size, CUDA_CHUNK)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for inputs, targets, rows in Batches(split, batch_size, shuffle=False, drop_last=False):
        outputs = model(*inputs) if rows is None else model(*inputs)[rows]
        for i, quantity in enumerate((likelihood.nll, likelihood.metric)):
            total[i] += quantity(outputs, targets).sum(dtype=torch.float64)
    return (total / len(split)).tolist()


def set_mode(mode: str, *parts) -> None:
    """`train` or `eval`, for a model and for optimizers that keep two sets of weights."""
    for part in parts:
        getattr(part, mode, lambda: None)()
