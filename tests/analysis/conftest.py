"""Synthetic records for the tests of analysis."""

from pathlib import Path

import pytest
from make_records import write_records

from analysis.records import load


@pytest.fixture(scope="session")
def planted(tmp_path_factory) -> Path:
    """A whole synthetic profile: three tasks, four methods, three seeds, searches of four trials. Not to be changed."""
    return write_records(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="session")
def records(planted):
    return load(planted)
