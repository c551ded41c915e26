"""On a GPU: steps wait for nothing and agree with the CPU's, captured ones with launched ones; runs resume.

Skipped where there is none.
"""

import pytest
import torch
from torch import nn

from models.likelihoods import Categorical, Gaussian
from optimizers import Objective
from optimizers.cuda_graphs import CapturedSteps
from runners import trainer
from runners.config import ConfigError
from runners.record import read_summary, read_table
from tests.optimizers import cases

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

WARM = 3  # steps: libraries are loaded, layers checked
# Those of tests/optimizers/test_waiting.py, less what waits once, and Shampoo: eigenvalues are iterated for.
WAITS = ("dadaptation", "dog", "gen_adamw", "gen_sgdm", "prodigy", "shampoo", "shampoo_grafted")
DRAWS = ("adahessian", "back_matching", "kfac", "lw_adamw", "lw_sgdm", "mbf", "tnt")  # labels, signs or examples
ROUNDS = ("muon", "soap")  # computes in bfloat16; the signs of eigenvectors are a library's choice
CAPTURED = ("sgd", "sgdm", "adam", "adamw", "layer_specific", "lw_sgdm", "lw_adamw")


def problem(name, device, dtype=torch.float32, population=None):
    """A small convolutional net with an optimizer on it, and a batch."""
    model = cases.small_network(dtype).to(device)
    objective = cases.small_objective(model, population)
    objective.generator = torch.Generator(device).manual_seed(4)
    optimizer = cases.build(name, model.parameters(), **cases.FOR_SMALL_NETWORK.get(name, {}))
    x, y = cases.small_batch(dtype)
    return model, objective, optimizer, (x.to(device), y.to(device))


@pytest.fixture
def waiting_is_an_error():
    """A function that makes it one until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("population", [None, 24], ids=["minibatch", "full batch"])
@pytest.mark.parametrize("name", cases.NAMES)
def test_steps_wait_for_nothing(name, population, waiting_is_an_error):
    _, objective, optimizer, batch = problem(name, "cuda", population=population)
    for _ in range(WARM):
        optimizer.step(objective(*batch))
    waiting_is_an_error()

    def steps():
        for _ in range(30):
            optimizer.step(objective(*batch))

    if name in WAITS:
        with pytest.raises(RuntimeError, match="synchronizing"):
            steps()
    else:
        steps()


@pytest.mark.parametrize("name", [name for name in cases.NAMES if name not in DRAWS + ROUNDS])
def test_a_gpu_takes_the_steps_of_a_cpu(name):
    models = []
    for device in ("cpu", "cuda"):
        model, objective, optimizer, batch = problem(name, device, torch.float64)
        for _ in range(8):
            optimizer.step(objective(*batch))
        models.append(model)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", DRAWS + ROUNDS)
def test_others_train_on_a_gpu(name):
    _, objective, optimizer, batch = problem(name, "cuda")
    losses = torch.stack([optimizer.step(objective(*batch)) for _ in range(60)])
    assert losses.is_cuda
    assert losses[-5:].mean() < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["lw_sgdm", "lw_adamw"])
def test_steps_on_a_least_squares_problem_reach_its_optimum(name):
    objective, x, y, model = cases.least_squares()
    objective = Objective(model.cuda(), Gaussian(), torch.Generator("cuda").manual_seed(0), population=len(x))
    optimizer, x, y = cases.build(name, model.parameters()), x.cuda(), y.cuda()
    first = objective(x, y).evaluate()
    for _ in range(400):
        optimizer.step(objective(x, y))
    assert objective(x, y).evaluate() < 1e-2 * first


@pytest.mark.parametrize("name", ["sgdm", "lw_sgdm", "lw_adamw", "kfac"])
@pytest.mark.parametrize("task", ["autoencoder_curves_small", "cnn_digits", "gcn_sbm"])
def test_a_run_trains_and_is_recorded(name, task, train):
    folder = train(f"task={task}", f"optimizer={name}", "budget.steps=60", "device=cuda")
    losses = [float(row["train_loss"]) for row in read_table(folder / "metrics.csv")]
    assert losses[-1] < losses[0]
    summary = read_summary(folder)
    assert summary["peak_memory_bytes"] > 0
    assert torch.cuda.get_device_name() == summary["provenance"]["device"]


class Graph:
    """Two products with a constant sparse matrix, dropout between them; half of the rows are labelled."""

    def __init__(self, device):
        from models.gcn import GCN

        torch.manual_seed(5)
        adjacency = torch.eye(40) + torch.roll(torch.eye(40), 1, 0) + torch.roll(torch.eye(40), -1, 0)
        features = (torch.rand(40, 30) > 0.7).float()
        self.model = GCN(features=30, hidden=8, classes=3).to(device, torch.float64)
        features, adjacency = features.double(), adjacency.double()
        self.inputs = features.to(device).to_sparse_csr(), (adjacency / 3).to(device).to_sparse_csr()
        self.rows = torch.arange(0, 40, 2, device=device)
        self.targets = features[::2, :3].argmax(1).to(device)

    def batch(self, number):
        return self.inputs, self.targets, self.rows


class Images:
    """A convolutional net with BatchNorm and dropout, and another batch in every step."""

    def __init__(self, device):
        torch.manual_seed(5)
        self.model = nn.Sequential(*cases.small_network().children(), nn.Dropout(0.1), nn.Linear(3, 3))
        self.model.to(device, torch.float64)
        generator = torch.Generator().manual_seed(6)
        self.x = torch.randn(400, 1, 8, 8, generator=generator).to(device, torch.float64)
        self.y = (self.x.flatten(1)[:, :3]).argmax(1)

    def batch(self, number):
        part = torch.arange(24 * number, 24 * number + 96, device=self.x.device) % 400
        return self.x[part], self.y[part]


def training(problem, name, captured, steps=160):
    """Losses, weights and work of a training."""
    data = problem("cuda")
    generator = torch.Generator("cuda").manual_seed(4)
    population = 400 if problem is Images else 20
    objective = Objective(data.model, Categorical(), generator, population)
    optimizer = cases.build(name, data.model.parameters())
    if captured:
        take = CapturedSteps(objective, optimizer)
    else:

        def take(*batch):
            return optimizer.step(objective(*batch))

    torch.manual_seed(7)
    losses = []
    for number in range(steps):
        if number == steps - 30:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
        losses.append(take(*data.batch(number)))
    weights = torch.cat([p.detach().flatten() for p in data.model.parameters()])
    return torch.stack(losses), weights, objective.gradient_equivalents, take


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("problem", [Images, Graph])
def test_captured_steps_are_those_that_are_launched(problem, name):
    """In double precision, for over so many steps rounding grows; Adam's count on the device is in single precision."""
    losses, weights, work, _ = training(problem, name, captured=False)
    again = training(problem, name, captured=True)
    assert again[2] == pytest.approx(work)
    torch.testing.assert_close(again[0], losses, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(again[1], weights, rtol=1e-2, atol=2e-3)
    assert again[3]._captured


@pytest.mark.parametrize("name", CAPTURED)
@pytest.mark.parametrize("task", ["autoencoder_curves_small", "cnn_digits", "gcn_sbm"])
def test_a_run_of_captured_steps_has_the_same_record(name, task, train, tmp_path):
    settings = (f"task={task}", f"optimizer={name}", "budget.steps=88", "device=cuda", "task.dtype=float64")
    tables = [
        read_table(train(*settings, f"results.root={tmp_path}/{graphs}", f"cuda_graphs={graphs}") / "metrics.csv")
        for graphs in ("false", "true")
    ]
    for launched, captured in zip(*tables, strict=True):
        assert float(captured["train_loss"]) == pytest.approx(float(launched["train_loss"]), rel=1e-2, abs=1e-4)


def test_what_cannot_be_captured_is_refused_or_launched(train):
    settings = ("optimizer=kfac", "budget.steps=4", "device=cuda")
    with pytest.raises(ConfigError, match=r"KFAC's steps cannot be captured .* type cuda_graphs=false"):
        train(*settings, "cuda_graphs=true")
    assert read_summary(train(*settings, "cuda_graphs=if_possible"))["steps"] == 4


@pytest.mark.parametrize(("before", "after"), [("false", "false"), ("true", "true"), ("false", "true")])
@pytest.mark.parametrize("name", ["sgdm", "adamw", "lw_sgdm", "lw_adamw"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(name, before, after, train, monkeypatch, tmp_path):
    settings = (f"optimizer={name}", "budget.steps=40", "device=cuda")
    whole = read_table(train(*settings) / "metrics.csv")
    settings += (f"results.root={tmp_path}/elsewhere",)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_checkpoint_due", lambda self: self.step == 13)
        patch.setattr(trainer.Trainer, "_save_checkpoint", stop_after(trainer.Trainer._save_checkpoint))
        with pytest.raises(trainer.RunFailed):
            train(*settings, f"cuda_graphs={before}")
    again = read_table(train(*settings, f"cuda_graphs={after}") / "metrics.csv")
    for a, b in zip(whole, again, strict=True):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-3)


def stop_after(save):
    def stopped(self):
        save(self)
        raise RuntimeError("stopped")

    return stopped
