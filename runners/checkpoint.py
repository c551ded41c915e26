"""Checkpoints: what a run needs to go on as if it had never stopped. The last two are kept.

A file's name, `checkpoint-<n>-<digest>.pt`, counts the run's checkpoints and carries the SHA-256 of the content, so
that damage is seen before anything is read; it appears whole, and is read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable
from pathlib import Path

import hydra.utils
import torch

from data.files import replace_file
from runners.config import CALLABLE, ConfigError

WEIGHTS = "checkpoint.pt"  # of a run that has ended


def save(folder: Path, state: dict) -> None:
    """Write a checkpoint beside the present one; those before that one go."""
    content = _serialised(state)  # in memory first: a digest of what was meant, not of what a full disk made of it
    earlier = _checkpoints(folder)
    number = _number(earlier[0]) + 1 if earlier else 1
    name = f"checkpoint-{number}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    replace_file(folder / name, lambda file: file.write_bytes(content))
    _remove(earlier[1:])


def load(folder: Path, device: torch.device) -> dict | None:
    """The newest checkpoint in a folder that is not damaged, its tensors on `device`; None where there is none.

    Damaged ones are named on standard error, and go.

    Raises:
        ConfigError: it is not damaged, and cannot be read.
    """
    for path in _checkpoints(folder):
        if not _is_whole(path):
            print(f"warning: {path} is damaged; going on from the one before it", file=sys.stderr)
            path.unlink()
            continue
        try:
            return _read(path, device)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__}: {reason}); remove it to begin from the start"
            ) from error
    return None


def finish(folder: Path) -> None:
    """Remove the checkpoints of a run that has ended."""
    _remove(_checkpoints(folder))


def save_weights(folder: Path, weights: dict) -> None:
    """Keep the model's weights of a run that has ended."""
    content = _serialised({"model": weights})  # torch's own writer says nothing of a full disk
    replace_file(folder / WEIGHTS, lambda file: file.write_bytes(content))


def _serialised(state: dict) -> memoryview:
    content = io.BytesIO()
    torch.save(state, content)
    return content.getbuffer()


def _checkpoints(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted(folder.glob("checkpoint-*-*.pt"), key=_number, reverse=True)


def _number(path: Path) -> int:
    return int(path.stem.split("-")[1])


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest().startswith(path.stem.split("-")[2])


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _read(path: Path, device: torch.device) -> dict:
    """Tensors and plain values, and objects that optimizers of the declared packages keep in their state."""
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    declared = [hydra.utils.get_object(name) for name in foreign if name.startswith(tuple(f"{p}." for p in CALLABLE))]
    with torch.serialization.safe_globals(declared):
        return torch.load(path, map_location=_to(device), weights_only=True)


def _to(device: torch.device) -> Callable:
    """What was on a GPU goes to this one; what steps count on the CPU, so as not to wait for it, stays there."""
    return lambda storage, place: storage if place == "cpu" else storage.to(device=device)


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
