"""Figures: what they show is what the records say. Content is checked, not pixels."""

import json
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from make_records import METHODS, Planted, write_records, write_run

from analysis import costs, curves, figures, searches, statistics, study, tables
from analysis.records import load
from analysis.style import GROUPS, STYLES, group, order, style

TASK = "cnn_digits"


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def lines_of(axis) -> dict:
    """Lines of methods by optimizer."""
    return {line.get_gid(): line for line in axis.get_lines() if line.get_gid()}


def names_in(axis) -> list[str]:
    """The names beside a panel's lines."""
    return [text.get_text() for text in axis.texts]


@pytest.mark.parametrize("axis", figures.DRAWN_AXES)
def test_curves_show_the_mean_and_the_band_of_the_seeds(records, axis):
    drawn = curves.curves(records, TASK, axis)
    loss, accuracy = drawn.figure.axes
    assert (loss.get_title(loc="left"), accuracy.get_title(loc="left")) == ("Training loss", "Test accuracy (%)")
    labels = {"epoch": "Epoch", "train_seconds": "Training time (s)"}
    assert loss.get_xlabel() == labels.get(axis, "Gradient equivalents")
    assert set(lines_of(loss)) == set(METHODS) and len(loss.collections) == len(METHODS) + 1  # leads to names
    runs = records.finals[(records.finals.task == TASK) & (records.finals.optimizer == "lw_sgdm")]
    seeds = [records.curves_by_run[run] for run in runs.run]
    line = lines_of(accuracy)["lw_sgdm"]
    assert line.get_ydata() == pytest.approx(100 * np.mean([curve.test_metric for curve in seeds], axis=0))
    assert line.get_xdata() == pytest.approx(np.mean([curve[axis] for curve in seeds], axis=0))
    data = drawn.data[drawn.data.optimizer == "lw_sgdm"]
    assert data.train_loss_low.to_numpy() == pytest.approx(np.min([curve.train_loss for curve in seeds], axis=0))
    assert data.train_loss_high.to_numpy() == pytest.approx(np.max([curve.train_loss for curve in seeds], axis=0))
    assert names_in(loss) == ["LW-SGDm", "LW-AdamW", "SGD-m", "AdamW"]
    assert drawn.name == f"curves_{axis}_{TASK}" and TASK in drawn.figure.get_suptitle()
    assert "LW-AdamW" in drawn.alt


def test_a_diverged_seed_ends_the_mean_and_is_told(tmp_path):
    write_records(tmp_path, tasks=[TASK], methods={"sgdm": METHODS["sgdm"]}, trials=0)
    profile = {"name": "test", "tasks": [TASK], "seeds": 3}
    for seed in range(3):
        write_run(tmp_path, TASK, "adamw", seed, Planted(diverges=seed == 1), profile=profile)
    records = load(tmp_path)
    drawn = curves.curves(records, TASK, "epoch")
    assert drawn.data.groupby("optimizer").evaluation.count().to_dict() == {"sgdm": 12, "adamw": 4}
    assert "AdamW (1/3 div.)" in names_in(drawn.figure.axes[0])
    assert any(line.get_marker() == "x" for line in drawn.figure.axes[0].get_lines())
    table = tables.results(records).set_index("optimizer")
    assert table.diverged.to_dict() == {"sgdm": 0, "adamw": 1} and np.isnan(table.train_loss_mean["adamw"])
    costs = tables.costs_to_target(records)
    diverged = costs[(costs.optimizer == "adamw") & (costs.seed == 1)]
    assert np.isinf(diverged[list(tables.COSTS)]).all(axis=None)


def test_time_axis_of_contended_runs_says_so(tmp_path):
    methods = {"sgdm": Planted(contended=True), "lw_sgdm": Planted()}
    records = load(write_records(tmp_path, tasks=[TASK], methods=methods, trials=0))
    assert "made beside other runs" in curves.curves(records, TASK, "train_seconds").figure.axes[0].get_xlabel()
    assert "beside" not in curves.curves(records, TASK, "epoch").figure.axes[0].get_xlabel()
    profile = costs.performance_profiles(records)
    assert set(profile.data.cost) == {"gradient_equivalents", "step"} and len(profile.figure.axes) == 2
    cost = costs.cost(records)
    assert cost.data.time_ratio.isna().all() and len(cost.figure.axes) == 1
    assert any("make bench" in text.get_text() for text in cost.figure.texts)


def test_step_sizes_have_a_line_per_layer_and_the_tuned_rates(records):
    drawn = curves.step_sizes(records, TASK)
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
    rate = curves.scheduled_rate(config, 110.0, records, TASK, "sgdm")  # 10 steps an epoch, 11 epochs
    assert rate[rate.index < 40].to_numpy() == pytest.approx(0.1)
    assert rate[rate.index > 81].to_numpy() == pytest.approx(0.001)
    cosine = {"optimizer": {"lr": 0.1}, "schedule": {"_target_": "CosineAnnealingLR", "T_max": 9}}
    assert curves.scheduled_rate(cosine, 110.0, records, TASK, "sgdm") is None


def test_sensitivity_shows_every_trial(records):
    drawn = searches.sensitivity(records, TASK)
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
    drawn = searches.best_of_k(records, TASK)
    sgdm = drawn.data[(drawn.data.optimizer == "sgdm") & (drawn.data.measure == "train_loss")]
    assert sgdm.k.tolist() == [1, 2, 3, 4]
    trials = searches.trial_values(records, TASK)
    trials = trials[trials.optimizer == "sgdm"]
    expected = statistics.best_of_k(trials.score, trials.train_loss, larger=True)[1]
    assert sgdm["median"].to_numpy() == pytest.approx(expected)
    assert drawn.data[drawn.data.optimizer == "lw_sgdm"].k.tolist() == [0, 0]


def test_performance_profiles_equal_the_definition(records):
    drawn = costs.performance_profiles(records)
    titles = [axis.get_title(loc="left") for axis in drawn.figure.axes]
    assert titles[1] == "Share of tasks\ngradient equivalents to training loss" and len(titles) == 4
    table = tables.median_costs(tables.costs_to_target(records), "train_loss", "gradient_equivalents")
    axis = drawn.figure.axes[1]
    line = lines_of(axis)["lw_sgdm"]
    share = statistics.performance_profile(table.to_numpy(), line.get_xdata())[:, list(table.columns).index("lw_sgdm")]
    assert line.get_ydata() == pytest.approx(share) and axis.get_xlabel() == "τ (times the best)"
    areas = drawn.data[drawn.data.measure == "train_loss"].set_index(["cost", "optimizer"]).area
    expected = statistics.profile_area(table.to_numpy())
    assert areas["gradient_equivalents"][table.columns].to_numpy() == pytest.approx(expected)
    assert f"LW-SGDm {expected[list(table.columns).index('lw_sgdm')]:.2f}" in names_in(axis)


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
    drawn = costs.cost(records)
    ratios = drawn.data[drawn.data.task == TASK].set_index("optimizer")
    assert ratios.time_ratio["lw_sgdm"] == pytest.approx(1.8) and ratios.memory_ratio["lw_adamw"] == pytest.approx(1.2)
    assert [text.get_text() for text in drawn.figure.axes[0].get_yticklabels()][:2] == ["LW-SGDm", "LW-AdamW"]


def test_figures_without_their_data_are_left_out(tmp_path):
    write_records(tmp_path, tasks=[TASK], methods={"adamw": METHODS["adamw"]}, trials=0)
    records = load(tmp_path)
    assert curves.step_sizes(records, TASK) is None and searches.sensitivity(records, TASK) is None
    assert costs.performance_profiles(records) is None and costs.cost(records) is None


def test_many_methods_are_drawn_a_group_to_a_panel_with_the_layerwise_ones_in_each(tmp_path):
    methods = {name: METHODS.get(name, METHODS["sgdm"]) for members in GROUPS.values() for name in members}
    write_records(tmp_path, tasks=[TASK], methods=methods, seeds=2, trials=0)
    drawn = curves.curves(load(tmp_path), TASK, "epoch")
    heads = [axis.get_title(loc="left") for axis in drawn.figure.axes]
    assert heads == 2 * ["First order", "Adaptive rates", "Second order"]
    assert [axis.get_ylabel() for axis in drawn.figure.axes] == ["Training loss", "", "", "Test accuracy (%)", "", ""]
    assert len({axis.get_ylim() for axis in drawn.figure.axes[:3]}) == 1  # comparable across panels
    for axis, head in zip(drawn.figure.axes, heads, strict=True):
        assert set(lines_of(axis)) == {*GROUPS["Layer-wise"], *GROUPS[head]} and len(names_in(axis)) <= 11
        heights = sorted(text.get_position()[1] for text in axis.texts)
        assert np.diff(heights).min() * axis.get_position().height * drawn.figure.get_figheight() * 72 > 8  # points


def test_the_benchmark_is_drawn_beside_the_runs_cost(tmp_path):
    write_records(tmp_path / "quick", tasks=[TASK], methods={"sgdm": METHODS["sgdm"]}, trials=0)
    (tmp_path / "bench" / "cuda").mkdir(parents=True)
    rows = [
        "workload,optimizer,time_ratio,memory_ratio,steps,refused",
        "gcn_cora,sgdm,1,1,9,",
        "gcn_cora,lw_sgdm every=10,1.1,1.2,9,",
    ]
    rows += ["resnet,sgdm,1,1,9,", "resnet,lw_sgdm every=10,1.21,1.3,9,", "resnet,kfac,,,,no time left"]
    (tmp_path / "bench" / "cuda" / "bench.csv").write_text("\n".join(rows) + "\n")
    records = load(tmp_path / "quick")
    assert "bench_cuda" in figures.jobs(records)
    drawn = costs.bench(records, "cuda")
    time, memory = drawn.figure.axes
    names = [text.get_text() for text in time.get_yticklabels()]
    assert names == ["SGD-m", "lw_sgdm every=10"] and time.get_xlabel() == "times SGD-m"
    assert time.get_title(loc="left") == "Time per step" and memory.get_title(loc="left") == "Peak memory"
    assert "lw_sgdm every=10 1.15 × time, 1.25 × memory" in drawn.alt  # geometric means
    assert len(drawn.data) == 4


def test_regimes_have_a_line_per_run_and_scale(tmp_path):
    profile = {"name": "test", "tasks": [TASK], "seeds": 2}
    for rate in (0.5, 1.5):
        for seed in range(2):
            write_run(
                tmp_path, TASK, "curvature_rescaling", seed, METHODS["sgdm"], values={"lr": rate}, profile=profile
            )
    records = load(tmp_path)
    drawn = curves.regimes(records, TASK)
    loss, _ = drawn.figure.axes
    assert [line.get_gid() for line in loss.get_lines()] == ["0.5", "0.5", "1.5", "1.5"]
    shown = {tuple(line.get_ydata()) for line in loss.get_lines()}
    assert shown == {tuple(records.curves_by_run[run].train_loss) for run in records.runs.run}
    assert curves.regimes(load(write_records(tmp_path / "none", tasks=[TASK], trials=0)), TASK) is None


def test_linear_convergence_shows_every_run_and_the_derived_rate(records, tmp_path):
    steps, rows = np.arange(0, 50, 5), []
    for width, rate in ((8, 0.9), (16, 0.95)):
        for seed in range(2):
            rows += [("quadratic", width, "exact", seed, step, 3.0 * rate**step, rate) for step in steps]
    table = pd.DataFrame(rows, columns=["task", "width", "estimator", "seed", "step", "gap", "rate_derived"])
    assert study.linear_convergence(records) is None
    drawn = study.linear_convergence(with_study(tmp_path, "linear_convergence", table))
    (axis,) = drawn.figure.axes
    lines = lines_of(axis)
    assert set(lines) == {"8 exact 0", "8 exact 1", "16 exact 0", "16 exact 1", "derived 8", "derived 16"}
    assert lines["8 exact 1"].get_ydata() == pytest.approx(3.0 * 0.9**steps) and axis.get_yscale() == "log"
    assert lines["derived 16"].get_ydata() == pytest.approx(3.0 * 0.95 ** lines["derived 16"].get_xdata())
    assert "width 8, exact 0.9," in drawn.alt and axis.get_ylabel() == "Training loss above the best known"
    pd.testing.assert_frame_equal(drawn.data, table, check_dtype=False)


def test_estimators_show_bias_and_spread_by_layer(records, tmp_path):
    rows = [("mlp", layer, name, 100, bias, 0.01) for layer in ("fc1", "fc2")
            for name, bias in (("sampled Fisher", 0.002), ("empirical Fisher", -0.4))]  # fmt: skip
    table = pd.DataFrame(rows, columns=["model", "layer", "estimator", "draws", "relative_bias", "standard_error"])
    assert study.estimators(records) is None
    drawn = study.estimators(with_study(tmp_path, "estimators", table))
    (axis,) = drawn.figure.axes
    assert [text.get_text() for text in axis.get_yticklabels()] == ["fc1", "fc2"]
    assert axis.get_title(loc="left") == "mlp"
    bars = {container.get_label(): container for container in axis.containers}
    points, _, (spread,) = bars["empirical Fisher"].lines
    assert points.get_xdata().tolist() == [-0.4, -0.4]
    assert spread.get_segments()[0][:, 0] == pytest.approx([-0.42, -0.38])
    assert "mlp, empirical Fisher -0.4" in drawn.alt


def with_study(root, name, table):
    (root / "study").mkdir()
    table.to_csv(root / "study" / f"{name}.csv", index=False)
    return load(root)


def test_styles_are_fixed_and_distinct():
    assert len({(s.color, str(s.line), s.marker) for s in STYLES.values()}) == len(STYLES)
    in_black_and_white = {(str(s.line), s.marker, s.bold) for s in STYLES.values()}
    assert len(in_black_and_white) == len(STYLES)
    for name, members in GROUPS.items():  # drawn in one panel with the layer-wise methods, whose bases share a colour
        colors = [look.color for optimizer, look in members.items() if optimizer not in ("sgdm", "adamw")]
        accents = [] if name == "Layer-wise" else [look.color for look in GROUPS["Layer-wise"].values()]
        assert len({*colors, *accents}) == len(colors) + len(accents)
    assert style("a_peer") == style("a_peer") and style("lw_other").bold and not style("a_peer").bold
    assert order(["a_peer", "adamw", "lw_sgdm"]) == ["lw_sgdm", "adamw", "a_peer"]
    assert group("soap", "first_order") == "Second order" and group("a_peer", "first_order") == "First order"


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
    assert latex.count(r"\midrule") == 1 and latex.startswith(r"\begin{tabular}{llr}")
    parted = tables.to_latex(table, "lp{2cm}r", long=True)
    assert parted.count(r"\midrule") == 2 and r"\endhead" in parted and r" & 50 \%" in parted.splitlines()[6]
    assert parted.startswith(r"\begin{longtable}{lp{2cm}r}")
    assert tables.to_markdown(table).splitlines()[2] == "| a_b | x & y | 1 ± 2 |"


def test_draw_some_figures_by_name(records, tmp_path):
    drawn = figures.draw_all(records, tmp_path, ["cost", f"sensitivity_{TASK}"])
    names = {f"{name}.{end}" for name in ("cost", f"sensitivity_{TASK}") for end in ("png", "pdf", "csv")}
    assert {path.name for path in tmp_path.iterdir()} == names and drawn[0].name == "cost"
    assert figures.chosen(records, ["sensitivity", "cost"])[-2:] == ["sensitivity_gcn_sbm", "cost"]
    with pytest.raises(ValueError, match="no figure nonsense; there are performance_profiles, cost"):
        figures.draw_all(records, tmp_path, ["nonsense"])


def test_the_ring_is_at_the_trial_that_was_selected(tmp_path):
    """Of equal scores the search took the lower validation loss, and so do the ring and the best of k."""
    root = write_records(tmp_path, tasks=[TASK], methods={"sgdm": METHODS["sgdm"]})
    path = root / "tuning" / TASK / "sgdm.json"
    search = json.loads(path.read_text())
    for trial in search["trials"][:3]:
        trial["score"] = 1.0
    search["selected"] = search["trials"][1]["values"]
    for number, trial in enumerate(search["trials"][:3]):
        summary = root / "runs" / "/".join(Path(trial["folder"]).parts[-3:]) / "summary.json"
        told = json.loads(summary.read_text())
        told["final"] |= {"val_loss": [3.0, 1.0, 2.0][number], "train_loss": [30.0, 10.0, 20.0][number]}
        summary.write_text(json.dumps(told))
    path.write_text(json.dumps(search))
    records = load(root)
    trials = searches.trial_values(records, TASK)
    assert trials[trials.selected].rate.tolist() == [0.01]
    best = searches.best_of_k(records, TASK).data
    assert best[(best.measure == "train_loss") & (best.k == 4)]["median"].tolist() == [10.0]


def test_a_trial_whose_run_is_lost_is_not_drawn_as_diverged(tmp_path):
    root = write_records(tmp_path, tasks=[TASK], methods={"sgdm": METHODS["sgdm"]})
    search = json.loads((root / "tuning" / TASK / "sgdm.json").read_text())
    shutil.rmtree(root / "runs" / "/".join(Path(search["trials"][0]["folder"]).parts[-3:]))
    assert len(searches.trial_values(load(root), TASK)) == 3


def test_a_profile_of_performance_says_whom_it_leaves_out(tmp_path):
    root = write_records(tmp_path, tasks=[TASK, "gcn_sbm"])
    for seed in range(3):
        write_run(root, TASK, "adam", seed, METHODS["adamw"])
    figure = costs.performance_profiles(load(root)).figure
    assert "Left out: 1 method that did not run on every task." in " ".join(text.get_text() for text in figure.texts)


def test_the_edge_is_told_of_the_field_that_lies_on_it():
    on_edge = [tables.is_on_edge(value, 0.01, 1.0) for value in (0.01, 0.015, 0.1, 0.7, 1.0, None)]
    assert on_edge == [True, True, False, True, True, False]
