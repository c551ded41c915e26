"""Every figure of the protocol, for every family of tasks, by name; each written as PNG, PDF and CSV.

`python -m analysis.figures results/quick [name …]`. A name is a figure's own, such as `cost` or `sensitivity_gcn_sbm`,
or that of one drawn per task, such as `sensitivity`. The figures are made in `curves`, `searches`, `costs`, `study`.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from analysis.costs import bench, cost, performance_profiles
from analysis.curves import curves, regimes, step_sizes
from analysis.panels import Drawn
from analysis.records import Records, load
from analysis.searches import best_of_k, sensitivity
from analysis.study import estimators, linear_convergence

PER_TASK = (step_sizes, sensitivity, best_of_k, regimes)
DRAWN_AXES = ("epoch", "train_seconds", "gradient_equivalents")  # steps look like epochs: the page alone shows them
OVER_TASKS = (performance_profiles, cost, linear_convergence, estimators)


def jobs(records: Records) -> dict[str, tuple[Callable, tuple]]:
    """Every figure that the records may show, in the report's order: its stable name, function and arguments."""
    tasks = [task for task in records.tasks if (records.finals.task == task).any()]
    found = {draw.__name__: (draw, ()) for draw in OVER_TASKS}
    found |= {f"bench_{device}": (bench, (device,)) for device in records.benches}
    for task in tasks:
        found |= {f"curves_{axis}_{task}": (curves, (task, axis)) for axis in DRAWN_AXES}
        found |= {f"{draw.__name__}_{task}": (draw, (task,)) for draw in PER_TASK}
    return found


def chosen(records: Records, names: Iterable[str]) -> list[str]:
    """The figures with these names, of every task where a name has none.

    Raises:
        ValueError: a name that these records have no figure for.
    """
    known, tasks, found = jobs(records), records.tasks, []
    for name in names:
        mine = [name] if name in known else [f"{name}_{task}" for task in tasks if f"{name}_{task}" in known]
        if not mine:
            raise ValueError(f"no figure {name}; there are {', '.join(known)}")
        found += mine
    return list(dict.fromkeys(found))


def draw_all(records: Records, folder: Path, names: Iterable[str] | None = None) -> list[Drawn]:
    """Write figures (all, or those named) as PNG, PDF and CSV; what is returned carries no matplotlib figure.

    Raises:
        ValueError: a name that these records have no figure for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = jobs(records)
    work = [known[name] for name in (chosen(records, names) if names else known)]
    processes = min(os.cpu_count() or 1, len(work), 8)
    if processes < 2:
        drawn = [_draw(records, folder, *job) for job in work]
    else:
        # Forked where that exists: the records are shared, and nothing is imported a second time.
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context = multiprocessing.get_context(method)
        with ProcessPoolExecutor(processes, context, initializer=_share, initargs=(records, folder)) as pool:
            drawn = list(pool.map(_draw_shared, work))
    return [figure for figure in drawn if figure is not None]


def _share(records: Records, folder: Path) -> None:
    global _SHARED
    _SHARED = records, folder
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent leaves no workers behind that would wait for it for good."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _draw_shared(job: tuple[Callable, tuple]) -> Drawn | None:
    return _draw(*_SHARED, *job)


def _draw(records: Records, folder: Path, function: Callable, arguments: tuple) -> Drawn | None:
    collecting = gc.isenabled()
    gc.disable()  # a figure's many objects all live until it is closed: looking for dead ones is a fifth of the time
    try:
        drawn = function(records, *arguments)
        if drawn is None:
            return None
        _save_png(drawn.figure, folder / f"{drawn.name}.png")
        nameless = {"CreationDate": None, "Producer": None, "Creator": None}
        drawn.figure.savefig(folder / f"{drawn.name}.pdf", metadata=nameless)
    finally:
        plt.close("all")
        if collecting:
            gc.enable()
    drawn.data.to_csv(folder / f"{drawn.name}.csv", index=False, float_format="%.8g")
    return Drawn(drawn.name, drawn.task, drawn.title, drawn.alt, None, drawn.data)


def _save_png(figure: Figure, path: Path) -> None:
    """In a palette of 256 colours: to the eye the same, and a quarter of the bytes of pages that are kept and sent."""
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m analysis.figures", description="Draw figures again.")
    parser.add_argument("root", type=Path, help="a results folder, such as results/quick")
    parser.add_argument("names", nargs="*", help="figures by name, such as cost, curves_epoch; all without any")
    parser.add_argument("--out", type=Path, help="default: <root>/report/figures")
    arguments = parser.parse_args()
    folder = arguments.out or arguments.root / "report" / "figures"
    try:
        for drawn in draw_all(load(arguments.root), folder, arguments.names):
            print(folder / f"{drawn.name}.pdf")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
