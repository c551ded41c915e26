"""A small share of `tests.cluster.survival`: one run, killed in every way."""

import random

import pytest

from tests.cluster import survival

EVERY = 0.1  # seconds between checkpoints


def test_what_is_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    shorter = [value.replace("epochs=25", "epochs=8") for value in survival.SCENARIOS["run"]]
    monkeypatch.setitem(survival.SCENARIOS, "run", shorter)
    tally = survival.Tally()
    (tmp_path / "reference").mkdir()
    reference = survival.uninterrupted("run", tmp_path / "reference", EVERY)
    dice = random.Random(0)
    try:
        with survival.disk() as place:
            survival.survive("run", 4, survival.WAYS, place, reference, dice, EVERY, tally)
    except PermissionError:  # without a disk of one's own to fill
        survival.survive("run", 3, survival.WAYS[:3], tmp_path, reference, dice, EVERY, tally)
    assert tally.survived == tally.tried
    assert tally.tried.total() >= 1


def test_a_half_written_file_is_noticed(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0.0\n")
    survival.look(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0.0\n1,")
    with pytest.raises(survival.Torn, match="half written"):
        survival.look(tmp_path)
