"""One owner per run: threads and processes of this machine, and machines whose clocks and processes mean nothing."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from runners import claim as claims
from runners.claim import OWNER, claim

OTHER_MACHINE = "f" * 16 + " " + "0" * 32


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "results" / "task" / "optimizer" / "hash"


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.05)
    monkeypatch.setattr(claims, "DEAD_AFTER", 0.5)


def owned_by_another_machine(folder):
    folder.mkdir(parents=True)
    (folder / OWNER).write_text(OTHER_MACHINE)
    return folder / OWNER


def test_others_wait_and_what_is_left_empty_goes(folder, capsys):
    order = []

    def other():
        with claim(folder):
            order.append("other")
            (folder / "summary.json").write_text("{}")

    with claim(folder):
        thread = threading.Thread(target=other)
        thread.start()
        while "waiting for another process" not in capsys.readouterr().err:
            time.sleep(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "other"]
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    with claim(folder.with_name("empty")):
        pass
    assert [path.name for path in folder.parent.iterdir()] == ["hash"]


def test_a_killed_owner_is_succeeded_at_once_and_its_torn_files_go(folder):
    hold = f"""
import time
from pathlib import Path
from runners.claim import claim
with claim(Path({str(folder)!r})):
    (Path({str(folder)!r}) / ".metrics.csv.12ab34cd").write_text("half")
    print("held", flush=True)
    time.sleep(60)
"""
    owner = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert len(list(folder.iterdir())) == 2
    began = time.monotonic()
    with claim(folder):
        assert time.monotonic() - began < 2
        assert [path.name for path in folder.iterdir()] == [OWNER]


def test_an_owner_on_another_machine_is_waited_for_as_long_as_its_heart_beats(folder, fast):
    owner = owned_by_another_machine(folder)
    left = []

    def beat():
        for _ in range(20):
            os.utime(owner, (0, time.time() + 1e6))  # whatever that machine's clock says
            time.sleep(0.1)
        left.append(time.monotonic())
        owner.unlink()

    heart = threading.Thread(target=beat)
    heart.start()
    with claim(folder):
        assert left
        assert left[0] <= time.monotonic()
    heart.join()


def test_a_dead_owner_on_another_machine_is_succeeded(folder, fast):
    owned_by_another_machine(folder)
    began = time.monotonic()
    with claim(folder):
        assert time.monotonic() - began > claims.DEAD_AFTER
    assert not folder.exists()


def test_of_many_machines_that_find_an_owner_dead_one_succeeds_at_a_time(folder, fast, monkeypatch):
    """Threads stand in for machines: the kernel's lock does not hold between them."""
    monkeypatch.setattr(claims, "_lock", lambda file, folder: False)
    owned_by_another_machine(folder)
    inside, most, turns = [], [], []

    def machine(i):
        with claim(folder):
            inside.append(i)
            most.append(len(inside))
            time.sleep(0.1)
            turns.append(i)
            inside.remove(i)

    threads = [threading.Thread(target=machine, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(turns) == list(range(6))
    assert max(most) == 1


def test_an_owner_that_was_suspended_and_succeeded_stops(folder, fast, monkeypatch):
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    real, ahead = time.time, [0.0]
    monkeypatch.setattr(claims.time, "time", lambda: real() + ahead[0])
    try:
        with claim(folder):
            (folder / OWNER).write_text(OTHER_MACHINE)
            ahead[0] = 10.0
            assert stopped.wait(5)
        assert (folder / OWNER).read_text() == OTHER_MACHINE, "it is not ours to remove"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_live_owner_stands_against_a_candidate(folder, fast):
    with claim(folder):
        mine = (folder / OWNER).read_text()
        (folder / OWNER).write_text(OTHER_MACHINE)
        time.sleep(0.3)
        assert (folder / OWNER).read_text() == mine
