"""What surrounds an optimizer in training: states, schedulers, clipping, accumulation, autocast, compiled models."""

import copy
import pickle

import pytest
import torch
from torch import nn

from models.precision import LowPrecision
from optimizers.layered import LayeredOptimizer
from tests.optimizers import cases
from tests.optimizers.test_all import on_small_network, step, supported

LAYERED = [
    name for name in cases.NAMES if isinstance(cases.build(name, [nn.Parameter(torch.ones(2, 2))]), LayeredOptimizer)
]
OF_GRADIENTS = [name for name in cases.NAMES if name not in LAYERED]


def trained(name, steps=5):
    model, optimizer = supported(name)
    objective = cases.small_objective(model, population=100)
    for _ in range(steps):
        step(name, optimizer, objective(*cases.small_batch()))
    return model, optimizer, objective


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(ours, theirs):
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", LAYERED)
def test_a_copy_goes_on_like_the_original(name, how):
    model, optimizer, objective = trained(name)
    torch.optim.lr_scheduler.StepLR(optimizer, 3)
    copied_model, copied = how((model, optimizer))
    again = cases.small_objective(copied_model, population=100)
    again.generator.set_state(objective.generator.get_state())
    for _ in range(3):
        random_state = torch.get_rng_state()
        step(name, optimizer, objective(*cases.small_batch()))
        torch.set_rng_state(random_state)
        step(name, copied, again(*cases.small_batch()))
    assert equal(parameters(copied_model), parameters(model))


@pytest.mark.parametrize("name", cases.NAMES)
def test_a_state_saved_mid_training_with_a_schedule_continues_bit_for_bit(name, tmp_path):
    """Parameter groups, a frozen layer, a scheduler, and a state that goes through a file."""

    def build():
        model = cases.small_network()
        model[4].bias.requires_grad_(False)
        groups = [
            {"params": list(model[0].parameters()), "weight_decay": 0.01},
            {"params": [p for p in list(model.parameters())[2:] if p.requires_grad], "weight_decay": 0.0},
        ]
        optimizer = on_small_network(name, groups)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.5)
        return model, optimizer, scheduler, cases.small_objective(model, population=100)

    def go_on(model, optimizer, scheduler, objective):
        for _ in range(5):
            step(name, optimizer, objective(*cases.small_batch()))
            scheduler.step()

    whole = build()
    go_on(*whole)
    parts = [part.state_dict() for part in whole[:3]] + [whole[3].generator.get_state(), torch.get_rng_state()]
    torch.save(parts, tmp_path / "state.pt")
    go_on(*whole)

    resumed = build()
    *states, labels, rng = torch.load(tmp_path / "state.pt", weights_only=False)
    for part, state in zip(resumed, states, strict=False):
        part.load_state_dict(state)
    resumed[3].generator.set_state(labels)
    torch.set_rng_state(rng)
    go_on(*resumed)
    assert equal(parameters(resumed[0]), parameters(whole[0]))
    assert [g["lr"] for g in resumed[1].param_groups] == [g["lr"] for g in whole[1].param_groups]


@pytest.mark.parametrize("name", LAYERED)
def test_a_foreign_state_is_refused_and_changes_nothing(name):
    model, optimizer, _ = trained(name, 2)
    before = copy.deepcopy(optimizer.state_dict())
    method = type(optimizer).__name__
    foreign = torch.optim.Adam(model.parameters()).state_dict()
    with pytest.raises(ValueError, match=f"state of another optimizer; {method} can only load its own"):
        optimizer.load_state_dict(foreign)
    other = "lw_sgdm" if name != "lw_sgdm" else "lw_adamw"
    with pytest.raises(ValueError, match=f"state of {type(supported(other)[1]).__name__}; {method} can only load"):
        optimizer.load_state_dict(trained(other, 2)[1].state_dict())
    wider = nn.Sequential(*copy.deepcopy(list(model)[:-1]), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="is of another model"):
        optimizer.load_state_dict(on_small_network(name, wider.parameters()).state_dict())
    assert str(optimizer.state_dict()) == str(before)


# SOAP turns rounding in the null space of its first, rank-one statistics into steps as long as any.
@pytest.mark.parametrize("name", [name for name in OF_GRADIENTS if name != "soap"])
def test_gradients_can_be_accumulated_and_clipped(name):
    """Four quarters of a batch, clipped, are one batch, clipped; without BatchNorm, which would see other batches."""

    def run(pieces):
        model = cases.small_network(torch.float64).eval()
        optimizer = on_small_network(name, model.parameters())
        x, y = cases.small_batch(torch.float64)
        objective = cases.small_objective(model)

        def closure():
            optimizer.zero_grad()
            loss = 0.0
            for part in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                minibatch = objective(*part)
                part_loss = minibatch.loss(model(*minibatch.inputs)) / pieces
                part_loss.backward()
                loss = loss + part_loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            return loss

        for _ in range(3):
            try:
                optimizer.step(closure)
            except (TypeError, AttributeError) as refusal:
                pytest.skip(f"{name} takes minibatches alone: {refusal}")
        return parameters(model)

    for whole, accumulated in zip(run(1), run(4), strict=True):
        torch.testing.assert_close(accumulated, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LAYERED)
def test_methods_on_layers_refuse_closures_that_know_no_layers(name):
    _, optimizer = supported(name)
    with pytest.raises(TypeError, match="needs a minibatch that knows its layers"):
        optimizer.step(lambda: torch.zeros(()))


def tensors(node):
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for part in node.values() if isinstance(node, dict) else node:
            yield from tensors(part)


@pytest.mark.parametrize("name", cases.NAMES)
def test_autocast_in_the_forward_pass_keeps_state_in_float32(name):
    losses, states = [], []
    for model in (cases.small_network(), LowPrecision(cases.small_network())):
        torch.manual_seed(0)
        optimizer = on_small_network(name, model.parameters())
        objective = cases.small_objective(model)
        losses.append(torch.stack([step(name, optimizer, objective(*cases.small_batch())) for _ in range(20)]))
        states.append(optimizer.state_dict()["state"])
    precise, low = losses
    assert low.isfinite().all()
    assert low.min() < low[0]  # not the last: D-Adaptation lengthens its steps until the loss jumps
    torch.testing.assert_close(low[:3], precise[:3], rtol=0.1, atol=0.02)
    kinds = {tensor.dtype for tensor in tensors(states[1]) if tensor.is_floating_point()}
    assert kinds == {tensor.dtype for tensor in tensors(states[0]) if tensor.is_floating_point()}


@pytest.mark.parametrize("name", LAYERED)
def test_autocast_around_the_step_is_refused(name):
    model, optimizer = supported(name)
    objective = cases.small_objective(model)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="put autocast into the model's forward"),
    ):
        optimizer.step(objective(*cases.small_batch()))


@pytest.mark.parametrize("name", cases.NAMES)
def test_compiled_models_train_the_same_or_are_refused(name):
    """The compiler's front end, which decides what is captured, without the code generator behind it."""
    model, optimizer = supported(name)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="eager")
    twin_optimizer = on_small_network(name, compiled.parameters())
    if name in LAYERED:
        with pytest.raises(TypeError, match=r"the model is compiled.* give the objective the plain model"):
            twin_optimizer.step(cases.small_objective(compiled)(*cases.small_batch()))
        return
    for net, opt in ((model, optimizer), (compiled, twin_optimizer)):
        torch.manual_seed(0)
        objective = cases.small_objective(net)
        for _ in range(3):
            step(name, opt, objective(*cases.small_batch()))
    assert equal(parameters(model), parameters(twin))


def moving(before, model):
    """Which parameters are not what they were; but for the second, the bias before a BatchNorm, whose slope is 0."""
    moved = [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]
    return moved[:1] + moved[2:]


class Partial(nn.Module):
    """A model that leaves a layer out."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = cases.small_network(), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.filterwarnings("ignore:layer .* takes the plain gradient")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_that_the_loss_does_not_depend_on_stays(name, every):
    model = Partial()
    settings = {key: every for key in ("every", "update_every") if key in cases.config(name)}
    optimizer = on_small_network(name, model.parameters(), **settings)
    objective, before = cases.small_objective(model, population=100), parameters(model)
    losses = [step(name, optimizer, objective(*cases.small_batch())) for _ in range(7)]
    assert torch.stack(losses).isfinite().all()
    assert moving(before, model) == [True] * (len(before) - 3) + [False] * 2


@pytest.mark.filterwarnings("ignore:layer .* takes the plain gradient")
@pytest.mark.parametrize("name", LAYERED)
def test_parameters_may_be_frozen_and_unfrozen_on_the_way(name):
    model, optimizer, objective = trained(name)
    for frozen in ([model[0]], [model[4].bias, model[6].weight], [model[0].weight], []):
        model.requires_grad_(True)
        for part in frozen:
            part.requires_grad_(False)
        before = parameters(model)
        losses = [step(name, optimizer, objective(*cases.small_batch())) for _ in range(3)]
        assert torch.stack(losses).isfinite().all()
        trained_now = [p.requires_grad for p in model.parameters()]
        assert moving(before, model) == trained_now[:1] + trained_now[2:]


@pytest.mark.filterwarnings("ignore:layer .* takes the plain gradient")
@pytest.mark.parametrize("name", LAYERED)
def test_a_layer_may_be_frozen_in_parts_then_whole_and_across_a_load(name):
    """What was known of it had another width."""
    model, optimizer, objective = trained(name)
    for frozen in ([model[6].bias], [model[6]], []):
        model.requires_grad_(True)
        for part in frozen:
            part.requires_grad_(False)
        losses = [step(name, optimizer, objective(*cases.small_batch())) for _ in range(2)]
        if frozen:
            again = on_small_network(name, list(model.parameters()))
            again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer = again
        assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("name", LAYERED)
def test_a_group_may_be_empty(name):
    model = cases.small_network()
    groups = [{"params": []}, {"params": list(model.parameters())}]
    optimizer = on_small_network(name, groups)
    before = parameters(model)
    step(name, optimizer, cases.small_objective(model)(*cases.small_batch()))
    assert not equal(parameters(model), before)


@pytest.mark.parametrize("name", LAYERED)
def test_a_state_keeps_its_number_format_whatever_the_first_parameter_has(name):
    groups = [nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16)), nn.Parameter(torch.ones(2, 2))]
    optimizer, again = cases.build(name, groups), cases.build(name, groups)
    optimizer.state[groups[0]]["own"] = {"number": torch.tensor(1 + 2**-20), "count": 3}
    again.load_state_dict(optimizer.state_dict())
    assert again.state[groups[0]]["own"] == {"number": torch.tensor(1 + 2**-20), "count": 3}


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize(
    "setting",
    [{"lr": -1.0}, {"weight_decay": -1.0}, {"momentum": 5.0}, {"betas": (2, 0)}, {"eps": -1.0}, {"damping": -1.0}],
)
def test_a_group_whose_setting_is_impossible_is_refused(name, setting):
    optimizer = on_small_network(name, list(cases.small_network().parameters()))
    if set(setting) <= set(optimizer.defaults):
        with pytest.raises(ValueError, match="is impossible"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]} | setting)
