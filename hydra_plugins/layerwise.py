"""What this project adds to Hydra: a launcher on Ray, and a sweeper that goes on after failures and lists them all.

Hydra finds plugins in the folder of this name, and imports every one at its start: Ray only where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class GoingOnSweeper(BasicSweeper):
    """Hydra's own sweeper, which besides ends with one error that names every job that failed."""

    def sweep(self, arguments: list[str]) -> None:
        from runners.command import SweepFailed
        from runners.sweep import command_of, launch

        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        batches = self.split_arguments(overrides, self.max_batch_size)
        jobs = [job for batch in batches for job in batch]
        self.validate_batch_is_legal(jobs)
        errors = [error for batch in batches for error in launch(self.launcher, batch)]
        failed = [(job, error) for job, error in zip(jobs, errors, strict=True) if error]
        if failed:
            module = f"runners.{self.config.hydra.job.name}"
            raise SweepFailed([f"{error}\n    {command_of(module, job)}" for job, error in failed], len(jobs))


class RayLauncher(Launcher):
    """Jobs as Ray tasks: on a cluster that runs, or on this machine alone.

    Ray itself begins a task anew whose node or worker has died; the run goes on from its checkpoint.

    Args:
        init: arguments of `ray.init`, such as the cluster's `address`.
        remote: options of each task, such as `num_cpus`, `num_gpus`, `max_retries`.
    """

    def __init__(self, init: DictConfig, remote: DictConfig) -> None:
        self.init, self.remote = OmegaConf.to_container(init), OmegaConf.to_container(remote)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        try:
            import ray
        except ImportError:
            raise ImportError("launcher=ray needs the extra `cluster` (docs/clusters.md)") from None
        from hydra_plugins.hydra_joblib_launcher._core import execute_job

        if not ray.is_initialized():
            ray.init(**self.init)
        task = ray.remote(**self.remote)(execute_job)
        shared = (self.hydra_context, self.config, self.task_function, Singleton.get_state())
        running = [task.remote(initial_job_idx + i, list(job), *shared) for i, job in enumerate(job_overrides)]
        return [self._result(reference) for reference in running]

    @staticmethod
    def _result(reference) -> JobReturn:
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            return JobReturn(status=JobStatus.FAILED, _return_value=error)


_GOING_ON = {"_target_": "hydra_plugins.layerwise.GoingOnSweeper", "max_batch_size": None, "params": None}
_RAY_TASKS = {"_target_": "hydra_plugins.layerwise.RayLauncher", "init": {}, "remote": {}}
ConfigStore.instance().store(group="hydra/sweeper", name="going_on", node=_GOING_ON, provider="layerwise")
ConfigStore.instance().store(group="hydra/launcher", name="ray_tasks", node=_RAY_TASKS, provider="layerwise")
