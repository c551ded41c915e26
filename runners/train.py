"""Train one optimizer on one task: `python -m runners.train task=… optimizer=… seed=… [budget.epochs=…] [field=value …]`.

`-m` with comma-separated values sweeps. The last line of standard output is the run's folder, where its record is.
"""

from __future__ import annotations

import sys

from omegaconf import DictConfig

from runners.command import command, describe, in_sweep
from runners.config import resolve


def train(cfg: DictConfig) -> str:
    """Make one run, mirror its record, and print and return its folder."""
    try:
        cfg = resolve(cfg)
        from runners.trainer import run  # torch and the libraries, only once the config is sound

        folder = run(cfg)
    except Exception as error:
        if in_sweep():  # Hydra names the job and lets the others go on
            raise
        sys.exit(f"error: {describe(error)}")
    if cfg.tracker.mode:
        from runners.tracking import mirror

        mirror([folder], cfg.tracker)
    print(folder, flush=True)
    return str(folder)


if __name__ == "__main__":
    command(train)()
