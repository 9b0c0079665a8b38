"""Files that appear whole or not at all."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """
    Writes a file under a temporary name and renames it, so that no half-written file is ever seen.

    Args:
        path (`Path`):
            The file, in a folder that is there.
        write (`Callable[[Path], Any]`):
            Called with the temporary path, `.NAME.PID.tmp` in the same folder, which is removed if it fails.

    Raises:
        OSError: The file can not be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


__all__ = ["replace_file"]
