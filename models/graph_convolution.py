"""torch-geometric's `GCNConv` on an undirected graph. Imported late: torch-geometric takes seconds."""

from __future__ import annotations

import torch
import torch_geometric.nn
from torch import Tensor


class GCNConv(torch_geometric.nn.GCNConv):
    """`Z = Â (X W) + b` for a given symmetric `Â` (sparse CSR).

    It differs from its parent only in the backward pass: `Âᵀ = Â` is used as it is, where autograd would sort `Â` into
    its transpose anew each time.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, normalize=False)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """`Z` from X (dense) and `Â`."""
        # propagate_type: (x: Tensor, edge_weight: OptTensor)
        return self.propagate(edge_index, x=self.lin(x), edge_weight=None) + self.bias

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        """`Â X`."""
        return SymmetricProduct.apply(adj_t, x)


class SymmetricProduct(torch.autograd.Function):
    """`A X` for a constant symmetric `A`; its derivative in X, forward and backward, is itself."""

    @staticmethod
    def forward(matrix: Tensor, x: Tensor) -> Tensor:
        return matrix @ x

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.matrix = inputs[0]

    @staticmethod
    def backward(ctx, delta: Tensor) -> tuple[None, Tensor]:
        return None, SymmetricProduct.apply(ctx.matrix, delta)

    @staticmethod
    def jvp(ctx, _, tangent: Tensor) -> Tensor:
        return ctx.matrix @ tangent
