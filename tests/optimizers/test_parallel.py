"""One process with a batch, or four with a quarter of it each: the same steps. Real processes, over gloo."""

import multiprocessing
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.likelihoods import Bernoulli, Categorical, Gaussian, Scaled
from optimizers import Objective
from optimizers.curvature import SampledFisher
from optimizers.parallel import DataParallel
from tests.optimizers import cases

RANKS, EXAMPLES, STEPS, POPULATION = 4, 24, 12, 100
FORK = multiprocessing.get_context("fork")
SHARING = ("sgdm", "adamw", "lw_sgdm", "lw_adamw", "prodigy", "lamb")


def network(dtype):
    """A convolutional network without BatchNorm, which would see other batches."""
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 3)
    ).to(dtype)


def train(name, likelihood, objective_type, rank=0, ranks=1):
    """Losses and final weights, in double precision, so that rounding does not grow to anything in a few steps."""
    model = network(torch.float64)
    extra = {"curvature": SampledFisher(share=1.0), "noise_every": 2} if name.startswith("lw_") else {}
    optimizer = cases.build(name, model.parameters(), **extra)
    generator = torch.Generator().manual_seed(5)
    objective = objective_type(model, likelihood, generator, POPULATION)
    x, y = cases.small_batch(torch.float64, EXAMPLES)
    if not isinstance(likelihood, Categorical):
        y = nn.functional.one_hot(y, 3).double()
    part = slice(rank * EXAMPLES // ranks, (rank + 1) * EXAMPLES // ranks)
    losses = [torch.as_tensor(optimizer.step(objective(x[part], y[part]))) for _ in range(STEPS)]
    return torch.stack(losses), [p.detach().clone() for p in model.parameters()]


def together(work, tmp_path, ranks=RANKS):
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


@pytest.mark.parametrize("name", SHARING)
def test_four_ranks_take_the_steps_of_one(name, tmp_path):
    losses, weights = train(name, Categorical(), Objective)
    for other_losses, other_weights in together(partial(train, name, Categorical(), DataParallel), tmp_path):
        torch.testing.assert_close(other_losses, losses, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(other_weights, weights, rtol=1e-6, atol=1e-9)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("likelihood", [Bernoulli(), Gaussian(), Scaled(Gaussian(), 3.0)])
def test_labels_of_every_likelihood_are_drawn_alike(likelihood, tmp_path):
    losses, _ = train("lw_sgdm", likelihood, Objective)
    for other_losses, _ in together(partial(train, "lw_sgdm", likelihood, DataParallel), tmp_path, ranks=2):
        torch.testing.assert_close(other_losses, losses, rtol=1e-8, atol=1e-10)


def test_ranks_stay_equal_whatever_share_of_the_batch_is_paired(tmp_path):
    def work(rank, ranks):
        model = network(torch.float32)
        optimizer = cases.build("lw_adamw", model.parameters(), curvature=SampledFisher(share=0.1))
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
        with pytest.raises(NotImplementedError, match="measures its layers on one process alone"):
            optimizer.step(DataParallel(model, Categorical())(*cases.small_batch()))

    together(work, tmp_path, ranks=2)


def test_graphs_are_refused():
    with pytest.raises(NotImplementedError, match="a graph's rows depend on one another"):
        DataParallel(nn.Linear(2, 2), Categorical())(torch.ones(3, 2), torch.zeros(1), torch.tensor([0]))
