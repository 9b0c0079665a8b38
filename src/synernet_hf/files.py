"""The one way in which the package writes a file, whole or not at all, and tells a path from an id of the Hub."""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """
    Writes a file under a temporary name and renames it, so that nobody ever reads half a file.

    Args:
        path (`Path`): The file; its folder is created if needed.
        write (`Callable[[Path], Any]`): Called with the temporary path, `.NAME.PID.tmp` in the same folder. That file
            is removed if `write` fails.

    Raises:
        OSError: if the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file as [`replace_file`] does."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """
    Writes mappings, lists, text and numbers to a JSON file as [`replace_file`] does. NaN and infinities, which JSON
    lacks, become `null`.
    """
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads the content of a JSON file; `ValueError` if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error


def is_hub_id(name: Any) -> bool:
    """
    Tells a Hub id from a path.

    Args:
        name (`Any`): Text or anything else.

    Returns:
        `bool`: whether it reads `owner/name` and no such file and no folder `owner` is here.
    """
    if not isinstance(name, str) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is None:
        return False
    return not Path(name).exists() and not Path(name).parent.is_dir()


def one_line(error: BaseException | str) -> str:
    """Returns a `str`: the message of an error, or a text, without line breaks."""
    return " ".join(str(error).split())


def finite(data: Any) -> Any:
    """Returns data as JSON gives it back: keys are text, tuples lists, and NaN and infinities `None`."""
    if isinstance(data, Mapping):
        return {str(key): finite(item) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(item) for item in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


__all__ = [
    "TEMPORARY_NAME",
    "finite",
    "is_hub_id",
    "one_line",
    "read_json",
    "replace_file",
    "write_json",
    "write_text",
]
