"""What the commands share: Hydra's entry point, with errors told in one line."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from runners.config import CONFIGS
from runners.signals import Interrupted

SHOW_TRACEBACK = "HYDRA_FULL_ERROR"  # Hydra's own variable; set to 1, errors come with their traceback


class SweepFailed(RuntimeError):
    """Some jobs of a sweep failed, and the others were made.

    Args:
        failures: each with its error and the command to try again.
        jobs: how many there were.
    """

    def __init__(self, failures: Sequence[str], jobs: int) -> None:
        super().__init__(failures, jobs)
        self.failures, self.jobs = failures, jobs

    def __str__(self) -> str:
        return "\n".join([f"{len(self.failures)} of {self.jobs} jobs failed; to try them again:", *self.failures])


def command(task: Callable[[DictConfig], object]) -> Callable[[], None]:
    """A command line for `task`, which is called with the composed config."""
    debug = os.environ.get(SHOW_TRACEBACK) == "1"

    @functools.wraps(task)
    def job(cfg: DictConfig):
        try:
            return task(cfg)
        except Exception as error:
            if debug or _in_sweep():  # in a sweep Hydra names the job and lets the others go on
                raise
            sys.exit(f"error: {describe(error)}")

    def main() -> None:
        os.environ[SHOW_TRACEBACK] = "1"  # makes Hydra hand errors on instead of printing them
        try:
            hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            sys.exit(128 + stop.signum)
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            if debug:
                raise
            sys.exit(f"error: {describe(error)}")

    return main


def _in_sweep() -> bool:
    """Whether the present job is one of several (`-m`)."""
    return not OmegaConf.is_missing(HydraConfig.get().job, "num")


def describe(error: Exception) -> str:
    """An error in one line, or one for each job of a sweep; for an unknown choice or field, what there is to choose."""
    if isinstance(error, SweepFailed):
        return str(error)
    options = getattr(error, "options", None)
    if options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        needs = "; launcher=slurm needs the extra `cluster` (docs/clusters.md)" if name == "submitit_slurm" else ""
        return f"unknown {group} {name}; choose one of {', '.join(sorted(options))}{needs}"
    cause = error.__cause__
    if isinstance(error, InstantiationException) and cause is not None:  # what was called has said what is wrong
        return describe(cause)
    parent = getattr(cause, "parent_node", None)
    if parent is not None and isinstance(parent, DictConfig):
        fields = ", ".join(sorted(str(key) for key in parent if key != "hydra"))
        return f"unknown field {cause.full_key}; there are {fields} (+{cause.full_key}=... adds one)"
    return " ".join(str(error).split()) or type(error).__name__
