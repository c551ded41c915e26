"""What a step costs: `python -m runners.bench [optimizers=[…]] [workloads=[…]] [seconds=…] [device=…] [threads=…]`.

Every optimizer takes steps on every workload: a task's model, likelihood and batch size, with one constant batch of the
data's real shape drawn at random, so nothing is downloaded and nothing but steps is timed. All optimizers of a workload
are alive in one process and take turns; each is compared with SGD-m's turn of the same round, so that a machine whose
speed drifts does not bias the ratios; seconds that a thread only waited for a processor do not count. One whose first
steps would leave the others no time is left out, with the reason.

A method's steps are not all alike: statistics are gathered and factors refreshed at intervals. Steps are therefore
sorted by kind (which of the method's intervals they end), and time per step is the mean of the kinds' medians, weighted
by how often each occurs. A kind that no step was left for is represented by the first step, where all work is done; the
few methods whose rare work comes later (`LATE`) go on, beside SGD-m, until they have done it. What a method does more
often at its start is left out (`steady`): of thousands of steps that is nothing.

Writes `<results.root>/bench/<device>/`, with `cuda_graphs` `<device>_graphs/`: `bench.csv`, `context.csv`, `bench.pdf`
and `bench.png`. Workloads that were measured before and are not now stay; `context.csv` has a row for each time.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import hydra
import pandas as pd
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from data.batches import Dataset, Split
from data.files import replace_file
from data.graphs import normalised_adjacency, sparse
from optimizers.cuda_graphs import WARM
from runners.assembly import Assembly
from runners.clock import Clock
from runners.command import describe
from runners.config import (
    CONFIGS,
    ConfigError,
    check_callables,
    check_cuda_graphs,
    check_writable,
    definite_device,
    definite_threads,
)
from runners.evaluation import set_mode
from runners.provenance import provenance

REFERENCE = "sgdm"
# Tasks, with what each needs of the time, relatively.
WORKLOADS = {
    "autoencoder_mnist": 2, "autoencoder_curves": 1, "cnn_cifar10_resnet32": 5, "gcn_cora": 1, "cnn_cifar100_vgg16": 10,
}  # fmt: skip
SLOW_ON_CPU = ("cnn_cifar100_vgg16",)
IMAGES = {
    "mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "svhn": (3, 32, 32),
    "imagenet": (3, 224, 224),
}  # fmt: skip
GRAPHS = {"Cora": (2708, 5278, 18), "CiteSeer": (3327, 4552, 32), "PubMed": (19717, 44324, 50)}  # nodes, edges, words
# Settings that count steps between rare work, and which steps do it: 0, every, 2 every, … plus each of these.
INTERVALS = {
    "every": [0], "correct_every": [0, 1], "update_every": [0], "refresh_every": [0], "precondition_frequency": [0],
    "preconditioning_compute_steps": [-1], "statistics_compute_steps": [-1], "update_period": [0],
}  # fmt: skip
LATE = ("gen_sgdm", "gen_adamw", "shampoo_grafted")  # do nothing rare in their first step
UNTIL_CAPTURED = WARM + 2  # times that each kind of step is taken, the first ones being of other kinds
TURN = 0.05  # seconds of a turn of short steps
PATIENCE = 0.25  # of a workload's time, for a method's first two steps: the others need some too


class Contender(Assembly):
    """One optimizer on one workload, and what its steps took.

    Args:
        name: as shown.
        cfg: composed config of the task and the optimizer.
        steady: attributes to set where an optimizer has them, for steps as they are in the long run.
        dataset: stands in for the task's data; None: the task's own, which need no download.
        patience: seconds that its first two steps may take.

    Raises:
        TimeoutError: they take longer.
    """

    def __init__(self, name: str, cfg: DictConfig, steady: dict, dataset: Dataset | None, patience: float) -> None:
        self.name, self._steady, self._stand_in = name, steady, dataset
        super().__init__(cfg)
        self.batch = next(iter(self.batches))
        self.intervals = self._intervals(cfg.optimizer)
        self.period = math.lcm(*(every for every, _ in self.intervals))
        began = time.monotonic()
        self._rehearse()  # libraries warm up; on the CPU memory is traced
        if (taken := time.monotonic() - began) > patience:
            raise TimeoutError(f"two steps take {taken:.2g} s, too long for the others; give more by seconds=N")
        set_mode("train", self.optimizer)
        self.objective.account(self.objective(*self.batch))  # which is done once
        self.memory.start()
        for _ in range(UNTIL_CAPTURED * self.period if cfg.cuda_graphs else 0):
            self.take_step(*self.batch)
        self.samples = [self.sample(None)]
        self.memory.stop()
        self.steps_per_turn = min(max(1, int(TURN / self.samples[0]["seconds"])), 20)

    def sample(self, turn: int | None) -> dict:
        """Take a step; what it took."""
        work, clock = self.objective.gradient_equivalents, Clock(self.device)
        clock.start()
        self.take_step(*self.batch)
        clock.stop()
        work = self.objective.gradient_equivalents - work
        return {"turn": turn, "seconds": clock.seconds - clock.waited, "waited": clock.waited, "work": work}

    def row(self, reference: Contender) -> dict:
        """The columns of this optimizer."""
        steps, pace = pd.DataFrame(self.samples), pd.DataFrame(reference.samples).groupby("turn").seconds.median()
        seconds, later = self.mean(steps.seconds), steps.seconds[1:]
        return {
            "optimizer": self.name, "kind": self.cfg.optimizer.about.kind, "seconds": seconds,
            "seconds_q25": later.quantile(0.25), "seconds_median": later.median(), "seconds_q75": later.quantile(0.75),
            "samples_per_second": len(self.batch.targets) / seconds, "memory_bytes": self.memory.bytes,
            "gradient_equivalents": self.mean(steps.work),
            "time_ratio": self.mean(steps.seconds / steps.turn.map(pace).fillna(pace.median())),
            "memory_ratio": self.memory.bytes / reference.memory.bytes, "steps": len(later), "period": self.period,
            "waited": steps.waited.sum() / (steps.waited + steps.seconds).sum(), "refused": "",
        }  # fmt: skip

    def is_owed_steps(self) -> bool:
        """Whether there is a kind of steps that it has not come to and its first step does not stand for."""
        seen = {self._kind(step) for step in range(1, len(self.samples))}
        return self.name.split()[0] in LATE and any(self._kind(step) not in seen for step in range(self.period))

    def mean(self, values: pd.Series) -> float:
        """The mean over steps of all kinds: each kind's median, weighted by how often it occurs."""
        medians = values[1:].groupby(self._kind).median()
        return sum(medians.get(self._kind(step), values[0]) for step in range(self.period)) / self.period

    def _kind(self, step: int) -> str:
        return " ".join(str(interval) for interval in self.intervals if (step - interval[1]) % interval[0] == 0)

    @staticmethod
    def _intervals(settings: DictConfig) -> list[tuple[int, int]]:
        """Interval and offset of a method's rare work."""
        found = {name: settings[name] for name in INTERVALS if settings.get(name)}
        unit = {"correct_every": found.get("every", 1)}  # counts measurements of curvature
        intervals = [(every * unit.get(name, 1), name) for name, every in found.items()]
        return [(n, offset * unit.get(name, 1)) for n, name in intervals if n > 1 for offset in INTERVALS[name]]

    def _build(self, generators: dict[str, torch.Generator]):
        model, objective, optimizer = super()._build(generators)
        for attribute, value in self._steady.items():
            if hasattr(optimizer, attribute):
                setattr(optimizer, attribute, value)
        return model, objective, optimizer

    def _load_data(self) -> Dataset:
        return super()._load_data() if self._stand_in is None else self._stand_in.to(self.cfg.device)


def stand_in(task: DictConfig) -> Dataset | None:
    """Random data of the real shape for a task; None for a task whose data are in the package.

    There are two batches of it, so that a minibatch is not the whole training set, for methods that make a difference.
    """
    generator = torch.Generator().manual_seed(0)
    source = task.data._target_.rpartition(".")[2]
    if task.family == "autoencoder":
        pixels = torch.rand(2 * task.batch_size, task.model.sizes[0], generator=generator)
        split = Split((pixels,), pixels)
    elif source in IMAGES:
        images = torch.randn(2 * task.batch_size, *IMAGES[source], generator=generator)
        split = Split((images,), torch.randint(task.model.classes, (len(images),), generator=generator))
    elif source == "planetoid":
        features, adjacency = _graph(*GRAPHS[task.data.name], task.model.features, generator)
        labelled = 20 * task.model.classes  # the public split's
        rows = torch.randperm(len(features), generator=generator)[:labelled]
        split = Split((features, adjacency), torch.arange(labelled) % task.model.classes, rows)
    else:
        return None
    return Dataset(split, split, None, None, "random", task.name)


def _graph(nodes: int, edges: int, words: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features with `words` nonzeros a node, and Â of a graph with `edges` edges; both sparse CSR."""
    ends = torch.randint(nodes, (2, edges), generator=generator)
    ends = ends[:, ends[0] != ends[1]]
    columns = torch.rand(nodes, vocabulary, generator=generator).topk(words).indices
    features = torch.zeros(nodes, vocabulary).scatter_(1, columns, 1 / words)
    return sparse(features), normalised_adjacency(torch.cat([ends, ends.flip(0)], 1), nodes)


def compare(task: str, cfg: DictConfig, until: float) -> list[dict]:
    """Rows of one workload: every optimizer takes turns until `time.monotonic()` is `until`, two at least."""
    contenders: list[Contender] = []
    refused: dict[str, str] = {}
    place = (f"task={task}", *(f"{name}={cfg[name]}" for name in ("device", "threads", "cuda_graphs")))
    place += ("tracker=none", "progress=false")
    dataset, patience = None, PATIENCE * (until - time.monotonic())
    for entry in dict.fromkeys((REFERENCE, *cfg.optimizers)):
        name, *settings = entry.split()
        choices = [*place, f"optimizer={name}", *(f"++optimizer.{setting}" for setting in settings)]
        composed = hydra.compose("config", choices)
        OmegaConf.resolve(composed)
        check_callables(composed)
        dataset = dataset or stand_in(composed.task)
        if contenders and time.monotonic() > until:
            refused[entry] = "no time left; give more by seconds=N"
            continue
        try:
            most = patience if contenders else math.inf
            contenders.append(Contender(entry, composed, dict(cfg.steady), dataset, most))
        except Exception as error:
            refused[entry] = describe(error)
    turn = 0
    while on_turn := [c for c in contenders if turn < 2 or time.monotonic() < until or c.is_owed_steps()]:
        for contender in dict.fromkeys((contenders[0], *on_turn)):
            try:
                contender.samples += [contender.sample(turn) for _ in range(contender.steps_per_turn)]
            except Exception as error:
                contenders.remove(contender)
                refused[contender.name] = f"step {len(contender.samples)}: {describe(error)}"
        turn += 1
    if REFERENCE in refused:
        raise ConfigError(f"{REFERENCE} does not run on {task}: {refused[REFERENCE]}")
    rows = [{"workload": task, **contender.row(contenders[0])} for contender in contenders]
    return rows + [{"workload": task, "optimizer": name, "refused": why} for name, why in refused.items()]


def earlier(folder: Path, workloads: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `folder` holds of other workloads than these: table and context, empty where there is nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    if not (folder / "bench.csv").exists():
        return pd.DataFrame(), pd.DataFrame()
    try:
        table, context = pd.read_csv(folder / "bench.csv"), pd.read_csv(folder / "context.csv")
        table = table[~table.workload.isin(workloads)]
        left = [" ".join(name for name in of.split() if name in set(table.workload)) for of in context.workloads]
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder} has an earlier benchmark that cannot be read, {error}: move it away") from error
    return table, context.assign(workloads=left)[[words != "" for words in left]]


def draw(table: pd.DataFrame, folder: Path, words: str) -> None:
    """Bars of time and memory relative to SGD-m, a column of panels per workload."""
    from analysis import style  # imports matplotlib

    tasks, names = list(table.workload.unique()), list(table.optimizer.unique())[::-1]
    figure, axes = style.canvas(
        "Cost of a step", len(tasks), rows=2, height=max(2.0, 0.5 + 0.14 * len(names)), note=words
    )
    for row, measure in zip(axes, ("time", "memory"), strict=True):
        for axis, task in zip(row, tasks, strict=True):
            ratios = table[table.workload == task].set_index("optimizer")[f"{measure}_ratio"].reindex(names)
            colors = [style.style(name.split()[0]).color for name in names]
            bars = axis.barh(names, ratios.fillna(1) - 1, left=1, color=colors)  # from 1, SGD-m's
            axis.bar_label(bars, [f"{r:.2f}" if r == r else "–" for r in ratios], padding=2, fontsize=6)
            axis.set(title=f"{task}: {measure}", xscale="log", xlabel=f"{measure} / SGD-m's")
            axis.tick_params(axis="y", labelsize=6)
            axis.margins(x=0.2)
            axis.xaxis.set_major_locator(style.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(style.NullLocator())
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.5 / figure.get_figheight()))
    for suffix in ("pdf", "png"):
        figure.savefig(folder / f"bench.{suffix}")


def bench(cfg: DictConfig) -> Path:
    """Measure, print the table, and write the files; returns their folder."""
    began = time.monotonic()
    cfg.device, cfg.threads = definite_device(str(cfg.device)), definite_threads(cfg.threads)
    every = sorted(path.stem for path in (CONFIGS / "optimizer").glob("*.yaml"))
    cfg.optimizers = [name for entry in cfg.optimizers for name in (every if entry == "all" else [entry])]
    tasks = cfg.workloads or [task for task in WORKLOADS if cfg.device != "cpu" or task not in SLOW_ON_CPU]
    check_cuda_graphs(cfg.cuda_graphs, cfg.device)
    folder = Path(cfg.results.root) / "bench" / (cfg.device.partition(":")[0] + ("_graphs" if cfg.cuda_graphs else ""))
    check_writable(folder)
    kept = earlier(folder, tasks)
    # on a GPU it is not the steps that take the time, but what comes before them
    shares = [WORKLOADS.get(task, 1) if cfg.device == "cpu" else 1 for task in tasks]
    rows = []
    for number, task in enumerate(tasks, start=1):
        print(f"{task} …", file=sys.stderr, flush=True)
        rows += compare(task, cfg, began + cfg.seconds * sum(shares[:number]) / sum(shares))
    source = provenance(torch.device(cfg.device), cfg.threads)
    source |= source.pop("versions") | {"dtype": "float32", "seconds": round(time.monotonic() - began)}
    source["workloads"] = " ".join(tasks)
    table, context = pd.concat([kept[0], pd.DataFrame(rows)]), pd.concat([kept[1], pd.DataFrame([source])])
    replace_file(folder / "bench.csv", lambda file: table.to_csv(file, index=False, float_format="%.6g"))
    replace_file(folder / "context.csv", lambda file: context.to_csv(file, index=False))
    draw(table, folder, f"{source['device']}, CPU threads: {cfg.threads}; bars begin at 1, SGD-m's own")
    print(context[-1:].T.to_string(header=False))
    shown = [name for name in table if name not in ("kind", "seconds_q25", "seconds_q75", "period")]
    print(table[shown].to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    return folder


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="bench")
def main(cfg: DictConfig) -> None:
    try:
        print(bench(cfg))
    except (ConfigError, HydraException) as error:
        sys.exit(f"error: {describe(error)}")


if __name__ == "__main__":
    main()
