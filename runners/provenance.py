"""Where a result comes from: code, versions, device. No host name, no user name, no path."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

CODE = ("configs", "data", "hydra_plugins", "models", "optimizers", "runners")  # what a run's numbers come from
PACKAGES = (
    "torch", "torchvision", "torch-geometric", "numpy", "scipy", "scikit-learn",
    "pytorch-optimizer", "prodigyopt", "dadaptation", "schedulefree", "dog-optimizer",
)  # fmt: skip


def provenance(device: torch.device, threads: int) -> dict:
    """The `provenance` entry of a summary."""
    return {
        **code(),
        "versions": _versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "driver": _driver() if device.type == "cuda" else None,
        "threads": threads,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def anonymous(text: str) -> str:
    """A text without the paths of this machine, which name people."""
    for place in (Path(__file__).resolve().parent.parent, Path.cwd(), Path(sys.prefix), Path.home()):
        if len(place.parts) > 1:
            text = text.replace(f"{place}{os.sep}", "")
    return text


@functools.cache
def code() -> dict:
    """The commit of the code in use and whether files of it differ from that; nulls outside a git checkout.

    What the first call finds stands for the process, which has loaded its code once.
    """

    def git(*arguments: str) -> str | None:
        return _output("git", "-C", str(Path(__file__).resolve().parents[1]), *arguments)

    commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--", *CODE)
    return {"commit": commit, "dirty": None if commit is None else bool(changes)}


@functools.cache
def _versions() -> dict:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@functools.cache
def _driver() -> str | None:
    versions = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
