"""Many runs: which they are, which are done, and their launch through the launcher that the command line chose."""

from __future__ import annotations

import functools
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from runners.command import describe
from runners.config import CONFIGS, complete, definite_device, definite_threads, resolve, run_folder
from runners.record import is_done, read_summary

PLAIN = re.compile(r"[\w./:~+-]+")  # a value that Hydra's grammar takes as it is
QUOTE = re.compile(r"(\\*)('|$)")  # in quotes, what has to be escaped: these, and backslashes before them
ATTEMPTS = 2  # at launching jobs together, before each is launched by itself


@dataclass(frozen=True, eq=False)
class Job:
    """One run to be made: what to type for it, its resolved config, and the folder of its record."""

    overrides: tuple[str, ...]
    config: dict
    folder: Path

    @property
    def pair(self) -> tuple[str, str]:
        """Task and optimizer."""
        return self.config["task"]["name"], self.config["optimizer"]["about"]["name"]

    @property
    def values(self) -> dict:
        """The searched settings of this run."""
        settings = self.config["optimizer"]
        return {field: settings[field] for field in settings.get("search") or {}}

    @property
    def is_trial(self) -> bool:
        return self.config["holdout"]

    @property
    def name(self) -> str:
        """A short description for people."""
        what = "trial" if self.is_trial else f"seed {self.config['seed']}"
        settings = "".join(f" {field}={value:g}" for field, value in self.values.items())
        return " ".join([*self.pair, what]) + settings

    @property
    def command(self) -> str:
        """What to type to make this run alone."""
        return command_of("runners.train", self.overrides)

    def is_done(self) -> bool:
        return is_done(self.folder)

    def summary(self) -> dict:
        return read_summary(self.folder)


class Sweep:
    """The runs of one profile, made within a Hydra application.

    Args:
        cfg: the application's config. Records go to `<results.root>/<profile>/runs`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.profile = cfg.profile
        self.folder = Path(cfg.results.root) / cfg.profile.name
        self.hydra = GlobalHydra.instance().hydra
        self.overrides = HydraConfig.get().overrides
        launcher = HydraConfig.get().runtime.choices.launcher
        device, threads = _device(str(cfg.device), launcher), definite_threads(cfg.threads or cfg.profile.threads)
        self.leaves_cores_idle = launcher == "local" and device == "cpu" and threads == 1
        # Definite here, so that a launcher's workers cannot resolve them differently.
        self.common = (
            *self.overrides.task,
            f"device={device}",
            f"threads={threads}",
            f"results.root={_text(self.folder / 'runs')}",
            "tracker=none",
            "progress=false",
        )

    @property
    def optimizers(self) -> list[str]:
        """The profile's methods; `all` are those with a config."""
        if self.profile.optimizers == "all":
            return sorted(path.stem for path in (CONFIGS / "optimizer").glob("*.yaml"))
        return list(self.profile.optimizers)

    def seeds(self, task: str) -> range:
        """The seeds that the profile asks of a task."""
        seeds = self.profile.seeds
        return range(seeds if isinstance(seeds, int) else seeds.get(task, seeds.default))

    def job(self, task: str, optimizer: str, seed: int, values: dict, *, tuning: dict | None = None) -> Job:
        """One run of a method with these searched settings; without `tuning`, searched settings make it a trial."""
        choices, cfg = self._composed(task, optimizer)
        fields = {f"optimizer.{field}": value for field, value in values.items()}
        fields |= {"seed": seed, "holdout": bool(values) and tuning is None} | ({"tuning": tuning} if tuning else {})
        for field, value in fields.items():
            OmegaConf.update(cfg, field, value)  # in place: the same fields are set for the pair's every job
        config = OmegaConf.to_container(cfg, resolve=True)
        overrides = (*choices, *(f"{field}={_text(value)}" for field, value in fields.items()))
        return Job(overrides, config, run_folder(config))

    def search_of(self, task: str, optimizer: str) -> tuple[DictConfig, dict]:
        """The task's config and the method's search space ({} if it is not tuned)."""
        _, cfg = self._composed(task, optimizer)
        return cfg.task, OmegaConf.to_container(cfg.optimizer).get("search") or {}

    def launch(self, jobs: Iterable[Job], timed: bool = True) -> list[tuple[Job, str]]:
        """Make the runs that are not done.

        Args:
            jobs: the runs.
            timed: whether their times are asked for. If not, they are made side by side on cores that would be idle.

        Returns:
            Those that failed, each with its error in one line.
        """
        jobs = [job for job in jobs if not job.is_done()]
        if not jobs:
            return []
        beside = _side_by_side if self.leaves_cores_idle and not timed else tuple
        config = self._compose(*beside(self.overrides.task), *self.overrides.hydra, mode=RunMode.MULTIRUN)
        context = HydraContext(config_loader=self.hydra.config_loader, callbacks=Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=make, config=config)
        errors = launch(launcher, [beside(job.overrides) for job in jobs], lambda i: jobs[i].is_done())
        return [(job, error) for job, error in zip(jobs, errors, strict=True) if error]

    @functools.cache  # noqa: B019 - lives as long as the command
    def _composed(self, task: str, optimizer: str) -> tuple[tuple[str, ...], DictConfig]:
        choices = (*self.common, f"task={task}", f"optimizer={optimizer}")
        cfg = self._compose(*choices)
        schedule = self.profile.schedules.get(task)
        if schedule and cfg.optimizer.get("search"):
            choices = (*choices, f"schedule={schedule}")
            cfg.schedule = OmegaConf.load(CONFIGS / "schedule" / f"{schedule}.yaml")
        del cfg["hydra"]
        return choices, complete(cfg, here=False)  # which `common` has seen to

    def _compose(self, *overrides: str, mode: RunMode = RunMode.RUN) -> DictConfig:
        cfg = self.hydra.compose_config("config", list(overrides), run_mode=mode, with_log_configuration=False)
        OmegaConf.set_struct(cfg, False)
        OmegaConf.set_readonly(cfg, False)
        return cfg


def _device(name: str, launcher: str) -> str:
    """The device of every job; what a cluster's machines have is for them to say."""
    elsewhere = launcher in ("slurm", "ray")
    if elsewhere and re.fullmatch(r"cuda(:\d+)?", name):
        return name
    device = definite_device(name)
    if elsewhere and (name, device) == ("auto", "cpu"):
        print(
            "warning: device=auto is cpu on this machine, and so for every job; for GPUs type device=cuda",
            file=sys.stderr,
        )
    return device


def _side_by_side(overrides: Iterable[str]) -> tuple[str, ...]:
    return *(override for override in overrides if not override.startswith("launcher=")), "launcher=joblib"


def launch(
    launcher: Launcher, jobs: Sequence[Sequence[str]], is_done: Callable[[int], bool] = lambda i: False
) -> list[str | None]:
    """Have a launcher make jobs, given by their overrides.

    A launcher that loses a worker raises, and tells nothing of the other jobs. What is not done then is launched again,
    in the end job by job, so that one that kills its worker does not take the others along.

    Args:
        launcher: set up.
        jobs: each a list of overrides.
        is_done: whether the job of this index has its result.

    Returns:
        For each job its error in one line, or None.
    """
    errors: list[str | None] = [None] * len(jobs)
    left = list(range(len(jobs)))
    for _ in range(ATTEMPTS):
        lost = _launch(launcher, jobs, left, errors)
        if lost is None:
            return errors
        left = [i for i in left if not is_done(i)]
        print(f"warning: a worker was lost; launching {len(left)} jobs again ({lost})", file=sys.stderr)
    for i in left:
        errors[i] = _launch(launcher, jobs, [i], errors) or errors[i]
    return errors


def _launch(launcher: Launcher, jobs: Sequence[Sequence[str]], which: list[int], errors: list) -> str | None:
    """Launch some of the jobs and note their errors; what the launcher itself raises, in one line."""
    try:
        returns = launcher.launch([list(jobs[i]) for i in which], initial_job_idx=0) if which else []
    except (HydraException, ImportError):  # a config that cannot be composed, a package that is not there
        raise
    except Exception as error:
        return describe(error)[:300]
    for i, ret in zip(which, returns, strict=True):
        errors[i] = describe(ret._return_value) if ret.status == JobStatus.FAILED else None
    return None


def command_of(module: str, overrides: Sequence[str]) -> str:
    """What to type to make one run alone."""
    return shlex.join(["python", "-m", module, *overrides])


def make(cfg: DictConfig) -> str:
    """The task function of a launched job."""
    cfg = resolve(cfg)
    from runners.trainer import run

    return str(run(cfg))


def _text(value) -> str:
    """A value in Hydra's override grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Path) and not PLAIN.fullmatch(str(value)):
        return "'" + QUOTE.sub(lambda found: found[1] * 2 + found[2].replace("'", "\\'"), str(value)) + "'"
    return str(value).lower() if isinstance(value, bool) else str(value)
