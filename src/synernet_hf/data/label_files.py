"""Image-level labels from a table: npz, json or csv."""

import csv
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from synernet_hf.data.schema import class_index


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}


def strip_image_suffix(name: str) -> str:
    """
    Turns a file name or path into an identifier.

    Args:
        name (`str`):
            For example `"2007_000032"`, `"2007_000032.jpg"` or `"/JPEGImages/2007_000032.jpg"`.

    Returns:
        `str`: The name without folders and without an image suffix, `"2007_000032"` in all three cases.
    """
    name = name.strip().replace("\\", "/").rsplit("/", 1)[-1]
    path = Path(name)
    return path.stem if path.suffix.lower() in IMAGE_SUFFIXES else name


def name_some(items: Sequence[str], limit: int = 3) -> str:
    """
    Names the first few of many things, for an error sentence.

    Args:
        items (`Sequence[str]`):
            What is to be named.
        limit (`int`, *optional*, defaults to 3):
            The largest number of names.

    Returns:
        `str`: For example `"a, b, c and 7 more"`.
    """
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def label_ids(names: Iterable[str], class_names: Sequence[str]) -> list[int]:
    """
    Turns names into label ids.

    Args:
        names (`Iterable[str]`):
            Foreground class names, in any order, repeats allowed.
        class_names (`Sequence[str]`):
            C + 1 class names, background first.

    Returns:
        `list[int]`: 0-based ids over the foreground classes, sorted, without repeats.

    Raises:
        ValueError: A name is unknown or is the background, which is no image-level label.
    """
    ids = set()
    for name in names:
        index = class_index(name, class_names)
        if index == 0:
            raise ValueError("'background' is no image-level label: leave it out of the label file.")
        ids.add(index - 1)
    return sorted(ids)


def read_label_file(path: str | Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    """
    Reads image-level labels from a table.

    - `.npz`: `ids` (`(N,)` strings) and `labels` (`(N, C)`, 0 or 1, columns in the order of `class_names[1:]`).
    - `.json`: one object from identifier to a list of class names or to a multi-hot list of C numbers.
    - `.csv`: with or without a header; either two columns (identifier; names separated by space, `;` or `|`), or
      1 + C columns (identifier; 0 or 1 for each class, in the order of the header's class names if it has them, else
      of `class_names[1:]`).

    Identifiers may carry an image suffix or a folder; both are dropped.

    Args:
        path (`str` or `Path`):
            The file; its suffix chooses the format.
        class_names (`Sequence[str]`):
            C + 1 class names, background first.

    Returns:
        `dict[str, list[int]]`: for each identifier, its label ids: 0-based over the foreground classes, sorted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Unknown format, a truncated or otherwise unreadable file, vector of the wrong length, values other
            than 0 and 1, or unknown class name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no label file {path}: give 'annotations', 'masks', or the path of an .npz, .json or .csv file."
        )
    readers = {".npz": _read_npz, ".json": _read_json, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"The label file {path} has the suffix {path.suffix!r}, but .npz, .json or .csv is expected.")
    return readers[path.suffix.lower()](path, class_names)


def select_labels(
    table: dict[str, list[int]], image_ids: Sequence[str], source: str | Path, split: str
) -> list[list[int]]:
    """
    Looks up the labels of one split.

    Args:
        table (`dict[str, list[int]]`):
            Label ids of each identifier.
        image_ids (`Sequence[str]`):
            N identifiers of the split.
        source (`str` or `Path`):
            Where the table came from, for the error sentence.
        split (`str`):
            The name of the split, for the error sentence.

    Returns:
        `list[list[int]]`: label ids of each image.

    Raises:
        ValueError: An identifier of the split is not in the table.
    """
    missing = [image_id for image_id in image_ids if image_id not in table]
    if missing:
        raise ValueError(
            f"The label file {source} lacks {len(missing)} of the {len(image_ids)} images of the split {split!r} "
            f"({name_some(missing)}): add them to the file or take them out of the split."
        )
    return [table[image_id] for image_id in image_ids]


def _checked_vector(values: Sequence, image_id: str, path: Path, class_names: Sequence[str]) -> list[int]:
    expected = len(class_names) - 1
    if len(values) != expected:
        raise ValueError(
            f"The label file {path} holds a vector of length {len(values)} for {image_id}, but there are {expected} "
            "foreground classes: give one 0 or 1 for each, without the background."
        )
    try:
        vector = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        vector = np.full(expected, np.nan)
    if not np.isin(vector, (0, 1)).all():
        raise ValueError(
            f"The label file {path} holds values other than 0 and 1 for {image_id}: image-level labels are multi-hot."
        )
    return np.flatnonzero(vector).tolist()


def _checked_names(names: Sequence[str], image_id: str, path: Path, class_names: Sequence[str]) -> list[int]:
    try:
        return label_ids(names, class_names)
    except ValueError as error:
        raise ValueError(f"The label file {path} is wrong at {image_id}. {error}") from error


def _npz_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    # numpy takes anything but a zip archive for a pickle, and its complaint then recommends to trust the file.
    if not zipfile.is_zipfile(path):
        raise ValueError("it is no zip archive, or a truncated one")
    with np.load(path, allow_pickle=False) as archive:
        if not {"ids", "labels"} <= set(archive.files):
            raise ValueError(f"it holds the arrays {', '.join(archive.files) or 'none'}")
        return np.asarray(archive["ids"]), np.asarray(archive["labels"])


def _read_npz(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    try:
        ids, labels = _npz_arrays(path)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The label file {path} can not be read as an .npz archive of 'ids' and 'labels' ({error}): write it anew "
            "with numpy.savez."
        ) from error
    if ids.ndim != 1 or labels.ndim != 2 or len(ids) != len(labels):
        raise ValueError(
            f"The label file {path} holds ids of shape {ids.shape} and labels of shape {labels.shape}, but (N,) and "
            f"(N, {len(class_names) - 1}) are expected."
        )
    names = [strip_image_suffix(str(image_id)) for image_id in ids]
    return {name: _checked_vector(row, name, path, class_names) for name, row in zip(names, labels, strict=True)}


def _read_json(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The label file {path} is not valid JSON ({error}).") from error
    if not isinstance(entries, dict) or not all(isinstance(value, list) for value in entries.values()):
        raise ValueError(f"The label file {path} must hold one object from identifier to a list of names or numbers.")
    table = {}
    for key, values in entries.items():
        checked = _checked_names if all(isinstance(value, str) for value in values) else _checked_vector
        table[strip_image_suffix(key)] = checked(values, key, path, class_names)
    return table


def _read_csv(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = [[cell.strip() for cell in row] for row in csv.reader(stream) if any(cell.strip() for cell in row)]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"The label file {path} is not a table of comma-separated text ({error}).") from error
    if not rows:
        raise ValueError(f"The label file {path} is empty.")
    id_headers = {"id", "ids", "image_id", "image", "file", "filename", "file_name", "name"}
    header = rows.pop(0) if rows[0][0].lower() in id_headers or set(rows[0][1:]) == set(class_names[1:]) else None
    columns = list(range(len(class_names) - 1))
    if header is not None and len(header) > 2:
        columns = [class_index(name, class_names) - 1 for name in header[1:]]
        if sorted(columns) != list(range(len(class_names) - 1)):
            raise ValueError(
                f"The header of the label file {path} names {len(columns)} classes, but each of the "
                f"{len(class_names) - 1} foreground classes is expected once."
            )
    table = {}
    for row in rows:
        image_id = strip_image_suffix(row[0])
        if len(row) <= 2:
            names = [name for name in re.split(r"[\s;|]+", row[1] if len(row) == 2 else "") if name]
            table[image_id] = _checked_names(names, image_id, path, class_names)
        else:
            places = _checked_vector(row[1:], image_id, path, class_names)
            table[image_id] = sorted(columns[place] for place in places)
    return table


__all__ = ["label_ids", "name_some", "read_label_file", "select_labels", "strip_image_suffix"]
