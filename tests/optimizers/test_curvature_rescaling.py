"""The curvature along a direction against a Hessian–vector product, and the step against an exact line search."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.autoencoder import Autoencoder
from models.likelihoods import Bernoulli, Categorical, Gaussian
from models.resnet import ResNet
from optimizers import Objective
from optimizers.curvature_rescaling import RescaledAdam, RescaledSGD
from optimizers.replay import RandomState
from optimizers.tangent import Curvature, hessian_quadratic
from tests.optimizers.cases import least_squares, small_batch, small_network, small_objective

BOTH_COSTS = pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])


def images(model, classes, channels=3, size=8):
    x = torch.randn(6, channels, size, size, dtype=torch.float64)
    return Objective(model.double(), Categorical())(x, torch.randint(classes, (6,)))


def autoencoder():
    return Objective(Autoencoder([12, 8, 3]).double(), Bernoulli())(*[torch.rand(9, 12, dtype=torch.float64)] * 2)


def frozen():
    model = ResNet(1, [4, 6, 8], 3)
    model.bn.requires_grad_(False)
    model.stages[1].conv1.requires_grad_(False)
    return images(model, 3)


def evaluation_mode():
    minibatch = images(ResNet(1, [4, 6, 8], 3), 3)
    minibatch()
    minibatch.objective.model.eval()
    return minibatch


def smooth():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.GroupNorm(2, 4), nn.Dropout(0.3), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(36, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 3), nn.Softplus(),
    )  # fmt: skip
    return images(model, 3)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.shared, self.unused = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.tanh = nn.Tanh()

    def forward(self, x):
        hidden = self.shared(self.tanh(self.first(x)))
        self.unused(hidden)
        return self.shared(self.tanh(hidden)) * 2 + x


def shared():
    x = torch.randn(5, 4, dtype=torch.float64)
    return Objective(Shared().double(), Gaussian())(x, torch.randn_like(x))


def graph():
    from models.gcn import GCN

    nodes = 12
    dense = (torch.rand(nodes, nodes, dtype=torch.float64) < 0.3).double() + torch.eye(nodes, dtype=torch.float64)
    features = (torch.rand(nodes, 7, dtype=torch.float64) < 0.5).double().to_sparse_csr()
    rows = torch.tensor([0, 2, 5, 7])
    return Objective(GCN(7, 5, 3).double(), Categorical())(
        (features, (dense + dense.T).to_sparse_csr()), torch.tensor([0, 1, 2, 0]), rows
    )


CASES = [autoencoder, lambda: images(ResNet(1, [4, 6, 8], 3), 3), frozen, evaluation_mode, smooth, shared, graph]
NAMES = ["autoencoder", "resnet", "frozen", "evaluation", "smooth", "shared", "graph"]


@BOTH_COSTS
@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_curvature_is_the_hessians(case, recompute):
    torch.manual_seed(0)
    minibatch = case()
    state = RandomState(torch.device("cpu"))
    curvature = Curvature(minibatch, recompute)
    gradients = {p: p.grad for layer in minibatch.objective.layers for p in layer.parameters}
    for scale in (1.0, 1e-3):
        u = {p: scale * torch.randn_like(p) for p in gradients}
        torch.testing.assert_close(curvature(u), hessian_quadratic(minibatch, u, state), rtol=1e-10, atol=0)
    with state.replayed():
        minibatch()
    for p, g in gradients.items():
        torch.testing.assert_close(g, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-10, atol=1e-14)


@BOTH_COSTS
def test_single_precision_is_close(recompute):
    torch.manual_seed(0)
    minibatch = Objective(ResNet(1, [8, 8, 8], 3), Categorical())(torch.randn(8, 3, 16, 16), torch.arange(8) % 3)
    state = RandomState(torch.device("cpu"))
    curvature = Curvature(minibatch, recompute)
    u = {p: p.grad for layer in minibatch.objective.layers for p in layer.parameters}
    torch.testing.assert_close(curvature(u), hessian_quadratic(minibatch, u, state), rtol=1e-3, atol=0)


def test_convergence_minimises_and_border_leaves_the_loss():
    """On a quadratic ℓ = 1 is the exact line search, ℓ = ½ has ¾ of its decrease, ℓ = 2 none."""
    decreases = []
    for lr in (1.0, 0.5, 2.0):
        objective, x, y, model = least_squares()
        minibatch = objective(x * torch.arange(1, 6), y)
        loss = RescaledSGD(model.parameters(), lr=lr, averaging=0.0).step(minibatch)
        decreases.append(loss - minibatch.evaluate())
    g = model.weight.grad
    slope, curvature = g.square().sum(), (x * torch.arange(1, 6) @ g.T).square().sum() / len(x)
    best = slope**2 / (2 * curvature)
    expected = torch.stack([best, 0.75 * best, 0 * best])
    torch.testing.assert_close(torch.stack(decreases), expected, rtol=1e-10, atol=1e-12)


def test_weight_decay_counts_in_slope_and_curvature():
    objective, x, y, model = least_squares()
    optimizer = RescaledSGD(model.parameters(), averaging=0.0, weight_decay=3.0)
    for _ in range(60):
        optimizer.step(objective(x, y))
    torch.testing.assert_close(model.weight.detach(), y.T @ x / len(x) / 4, rtol=1e-8, atol=1e-10)


def test_numerator_and_denominator_are_averaged_apart():
    objective, x, y, model = least_squares()
    optimizer = RescaledSGD(model.parameters(), lr=0.1, averaging=0.9)
    scales = (1.0, 3.0)
    for scale in scales:
        optimizer.step(objective(scale * x, y))
    weights = torch.tensor([0.09, 0.1])
    expected = weights.sum() / (weights * torch.tensor(scales).square()).sum()
    size = optimizer.diagnostics()["all"]["step_size"] / 0.1
    torch.testing.assert_close(size, expected.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", [RescaledSGD, RescaledAdam])
def test_negative_curvature_gives_a_finite_step(method):
    model = small_network(torch.float64)
    optimizer = method(model.parameters(), averaging=0.0)
    size = optimizer._step_size(*torch.tensor([2.0, -4.0, 2.0]).unbind())
    assert size == 0.5
    assert optimizer._step_size(*torch.tensor([-2.0, 4.0, 2.0]).unbind()) == 0
    assert optimizer._step_size(*torch.zeros(3).unbind()) == 0


@pytest.mark.parametrize(("method", "options"), [(RescaledSGD, {"momentum": 0.9}), (RescaledAdam, {})])
def test_any_direction_learns(method, options):
    model = small_network()
    optimizer = method(model.parameters(), lr=0.5, **options)
    objective = small_objective(model)
    losses = [optimizer.step(objective(*small_batch())) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_hidden_smooth_function_is_refused():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear1, self.linear2 = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.linear2(F.gelu(3 * self.linear1(x)))

    torch.manual_seed(0)
    model = Hidden()
    minibatch = Objective(model, Gaussian())(torch.randn(20, 4), 10 * torch.randn(20, 2))
    with pytest.raises(RuntimeError, match="smooth function"):
        RescaledSGD(model.parameters()).step(minibatch)


@pytest.mark.parametrize(("recompute", "extra"), [(False, 2 / 3), (True, 1.0)])
def test_work_is_counted(recompute, extra):
    minibatch = autoencoder()
    curvature = Curvature(minibatch, recompute)
    curvature({p: p.grad for layer in minibatch.objective.layers for p in layer.parameters})
    assert minibatch.objective.gradient_equivalents == pytest.approx(1 + extra)


def test_a_curvature_that_is_not_finite_is_left_out_and_told():
    objective, x, y, model = least_squares()
    optimizer = RescaledSGD(model.parameters())
    optimizer.step(objective(x, y))
    size = optimizer._averages["step_size"].clone()
    one = torch.ones((), dtype=torch.float64)
    assert optimizer._step_size(one, one * torch.inf, one) == size
    assert optimizer.diagnostics()["all"]["skipped"] == 1


def test_indices_that_a_layer_of_no_closed_rule_takes_stand_still():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4, max_norm=1.0), nn.Flatten(), nn.Tanh(), nn.Linear(8, 3)).double()
    minibatch = Objective(model, Categorical())(torch.randint(9, (6, 2)), torch.randint(3, (6,)))
    curvature = Curvature(minibatch)
    u = {p: torch.randn_like(p) for p in model.parameters()}
    exact = hessian_quadratic(minibatch, u, RandomState(torch.device("cpu")))
    torch.testing.assert_close(curvature(u), exact, rtol=1e-10, atol=0)


def test_a_derivative_that_torch_does_not_have_is_said_to_be_missing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardsigmoid(), nn.Linear(4, 3))
    minibatch = Objective(model, Categorical())(torch.randn(6, 4), torch.randint(3, (6,)))
    with pytest.raises(NotImplementedError, match=r"hardsigmoid_backward is not implemented\): take another optimizer"):
        RescaledSGD(model.parameters()).step(minibatch)


def test_frozen_parameters_have_no_part_in_decay_and_penalty():
    objective, x, y, _ = least_squares()
    body, head = nn.Linear(5, 4, dtype=x.dtype), nn.Linear(4, 3, dtype=x.dtype)
    body.requires_grad_(False)
    objective = Objective(nn.Sequential(body, head), Gaussian(), penalty=dict.fromkeys(body.parameters(), 0.1))
    optimizer = RescaledSGD([{"params": body.parameters(), "weight_decay": 0.1}, {"params": head.parameters()}], lr=1.0)
    before = objective(x, y).evaluate()
    optimizer.step(objective(x, y))
    assert objective(x, y).evaluate() < before


def test_a_front_without_trained_parameters_has_nothing_to_hold():
    model = nn.Sequential(nn.BatchNorm1d(6, affine=False), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model[1].requires_grad_(False)
    optimizer = RescaledSGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    batch = torch.randn(8, 6), torch.arange(8) % 3
    losses = [optimizer.step(Objective(model, Categorical())(*batch)) for _ in range(5)]
    assert losses[-1] < losses[0]
