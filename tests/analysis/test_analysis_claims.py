"""Verdicts follow from records: they flip when records are planted, and fall to "not tested" when they are deleted."""

import json
import re
import shutil
from pathlib import Path

import pytest
from make_records import METHODS, Planted, write_records, write_run

from analysis import claims
from analysis.records import load

TASKS = ("cnn_digits", "gcn_sbm")
YES, NO, UNTESTED = claims.REPRODUCED, claims.NOT_REPRODUCED, claims.NOT_TESTED
ALL = METHODS | {
    "kfac": Planted(final=0.33, seconds=0.03, memory=2.0), "shampoo": Planted(final=0.34, seconds=0.04),
    "kbfgs": Planted(final=0.31, seconds=0.02), "kbfgs_l": Planted(final=0.31, seconds=0.02),
    "mbf": Planted(final=0.31, seconds=0.012), "tnt": Planted(final=0.33, seconds=0.02),
    "sgd": Planted(final=0.5, seconds=0.0095), "adam": Planted(final=0.33, seconds=0.011),
    "layer_specific": Planted(final=0.4, seconds=0.0098), "back_matching": Planted(final=0.4),
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
    assert untested == {("LW-6", "insensitivity"), ("LW-7", "experiment"), ("AD-2", "experiment")}
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
        ("LS-1", "test_metric", "layer_specific", Planted(final=0.52)),
        ("BM-1", "train_loss", "back_matching", Planted(final=0.52)),
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
    assert verdict["caveat"] == "the mean is worse by more than the margin on gcn_sbm (n = 3), but not significantly"
    assert judged["LW-1"]["verdicts"][1]["caveat"] == ""


def test_insensitivity_needs_two_decades_of_one_field(tmp_path):
    profile = {"name": "test", "tasks": ["gcn_sbm"], "seeds": 2}
    for method in ("lw_sgdm", "lw_adamw"):
        for rate, final in ((0.01, 0.30), (0.1, 0.29), (1.0, 0.31)):
            for seed in range(2):
                write_run(tmp_path, "gcn_sbm", method, seed, Planted(final=final), values={"lr": rate}, profile=profile)
    assert verdicts(tmp_path)["LW-6", "insensitivity"] == YES
    for seed in range(2):
        write_run(tmp_path, "gcn_sbm", "lw_sgdm", seed, Planted(final=0.9), values={"lr": 10.0}, profile=profile)
    assert verdicts(tmp_path)["LW-6", "insensitivity"] == NO


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

    assert claims.margin(pd.Series([10.0, 10.0]), accuracy=False) == pytest.approx(0.2)
    assert claims.margin(pd.Series([0.1, 0.1]), accuracy=False) == pytest.approx(0.01)
    assert claims.margin(pd.Series([0.9, 0.9]), accuracy=True) == pytest.approx(0.005)
