"""The one table of optimizers for the shared tests: every file in `configs/optimizer`, built as a run builds it."""

from __future__ import annotations

from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from models.likelihoods import Categorical, Gaussian
from optimizers import Objective

CONFIGS = Path(__file__).parents[2] / "configs" / "optimizer"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))

# The layer-wise methods without the bounds on their steps, but for trust.
UNBOUNDED = {"warmup": 1, "growth": 1e9, "brake": None, "stretch": 1e9, "joint_trust": None}

# Settings that suit the two small problems here, where a method's published default is for larger ones.
FOR_UNIT_CURVATURE = {
    "sgd": {"lr": 0.3},
    "sgdm": {"lr": 0.1},
    "adam": {"lr": 0.05},
    "adamw": {"lr": 0.05},
    "back_matching": {"lr": 0.02},
    "mbf": {"lr": 0.01},
    "schedulefree": {"lr": 0.05},
    "shampoo": {"lr": 0.01},
    "shampoo_grafted": {"lr": 0.05},
    "soap": {"lr": 0.05},
}
FOR_SMALL_NETWORK = {"kbfgs": {"lr": 0.03}, "kbfgs_l": {"lr": 0.03}}


def config(name: str, **overrides) -> dict:
    """The constructor's arguments as the config file gives them, for a task without weight decay."""
    task = {"weight_decay": 0.0, "family": "autoencoder"}
    root = OmegaConf.create({"task": task, "optimizer": OmegaConf.load(CONFIGS / f"{name}.yaml")})
    settings = OmegaConf.to_container(root, resolve=True)["optimizer"]
    return {k: v for k, v in settings.items() if k not in ("about", "search")} | overrides


def build(name: str, params, **overrides) -> torch.optim.Optimizer:
    optimizer = instantiate(config(name, **overrides), params, _convert_="all")
    getattr(optimizer, "train", lambda: None)()  # schedule-free methods keep two sets of weights
    return optimizer


def least_squares(dtype=torch.float64, examples: int = 64) -> tuple[Objective, torch.Tensor, torch.Tensor, nn.Linear]:
    """A linear model with whitened inputs: Hessian the identity, optimum known and of zero loss."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linalg.qr(torch.randn(examples, 6, generator=generator, dtype=dtype))[0] * examples**0.5
    x = x[:, :5]
    optimum = torch.randn(3, 5, generator=generator, dtype=dtype)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Linear(5, 3, bias=False, dtype=dtype)
    return Objective(model, Gaussian(), generator, population=examples), x, x @ optimum.T, model


def small_network(dtype=torch.float32) -> nn.Module:
    """Convolution, BatchNorm, ReLU, linear: what most methods meet."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.ReLU(),
            nn.Linear(16, 3),
        ).to(dtype)


def small_batch(dtype=torch.float32, examples: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(examples, 1, 8, 8, generator=generator, dtype=dtype)
    return x, (x.flatten(1)[:, :3]).argmax(1)


def small_objective(model: nn.Module, population: int | None = None) -> Objective:
    return Objective(model, Categorical(), torch.Generator().manual_seed(4), population)
