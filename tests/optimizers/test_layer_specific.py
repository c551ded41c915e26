"""Layer-specific rates against the paper's formula and torch's own SGD and AdaGrad."""

import pytest
import torch

from optimizers.layer_specific import LayerSpecificAdaGrad, LayerSpecificSGD, rate_multiplier
from tests.optimizers.cases import least_squares, small_batch, small_network, small_objective


def test_multipliers_are_the_papers():
    norms = torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    expected = torch.tensor([1.693, 3.398, 5.615, 7.909], dtype=torch.float64)
    torch.testing.assert_close(rate_multiplier(norms), expected, rtol=0, atol=5e-4)


def test_zero_gradient_gives_a_finite_step():
    objective, x, y, model = least_squares()
    model.weight.data = y.T @ x / len(x)
    LayerSpecificSGD(model.parameters(), lr=1.0).step(objective(x, y))
    assert model.weight.isfinite().all()
    assert rate_multiplier(torch.zeros(1)).isfinite()


def test_weight_and_bias_share_one_norm():
    model = small_network(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = LayerSpecificSGD(model.parameters(), lr=0.1)
    optimizer.step(small_objective(model)(*small_batch(torch.float64)))
    head, start = model[6], before[-2:]
    norm = torch.cat([head.weight.grad.flatten(), head.bias.grad]).norm()
    rate = 0.1 * (1 + torch.log(1 + 1 / norm))
    torch.testing.assert_close(head.weight, start[0] - rate * head.weight.grad)
    torch.testing.assert_close(head.bias, start[1] - rate * head.bias.grad)
    torch.testing.assert_close(optimizer.diagnostics()["6"]["step_size"], rate)


@pytest.mark.parametrize(
    ("ours", "torchs", "options"),
    [
        (LayerSpecificSGD, torch.optim.SGD, {"momentum": 0.0}),
        (LayerSpecificSGD, torch.optim.SGD, {"momentum": 0.9}),
        (LayerSpecificSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (LayerSpecificAdaGrad, torch.optim.Adagrad, {"eps": 1e-10}),
    ],
)
def test_without_the_multiplier_it_is_the_method_it_rides_on(ours, torchs, options, monkeypatch):
    monkeypatch.setattr("optimizers.layer_specific.rate_multiplier", torch.ones_like)
    runs = []
    for method in (ours, torchs):
        model = small_network(torch.float64)
        optimizer = method(model.parameters(), lr=0.05, weight_decay=0.01, **options)
        objective = small_objective(model)
        for _ in range(5):
            optimizer.step(objective(*small_batch(torch.float64)))
        runs.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)
