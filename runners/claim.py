"""One owner per run: a lock that frees itself when its owner dies, on this machine or on another one.

The owner holds the file `.owner` in the run's folder. Processes of one machine are kept apart by the kernel, which
forgets a lock with its holder, however that one died. Machines that share the folder but not the kernel go by the
file's heartbeat: the owner writes its name there every `BEAT` seconds, and one that has not for `DEAD_AFTER` seconds,
as the waiting machine's own clock counts them, is dead. Process numbers and clocks of two machines are never compared.

Two machines that find the same owner dead agree as in Fischer's algorithm: write your name, wait until every other
such writer has written its own, and the name that stands is the new owner's. An owner that was suspended for so long
that it was taken for dead finds another name when it wakes, and stops as if by SIGTERM.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

OWNER = ".owner"
BEAT = 5.0  # seconds
DEAD_AFTER = 60.0  # seconds without a beat; more than file systems on a network take to show one


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Have the folder of a run to oneself: another process that claims it waits.

    What a dead owner left half-written goes, and so does the folder if it is left empty.
    """
    path = folder / OWNER
    me = f"{_machine()} {uuid.uuid4().hex}"
    file = _acquire(path, me)
    released = threading.Event()
    heart = threading.Thread(target=_beat, args=(file, me, released), daemon=True)
    heart.start()
    try:
        for torn in folder.glob(".*.*"):
            torn.unlink(missing_ok=True)
        yield
    finally:
        released.set()
        heart.join()
        if _name(file) == me:
            path.unlink(missing_ok=True)
        os.close(file)
        with contextlib.suppress(OSError):  # not empty
            for parent in (folder, folder.parent, folder.parent.parent):  # run, optimizer, task
                parent.rmdir()


def _acquire(path: Path, me: str) -> int:
    """Wait until the file carries one's own name; returns it, open and locked."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # an owner that left has taken the empty folder along
            path.parent.mkdir(parents=True, exist_ok=True)
            file = _open(path, me)
            locked = _lock(file, path.parent)
            if _is_at(file, path):  # and not removed by an owner that left meanwhile
                owner = _name(file)
                if owner == me:
                    return file
                if locked and owner.startswith(_machine()):
                    _write(file, me)
                    return file
                if _outlives(file, path, me):
                    return file
            os.close(file)


def _open(path: Path, me: str) -> int:
    """The owner's file; where there is none, one that appears with one's own name in it."""
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        mine.write_text(me)
        with contextlib.suppress(FileExistsError):
            os.link(mine, path)
    finally:
        mine.unlink(missing_ok=True)
    return os.open(path, os.O_RDWR)


def _lock(file: int, folder: Path) -> bool:
    """Wait for the kernel's lock; False on file systems that have none."""
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that makes {folder}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _outlives(file: int, path: Path, me: str) -> bool:
    """Watch an owner on another machine: True once it is dead and its place is ours, False once it has left."""
    owner, pulse, since = _name(file), _pulse(file), time.monotonic()
    print(f"waiting for another machine that makes {path.parent}", file=sys.stderr)
    while time.monotonic() - since < DEAD_AFTER:
        time.sleep(BEAT / 5)
        if not _is_at(file, path) or _name(file) != owner:
            return False
        if _pulse(file) != pulse:
            pulse, since = _pulse(file), time.monotonic()
    _write(file, me)
    time.sleep(2 * BEAT)
    return _is_at(file, path) and _name(file) == me


def _beat(file: int, me: str, released: threading.Event) -> None:
    """Say that one is alive; stop the process if it was taken for dead."""
    last = time.time()
    while not released.wait(BEAT):
        suspended = time.time() - last > DEAD_AFTER / 2
        if suspended and _name(file) != me:
            print("another process has taken this run over while this one was suspended", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            _write(file, me)  # also over a candidate's name: who is alive stays
        last = time.time()


def _write(file: int, name: str) -> None:
    os.pwrite(file, name.encode(), 0)


def _name(file: int) -> str:
    return os.pread(file, 100, 0).decode(errors="replace")


def _pulse(file: int) -> int:
    return os.fstat(file).st_mtime_ns


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _machine() -> str:
    """The same for all processes of one running kernel, and another after it was started anew; names nobody."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        kernel = f"{uuid.getnode()}"
    return hashlib.sha256(kernel.encode()).hexdigest()[:16]
