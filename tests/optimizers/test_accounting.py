"""Layers whose calls account for the gradient: parameters that act outside their module's calls, or in none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from models.likelihoods import Categorical, Gaussian
from optimizers.curvature import ExactGaussNewton, SampledFisher
from optimizers.layers import Untraceable
from optimizers.lw_sgdm import LWSGDm
from optimizers.objective import Objective
from optimizers.replay import frozen_statistics
from tests.optimizers import cases


class Words(nn.Module):
    """Embedding, something, and an output layer that may have the embedding's weight."""

    def __init__(self, tied: str = "", middle: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.middle = nn.Identity() if middle is None else middle
        self.output = None if tied == "by a function" else nn.Linear(8, 9)
        if tied == "by modules":
            self.output.weight = self.embedding.weight

    def forward(self, words):
        x = self.middle(self.embedding(words))
        x = (x[0] if isinstance(x, tuple) else x).mean(1)
        return F.linear(x, self.embedding.weight) if self.output is None else self.output(x)


class Loose(nn.Module):
    """Parameters in a container that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(5, 4) / 2, torch.randn(4, 3) / 2])

    def forward(self, x):
        return torch.tanh(x @ self.weights[0]) @ self.weights[1]


class Named(nn.Module):
    """Layers called with named arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.second(input=torch.tanh(self.first(input=x)))


class Masked(nn.Linear):
    def forward(self, x, *, mask):
        return super().forward(x) * mask


class ByNameOnly(nn.Module):
    """An argument that has no position."""

    def __init__(self) -> None:
        super().__init__()
        self.masked, self.output = Masked(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.output(self.masked(x, mask=torch.tensor([1.0, 0.5, 0.0, 2.0], dtype=x.dtype)))


class Standardised(nn.Conv2d):
    """A convolution that computes with another weight than it holds."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Bright(nn.LayerNorm):
    """A normalisation that does more."""

    def forward(self, x):
        return super().forward(x).square()


def words():
    return torch.randint(9, (12, 5))


def vectors():
    return torch.randn(12, 5)


class ZeroHead(nn.Module):
    """A weight used twice behind a head that starts at zero, so that no gradient reaches it at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 5, bias=False), nn.Linear(5, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)) @ self.first.weight)


class Counted(nn.Module):
    """A buffer that training moves, and one that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        z = self.linear(x)
        self.mean.lerp_(z.detach().mean(0), 0.1)
        self.calls = self.calls + 1
        return z


class Positions(nn.Module):
    """A layer called on as many positions as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 3), nn.Embedding(12, 3)

    def forward(self, words):
        return torch.tanh(self.words(words) + self.places(torch.arange(12))).mean(1)


class Attending(nn.Module):
    """Attention by a function that has one derivative, over rows that are tokens, with a mask for an input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 12), nn.Linear(4, 3)

    def forward(self, x, mask):
        q, k, v = self.qkv(x)[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v, mask)[:, 0]).flatten(0, 1)


class Odd(nn.Module):
    """A layer on a vector, and one called where nothing is differentiated."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.of_vector, self.frozen_call = nn.Parameter(torch.ones(4)), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        with torch.no_grad():
            fixed = self.frozen_call(x)
        return self.frozen_call(x * self.of_vector(self.z)) + fixed


class TiedParts(nn.Module):
    """Layers of a weight and a bias whose weight alone is shared, the module behind calling it twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.second(torch.tanh(self.first(x)))))))


class AtTheRoot(nn.Module):
    """A weight that the model itself has, and a layer in it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.weight, self.head = self.first.weight, nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.first(x)) @ self.weight)


MODELS = {  # and the layers that must be lifted
    "no tie": (Words, words, []),
    "tied by modules": (lambda: Words("by modules"), words, []),
    "tied parts": (TiedParts, vectors, []),
    "at the root": (AtTheRoot, vectors, []),
    "tied by a function": (lambda: Words("by a function"), words, ["embedding"]),
    "lstm": (lambda: Words(middle=nn.LSTM(8, 8, batch_first=True)), words, []),
    "gru": (lambda: Words("by modules", nn.GRU(8, 8, 2, batch_first=True)), words, []),
    "loose": (Loose, vectors, ["weights"]),
    "a head of zero": (ZeroHead, vectors, ["first"]),
    "positions": (Positions, lambda: torch.randint(9, (12, 12)), []),
    "odd": (Odd, vectors, []),
    "named arguments": (Named, vectors, []),
    "by name only": (ByNameOnly, vectors, []),
    "standardised": (
        lambda: nn.Sequential(Standardised(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)),
        lambda: torch.randn(12, 2, 4, 4),
        [],
    ),
    "bright": (lambda: nn.Sequential(nn.Linear(5, 4), Bright(4), nn.Linear(4, 3)), vectors, []),
    "instance": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        lambda: torch.randn(12, 2, 4, 4),
        [],
    ),
    "spectral norm": (lambda: nn.Sequential(spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)), vectors, []),
}
DROPPING = {
    "encoder": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, batch_first=True),
    "gru": lambda: nn.GRU(8, 8, 2, dropout=0.3, batch_first=True),
}


def minibatch(model, inputs, dtype=torch.float64):
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return Objective(model.to(dtype), Categorical())(inputs, torch.randint(3, (12,)))


@pytest.mark.parametrize("name", MODELS)
def test_curvature_is_that_of_a_dense_jacobian(name):
    torch.manual_seed(0)
    build, inputs, lifted = MODELS[name]
    batch = minibatch(build(), inputs())
    layers = batch.objective.account(batch)
    assert [
        layer.name for layer in layers if "." in layer.names[0] and "parametrizations" not in layer.names[0]
    ] == lifted
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in layers}
    q = ExactGaussNewton()(batch, batch.trace(), directions).diagonal()
    with frozen_statistics(batch.objective.model):
        each = [dict(zip(layer.parameters, d, strict=True)) for layer, d in directions.items()]
        expected = torch.stack([_curvature(batch, direction) for direction in each])
    torch.testing.assert_close(q, expected, rtol=1e-9, atol=1e-12)


def _curvature(batch, direction):
    """``dᵀ G d`` by differentiating the whole model along a direction, twice in reverse."""
    outputs = batch.objective.model(*batch.inputs)
    dual = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, list(direction), dual, create_graph=True)
    tangent = torch.autograd.grad(pulled, dual, list(direction.values()))[0]
    return (tangent * batch.hessian_product(outputs, tangent)).sum().detach() / batch.size


@pytest.mark.parametrize("name", DROPPING)
def test_a_lifted_layer_draws_the_masks_of_the_forward_pass_again(name):
    torch.manual_seed(0)
    batch = minibatch(Words(middle=DROPPING[name]()), words())
    layers = batch.objective.account(batch)
    trace = batch.trace()
    gradients = trace.gradients(batch.losses(trace.outputs).sum(), retain_graph=True)
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in layers}
    slopes = dict.fromkeys(layers, 0.0)

    def visit(call, delta):
        slopes[call.layer] += call.slopes(delta, directions[call.layer]).sum()

    trace.backward(batch.residual(trace.outputs), visit)
    for layer in layers:
        expected = sum((g * d).sum() for g, d in zip(gradients[layer], directions[layer], strict=True))
        torch.testing.assert_close(slopes[layer], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["tied by modules", "a head of zero", "instance", "spectral norm", "counted"])
def test_accounting_leaves_no_trace(name):
    build, inputs, _ = MODELS.get(name, (Counted, vectors, []))
    batch = minibatch(build(), inputs())
    before = {name: b.clone() for name, b in batch.objective.model.state_dict().items()}
    random_state = torch.get_rng_state()
    batch.objective.account(batch)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(b, before[name]) for name, b in batch.objective.model.state_dict().items())
    assert all(p.grad is None for p in batch.objective.model.parameters())
    assert batch.objective.gradient_equivalents == 0


def test_a_model_whose_call_does_not_tell_is_refused():
    class Counting(Loose):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x) * self.calls

    batch = minibatch(Counting(), vectors())
    with pytest.raises(Untraceable, match=r"layer 'weights' .* the model's call does not account"):
        batch.objective.account(batch)


def test_layers_are_found_anew_when_others_are_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    objective, x, y = Objective(model, Categorical()), torch.randn(12, 5), torch.randint(3, (12,))
    optimizer = LWSGDm(model.parameters())
    optimizer.step(objective(x, y))
    for frozen in (True, False):
        model[0].requires_grad_(not frozen)
        before = [p.detach().clone() for p in model[0].parameters()]
        optimizer.step(objective(x, y))
        assert all(map(torch.equal, before, model[0].parameters())) is frozen
        assert len(optimizer.diagnostics()) == (1 if frozen else 2)


@pytest.mark.filterwarnings("ignore:layer .* takes the plain gradient")
@pytest.mark.parametrize("name", sorted({*cases.NAMES} - {"curvature_rescaling"}))
def test_every_optimizer_trains_a_model_with_tied_weights_and_attention(name):
    torch.manual_seed(0)
    model, x = Words("by modules", nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)), words()
    optimizer, objective = cases.build(name, model.parameters()), Objective(model, Categorical(), population=1000)
    before = [p.detach().clone() for p in model.parameters()]
    losses = torch.stack([optimizer.step(objective(x, x[:, 0])) for _ in range(12)])
    assert losses.isfinite().all()
    assert not any(map(torch.equal, before, model.parameters()))


def test_curvature_rescaling_says_that_it_needs_layers_that_hold_no_others():
    model, x = Words(middle=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)), words()
    optimizer = cases.build("curvature_rescaling", model.parameters())
    with pytest.raises(NotImplementedError, match=r"layer 'middle.self_attn' .* holds layer"):
        optimizer.step(Objective(model, Categorical())(x, x[:, 0]))


def test_curvature_rescaling_says_that_it_needs_layers_that_return_one_tensor():
    model, x = Words(middle=nn.LSTM(8, 8, batch_first=True)).double(), words()
    optimizer = cases.build("curvature_rescaling", model.parameters())
    with pytest.raises(NotImplementedError, match=r"layer 'middle' \(LSTM\) returns a tuple"):
        optimizer.step(Objective(model, Categorical())(x, x[:, 0]))


def test_sampled_curvature_of_a_tied_weight_counts_both_of_its_uses():
    torch.manual_seed(0)
    model = Words("by modules").double()
    batch = Objective(model, Gaussian())(words(), torch.randn(12, 9, dtype=torch.float64))
    layers = batch.objective.account(batch)
    directions = {layer: [torch.randn_like(p) for p in layer.parameters] for layer in layers}
    exact = ExactGaussNewton()(batch, batch.trace(), directions).diagonal()
    draws = torch.stack([SampledFisher()(batch, batch.trace(), directions).diagonal() for _ in range(400)])
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 400**0.5).all()


def test_a_weight_of_two_modules_is_seen_in_the_calls_of_both():
    model = Words("by modules").double()
    embedding, output = minibatch(model, words()).objective.layers
    assert type(embedding).__name__ == "EmbeddingLayer" and output.names == ("bias",)
    assert [(place.module, place.names) for place in embedding.elsewhere] == [(model.output, ("weight",))]


def test_a_module_that_two_layers_have_a_place_in_is_measured_once_for_each():
    """Its own parameter by autograd, whose pass must not report to the other's tap again."""

    class Scaled(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight, self.scale = weight, nn.Parameter(torch.ones(4))

        def forward(self, x):
            return F.linear(x, self.weight) * self.scale

    first = nn.Linear(4, 4)
    batch = minibatch(nn.Sequential(first, nn.Tanh(), Scaled(first.weight), nn.Linear(4, 3)), torch.randn(12, 4))
    trace, calls, sums = batch.trace(), [], {}
    expected = trace.gradients(batch.losses(trace.outputs).sum(), retain_graph=True)

    def visit(call, delta):
        calls.append(call)
        gradient = call.gradient(delta)
        sums[call.layer] = [a + b for a, b in zip(sums.get(call.layer, [0, 0]), gradient, strict=False)]

    trace.backward(batch.residual(trace.outputs), visit)
    assert len(calls) == len(set(calls)) == len(trace.calls) == 4
    torch.testing.assert_close(sums, {layer: expected[layer] for layer in sums})


def test_curvature_rescaling_says_that_it_needs_layers_that_share_nothing():
    model, x = Words("by modules"), words()
    optimizer = cases.build("curvature_rescaling", model.parameters())
    with pytest.raises(NotImplementedError, match="layers 'embedding' and 'output' share parameters"):
        optimizer.step(Objective(model, Categorical())(x, x[:, 0]))


def test_as_many_positions_as_examples_are_not_taken_for_examples():
    torch.manual_seed(0)
    batch = minibatch(Positions(), torch.randint(9, (12, 12)))
    layers = batch.objective.account(batch)
    assert batch.mixes(batch.trace())
    apart = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    directions = {layer: [apart.expand_as(p) for p in layer.parameters] for layer in layers}
    exact = ExactGaussNewton()(batch, batch.trace(), directions).diagonal()
    draws = torch.stack([SampledFisher()(batch, batch.trace(), directions).diagonal() for _ in range(300)])
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 300**0.5).all()


def test_a_mask_of_as_many_rows_as_examples_is_not_taken_for_examples():
    """Nor does the default estimator ask attention for a second derivative."""
    torch.manual_seed(0)
    model, mask = Attending(), torch.ones(40, 40, dtype=torch.bool).tril()
    objective, optimizer = Objective(model, Categorical()), LWSGDm(model.parameters())
    x, y = torch.randn(40, 40, 5), torch.randint(3, (1600,))
    losses = [optimizer.step(objective((x, mask), y)) for _ in range(6)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("build", "name"),
    [(Odd, name) for name in ("kfac", "back_matching", "shampoo", "lw_adamw")]
    + [(Named, name) for name in ("kfac", "kbfgs", "back_matching", "curvature_rescaling", "lw_adamw")],
)
@pytest.mark.filterwarnings("ignore:layer .* takes the plain gradient")
def test_calls_on_vectors_by_name_and_without_derivative(name, build):
    torch.manual_seed(0)
    model = build()
    optimizer, objective = cases.build(name, model.parameters()), Objective(model, Categorical(), population=1000)
    x, y = vectors(), torch.randint(3, (12,))
    assert torch.stack([optimizer.step(objective(x, y)) for _ in range(3)]).isfinite().all()


def test_a_sparse_gradient_is_refused():
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten())
    with pytest.raises(Untraceable, match=r"layer '0' .* sparse gradient"):
        LWSGDm(model.parameters()).step(
            Objective(model, Categorical())(torch.randint(9, (12, 1)), torch.zeros(12).long())
        )


class Recentred(nn.Module):
    """Changes its input in place, or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear, self.in_place = nn.Linear(6, 3), in_place

    def forward(self, x):
        if self.in_place:
            x -= 1.0
            return self.linear(x)
        return self.linear(x - 1.0)


def test_a_pass_that_is_not_the_same_again_is_told(recwarn):
    batch = torch.randn(8, 6), torch.arange(8) % 3
    LWSGDm((model := Recentred(False)).parameters()).step(Objective(model, Categorical())(*batch))
    dropping = nn.Sequential(nn.Dropout(), nn.Linear(6, 3))
    LWSGDm(dropping.parameters()).step(Objective(dropping, Categorical())(*batch))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="Recentred gives other outputs when it is called with the same inputs again"):
        LWSGDm((model := Recentred(True)).parameters()).step(Objective(model, Categorical())(*batch))


def test_rows_are_indices_or_a_mask_and_may_repeat():
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    objective, mask = Objective(model, Categorical()), torch.tensor([True, False, True, True, False, False])
    labels = torch.tensor([0, 2, 1])
    losses = [
        objective(x, labels, rows=rows)() for rows in (mask, [0, 2, 3], torch.tensor([0, 2, 3], dtype=torch.int32))
    ]
    assert losses[0] == losses[1] == losses[2]
    repeated = objective(x, torch.tensor([0, 2, 0, 1]), rows=torch.tensor([0, 0, 0, 1]))
    outputs = model(x).detach().requires_grad_()
    expected = torch.autograd.grad(repeated.losses(outputs).sum(), outputs)[0]
    torch.testing.assert_close(repeated.residual(outputs), expected)


def test_outputs_that_are_no_tensor_are_told():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(TypeError, match="the model returned a tuple, not a tensor"):
        Objective(Pair(4, 3), Categorical())(torch.randn(6, 4), torch.arange(6) % 3)()
