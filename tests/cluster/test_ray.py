"""`launcher=ray` on a real Ray of two nodes, one of which is killed in the middle.

Ray listens on every interface whatever it is told, so it all runs in a network of its own, with nothing but loopback.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.cluster.survival import ROOT, outcome
from tests.cluster.test_slurm import reproduce

ADDRESS = "127.0.0.1:6399"
NODE = ("--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block")


@pytest.mark.needs("ray")
def test_a_node_is_killed_and_the_results_are_whole(tmp_path):
    alone = reproduce(tmp_path / "alone", "launcher=local", "threads=1")
    assert alone.wait(600) == 0, alone.stderr.read()
    isolated = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
    inside = [sys.executable, "-m", "tests.cluster.test_ray", str(tmp_path / "cluster")]
    with tempfile.TemporaryDirectory(prefix="ray-") as place:  # else Ray leaves there which cluster to join by default
        settings = {"AUTH_MODE": "disabled", "USAGE_STATS_ENABLED": "0", "worker_niceness": "0", "TMPDIR": place}
        environment = os.environ | {f"RAY_{name}": value for name, value in settings.items()}
        done = subprocess.run(
            [*isolated, *inside], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    assert outcome(tmp_path / "cluster") == outcome(tmp_path / "alone")


def main(root: Path) -> None:
    """Within the network: start Ray, sweep, and kill the second node while it works."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    ray = Path(sys.executable).with_name("ray")
    log = (root.parent / "ray.log").open("w")
    head = [ray, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={ADDRESS.rpartition(':')[2]}"]
    subprocess.Popen([*head, "--include-dashboard=false", *NODE], stdout=log, stderr=log)
    time.sleep(10)
    second = subprocess.Popen(
        [ray, "start", f"--address={ADDRESS}", "--node-ip-address=127.0.0.1", *NODE], stdout=log, stderr=log
    )
    began = time.monotonic()
    sweep = reproduce(root, "launcher=ray", f"hydra.launcher.init.address={ADDRESS}")
    while len(list(root.rglob(".owner"))) < 2:  # one on each node
        assert sweep.poll() is None, sweep.stderr.read()
        assert time.monotonic() - began < 300, "no two nodes at work"
        time.sleep(0.1)
    killed = descendants(second.pid)
    for pid in killed:
        os.kill(pid, 9)
    errors = sweep.communicate(timeout=600)[1]
    print(f"with a node of {len(killed)} processes killed: {time.monotonic() - began:.0f} s")
    sys.exit(f"sweep failed: {errors}" if sweep.returncode else None)


def descendants(pid: int) -> list[int]:
    """A process and all below it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [pid]
    for known in found:  # grows as it is walked
        found += [child for child, parent in parents.items() if parent == known]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
