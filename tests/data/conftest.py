"""Real data sets for tests: from DATA_ROOT where it has them, otherwise the test is skipped and says so."""

import os
from pathlib import Path

import pytest

from data.checksums import CHECKSUMS


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def real_root():
    """Function from a data set's name to the folder of the data sets."""
    root = Path(os.environ.get("DATA_ROOT", "datasets"))

    def find(name):
        missing = [file for file in CHECKSUMS[name] if not (root / file).is_file()]
        if missing:
            pytest.skip(f"{name}: no {missing[0]} in DATA_ROOT={root}")
        return root

    return find
