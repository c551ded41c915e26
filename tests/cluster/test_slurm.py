"""`launcher=slurm` on a real Slurm of two nodes, one of which is killed in the middle."""

import contextlib
import subprocess
import sys
import time

import pytest

from runners.record import read_summary
from tests.cluster.slurm import Slurm
from tests.cluster.survival import ROOT, outcome

SMALL = (
    "profile.tasks=[gcn_sbm]", "profile.optimizers=[adamw,lw_sgdm]", "profile.seeds=2", "profile.trials=1",
    "budget.epochs=1500", "profile.study=[]", "device=cpu", "tracker=none",
)  # fmt: skip
SLURM = ("launcher=slurm", "hydra.launcher.partition=debug", "hydra.launcher.timeout_min=30")


def reproduce(root, *arguments, environment=None):
    command = [sys.executable, "-m", "runners.reproduce", f"results.root={root}", *SMALL, *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip


@pytest.mark.needs("slurm")
def test_a_node_is_killed_and_a_job_warned_and_the_results_are_whole(tmp_path):
    alone = reproduce(tmp_path / "alone", "launcher=local", "threads=1")
    assert alone.wait(600) == 0, alone.stderr.read()

    root = tmp_path / "cluster"
    with Slurm() as slurm, contextlib.ExitStack() as stack:
        sweep = reproduce(root, *SLURM, environment=slurm.environment)
        stack.callback(sweep.kill)  # where the test fails

        def at_work(node):
            assert sweep.poll() is None, sweep.stderr.read()
            return slurm.at_work(node)

        began = time.monotonic()
        slurm.wait(lambda: at_work("n1"), 120)
        warned = slurm.at_work("n1")
        slurm.ask("scancel", "--signal=USR1", warned)
        slurm.wait(lambda: warned not in slurm.jobs("--states=RUNNING"), 60)
        assert warned in slurm.jobs(), "a job that was warned is queued again"
        statuses = {read_summary(path.parent)["status"] for path in root.rglob("summary.json")}
        assert "interrupted" in statuses
        slurm.wait(lambda: at_work("n2"), 120)
        slurm.kill("n2")
        errors = sweep.communicate(timeout=900)[1]
        print(f"with a node killed and a job warned: {time.monotonic() - began:.0f} s")
        assert sweep.returncode == 0, errors
        assert slurm.nodes()["n2"].startswith("down")
    assert outcome(root) == outcome(tmp_path / "alone")
