"""Verdicts follow from records: they flip when records are planted, and fall to "not tested" when they are deleted."""

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from make_records import METHODS, Planted, write_records, write_run

from analysis import claims, comparisons, tables
from analysis.records import load
from analysis.verdicts import NOT_REPRODUCED, NOT_TESTED, REPRODUCED

TASKS = ("cnn_digits", "gcn_sbm")
YES, NO, UNTESTED = REPRODUCED, NOT_REPRODUCED, NOT_TESTED
ALL = METHODS | {
    "lw_sgdm": Planted(final=0.25, seconds=0.018, memory=1.1),
    "lw_adamw": Planted(final=0.23, seconds=0.019, memory=1.2),
    "kfac": Planted(final=0.33, seconds=0.03, memory=2.0), "shampoo": Planted(final=0.34, seconds=0.04),
    "kbfgs": Planted(final=0.31, seconds=0.02), "kbfgs_l": Planted(final=0.31, seconds=0.02),
    "mbf": Planted(final=0.31, seconds=0.012), "tnt": Planted(final=0.33, seconds=0.02),
    "sgd": Planted(final=0.5, seconds=0.0095), "adam": Planted(final=0.33, seconds=0.011),
    "layer_specific": Planted(final=0.3, seconds=0.0098), "back_matching": Planted(final=0.3),
    "curvature_rescaling": Planted(final=0.45, seconds=0.0145, memory=1.9),
}  # fmt: skip


def verdicts(root, only: str = "") -> dict:
    """{(claim, measure): verdict}, of all claims or of one."""
    records = load(root)
    judged = {claim.id: claim.test(records, claim) for claim in claims.CLAIMS if only in ("", claim.id)}
    return {(name, v.measure): v.verdict for name, found in judged.items() for v in found}


def planted(root, methods=METHODS, **options):
    options = {"tasks": TASKS, "trials": 0} | options
    return write_records(root, methods=methods, **options)


def test_every_claim_of_the_protocol_is_declared():
    ids = "LW-1 LW-2 LW-3 LW-4 LW-5 LW-6 LW-7 MBF-1 MBF-2 QN-1 LS-1 BM-1 AD-1 AD-2"
    assert " ".join(claim.id for claim in claims.CLAIMS) == ids
    assert all(claim.sentence and claim.source for claim in claims.CLAIMS)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """Every method of every claim, planted as the claims say."""
    tasks = ("autoencoder_curves_small", "gcn_sbm")
    return planted(tmp_path_factory.mktemp("good"), ALL, tasks=tasks)


def test_with_all_methods_planted_well_all_testable_claims_hold(good):
    found = verdicts(good)
    untested = {key for key, verdict in found.items() if verdict == UNTESTED}
    assert untested == {("LW-6", "insensitivity"), ("LW-7", "linear convergence"), ("AD-2", "two regimes")}
    assert {found[key] for key in found if key not in untested} == {YES}


@pytest.mark.parametrize(
    "claim, measure, method, bad",
    [
        ("LW-1", "train_loss", "lw_sgdm", Planted(final=0.6)),
        ("LW-1", "test_metric", "lw_sgdm", Planted(final=0.6)),
        ("LW-2", "train_loss", "lw_adamw", Planted(final=0.28, diverges=True)),
        ("LW-4", "time per step", "lw_sgdm", Planted(final=0.3, seconds=0.024)),
        ("LW-5", "peak memory", "lw_adamw", Planted(final=0.28, memory=1.6)),
        ("MBF-1", "time per step", "mbf", Planted(final=0.3, seconds=0.02)),
        ("MBF-2", "train_loss", "mbf", Planted(final=0.6)),
        ("LS-1", "test_metric", "layer_specific", Planted(final=0.42)),
        ("BM-1", "train_loss", "back_matching", Planted(final=0.42)),
        ("AD-1", "cost per step", "curvature_rescaling", Planted(seconds=0.03, memory=2.0)),
    ],
)
def test_a_planted_worse_method_flips_the_verdict(tmp_path, good, claim, measure, method, bad):
    profile = {"name": "test", "tasks": ["autoencoder_curves_small", "gcn_sbm"], "seeds": 3}
    shutil.copytree(good, tmp_path / "bad")
    shutil.rmtree(tmp_path / "bad" / "runs" / "gcn_sbm" / method)
    for seed in range(3):
        write_run(tmp_path / "bad", "gcn_sbm", method, seed, bad, profile=profile)
    assert verdicts(good, claim)[claim, measure] == YES
    assert verdicts(tmp_path / "bad", claim)[claim, measure] == NO


def test_loss_and_metric_are_judged_apart(tmp_path):
    planted(tmp_path, METHODS | {"lw_sgdm": Planted(final=0.6)})
    for path in tmp_path.glob("runs/*/lw_sgdm/*/summary.json"):
        summary = json.loads(path.read_text())
        summary["final"]["test_accuracy"] = 0.99
        path.write_text(json.dumps(summary))
    found = verdicts(tmp_path)
    assert found["LW-1", "train_loss"] == NO and found["LW-1", "test_metric"] == YES


def test_deleting_records_makes_claims_not_tested(tmp_path):
    planted(tmp_path)
    assert verdicts(tmp_path)["LW-1", "train_loss"] == YES
    one = next((tmp_path / "runs" / "gcn_sbm" / "lw_sgdm").iterdir())
    shutil.move(one, tmp_path / "kept")
    found = verdicts(tmp_path)
    assert {found["LW-1", "train_loss"], found["LW-4", "time per step"], found["LW-5", "peak memory"]} == {UNTESTED}
    assert found["LW-2", "train_loss"] == YES
    shutil.move(tmp_path / "kept", one)
    shutil.rmtree(tmp_path / "runs" / "gcn_sbm")  # a whole task of the profile
    assert verdicts(tmp_path)["LW-2", "train_loss"] == UNTESTED
    shutil.rmtree(tmp_path / "runs")
    assert set(verdicts(tmp_path).values()) == {UNTESTED}


def test_what_can_be_compared_is_shown_beside_what_is_missing(tmp_path, good):
    shutil.copytree(good, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "runs" / "gcn_sbm" / "kfac")
    for claim in claims.judge(load(tmp_path / "part")):
        for verdict in claim["verdicts"]:
            rows = {(row["task"], row.get("rival")) for row in verdict["rows"]}
            assert ("gcn_sbm", "kfac") not in rows
            if claim["id"] == "MBF-2":
                assert verdict["verdict"] == UNTESTED
                assert {("gcn_sbm", "shampoo"), ("autoencoder_curves_small", "kfac")} < rows and len(rows) == 7
                reason = "kfac has 0 of 3 seeds on gcn_sbm; 7 of the 7 comparisons that there are hold"
                assert verdict["reason"] == reason
            if claim["id"] == "QN-1":
                assert verdict["verdict"] == YES  # it is about autoencoders alone


def test_a_benchmark_without_a_method_does_not_hide_its_runs(tmp_path):
    root = planted(tmp_path / "quick", METHODS | {"mbf": ALL["mbf"]})
    shutil.rmtree(root / "runs" / "gcn_sbm" / "mbf")
    bench(root, sgdm=1, lw_sgdm=1.9)
    (claim,) = [claim for claim in claims.CLAIMS if claim.id == "MBF-1"]
    (verdict,) = claim.test(load(root), claim)
    assert verdict.verdict == UNTESTED and [row["task"] for row in verdict.rows] == ["cnn_digits"]
    assert verdict.reason == "mbf has 0 of 3 seeds on gcn_sbm; 1 of the 1 comparisons that there are hold"


def test_interrupted_runs_do_not_count(tmp_path):
    planted(tmp_path, seeds=2)
    write_run(tmp_path, TASKS[0], "lw_sgdm", 2, METHODS["lw_sgdm"], status="interrupted")
    for path in tmp_path.glob("runs/*/*/*/config.yaml"):  # the profile asks for three
        path.write_text(re.sub("seeds: .", "seeds: 3", path.read_text()))
    assert verdicts(tmp_path)["LW-1", "train_loss"] == UNTESTED


def test_contended_runs_never_enter_time_claims(tmp_path):
    beside = {name: Planted(**(vars(one) | {"contended": name == "lw_sgdm"})) for name, one in ALL.items()}
    planted(tmp_path, beside, tasks=["gcn_sbm"])
    found = verdicts(tmp_path)
    assert found["LW-4", "time per step"] == found["LW-3", "train_loss"] == UNTESTED
    assert found["LW-1", "train_loss"] == found["LW-5", "peak memory"] == YES


def test_equal_time_decides_lw3(tmp_path):
    """A method that is better per step but four times as slow loses at equal training time."""
    slow = ALL | {"lw_sgdm": Planted(final=0.3, rate=2.0, seconds=0.2)}
    planted(tmp_path, slow, tasks=["gcn_sbm"])
    found = verdicts(tmp_path)
    assert found["LW-3", "train_loss"] == NO and found["LW-1", "train_loss"] == YES


def test_differences_that_few_seeds_cannot_resolve_are_told(tmp_path):
    planted(tmp_path, tasks=("gcn_sbm",))
    for seed, path in enumerate(sorted(tmp_path.glob("runs/gcn_sbm/lw_sgdm/*/summary.json"))):
        summary = json.loads(path.read_text())
        summary["final"]["train_loss"] = (0.4, 0.6, 1.6)[seed]  # worse on average, spread wide
        path.write_text(json.dumps(summary))
    judged = {claim["id"]: claim for claim in claims.judge(load(tmp_path))}
    verdict = judged["LW-1"]["verdicts"][0]
    assert verdict["verdict"] == YES
    shown = "shown not to be worse by more than the margin (p ≤ 0.05) in {} of 1"
    worse = "the mean is worse by more than the margin on gcn_sbm (n = 3), but not significantly; "
    assert verdict["caveat"] == worse + shown.format(0)
    assert judged["LW-1"]["verdicts"][1]["caveat"] == shown.format(1)


def ablation(root, name, losses, diverged=0):
    """An ablation of LW-SGDm on one task: final training losses by the value of a setting."""
    folder = root.parent / "ablation" / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"task,optimizer,{name},n,diverged,train_loss_mean"]
    rows += [f"gcn_sbm,lw_sgdm,{value},3,{diverged},{loss}" for value, loss in losses.items()]
    (folder / "ablation.csv").write_text("\n".join(rows) + "\n")


def test_insensitivity_needs_two_decades_of_one_setting(tmp_path):
    root = planted(tmp_path / "quick", {"lw_sgdm": Planted()}, tasks=["gcn_sbm"])
    key = ("LW-6", "insensitivity")
    ablation(root, "sigma", {0.5: 0.9, 2: 0.1})
    ablation(root, "joint_trust", {0: 0.9, "null": 0.1})
    ablation(root, "stretch", {1.5: 0.1, 4: 0.1, 1e9: 0.1})  # no sweep over decades: without a bound
    assert verdicts(root)[key] == UNTESTED
    ablation(root, "trust", {0.001: 0.30, 0.01: 0.31, 0.1: 0.32})
    assert verdicts(root)[key] == YES
    ablation(root, "trust", {0.001: 0.011, 0.01: 0.002, 0.1: 0.001})
    assert verdicts(root)[key] == YES  # within the protocol's floor
    ablation(root, "trust", {0.001: 0.36, 0.01: 0.31, 0.1: 0.32})
    assert verdicts(root)[key] == NO
    ablation(root, "trust", {0.001: 0.30, 0.01: 0.30, 0.1: 0.30}, diverged=1)
    assert verdicts(root)[key] == NO


@pytest.fixture
def contended(tmp_path):
    """Runs without any usable time, and a benchmark beside the results folder."""
    beside = {name: Planted(**(vars(one) | {"contended": True})) for name, one in ALL.items()}
    planted(tmp_path / "quick", beside, tasks=["gcn_sbm"])
    return tmp_path / "quick"


def bench(root, **times):
    """A benchmark of one workload with these times relative to SGD-m's."""
    folder = root.parent / "bench" / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["workload,optimizer,time_ratio,memory_ratio,steps,refused", "gcn_cora,kfac,,,,no time left"]
    rows += [f"gcn_cora,{name},{ratio},1.1,40," for name, ratio in times.items()]
    (folder / "bench.csv").write_text("\n".join(rows) + "\n")


def test_time_claims_fall_back_on_the_benchmark(contended):
    claim = claims.CLAIMS[3]
    (verdict,) = claim.test(load(contended), claim)
    assert claim.id == "LW-4" and verdict.verdict == UNTESTED and "no benchmark (make bench)" in verdict.reason
    bench(contended, sgdm=1, lw_sgdm=1.9, lw_adamw=2.1)
    (verdict,) = claim.test(load(contended), claim)
    assert verdict.verdict == YES and verdict.reason == "holds in all 2 comparisons of the benchmark"
    row = verdict.rows[1]
    assert (row["task"], row["ratio"], row["n"]) == ("gcn_cora (cpu)", 2.1, 40)
    bench(contended, sgdm=1, lw_sgdm=1.9, lw_adamw=2.4)
    assert verdicts(contended, "LW-4")["LW-4", "time per step"] == NO
    bench(contended, sgdm=1, lw_sgdm=1.9)
    assert verdicts(contended, "LW-4")["LW-4", "time per step"] == UNTESTED
    (verdict,) = claim.test(load(contended), claim)
    assert verdict.reason.endswith("; 1 of the 1 comparisons that there are of the benchmark hold")
    bench(contended, sgdm=1, lw_sgdm=2.4)  # too high decides, whatever is missing
    assert verdicts(contended, "LW-4")["LW-4", "time per step"] == NO
    bench(contended, sgdm=1, curvature_rescaling=1.6)
    assert verdicts(contended, "AD-1")["AD-1", "cost per step"] == YES
    bench(contended, sgdm=1, curvature_rescaling=2.4)
    assert verdicts(contended, "AD-1")["AD-1", "cost per step"] == NO


def test_costs_on_a_gpu_are_no_multiples_of_those_on_a_cpu(tmp_path):
    planted(tmp_path, tasks=["gcn_sbm"])
    assert verdicts(tmp_path, "LW-5")["LW-5", "peak memory"] == YES
    for path in tmp_path.glob("runs/gcn_sbm/lw_sgdm/*/summary.json"):
        path.write_text(path.read_text().replace('"driver": null', '"driver": "580"'))
    records = load(tmp_path)
    (verdict,) = claims.CLAIMS[4].test(records, claims.CLAIMS[4])
    assert verdict.verdict == UNTESTED
    assert verdict.reason.startswith("of lw_sgdm and sgdm on gcn_sbm one was run on a GPU, the other on a CPU")
    ratios = tables.results(records).set_index("optimizer").memory_ratio
    assert ratios.isna()["lw_sgdm"] and not ratios.isna()["lw_adamw"]


def test_costs_of_runs_count_beside_the_benchmark(tmp_path):
    root = planted(tmp_path / "quick", METHODS | {"lw_adamw": Planted(memory=1.4)}, tasks=["gcn_sbm"])
    bench(root, sgdm=1, lw_sgdm=1.9, lw_adamw=2.1)
    claim = claims.CLAIMS[4]
    (verdict,) = claim.test(load(root), claim)
    assert claim.id == "LW-5" and verdict.verdict == NO
    assert (
        verdict.reason == "1 of 4 of the runs and the benchmark fail: lw_adamw needs more memory than sgdm on gcn_sbm"
    )


@pytest.mark.parametrize("observed, expected", [(0.9, YES), (0.96, NO)])
def test_linear_convergence_is_judged_by_the_derived_rate(tmp_path, observed, expected):
    (tmp_path / "study").mkdir()
    rows = [f"mlp,8,exact,{seed},{step},{3 * observed**step},0.95" for seed in range(2) for step in range(40)]
    text = "\n".join(["task,width,estimator,seed,step,gap,rate_derived", *rows])
    (tmp_path / "study" / "linear_convergence.csv").write_text(text)
    assert verdicts(tmp_path, "LW-7")["LW-7", "linear convergence"] == expected


def test_slower_than_linear_is_not_linear(tmp_path):
    (tmp_path / "study").mkdir()
    rows = [f"mlp,8,exact,0,{step},{1 / (1 + step) ** 2},1.0" for step in range(0, 4000, 40)]
    text = "\n".join(["task,width,estimator,seed,step,gap,rate_derived", *rows])
    (tmp_path / "study" / "linear_convergence.csv").write_text(text)
    assert verdicts(tmp_path, "LW-7")["LW-7", "linear convergence"] == NO


def test_regimes_are_judged_from_the_trials(tmp_path):
    profile = {"name": "test", "tasks": ["gcn_sbm"], "seeds": 2}

    def trial(rate, final, size):
        name = write_run(tmp_path, "gcn_sbm", "curvature_rescaling", 0, Planted(final=final), values={"lr": rate},
                         holdout=True, profile=profile)  # fmt: skip
        layers = f"step,epoch,layer,quantity,value\n10,1,all,step_size,{size}\n20,2,all,step_size,{size}\n"
        (tmp_path / "runs" / name / "layers.csv").write_text(layers)

    write_run(tmp_path, "gcn_sbm", "curvature_rescaling", 0, Planted(), profile=profile)
    trial(0.5, final=0.2, size=0.1)
    assert verdicts(tmp_path, "AD-2")["AD-2", "two regimes"] == UNTESTED
    trial(1.9, final=0.4, size=0.9)
    assert verdicts(tmp_path, "AD-2")["AD-2", "two regimes"] == YES
    trial(1.8, final=0.1, size=0.9)
    assert verdicts(tmp_path, "AD-2")["AD-2", "two regimes"] == NO


def test_numbers_and_json(tmp_path):
    planted(tmp_path, METHODS | {"sgdm": Planted(diverges=True)})
    judged = claims.judge(load(tmp_path))
    claims.write(judged, tmp_path / "claims.json")
    text = Path(tmp_path / "claims.json").read_text()
    first = json.loads(text)[0]
    row = first["verdicts"][0]["rows"][0]
    assert row["difference"] == "-inf" and row["theirs"] is None and row["n"] == 3 and row["holds"] is True
    assert "NaN" not in text and "Infinity" not in text
    assert first["verdicts"][0]["verdict"] == YES


def test_margins():
    import pandas as pd

    assert comparisons.margin(pd.Series([10.0, 10.0]), accuracy=False) == pytest.approx(0.2)
    assert comparisons.margin(pd.Series([0.1, 0.1]), accuracy=False) == pytest.approx(0.01)
    assert comparisons.margin(pd.Series([0.9, 0.9]), accuracy=True) == pytest.approx(0.005)


def reason(root, claim="LW-1", measure="train_loss"):
    records = load(root)
    (found,) = [c for c in claims.CLAIMS if c.id == claim]
    (verdict,) = [v for v in found.test(records, found) if v.measure == measure]
    return f"{verdict.verdict}: {verdict.reason}"


def rewrite(root, method, change):
    """Change configs and summaries of a method's final runs: `change(config, summary)`."""
    for path in root.glob(f"runs/*/{method}/*/summary.json"):
        summary, config = json.loads(path.read_text()), yaml.safe_load((path.parent / "config.yaml").read_text())
        change(config, summary)
        path.write_text(json.dumps(summary))
        (path.parent / "config.yaml").write_text(yaml.dump(config))


def test_what_is_not_the_same_problem_is_not_compared(tmp_path):
    def longer(config, summary):
        config["budget"] = {"epochs": 200}

    def other_data(config, summary):
        summary["surrogate"] = "Olivetti"

    def larger_batch(config, summary):
        config["task"]["batch_size"] = 1000

    def to_be_tuned(config, summary):
        config["optimizer"]["search"] = {"lr": {"gcn": [0.001, 1.0]}}

    changes = [(longer, "another task or budget"), (larger_batch, "another task or budget"), (other_data, "other data")]
    for number, (change, what) in enumerate(changes):
        root = planted(tmp_path / str(number), tasks=["gcn_sbm"])
        rewrite(root, "lw_sgdm", change)
        assert f"{UNTESTED}: one of lw_sgdm and sgdm on gcn_sbm was run with {what}" in reason(root)
    rewrite(root := planted(tmp_path / "tuned", tasks=["gcn_sbm"]), "sgdm", to_be_tuned)
    assert f"{UNTESTED}: sgdm on gcn_sbm was not tuned" in reason(root)


def test_times_of_other_machines_are_not_compared(tmp_path):
    def faster(config, summary):
        summary["provenance"]["device"] = "fast"

    root = planted(tmp_path, ALL, tasks=["gcn_sbm"])
    rewrite(root, "lw_sgdm", faster)
    assert "one of lw_sgdm and kfac on gcn_sbm was run with another device" in reason(root, "LW-3")
    assert reason(root, "LW-4", "time per step").startswith(UNTESTED)
    assert reason(root).startswith(YES)  # of losses it says nothing
    assert tables.results(load(root)).set_index("optimizer").time_ratio.isna()["lw_sgdm"]


def test_too_few_common_seeds_are_not_compared(tmp_path):
    root = planted(tmp_path, tasks=["gcn_sbm"])
    for seed in (3, 4):
        write_run(
            root, "gcn_sbm", "sgdm", seed, METHODS["sgdm"], profile={"name": "test", "tasks": ["gcn_sbm"], "seeds": 3}
        )
    for path in root.glob("runs/gcn_sbm/sgdm/*/summary.json"):
        if json.loads(path.read_text())["seed"] < 2:
            shutil.rmtree(path.parent)
    assert f"{UNTESTED}: lw_sgdm and sgdm share 1 of 3 seeds on gcn_sbm" in reason(root)


def test_who_diverges_more_often_is_not_as_good_however_few_the_seeds(tmp_path):
    root = planted(tmp_path / "ours", tasks=["gcn_sbm"])
    diverging = Planted(final=0.1, diverges=True)
    profile = {"name": "test", "tasks": ["gcn_sbm"], "seeds": 3}

    def diverge(root, method, seeds):
        for path in root.glob(f"runs/gcn_sbm/{method}/*/summary.json"):
            if json.loads(path.read_text())["seed"] in seeds:
                shutil.rmtree(path.parent)
        for seed in seeds:
            write_run(root, "gcn_sbm", method, seed, diverging, profile=profile)

    diverge(root, "lw_sgdm", [0])
    assert reason(root).startswith(
        f"{NO}: 1 of 1 fail: lw_sgdm is worse by more than the margin or diverges more often than sgdm"
    )
    diverge(root, "sgdm", [0])  # level again, and better on the two others
    assert reason(root).startswith(YES)
    diverge(root, "sgdm", [1, 2])
    assert reason(root).startswith(YES)
    diverge(root, "lw_sgdm", [1, 2])
    assert f"{UNTESTED}: lw_sgdm and sgdm both diverged on gcn_sbm, but for one seed at most" in reason(root)
