"""Every figure is one config: it composes, names figures that exist, and is in the map of docs/figures.md."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from analysis import figures, report
from runners.config import CONFIGS
from runners.reproduce import _report, _sources, narrowed

MAP = (CONFIGS.parent / "docs" / "figures.md").read_text()
FIGURES = sorted(path.stem for path in (CONFIGS / "experiment").glob("figure_*.yaml"))
KINDS = {draw.__name__ for draw in (*figures.PER_TASK, *figures.OVER_TASKS)}
KINDS |= {f"curves_{axis}" for axis in figures.DRAWN_AXES}


def test_there_are_eleven_and_the_map_has_each():
    assert len(FIGURES) == 11
    rows = [line for line in MAP.splitlines() if line.startswith("| ") and "figure_" in line]
    assert sorted(row.split("`")[1] for row in rows) == FIGURES
    for row in rows:
        name = row.split("`")[1]
        assert f"`make figure N={name.removeprefix('figure_')}`" in row
        shown = OmegaConf.load(CONFIGS / "experiment" / f"{name}.yaml").figures
        assert all(f"`{kind}.pdf`" in row or f"`{kind}_<task>.pdf`" in row for kind in shown)


@pytest.mark.parametrize("name", FIGURES)
def test_it_names_figures_tasks_and_methods_that_exist(compose, name):
    cfg = compose(f"experiment={name}")
    assert set(cfg.experiment.figures) <= KINDS
    profile = narrowed(cfg.profile, cfg.experiment)
    assert set(profile.tasks) <= set(cfg.profile.tasks)
    assert profile.tasks or cfg.experiment.families == []
    if profile.optimizers != "all":
        assert all((CONFIGS / "optimizer" / f"{optimizer}.yaml").exists() for optimizer in profile.optimizers)


def test_families_choose_tasks(compose):
    cfg = compose("experiment=figure_3")
    assert narrowed(cfg.profile, cfg.experiment).tasks == ["gcn_sbm"]
    assert len(cfg.profile.tasks) == 3  # its own stay whole


def test_a_report_is_made_anew_when_what_it_is_made_from_changes(tmp_path, monkeypatch):
    made = []

    def build(root, out):
        made.append(root)
        out.mkdir(exist_ok=True)
        (out / "index.html").write_text("")
        return out / "index.html"

    monkeypatch.setattr(report, "build", build)
    folder = tmp_path / "quick"
    (folder / "runs").mkdir(parents=True)
    for name in ("page/page.css", "page/page.js", "page/index.html.jinja", "curves.py"):
        assert CONFIGS.parent / "analysis" / name in _sources(folder)
    times = 1
    beside = ("../bench/cpu/bench.csv", "../ablation/trust/ablation.csv")
    for path in (None, "runs/t/o/h/summary.json", "tuning/t/o.json", "study/estimators.csv", *beside):
        if path:
            (folder / path).parent.mkdir(parents=True)
            (folder / path).write_text("")
            times += 1
        assert _report(folder) == _report(folder) == folder / "report" / "index.html"
        assert len(made) == times


def reproduce(tmp_path, *overrides):
    place = ("tracker=none", f"results.root={tmp_path}", "device=cpu", "profile.trials=2", "profile.seeds=2")
    command = [sys.executable, "-m", "runners.reproduce", *place, *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_one_figure_makes_its_runs_and_no_others(tmp_path):
    done = reproduce(tmp_path, "experiment=figure_10", "profile.tasks=[gcn_sbm]", "profile.budgets.gcn_sbm.epochs=30")
    assert done.returncode == 0, done.stderr
    path = tmp_path / "quick" / "figures" / "regimes_gcn_sbm.pdf"
    assert done.stdout.splitlines()[-1] == str(path) and path.stat().st_size > 1000
    assert len(list(tmp_path.glob("quick/runs/gcn_sbm/curvature_rescaling/*/summary.json"))) == 4
    assert [folder.name for folder in (tmp_path / "quick" / "runs" / "gcn_sbm").iterdir()] == ["curvature_rescaling"]
    assert not (tmp_path / "quick" / "report").exists()


def test_a_figure_of_the_study_makes_its_table(tmp_path):
    done = reproduce(tmp_path, "experiment=figure_8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "quick" / "figures" / "linear_convergence.pdf")
    assert [path.name for path in (tmp_path / "quick" / "study").glob("*.csv")] == ["linear_convergence.csv"]


def test_a_figure_without_its_data_is_an_error_that_says_where_to_look(tmp_path):
    done = reproduce(tmp_path, "experiment=figure_8", "experiment.figures=[performance_profiles]")
    assert done.returncode == 1 and "has no data for performance_profiles; docs/figures.md says" in done.stderr
