"""Back-matching: measured factors against their closed forms, and those against the least squares they stand for."""

import pytest
import torch
from torch import nn

from models.likelihoods import Gaussian
from models.resnet import Block
from optimizers import Objective
from optimizers.back_matching import BackMatching, backward_gains
from tests.optimizers.cases import small_batch, small_network, small_objective

EXAMPLES = 2000


def factor(*between, inputs=(6,), channels=None, examples=EXAMPLES, prepare=None):
    """``m`` of the modules between a first layer and a last one whose own factor is divided out."""
    torch.manual_seed(0)
    first = nn.Linear(inputs[0], inputs[0]) if len(inputs) == 1 else nn.Conv2d(inputs[0], inputs[0], 1)
    model = nn.Sequential(first, *between).double()
    if prepare:
        prepare(model)
    x = torch.randn(examples, *inputs, dtype=torch.float64)
    objective = Objective(model, Gaussian(), torch.Generator().manual_seed(1))
    gains, _ = backward_gains(objective(x, model(x).detach()), objective(x, model(x).detach()).trace())
    return gains[0]


def close(measured, expected, rtol=0.03):
    torch.testing.assert_close(measured, torch.as_tensor(expected, dtype=measured.dtype), rtol=rtol, atol=0)


def test_fully_connected():
    layer = nn.Linear(6, 4)
    close(factor(layer), layer.weight.double().square().sum() / 6)


@pytest.mark.parametrize("stride", [1, 2])
def test_convolution(stride):
    layer = nn.Conv2d(3, 5, 3, stride=stride, padding=1, padding_mode="circular")
    measured = factor(layer, inputs=(3, 8, 8), examples=200)
    close(measured, layer.weight.double().square().sum() / (3 * stride**2))


def test_relu_halves():
    layer = nn.Linear(6, 4)

    def centre(model):
        model[0].bias.data.zero_()

    close(factor(nn.ReLU(), layer, prepare=centre), layer.weight.double().square().sum() / 6 / 2, rtol=0.05)


def test_average_and_max_pooling():
    close(factor(nn.AvgPool2d(2), inputs=(3, 8, 8), examples=300), 1 / 2**4)
    close(factor(nn.MaxPool2d(2), inputs=(3, 8, 8), examples=300), 1 / 4)


def test_batch_norm():
    norm = nn.BatchNorm2d(3)
    norm.weight.data = torch.tensor([0.5, 1.0, 2.0])
    torch.manual_seed(0)
    first = nn.Conv2d(3, 3, 1).double()
    sigma = first(torch.randn(300, 3, 6, 6, dtype=torch.float64)).std((0, 2, 3))
    measured = factor(norm, inputs=(3, 6, 6), examples=300)
    close(measured, (norm.weight.double() / sigma).square().mean().detach())


def test_skip_block_is_one_plus_its_branch():
    block = Block(3, 3, 1)
    block.relu2 = nn.Identity()
    whole = factor(block, inputs=(3, 6, 6), examples=300)
    block.shortcut.forward = torch.zeros_like
    close(whole, 1 + factor(block, inputs=(3, 6, 6), examples=300))


def test_depth_multiplies():
    layers = [nn.Linear(6, 5), nn.Linear(5, 7), nn.Linear(7, 3)]
    product = torch.stack([layer.weight.double().square().sum() / layer.in_features for layer in layers]).prod()
    close(factor(*layers), product.detach())


def test_graph_propagation_and_its_parameters():
    from models.gcn import GCN

    torch.manual_seed(0)
    nodes = 400
    dense = (torch.rand(nodes, nodes) < 0.02).double() * torch.rand(nodes, nodes)
    features = (torch.rand(nodes, 7) < 0.5).double()
    model = GCN(7, 20, 3, dropout=0.0).double()
    model.relu = nn.Identity()
    rows = torch.arange(40)
    objective = Objective(model, Gaussian(), torch.Generator().manual_seed(0))
    minibatch = objective((features.to_sparse_csr(), dense.to_sparse_csr()), torch.zeros(40, 3).double(), rows)
    draws = [torch.stack(backward_gains(minibatch, minibatch.trace())) for _ in range(40)]
    gains, grams = torch.stack(draws).mean(0)
    close(gains[0], dense.square().sum() / nodes * model.conv2.lin.weight.detach().square().sum() / 20, rtol=0.1)
    close(gains[1], 1.0)
    a = dense @ features
    expected = 20 * (a.square().sum() + nodes) / (20 * 7 + 20) / 40
    close(grams[0], expected, rtol=0.1)


def test_parameters_of_linear_layers_and_convolutions():
    torch.manual_seed(0)
    x = torch.randn(50, 3, 6, 6, dtype=torch.float64) + 0.5
    convolution = nn.Sequential(nn.Conv2d(3, 200, 3)).double()
    objective = Objective(convolution, Gaussian(), torch.Generator().manual_seed(0))
    _, grams = backward_gains(objective(x, convolution(x).detach()), objective(x, convolution(x).detach()).trace())
    patches = nn.functional.unfold(x, 3).mT
    expected = (patches.square().sum() + patches.shape[0] * patches.shape[1]) / 50 / (27 + 1)
    close(grams[0], expected, rtol=0.1)


def test_exact_least_squares_where_second_moments_are_multiples_of_the_identity():
    """Orthogonal weights: the input's least squares. Whitened inputs: the parameters', so lr = 1 fits the target."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    layer = nn.Linear(6, 6, bias=False)
    layer.weight.data = 3 * q.float()
    delta = torch.randn(6, dtype=torch.float64)
    w = layer.weight.detach().double()
    close(w.T @ delta / factor(layer), torch.linalg.lstsq(w, delta[:, None]).solution[:, 0], rtol=1e-6)

    x = torch.linalg.qr(torch.randn(400, 5, dtype=torch.float64))[0] * 20 * 0.7
    target = torch.randn(5, 300, dtype=torch.float64)
    model = nn.Linear(5, 300, bias=False).double()
    objective = Objective(model, Gaussian(), torch.Generator().manual_seed(0))
    optimizer = BackMatching(model.parameters(), lr=1.0)
    optimizer.step(objective(x, x @ target))
    torch.testing.assert_close(model.weight.detach(), target.T, rtol=0, atol=0.2)
    close(optimizer.diagnostics()[""]["step_size"], 1 / 0.49, rtol=0.05)


def test_rates_are_measured_now_and_then_and_averaged():
    model = small_network(torch.float64)
    objective = small_objective(model)
    optimizer = BackMatching(model.parameters(), lr=1e-3, momentum=0.9, every=3, settling=3)
    work = []
    for _ in range(7):
        optimizer.step(objective(*small_batch(torch.float64)))
        work.append(objective.gradient_equivalents)
    extra = torch.tensor(work).diff(prepend=torch.zeros(1)) - 1
    torch.testing.assert_close(extra, torch.tensor([2.0, 2, 2, 2, 0, 0, 2]) / 3, rtol=0, atol=1e-5)
    assert all(layer["step_size"] > 0 for layer in optimizer.diagnostics().values())


def test_it_learns_with_one_rate_for_all_depths():
    model = small_network()
    optimizer = BackMatching(model.parameters(), lr=0.02, momentum=0.9)
    objective = small_objective(model)
    losses = [optimizer.step(objective(*small_batch())) for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_premise_holds_for_whitened_inputs_and_fails_by_the_eigenvalues_ratio(shift):
    """``rate · λ_max`` is 1 where ``E āāᵀ`` is the identity; off centre it is ``n`` times the largest one's share."""
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(400, 10, dtype=torch.float64))[0] * 20 + shift
    model = nn.Linear(10, 300, bias=False).double()
    objective = Objective(model, Gaussian(), torch.Generator().manual_seed(0))
    minibatch = objective(x, torch.zeros(400, 300, dtype=torch.float64))
    optimizer = BackMatching(model.parameters(), lr=1.0)
    optimizer.step(minibatch)
    eigenvalues = torch.linalg.eigvalsh(x.T @ x / 400)
    rate = optimizer.diagnostics()[""]["step_size"]
    close(rate * eigenvalues[-1], 10 * eigenvalues[-1] / eigenvalues.sum(), rtol=0.05)
    first = minibatch.evaluate()
    for _ in range(10):
        optimizer.step(minibatch)
    assert (minibatch.evaluate() < first) == (shift == 0), "a rate beyond 2 / λ_max diverges"


def test_a_measurement_that_is_not_finite_is_left_out_and_told():
    model = small_network(torch.float64)
    optimizer = BackMatching(model.parameters(), lr=1e-3)
    objective = small_objective(model)
    optimizer.step(objective(*small_batch(torch.float64)))
    rates = optimizer._rates["rate"].clone()
    optimizer._average(torch.full_like(rates, torch.inf), torch.ones_like(rates))
    torch.testing.assert_close(optimizer._rates["rate"], rates)
    assert all(layer["skipped"] == 1 for layer in optimizer.diagnostics().values())


def test_a_layer_that_is_not_called_keeps_its_rate():
    """A head that is not in use gives no measurement, not one of zero."""
    model = nn.ModuleDict({"trunk": nn.Linear(6, 8), "one": nn.Linear(8, 3), "other": nn.Linear(8, 3)})
    net = nn.Sequential(model["trunk"], nn.ReLU())
    net.model, net.head = model, "one"
    net.forward = lambda x: model[net.head](torch.relu(model["trunk"](x)))
    optimizer, objective = BackMatching(net.parameters(), lr=0.01, every=1), Objective(net, Gaussian())
    for head, steps in (("one", 3), ("other", 40)):
        net.head = head
        for _ in range(steps):
            optimizer.step(objective(torch.randn(16, 6), torch.randn(16, 3)))
        if head == "one":
            names = [layer.name for layer in objective.layers]
            idle = next(i for i, name in enumerate(names) if name.endswith("one"))
            before = optimizer._rates["rate"][idle].clone()
    assert before > 0 and optimizer._rates["rate"][idle] == before
