"""One run: an optimizer on a task, from a resolved config to a record."""

from __future__ import annotations

import contextlib
import math
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

from data.batches import Batch, Split
from data.files import replace_file
from runners import checkpoint, record
from runners.assembly import Assembly
from runners.claim import claim
from runners.clock import Clock
from runners.config import ConfigError, check_callables, check_writable, run_folder, stream_seed
from runners.divergence import NotFinite, first_layer
from runners.evaluation import measure, set_mode
from runners.provenance import anonymous, provenance
from runners.signals import Interrupted, StopSignals, end_with_parent

CHECKPOINT_EVERY = 30.0  # seconds: the most work that a kill costs ...
CHECKPOINT_SHARE = 0.02  # ... unless checkpoints are so slow that they would take more than this share of the time
UNRECORDED = ("data", "results", "tracker", "progress", "dry_run", "tuning")  # config of the place, not of the run


class RunFailed(RuntimeError):
    """A run ended by an error that is no divergence; its record says `failed`."""


def run(cfg: DictConfig) -> Path:
    """Make the run of a resolved config, unless its record is there; go on from its checkpoint, if there is one.

    Returns:
        The record's folder.

    Raises:
        ConfigError, data.checksums.DataError: refused before training.
        Interrupted: stopped by a signal; a checkpoint is left.
        RunFailed: an error in training; recorded.
    """
    end_with_parent()
    folder = run_folder(cfg)
    shared = cfg.get("ranks")  # by the processes that torchrun has started, which find out together
    if record.is_done(folder) and not shared:
        checkpoint.finish(folder)  # if it was killed between its last two files
        return folder
    check_callables(cfg)
    check_writable(Path(cfg.results.root))
    if shared:
        from runners.parallel import run_together

        run_together(cfg, folder)
    else:
        with claim(folder), StopSignals() as signals:
            if not record.is_done(folder):  # by another process, meanwhile
                Trainer(cfg, folder).run(signals)
    return folder


class Trainer(Assembly):
    """Trains one model with one optimizer and records it.

    Args:
        cfg: resolved config.
        folder: where the record goes.
    """

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        super().__init__(cfg)
        self.folder = folder
        self.scheduler = instantiate(cfg.schedule, self.optimizer) if cfg.schedule._target_ else None
        self.clock = Clock(self.device)
        self.bar: tqdm | None = None
        self.step = 0
        self.losses: list[Tensor] = []  # of the steps since the last evaluation, on the device
        self.rows: list[dict] = []
        self.layers: list[list] = []
        self.diverged_at: int | None = None
        self.diverged_in: str | None = None
        self.began = time.monotonic()
        self.next_checkpoint = self.began + CHECKPOINT_EVERY
        epoch, budget = len(self.batches), cfg.budget
        self.evaluate_every = epoch * cfg.task.evaluate_every
        self.last_step = epoch * budget.epochs if budget.epochs else budget.steps or math.inf
        self.last_second = budget.seconds or math.inf

    # The course of a run ----------------------------------------------------------------------------------------------

    def run(self, signals: StopSignals) -> None:
        """Train until the budget is spent, the run diverges or a signal comes, and write the record."""
        state = checkpoint.load(self.folder, self.device)
        if state is not None and state["run"] != self.folder.name:
            raise ConfigError(
                f"the checkpoints in {self.folder} are of another config (run {state['run']}); "
                "remove them, or put them back where they belong"
            )
        (self.folder / "error.txt").unlink(missing_ok=True)
        replace_file(self.folder / "config.yaml", self._save_config)
        status, message = "interrupted", None
        try:
            with self._progress() as self.bar:
                self._start(state)
                while not (self._spent() or signals.received or self.diverged_at):
                    self._train(signals)
                    if self.step % self.evaluate_every == 0 or self._spent() or self.diverged_at:
                        self._evaluate()
                    if self._checkpoint_due() and not (self._spent() or self.diverged_at):
                        self._save_checkpoint()
                if self.diverged_at:
                    status = "diverged"
                elif self._spent():
                    status = "finished"
                else:
                    self._save_checkpoint()
        except Exception as error:
            status, message = "failed", anonymous(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            details = anonymous(traceback.format_exc())
            with contextlib.suppress(OSError):  # a full disk, most likely: the error itself says so
                replace_file(self.folder / "error.txt", lambda file: file.write_text(details))
            raise RunFailed(f"{message} (details: {self.folder / 'error.txt'})") from error
        finally:
            self._write(status, message)
        if status == "interrupted":
            signals.requeue()
            raise Interrupted(signals.received, self.folder)

    def _start(self, state: dict | None) -> None:
        """Go on from a checkpoint, or begin: measure memory and evaluate before the first step."""
        if state is not None:
            self._restore(state)
            return
        self._rehearse()
        torch.manual_seed(stream_seed(self.cfg.seed, "dropout"))
        if hasattr(self.optimizer, "start"):
            self._first_pass()
        self._open_epoch()
        self._evaluate()

    def _first_pass(self) -> None:
        """Statistics of the whole training set that a method wants before its first step: training time like any."""
        self.clock.start()
        try:
            self.optimizer.start(self.objective(*batch) for batch in self.batches)
        finally:
            self.clock.stop()

    def _train(self, signals: StopSignals) -> None:
        """Steps up to the next evaluation or checkpoint, the end of the budget, or a signal.

        Nothing here waits for the device.
        """
        self.memory.start()
        self.clock.start()
        try:
            while True:
                batch = None  # without one, an error is the data's
                batch = self._next_batch()
                self.losses.append(self.take_step(*batch))
                self.step += 1
                if self.scheduler is not None and self.step % len(self.batches) == 0:
                    self.scheduler.step()
                self.bar.update()
                if self.step % self.evaluate_every == 0 or self._spent() or self._checkpoint_due() or signals.received:
                    break
        except (ArithmeticError, RuntimeError, ValueError):
            # Methods that factorise or sample what is no longer finite raise in many ways: divergence, not failure.
            if batch is None:
                raise
            self.diverged_in = first_layer(self.model, self.optimizer, batch.inputs)
            if self._first_bad_loss() is None and self.diverged_in is None and self._loss_is_finite(batch):
                raise
            self.diverged_at = self._first_bad_loss() or self.step + 1
        finally:
            self.clock.stop()
            self.memory.stop()

    def _checkpoint_due(self) -> bool:
        return time.monotonic() >= self.next_checkpoint

    def _spent(self) -> bool:
        return self.step >= self.last_step or self.clock.read() >= self.last_second

    # Batches ----------------------------------------------------------------------------------------------------------

    def _open_epoch(self, skip: int = 0) -> None:
        """Begin an epoch of batches, of which `skip` are behind us."""
        self.epoch_start = self._order_state()
        self.epoch: Iterator[Batch] = self.batches.epoch(skip)

    def _next_batch(self) -> Batch:
        batch = next(self.epoch, None)
        if batch is None:
            self._open_epoch()
            batch = next(self.epoch)
        return batch

    def _order_state(self) -> dict[str, Tensor]:
        return {name: self.generators[name].get_state() for name in ("order", "augmentation")}

    # Evaluation -------------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """A row of metrics and of layers. Finds out about divergence."""
        self.diverged_at = self.diverged_at or self._first_bad_loss()
        self.losses.clear()
        row = {} if self.diverged_at else self._row()
        if not all(math.isfinite(value) for value in row.values() if value is not None):
            self.diverged_at = max(self.step, 1)
        if self.diverged_at:
            self.diverged_in = self.diverged_in or first_layer(self.model, self.optimizer)
            return
        self.rows.append(row)
        if hasattr(self.optimizer, "diagnostics"):
            for layer, quantities in self.optimizer.diagnostics().items():
                for quantity, value in quantities.items():
                    self.layers.append([self.step, row["epoch"], layer, quantity, float(value)])
        self.bar.set_postfix_str(f"train_loss {row['train_loss']:.4g}", refresh=False)

    def _row(self) -> dict:
        row = {
            "step": self.step,
            "epoch": self.step / len(self.batches),
            "train_seconds": self.clock.seconds,
            "gradient_equivalents": self.objective.gradient_equivalents,
        }
        splits = {"train": self.dataset.measured, "val": self.dataset.validation, "test": self.dataset.test}
        set_mode("eval", self.model, self.optimizer)
        measured = {name: self._measure(split) if split else (None, None) for name, split in splits.items()}
        set_mode("train", self.model, self.optimizer)
        row |= {f"{name}_loss": loss for name, (loss, _) in measured.items()}
        row |= {f"{name}_{self.likelihood.metric_name}": measured[name][1] for name in ("val", "test")}
        return row

    def _measure(self, split: Split) -> list[float]:
        """Mean loss and mean metric."""
        return measure(self.model, self.likelihood, split, self.batches.batch_size)

    def _loss_is_finite(self, batch: Batch) -> bool:
        with contextlib.suppress(NotFinite):
            return bool(self.objective(*batch).evaluate().isfinite())
        return False

    def _first_bad_loss(self) -> int | None:
        """The first step since the last evaluation whose loss is not finite."""
        if not self.losses:
            return None
        finite = torch.stack(self.losses).isfinite().tolist()
        return None if all(finite) else self.step - len(finite) + finite.index(False) + 1

    # Checkpoint and record --------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        began = time.monotonic()
        between_epochs = self.step % len(self.batches) == 0
        checkpoint.save(
            self.folder,
            {
                "run": self.folder.name,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "epoch_start": self._order_state() if between_epochs else self.epoch_start,
                "labels": self.generators["labels"].get_state(),
                "random": checkpoint.random_state(self.device),
                "step": self.step,
                "seconds": self.clock.seconds,
                "waited": self.clock.waited,
                "wall_seconds": time.monotonic() - self.began,
                "gradient_equivalents": self.objective.gradient_equivalents,
                "losses": [float(loss) for loss in self.losses],
                "rows": self.rows,
                "layers": self.layers,
                "memory": self.memory.bytes,
            },
        )
        self._write_metrics()
        self._write_layers()
        now = time.monotonic()
        self.next_checkpoint = now + max(CHECKPOINT_EVERY, (now - began) / CHECKPOINT_SHARE)

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.take_step = self._steps()
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        self.step, self.rows, self.layers = state["step"], state["rows"], state["layers"]
        self.clock.seconds, self.clock.waited = state["seconds"], state["waited"]
        self.objective.gradient_equivalents = state["gradient_equivalents"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in state["losses"]]
        self.began -= state["wall_seconds"]
        self.memory.bytes = state["memory"]
        for name, generator_state in state["epoch_start"].items():
            self.generators[name].set_state(generator_state.cpu())
        self._open_epoch(skip=self.step % len(self.batches))
        self.generators["labels"].set_state(state["labels"].cpu())
        checkpoint.restore_random_state(state["random"], self.device)
        self.bar.update(self.step)
        print(f"going on from step {self.step}", file=sys.stderr)

    def _write(self, status: str, message: str | None) -> None:
        """The record of a run that has ended, whichever way; the summary makes it final."""
        done = status in record.DONE
        if done and not self.cfg.holdout:
            set_mode("eval", self.model, self.optimizer)
            checkpoint.save_weights(self.folder, self.model.state_dict())
        self._write_metrics()
        self._write_layers()
        record.write_json(self.folder / "summary.json", self._summary(status, message))
        if done:
            checkpoint.finish(self.folder)

    def _write_metrics(self) -> None:
        columns = record.columns(self.likelihood.metric_name)
        record.write_table(self.folder / "metrics.csv", columns, ([row[name] for name in columns] for row in self.rows))

    def _write_layers(self) -> None:
        if self.layers:
            record.write_table(self.folder / "layers.csv", record.LAYER_COLUMNS, self.layers)

    def _summary(self, status: str, message: str | None) -> dict:
        cfg, about = self.cfg, self.cfg.optimizer.about
        final, best = record.final_and_best(self.rows, self.likelihood.metric_name, self.likelihood.metric_mode)
        return {
            "record_version": record.RECORD_VERSION,
            "status": status,
            "message": message,
            "task": cfg.task.name,
            "family": cfg.task.family,
            "optimizer": about.name,
            "label": about.label,
            "kind": about.kind,
            "seed": cfg.seed,
            "holdout": cfg.holdout,
            "surrogate": self.dataset.surrogate,
            "final": final,
            "best": best,
            "steps": self.step,
            "epochs": self.step / len(self.batches),
            "train_seconds": self.clock.seconds,
            "wall_seconds": time.monotonic() - self.began,
            "seconds_per_step": self.clock.seconds / self.step if self.step else None,
            "gradient_equivalents": self.objective.gradient_equivalents,
            "peak_memory_bytes": self.memory.bytes,
            "contended": bool(cfg.launcher.contended) or self.clock.contended,
            "diverged_at": self.diverged_at,
            "diverged_in": self.diverged_in,
            "tuning": OmegaConf.to_container(cfg.tuning) if cfg.tuning else None,
            "provenance": provenance(self.device, cfg.threads),
        }

    def _save_config(self, file: Path) -> None:
        OmegaConf.save({key: value for key, value in self.cfg.items() if key not in UNRECORDED}, file)

    def _progress(self) -> tqdm:
        bar = tqdm(
            unit="step", leave=False, mininterval=0.1 if sys.stderr.isatty() else 10, disable=not self.cfg.progress
        )
        bar.total = self.last_step if math.isfinite(self.last_step) else None
        bar.set_description_str(f"{self.cfg.task.name} {self.cfg.optimizer.about.name} seed {self.cfg.seed}")
        return bar
