"""A network whose forward pass alone runs in low precision."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowPrecision(nn.Module):
    """A network under bfloat16 autocast: parameters, outputs, gradients and curvature stay in float32.

    Args:
        network: called as `network(*inputs)`; returns one tensor.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Tensor:
        """The network's outputs, in float32."""
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            outputs = self.network(*inputs)
        return outputs.float()
