"""What a real Slurm and a real Ray take; without `CLUSTER` (`make test-cluster`) their tests are skipped."""

import importlib.util
import os
import shutil

import pytest

PROGRAMS = {
    "slurm": ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel"),
    "ray": ("unshare", "ip"),
}
PACKAGES = {"slurm": "submitit", "ray": "ray"}
INSTALL = {"slurm": "apt-get install slurm-wlm munge", "ray": "apt-get install util-linux iproute2"}


def pytest_configure(config):
    config.addinivalue_line("markers", "needs(engine): a test on a real Slurm or Ray, run by `make test-cluster`")


@pytest.fixture(autouse=True)
def engine(request):
    """Refuse a test whose engine is not there, naming what is missing."""
    marker = request.node.get_closest_marker("needs")
    if marker is None:
        return
    name = marker.args[0]
    if not os.environ.get("CLUSTER"):
        pytest.skip(f"on a real {name}; type make test-cluster")
    missing = [program for program in PROGRAMS[name] if shutil.which(program) is None]
    if missing:
        pytest.fail(f"missing for {name}: {', '.join(missing)}; type {INSTALL[name]}", pytrace=False)
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.fail(f"missing for {name}: the package {PACKAGES[name]}; type make test-cluster", pytrace=False)
    if os.geteuid():
        pytest.fail(f"a {name} of one's own takes root here", pytrace=False)
