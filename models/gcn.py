"""Graph convolutional network (Kipf and Welling, ICLR 2017)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class GCN(nn.Module):
    """Two graph convolutions: `Z = Â drop(relu(Â drop(X) W₁ + b₁)) W₂ + b₂`.

    Weights start Glorot uniform and biases zero, the default of torch-geometric's `GCNConv`.

    Args:
        features: columns of X.
        hidden: width of the hidden layer.
        classes: columns of Z.
        dropout: probability of dropping an entry of either layer's input.
    """

    def __init__(self, features: int, hidden: int, classes: int, dropout: float = 0.5) -> None:
        from models.graph_convolution import GCNConv  # takes seconds: only where a graph is used

        super().__init__()
        self.dropout1 = SparseDropout(dropout)
        self.conv1 = GCNConv(features, hidden)
        self.relu = nn.ReLU()
        self.dropout2 = Dropout(dropout)
        self.conv2 = GCNConv(hidden, classes)

    def forward(self, features: Tensor, adjacency: Tensor) -> Tensor:
        """Logits of all nodes `(nodes, classes)` from X `(nodes, features)` and Â `(nodes, nodes)`, both sparse CSR."""
        hidden = self.relu(self.conv1(self.dropout1(features), adjacency))
        return self.conv2(self.dropout2(hidden), adjacency)

    def penalised_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters under an L2 penalty: the first layer's, as in the original."""
        return self.conv1.parameters()


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`, on a CPU by uniform numbers, which come three times as fast as Bernoulli's."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not self.training or self.p in (0, 1):
            return super().forward(x)
        return x * (torch.rand_like(x) >= self.p).to(x.dtype).mul_(1 / (1 - self.p))


class SparseDropout(Dropout):
    """Dropout of a sparse CSR matrix.

    Zeros stay zero whether dropped or not, so only stored entries are drawn: on the CPU, drawing for every entry of a
    bag of words would cost several times the rest of a training step.
    """

    def forward(self, matrix: Tensor) -> Tensor:
        values = super().forward(matrix.values())
        parts = (matrix.crow_indices(), matrix.col_indices(), values)
        return torch.sparse_csr_tensor(*parts, matrix.shape, check_invariants=False)
