"""Loading records: tidy, fast, tolerant, and aware of what cannot be compared."""

import filecmp
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from make_records import HERE, METHODS, Planted, write_committed, write_records, write_run

from analysis.packed import pack
from analysis.reading import AXES, VALUES
from analysis.records import load

TASK = "autoencoder_curves_small"


def folder_of(root, run):
    return root / "runs" / run


def test_committed_records_are_what_the_script_writes(tmp_path):
    write_committed(tmp_path)
    names = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    _, different, missing = filecmp.cmpfiles(tmp_path, HERE / "records", names, shallow=False)
    assert not different and not missing
    assert len(names) == sum(path.is_file() for path in (HERE / "records").rglob("*"))


def test_tables_are_tidy(records):
    assert len(records.finals) == 3 * 4 * 3
    assert len(records.runs) == 36 + 3 * 2 * 4  # two tuned methods, four trials each
    assert list(records.curves.columns) == ["run", *AXES, *VALUES]
    run = records.finals.iloc[0]
    curve = records.curves_by_run[run.run]
    assert len(curve) == 12 and curve.step.iloc[0] == 0
    assert curve.train_loss.iloc[-1] == run.final_train_loss
    assert curve.val_loss.isna().all()  # empty cells
    assert not records.warnings and not len(records.skipped)
    assert records.tasks == [TASK, "cnn_digits", "gcn_sbm"] and records.seeds(TASK) == 3


def test_thousand_runs_are_read_in_time(tmp_path):
    methods = {f"method_{i}": Planted() for i in range(4)}
    write_records(tmp_path, tasks=[f"task_{i}" for i in range(10)], methods=methods, seeds=5, rows=200, trials=0)
    start = time.process_time()  # others may use the machine
    records = load(tmp_path)
    seconds = time.process_time() - start
    assert records.curves.shape[0] == 200 * 200
    assert seconds < 5  # the bound for 1,000 runs of 200 rows; a fifth of them leaves room for a busy machine


def test_broken_folders_are_listed_and_the_rest_is_read(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=2, trials=0)
    base = tmp_path / "runs" / TASK / "sgdm"
    intact, other = sorted(base.iterdir())
    (base / "half").mkdir()
    (base / "half" / "config.yaml").write_text("seed: 0\n")
    (base / "foreign").mkdir()
    (base / "notes.txt").write_text("a file is no folder")
    for name, change in (("newer", {"record_version": 2}), ("keyless", {"seed": None})):
        shutil.copytree(intact, base / name)
        summary = json.loads((intact / "summary.json").read_text()) | change
        if change == {"seed": None}:
            del summary["seed"]
        (base / name / "summary.json").write_text(json.dumps(summary))
    shutil.copytree(intact, base / "empty")
    (base / "empty" / "metrics.csv").write_text("")
    (other / "summary.json").write_text('{"record_version": 1, "sta')
    (tmp_path / "tuning" / TASK).mkdir(parents=True)
    (tmp_path / "tuning" / TASK / "sgdm.json").write_text("{}")
    records = load(tmp_path)
    reasons = {row.folder.split("/")[-1]: row.reason for row in records.skipped.itertuples()}
    assert reasons.pop(other.name) == "summary.json is not JSON"
    assert reasons == {
        "half": "unfinished: no summary.json",
        "foreign": "not a record: no summary.json",
        "newer": "record version 2; this analysis reads version 1",
        "keyless": "summary.json lacks seed",
        "empty": "metrics.csv is missing or unreadable",
        "sgdm.json": "not a search: KeyError 'task'",
    }
    assert len(records.finals) == 7


def test_a_run_that_diverged_before_its_first_evaluation_has_a_curve_of_nothing(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=2, trials=0)
    run = write_run(tmp_path, TASK, "sgdm", 2, Planted(diverges=True))
    table = folder_of(tmp_path, run) / "metrics.csv"
    table.write_text(table.read_text().splitlines()[0] + "\n")
    records = load(tmp_path)
    (row,) = records.curves_by_run[run].itertuples()
    assert row.step == 0 and np.isnan(row.train_loss)


def test_a_finished_run_whose_table_is_cut_is_no_record(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=1, trials=0)
    table = next(tmp_path.glob(f"runs/{TASK}/sgdm/*/metrics.csv"))
    table.write_text("\n".join(table.read_text().splitlines()[:3]) + "\n")
    assert load(tmp_path).skipped.reason.tolist() == ["metrics.csv ends at step 10 of 110"]


@pytest.mark.parametrize(
    "file, change",
    [
        ("summary.json", {"final": [1.0]}),
        ("summary.json", {"tuning": ["lr"]}),
        ("summary.json", {"provenance": "a laptop"}),
        ("config.yaml", {"optimizer": "sgdm"}),
        ("config.yaml", {"profile": "quick"}),
        ("config.yaml", {"optimizer": {"about": "x"}}),
    ],
)
def test_records_of_another_form_are_listed(tmp_path, file, change):
    write_records(tmp_path, tasks=[TASK], seeds=1, trials=0)
    path = next(tmp_path.glob(f"runs/{TASK}/sgdm/*/{file}"))
    read, write = (json.loads, json.dumps) if file.endswith("json") else (yaml.safe_load, yaml.dump)
    path.write_text(write(read(path.read_text()) | change))
    assert load(tmp_path).skipped.reason.tolist() == ["summary.json or config.yaml has another form than records have"]


def test_plain_folders_beside_packed_records_are_told(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=1, trials=0)
    pack(tmp_path / "runs" / TASK, tmp_path / "runs" / f"{TASK}.tar.xz")
    records = load(tmp_path)
    assert len(records.finals) == 4
    assert records.skipped.to_dict("records") == [
        {"folder": f"runs/{TASK}", "reason": "beside packed records, which alone are read"}
    ]


@pytest.mark.parametrize("text", ["", "workload,optimizer\n", "\xff\xfe"])
def test_a_table_beside_the_runs_that_cannot_be_read_is_named(tmp_path, text):
    root = write_records(tmp_path / "quick", tasks=[TASK], seeds=1, trials=0)
    (path := tmp_path / "bench" / "cpu" / "bench.csv").parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"bench/cpu/bench.csv (cannot be read|lacks time_ratio).*make it again"):
        _ = load(root).benches


def test_runs_without_result_are_kept_apart(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=1, trials=0)
    for seed, status in ((1, "interrupted"), (2, "failed")):
        write_run(tmp_path, TASK, "sgdm", seed, METHODS["sgdm"], status=status)
    write_run(tmp_path, TASK, "sgdm", 3, Planted(diverges=True))
    records = load(tmp_path)
    assert sorted(records.finals[records.finals.optimizer == "sgdm"].status) == ["diverged", "finished"]
    assert sorted(records.runs.status.unique()) == ["diverged", "failed", "finished", "interrupted"]


def test_differences_that_forbid_comparison_are_told(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=2, trials=0)
    provenance = {
        "commit": "1" * 40, "dirty": True, "versions": {"python": "3.11.7", "torch": "2.11.0"},
        "device": "another", "driver": None, "threads": 8, "created": "2001-01-01T00:00:00+00:00",
    }  # fmt: skip
    write_run(tmp_path, TASK, "adam", 0, METHODS["sgdm"], provenance=provenance)
    text = "\n".join(load(tmp_path).warnings)
    for part in ("device: another (adam); synthetic (", "threads", "commit", "torch: 2.11.0, 2.13.0", "uncommitted"):
        assert part in text


def test_surrogates_versions_and_budgets_that_differ_are_told(tmp_path):
    write_records(tmp_path, tasks=[TASK, "gcn_sbm"], seeds=2, trials=0)
    for path in tmp_path.glob(f"runs/{TASK}/lw_sgdm/*"):
        summary = json.loads((path / "summary.json").read_text()) | {"surrogate": "Olivetti"}
        (path / "summary.json").write_text(json.dumps(summary))
        config = yaml.safe_load((path / "config.yaml").read_text()) | {"budget": {"epochs": 3}}
        config["optimizer"]["about"]["version"] = 2
        (path / "config.yaml").write_text(yaml.dump(config))
    text = "\n".join(load(tmp_path).warnings)
    assert f"{TASK}: runs differ in surrogate: Olivetti (lw_sgdm); none (adamw, lw_adamw, sgdm)" in text
    assert f"{TASK}: runs differ in the task's settings or the budget" in text
    assert f"lw_sgdm: of several versions: 1 (gcn_sbm); 2 ({TASK})" in text


def test_settings_that_the_search_no_longer_selects_are_set_aside(tmp_path):
    write_records(tmp_path, tasks=[TASK], seeds=2)
    profile = {"name": "test", "tasks": [TASK], "seeds": 2}
    for seed in range(5):  # more seeds, newer, but not what the search chose
        write_run(tmp_path, TASK, "sgdm", seed, METHODS["sgdm"], values={"lr": 0.5}, profile=profile)
    records = load(tmp_path)
    kept = records.finals[records.finals.optimizer == "sgdm"]
    assert len(kept) == 2 and {config["optimizer"]["lr"] for config in kept.config} == {0.1}
    assert records.warnings == [f"{TASK}: 5 runs of sgdm with other settings are set aside"]


def test_a_later_version_comes_before_more_seeds_of_an_earlier_one(tmp_path):
    write_records(tmp_path, tasks=[TASK], methods={"sgdm": METHODS["sgdm"]}, seeds=3, trials=0)
    for seed in range(2):
        folder = tmp_path / "runs" / write_run(tmp_path, TASK, "sgdm", seed, METHODS["sgdm"], values={"lr": 0.2})
        config = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(config.replace("version: 1", "version: 2"))
    kept = load(tmp_path).finals
    assert [config["optimizer"]["about"]["version"] for config in kept.config] == [2, 2]


def test_a_profile_asks_for_its_tasks_and_seeds_whichever_were_run(tmp_path):
    few = {"name": "cpu", "tasks": ["gcn_cora"], "seeds": 2}  # as the command line left it
    write_run(tmp_path, "gcn_cora", "sgdm", 0, METHODS["sgdm"], profile=few, family="gcn")
    declared = yaml.safe_load((Path(__file__).parents[2] / "configs" / "profile" / "cpu.yaml").read_text())
    records = load(tmp_path)
    assert records.tasks == declared["tasks"]
    assert [records.seeds(task) for task in ("gcn_cora", "autoencoder_mnist")] == [10, declared["seeds"]["default"]]
    own = {"name": "mine", "tasks": ["cnn_digits"], "seeds": {"default": 4}}  # in no file of the project
    write_run(tmp_path, "cnn_digits", "sgdm", 0, METHODS["sgdm"], profile=own)
    both = load(tmp_path)
    assert both.tasks == [*declared["tasks"], "cnn_digits"] and both.seeds("cnn_digits") == 4


def test_a_plain_results_folder_without_profile_is_read(tmp_path, planted):
    shutil.copytree(planted / "runs", tmp_path / "results")
    assert len(load(tmp_path / "results").finals) == 36


def test_missing_and_empty_roots(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results folder"):
        load(tmp_path / "nowhere")
    records = load(tmp_path)
    assert not len(records.runs) and records.tasks == [] and records.seeds("any") == 0


def test_layers_and_surrogates(records):
    run = records.finals[records.finals.optimizer == "lw_sgdm"].run.iloc[0]
    layers = records.layers(run)
    assert set(layers.quantity) == {"step_size", "curvature"} and np.isfinite(layers.value).all()
    assert not len(records.layers(records.finals[records.finals.optimizer == "sgdm"].run.iloc[0]))
    assert records.title(TASK) == TASK
    records.runs.loc[records.runs.task == TASK, "surrogate"] = "drawn here"
    try:
        assert records.title(TASK) == f"{TASK} (surrogate data)"
        assert records.surrogate(TASK) == "Surrogate data: drawn here"
    finally:
        records.runs["surrogate"] = None
