"""torch-geometric's `GCNConv` for sparse features on an undirected graph. Imported late: it takes seconds to load."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch_geometric.nn
from torch import Tensor


class GCNConv(torch_geometric.nn.GCNConv):
    """`Z = Â (X W) + b` for a given symmetric `Â` (sparse CSR) and X (dense or sparse CSR).

    It differs from its parent in what is done with zeros and in the backward pass: products with a bag of words X are
    sparse, and `Âᵀ = Â` is used as it is, where autograd would sort `Â` into its transpose anew each time.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, normalize=False)
        self._transposed = Transposition()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """`Z` from X and `Â`."""
        weight = self.lin.weight.T
        product = x @ weight if x.layout == torch.strided else SparseProduct.apply(x, self._transposed, weight)
        # propagate_type: (x: Tensor, edge_weight: OptTensor)
        return self.propagate(edge_index, x=product, edge_weight=None) + self.bias

    def message_and_aggregate(self, adj_t: Tensor, x: Tensor) -> Tensor:
        """`Â X`."""
        return SparseProduct.apply(adj_t, _itself, x)


class SparseProduct(torch.autograd.Function):
    """`A X` for a constant sparse `A`, differentiable in X any number of times, forward and backward.

    The second argument makes `Aᵀ` of `A`; it is called in backward passes only.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, transposed: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed  # `setup_context` would double what a small product takes
        return matrix @ x

    @staticmethod
    def backward(ctx, delta: Tensor) -> tuple[None, None, Tensor]:
        return None, None, SparseProduct.apply(ctx.transposed(ctx.matrix), lambda _: ctx.matrix, delta)

    @staticmethod
    def jvp(ctx, _matrix, _transposed, tangent: Tensor) -> Tensor:
        return ctx.matrix @ tangent


def _itself(matrix: Tensor) -> Tensor:
    return matrix


class Transposition:
    """`Aᵀ` of sparse CSR matrices whose nonzeros stand where those of the last one stood: their order is kept."""

    def __init__(self) -> None:
        self._pattern: tuple[Tensor, Tensor] | None = None  # held, so that no other tensor comes to lie there

    def __call__(self, matrix: Tensor) -> Tensor:
        pattern = matrix.crow_indices(), matrix.col_indices()
        if self._pattern is None or any(not a.is_set_to(b) for a, b in zip(pattern, self._pattern, strict=True)):
            self._pattern = pattern
            self._order, self._crow, self._col = _transposed_pattern(*pattern, matrix.shape[1])
        values = matrix.values().index_select(0, self._order)
        size = (matrix.shape[1], matrix.shape[0])
        return torch.sparse_csr_tensor(self._crow, self._col, values, size, check_invariants=False)


def _transposed_pattern(crow: Tensor, col: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The order in which a matrix's values are its transpose's, and the transpose's indices."""
    rows = torch.repeat_interleave(torch.arange(len(crow) - 1, device=crow.device), crow.diff())
    order = col.argsort(stable=True)
    starts = torch.searchsorted(col[order], torch.arange(columns + 1, device=col.device))
    return order, starts.to(crow.dtype), rows[order].to(col.dtype)
