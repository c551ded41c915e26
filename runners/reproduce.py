"""Reproduce the comparison of a profile: `python -m runners.reproduce profile=quick [launcher=joblib] [dry_run=true]`.

With `experiment=figure_N` only what that figure needs: its tasks and methods, and the figure in place of the report.

Enumerate tasks, methods and seeds; tune what is tuned; run all seeds; analyse. Runs go through Hydra's launcher. What
is done is never made again, so that the same command goes on after any interruption. One failing run does not stop
the rest.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from statistics import mean, stdev

from omegaconf import DictConfig, OmegaConf

from data.files import replace_file
from runners.command import command, describe
from runners.config import CONFIGS
from runners.estimate import Estimates, spoken
from runners.progress import Progress
from runners.sweep import Job, Sweep
from runners.tracking import mirror
from runners.tune import outcome, record_search, trials_of


class Plan:
    """The runs of a profile: for each task and method its trials, and once these are made its final runs."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        pairs = [(task, optimizer) for task in sweep.profile.tasks for optimizer in sweep.optimizers]
        self.trials = {pair: trials_of(sweep, *pair) for pair in pairs}

    def all_trials(self) -> list[Job]:
        return [job for jobs in self.trials.values() for job in jobs]

    def expected(self) -> list[Job]:
        """A job for every run, to count and estimate by; before tuning, final runs have their first trial's values."""
        finals = []
        for pair, jobs in self.trials.items():
            values = {}
            if jobs:
                values = jobs[0].values if _missing(jobs) else outcome(jobs)["selected"]
            finals += [self.sweep.job(*pair, seed, values, tuning={}) for seed in self.sweep.seeds(pair[0])]
        return self.all_trials() + finals

    def finals(self) -> tuple[list[Job], list[str]]:
        """The final runs, with the settings that tuning selected; and what cannot be run, in words."""
        finals, failures = [], []
        for pair, jobs in self.trials.items():
            values, tuning = {}, None
            if missing := _missing(jobs):
                lack = f"{missing} of {len(jobs)} trials have no result, so its final runs wait for them"
                failures.append(f"{pair[1]} on {pair[0]}: {lack}")
                continue
            if jobs:
                search = record_search(self.sweep, jobs)
                values = search["selected"]
                tuning = {"trials": len(jobs), "selected": values, "on_edge": search["on_edge"]}
            finals += [self.sweep.job(*pair, seed, values, tuning=tuning) for seed in self.sweep.seeds(pair[0])]
        return finals, failures


def _missing(trials: list[Job]) -> int:
    return sum(not trial.is_done() for trial in trials)


def reproduce(cfg: DictConfig) -> None:
    """Make or complete the reproduction of the config's profile, and print a table and the report's path."""
    experiment = cfg.get("experiment")
    if experiment:
        cfg.profile = narrowed(cfg.profile, experiment)
    sweep = Sweep(cfg)
    plan = Plan(sweep)
    expected = plan.expected()
    estimates = Estimates(sweep.folder / "runs", dict(sweep.profile.seconds_per_epoch))
    if cfg.dry_run:
        _print_plan(plan, expected, estimates)
        return
    from runners.study import make_study  # imports torch, which a plan does not need

    with Progress(len(expected), estimates.total(expected), estimates.seconds) as progress:
        progress.watch(plan.all_trials())
        failed = sweep.launch(plan.all_trials(), timed=False)
        finals, failures = plan.finals()
        progress.watch(finals)
        failed += sweep.launch(finals)
    failures += [f"{job.name}: {reason}\n    {job.command}" for job, reason in failed]
    mirror([job.folder for job in finals], cfg.tracker)
    _print_table(finals)
    try:
        make_study(sweep.folder / "study", list(experiment.figures if experiment else sweep.profile.study))
        if experiment:
            print("\n".join(map(str, _figures(sweep.folder, list(experiment.figures)))))
        else:
            print(f"report: {_report(sweep.folder)}")
    except Exception as error:  # the runs that failed are to be named even so
        failures.append(f"{'the figure' if experiment else 'the report'}: {describe(error)}")
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} failed; the same command tries them again:", *failures]))


def _print_plan(plan: Plan, jobs: list[Job], estimates: Estimates) -> None:
    for job in jobs:
        settings = job.name if job.is_trial or not job.values else " ".join(job.name.split()[:4]) + " tuned"
        seconds = f"{'' if estimates.is_measured(job) else '~'}{spoken(estimates.seconds(job))}"
        print(f"{'done' if job.is_done() else seconds:>8}  {settings}")
    left = [job for job in jobs if not job.is_done()]
    print(
        f"{len(jobs)} runs, {len(left)} to be made, one after another about {spoken(estimates.total(left))} "
        "(~: a rough estimate, without records of this method on this task)"
    )


def narrowed(profile: DictConfig, experiment: DictConfig) -> DictConfig:
    """The profile with the experiment's families of tasks and its methods; null stands for all of the profile's."""
    profile = profile.copy()
    if experiment.families is not None:
        family = {task: OmegaConf.load(CONFIGS / "task" / f"{task}.yaml").family for task in profile.tasks}
        profile.tasks = [task for task in profile.tasks if family[task] in experiment.families]
    if experiment.optimizers is not None:
        profile.optimizers = list(experiment.optimizers)
    return profile


def _figures(folder: Path, names: list[str]) -> list[Path]:
    """Draw figures of a folder of records; their PDFs."""
    from analysis import figures, records

    folder.mkdir(parents=True, exist_ok=True)
    drawn = figures.draw_all(records.load(folder), folder / "figures", names)
    if not drawn:
        raise FileNotFoundError(f"{folder} has no data for {', '.join(names)}; docs/figures.md says what makes them")
    return [folder / "figures" / f"{figure.name}.pdf" for figure in drawn]


def _report(folder: Path) -> Path:
    """The report on a folder of records, made anew if they, the study, the benchmark or the analysis changed."""
    index, seal = folder / "report" / "index.html", folder / "report" / ".made-from"
    state = hashlib.sha256()
    for path in _sources(folder):
        state.update(f"{path} ".encode() + path.read_bytes())
    if index.exists() and seal.exists() and seal.read_text() == state.hexdigest():
        return index
    from analysis.report import build

    index = build(folder, folder / "report")
    replace_file(seal, lambda file: file.write_text(state.hexdigest()))
    return index


def _sources(folder: Path) -> list[Path]:
    """The files that a report is made from: the analysis and its page, and what it reads."""
    analysis = Path(__file__).resolve().parent.parent / "analysis"
    found = [path for path in analysis.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for kind in ("profile", "optimizer"):
        found += (CONFIGS / kind).glob("*.yaml")
    for pattern in ("runs/*/*/*/summary.json", "tuning/*/*.json", "study/*.csv"):
        found += folder.glob(pattern)
    for pattern in ("bench/*/bench.csv", "ablation/*/ablation.csv"):
        found += folder.parent.glob(pattern)
    return sorted(found)


def _print_table(jobs: list[Job]) -> None:
    """Final training loss and test metric, mean ± standard deviation over seeds."""
    pairs = dict.fromkeys(job.pair for job in jobs)
    if not pairs:  # an experiment without runs of its own
        return
    print(f"\n{'task':26} {'optimizer':14} {'n':>2} {'training loss':>20} {'test metric':>26}  settings")
    for pair in pairs:
        mine = [job for job in jobs if job.pair == pair and job.is_done()]
        if not mine:
            print(f"{pair[0]:26} {pair[1]:14}  0")
            continue
        summaries = [job.summary() for job in mine]
        metric = next(
            name
            for name in summaries[0]["final"] or ["test_metric"]
            if name.startswith("test_") and name != "test_loss"
        )
        loss, test = (_spread(summaries, name) for name in ("train_loss", metric))
        settings = " ".join(f"{field}={value:g}" for field, value in mine[0].values.items())
        edge = " (edge)" if (summaries[0]["tuning"] or {}).get("on_edge") else ""
        print(f"{pair[0]:26} {pair[1]:14} {len(mine):2} {loss:>20} {test + ' ' + metric[5:]:>26}  {settings}{edge}")


def _spread(summaries: list[dict], name: str) -> str:
    """Of final values; none where a seed diverged, as in the report: the mean of the survivors would hide it."""
    diverged = sum(summary["status"] == "diverged" for summary in summaries)
    if diverged:
        return f"diverged {diverged}/{len(summaries)}"
    values = [value for summary in summaries if (value := summary["final"].get(name)) is not None]
    if not values:
        return "-"
    deviation = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
    return f"{mean(values):.4g}{deviation}"


if __name__ == "__main__":
    command(reproduce)()
