"""What a run is made of, from a resolved config: data, batches, model, objective, optimizer."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from data.batches import Batches, Dataset
from models.precision import LowPrecision
from optimizers import Objective
from runners.config import ConfigError, stream_seed
from runners.divergence import refuse_not_finite
from runners.evaluation import set_mode
from runners.memory import PeakMemory, keep_freed_memory, traced_peak
from runners.provenance import code

HOLDOUT = 0.1  # of the training set, in tuning


class Assembly:
    """One model, one optimizer and the batches of one task, at their start.

    Args:
        cfg: resolved config.
    """

    objective_type = Objective
    share = (0, 1)  # of each batch: rank and ranks

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        code()  # asked for now: a checkout may move on while a run lasts
        self.device = torch.device(cfg.device)
        torch.set_num_threads(cfg.threads)
        keep_freed_memory()
        self.dataset = self._load_data()
        self.memory = PeakMemory(self.device)
        self.likelihood = instantiate(cfg.task.likelihood)
        self.generators = self._generators()
        self.batches = self._make_batches(self.generators)
        self.model, self.objective, self.optimizer = self._build(self.generators)
        self.take_step = self._steps()

    def _rehearse(self) -> None:
        """Two steps of a throw-away copy: libraries warm up outside the clock, and on the CPU memory is traced."""

        def rehearse():
            generators = self._generators()
            model, objective, optimizer = self._build(generators)
            with contextlib.suppress(Exception):  # what fails here fails again in the run, and is told there
                for batch in islice(self._make_batches(generators), 2):
                    optimizer.step(objective(*batch))
            return model, optimizer

        on_cpu = self.device.type == "cpu"
        with torch.random.fork_rng(devices=[] if on_cpu else [self.device]):
            if on_cpu:
                self.memory.bytes = traced_peak(rehearse)
            else:
                rehearse()

    def _load_data(self) -> Dataset:
        cfg, size = self.cfg, self.cfg.task.batch_size
        dataset = instantiate(cfg.task.data, root=Path(cfg.data.root), cache=Path(cfg.data.cache))
        if cfg.holdout:
            dataset = dataset.holdout(HOLDOUT, torch.Generator().manual_seed(stream_seed(cfg.seed, "holdout")))
        if size != "full" and size > len(dataset.train):
            raise ConfigError(
                f"task.batch_size is {size} but there are {len(dataset.train)} training examples; "
                "type task.batch_size=N with at most that, or task.batch_size=full"
            )
        return dataset.to(self.device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Of data and parameters; in bfloat16 nothing is kept (`LowPrecision`)."""
        return torch.float64 if self.cfg.task.dtype == "float64" else torch.float32

    def _generators(self) -> dict[str, torch.Generator]:
        devices = {"order": "cpu", "augmentation": self.dataset.train.device, "labels": self.device}
        seed = self.cfg.seed
        return {name: torch.Generator(at).manual_seed(stream_seed(seed, name)) for name, at in devices.items()}

    def _make_batches(self, generators: dict[str, torch.Generator]) -> Batches:
        task = self.cfg.task
        return Batches(
            self.dataset.train,
            None if task.batch_size == "full" else task.batch_size,
            shuffle=True,
            drop_last=task.drop_last,
            augment=self.dataset.augment,
            generator=generators["order"],
            augment_generator=generators["augmentation"],
            share=self.share,
        )

    def _build(self, generators: dict[str, torch.Generator]):
        """Model, objective and optimizer at their start."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.cfg.seed, "init"))
            model = instantiate(self.cfg.task.model)
        # on a CPU convolutions make steps up to 1.3 times as fast so, tangents included
        model = model.to(self.device, self._dtype, memory_format=torch.channels_last)
        penalty = self._penalty(model)
        model = self._watch(LowPrecision(model) if self.cfg.task.dtype == "bfloat16" else model)
        objective = self.objective_type(model, self.likelihood, generators["labels"], len(self.dataset.train), penalty)
        settings = {key: value for key, value in self.cfg.optimizer.items() if key not in ("about", "search")}
        with contextlib.redirect_stdout(io.StringIO()):  # some packages greet; the last line out is the run's folder
            try:
                optimizer = instantiate(settings, model.parameters(), _convert_="all")
            except TypeError as refusal:
                name = self.cfg.optimizer.about.name
                raise ConfigError(f"{name} cannot be made of {settings} ({refusal})") from refusal
        set_mode("train", model, optimizer)
        return model, objective, optimizer

    def _steps(self) -> Callable[..., Tensor]:
        """What takes a step on a batch's parts, and returns the loss."""
        objective, optimizer = self.objective, self.optimizer  # not `self`, which would hold itself

        def launched(*batch):
            return optimizer.step(objective(*batch))

        if not self.cfg.cuda_graphs:
            return launched
        from optimizers.cuda_graphs import CapturedSteps

        try:
            return CapturedSteps(objective, optimizer)
        except TypeError as refusal:
            if self.cfg.cuda_graphs == "if_possible":
                return launched
            raise ConfigError(f"{refusal}; type cuda_graphs=false, or cuda_graphs=if_possible") from refusal

    def _watch(self, model: torch.nn.Module) -> torch.nn.Module:
        """Have the model end a step that is not finite; on a GPU, looking would be waiting."""
        if self.device.type == "cpu":
            model.register_forward_hook(refuse_not_finite)
        return model

    def _penalty(self, model: torch.nn.Module) -> dict[torch.nn.Parameter, float]:
        """The task's L2 penalty, on the parameters that the model names for it, or on all."""
        weight = self.cfg.task.penalty
        parameters = getattr(model, "penalised_parameters", model.parameters)
        return {p: weight for p in parameters()} if weight else {}
