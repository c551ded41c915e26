import json

import pytest
import torch

from data.files import replace_file
from runners import record
from runners.memory import traced_peak


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "summary.json"
    record.write_json(path, {"status": "finished"})

    def torn(file):
        file.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, torn)
    assert json.loads(path.read_text()) == {"status": "finished"}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_tables_keep_every_bit_and_leave_undefined_cells_empty(tmp_path):
    path = tmp_path / "metrics.csv"
    record.write_table(path, ("step", "val_loss", "train_loss"), [(0, None, 0.1 + 0.2)])
    assert path.read_text() == "step,val_loss,train_loss\n0,,0.30000000000000004\n"
    assert record.read_table(path) == [{"step": "0", "val_loss": "", "train_loss": "0.30000000000000004"}]


def test_json_has_no_numbers_that_json_does_not_know(tmp_path):
    record.write_json(tmp_path / "a.json", {"x": float("inf"), "y": [float("nan"), 1.0]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1.0]}


@pytest.mark.parametrize("status", ["finished", "diverged", "interrupted", "failed"])
def test_only_results_are_done(tmp_path, status):
    assert not record.is_done(tmp_path)
    (tmp_path / "summary.json").write_text("{ torn")
    assert not record.is_done(tmp_path)
    record.write_json(tmp_path / "summary.json", {"status": status})
    assert record.is_done(tmp_path) == (status in ("finished", "diverged"))


def test_final_is_the_last_row_and_best_follows_each_column(tmp_path):
    def row(loss, accuracy):
        return dict.fromkeys(record.columns("accuracy"), None) | {"train_loss": loss, "test_accuracy": accuracy}

    final, best = record.final_and_best([row(2.0, 0.3), row(1.0, 0.9), row(1.5, 0.5)], "accuracy", "max")
    assert (final["train_loss"], final["test_accuracy"], final["val_loss"]) == (1.5, 0.5, None)
    assert (best["train_loss"], best["test_accuracy"], best["val_loss"]) == (1.0, 0.9, None)
    assert record.final_and_best([row(1.0, 3.0), row(2.0, 5.0)], "accuracy", "min")[1]["test_accuracy"] == 3.0


def test_traced_peak_counts_what_lives_at_one_time():
    def work():
        kept = torch.empty(1000)  # 4000 bytes
        for _ in range(3):
            torch.empty(2000)  # 8000 bytes, freed at once
        return kept

    assert traced_peak(work) == 12000


def test_a_disk_that_fills_is_named_with_the_file(tmp_path):
    def write(file):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.csv'"):
        replace_file(tmp_path / "metrics.csv", write)
