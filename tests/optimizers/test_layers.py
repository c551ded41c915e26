"""Captured layers against autograd: gradients, tangents and taps for every kind of layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from optimizers.layers import find_layers
from optimizers.replay import frozen_statistics
from optimizers.trace import Trace

torch_double = torch.float64


class Tied(nn.Module):
    """One linear layer used twice, and a parameter of the container's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class OwnRule(nn.Module):
    """A module of no known type."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x * self.scale.square()


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(5, 4, normalize=False), GCNConv(4, 3, normalize=False)

    def forward(self, x, adjacency):
        return self.second(torch.relu(self.first(x, adjacency)), adjacency)


def images(*shape):
    return (torch.randn(*shape),)


def graph():
    adjacency = torch.rand(8, 8)
    return torch.randn(8, 5), ((adjacency + adjacency.T) / 8).to_sparse_csr()


class Sage(nn.Module):
    """Graph convolutions that are not linear in their parameters: outputs of length 1, a ReLU inside."""

    def __init__(self):
        super().__init__()
        from torch_geometric.nn import SAGEConv

        self.first, self.second = SAGEConv(5, 4, normalize=True), SAGEConv(4, 3, project=True)

    def forward(self, x, adjacency):
        return self.second(torch.relu(self.first(x, adjacency)), adjacency)


NETWORKS = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), lambda: images(7, 4)),
    "sequence": (lambda: nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.LayerNorm(5)), lambda: images(7, 3, 4)),
    "conv2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2),
            nn.GroupNorm(3, 6),
            nn.Flatten(),
            nn.Linear(96, 3),
        ),
        lambda: images(6, 2, 8, 8),
    ),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.BatchNorm1d(3)), lambda: images(5, 2, 9)),
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3)),
        lambda: (torch.randint(0, 9, (6, 3)),),
    ),
    "embedding bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode="sum", padding_idx=2), nn.Tanh(), nn.Linear(4, 3)),
        lambda: (torch.randint(0, 9, (6, 3)),),
    ),
    "padded": (
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular")),
        lambda: images(4, 1, 5, 5),
    ),
    "tied": (Tied, lambda: images(5, 6)),
    "own": (lambda: nn.Sequential(nn.Linear(6, 6), OwnRule()), lambda: images(5, 6)),
    "graph": (Graph, graph),
    "bent graph": (Sage, graph),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Conv2d(2, 4, 3)), nn.Flatten(), weight_norm(nn.Linear(64, 3))),
        lambda: images(5, 2, 6, 6),
    ),
    "spectral norm": (lambda: nn.Sequential(spectral_norm(nn.Linear(4, 5)).eval(), nn.Tanh()), lambda: images(7, 4)),
}


@pytest.fixture(params=NETWORKS, autouse=False)
def case(request):
    build, inputs = NETWORKS[request.param]
    torch.manual_seed(0)
    torch.set_default_dtype(torch_double)
    try:
        yield build(), inputs()
    finally:
        torch.set_default_dtype(torch.float32)


def trace(model, inputs):
    return Trace(model, find_layers(model), inputs, count=lambda work: None)


def test_gradients_equal_autograd(case):
    model, inputs = case
    captured = trace(model, inputs)
    cotangent = torch.randn_like(captured.outputs)
    got = captured.gradients(captured.outputs, cotangent)
    with frozen_statistics(model):
        expected = torch.autograd.grad(model(*inputs), [p for layer in got for p in layer.parameters], cotangent)
    torch.testing.assert_close([g for gs in got.values() for g in gs], list(expected), rtol=1e-12, atol=1e-12)
    assert {id(p) for layer in got for p in layer.parameters} == {id(p) for p in model.parameters()}


def test_slopes_are_the_gradient_along_a_direction(case):
    """Σ_i ⟨δ_i, ż_i⟩ = ⟨gradient, d⟩ for every layer: tangent and gradient are adjoint."""
    model, inputs = case
    captured = trace(model, inputs)
    cotangent = torch.randn_like(captured.outputs)
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in find_layers(model)}
    by_name = {layer.name: d for layer, d in directions.items()}
    gradients = captured.gradients(captured.outputs, cotangent, retain_graph=True)
    slopes = {}

    def visit(call, delta):
        slopes[call.layer] = slopes.get(call.layer, 0) + call.slopes(delta, by_name[call.layer.name]).sum()

    captured.backward(cotangent, visit)
    for layer, gradient in gradients.items():
        expected = sum((g * d).sum() for g, d in zip(gradient, by_name[layer.name], strict=True))
        torch.testing.assert_close(slopes[layer], expected, rtol=1e-10, atol=1e-12)


def test_tapping_changes_no_output_and_no_statistics_beyond_one_update():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True))
    x = torch.randn(6, 4)
    with frozen_statistics(model):
        expected = model(x)
    assert model[1].num_batches_tracked == 0
    assert torch.equal(trace(model, (x,)).outputs, expected)
    assert model[1].num_batches_tracked == 1


def test_frozen_parameters_are_in_no_layer_and_partly_frozen_layers_work():
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.BatchNorm1d(3))
    model[0].requires_grad_(False)
    model[1].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    layers = find_layers(model)
    assert [(layer.name, layer.names) for layer in layers] == [("1", ("bias",)), ("2", ("weight",))]
    captured = trace(model, (torch.randn(6, 4),))
    gradients = captured.gradients(captured.outputs, torch.ones_like(captured.outputs))
    assert [g.shape for gs in gradients.values() for g in gs] == [(3,), (3,)]


def test_a_layer_that_returns_no_tensor_is_named():
    class Described(nn.Linear):
        def forward(self, x):
            return {"output": super().forward(x)}

    with pytest.raises(TypeError, match="layer '0' \\(Described\\) returns dict"):
        trace(nn.Sequential(Described(3, 4)), (torch.randn(2, 3),))


def test_a_layer_that_torch_cannot_differentiate_so_is_named():
    model = nn.Sequential(nn.EmbeddingBag(9, 4, mode="max"))
    captured = trace(model, (torch.randint(9, (5, 3)),))
    with pytest.raises(TypeError, match="layer '0' \\(EmbeddingBag\\) has no derivative along a direction"):
        captured.calls[0].tangent([torch.ones_like(model[0].weight)])


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no trainable parameters"):
        trace(nn.Linear(2, 2).requires_grad_(False), (torch.randn(1, 2),))
