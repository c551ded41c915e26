"""Records packed for keeping: `runs/<task>.tar.xz` in place of `runs/<task>/`, a tenth of the size.

Runs of a task differ in few words, so that thousands of small files are mostly repetitions. `tar xf` unpacks them.
"""

from __future__ import annotations

import lzma
import tarfile
import tempfile
from pathlib import Path

SUFFIX = ".tar.xz"
# Without a filter Python warns from 3.12 on; the first releases of 3.11 know none.
_SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def pack(folder: Path, archive: Path) -> None:
    """Write `archive`, of `folder` and all below it: the same bytes for the same files."""
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(folder, folder.name, filter=_impersonal)


def unpack(runs: Path) -> tempfile.TemporaryDirectory | None:
    """All archives in the folder `runs`, unpacked; None where there are none. It lasts as long as it is held.

    Raises:
        ValueError: an archive is damaged.
    """
    archives = sorted(runs.glob(f"[!.]*{SUFFIX}"))
    if not archives:
        return None
    folder = tempfile.TemporaryDirectory(prefix="records-")
    for path in archives:
        try:
            with tarfile.open(path, "r:xz") as tar:
                tar.extractall(folder.name, **_SAFELY)
        except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); type git checkout {path}") from error
    return folder


def _impersonal(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Neither when nor whose."""
    entry.mtime = entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    entry.mode = 0o755 if entry.isdir() else 0o644
    return entry
