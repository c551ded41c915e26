"""KFAC against curvlinops, dense Gauss–Newton matrices and a least squares of known solution."""

import pytest
import torch
from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator
from torch import nn

from models.likelihoods import Categorical, Gaussian
from optimizers import Objective
from optimizers.kbfgs import KBFGS
from optimizers.kfac import KFAC
from tests.optimizers.kronecker_problems import LeastSquares, Prescribed
from tests.optimizers.test_layers import Graph, Tied


class AtTrueLabels(Categorical):
    """The empirical Fisher: 'sampled' labels are the true ones, as an independent implementation computes it too."""

    def __init__(self, targets):
        self.targets = targets

    def sampled_residual(self, outputs, generator=None):
        return self.residual(outputs, self.targets)


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, (2, 3), padding=(0, 1), bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.ReLU(),
        nn.Linear(5, 3, bias=False),
    ).double()
    return model, torch.randn(10, 2, 8, 8).double(), torch.randint(0, 3, (10,))


def one_step(model, likelihood, x, y, rows=None, damping=1e-2, **settings):
    """KFAC after one step of rate zero."""
    optimizer = KFAC(model.parameters(), lr=0.0, damping=damping, momentum=0.0, **settings)
    optimizer.step(Objective(model, likelihood)(x, y, rows))
    return optimizer


def curvlinops_kfac(model, x, y):
    return KFACLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type=FisherType.EMPIRICAL,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )


def test_factors_agree_with_curvlinops():
    model, x, y = convolutional()
    optimizer = one_step(model, AtTrueLabels(y), x, y)
    reference = curvlinops_kfac(model, x, y)
    reference.compute_kronecker_factors()
    # they sum over positions in G and average in A; the Kronecker product is the same
    for layer, positions in (("0", 16), ("2", 12), ("5", 1), ("7", 1)):
        g, a = optimizer.state[model.get_submodule(layer).weight]["factors"]
        torch.testing.assert_close(g * positions, reference._gradient_covariances[layer])
        torch.testing.assert_close(a / positions, reference._input_covariances[layer])


def test_directions_agree_with_curvlinops_inverse():
    model, x, y = convolutional()
    optimizer = one_step(model, AtTrueLabels(y), x, y, damping=0.04)
    inverse = KFACInverseLinearOperator(curvlinops_kfac(model, x, y), damping=0.2)
    wanted = inverse @ [p.grad for p in model.parameters()]
    got = {}
    for block in optimizer._blocks:
        state = optimizer.state[block.parameters[0]]
        direction = optimizer._apply(block, state["inverses"], block.join(p.grad for p in block.parameters))
        got |= dict(zip(block.parameters, block.split(direction), strict=True))
    for p, reference in zip(model.parameters(), wanted, strict=True):
        if p not in {*model[0].parameters(), *model[2].parameters()}:  # there the damping meets other factors
            torch.testing.assert_close(got[p], reference)


def test_convolution_is_summed_over_positions_in_a_and_averaged_in_g():
    model, x, y = convolutional()
    optimizer = one_step(model, AtTrueLabels(y), x, y)
    a = optimizer.state[model[0].weight]["factors"][1]
    assert a[-1, -1] == 16  # positions of the 4 × 4 output
    patches = nn.functional.unfold(x, 3, padding=1, stride=2)
    torch.testing.assert_close(a[:-1, :-1], torch.einsum("mip,mjp->ij", patches, patches) / len(x))


def dense_gauss_newton(model, forward, parameters, rows=None):
    """``(1/m) Σ_i J_iᵀ J_i`` of unit output curvature."""

    def outputs(*values):
        z = torch.func.functional_call(model, dict(zip(names, values, strict=True)), forward)
        return z if rows is None else z[rows]

    names = [name for p in parameters for name, q in model.named_parameters() if q is p]
    jacobians = torch.autograd.functional.jacobian(outputs, tuple(p.detach() for p in parameters))
    m = jacobians[0].shape[0]
    matrix = torch.cat([j.reshape(m * jacobians[0].shape[1], -1) for j in jacobians], 1)
    return matrix.T @ matrix / m


def orthogonal_draw(m: int, outputs: int) -> torch.Tensor:
    """``δ`` with ``(1/m) Σ δ δᵀ = I``, what unit-variance labels give on average."""
    return torch.linalg.qr(torch.randn(m, outputs).double())[0] * m**0.5


def homogeneous_order(out: int, inputs: int) -> torch.Tensor:
    """Where the entries of ``[W|b]``, row by row, are in ``(W, b)``."""
    weight = torch.arange(out * inputs).view(out, inputs)
    return torch.cat([weight, out * inputs + torch.arange(out)[:, None]], 1).flatten()


def test_last_graph_convolution_is_the_dense_gauss_newton_block():
    torch.manual_seed(0)
    model = Graph().double()
    x, adjacency = torch.randn(30, 5).double(), torch.rand(30, 30).double()
    adjacency = ((adjacency + adjacency.T) * (adjacency > 0.8) / 8).to_sparse_csr()
    rows = torch.arange(0, 24, 2)
    likelihood = Prescribed(torch.eye(3).double(), [orthogonal_draw(len(rows), 3)])
    optimizer = one_step(model, likelihood, (x, adjacency), torch.randn(len(rows), 3).double(), rows)
    weight, bias = model.second.lin.weight, model.second.bias
    exact = dense_gauss_newton(model, (x, adjacency), [weight, bias], rows)
    order = homogeneous_order(3, 4)
    torch.testing.assert_close(torch.kron(*optimizer.state[weight]["factors"]), exact[order][:, order])


def test_graph_convolution_takes_only_nodes_that_a_label_reaches():
    torch.manual_seed(0)
    model = Graph().double()
    x, adjacency = torch.randn(8, 5).double(), torch.eye(8).double().to_sparse_csr()
    rows = torch.tensor([0, 3])
    optimizer = one_step(model, Gaussian(), (x, adjacency), torch.randn(2, 3).double(), rows)
    a = optimizer.state[model.second.lin.weight]["factors"][1]
    hidden = torch.relu(model.first(x, adjacency))[rows]
    hidden = torch.cat([hidden, torch.ones(2, 1).double()], 1)
    torch.testing.assert_close(a, (hidden.T @ hidden / 2).detach())


def test_graph_convolution_that_normalises_is_refused():
    from torch_geometric.nn import GCNConv

    class Normalising(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = GCNConv(5, 3)

        def forward(self, x, edges):
            return self.conv(x, edges)

    model, edges = Normalising(), torch.tensor([[0, 1, 2], [1, 2, 0]])
    with pytest.raises(NotImplementedError, match=r"layer 'conv'.*normalize=False"):
        one_step(model, Gaussian(), (torch.randn(3, 5), edges), torch.randn(3, 3))


def test_a_layer_used_twice_has_the_rows_of_both_calls():
    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(9, 6).double()
    optimizer = one_step(model, Gaussian(), x, torch.randn(9, 2).double())
    rows = torch.cat([torch.cat([x, torch.tanh(model.inner(x)).detach()]), torch.ones(18, 1)], 1)
    torch.testing.assert_close(optimizer.state[model.inner.weight]["factors"][1], rows.T @ rows / 9)


def test_frozen_bias_and_frozen_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = KFAC(trained, lr=0.1, damping=0.1)
    objective = Objective(model, Gaussian())
    x, y = torch.randn(20, 4).double(), torch.randn(20, 2).double()
    losses = [optimizer.step(objective(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0]
    assert optimizer.state[model[2].bias]["factors"][1].item() == pytest.approx(1)


def test_kronecker_least_squares_in_one_step():
    problem = LeastSquares()
    objective = problem.objective([problem.exact_draw])
    optimizer = KFAC(problem.model.parameters(), lr=1.0, damping=1e-24, momentum=0.0)
    optimizer.step(objective(problem.x, problem.y))
    torch.testing.assert_close(problem.model.weight.detach(), problem.optimum)


@pytest.mark.parametrize("method", [KFAC, KBFGS])
def test_a_layer_without_factors_is_named_and_one_with_them_is_not(method):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.Flatten()).double()
    x = torch.randn(5, 2, 1, 1, dtype=torch.float64)
    minibatch = Objective(model, Gaussian())(x, torch.zeros(5, 4, dtype=torch.float64))
    with pytest.warns(UserWarning) as warned:
        method(model.parameters(), lr=0.1, damping=0.1).step(minibatch)
    (message,) = {str(w.message) for w in warned if "plain gradient" in str(w.message)}
    assert "layer '2' (Conv2d)" in message
    assert "Shampoo, TNT and MBF" in message
