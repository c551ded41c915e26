"""A Slurm of one's own: two nodes on the loopback interface, from a scratch folder."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


class Slurm:
    """Runs while entered.

    Attributes:
        environment: for commands that are to use it.
    """

    def __init__(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="slurm-"))  # of mode 0700
        self.environment = os.environ | {"SLURM_CONF": str(self.scratch / "slurm.conf")}
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Slurm:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for job in self.jobs():
            subprocess.run(["scancel", "--signal=KILL", job], env=self.environment, capture_output=True)
        for name in reversed(self.daemons):
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(10)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _start(self) -> None:
        at = self.scratch
        template = Path(__file__).with_name("slurm.conf").read_text()
        host = socket.gethostname().partition(".")[0]
        (at / "slurm.conf").write_text(template.replace("@SCRATCH@", str(at)).replace("@HOST@", host))
        (at / "munge.key").write_bytes(secrets.token_bytes(128))
        (at / "munge.key").chmod(0o400)
        for folder in ("state", "spool.n1", "spool.n2"):
            (at / folder).mkdir()
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
        files |= {"log-file": "munge.log", "seed-file": "munge.seed"}
        munge = [f"--{option}={at / name}" for option, name in files.items()]
        self._daemon("munged", ["munged", "--foreground", "--force", *munge])
        self._daemon("slurmctld", ["slurmctld", "-D", "-c"])
        for node in ("n1", "n2"):
            self._daemon(node, ["slurmd", "-D", "-c", "-N", node])
        self.wait(lambda: self.nodes() == {"n1": "idle", "n2": "idle"}, 60)

    def _daemon(self, name: str, command: list[str]) -> None:
        log = (self.scratch / f"{name}.out").open("wb")
        self.daemons[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)

    def ask(self, *command: str) -> str:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30).stdout

    def nodes(self) -> dict[str, str]:
        return dict(line.split() for line in self.ask("sinfo", "--noheader", "--Node", "--format=%N %t").splitlines())

    def jobs(self, *options: str) -> list[str]:
        return self.ask("squeue", "--noheader", "--format=%A", *options).split()

    def wait(self, condition, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > until:
                logs = [f"{p.name}: {p.read_text(errors='replace')[-1500:]}" for p in self.scratch.glob("*.log")]
                raise TimeoutError("\n".join([self.ask("sinfo"), self.ask("squeue"), *logs]))
            time.sleep(0.2)

    def kill(self, node: str) -> None:
        """SIGKILL for everything on a node at once, as if its power had failed."""
        jobs = self.jobs(f"--nodelist={node}")
        self.daemons.pop(node).kill()
        steps = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if (step := re.match(r"slurmstepd: \[(\d+)\.", _read(path))) and step[1] in jobs
        ]
        for pid in [*steps, *self._processes(node)]:
            os.kill(pid, signal.SIGKILL)

    def at_work(self, node: str) -> str | None:
        """The job on a node that is making a run, and not only starting or ending."""
        for pid, job in self._processes(node).items():
            if any(os.path.basename(link) == ".owner" for link in _links(Path(f"/proc/{pid}/fd"))):
                return job
        return None

    def _processes(self, node: str) -> dict[int, str]:
        """The processes of jobs on a node, each with its job."""
        found = {}
        for path in Path("/proc").glob("[0-9]*/environ"):
            environment = dict(entry.partition("=")[::2] for entry in _read(path).split("\0"))
            ours = environment.get("SLURM_CONF") == str(self.scratch / "slurm.conf")
            if ours and environment.get("SLURMD_NODENAME") == node:
                found[int(path.parent.name)] = environment["SLURM_JOB_ID"]
        return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it has ended
        return ""


def _links(folder: Path) -> list[str]:
    try:
        return [os.readlink(link) for link in folder.iterdir()]
    except OSError:
        return []
