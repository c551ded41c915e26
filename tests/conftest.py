"""Fixtures for all tests, and the rule that continuous integration skips no test on real data."""

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, whichever tests ran before it in its process."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def compose(tmp_path):
    """`compose(*overrides)`: a composed config whose records go to the test's folder."""
    from hydra import compose, initialize_config_dir

    from runners.config import CONFIGS

    place = (f"results.root={tmp_path}/results", "tracker=none", "progress=false", "device=cpu", "threads=1")

    def composed(*overrides):
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("config", [*place, *overrides])

    return composed


@pytest.fixture
def train(compose):
    """`train(*overrides)`: make a run in this process and return its folder."""
    from runners.config import resolve

    def trained(*overrides):
        from runners.trainer import run

        return run(resolve(compose(*overrides)))

    return trained


def pytest_collection_modifyitems(items):
    """Tests on a GPU come last: a process that has used one can fork no others that differentiate."""
    items.sort(key=lambda item: item.path.name == "test_cuda.py")


def pytest_sessionfinish(session):
    """With CI set, a test that skips for want of data in an existing DATA_ROOT fails the session."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not (reporter and os.environ.get("CI") and os.path.isdir(os.environ.get("DATA_ROOT", ""))):
        return
    skipped = [report for report in reporter.stats.get("skipped", []) if "DATA_ROOT" in str(report.longrepr)]
    if skipped:
        reporter.write_line(f"CI skips no test on real data, but {len(skipped)} skipped: {skipped[0].nodeid} ...")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
