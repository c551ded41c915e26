r"""Two experiments on the layer-wise rule itself, as tables under `<root>/study/`: they take seconds and no data set.

**Linear convergence** of the idealised method: full batches, exact block curvature, no momentum, averages or bounds.
The paper's theorem is not to be had; what follows is derived here. Let `f` be quadratic, `μ` the least eigenvalue of
its Hessian `H`, and `Λ = max_l λ_max(H_ll)` over its `L` layers. The method steps along `u = Σ_l α_l g_l`, `α_l = ρ_l /
q_l`, `ρ_l = ‖g_l‖²`, `q_l = g_lᵀ H_ll g_l`, by the factor `c = gᵀu / uᵀHu` (with `η = 1`, for the model is the loss).
With `S = gᵀu = Σ_l ρ_l² / q_l`:

* `uᵀHu ≤ L Σ_l α_l² q_l = L S`, so the step lowers `f` by `S² / (2 uᵀHu) ≥ S / 2L`;
* `S ≥ ‖g‖² / Λ`, because `q_l ≤ Λ ρ_l`, and `‖g‖² ≥ 2 μ (f − f*)`;

hence `f(θ⁺) − f* ≤ (1 − μ / (L Λ)) (f(θ) − f*)`. Beside least squares, where that is exact, there is logistic
regression with a penalty, where it holds in the limit, with `μ` and `Λ` of the optimum (there `η`, never below 1
without noise, tends to 1).

**Curvature estimators** on the embedded tasks, after some training: every estimate of `q_l` along the gradient against
the exact block of the same matrix on the same batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hydra
import pandas as pd
import torch
from torch import Tensor, nn

from data.files import replace_file
from models.likelihoods import Categorical, Gaussian
from optimizers import LWSGDm, Objective, curvature
from optimizers.objective import Minibatch
from optimizers.replay import RandomState, frozen_statistics
from optimizers.trace import Trace
from runners.assembly import Assembly
from runners.config import resolve

LAYERS, EXAMPLES, CLASSES, PENALTY, NEWTON = 3, 200, 3, 0.01, 8
ESTIMATORS = {
    "sampled Fisher": (curvature.SampledFisher, curvature.ExactGaussNewton, 1),
    "sampled Fisher, a quarter of the batch": (curvature.SampledFisher, curvature.ExactGaussNewton, 4),
    "random signs, Gauss–Newton": (curvature.RandomSignGaussNewton, curvature.ExactGaussNewton, 1),
    "random signs, Hessian": (curvature.RandomSignHessian, curvature.ExactHessian, 1),
}
TASKS = ("autoencoder_curves_small", "cnn_digits", "gcn_sbm")


def make_study(folder: Path, names: list[str]) -> None:
    """Make those tables of `names` that there are here, unless they are in `folder`, made by this code."""
    code = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("optimizers/*.py", "models/*.py", "data/*.py", "runners/*.py", "configs/**/*.yaml"):
        for path in sorted(root.glob(package)):
            code.update(path.read_bytes())
    for name in names:
        table, seal = folder / f"{name}.csv", folder / f".{name}-made-from"
        if name not in TABLES or (table.exists() and seal.exists() and seal.read_text() == code.hexdigest()):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows = pd.DataFrame(TABLES[name]())
        replace_file(table, partial(rows.to_csv, index=False))
        replace_file(seal, lambda file: file.write_text(code.hexdigest()))


# Linear convergence ---------------------------------------------------------------------------------------------------


class Blocks(nn.Module):
    """`z = Σ_l W_l x_l`, a linear model in layers: convex, its layers coupled by the correlation of their inputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, CLASSES, bias=False, dtype=torch.float64) for _ in range(LAYERS))

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def linear_convergence(widths: tuple = (2, 8), seeds: int = 3, steps: int = 100) -> Iterator[dict]:
    """Rows `task, width, estimator, seed, step, gap, rate_derived`."""
    for task, likelihood, penalty in (
        ("least squares", Gaussian(), 0),
        ("logistic regression", Categorical(), PENALTY),
    ):
        for width in widths:
            for seed in range(seeds):
                losses, best, rate = _descend(likelihood, penalty, width, seed, steps)
                run = {"task": task, "width": width, "estimator": "exact", "seed": seed}
                for step, loss in enumerate(losses):
                    if loss - best > 1e-10 * (losses[0] - best):  # below is rounding
                        yield run | {"step": step, "gap": loss - best, "rate_derived": rate}


def _descend(likelihood, penalty: float, width: int, seed: int, steps: int) -> tuple[list[float], float, float]:
    """Losses of the idealised method from the start, the least loss, and the derived factor per step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, size = Blocks(width), LAYERS * width
        mix = torch.eye(size, dtype=torch.float64) + 0.5 * torch.randn(size, size, dtype=torch.float64) / size**0.5
        x = torch.randn(EXAMPLES, size, dtype=torch.float64) @ mix
        scores = x @ torch.randn(size, CLASSES, dtype=torch.float64) + torch.randn(EXAMPLES, CLASSES)
    targets = scores if isinstance(likelihood, Gaussian) else scores.argmax(1)
    weights = list(model.parameters())
    minibatch = Objective(model, likelihood, None, EXAMPLES, dict.fromkeys(weights, penalty))(
        x.split(width, 1), targets
    )
    optimizer = LWSGDm(
        weights, momentum=0.0, sigma=1.0, averaging=0.0, floor=1.0, trust=1e30, joint_trust=None, warmup=1,
        growth=1e30, brake=None, stretch=1e30, correct_every=1, share=1.0,
        curvature=curvature.ExactGaussNewton(),
    )  # fmt: skip
    losses = [float(optimizer.step(minibatch)) for _ in range(steps)]
    hessian = partial(_hessian, minibatch, weights)
    for _ in range(NEWTON):  # from where the descent stopped
        minibatch()
        move = torch.linalg.solve(hessian(), torch.cat([w.grad.flatten() for w in weights]))
        for w, part in zip(weights, move.split([w.numel() for w in weights]), strict=True):
            w.data -= part.view_as(w)
    h = hessian()
    blocks = [h[i : i + CLASSES * width, i : i + CLASSES * width] for i in range(0, len(h), CLASSES * width)]
    largest = max(torch.linalg.eigvalsh(block)[-1] for block in blocks)
    return losses, float(minibatch()), float(1 - torch.linalg.eigvalsh(h)[0] / (LAYERS * largest))


def _hessian(minibatch, weights: list[Tensor]) -> Tensor:
    loss = minibatch.loss(minibatch.objective.model(*minibatch.inputs))
    flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])
    rows = torch.autograd.grad(flat, weights, torch.eye(len(flat), dtype=flat.dtype), is_grads_batched=True)
    return torch.cat([row.flatten(1) for row in rows], dim=1)


# Estimators -----------------------------------------------------------------------------------------------------------


def estimators(steps: int = 60, draws: int = 100) -> Iterator[dict]:
    """Rows `model, layer, estimator, draws, relative_bias, standard_error`; the last two by the exact `q_l`."""
    for task in TASKS:
        assembly = _trained(task, steps)
        minibatch = assembly.objective(*next(iter(assembly.batches)))
        trace = _Replay(minibatch)
        minibatch.fill_gradients(trace())
        directions = {layer: [p.grad for p in layer.parameters] for layer in assembly.objective.layers}
        for name, (estimator, oracle, stride) in ESTIMATORS.items():
            exact = oracle()(minibatch, trace(), directions).diagonal()
            whole = stride == 1 or minibatch.mixing
            samples = (minibatch if whole else minibatch.thinned(stride) for _ in range(draws))
            found = torch.stack([estimator()(sample, trace(sample), directions).diagonal() for sample in samples])
            bias, error = found.mean(0) / exact - 1, found.std(0) / exact.abs() / draws**0.5
            for i, layer in enumerate(directions):
                row = {"model": task, "layer": layer.name, "estimator": name, "draws": draws}
                yield row | {"relative_bias": float(bias[i]), "standard_error": float(error[i])}


class _Replay:
    """The same forward pass each time that it is called: the same dropout masks, BatchNorm's statistics unmoved."""

    def __init__(self, minibatch: Minibatch) -> None:
        self.minibatch, self.state = minibatch, RandomState(torch.device("cpu"))

    def __call__(self, sample: Minibatch | None = None) -> Trace:
        with self.state.replayed(), frozen_statistics(self.minibatch.objective.model):
            return (sample or self.minibatch).trace()


def _trained(task: str, steps: int) -> Assembly:
    """A task's model after some steps of LW-SGDm."""
    choices = [f"task={task}", "optimizer=lw_sgdm", "device=cpu", "threads=1", "tracker=none"]
    assembly = Assembly(resolve(hydra.compose("config", [*choices, f"budget.steps={steps}"])))
    batches = iter(())
    for _ in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(assembly.batches)
            batch = next(batches)
        assembly.optimizer.step(assembly.objective(*batch))
    return assembly


TABLES = {"linear_convergence": linear_convergence, "estimators": estimators}
