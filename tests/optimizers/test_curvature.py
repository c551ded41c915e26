"""Curvature of all layers against dense float64 references and curvlinops."""

import pytest
import torch
from torch import nn

from models.likelihoods import Categorical, Gaussian, Scaled
from optimizers import Objective
from optimizers.accounting import Account
from optimizers.curvature import (
    ExactGaussNewton,
    ExactHessian,
    GaussNewton,
    RandomSignGaussNewton,
    RandomSignHessian,
    SampledFisher,
)
from optimizers.layers import find_layers
from optimizers.replay import frozen_statistics


class Graph(nn.Module):
    def __init__(self):
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.first, self.second = GCNConv(5, 4, normalize=False), GCNConv(4, 3, normalize=False)

    def forward(self, x, adjacency):
        return self.second(torch.relu(self.first(x, adjacency)), adjacency)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, 3),
    )


def plain():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5), nn.ReLU(), nn.Linear(5, 3)
    )


@pytest.fixture(params=["plain", "convolutional", "graph", "whole graph"])
def problem(request):
    """A minibatch, its model, and a random direction for every layer, in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        if "graph" in request.param:
            model = Graph()
            adjacency = torch.rand(9, 9)
            inputs = torch.randn(9, 5), ((adjacency + adjacency.T) / 9).to_sparse_csr()
            rows = torch.tensor([1, 4, 5, 7]) if request.param == "graph" else None
        else:
            model = {"plain": plain, "convolutional": convolutional}[request.param]()
            inputs, rows = (torch.randn(8, 2, 6, 6),), None
        targets = torch.randint(0, 3, (len(inputs[0]) if rows is None else 4,))
        objective = Objective(model, Categorical(), torch.Generator().manual_seed(1))
        directions = {
            layer: [torch.randn_like(p) / p.numel() ** 0.5 for p in layer.parameters] for layer in objective.layers
        }
        yield objective(inputs, targets, rows), directions
    finally:
        torch.set_default_dtype(torch.float32)


def dense(minibatch, directions, gauss_newton: bool):
    """Q by forming the matrices: Jacobians and Hessians of the function of all parameters, by torch.func."""
    model = minibatch.objective.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    names = {id(p): name for name, p in model.named_parameters()}

    def outputs(theta):
        with frozen_statistics(model):
            return minibatch.labelled(torch.func.functional_call(model, theta, minibatch.inputs))

    def loss(z):
        return nn.functional.cross_entropy(z, minibatch.targets)

    def along(steps):
        shift = dict(parameters)
        for layer, a in zip(directions, steps, strict=True):
            for p, d in zip(layer.parameters, directions[layer], strict=True):
                shift[names[id(p)]] = shift[names[id(p)]] + a * d
        return outputs(shift)

    zero = torch.zeros(len(directions))
    if not gauss_newton:
        # not torch.func: its reverse mode over itself through BatchNorm gives a Hessian that is not symmetric
        return torch.autograd.functional.hessian(lambda a: loss(along(a)), zero)
    jacobian = torch.autograd.functional.jacobian(along, zero).flatten(0, 1)
    z = outputs(parameters).detach()
    hessian = torch.func.hessian(lambda flat: loss(flat.view_as(z)))(z.flatten())
    return jacobian.T @ hessian @ jacobian


def estimate(estimator, problem):
    minibatch, directions = problem
    with frozen_statistics(minibatch.objective.model):
        return estimator(minibatch, minibatch.trace(), directions).detach()


def test_exact_estimators_equal_dense_references(problem):
    for estimator, gauss_newton in ((ExactGaussNewton(), True), (ExactHessian(), False)):
        expected = dense(*problem, gauss_newton)
        torch.testing.assert_close(
            estimate(estimator, problem), expected, rtol=1e-10, atol=1e-12 * expected.abs().max()
        )


@pytest.mark.parametrize(
    "estimator", [RandomSignHessian(), RandomSignGaussNewton(), SampledFisher()], ids=lambda e: type(e).__name__
)
def test_sampled_estimators_have_the_exact_mean(problem, estimator):
    minibatch, _ = problem
    per_example_through_batchnorm = isinstance(estimator, SampledFisher) and any(
        isinstance(m, nn.BatchNorm2d) for m in minibatch.objective.model.modules()
    )
    exact = ExactHessian() if isinstance(estimator, RandomSignHessian) else ExactGaussNewton()
    expected = estimate(exact, problem)
    samples = torch.stack([estimate(estimator, problem) for _ in range(400)])
    error = (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5 + 1e-12)
    if per_example_through_batchnorm:  # biased below a BatchNorm, by construction; exact above it
        assert error.diagonal()[-2:].abs().max() < 4.5
    else:
        assert error.abs().max() < 4.5


def test_the_default_is_exact_where_that_costs_no_more(problem):
    minibatch, _ = problem
    before = minibatch.objective.gradient_equivalents
    found = estimate(GaussNewton(), problem)
    exact = estimate(ExactGaussNewton(), problem)
    if isinstance(minibatch.objective.model, Graph):
        assert torch.equal(found, exact)
        forward, backward, tangents = 1 / 3, 1 / 3, (1 + 2 / 2) / 3
        assert minibatch.objective.gradient_equivalents - before == pytest.approx(2 * (forward + backward + tangents))
    else:
        assert not torch.allclose(found, exact)


def test_the_default_samples_where_many_layers_mix_examples():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(7)))
    minibatch = Objective(model, Categorical())(torch.randn(6, 4), torch.tensor([0, 3]), torch.tensor([1, 4]))
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in minibatch.objective.layers}
    before = minibatch.objective.gradient_equivalents
    estimate(GaussNewton(), (minibatch, directions))
    assert minibatch.objective.gradient_equivalents - before == pytest.approx((1 + 4 + 1) / 3)


def test_exact_curvature_of_a_layer_that_the_outputs_ignore_is_zero():
    class Ignoring(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            self.unused(x)
            return self.used(x)

    minibatch = Objective(Ignoring(), Gaussian())(torch.randn(4, 3), torch.randn(4, 2))
    directions = {layer: list(layer.parameters) for layer in minibatch.objective.layers}
    q = estimate(ExactGaussNewton(), (minibatch, directions))
    assert (q != 0).tolist() == [[True, False], [False, False]]


def test_a_sample_of_a_batch_has_the_same_mean_curvature_and_noise():
    """Four of fourteen examples, by a stride that does not divide them; the noise is the whole batch's gradient's."""
    torch.manual_seed(0)
    model = plain().double()
    objective = Objective(model, Categorical(), torch.Generator().manual_seed(1), population=20)
    x = torch.randn(14, 2, 6, 6, dtype=torch.float64)
    minibatch = objective(x, torch.randint(0, 3, (14,)))
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in objective.layers}

    def measure(sample):
        squares, trace = [], sample.trace()
        sample.noise(trace, lambda p, e: squares.append(e.square().sum()))
        return torch.cat([SampledFisher()(sample, trace, directions).flatten(), sum(squares).view(1)])

    whole, sample = (
        torch.stack([measure(take()) for _ in range(1500)])
        for take in (lambda: minibatch, lambda: minibatch.thinned(3))
    )
    error = (sample.mean(0) - whole.mean(0)) / ((sample.var(0) + whole.var(0)) / len(whole)).sqrt()
    assert error.abs().max() < 4.5
    assert len(minibatch.thinned(3).targets) == 4


def test_a_sample_of_an_autoencoders_batch_is_taken_once():
    x = torch.rand(12, 4)
    sample = Objective(nn.Linear(4, 4), Gaussian())(x, x).thinned(4)
    assert sample.targets is sample.inputs[0]
    assert sample.weight == 1 / 4
    index = [int((x == row).all(1).nonzero()) for row in sample.targets]
    assert [i - index[0] for i in index] == [0, 4, 8]


def test_diagonal_blocks_of_both_matrices_agree_for_piecewise_linear_networks():
    torch.manual_seed(0)
    model = plain().double()
    objective = Objective(model, Categorical())
    minibatch = objective(torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (8,)))
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in objective.layers}
    problem = minibatch, directions
    torch.testing.assert_close(
        estimate(ExactGaussNewton(), problem).diagonal(),
        estimate(ExactHessian(), problem).diagonal(),
        rtol=1e-9,
        atol=0,
    )


def test_blocks_equal_curvlinops():
    """The Gauss–Newton operator of an independent library, restricted to one layer at a time."""
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    model = plain().double()
    x, y = torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    objective = Objective(model, Categorical())
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in objective.layers}
    q = estimate(ExactGaussNewton(), (objective(x, y), directions)).diagonal()
    for i, (layer, direction) in enumerate(directions.items()):
        operator = curvlinops.GGNLinearOperator(model, nn.CrossEntropyLoss(), list(layer.parameters), [(x, y)])
        product = operator @ direction
        expected = sum((d * h).sum() for d, h in zip(direction, product, strict=True))
        torch.testing.assert_close(q[i], expected, rtol=1e-9, atol=0)


def test_curvature_of_a_likelihood_scaled_by_c_is_scaled_by_c():
    torch.manual_seed(0)
    model = plain().double()
    x, y = torch.randn(8, 2, 6, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    layers = find_layers(model)
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in layers}
    for estimator in (ExactGaussNewton(), ExactHessian(), SampledFisher(), RandomSignHessian()):
        q = []
        for likelihood in (Categorical(), Scaled(Categorical(), 1000.0)):
            objective = Objective(model, likelihood, torch.Generator().manual_seed(5))
            objective._account = Account(layers)
            q.append(estimate(estimator, (objective(x, y), directions)))
        torch.testing.assert_close(q[1], 1000 * q[0], rtol=1e-9, atol=1e-12)


def test_work_is_counted():
    objective = Objective(nn.Linear(3, 2), Gaussian())
    minibatch = objective(torch.randn(4, 3), torch.randn(4, 2))
    minibatch()
    assert objective.gradient_equivalents == pytest.approx(1)
    trace = minibatch.trace()
    minibatch.fill_gradients(trace, retain_graph=True)
    assert objective.gradient_equivalents == pytest.approx(2)
    SampledFisher()(minibatch, trace, {layer: list(layer.parameters) for layer in objective.layers})
    assert objective.gradient_equivalents == pytest.approx(2 + 2 / 3)


def test_a_penalty_is_in_gradient_and_curvature_alike():
    """On a linear model the Gauss–Newton matrix is the Hessian, with a penalty too."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3, dtype=torch.float64)
    objective = Objective(model, Categorical(), penalty={model.weight: 0.5})
    minibatch = objective(torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3)
    minibatch()
    expected = [p.grad.clone() for p in model.parameters()]
    trace = minibatch.trace()
    minibatch.fill_gradients(trace, retain_graph=True)
    torch.testing.assert_close([p.grad for p in model.parameters()], expected)
    directions = {layer: [p.grad for p in layer.parameters] for layer in objective.layers}
    hessian = ExactHessian()(minibatch, trace, directions)
    torch.testing.assert_close(ExactGaussNewton()(minibatch, trace, directions), hessian)
    for estimator in (SampledFisher(), RandomSignGaussNewton()):
        q = torch.stack([estimator(minibatch, trace, directions) for _ in range(3000)])
        assert (q.mean(0) - hessian).abs() <= 5 * q.std(0) / len(q) ** 0.5 + 1e-12
