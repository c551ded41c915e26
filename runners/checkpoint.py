"""Checkpoints: what a run needs to go on as if it had never stopped. The last two are kept.

Each is one file, replaced whole, read with `weights_only=True`. A damaged one is named and the one before it is used.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra.utils
import torch

from runners.config import CALLABLE
from runners.record import replace_file

NAME, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


def save(folder: Path, state: dict) -> None:
    """Write a checkpoint; the present one becomes the one before it."""
    latest = folder / NAME
    if latest.exists():
        os.replace(latest, folder / PREVIOUS)
    replace_file(latest, lambda file: torch.save(state, file))


def load(folder: Path, device: torch.device) -> dict | None:
    """The newest readable checkpoint in a folder, its tensors on `device`; None where there is none."""
    for name in (NAME, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return _read(path, device)
        except Exception as error:  # a damaged file shows in many ways: zip, pickle, storage sizes
            reason = " ".join(str(error).split())[:120]
            print(f"warning: {path} is damaged and left out ({type(error).__name__}: {reason})", file=sys.stderr)
    return None


def _read(path: Path, device: torch.device) -> dict:
    """Tensors and plain values, and objects that optimizers of the declared packages keep in their state."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    declared = [hydra.utils.get_object(name) for name in foreign if name.startswith(tuple(f"{p}." for p in CALLABLE))]
    with torch.serialization.safe_globals(declared):
        return torch.load(path, map_location=device, weights_only=True)


def finish(folder: Path, weights: dict | None) -> None:
    """Replace the checkpoints of a run that has ended by its model's weights, or by nothing."""
    if weights is not None:
        replace_file(folder / NAME, lambda file: torch.save({"model": weights}, file))
    else:
        (folder / NAME).unlink(missing_ok=True)
    (folder / PREVIOUS).unlink(missing_ok=True)


def random_state(device: torch.device) -> dict:
    """State of torch's global generators, which dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict, device: torch.device) -> None:
    """Set torch's global generators to what `random_state` returned."""
    torch.set_rng_state(state["cpu"].cpu())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
