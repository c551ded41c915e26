"""The layer-wise rule against closed forms, and its invariances."""

from functools import partial

import pytest
import torch
from torch import nn

from models.likelihoods import Categorical, Gaussian, Scaled
from optimizers import LWAdamW, LWSGDm, Objective
from optimizers.curvature import ExactGaussNewton, GaussNewton
from tests.optimizers.cases import UNBOUNDED, least_squares, small_batch, small_network, small_objective

BOTH = pytest.mark.parametrize("method", [LWSGDm, LWAdamW])
pytestmark = pytest.mark.filterwarnings("ignore:LW.* starts with lr=1e-30")
GREEDY = {"sigma": 1.0, "averaging": 0.0, "trust": 1e9, "share": 1.0} | UNBOUNDED


def test_one_greedy_step_is_an_exact_line_search():
    """One layer, full batch, exact curvature: θ₁ = θ₀ − (gᵀg / gᵀHg) g, the minimiser along the gradient."""
    objective, x, y, model = least_squares()
    minibatch = objective(x @ torch.diag(torch.arange(1.0, 6.0, dtype=x.dtype)), y)
    minibatch()
    g, start = model.weight.grad.clone(), model.weight.detach().clone()
    losses = []
    for a in (-1.0, 0.0, 1.0):
        model.weight.data = start - a * g
        losses.append(minibatch.evaluate())
    best = (losses[0] - losses[2]) / (2 * (losses[0] - 2 * losses[1] + losses[2]))
    model.weight.data = start.clone()
    LWSGDm(model.parameters(), momentum=0.0, curvature=ExactGaussNewton(), **GREEDY).step(minibatch)
    torch.testing.assert_close(model.weight.data, start - best * g, rtol=1e-10, atol=1e-12)


def test_joint_factor_makes_simultaneous_steps_one_line_search():
    """Two layers: the loss model along the joint step is minimised, whatever the layers' overlap."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)).double()
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    objective = Objective(model, Gaussian(), population=9)
    minibatch = objective(x, y)
    minibatch()
    d = {layer: [p.grad.clone() for p in layer.parameters] for layer in objective.layers}
    q = ExactGaussNewton()(minibatch, minibatch.trace(), d).detach()
    rho = torch.stack([sum((g * g).sum() for g in gs) for gs in d.values()])
    alone = rho / q.diagonal()  # without noise every layer takes its own
    expected = alone * (rho @ alone / (alone @ q @ alone))
    optimizer = LWSGDm(model.parameters(), momentum=0.0, own=1.0, curvature=ExactGaussNewton(), **GREEDY)
    optimizer.step(minibatch)
    sizes = torch.stack([layer["step_size"] for layer in optimizer.diagnostics().values()])
    torch.testing.assert_close(sizes, expected, rtol=1e-10, atol=0)


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)).double()


def train(method, model, likelihood, steps=25, population=100, **options):
    objective = Objective(model, likelihood, torch.Generator().manual_seed(1), population=population)
    optimizer = method(model.parameters(), **options)
    x, y = small_batch(torch.float64)
    return torch.stack([optimizer.step(objective(x, y)) for _ in range(steps)])


@BOTH
def test_scaling_the_likelihood_changes_nothing(method):
    options = {"eps": 1e-30} if method is LWAdamW else {}
    # no bias below a BatchNorm: its gradient is rounding error, which Adam's direction would make large
    plain = train(method, perceptron(), Categorical(), **options)
    scaled = train(method, perceptron(), Scaled(Categorical(), 1000.0), **options)
    torch.testing.assert_close(scaled, 1000 * plain, rtol=1e-8, atol=0)


@BOTH
def test_moving_scale_from_layer_to_layer_changes_nothing_without_noise(method):
    """A bias-free ReLU pair (W, 16 V) and (16 W, V) is the same function; the layers' steps scale along, exactly.

    Under W → cW gradient and curvature become g/c and H/c², so the greedy step of SGD's direction becomes c times the
    old one. AdamW's direction does not see the factor (up to ε) and the step size carries it. Decay would see it, and
    so would the common step size that layers are drawn to: hence a full batch, and every layer its own. No layer is
    smaller than torch starts one.
    """
    options = {"own": 1.0} | ({"eps": 1e-30} if method is LWAdamW else {})
    losses = []
    for c in (1.0, 16.0):
        model = perceptron()
        with torch.no_grad():
            model[1].weight.mul_(c)
            model[3].weight.mul_(16 / c)
        population = len(small_batch()[1])
        losses.append(train(method, model, Categorical(), population=population, **options))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-8, atol=0)


@pytest.mark.parametrize("kept", [{}, {"max_norm": 0.1}, {"population": 4}], ids=["passing", "clipped", "complete"])
def test_gradients_are_seen_as_autograd_makes_them_and_kept_only_where_the_whole_is_needed(kept):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    model.unused = nn.Linear(2, 2).double()
    model.forward = lambda x: model[:3](x)
    penalty = {model[0].weight: 0.7}
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    minibatch = Objective(model, Gaussian(), penalty=penalty, **kept)(x, y)
    used = [*model[0].parameters(), *model[2].parameters()]
    expected = dict(zip(used, torch.autograd.grad(minibatch.loss(model(x)), used), strict=True))
    if "max_norm" in kept:
        scale = 0.1 / (nn.utils.get_total_norm(expected.values()) + 1e-6)
        expected = {p: g * scale for p, g in expected.items()}
    seen = {}

    def visit(p):
        seen[p] = p.grad.clone()
        together = sum(q.grad is not None for q in model.parameters())
        assert together == (len(used) + 2 if kept else 1)

    loss = minibatch.visit_gradients(minibatch.trace(keep_outputs=False), visit)
    torch.testing.assert_close(loss, minibatch.evaluate())
    for p in model.parameters():
        torch.testing.assert_close(seen[p], expected.get(p, torch.zeros_like(p)), rtol=1e-12, atol=1e-14)


def test_corrected_slope_is_unbiased():
    """Over batches drawn from an unlimited population, E[gᵀg − eᵀe] = ‖E g‖²; gᵀg alone is not near it."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2, dtype=torch.float64)
    objective = Objective(model, Gaussian())
    truth = torch.randn(2, 6, dtype=torch.float64)
    corrected, plain = [], []
    for _ in range(3000):
        x = torch.randn(8, 6, dtype=torch.float64)
        minibatch = objective(x, x @ truth.T + 3 * torch.randn(8, 2, dtype=torch.float64))
        trace = minibatch.trace()
        minibatch.fill_gradients(trace, retain_graph=True)
        e = []
        minibatch.noise(trace, lambda p, gradient, e=e: e.append(gradient))
        plain.append(sum((p.grad**2).sum() for p in model.parameters()))
        corrected.append(plain[-1] - sum((g**2).sum() for g in e))
    corrected, plain = torch.stack(corrected), torch.stack(plain)
    exact = ((model.weight - truth) ** 2).sum().detach() + (model.bias**2).sum().detach()  # E xxᵀ = I
    assert (corrected.mean() - exact).abs() < 4 * corrected.std() / len(corrected) ** 0.5
    assert plain.mean() > 1.5 * exact


def test_noise_of_dropout_at_full_batch_is_the_spread_of_the_gradient():
    """Over masks, E‖e‖² = E‖g − E g‖², with a penalty in g; the spread between examples is not in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 2)).double()
    x, y = torch.randn(30, 6, dtype=torch.float64), 5 * torch.randn(30, 2, dtype=torch.float64)
    minibatch = Objective(model, Gaussian(), population=30, penalty={model[1].weight: 0.7})(x, y)
    gradients, noise = [], []
    for _ in range(2000):
        trace = minibatch.trace()
        minibatch.fill_gradients(trace, retain_graph=True)
        gradients.append(model[1].weight.grad.clone())
        e = {}
        minibatch.noise(trace, e.__setitem__)
        noise.append(e[model[1].weight].square().sum())
    gradients, noise = torch.stack(gradients), torch.stack(noise)
    spread = gradients.var(0).sum()
    assert (noise.mean() - spread).abs() < 5 * noise.std() / len(noise) ** 0.5 + 0.03 * spread
    assert noise.mean() > 0


@BOTH
def test_a_full_batch_has_no_sampling_noise_and_dropout_has_its_own(method):
    class FunctionalDropout(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=self.training)

    noise = []
    for model in (
        small_network(),
        *(nn.Sequential(d, small_network()) for d in (nn.Dropout(0.5), FunctionalDropout())),
    ):
        optimizer = method(model.parameters())
        x, y = small_batch()
        optimizer.step(small_objective(model, population=len(y))(x, y))
        noise.append(optimizer._search["noise"].clone())
    assert (noise[0] == 0).all()
    assert (noise[1] > 0).all()
    assert (noise[2] > 0).all()


@BOTH
def test_models_that_take_more_than_a_row_per_example_are_measured_on_the_whole_batch(method):
    """An input that all examples share: no sample of the batch can be taken."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x, scale, words):
            return self.linear(x) * scale * len(words)

    model, x = Scaled(), torch.randn(128, 6)
    optimizer = method(model.parameters())
    objective = Objective(model, Categorical(), torch.Generator().manual_seed(0))
    losses = [optimizer.step(objective((x, torch.tensor(2.0), ["a"]), x[:, :3].argmax(1))) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("own", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("signal", [1.0, 0.5, 0.2])
def test_layers_whose_slope_is_noise_take_a_common_step(own, signal):
    """Slopes alike and curvatures from 1 to 100: the layers' step sizes spread as 100 to the power ω s²."""
    model = small_network()
    optimizer = LWSGDm(model.parameters(), own=own, averaging=0.0, trust=1e9, **UNBOUNDED)
    optimizer.step(small_objective(model)(*small_batch()))
    search = optimizer._search
    search["along_step"] = torch.ones(2)  # the loss is as curved as the model
    search["slope"] = torch.ones(len(optimizer._layers))
    search["noise"] = (1 - signal) * search["slope"]
    search["curvature"] = torch.diag(torch.logspace(0, 2, len(optimizer._layers)))
    optimizer._search_step_sizes(search, per_length=torch.ones(len(optimizer._layers)))
    sizes = search["step_size"].detach()
    assert sizes[0] / sizes[-1] == pytest.approx(100 ** (own * signal**2), rel=1e-4)
    at = _model(sizes, search)
    assert at < min(_model(1.01 * sizes, search), _model(0.99 * sizes, search))  # their joint scale minimises the model


@pytest.mark.parametrize("unseen", [0.0, 1e-30])
def test_a_layer_of_whose_curvature_nothing_was_seen_takes_the_common_step(unseen):
    """As an expert does that no example of the sample reaches, and one without a gradient beside it."""
    model = small_network()
    optimizer = LWSGDm(model.parameters(), averaging=0.0, trust=1e9, **UNBOUNDED)
    optimizer.step(small_objective(model)(*small_batch()))
    search, layers = optimizer._search, len(optimizer._layers)
    search["along_step"] = torch.ones(2)
    search["slope"] = torch.ones(layers)
    search["slope"][-1] = 0
    search["noise"] = torch.zeros(layers)
    search["curvature"] = torch.diag(torch.full((layers,), 4.0))
    search["curvature"][0, 0] = search["curvature"][-1, -1] = unseen
    optimizer._search_step_sizes(search, per_length=torch.ones(layers))
    torch.testing.assert_close(search["step_size"], torch.tensor([*[0.25] * (layers - 1), search["step_size"][-1]]))
    assert search["step_size"].isfinite().all()


def _model(sizes, search):
    slope = search["slope"] - search["noise"]
    return -slope @ sizes + sizes @ search["curvature"] @ sizes / 2


class Misjudged:
    """The exact Gauss–Newton curvature, times a factor."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, *measured):
        return self.factor * ExactGaussNewton()(*measured)


def test_a_model_that_is_too_flat_is_corrected_by_the_loss():
    """A fifth of the curvature: the first step is five times too long, the next ones minimise along the gradient."""
    objective, x, y, model = least_squares()
    minibatch = objective(x @ torch.diag(torch.arange(1.0, 6.0, dtype=x.dtype)), y)
    optimizer = LWSGDm(model.parameters(), momentum=0.0, curvature=Misjudged(0.2), correct_every=1, **GREEDY)
    optimizer.step(minibatch)
    for _ in range(3):
        minibatch()
        g = [model.weight.grad.clone()]
        q = ExactGaussNewton()(minibatch, minibatch.trace(), {objective.layers[0]: g}).item()
        optimizer.step(minibatch)
        (layer,) = optimizer.diagnostics().values()
        assert layer["step_size"].item() == pytest.approx((g[0] * g[0]).sum().item() / q, rel=1e-9)


@pytest.mark.parametrize("population", [64, 10_000])
def test_a_model_that_is_too_steep_is_corrected_as_far_as_slope_is_noise(population):
    """Five times the curvature: on a full batch, where slope is all signal, the model stands; on a sample it gives."""
    objective, x, y, model = least_squares()
    objective.population = population
    settings = {"correct_every": 1, "share": 1.0, "trust": 1e9} | UNBOUNDED
    optimizer = LWSGDm(model.parameters(), curvature=Misjudged(5.0), **settings)
    for _ in range(150):
        optimizer.step(objective(x, y + torch.randn(y.shape, generator=objective.generator, dtype=y.dtype)))
    search = optimizer._search
    seen, modelled = search["along_step"]
    assert seen / modelled == pytest.approx(0.2, rel=0.01)  # the average has forgotten that it began at 1
    share = max(1 - search["noise"] / search["slope"], 0.2) if population > 64 else 1.0
    assert share == 1 or share < 0.5
    sizes = []
    for pair in ([seen, modelled], [1.0, 1.0]):
        search |= {"along_step": torch.tensor(pair, dtype=y.dtype), "ceiling": torch.tensor([torch.inf], dtype=y.dtype)}
        optimizer._search_step_sizes(search, torch.ones(1, dtype=y.dtype))
        sizes.append(search["step_size"].item())
    assert sizes[0] / sizes[1] == pytest.approx(1 / share, rel=0.01)


class Pinned:
    """Step sizes that are given, in place of those that are searched."""

    size = 0.01

    def _step_sizes(self, search):
        return torch.full((len(self._layers),), self.size, dtype=torch.float64)


@pytest.mark.parametrize(
    ("method", "sibling", "decay"),
    [
        (LWSGDm, partial(torch.optim.SGD, lr=0.001, momentum=0.9), 0.0),  # its decay would go through its momentum
        (LWAdamW, partial(torch.optim.AdamW, lr=0.01), 0.1),
    ],
)
def test_descents_are_those_of_torch(method, sibling, decay):
    """At step sizes of 0.01 LW-AdamW is AdamW, and LW-SGDm is SGD whose momentum sums steps of (1 − β) 0.01."""
    x, y = small_batch(torch.float64)
    ours, theirs = perceptron(), perceptron()
    pinned = type("Pinned", (Pinned, method), {})(ours.parameters(), weight_decay=decay)
    other = sibling(theirs.parameters(), weight_decay=decay)
    for _ in range(20):
        pinned.step(Objective(ours, Categorical())(x, y))
        other.step(Objective(theirs, Categorical())(x, y))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@BOTH
@pytest.mark.parametrize("setting", ["plain", "decay", "clipped", "dropout"])
@pytest.mark.parametrize("steps", [1, 2], ids=["ahead", "back"])
def test_the_loss_seen_along_a_step_is_the_same_function_of_the_weights(method, setting, steps):
    """What the slope leaves of the loss's change is of second order: the same masks, decay's and the clipped slope."""
    curvatures = []
    for size in (1e-4, 1e-5) if method is LWSGDm else (1e-6, 1e-7):
        torch.manual_seed(0)
        network = nn.Sequential(perceptron(), nn.Dropout(0.5 if setting == "dropout" else 0.0))
        objective = Objective(network, Categorical(), max_norm=0.1 if setting == "clipped" else None, population=100)
        pinned = type("Pinned", (Pinned, method), {"size": size})
        optimizer = pinned(network.parameters(), weight_decay=10.0 if setting == "decay" else 0.0, **SOON)
        for _ in range(steps):
            optimizer.step(objective(*small_batch(torch.float64)))
        curvatures.append(optimizer._search["along_step"][0].clone())
    assert curvatures[0] == pytest.approx(curvatures[1].item(), rel=0.05)


@BOTH
@pytest.mark.parametrize("every", [1, 4])
def test_work_per_step(method, every):
    model = small_network()
    objective = small_objective(model)
    optimizer = method(model.parameters(), every=every, settling=20, correct_every=5)
    for _ in range(40):
        optimizer.step(objective(*small_batch()))
    settled = 20 / every
    curvature, noise, comparison = 20 + settled * 4 / 5, 4 + settled / 5, 4 + settled / 5
    work = 40 + curvature * 2 / 3 + noise * 2 / 3 + comparison / 3
    if method is LWAdamW:  # the last step's curvature, in a pass of its own
        work += settled / 5 * (1 / 3 + 2 / 3)
    assert objective.gradient_equivalents == pytest.approx(work)


#: Looks back at every step but the first, and remembers no other.
SOON = {"look_back": True, "settling": 1, "correct_every": 1, "averaging": 0.0}


@pytest.mark.parametrize("population", [24, 100])
def test_once_settled_a_step_is_judged_by_a_batch_that_had_no_part_in_it(population):
    """The next one; but the whole training set by itself."""
    model = perceptron()
    objective, batch = Objective(model, Categorical(), population=population), small_batch(torch.float64)
    other = batch[0].flip(0), batch[1]
    optimizer = LWSGDm(model.parameters(), curvature=ExactGaussNewton(), share=1.0, **SOON)
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()])]
    for step in (batch, other):
        optimizer.step(objective(*step))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    def look(at):
        torch.nn.utils.vector_to_parameters(weights[at], model.parameters())
        loss = objective(*other)()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    start, end = (0, 1) if population > 24 else (2, 1)  # the first point is the other end of the line
    (far, _), (near, slope) = look(start), look(end)
    along = weights[start] - weights[end]
    model.zero_grad()
    torch.nn.utils.vector_to_parameters(weights[1], model.parameters())
    layers = torch.split(along, [p.numel() for p in model.parameters()])
    directions = {k: [d.view_as(k.parameters[0])] for k, d in zip(objective.layers, layers, strict=True)}
    minibatch = objective(*other)
    modelled = ExactGaussNewton()(minibatch, minibatch.trace(), directions).sum()
    expected = torch.stack([2 * (far - near - slope @ along), modelled]) / along.square().sum()
    torch.testing.assert_close(optimizer._search["along_step"], expected)


def test_once_settled_curvature_skips_the_measurement_of_noise_and_the_next_one_stands_for_both():
    calls = []

    def curvature(minibatch, trace, directions):
        calls.append(len(calls) + 1.0)
        return calls[-1] * torch.eye(len(directions), dtype=torch.float64)

    model = perceptron()
    objective, (x, y) = Objective(model, Categorical()), small_batch(torch.float64)
    searched = {"sigma": 1e-30, "averaging": 0.5, "settling": 40, "correct_every": 4}
    optimizer = LWSGDm(model.parameters(), momentum=0.0, curvature=curvature, **searched)
    for _ in range(50):
        optimizer.step(objective(x, y))
    measured = [*range(1, 41), 41, 41, 42, 43, 44, 44, 45, 46, 47, 47]  # the times 40, 44 and 48 are noise's
    average = torch.tensor(sum(v * 0.5 ** (50 - i) for i, v in enumerate(measured)), dtype=torch.float64)
    objective(x, y)()
    squared_length = torch.stack([p.grad.square().sum() for p in model.parameters()])
    torch.testing.assert_close(optimizer._search["curvature"].diagonal() * squared_length, average.expand(2))


@BOTH
@pytest.mark.parametrize("every", [1, 4, 10])
def test_averages_are_unbiased_however_often_they_are_measured(method, every):
    """Where every batch is the same and no step is taken, the averages are what each measurement says."""
    model = small_network()
    optimizer = method(model.parameters(), every=every, settling=10, sigma=1e-30, curvature=ExactGaussNewton())
    for _ in range(60):
        optimizer.step(small_objective(model)(*small_batch()))
    measured = {layer: values["curvature"].item() for layer, values in optimizer.diagnostics().items()}
    fresh = method(model.parameters(), sigma=1e-30, curvature=ExactGaussNewton())
    fresh.step(small_objective(model)(*small_batch()))
    assert measured == pytest.approx({k: v["curvature"].item() for k, v in fresh.diagnostics().items()}, rel=0.02)


@BOTH
def test_schedulers_scale_the_steps(method):
    model = small_network()
    optimizer = method(model.parameters(), sigma=1.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step(small_objective(model)(*small_batch()))
    before = [layer["step_size"] for layer in optimizer.diagnostics().values()]
    scheduler.step()
    after = [layer["step_size"] for layer in optimizer.diagnostics().values()]
    torch.testing.assert_close(after, [0.1 * size for size in before])


@BOTH
def test_a_warm_up_may_start_at_nothing(method):
    model = small_network()
    optimizer, before = method(model.parameters()), [p.detach().clone() for p in model.parameters()]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 5))
    for step in range(8):
        optimizer.step(small_objective(model)(*small_batch()))
        assert (step == 0) == all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        scheduler.step()
    assert all(p.isfinite().all() for p in model.parameters())


@BOTH
def test_a_first_step_that_fails_is_as_if_it_had_not_been(method):
    model, (x, y) = small_network(), small_batch()
    optimizer, objective = method(model.parameters()), small_objective(model)
    with pytest.raises(IndexError):
        optimizer.step(objective(torch.cat([x, x]), torch.cat([y, y + 99])))
    losses = [optimizer.step(objective(x, y)) for _ in range(60)]
    assert losses[-1] < losses[0]


def test_an_interrupted_look_back_leaves_the_weights_where_they_were():
    model, (x, y) = small_network(), small_batch()
    optimizer, objective = LWAdamW(model.parameters(), settling=5), small_objective(model)
    interrupted = 0

    def interrupt(module, inputs):
        if not torch.is_grad_enabled():
            raise KeyboardInterrupt

    for _ in range(20):
        before = [p.detach().clone() for p in model.parameters()]
        handle = model.register_forward_pre_hook(interrupt)
        try:
            if optimizer._due(objective(x, y), optimizer._search).back:
                interrupted += 1
                with pytest.raises(KeyboardInterrupt):
                    optimizer.step(objective(x, y))
                assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        finally:
            handle.remove()
        optimizer.step(objective(x, y))
    assert interrupted


@BOTH
def test_a_module_may_be_replaced_between_steps(method):
    model = small_network()
    optimizer, objective = method(model.parameters()), small_objective(model)
    for _ in range(3):
        optimizer.step(objective(*small_batch()))
    model[4] = nn.Linear(model[4].in_features, model[4].out_features)
    with pytest.raises(ValueError, match=r"'4\.weight' is trainable but in none"):
        optimizer.step(objective(*small_batch()))
    optimizer.add_param_group({"params": model[4].parameters()})
    before = model[4].weight.detach().clone()
    for _ in range(3):
        assert optimizer.step(objective(*small_batch())).isfinite()
    assert not torch.equal(model[4].weight, before)


@pytest.mark.parametrize("batch", [1, 2, 7])
@BOTH
def test_any_batch_size(method, batch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    objective = small_objective(model)
    optimizer = method(model.parameters())
    x, y = small_batch()
    for i in range(40):
        rows = torch.arange(i * batch, (i + 1) * batch) % len(y)
        loss = optimizer.step(objective(x[rows], y[rows]))
    assert torch.isfinite(loss)


@BOTH
def test_bad_input(method):
    model = small_network()
    with pytest.raises(TypeError, match="objective = Objective"):
        method(model.parameters()).step(lambda: torch.zeros(()))
    with pytest.raises(ValueError, match=r"'0\.weight' is trainable but in none"):
        method(model[4].parameters()).step(small_objective(model)(*small_batch()))
    with pytest.raises(ValueError, match="no examples"):
        small_objective(model)(torch.randn(0, 6), torch.randint(3, (0,)))
    with pytest.raises(ValueError, match="population=0 is impossible"):
        small_objective(model, population=0)
    with pytest.raises(ValueError, match=r"population is the number of training examples \(len\(dataset\)\)"):
        small_objective(model, population=3)(*small_batch())
    with pytest.raises(TypeError, match=r"Categorical'> is no likelihood: Objective\(model, Categorical\(\)\)"):
        Objective(model, Categorical)
    with pytest.raises(ValueError, match=r"shape \(2,\) in LW.* is none of the model's"):
        method([*model.parameters(), nn.Parameter(torch.zeros(2))]).step(small_objective(model)(*small_batch()))
    for wrong in (
        {"sigma": 0.0},
        {"averaging": 1.0},
        {"every": 0},
        {"growth": 1.0},
        {"brake": 0.9},
        {"look_back": "maybe"},
        {"lr": 0.001},
        {"weight_decay": -1.0},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            method(model.parameters(), **wrong)


def test_default_estimator_is_the_sampled_fisher():
    assert isinstance(LWSGDm(small_network().parameters()).curvature, GaussNewton)


@BOTH
def test_freezing_and_unfreezing_between_steps_begins_the_search_anew(method):
    model = small_network()
    optimizer = method(model.parameters())
    objective = small_objective(model, population=100)
    for trains in (True, False, True):
        model[0].requires_grad_(trains)
        objective.refresh()
        for _ in range(3):
            before = [p.detach().clone() for p in model[0].parameters()]
            assert optimizer.step(objective(*small_batch())).isfinite()
            moved = not all(torch.equal(p, q) for p, q in zip(model[0].parameters(), before, strict=True))
            assert moved == trains


@BOTH
def test_impossible_groups_are_refused(method):
    model = small_network()
    weights, others = [model[0].weight], [p for p in model.parameters() if p is not model[0].weight]
    with pytest.raises(ValueError, match=r"lr=-3\.0 is impossible"):
        method([{"params": weights, "lr": -3.0}, {"params": others}])
    with pytest.raises(ValueError, match=r"weight_decay=-1\.0 is impossible"):
        method([{"params": weights}, {"params": others, "weight_decay": -1.0}])
    option, value = ("momentum", 1.5) if method is LWSGDm else ("betas", (0.9, 1.5))
    with pytest.raises(ValueError, match=f"{option}=.* is impossible"):
        method(weights).add_param_group({"params": others, option: value})
    for argument in ("sigma", "trust", "every"):
        with pytest.raises(ValueError, match=f"has one {argument} for all groups; a group may have its own lr, "):
            method([{"params": weights, argument: 1.0}, {"params": others}])
    optimizer, objective = method([{"params": weights, "name": "a"}, {"params": others}]), small_objective(model)
    optimizer.step(objective(*small_batch()))
    optimizer.param_groups[0]["lr"] = 1.0
    with pytest.raises(ValueError, match="layer '0' has one step size"):
        optimizer.step(objective(*small_batch()))


@pytest.mark.parametrize("population", [None, 24], ids=["minibatch", "full batch"])
@BOTH
def test_what_changes_by_counting_alone_is_planned_and_what_is_kept_stays_in_place(method, population):
    """A captured step is replayed with other numbers in the same memory: the host's part of it is the plan."""
    weights = []
    for captured in (False, True):
        torch.manual_seed(0)
        model = small_network()
        objective, (x, y) = small_objective(model, population), small_batch()
        optimizer = method(model.parameters(), settling=12)
        kinds = []
        for step in range(30):
            before = places(optimizer)
            plan = optimizer.plan(objective(x, y))
            kinds.append(plan.kind)
            if captured:
                plan = plan._replace(numbers={key: torch.tensor(number) for key, number in plan.numbers.items()})
            optimizer.carry_out(plan, objective(x, y))
            if step:
                assert places(optimizer) == before
        assert 3 <= len(set(kinds)) <= 10
        assert len(set(kinds[-10:])) <= 3
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def places(optimizer) -> dict:
    """Where in memory what an optimizer keeps is."""
    search = optimizer.state[optimizer.first].get("search", {})
    kept = {name: value for name, value in search.items() if isinstance(value, torch.Tensor)}
    for number, state in enumerate(optimizer.state.values()):
        kept |= {(number, name): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return {name: value.data_ptr() for name, value in kept.items()}
