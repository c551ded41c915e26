"""The layer-wise methods' bounds: trust, warm-up, growth, stretch, decay, and what a loss that is rounding may do."""

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from models.likelihoods import Categorical, Gaussian
from optimizers import LWAdamW, LWSGDm, Objective
from optimizers.layered import dot
from tests.optimizers.cases import UNBOUNDED, small_batch, small_network, small_objective

BOTH = pytest.mark.parametrize("method", [LWSGDm, LWAdamW])


@BOTH
def test_no_step_is_zero_for_good(method):
    """Labels that are pure noise: the corrected slope averages to nothing, and the steps stay positive."""
    model = small_network()
    objective = small_objective(model)
    optimizer = method(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x, _ = small_batch()
    for _ in range(60):
        optimizer.step(objective(x, torch.randint(0, 3, (len(x),), generator=generator)))
    sizes = torch.stack([layer["step_size"] for layer in optimizer.diagnostics().values()])
    assert (sizes > 0).all()


@BOTH
def test_layers_behind_one_that_starts_at_zero_begin_when_they_have_a_gradient(method):
    """The first gradient of all layers but the last is exactly zero; that must not be taken for their scale."""
    torch.manual_seed(0)
    model = small_network()
    last = list(model.modules())[-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    objective, optimizer = small_objective(model), method(model.parameters(), warmup=4)
    first, sizes = objective.layers[0].parameters[0], []
    for _ in range(30):
        before = first.detach().clone()
        optimizer.step(objective(*small_batch()))
        sizes.append(optimizer._search["step_size"][0].item())
        assert torch.equal(before, first) == (len(sizes) == 1)
    assert sizes[1] > 0
    assert optimizer._search["moved"][0] == 29
    assert last.weight.norm() > 0.1


@pytest.mark.parametrize(
    ("module", "part"), [(nn.Linear(400, 300), 0.5), (nn.Conv2d(30, 40, 5), 0.5), (nn.BatchNorm2d(64), 0.25)]
)
def test_trust_is_relative_to_no_less_than_a_part_of_the_norm_that_torch_starts_with(module, part):
    """So that a layer can leave zero."""
    objective = small_objective(module)
    optimizer = LWSGDm(module.parameters())
    optimizer._layers = objective.layers
    optimizer._group_of = dict.fromkeys(module.parameters(), optimizer.param_groups[0])
    optimizer._start_anew(optimizer._search)
    started = optimizer._weight_norms()
    torch.testing.assert_close(started, torch.cat([p.flatten() for p in module.parameters()]).norm().view(1))
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    torch.testing.assert_close(optimizer._weight_norms(), part * started, rtol=0.05, atol=0)


@BOTH
@pytest.mark.parametrize(("noise", "joint"), [(0.0, 0.04), (0.0, 0.2), (0.9, 0.04)])
def test_layers_move_no_further_together_than_the_joint_trust(method, noise, joint):
    """Where the model has next to no curvature each of three layers would move by τ = 0.05, or 0.2 τ if noise."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    settings = UNBOUNDED | {"joint_trust": joint}
    optimizer = method(model.parameters(), trust=0.05, caution=1.0, averaging=0.0, **settings)
    optimizer.step(small_objective(model)(torch.randn(8, 6), torch.arange(8) % 3))
    with torch.no_grad():
        for layer in optimizer._layers:
            norm = dot(layer.parameters, layer.parameters).sqrt()
            torch._foreach_div_(layer.parameters, 0.3 * norm)  # of one norm, so that each is trusted as all are
    search, one = optimizer._search, torch.ones(3)
    search |= {"slope": one, "noise": noise * one, "curvature": torch.diag(1e-9 * one), "along_step": one[:2]}
    optimizer._search_step_sizes(search, per_length=one)
    relative = search["step_size"] / optimizer._weight_norms()
    alone = 0.05 * max(1 - noise, 0.2)
    torch.testing.assert_close(relative, torch.full((3,), min(alone, joint / 3)))


@BOTH
def test_trust_growth_and_warm_up_bound_the_steps(method):
    model = small_network()
    objective = small_objective(model)
    optimizer = method(model.parameters(), sigma=1.0, growth=1.03, head_start=0.0, trust=0.01)
    sizes = []
    for _ in range(50):
        before = [p.detach().clone() for p in objective.layers[0].parameters]
        optimizer.step(objective(*small_batch()))
        sizes.append(optimizer._search["step_size"].clone())
        moved = sum(((p - q) ** 2).sum() for p, q in zip(objective.layers[0].parameters, before, strict=True)) ** 0.5
        assert moved <= 1.01 * 0.01 * sum((q**2).sum() for q in before) ** 0.5
    ceilings = torch.stack([torch.stack(sizes[:i]).amax(0) for i in range(1, 51)])
    assert (ceilings[1:] / ceilings[:-1]).max() < 1.03 * 1.0001


@BOTH
@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_a_head_start_is_a_part_of_what_is_trusted(method, size):
    """``α ← α + (growth − 1)(α + b/10)``: a short one by half of a hundredth of trust, a long one by a twentieth."""
    model = nn.Linear(6, 3)
    optimizer = method(model.parameters(), growth=1.05, head_start=0.1, trust=0.1, caution=0.0, averaging=0.0, warmup=1)
    optimizer.step(small_objective(model)(torch.randn(8, 6), torch.arange(8) % 3))
    search, one = optimizer._search, torch.ones(1)
    search |= {"slope": one, "noise": 0 * one, "along_step": torch.ones(2), "usual_length": 0 * one}
    search["ceiling"] = torch.inf * one
    for curvature in (1 / size, 1e-9):  # the minimum, and then none in sight
        search["curvature"] = curvature * one.view(1, 1)
        search["usual_length"] = 0 * one
        optimizer._search_step_sizes(search, per_length=one)
    trusted = 0.1 * optimizer._weight_norms()
    torch.testing.assert_close(search["step_size"], size + 0.05 * (size + 0.1 * trusted))


@BOTH
@pytest.mark.parametrize("brake", [1.0, 1.2, None])
def test_step_sizes_shrink_while_the_loss_rises(method, brake):
    """The loss by itself decides, in units of its noise: slope and curvature say that steps might be longer."""
    model, one = nn.Linear(6, 3), torch.ones(1)
    optimizer = method(model.parameters(), averaging=0.5, trust=1e9, **UNBOUNDED | {"growth": 1.1, "brake": brake})
    optimizer.step(small_objective(model)(torch.randn(8, 6), torch.arange(8) % 3))
    search = optimizer._search
    search |= {"slope": one, "noise": 0 * one, "curvature": 1e-9 * one.view(1, 1), "moved": 1 * one}
    search |= {"measured": 100, "resolved": one[0], "loss": one[0], "ceiling": 1 * one, "usual_length": 1 * one}
    noise = (math.pi / 8 * 0.5) ** 0.5 * 0.8  # of the difference of two averages of weight 0.5
    for risen in (-3.0, 0.0, 0.25, 1.0, 7.0):
        before = search["ceiling"].clone()
        search |= {"loss_deviation": 0.8 * one[0], "past_loss": search["loss"] - risen * noise}
        optimizer._search_step_sizes(search, per_length=one)
        part = min(max(risen, 0.0), 1.0)
        pace = 1.1 if brake is None else 1.1 ** (1 - part) / brake**part
        assert (search["ceiling"] / before).item() == pytest.approx(pace)


@BOTH
def test_a_loss_that_stays_high_does_not_brake_for_good(method):
    """After a jump that no step made (another task, longer sequences) steps shorten tenfold and then grow again."""
    model = nn.Linear(2, 1)
    optimizer = method(model.parameters())
    optimizer.step(small_objective(model)(torch.randn(8, 2), torch.zeros(8, dtype=torch.long)))
    search, bounds, paces = optimizer._search, optimizer.bounds, []
    search["resolved"] = torch.ones(())
    for number, noise in enumerate(torch.randn(600, generator=torch.Generator().manual_seed(0))):
        search["measured"] += 1
        search.add_loss((5 if number < 300 else 500) + noise, search.weight())
        paces.append(bounds._pace(search))
    sizes = torch.stack(paces).log().cumsum(0)
    least = (sizes[300:] - sizes[299]).amin().exp()
    assert 1 / 10 / bounds.brake <= least <= 1 / 5
    assert sizes[-1] > sizes[299]


@BOTH
def test_a_gradient_that_never_comes_leaves_the_weights_alone(method):
    model = nn.Linear(4, 3, bias=False)
    optimizer, objective, before = method(model.parameters()), Objective(model, Gaussian()), model.weight.clone()
    for _ in range(6):
        optimizer.step(objective(torch.zeros(64, 4), torch.randn(64, 3)))
    assert torch.equal(model.weight, before)


@BOTH
def test_the_noise_of_a_steady_loss_does_not_brake(method):
    """Of independent losses the two averages differ by no more than the rule takes for noise, four times in five."""
    model = nn.Linear(2, 1)
    optimizer = method(model.parameters())
    optimizer.step(small_objective(model)(torch.randn(8, 2), torch.zeros(8, dtype=torch.long)))
    search, risen = optimizer._search, []
    search["resolved"] = torch.ones(())
    for loss in torch.randn(4000, generator=torch.Generator().manual_seed(0)):
        search["measured"] += 1
        search.add_loss(5 + loss, search.weight())
        risen.append(search.rise())
    risen = torch.stack(risen[200:])
    assert risen.mean().abs() < 0.2
    assert 0.85 < risen.std() < 1.15


@pytest.mark.filterwarnings("ignore:.* starts with lr=0.001")
@BOTH
@pytest.mark.parametrize("stretch", [1.2, 2.0, 1e9])
def test_a_steep_batch_stretches_the_step_no_further_than_its_bound(method, stretch):
    """A batch that is much steeper than those before it would be followed by a step thrice as long."""
    torch.manual_seed(0)
    model = nn.Linear(4, 2, bias=False).double()
    x, y = torch.randn(64, 4, dtype=torch.float64), torch.randn(64, 2, dtype=torch.float64)
    objective = Objective(model, Gaussian(), population=64)
    optimizer = method(model.parameters(), sigma=1e-3, trust=1e9, **UNBOUNDED | {"stretch": stretch})
    lengths, usual, factors = [], None, []
    for step in range(40):
        before = model.weight.detach().clone()
        optimizer.step(objective(x, (300 if step == 39 else 1) * y))
        lengths.append((model.weight - before).norm().item())
        factors.append(lengths[-1] / (usual or lengths[-1]))
        usual = lengths[-1] if usual is None else 0.95**2 * usual + (1 - 0.95**2) * lengths[-1]
    assert max(factors) <= stretch * 1.0001
    if stretch < 10:
        assert factors[-1] == pytest.approx(stretch)
    else:
        assert factors[-1] > 3


@BOTH
@pytest.mark.parametrize("own", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("caution", [0.0, 1.5])
@pytest.mark.parametrize(("signal", "share"), [(1.0, 1.0), (0.5, 0.5), (0.1, 0.2)])  # the floor is a fifth
def test_trust_shrinks_with_the_share_of_signal_and_is_pooled(method, own, caution, signal, share):
    """Where the model has next to no curvature, steps are τ s^χ of a layer's weights, drawn to that of all weights."""
    model = small_network()
    optimizer = method(model.parameters(), trust=0.02, caution=caution, own=own, averaging=0.0, **UNBOUNDED)
    optimizer.step(small_objective(model)(*small_batch()))
    search, one = optimizer._search, torch.ones(len(optimizer._layers))
    search |= {"slope": one, "noise": (1 - signal) * one, "curvature": torch.diag(1e-9 * one), "along_step": one[:2]}
    optimizer._search_step_sizes(search, per_length=one)
    norms = optimizer._weight_norms()
    p, common = own * share**2, norms.square().mean().sqrt()
    torch.testing.assert_close(search["step_size"], 0.02 * share**caution * norms**p * common ** (1 - p))


@BOTH
@pytest.mark.parametrize("others", [[nn.Linear(4, 3)], []])
def test_a_vector_that_starts_at_zero_is_not_held_there(method, others):
    """There is nothing that its steps could be relative to."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.zeros(3))

        def forward(self, x):
            return x[:, :3] + self.by

    torch.manual_seed(0)
    model = nn.Sequential(*others, Shift())
    objective, optimizer = small_objective(model), method(model.parameters())
    x, y = torch.randn(8, 4), torch.zeros(8, dtype=torch.long)
    losses = [optimizer.step(objective(x, y)).item() for _ in range(60)]
    assert losses[-1] < losses[0] / 2
    assert model[-1].by.norm() > 0.1


@BOTH
def test_decay_takes_a_thousandth_of_a_layer_times_sigma_a_step_at_most(method):
    """Where the model has next to no curvature and trust is wide; a bias without decay does not free its layer."""
    model = small_network()
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == many] for many in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = method(groups, trust=1e9, averaging=0.0, **UNBOUNDED)
    optimizer.step(small_objective(model)(*small_batch()))
    search, one = optimizer._search, torch.ones(len(optimizer._layers))
    search |= {"slope": one, "noise": 0 * one, "curvature": torch.diag(1e-9 * one), "along_step": one[:2]}
    optimizer._search_step_sizes(search, per_length=one)
    decayed = torch.tensor([any(p.dim() > 1 for p in layer.parameters) for layer in optimizer._layers])
    sizes = optimizer._step_sizes(search)
    assert decayed.any()
    torch.testing.assert_close(sizes[decayed], 2.0 * 0.001 / 0.01 * one[decayed])
    assert (sizes[~decayed] > 1).all()


@BOTH
def test_evaluation_keeps_up_with_a_fitted_full_batch(method):
    """Decay once took a tenth of a layer a step: BatchNorm's statistics lagged, at a minibatch loss of nothing."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.as_tensor(images[:128] / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.as_tensor(labels[:128])
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 10)),
    )
    objective, optimizer = (
        Objective(model, Categorical(), population=128),
        method(model.parameters(), weight_decay=5e-4),
    )
    losses = []
    for _ in range(250):
        optimizer.step(objective(x, y))
        with torch.no_grad():
            losses.append(Categorical().nll(model.eval()(x), y).mean())
        model.train()
    assert max(losses[150:]) < 5e-3


@BOTH
def test_a_batch_whose_loss_is_rounding_shortens_its_step_and_is_not_remembered(method):
    torch.manual_seed(0)
    model = small_network()
    optimizer, objective = method(model.parameters()), small_objective(model)
    for _ in range(25):
        optimizer.step(objective(*small_batch()))
    search = optimizer._search
    known = {name: value.clone() for name, value in search.items() if isinstance(value, torch.Tensor)}
    search["rounding"] = 10 * objective(*small_batch()).evaluate()
    optimizer.step(objective(*small_batch()))
    for name in ("slope", "noise", "curvature", "along_step", "ceiling", "usual_length"):
        torch.testing.assert_close(search[name], known[name], rtol=0, atol=0)
    torch.testing.assert_close(search["resolved"], torch.tensor(0.1))
    length = search["step_size"] * known["usual_length"] / known["step_size"]
    assert (length < 0.15 * known["usual_length"]).all()


@pytest.mark.parametrize(("bias", "scale"), [(0.0, math.log(3)), (100.0, 200 / 3)])
def test_rounding_is_measured_by_the_first_loss_or_that_of_outputs_of_zero(bias, scale):
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([bias, 0.0, 0.0]))
    optimizer = LWSGDm(model.parameters())
    optimizer.step(Objective(model, Categorical())(torch.randn(9, 4), torch.arange(9) % 3))
    assert optimizer._search["rounding"] == pytest.approx(torch.finfo(torch.float32).eps * scale)


@BOTH
def test_a_fitted_batch_stays_fitted(method):
    """A full batch down to a loss of nothing, and hundreds of steps more: each was lost again once it was rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3)
    )
    objective = Objective(model, Categorical(), population=64)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    optimizer = method(model.parameters())
    losses = torch.stack([optimizer.step(objective(x, y)) for _ in range(600)])
    assert losses[-1] < 1e-6
    assert losses[300:].max() < 1e-4


def test_a_fitted_model_stays_fitted_by_a_new_optimizer():
    """Rounding is measured by the loss of outputs of zero too, not by a first loss of next to nothing alone."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
    objective = Objective(model, Categorical(), population=64)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    for steps in (300, 600):
        optimizer = LWSGDm(model.parameters())
        losses = torch.stack([optimizer.step(objective(x, y)) for _ in range(steps)])
    assert losses.max() < 1e-6


@BOTH
def test_a_new_batch_is_fitted_after_one_that_has_been_for_long(method):
    """Of losses down to rounding nothing is remembered: they once took the step sizes to nothing, for good."""
    torch.manual_seed(0)
    objective = Objective(nn.Sequential(nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 3)), Categorical(), population=16)
    x, y = torch.randn(16, 16), torch.randint(0, 3, (16,))
    optimizer = method(objective.model.parameters())
    for _ in range(500):
        loss = optimizer.step(objective(x[:8], y[:8]))
    assert loss < 1e-7
    losses = [float(optimizer.step(objective(x[8:], y[8:]))) for _ in range(60)]
    assert losses[0] > 1 and losses[-1] < 0.01


@BOTH
def test_a_sigma_that_looks_like_a_learning_rate_is_told(method, recwarn):
    model, (x, y) = small_network(), small_batch()
    objective = small_objective(model)
    for groups, told in ((model.parameters(), 0), ([{"params": list(model.parameters()), "lr": 0.01}], 1)):
        optimizer = method(groups)
        for _ in range(2):
            optimizer.step(objective(x, y))
        assert [str(w.message).split(",")[0] for w in recwarn] == [f"{method.__name__} starts with lr=0.01"] * told
