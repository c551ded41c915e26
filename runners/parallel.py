"""One run on many processes, each with an equal part of every batch: `torchrun --nproc_per_node=N -m runners.train …`.

All ranks build the same model, load their part of the same batches, step together (`optimizers.parallel`), evaluate a
share of the examples each, and decide together when to evaluate, checkpoint and stop. Rank 0 owns the run and writes
its record; the others write theirs, which are the same, to a folder that goes. `ranks` is part of a run's identity:
results agree to rounding, not to the bit.

Dropout draws its masks on each rank, after an interruption from rank 0's state: there a resumed run is another draw.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from data.batches import Split
from optimizers.parallel import DataParallel
from runners import record
from runners.claim import claim
from runners.config import ConfigError
from runners.signals import StopSignals
from runners.trainer import Trainer

PATIENCE = timedelta(days=1)  # of ranks that wait while rank 0 waits for the run's owner


def run_together(cfg: DictConfig, folder: Path) -> None:
    """This rank's part in making a run; see `runners.trainer.run`."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if cfg.device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        with _own_folder(folder) as mine, StopSignals() as signals:
            if not _agreed(record.is_done(folder)):
                SharedTrainer(cfg, mine).run(SharedSignals(signals))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _own_folder(folder: Path) -> Iterator[Path]:
    """The run's folder on rank 0; on others one of the same name, with the run's checkpoints in it."""
    if dist.get_rank() == 0:
        with claim(folder):
            dist.barrier()
            yield folder
        return
    with tempfile.TemporaryDirectory() as place:
        mine = Path(place) / folder.name
        mine.mkdir()
        dist.barrier()  # until rank 0 is the run's owner
        for path in folder.glob("checkpoint-*"):
            shutil.copy(path, mine)
        yield mine


def _agreed(flag: bool) -> bool:
    """Whether any rank says so; all ranks ask at the same time."""
    votes = torch.tensor(int(flag))
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return bool(votes)


class SharedSignals:
    """A signal to any rank is one to all."""

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    @property
    def received(self) -> int | None:
        votes = torch.tensor(self.signals.received or 0)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return int(votes) or None

    def requeue(self) -> None:
        if dist.get_rank() == 0:
            self.signals.requeue()


class SharedTrainer(Trainer):
    """A trainer on one of several ranks.

    Raises:
        ConfigError: an epoch's last batch that ranks cannot have equal parts of.
    """

    objective_type = DataParallel

    def __init__(self, cfg: DictConfig, folder: Path) -> None:
        self.share = dist.get_rank(), dist.get_world_size()
        super().__init__(cfg, folder)
        rest = 0 if cfg.task.drop_last else len(self.dataset.train) % cfg.task.batch_size
        if rest % cfg.ranks:
            raise ConfigError(
                f"an epoch's last batch of {rest} cannot be shared by {cfg.ranks} ranks; type task.drop_last=true"
            )

    def _spent(self) -> bool:
        return _agreed(super()._spent())

    def _checkpoint_due(self) -> bool:
        return _agreed(super()._checkpoint_due())

    def _measure(self, split: Split) -> list[float]:
        """Each rank measures its share of the examples."""
        mine = split.take(slice(self.share[0], None, self.share[1]))
        total = torch.tensor(super()._measure(mine), dtype=torch.float64) * len(mine)
        dist.all_reduce(total)
        return (total / len(split)).tolist()

    def _watch(self, model: torch.nn.Module) -> torch.nn.Module:
        """Nothing that one rank alone would notice."""
        return model
