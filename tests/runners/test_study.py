"""The study of the layer-wise rule: its tables, and what they show."""

import hydra
import numpy as np
import pandas as pd
import pytest
from scipy.stats import linregress

from runners import study
from runners.config import CONFIGS


def test_the_idealised_method_converges_linearly_and_no_slower_than_derived():
    rows = pd.DataFrame(study.linear_convergence(widths=(4,), seeds=2))
    assert list(rows) == ["task", "width", "estimator", "seed", "step", "gap", "rate_derived"]
    assert set(rows.task) == {"least squares", "logistic regression"}
    for _, run in rows.groupby(["task", "seed"]):
        fit = linregress(run.step, np.log(run.gap))
        assert fit.rvalue**2 > 0.9
        assert np.exp(fit.slope) < run.rate_derived.iloc[0] < 1
        if run.task.iloc[0] == "least squares":  # there the bound holds for every single step
            assert (run.gap.to_numpy()[1:] <= run.rate_derived.iloc[0] * run.gap.to_numpy()[:-1]).all()


def test_estimators_agree_with_the_oracle_where_they_are_unbiased(monkeypatch):
    monkeypatch.setattr(study, "TASKS", ("autoencoder_curves_small",))
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        rows = pd.DataFrame(study.estimators(steps=5, draws=30))
    assert list(rows) == ["model", "layer", "estimator", "draws", "relative_bias", "standard_error"]
    assert len(rows) == 6 * len(study.ESTIMATORS)
    assert (rows.relative_bias.abs() <= 5 * rows.standard_error).all()


def test_a_table_is_made_once_and_again_when_the_code_changed(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(study, "TABLES", {"one": lambda: made.append(1) or [{"a": 1}]})
    for _ in range(2):
        study.make_study(tmp_path, ["one", "curves"])
    assert made == [1]
    assert (tmp_path / "one.csv").read_text() == "a\n1\n"
    assert not (tmp_path / "curves.csv").exists()
    (tmp_path / ".one-made-from").write_text("other code")
    study.make_study(tmp_path, ["one"])
    assert made == [1, 1]


@pytest.mark.parametrize("profile", ["quick", "cpu", "paper"])
def test_profiles_name_tables_that_exist(profile):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        assert set(hydra.compose("config", [f"profile={profile}"]).profile.study) == set(study.TABLES)
