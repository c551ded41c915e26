"""K-BFGS: the quasi-Newton algebra against dense references, one step against the recursion written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.likelihoods import Bernoulli, Categorical, Gaussian
from optimizers import Objective
from optimizers.kbfgs import KBFGS, KBFGSL
from optimizers.quasi_newton import bfgs, double_damping, is_good, lbfgs
from optimizers.replay import frozen_statistics
from tests.optimizers.cases import small_batch, small_network, small_objective

BOTH = pytest.mark.parametrize("method", [KBFGS, KBFGSL])


def pairs(count, n=6):
    """Pairs of a positive definite Hessian, with noise and some negative curvature before damping."""
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(count, n, generator=generator, dtype=torch.float64)
    y = s * torch.linspace(0.1, 3, n, dtype=torch.float64)
    return s, y + torch.randn(count, n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("damping", [0.1, 0.5, 0.9])
def test_after_damping_the_secant_holds_and_the_inverse_stays_positive_definite(damping):
    h, changed = torch.eye(6, dtype=torch.float64), 0
    for s, y in zip(*pairs(60), strict=True):
        hy = h @ y
        assert (s @ y) < 0.2 * (y @ hy) or not double_damping(s, y, hy, 1e-9)[2]
        s, y, damped = double_damping(s, y, hy, damping)
        changed += damped
        assert s @ y >= damping * (s @ s) * (1 - 1e-12)
        h = bfgs(h, s, y)
        torch.testing.assert_close(h @ y, s, rtol=1e-8, atol=1e-10)
        assert torch.linalg.eigvalsh((h + h.T) / 2).min() > 0
    assert changed > 0


def test_damping_formulas_reach_their_bounds():
    s, y = torch.tensor([1.0, 0.0]).double(), torch.tensor([-1.0, 1.0]).double()
    h = torch.diag(torch.tensor([2.0, 0.5])).double()
    damped_s, same_y, damped = double_damping(s, y, h @ y, 1e-9)
    assert damped
    unit = y.norm() / same_y.norm()
    torch.testing.assert_close(unit * damped_s @ y, 0.2 * (y @ h @ y))
    torch.testing.assert_close(unit * same_y, y)
    same_s, damped_y, damped = double_damping(s, 0.3 * s, 0.1 * s, 0.5)
    assert damped
    torch.testing.assert_close(same_s, s)
    torch.testing.assert_close(same_s @ damped_y, 0.5 * (s @ s))
    assert not double_damping(s, 0.7 * s, s, 0.5)[2]


def test_full_memory_is_the_dense_recursion_and_short_memory_that_of_the_last_pairs():
    all_s, all_y = pairs(12)
    kept = []
    h = torch.eye(6, dtype=torch.float64)
    for s, y in zip(all_s, all_y, strict=True):
        s, y, _ = double_damping(s, y, h @ y, 0.3)
        kept.append((s, y))
        h = bfgs(h, s, y)
    s, y = (torch.stack(rows) for rows in zip(*kept, strict=True))
    v = torch.randn(6, 4, dtype=torch.float64)
    padded = [torch.cat([torch.zeros(5, 6, dtype=torch.float64), rows]) for rows in (s, y)]
    torch.testing.assert_close(lbfgs(*padded, v), h @ v, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(lbfgs(*padded, v[:, 0]), h @ v[:, 0], rtol=1e-9, atol=1e-10)
    h = torch.eye(6, dtype=torch.float64)
    for i in range(-4, 0):
        h = bfgs(h, s[i], y[i])
    torch.testing.assert_close(lbfgs(s[-4:], y[-4:], v), h @ v, rtol=1e-9, atol=1e-10)


def test_bad_pairs_are_skipped():
    e = torch.tensor([1.0, 0.0])
    assert is_good(e, e, e)
    assert not is_good(e, -e, e)
    assert not is_good(e, 1e-5 * e, e)
    assert not is_good(e, e * torch.nan, e)
    assert not is_good(e, e * torch.inf, e)
    assert not is_good(0 * e, 0 * e, e)


def test_scale_of_a_pair_does_not_matter_in_single_precision():
    s, y = pairs(1)
    results = []
    for scale in (1.0, 1e-15):
        s32, y32, _ = double_damping(scale * s[0].float(), scale * y[0].float(), scale * y[0].float(), 0.3)
        results.append(bfgs(torch.eye(6), s32, y32))
    torch.testing.assert_close(*results)


@BOTH
def test_one_step_is_the_recursion(method):
    """Two linear layers, written out with per-example matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x, target = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    damping, rho = 0.5, 0.9

    def look():
        """By layer: ā, z, per-example ∂loss/∂z, and the gradient of [W|b]."""
        h1 = torch.cat([x, torch.ones(10, 1)], 1).double()
        z1 = model[0](x).detach().requires_grad_()
        h2 = torch.cat([z1.tanh(), torch.ones(10, 1)], 1)
        z2 = F.linear(h2[:, :-1], model[2].weight, model[2].bias)
        d1, d2 = torch.autograd.grad((z2 - target).square().sum() / 2, (z1, z2))
        return [(h.detach(), z.detach(), d, d.T @ h.detach() / 10) for h, z, d in ((h1, z1, d1), (h2, z2, d2))]

    optimizer = method(model.parameters(), lr=0.2, damping=damping**2)
    objective = Objective(model, Gaussian(), population=1000)
    first = look()
    before = [torch.cat([m.weight, m.bias[:, None]], 1).detach().clone() for m in (model[0], model[2])]
    optimizer.step(objective(x, target))
    second = look()
    for module, w, old, new in zip((model[0], model[2]), before, first, second, strict=True):
        (a, z, delta, g), (_, new_z, new_delta, _) = old, new
        a_moment = a.T @ a / 10
        eye = torch.eye(a.shape[1], dtype=torch.float64)
        h_a = torch.linalg.inv(a_moment + damping * eye)
        expected = w - 0.2 * (0.1 * g @ h_a)
        torch.testing.assert_close(torch.cat([module.weight, module.bias[:, None]], 1).detach(), expected)
        s, y = 0.1 * (new_z - z).mean(0), 0.1 * (new_delta - delta).mean(0)
        state = optimizer.state[module.weight]
        torch.testing.assert_close(state["s"], s, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(state["y"], y, rtol=1e-6, atol=1e-12)
        s, y, _ = double_damping(s, y, y, damping)
        h_g = bfgs(torch.eye(len(s), dtype=torch.float64), s, y)
        identity = torch.eye(len(s), dtype=torch.float64)
        torch.testing.assert_close(optimizer._apply_g(state, identity), h_g, rtol=1e-6, atol=1e-9)
        probe = a.mean(0)
        probe[-1] = probe[:-1].mean()  # as the public code, in place of the bias's 1
        s_a = h_a @ probe
        torch.testing.assert_close(state["H_a"], bfgs(h_a, s_a, a_moment @ s_a + damping * s_a))
        torch.testing.assert_close(state["A"], a_moment)
    optimizer.step(objective(x, target))
    momentum = rho * 0.1 * first[1][3] + 0.1 * second[1][3]
    state = optimizer.state[model[2].weight]
    torch.testing.assert_close(state["momentum_buffer"], momentum[:, :-1])


@BOTH
def test_first_pass_gives_the_first_value_of_a(method):
    model = small_network(torch.float64)
    objective = small_objective(model, population=1000)
    x, y = small_batch(torch.float64)
    optimizer = method(model.parameters())
    running = model[1].running_mean.clone()
    optimizer.start(objective(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16))
    assert torch.equal(model[1].running_mean, running), "BatchNorm's statistics have stood still"
    state = optimizer.state[model[6].weight]
    rows = []
    with torch.no_grad(), frozen_statistics(model):
        for i in (0, 8, 16):
            a = model[:6](x[i : i + 8])
            rows.append(torch.cat([a, a.new_ones(8, 1)], 1))
    a = torch.cat(rows)
    torch.testing.assert_close(state["A"], a.T @ a / 24)
    optimizer.step(objective(x[:8], y[:8]))
    torch.testing.assert_close(state["A"], a.T @ a / 24)  # the first step takes it as it is
    assert "A" not in optimizer.state[model[0].weight], "convolutions keep none"


@BOTH
def test_inverses_stay_positive_definite_and_the_network_learns(method):
    model = small_network(torch.float64)
    optimizer = method(model.parameters(), lr=0.5, damping=0.1)
    objective = small_objective(model, population=1000)
    losses = [optimizer.step(objective(*small_batch(torch.float64))) for _ in range(40)]
    assert losses[-1] < 0.3 * losses[0]
    for module in (model[0], model[4], model[6]):
        state = optimizer.state[module.weight]
        for matrix in (state["H_a"], optimizer._apply_g(state, torch.eye(len(state["s"]), dtype=torch.float64))):
            torch.testing.assert_close(matrix, matrix.T, rtol=1e-8, atol=1e-10)
            assert torch.linalg.eigvalsh(matrix).min() > 0
    assert set(optimizer.diagnostics()["4"]) == {"skipped_g", "skipped_a", "damped"}


@BOTH
def test_kronecker_least_squares_in_few_steps(method):
    """min ‖(XWᵀ − Y) diag(c)‖²: its Hessian is a Kronecker product. Gradient descent's condition number is 10⁴."""
    torch.manual_seed(0)
    c = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64).diag()
    x = torch.randn(200, 5, dtype=torch.float64) * torch.logspace(0, 1, 5, dtype=torch.float64)
    y = x @ torch.randn(5, 3, dtype=torch.float64)

    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3, bias=False, dtype=torch.float64)

        def forward(self, inputs):
            return self.linear(inputs) @ c

    model = Weighted()
    objective = Objective(model, Gaussian(), population=200)
    optimizer = method(model.parameters(), lr=0.5, damping=1e-4, momentum=0.0)
    losses = [optimizer.step(objective(x, y @ c)) for _ in range(200)]
    assert losses[-1] < 1e-8 * losses[0]


@BOTH
def test_a_convolution_as_wide_as_its_image_is_a_linear_layer(method):
    torch.manual_seed(0)
    x, y = torch.randn(12, 2, 3, 3, dtype=torch.float64), torch.rand(12, 4, dtype=torch.float64)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(18, 4)).double()  # the same batch: its A is the average
    convolution = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()).double()
    convolution[0].weight.data = linear[1].weight.data.view(4, 2, 3, 3).clone()
    convolution[0].bias.data = linear[1].bias.data.clone()
    for model in (linear, convolution):
        optimizer = method(model.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.step(Objective(model, Bernoulli(), population=100)(x, y))
    torch.testing.assert_close(convolution[0].weight.flatten(1), linear[1].weight, rtol=1e-9, atol=1e-12)


@BOTH
def test_a_graph_convolution_on_the_identity_is_a_linear_layer(method):
    from torch_geometric.nn import GCNConv

    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = GCNConv(6, 3, normalize=False).double()

        def forward(self, features, adjacency):
            return self.conv(features, adjacency)

    torch.manual_seed(0)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.arange(8) % 3
    graph, linear = Graph(), nn.Linear(6, 3).double()
    linear.weight.data, linear.bias.data = graph.conv.lin.weight.data.clone(), graph.conv.bias.data.clone()
    eye = torch.eye(8, dtype=torch.float64).to_sparse_csr()
    graph_optimizer, optimizer = method(graph.parameters()), method(linear.parameters())
    for _ in range(4):
        graph_optimizer.step(Objective(graph, Categorical(), population=8)((x, eye), y, torch.arange(8)))
        optimizer.step(Objective(linear, Categorical(), population=8)(x, y))
    torch.testing.assert_close(graph.conv.lin.weight, linear.weight, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(graph.conv.bias, linear.bias, rtol=1e-9, atol=1e-12)


def test_both_passes_see_the_same_dropout():
    """At rate zero nothing moves, so a pair that is not zero would be dropout's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    optimizer = KBFGS(model.parameters(), lr=0.0)
    optimizer.step(Objective(model, Gaussian())(torch.randn(6, 5).double(), torch.randn(6, 2).double()))
    for i in (0, 2):
        assert optimizer.state[model[i].weight]["s"].abs().max() < 1e-15
        assert optimizer.state[model[i].weight]["y"].abs().max() < 1e-15


@BOTH
def test_an_infinite_batch_is_skipped_and_counted(method):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    optimizer = method(model.parameters(), lr=0.0)
    objective = Objective(model, Gaussian())
    x = torch.randn(5, 3, dtype=torch.float64)
    optimizer.step(objective(x, x[:, :2]))
    optimizer.step(objective(torch.full_like(x, torch.inf), x[:, :2]))
    state = optimizer.state[model[0].weight]
    assert all(state[name].isfinite().all() for name in ("A", "H_a", "s", "y"))
    assert optimizer.diagnostics()["0"]["skipped_a"] >= 1
