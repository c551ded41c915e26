"""A small share of `tests.cluster.survival`: one run, killed in every way."""

import contextlib
import random
import shutil

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
    with contextlib.ExitStack() as stack:
        try:
            place, ways = stack.enter_context(survival.disk()), survival.WAYS
        except PermissionError:  # without a disk of one's own to fill
            place, ways = tmp_path, survival.WAYS[:3]
        while not tally.tried.total():  # a call that ends before its kills says nothing
            survival.survive("run", len(ways), ways, place, reference, dice, EVERY, tally)
            shutil.rmtree(place / "results")
    assert tally.survived == tally.tried


def test_a_half_written_file_is_noticed(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0.0\n")
    survival.look(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,epoch\n0,0.0\n1,")
    with pytest.raises(survival.Torn, match="half written"):
        survival.look(tmp_path)
