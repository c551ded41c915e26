"""Records that are kept with the project: what is copied, and that the committed tables are those of the records."""

import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from make_records import METHODS, write_records, write_run

from analysis import reference, report
from analysis.packed import unpack
from analysis.records import load

COMMITTED = sorted(path.parent for path in (Path(__file__).parents[2] / "results" / "reference").glob("*/runs"))


def test_settled_records_are_kept_and_nothing_else(tmp_path):
    source, target = write_records(tmp_path / "results" / "test", tasks=["gcn_sbm"]), tmp_path / "reference" / "test"
    failed = write_run(source, "gcn_sbm", "sgd", 1, METHODS["sgdm"], status="failed")
    run = next((source / "runs").glob("gcn_sbm/sgdm/*"))
    (run / "checkpoint-100.pt").write_bytes(b"weights")
    (run / "layers.csv").write_text("step,epoch,layer,quantity,value\n0,0.0,fc,raised_dampings,1.0\n")
    stepped = next((source / "runs").glob("gcn_sbm/lw_sgdm/*/layers.csv"))
    beside = [Path("bench", "cpu", "context.csv"), Path("ablation", "trust", "ablation.csv")]
    for path in beside:
        (source.parent / path).parent.mkdir(parents=True)
        (source.parent / path).write_text("task,optimizer,trust,n,diverged,train_loss_mean\n")
    (target / "runs").mkdir(parents=True)
    (target / "runs" / "of an earlier day").touch()

    assert reference.keep(source, target) == target / "report" / "index.html"
    assert [path.name for path in (target / "runs").iterdir()] == ["gcn_sbm.tar.xz"]
    with unpack(target / "runs") as place:
        kept = Path(place)
        assert (kept / run.relative_to(source / "runs") / "metrics.csv").read_bytes() == (
            run / "metrics.csv"
        ).read_bytes()
        assert not (kept / run.relative_to(source / "runs") / "layers.csv").exists()
        assert (kept / stepped.relative_to(source / "runs")).read_bytes() == stepped.read_bytes()
        assert not list(kept.rglob("checkpoint*"))
        assert not (kept / failed).exists()
    assert all((target.parent / path).exists() for path in beside)
    assert sorted(path.name for path in target.parent.iterdir()) == ["ablation", "bench", "test"]


def test_packed_records_are_read_like_others_and_packed_again_to_the_same_bytes(tmp_path):
    source = write_records(tmp_path / "plain", tasks=["gcn_sbm", "cnn_digits"])
    reference.keep(source, tmp_path / "packed")
    plain, packed = load(source), load(tmp_path / "packed")
    assert packed.skipped.equals(plain.skipped)
    for name in ("runs", "curves", "trials", "tunings"):
        pd.testing.assert_frame_equal(getattr(packed, name), getattr(plain, name))
    run = plain.methods["gcn_sbm"]["lw_sgdm"].run.iloc[0]
    assert len(packed.layers(run))
    assert packed.layers(run).equals(plain.layers(run))
    archive = (tmp_path / "packed" / "runs" / "cnn_digits.tar.xz").read_bytes()
    for path in source.rglob("*"):
        os.utime(path)
    reference.keep(source, tmp_path / "packed")
    assert (tmp_path / "packed" / "runs" / "cnn_digits.tar.xz").read_bytes() == archive


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    for damage in (b"", b"no archive", b"\xfd7zXZ\x00 and no more"):
        (tmp_path / "runs" / "gcn_sbm.tar.xz").write_bytes(damage)
        with pytest.raises(ValueError, match=r"gcn_sbm.tar.xz is damaged .*git checkout"):
            load(tmp_path)
    with pytest.raises(ValueError, match="packed already"):
        reference.keep(tmp_path, tmp_path / "reference")


def test_a_folder_without_runs_replaces_nothing(tmp_path):
    (tmp_path / "reference").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no finished runs in .*; type make reproduce-paper PROFILE=cpu"):
        reference.keep(tmp_path / "cpu", tmp_path / "reference")
    assert (tmp_path / "reference").exists()


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_tables_are_those_of_the_committed_records(folder, tmp_path):
    root = tmp_path / "reference" / folder.name
    shutil.copytree(folder, root, ignore=shutil.ignore_patterns("report"))
    for beside in ("bench", "ablation"):
        shutil.copytree(folder.parent / beside, root.parent / beside)
    rebuilt = report.build(root).parent
    for path in [*sorted((folder / "report" / "tables").glob("*.csv")), folder / "report" / "claims.json"]:
        assert path.read_text() == (rebuilt / path.relative_to(folder / "report")).read_text(), path.name
