"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write(temporary)` make a file beside `path`, then put it in `path`'s place in one go.

    The content is on the disk before it has the name, so that not even a machine that fails leaves half of it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # a disk that fills while it is written to does not say which
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
