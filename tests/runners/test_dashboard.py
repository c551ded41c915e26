"""Workspaces: what they show is what the mirror logs, and saving them again replaces them."""

import json
import shutil
from pathlib import Path

import pytest
from wandb_server import Server

from runners import dashboard
from runners.config import ConfigError
from runners.tracking import AXES

RECORDS = Path(__file__).parents[1] / "analysis" / "records"


def spec_of(workspace) -> dict:
    section = workspace._model.spec.model_dump(by_alias=True, exclude_none=True)["section"]
    return {part["name"]: part["panels"] for part in section["panelBankConfig"]["sections"]} | {"all": section}


@pytest.fixture(scope="module")
def spec():
    found = dashboard.workspaces(RECORDS, "project", "entity")
    assert list(found) == ["autoencoder_curves_small", "gcn_sbm"]
    return spec_of(found["gcn_sbm"])


def test_curves_of_every_measure_against_every_axis_by_method(spec):
    curves = [panel["config"] for panel in spec["Curves"]]
    shown = {(curve["xAxis"], *curve["metrics"]) for curve in curves}
    measures = ("train_loss", "test_loss", "test_accuracy")
    assert shown == {(axis, prefix + measure) for axis, prefix in AXES.items() for measure in measures}
    assert {curve["groupBy"] for curve in curves} == {"optimizer.value.about.label"}
    assert [curve["yLogScale"] for curve in curves] == 6 * [True] + 3 * [False]
    assert curves[1]["chartTitle"] == "Train loss against training seconds"


def test_step_sizes_cost_and_claims(spec):
    (sizes,) = spec["Step size of each layer"]
    assert sizes["config"]["metricRegex"] == "step_size/.*" and sizes["config"]["yLogScale"]
    costs = [panel["config"]["metrics"] for panel in spec["Cost"]]
    names = ("seconds_per_step", "peak_memory_bytes", "train_seconds")
    assert costs == [[f"summary_metrics.{name}"] for name in names]
    (claims,) = spec["Claims"]
    text = claims["config"]["value"]
    assert "| LW-1 LW-SGDm, untuned, is at least as good" in text and text.count("\n") >= 14 + 1
    assert "not tested" in text and "| reproduced |" in text


def test_runs_are_the_tasks_final_ones_in_the_methods_colours(spec):
    (runs,) = spec["all"]["runSets"]
    told = json.dumps(runs["filters"])
    for part in ("task", "gcn_sbm", "profile", "records", "holdout", "false"):
        assert part in told
    assert any("LW-SGDm" in key and color == "#d55e00" for key, color in spec["all"]["customRunColors"].items())


@pytest.fixture
def config(compose, tmp_path):
    shutil.copytree(RECORDS, tmp_path / "results" / "quick")
    return compose("tracker=wandb_offline", f"tracker.dir={tmp_path}")


def test_saving_twice_replaces_the_views(config, monkeypatch, tmp_path, capsys):
    server = Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    dashboard.save(config)
    first = capsys.readouterr().out
    assert len(server.views) == 2 and first.count("\n") == 2
    assert f"gcn_sbm: {server.environment['WANDB_BASE_URL']}/tester/layerwise-steps?nw=" in first
    dashboard.save(config)
    assert len(server.views) == 2 and capsys.readouterr().out == first
    server.views.clear()  # deleted by hand
    dashboard.save(config)
    assert len(server.views) == 2
    view = next(iter(server.views.values()))
    assert view["displayName"] == "autoencoder_curves_small, quick" and "by_work/train_loss" in view["spec"]
    server.close()


def test_without_a_login_the_error_says_what_to_type(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"no login at W&B \(.*\); type wandb login, then make wandb-dashboard again"):
        dashboard.save(config)
