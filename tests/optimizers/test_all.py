"""What every optimizer must pass, whoever wrote it: one table, `cases.NAMES`."""

import copy
import gc

import pytest
import torch

from models.likelihoods import Categorical
from optimizers import Objective
from tests.optimizers import cases


def supported(name: str):
    """A small network and an optimizer on it."""
    model = cases.small_network()
    return model, on_small_network(name, model.parameters())


def on_small_network(name: str, params, **settings):
    return cases.build(name, params, **cases.FOR_SMALL_NETWORK.get(name, {}) | settings)


def step(name: str, optimizer, closure):
    try:
        return optimizer.step(closure)
    except NotImplementedError as refusal:
        assert "layer" in str(refusal), "a refusal names the layer"
        pytest.skip(f"{name} refuses this network: {refusal}")


@pytest.mark.parametrize("name", cases.NAMES)
def test_reaches_the_optimum_of_a_quadratic(name):
    objective, x, y, model = cases.least_squares()
    optimizer = cases.build(name, model.parameters(), **cases.FOR_UNIT_CURVATURE.get(name, {}))
    first = objective(x, y).evaluate()
    for _ in range(400):
        optimizer.step(objective(x, y))
    getattr(optimizer, "eval", lambda: None)()
    assert objective(x, y).evaluate() < 1e-2 * first


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", cases.NAMES)
def test_returns_the_loss_before_the_step_and_keeps_dtype(name, dtype):
    objective, x, y, model = cases.least_squares(dtype)
    optimizer = cases.build(name, model.parameters())
    before = objective(x, y).evaluate()
    loss = optimizer.step(objective(x, y))
    torch.testing.assert_close(torch.as_tensor(loss), before)
    assert not loss.requires_grad
    assert model.weight.dtype is dtype


@pytest.mark.parametrize("name", cases.NAMES)
def test_state_dict_round_trip_continues_bit_for_bit(name):
    model, optimizer = supported(name)
    objective = cases.small_objective(model, population=100)
    x, y = cases.small_batch()
    for _ in range(7):
        step(name, optimizer, objective(x, y))
    twin = copy.deepcopy(model)
    twin_objective = cases.small_objective(twin, population=100)
    twin_objective.generator.set_state(objective.generator.get_state())
    twin_optimizer = on_small_network(name, twin.parameters())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rng = torch.get_rng_state()
    for _ in range(6):
        step(name, optimizer, objective(x, y))
    torch.set_rng_state(rng)
    for _ in range(6):
        step(name, twin_optimizer, twin_objective(x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", cases.NAMES)
def test_state_survives_a_checkpoint(name, tmp_path):
    from runners import checkpoint

    model, optimizer = supported(name)
    step(name, optimizer, cases.small_objective(model)(*cases.small_batch()))
    checkpoint.save(tmp_path, optimizer.state_dict())
    state = checkpoint.load(tmp_path, torch.device("cpu"))
    on_small_network(name, model.parameters()).load_state_dict(state)


@pytest.mark.parametrize("name", cases.NAMES)
def test_parameter_groups_have_their_own_weight_decay(name):
    """A group with decay ends nearer to zero than the same group without, and the other group is not decayed."""
    sizes = []
    for decay in (0.0, 0.05):
        model, _ = supported(name)
        head = list(model[6].parameters())
        body = [p for p in model.parameters() if all(p is not q for q in head)]
        groups = [{"params": head, "weight_decay": decay}, {"params": body, "weight_decay": 0.0}]
        optimizer = on_small_network(name, groups)
        objective = cases.small_objective(model)
        for _ in range(30):
            step(name, optimizer, objective(*cases.small_batch()))
        sizes.append(torch.stack([p.detach().norm() for p in head]).norm())
    assert sizes[0] != sizes[1]


@pytest.mark.parametrize("name", cases.NAMES)
def test_one_batchnorm_update_a_step(name):
    model, optimizer = supported(name)
    objective = cases.small_objective(model)
    for _ in range(3):
        step(name, optimizer, objective(*cases.small_batch()))
    assert model[1].num_batches_tracked == 3


@pytest.mark.parametrize("name", cases.NAMES)
def test_memory_does_not_grow(name):
    model, optimizer = supported(name)
    objective = cases.small_objective(model)
    x, y = cases.small_batch()

    def elements() -> int:
        return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.Tensor))

    for _ in range(30):
        step(name, optimizer, objective(x, y))
    gc.collect()
    gc.disable()  # what only the cycle collector frees has leaked by our standard
    try:
        before = elements()
        for _ in range(5):
            step(name, optimizer, objective(x, y))
        assert elements() <= before
    finally:
        gc.enable()


@pytest.mark.parametrize("name", cases.NAMES)
def test_frozen_parameters_stay_and_the_others_learn(name):
    model, _ = supported(name)
    model[4].requires_grad_(False)
    frozen = model[4].weight.clone()
    optimizer = on_small_network(name, [p for p in model.parameters() if p.requires_grad])
    objective = cases.small_objective(model)
    losses = [step(name, optimizer, objective(*cases.small_batch())) for _ in range(40)]
    assert torch.equal(model[4].weight, frozen)
    assert torch.stack(losses[-5:]).mean() < losses[0]


@pytest.mark.parametrize("name", cases.NAMES)
def test_config_names_itself(name):
    about = cases.OmegaConf.load(cases.CONFIGS / f"{name}.yaml").about
    assert about.name == name
    assert about.kind in ("first_order", "second_order", "layerwise")
    assert int(about.version) >= 1


class Centred(torch.nn.Module):
    """A layer that keeps a mean of what it has seen, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        if self.training:
            self.seen += 1
            self.mean = self.mean.lerp(x.detach().mean(0), 0.1)
        return self.linear(x - self.mean)


@pytest.mark.parametrize("name", cases.NAMES)
def test_buffers_of_a_users_module_move_once_a_step(name):
    torch.manual_seed(0)
    model = Centred()
    optimizer, objective = cases.build(name, model.parameters()), Objective(model, Categorical(), population=1000)
    mean = torch.zeros(5)
    for _ in range(4):
        x = torch.randn(12, 5)
        mean = mean.lerp(x.mean(0), 0.1)
        optimizer.step(objective(x, torch.randint(3, (12,))))
    assert model.seen == 4
    torch.testing.assert_close(model.mean, mean)


@pytest.mark.parametrize("name", cases.NAMES)
def test_parameters_of_half_precision_are_trained_or_refused_in_words(name):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).bfloat16()
    optimizer, objective = cases.build(name, model.parameters()), Objective(model, Categorical(), population=1000)
    x, y = torch.randn(12, 5).bfloat16(), torch.randint(3, (12,))
    try:
        assert torch.stack([optimizer.step(objective(x, y)) for _ in range(3)]).isfinite().all()
    except TypeError as refusal:
        assert "keep float32 parameters" in str(refusal)
