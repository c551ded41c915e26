"""Figures: what they show is what the records say. Content is checked, not pixels."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from make_records import METHODS, Planted, write_records, write_run

from analysis import figures, statistics, tables
from analysis.records import AXES, load
from analysis.style import STYLES, order, style

TASK = "cnn_digits"


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def lines_of(axis) -> dict:
    """Lines of methods by optimizer."""
    return {line.get_gid(): line for line in axis.get_lines() if line.get_gid()}


@pytest.mark.parametrize("axis", AXES)
def test_curves_show_the_mean_and_the_band_of_the_seeds(records, axis):
    drawn = figures.curves(records, TASK, axis)
    loss, accuracy = drawn.figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("Training loss", "Test accuracy (%)")
    labels = {"epoch": "Epoch", "step": "Step", "train_seconds": "Training time (s)"}
    assert loss.get_xlabel() == labels.get(axis, "Gradient equivalents")
    assert set(lines_of(loss)) == set(METHODS) and len(loss.collections) == len(METHODS)
    runs = records.finals[(records.finals.task == TASK) & (records.finals.optimizer == "lw_sgdm")]
    curves = [records.curves_by_run[run] for run in runs.run]
    line = lines_of(accuracy)["lw_sgdm"]
    assert line.get_ydata() == pytest.approx(100 * np.mean([curve.test_metric for curve in curves], axis=0))
    assert line.get_xdata() == pytest.approx(np.mean([curve[axis] for curve in curves], axis=0))
    data = drawn.data[drawn.data.optimizer == "lw_sgdm"]
    assert data.train_loss_low.to_numpy() == pytest.approx(np.min([curve.train_loss for curve in curves], axis=0))
    assert data.train_loss_high.to_numpy() == pytest.approx(np.max([curve.train_loss for curve in curves], axis=0))
    words = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert words == ["Layer-wise", "LW-SGDm", "LW-AdamW", "First order", "SGD-m", "AdamW"]
    assert drawn.name == f"curves_{axis}_{TASK}" and TASK in drawn.figure.get_suptitle()
    assert "LW-AdamW" in drawn.alt


def test_a_diverged_seed_ends_the_mean_and_is_told(tmp_path):
    write_records(tmp_path, tasks=[TASK], methods={"sgdm": METHODS["sgdm"]}, trials=0)
    profile = {"name": "test", "tasks": [TASK], "seeds": 3}
    for seed in range(3):
        write_run(tmp_path, TASK, "adamw", seed, Planted(diverges=seed == 1), profile=profile)
    records = load(tmp_path)
    drawn = figures.curves(records, TASK, "epoch")
    assert drawn.data.groupby("optimizer").evaluation.count().to_dict() == {"sgdm": 12, "adamw": 4}
    assert "AdamW (1/3 div.)" in [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert any(line.get_marker() == "x" for line in drawn.figure.axes[0].get_lines())
    table = tables.results(records).set_index("optimizer")
    assert table.diverged.to_dict() == {"sgdm": 0, "adamw": 1} and np.isnan(table.train_loss_mean["adamw"])
    costs = tables.costs_to_target(records)
    diverged = costs[(costs.optimizer == "adamw") & (costs.seed == 1)]
    assert np.isinf(diverged[list(tables.COSTS)]).all(axis=None)


def test_time_axis_of_contended_runs_says_so(tmp_path):
    methods = {"sgdm": Planted(contended=True), "lw_sgdm": Planted()}
    records = load(write_records(tmp_path, tasks=[TASK], methods=methods, trials=0))
    assert "made beside other runs" in figures.curves(records, TASK, "train_seconds").figure.axes[0].get_xlabel()
    assert "beside" not in figures.curves(records, TASK, "epoch").figure.axes[0].get_xlabel()
    profile = figures.performance_profiles(records)
    assert set(profile.data.cost) == {"gradient_equivalents", "step"}
    assert figures.cost(records).data.time_ratio.isna().all()


def test_step_sizes_have_a_line_per_layer_and_the_tuned_rates(records):
    drawn = figures.step_sizes(records, TASK)
    assert [axis.get_title(loc="left") for axis in drawn.figure.axes] == ["LW-SGDm", "LW-AdamW"]
    axis = drawn.figure.axes[0]
    assert len(axis.get_lines()) == 3 + 2 and axis.get_yscale() == "log"
    rates = [line.get_ydata() for line in axis.get_lines()[3:]]
    assert all(np.allclose(rate, 0.1) for rate in rates)
    runs = records.finals[(records.finals.task == TASK) & (records.finals.optimizer == "lw_sgdm")]
    layers = pd.concat([records.layers(run) for run in runs.run])
    layers = layers[(layers.quantity == "step_size") & (layers.layer == "encoder.0")]
    expected = layers.groupby("step").value.median()
    assert axis.get_lines()[0].get_ydata() == pytest.approx(expected.to_numpy())
    words = [text.get_text() for text in drawn.figure.legends[0].get_texts()]
    assert {"encoder.0", "encoder.2", "decoder.0", "SGD-m", "AdamW"} <= set(words)


def test_a_stepwise_schedule_is_drawn_as_such(records):
    config = {"optimizer": {"lr": 0.1}, "schedule": {"_target_": "StepLR", "step_size": 4, "gamma": 0.1}}
    rate = figures.scheduled_rate(config, 110.0, records, TASK, "sgdm")  # 10 steps an epoch, 11 epochs
    assert rate[rate.index < 40].to_numpy() == pytest.approx(0.1)
    assert rate[rate.index > 81].to_numpy() == pytest.approx(0.001)
    cosine = {"optimizer": {"lr": 0.1}, "schedule": {"_target_": "CosineAnnealingLR", "T_max": 9}}
    assert figures.scheduled_rate(cosine, 110.0, records, TASK, "sgdm") is None


def test_sensitivity_shows_every_trial(records):
    drawn = figures.sensitivity(records, TASK)
    axis = drawn.figure.axes[0]
    lines = lines_of(axis)
    assert set(lines) == set(METHODS) and axis.get_xscale() == "log" and axis.get_xlabel() == "Learning rate"
    assert lines["sgdm"].get_xdata() == pytest.approx([0.001, 0.01, 0.1, 1.0])
    trials = drawn.data[drawn.data.optimizer == "sgdm"].sort_values("rate")
    assert np.isinf(trials.train_loss.iloc[-1]) and (trials.status.iloc[-1] == "diverged")
    assert lines["sgdm"].get_ydata()[:3] == pytest.approx(trials.train_loss[:3].to_numpy())
    flat = lines["lw_sgdm"].get_ydata()
    runs = records.finals[(records.finals.task == TASK) & (records.finals.optimizer == "lw_sgdm")]
    assert flat == pytest.approx([runs.final_train_loss.mean()] * 2)


def test_best_of_k_starts_at_zero_trials(records):
    drawn = figures.best_of_k(records, TASK)
    sgdm = drawn.data[(drawn.data.optimizer == "sgdm") & (drawn.data.measure == "train_loss")]
    assert sgdm.k.tolist() == [1, 2, 3, 4]
    trials = figures.trial_values(records, TASK)
    trials = trials[trials.optimizer == "sgdm"]
    expected = statistics.best_of_k(trials.score, trials.train_loss, larger=True)[1]
    assert sgdm["median"].to_numpy() == pytest.approx(expected)
    assert drawn.data[drawn.data.optimizer == "lw_sgdm"].k.tolist() == [0, 0]


def test_performance_profiles_equal_the_definition(records):
    drawn = figures.performance_profiles(records)
    assert len(drawn.figure.axes) == 6
    costs = tables.median_costs(tables.costs_to_target(records), "train_loss", "step")
    line = lines_of(drawn.figure.axes[2])["lw_sgdm"]
    share = statistics.performance_profile(costs.to_numpy(), line.get_xdata())[:, list(costs.columns).index("lw_sgdm")]
    assert line.get_ydata() == pytest.approx(share)
    areas = drawn.data[(drawn.data.measure == "train_loss") & (drawn.data.cost == "step")].set_index("optimizer").area
    assert areas[costs.columns].to_numpy() == pytest.approx(statistics.profile_area(costs.to_numpy()))


def test_targets_are_the_median_of_tuned_sgdm(records):
    targets = tables.targets(records)[TASK]
    runs = records.finals[(records.finals.task == TASK) & (records.finals.optimizer == "sgdm")]
    assert targets["train_loss"] == pytest.approx(runs.final_train_loss.median())
    costs = tables.costs_to_target(records)
    run = runs.iloc[0]
    mine = costs[(costs.task == TASK) & (costs.optimizer == "sgdm") & (costs.seed == run.seed)]
    curve = records.curves_by_run[run.run]
    reached = curve[curve.train_loss <= targets["train_loss"]]
    expected = reached.step.iloc[0] if len(reached) else np.inf
    assert mine[mine.measure == "train_loss"].step.item() == expected


def test_cost_is_relative_to_sgdm(records):
    drawn = figures.cost(records)
    ratios = drawn.data[drawn.data.task == TASK].set_index("optimizer")
    assert ratios.time_ratio["lw_sgdm"] == pytest.approx(1.8) and ratios.memory_ratio["lw_adamw"] == pytest.approx(1.2)
    assert [text.get_text() for text in drawn.figure.axes[0].get_yticklabels()][:2] == ["LW-SGDm", "LW-AdamW"]


def test_figures_without_their_data_are_left_out(tmp_path):
    write_records(tmp_path, tasks=[TASK], methods={"adamw": METHODS["adamw"]}, trials=0)
    records = load(tmp_path)
    assert figures.step_sizes(records, TASK) is None and figures.sensitivity(records, TASK) is None
    assert figures.performance_profiles(records) is None and figures.cost(records) is None


def test_styles_are_fixed_and_distinct():
    assert len({(s.color, str(s.line), s.marker) for s in STYLES.values()}) == len(STYLES)
    in_black_and_white = {(str(s.line), s.marker, s.bold) for s in STYLES.values()}
    assert len(in_black_and_white) == len(STYLES)
    assert style("a_peer") == style("a_peer") and style("lw_other").bold and not style("a_peer").bold
    assert order(["a_peer", "adamw", "lw_sgdm"]) == ["lw_sgdm", "adamw", "a_peer"]


def test_results_table_by_hand(records):
    table = tables.results(records).set_index(["task", "optimizer"])
    runs = records.finals[(records.finals.task == TASK) & (records.finals.optimizer == "sgdm")]
    row = table.loc[(TASK, "sgdm")]
    assert row.train_loss_mean == pytest.approx(runs.final_train_loss.mean())
    assert row.train_loss_std == pytest.approx(runs.final_train_loss.std(ddof=1))
    assert (row.n, row.trials, row.on_edge) == (3, 4, False)
    assert table.loc[(TASK, "lw_sgdm")].trials == 0


def test_settings_table_is_read_from_the_records(records):
    table = tables.settings(records)
    rate = table[(table.task == TASK) & (table.optimizer == "sgdm") & (table.field == "lr")].iloc[0]
    assert (rate.search_low, rate.search_high, rate.source, rate.trials) == (1e-3, 1.0, "synthetic", 4)
    assert rate.selected == 0.1 and rate.value == "0.1" and np.isfinite(rate.score)
    momentum = table[(table.task == TASK) & (table.optimizer == "lw_sgdm") & (table.field == "momentum")].iloc[0]
    assert momentum.value == "0.9" and momentum.trials == 0 and np.isnan(momentum.search_low)


def test_latex_and_markdown():
    table = pd.DataFrame({"Task": ["a_b", "a_b", "c"], "Method": ["x & y", "50 %", "z"], "Loss": ["1 ± 2", "∞", "–"]})
    latex = tables.to_latex(table)
    assert r"a\_b & x \& y & 1 $\pm$ 2 \\" in latex and r" & 50 \% & $\infty$ \\" in latex
    assert latex.count(r"\midrule") == 2 and latex.startswith(r"\begin{tabular}{llr}")
    assert tables.to_markdown(table).splitlines()[2] == "| a_b | x & y | 1 ± 2 |"


def test_draw_some_figures_by_name(records, tmp_path):
    drawn = figures.draw_all(records, tmp_path, ["cost", f"sensitivity_{TASK}"])
    names = {f"{name}.{end}" for name in ("cost", f"sensitivity_{TASK}") for end in ("png", "pdf", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == names and drawn[0].name == "cost"
    with pytest.raises(ValueError, match="no figure nonsense; there are performance_profiles, cost"):
        figures.draw_all(records, tmp_path, ["nonsense"])
