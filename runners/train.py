"""Train one optimizer on one task: `python -m runners.train task=… optimizer=… seed=… [field=value …]`.

`-m` with comma-separated values sweeps. The last line of standard output is the run's folder, where its record is.
"""

from __future__ import annotations

import os

from omegaconf import DictConfig

from runners.command import command
from runners.config import resolve


def train(cfg: DictConfig) -> str:
    """Make one run, mirror its record, and print and return its folder."""
    cfg = resolve(cfg)
    from runners.trainer import run  # torch and the libraries, only once the config is sound

    folder = run(cfg)
    if os.environ.get("RANK", "0") != "0":  # of torchrun: rank 0 speaks for all
        return str(folder)
    if cfg.tracker.mode:
        from runners.tracking import mirror

        mirror([folder], cfg.tracker)
    print(folder, flush=True)
    return str(folder)


if __name__ == "__main__":
    command(train)()
