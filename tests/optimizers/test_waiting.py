"""No step waits for the device, and none mixes devices: shown without one, on tensors that have no values.

On torch's ``meta`` device every operation computes shapes alone. What would have a GPU's queue run empty, reading a
number back (``.item()``, ``if tensor:``), is an error there, and so is a tensor that was made on the CPU.
"""

import pytest
import torch

from optimizers import objective
from optimizers.accounting import Account
from optimizers.layers import find_layers
from optimizers.tangent import Curvature
from tests.optimizers import cases

STEPS = 30  # rare ones among them: noise, statistics, inverses, roots

WAITS = {
    "curvature_rescaling": "its first step compares the curvature with a Hessian-vector product",
    "dadaptation": "its package reads inner products",
    "dog": "its package checks its sums",
    "gen_adamw": "reads three losses once in eight steps",
    "gen_sgdm": "reads three losses once in eight steps",
    "prodigy": "its package looks for entries that are not zero",
    "shampoo_grafted": "its package iterates until a root has converged",
}


def steps(name: str, population: int | None) -> None:
    with torch.device("meta"):
        model = cases.small_network()
        x, y = torch.empty(24, 1, 8, 8), torch.empty(24, dtype=torch.int64)
    optimizer = cases.build(name, model.parameters(), **cases.FOR_SMALL_NETWORK.get(name, {}))
    objective = cases.small_objective(model, population)
    objective.generator = None  # the device has none of its own
    for _ in range(STEPS):
        optimizer.step(objective(x, y))


@pytest.fixture(autouse=True)
def without_what_waits_once(monkeypatch):
    """Layers are checked once, by numbers that are read."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no such device
    monkeypatch.setattr(objective, "account", lambda minibatch: Account(find_layers(minibatch.objective.model)))


@pytest.mark.parametrize("population", [None, 24], ids=["minibatch", "full batch"])
@pytest.mark.parametrize("name", cases.NAMES)
def test_steps_wait_for_nothing(name, population):
    if name in WAITS:
        with pytest.raises(RuntimeError, match="meta tensor"):
            steps(name, population)
    else:
        steps(name, population)


def test_curvature_rescaling_waits_in_no_later_step(monkeypatch):
    monkeypatch.setattr(Curvature, "check", lambda self, direction, curvature: None)
    steps("curvature_rescaling", None)
