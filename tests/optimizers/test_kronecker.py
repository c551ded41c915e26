"""What the Kronecker methods share: powers, averages, frequencies, momentum, faults, state."""

import copy

import pytest
import torch
from torch import nn

from models.likelihoods import Gaussian
from optimizers import Objective
from optimizers.kfac import KFAC
from optimizers.kronecker import Block, damped_power, homogeneous_block, mode_grams, tensor_block
from optimizers.layers import find_layers
from optimizers.mbf import MBF
from optimizers.shampoo import Shampoo
from optimizers.tnt import TNT
from tests.optimizers import cases

METHODS = [KFAC, Shampoo, TNT, MBF]


def random_covariance(b: int, n: int, rank: int) -> torch.Tensor:
    x = torch.randn(b, n, rank, dtype=torch.float64)
    return x @ x.mT / rank


def make(cls, dtype=torch.float64, **settings):
    model = cases.small_network(dtype)
    optimizer = cls(model.parameters(), **({"lr": 1e-3, "damping": 0.1} | settings))
    return model, cases.small_objective(model), optimizer


@pytest.mark.parametrize("rank", [3, 20])
@pytest.mark.parametrize("exponent", [-1.0, -1 / 2, -1 / 4, -1 / 6])
def test_powers_agree_with_dense_eigendecompositions(exponent, rank):
    torch.manual_seed(0)
    stack, damping = random_covariance(4, 6, rank), torch.tensor([1.0, 0.1, 1e-3, 0.5]).double()
    powers, raised, failed = damped_power(stack, damping, exponent)
    for matrix, shift, power in zip(stack, damping, powers, strict=True):
        values, vectors = torch.linalg.eigh(matrix + shift * torch.eye(6))
        torch.testing.assert_close(power, vectors @ torch.diag(values**exponent) @ vectors.T)
    assert not raised.any() and not failed.any()


def test_numbers_take_powers_without_a_decomposition(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    powers, _, _ = damped_power(torch.tensor([[[3.0]], [[8.0]]]), torch.tensor([1.0, 1.0]), -0.5)
    torch.testing.assert_close(powers.flatten(), torch.tensor([1 / 2, 1 / 3]))


def test_damping_below_the_arithmetic_is_raised_and_told():
    x = torch.randn(50, 1)
    power, raised, failed = damped_power((x @ x.T)[None], torch.tensor([1e-12]), -1.0)
    assert raised.all() and not failed.any() and power.isfinite().all()


def test_matrices_of_one_size_are_inverted_in_one_batch(monkeypatch):
    shapes = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda a: shapes.append(tuple(a.shape)) or cholesky(a))
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    optimizer = KFAC(model.parameters(), lr=0.1, damping=0.1)
    optimizer.step(Objective(model, Gaussian())(torch.randn(9, 5), torch.randn(9, 5)))
    assert sorted(shapes) == [(2, 5, 5), (2, 6, 6)]


def test_blocks_join_and_split():
    layer, conv = find_layers(nn.Sequential(nn.Linear(3, 2), nn.Conv2d(3, 2, 5)))
    block = homogeneous_block(layer)
    weight, bias = torch.randn(2, 3), torch.randn(2)
    joined = block.join([weight, bias])
    assert torch.equal(joined, torch.cat([weight, bias[:, None]], 1))
    assert all(torch.equal(a, b) for a, b in zip(block.split(joined), [weight, bias], strict=True))
    assert tensor_block(conv, conv.parameters[0]).join([conv.parameters[0]]).shape == (2, 3, 25)
    assert tensor_block(conv, conv.parameters[1]).join([conv.parameters[1]]).shape == (2,)
    assert homogeneous_block(conv).join(conv.parameters).shape == (2, 76)
    assert Block(conv, [conv.parameters[1]], (2,)).join([conv.parameters[1]]).shape == (2, 1)


def test_mode_grams_contract_all_other_modes():
    t = torch.randn(3, 4, 5)
    wanted = [torch.einsum("iab,jab->ij", t, t), torch.einsum("aib,ajb->ij", t, t), torch.einsum("abi,abj->ij", t, t)]
    for gram, reference in zip(mode_grams(t), wanted, strict=True):
        torch.testing.assert_close(gram, reference)


def factors(optimizer) -> list[torch.Tensor]:
    return [f for state in optimizer.state.values() for f in state.get("factors", [])]


def test_averages_start_as_a_plain_mean_and_become_a_running_average():
    _, objective, optimizer = make(MBF, lr=0.0, averaging=0.75)
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(24, 1, 8, 8, generator=generator).double(), torch.arange(24) % 3) for _ in range(7)]
    average = None
    for t, batch in enumerate(batches, 1):
        optimizer.step(objective(*batch))
        _, objective_2, alone = make(MBF, lr=0.0)
        objective_2.model.load_state_dict(objective.model.state_dict())
        alone.step(objective_2(*batch))
        weight = max(0.25, 1 / t)
        new = factors(alone)
        average = new if average is None else [a + weight * (b - a) for a, b in zip(average, new, strict=True)]
        for factor, wanted in zip(factors(optimizer), average, strict=True):
            torch.testing.assert_close(factor, wanted)


def test_start_takes_the_mean_and_leaves_the_model_alone():
    model, objective, optimizer = make(Shampoo)
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(24, 1, 8, 8).double(), torch.arange(24) % 3) for _ in range(20)]
    optimizer.start(objective(*batch) for batch in batches)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    gradients = []
    for batch in batches:
        objective(*batch)()
        gradients.append(model[6].weight.grad.clone())
    wanted = sum(g @ g.T for g in gradients) / len(gradients)
    torch.testing.assert_close(optimizer.state[model[6].weight]["factors"][0], wanted)


@pytest.mark.parametrize("early, wanted", [(True, [0, 2, 4, 5, 10]), (False, [0, 5, 10])])
def test_frequencies(monkeypatch, early, wanted):
    _, objective, optimizer = make(MBF, update_every=2, refresh_every=5, refresh_early=early)
    calls = []
    measure, refresh = optimizer._measure, optimizer._refresh
    monkeypatch.setattr(optimizer, "_measure", lambda minibatch: calls.append("measure") or measure(minibatch))
    monkeypatch.setattr(optimizer, "_refresh", lambda: calls.append("refresh") or refresh())
    steps = []
    for _ in range(12):
        calls.clear()
        optimizer.step(objective(*cases.small_batch(torch.float64)))
        steps.append(set(calls))
    assert [i for i, called in enumerate(steps) if "measure" in called] == [0, 2, 4, 6, 8, 10]
    assert [i for i, called in enumerate(steps) if "refresh" in called] == wanted


def test_momentum_is_plain_and_decay_decoupled():
    """BatchNorm takes the plain gradient under KFAC, so the recursion can be written out."""
    model, objective, optimizer = make(KFAC, lr=0.1, momentum=0.8, weight_decay=0.3)
    gamma, m = model[1].weight, 0.0
    for rate in (0.1, 0.1, 0.05):
        optimizer.param_groups[0]["lr"] = rate
        before = gamma.detach().clone()
        optimizer.step(objective(*cases.small_batch(torch.float64)))
        m = 0.8 * m + gamma.grad
        torch.testing.assert_close(gamma.detach(), before - rate * (m + 0.3 * before))


@pytest.mark.parametrize("cls", METHODS)
def test_statistics_that_are_not_finite_are_skipped_and_told(cls):
    _, objective, optimizer = make(cls, lr=0.0)
    x, y = cases.small_batch(torch.float64)
    optimizer.step(objective(x, y))
    before = [f.clone() for f in factors(optimizer)]
    optimizer.step(objective(x * float("nan"), y))
    assert all(torch.equal(a, b) for a, b in zip(before, factors(optimizer), strict=True))
    told = optimizer.diagnostics()
    assert told["4"]["skipped_statistics"] >= 1
    assert told["4"]["kept_inverses"] == 0
    assert set(told) >= {"0", "4", "6"}


def test_a_matrix_without_cholesky_factor_keeps_its_last_inverse():
    model, objective, optimizer = make(KFAC)
    optimizer.step(objective(*cases.small_batch(torch.float64)))
    state = optimizer.state[model[6].weight]
    last = state["inverses"][0].clone()
    state["factors"][0].copy_(-torch.eye(3))
    optimizer._refresh()
    assert torch.equal(state["inverses"][0], last)
    assert optimizer.diagnostics()["6"]["kept_inverses"] == 1


@pytest.mark.parametrize("cls", METHODS)
def test_state_survives_a_checkpoint_between_refreshes(cls):
    settings = {"update_every": 2, "refresh_every": 5, "dtype": torch.float32}
    model, objective, optimizer = make(cls, **settings)
    for _ in range(8):
        optimizer.step(objective(*cases.small_batch()))
    twin, twin_objective, twin_optimizer = make(cls, **settings)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin_objective.generator.set_state(objective.generator.get_state())
    for _ in range(5):
        optimizer.step(objective(*cases.small_batch()))
        twin_optimizer.step(twin_objective(*cases.small_batch()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name, value", [("lr", -1.0), ("damping", 0.0), ("momentum", 1.0), ("update_every", 0)])
def test_impossible_arguments(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        make(TNT, **{name: value})


def test_refusals_say_what_to_do():
    model, objective, optimizer = make(KFAC)
    with pytest.raises(TypeError, match="objective = Objective"):
        optimizer.step(lambda: None)
    with pytest.raises(ValueError, match=r"parameter '6.weight' is trainable"):
        KFAC(model[:6].parameters(), 0.1, 0.1).step(objective(*cases.small_batch(torch.float64)))


def test_roots_fall_back_to_double_precision(monkeypatch):
    eigh = torch.linalg.eigh

    def single_precision_fails(a):
        if a.dtype is torch.float32:
            raise torch.linalg.LinAlgError("no convergence")
        return eigh(a)

    monkeypatch.setattr(torch.linalg, "eigh", single_precision_fails)
    power, _, _ = damped_power(torch.diag(torch.tensor([3.0, 8.0]))[None], torch.tensor([1.0]), -0.5)
    torch.testing.assert_close(power[0], torch.diag(torch.tensor([1 / 2, 1 / 3])))
