"""One process with a batch, or four with a quarter of it each: the same steps. Real processes, over gloo."""

import multiprocessing
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.likelihoods import Bernoulli, Categorical, Gaussian, Scaled
from optimizers import Objective
from optimizers.layerwise import Layerwise
from optimizers.parallel import DataParallel
from tests.optimizers import cases

EXAMPLES, STEPS, POPULATION = 64, 8, 100
FORK = multiprocessing.get_context("fork")
SHARING = ("sgdm", "adamw", "lw_sgdm", "lw_adamw", "gen_adamw", "prodigy", "lamb")


def network(dtype):
    """Two convolutions with BatchNorm, as the digits' task has, and a hidden layer.

    No bias before a BatchNorm: its gradient is nothing but rounding.
    """
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3),
    ).to(dtype)  # fmt: skip


def train(name, likelihood, objective_type, rank=0, ranks=1, **settings):
    """Losses and final weights, in double precision, so that rounding does not grow to anything in a few steps."""
    model = network(torch.float64)
    optimizer = cases.build(name, model.parameters(), **settings)
    generator = torch.Generator().manual_seed(5)
    objective = objective_type(model, likelihood, generator, POPULATION)
    x, y = cases.small_batch(torch.float64, EXAMPLES)
    if not isinstance(likelihood, Categorical):
        y = nn.functional.one_hot(y, 3).double()
    part = slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks)
    losses = [torch.as_tensor(optimizer.step(objective(x[part], y[part]))) for _ in range(STEPS)]
    return torch.stack(losses), model.state_dict(), objective.gradient_equivalents


def together(work, tmp_path, ranks=4):
    """What `work(rank, ranks)` returns on every rank."""

    def process(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=rank, world_size=ranks)
        try:
            torch.save(work(rank=rank, ranks=ranks), tmp_path / f"{rank}.pt")
        finally:
            dist.destroy_process_group()

    processes = [FORK.Process(target=process, args=(rank,)) for rank in range(ranks)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(120)
    assert [p.exitcode for p in processes] == [0] * ranks
    return [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]


def assert_same_steps(name, tmp_path, ranks=4, likelihood=None, **settings):
    likelihood = likelihood or Categorical()
    losses, weights, work = train(name, likelihood, Objective, **settings)
    for other in together(partial(train, name, likelihood, DataParallel, **settings), tmp_path, ranks):
        torch.testing.assert_close(other[0], losses, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(other[1], weights, rtol=1e-6, atol=1e-9)
        assert other[2] == pytest.approx(work)
    return losses


@pytest.mark.parametrize("name", SHARING)
def test_four_ranks_take_the_steps_of_one(name, tmp_path):
    losses = assert_same_steps(name, tmp_path)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["sgdm", "lw_sgdm", "lw_adamw"])
def test_two_ranks_take_the_steps_of_one(name, tmp_path):
    assert_same_steps(name, tmp_path, ranks=2)


@pytest.mark.parametrize("name", ["lw_sgdm", "lw_adamw"])
def test_ranks_measure_the_examples_that_one_would(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Layerwise, "FEWEST_EXAMPLES", 2)
    assert_same_steps(name, tmp_path, share=0.25, correct_every=2)


def test_no_rank_is_without_an_example(tmp_path, monkeypatch):
    monkeypatch.setattr(Layerwise, "FEWEST_EXAMPLES", 2)
    assert_same_steps("lw_sgdm", tmp_path, share=1 / 16, correct_every=2)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(), Scaled(Gaussian(), 3.0)])
def test_labels_of_every_likelihood_are_drawn_alike(likelihood, tmp_path):
    assert_same_steps("lw_sgdm", tmp_path, ranks=2, likelihood=likelihood)


def test_layers_with_another_number_of_rows_than_examples_are_paired_over_all_ranks(tmp_path, monkeypatch):
    def patches(dtype):
        torch.manual_seed(2)
        rows = nn.Sequential(nn.Unflatten(1, (4, 16)), nn.Flatten(0, 1), nn.Linear(16, 8), nn.ReLU())
        return nn.Sequential(nn.Flatten(), rows, nn.Unflatten(0, (-1, 4)), nn.Flatten(), nn.Linear(32, 3)).to(dtype)

    monkeypatch.setitem(globals(), "network", patches)
    assert_same_steps("lw_sgdm", tmp_path, ranks=2)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shape", [(8, 5), (8, 5, 6, 7)])
def test_the_batch_norm_of_all_ranks_is_the_one_of_the_whole_batch(momentum, shape, tmp_path):
    """Output, derivatives, and running statistics after two batches, far from zero mean."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 30

    def work(convert, rank=0, ranks=1):
        norm = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
        model = convert(nn.Sequential(norm(5, momentum=momentum).double()))
        with torch.no_grad():
            model[0].weight.copy_(torch.arange(5.0) - 2)  # a zero and negative ones among them
        part = x.chunk(ranks)[rank].clone().requires_grad_()
        model(part + 1)
        z = model(part)
        (z * part.detach().sin()).sum().backward()
        return z.detach(), part.grad, model[0].weight.grad, model[0].bias.grad, model.state_dict()

    z, derivative, *gradients, state = work(lambda model: model)
    parts = together(partial(work, lambda model: DataParallel(model, Categorical()).model), tmp_path)
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), derivative, rtol=1e-9, atol=1e-9)
    for i, gradient in enumerate(gradients, start=2):
        torch.testing.assert_close(sum(part[i] for part in parts), gradient, rtol=1e-9, atol=1e-9)
    for part in parts:
        torch.testing.assert_close(part[4], state, rtol=1e-10, atol=1e-10)


def test_a_shared_batch_norm_under_autocast_and_differentiated_twice(tmp_path):
    def work(rank, ranks):
        model = DataParallel(network(torch.float32), Categorical()).model
        x, _ = cases.small_batch(examples=16)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(x)
        (gradient,) = torch.autograd.grad(outputs.float().logsumexp(1).sum(), model[0].weight, create_graph=True)
        assert gradient.isfinite().all()
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.square().sum().backward()
        return model[1].running_mean

    first, other = together(work, tmp_path, ranks=2)
    torch.testing.assert_close(first, other, rtol=0, atol=0)


def test_ranks_stay_equal_whatever_share_of_the_batch_is_measured(tmp_path):
    def work(rank, ranks):
        model = network(torch.float32)
        optimizer = cases.build("lw_adamw", model.parameters(), share=0.1)
        objective = DataParallel(model, Categorical(), torch.Generator().manual_seed(5), POPULATION)
        x, y = cases.small_batch(examples=200)
        for _ in range(STEPS):
            optimizer.step(objective(x.chunk(ranks)[rank], y.chunk(ranks)[rank]))
        return [p.detach() for p in model.parameters()], optimizer.diagnostics()

    first, *others = together(work, tmp_path, ranks=2)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["kfac", "shampoo", "kbfgs", "back_matching", "curvature_rescaling"])
def test_methods_that_measure_more_are_refused(name, tmp_path):
    def work(rank, ranks):
        model = network(torch.float32)
        optimizer = cases.build(name, model.parameters())
        with pytest.raises(NotImplementedError, match="measures its layers on the whole batch at once"):
            optimizer.step(DataParallel(model, Categorical())(*cases.small_batch()))

    together(work, tmp_path, ranks=2)


def test_graphs_are_refused():
    with pytest.raises(NotImplementedError, match="a graph's rows depend on one another"):
        DataParallel(nn.Linear(2, 2), Categorical())(torch.ones(3, 2), torch.zeros(1), torch.tensor([0]))
