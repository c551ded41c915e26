"""conda, pip and uv install the same things."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


LOCKS = ("requirements.lock", "requirements-cluster.lock")


def locked(name=LOCKS[0]):
    lines = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / name).read_text(), re.MULTILINE)
    versions = {}
    for name, version in lines:
        versions.setdefault(canonicalize_name(name), []).append(version)
    return versions


def test_the_conda_environment_installs_the_project_with_extras_that_exist():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *plain, pip = environment["dependencies"]
    assert plain == [f"python{PROJECT['requires-python']}", "pip"]
    (line,) = pip["pip"]
    extras = re.fullmatch(r"-e \.\[(.*)\]", line).group(1).split(",")
    assert set(extras) == set(PROJECT["optional-dependencies"]) - {"cluster"}
    assert environment["name"] == PROJECT["name"]


def test_the_lock_satisfies_the_project():
    versions = locked(LOCKS[1]) | locked()
    wanted = PROJECT["dependencies"] + [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    for requirement in map(Requirement, wanted):
        found = versions.get(canonicalize_name(requirement.name), [])
        assert found, f"{requirement.name} is not in requirements.lock; type make lock"
        assert all(requirement.specifier.contains(version) for version in found), requirement


def test_the_locks_agree():
    plain, cluster = map(locked, LOCKS)
    assert all(plain[name] == cluster[name] for name in plain.keys() & cluster.keys())


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_has_no_addresses_and_no_local_versions(lock):
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert "+cpu" not in text


def test_every_make_target_has_its_line_of_help():
    text = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE).group(1).split())
    assert set(re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE)) == targets
