"""Labels as people write them → class lists and label ids, by name and never by chance."""

import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synernet_hf.data.files import image_name, read_text
from synernet_hf.data.schema import class_index, id2label_from, name_some


LABEL_SEPARATORS = ";|,"
IMAGE_HEADERS = ("file_name", "filename", "file", "path", "image", "image_id", "picture", "name", "id", "ids")


class LabelReader:
    """
    Reads cells of labels: a text with one or several names, a number, or a list of names, ids or 0 and 1.

    What a cell alone does not say is decided once, from those of all splits: whether lists are label vectors, and
    whether spaces separate names.

    Args:
        cells (`Iterable[Any]`, *optional*): The cells of all splits.
        column (`str`, *optional*): Name of a column of texts in which spaces may separate names: they do where no text
            holds `;`, `|` or `,` and the column has a plural name (`labels`, `classes`, `tags`), so that `traffic
            light` in a column `label` stays whole.
        class_names (`Sequence[str]`, *optional*): Known class names; a text that is one of them is not taken apart.

    Attributes:
        vector_length (`int` or `None`): number of classes of the lists, if they are label vectors.
    """

    def __init__(
        self, cells: Iterable[Any] = (), column: str | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self.known = frozenset(class_names or ())
        cells = [cell for cell in cells if not _is_empty(cell)]
        self.vector_length = vector_length(cells)
        texts = [cell for cell in cells if isinstance(cell, str) and cell.strip() not in self.known]
        has_separator = any(separator in text for text in texts for separator in LABEL_SEPARATORS)
        is_plural = column is not None and column.lower().endswith("s") and column.lower() != "class"
        self.separators = [*LABEL_SEPARATORS, *([r"\s"] if is_plural and not has_separator else [])]

    def names(self, cell: Any, place: str) -> list[str]:
        """
        The names in one cell that holds no label vector, numbers as text, without repeats.

        Raises `ValueError` for a list of numbers with a 0 or a repeat, which ids of classes do not have; `place` says
        where it stands.
        """
        if _is_empty(cell):
            return []
        if not isinstance(cell, list):
            cell = self._parts(cell, self.separators) if isinstance(cell, str) else [cell]
        else:
            numbers = [item for item in cell if isinstance(item, int | float)]
            if 0 in numbers or len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"{place}: the labels {cell[:8]} are neither a vector as all others, of one 0 or 1 for each "
                    "class, nor class ids from 1 without repeats: write one or the other in every row."
                )
        names = (_as_text(item) for item in cell)
        return list(dict.fromkeys(name for name in names if name))

    def ids(self, cells: Sequence[Any], class_names: Sequence[str], place: str) -> list[int]:
        """
        The label ids of one image, sorted: 0-based over the foreground classes of `class_names`.

        `cells` are those of all rows of the image. Raises `ValueError`, beginning with `place`, for a label vector of
        another length and for a name or id that is not in the class list.
        """
        if self.vector_length is None:
            return ids_from_names([name for cell in cells for name in self.names(cell, place)], class_names, place)
        found = [ids_from_vector(cell, len(class_names) - 1, place) for cell in cells if not _is_empty(cell)]
        return sorted({label for ids in found for label in ids})

    def infer_class_names(self, images: Iterable[tuple[Sequence[Any], str]]) -> list[str]:
        """
        The class list of labels that come without one: names in alphabetical order, numbers by their size.

        `images` are the cells of each image of the training split, and where they stand. Label vectors give `class_1`,
        `class_2`, ... Raises `ValueError` where there is no label.
        """
        if self.vector_length is not None:
            return ["background", *(f"class_{index}" for index in range(1, self.vector_length + 1))]
        names = {name for cells, place in images for cell in cells for name in self.names(cell, place)}
        names -= {"background"}
        if not names:
            raise ValueError("No image has a label: fill in the labels, or check which column holds them.")
        by_size = all(name.isdecimal() for name in names)
        return ["background", *sorted(names, key=lambda name: (int(name), name) if by_size else name)]

    def _parts(self, text: str, separators: Sequence[str]) -> list[str]:
        text = text.strip()
        if text in self.known or not separators:
            return [text]
        pieces = re.split(f"[{separators[0]}]", text)
        return [part for piece in pieces for part in self._parts(piece, separators[1:])]


def vector_length(cells: Iterable[Any]) -> int | None:
    """
    The length of label vectors, if all cells (none empty) are lists of as many numbers 0 and 1; else `None`.

    Lists of a single number must hold a 0 somewhere, for `[1]` is also a list of ids.
    """
    lengths, single = set(), set()
    for cell in cells:
        if not isinstance(cell, list) or not all(isinstance(item, int | float) and item in (0, 1) for item in cell):
            return None
        lengths.add(len(cell))
        single.add(cell[0])
    if len(lengths) != 1 or (lengths == {1} and 0 not in single):
        return None
    return lengths.pop()


def ids_from_names(names: Iterable[str], class_names: Sequence[str], place: str) -> list[int]:
    """
    Turns the labels of one image into sorted ids, 0-based over the foreground classes.

    Labels are class names or, where no class is called by a number, positions 1 to C in the class list as text. Raises
    `ValueError`, beginning with `place`, for a name or number that is not in the list, and for the background.
    """
    # where classes are called "1" and "3", a "2" is no position
    with_numbers = any(name.isdecimal() for name in class_names[1:])
    ids = set()
    for name in names:
        if name in class_names or with_numbers or not name.isdecimal():
            try:
                index = class_index(name, class_names)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if index == 0:
                raise ValueError(f"{place}: 'background' is not an image-level label: leave it out.")
        else:
            index = int(name)
            if not 1 <= index < len(class_names):
                raise ValueError(
                    f"{place}: The class id {name} is not one of 1 to {len(class_names) - 1} (0 is the background)."
                )
        ids.add(index - 1)
    return sorted(ids)


def ids_from_vector(values: Sequence[Any], num_classes: int, place: str) -> list[int]:
    """
    Turns a 0 or 1 for each foreground class, as numbers or text, into sorted 0-based ids.

    Raises `ValueError`, beginning with `place`, for another length or other values.
    """
    try:
        vector = np.asarray(values, dtype=float)
    except (TypeError, ValueError):
        vector = np.full(len(values), np.nan)
    if vector.shape == (num_classes,) and np.isin(vector, (0, 1)).all():
        return np.flatnonzero(vector).tolist()
    fault = f"has the length {len(values)}" if len(values) != num_classes else "holds values other than 0 and 1"
    raise ValueError(
        f"{place}: the label vector {list(values)[:8]} does not hold one 0 or 1 for each of the {num_classes} "
        f"foreground classes: it {fault}."
    )


def choose_class_names(given: Sequence[str] | None, own: Sequence[str] | None, source: str) -> list[str] | None:
    """
    Decides between the class list that the user gave and the one that a source itself numbers, background first.

    The source's own order counts, for the ids in its masks follow it. Raises `ValueError` if the given list is no
    class list or lacks a class of the source.
    """
    if given is not None:
        given = list(id2label_from(given).values())
    if own is None or given is None:
        return given if own is None else list(id2label_from(own).values())
    unknown = [name for name in own if name not in given]
    if unknown:
        raise ValueError(
            f"{source} has the classes {name_some(unknown, 5)}, which are not in the class list "
            f"({', '.join(given[1:])}): rename them, or take a model that knows them."
        )
    return list(own)


def read_label_file(path: str | Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    """
    Reads image-level labels from a file.

    - `.npz`: `ids` (`(N,)` strings) and `labels` (`(N, C)`, 0 or 1, columns in the order of `class_names[1:]`).
    - `.json`: one object from identifier to a list of class names or to a list of C numbers 0 and 1.
    - `.csv`: with or without a header; either two columns (identifier; names separated as [`LabelReader`] has it), or
      1 + C columns (identifier; 0 or 1 for each class, in the order of the header's class names if it has them, else
      of `class_names[1:]`).

    Identifiers may carry an image suffix or a folder; both are dropped.

    Args:
        path (`str` or `Path`): The file; its suffix chooses the format.
        class_names (`Sequence[str]`): C + 1 class names, background first.

    Returns:
        `dict[str, list[int]]`: for each identifier, its label ids: 0-based over the foreground classes, sorted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Unknown format, a truncated or otherwise unreadable file, a label vector of another length or with
            other values than 0 and 1, or an unknown class name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no label file {path}: give 'annotations', 'masks', or the path of an .npz, .json or .csv file."
        )
    readers = {".npz": _read_npz, ".json": _read_json, ".csv": _read_label_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(f"The label file {path} has the suffix {path.suffix!r}, but .npz, .json or .csv is expected.")
    return readers[path.suffix.lower()](path, class_names)


def read_csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """
    Line number, from 1, and stripped cells of each row that is not empty.

    Cells are separated by `,`, `;` or tabulators, whichever comes first in the first line. Raises `ValueError` that
    names the row where the file is no UTF-8 text or no table.
    """
    text = read_text(path)
    first = text.split("\n", 1)[0]
    delimiter = next((character for character in first if character in ",;\t"), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}, is not a row of a table ({error}).") from error
    return [(number, cells) for number, cells in rows if any(cells)]


def _read_npz(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    try:
        # numpy takes anything but a zip archive for a pickle, and its complaint then recommends to trust the file
        if not zipfile.is_zipfile(path):
            raise ValueError("it is not a zip archive, or it is truncated")
        with np.load(path, allow_pickle=False) as archive:
            if not {"ids", "labels"} <= set(archive.files):
                raise ValueError(f"it holds the arrays {', '.join(archive.files) or 'none'}")
            ids, labels = np.asarray(archive["ids"]), np.asarray(archive["labels"])
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"The label file {path} cannot be read as an .npz archive of 'ids' and 'labels' ({error}): write it anew "
            "with numpy.savez."
        ) from error
    num_classes = len(class_names) - 1
    if ids.ndim != 1 or labels.ndim != 2 or len(ids) != len(labels):
        raise ValueError(
            f"The label file {path} holds ids of shape {ids.shape} and labels of shape {labels.shape}, but (N,) and "
            f"(N, {num_classes}) are expected."
        )
    return {
        image_name(name): ids_from_vector(row, num_classes, f"{path}, {name}")
        for name, row in zip(ids.astype(str).tolist(), labels.tolist(), strict=True)
    }


def _read_json(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"The label file {path} is not valid JSON ({error}).") from error
    if not isinstance(entries, dict) or not all(isinstance(value, list) for value in entries.values()):
        raise ValueError(f"The label file {path} must hold one object from identifier to a list of names or numbers.")
    reader = LabelReader(entries.values(), class_names=class_names)
    return {image_name(key): reader.ids([cell], class_names, f"{path}, {key}") for key, cell in entries.items()}


def _read_label_csv(path: Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    rows, num_classes = read_csv_rows(path), len(class_names) - 1
    if not rows:
        raise ValueError(f"The label file {path} is empty.")
    first = rows[0][1]
    columns = list(range(num_classes))
    if first[0].lower() in IMAGE_HEADERS or set(first[1:]) == set(class_names[1:]):
        rows = rows[1:]
        if len(first) > 2:
            columns = [class_index(name, class_names) - 1 for name in first[1:]]
            if sorted(columns) != list(range(num_classes)):
                raise ValueError(
                    f"The header of the label file {path} names {len(columns)} classes, but each of the {num_classes} "
                    "foreground classes is expected once."
                )
    reader = LabelReader((cells[1] for _, cells in rows if len(cells) == 2), "labels", class_names)
    table = {}
    for number, cells in rows:
        place = f"{path}, row {number} ({cells[0]})"
        if len(cells) <= 2:
            table[image_name(cells[0])] = reader.ids(cells[1:], class_names, place)
        else:
            places = ids_from_vector(cells[1:], num_classes, place)
            table[image_name(cells[0])] = sorted(columns[index] for index in places)
    return table


def _is_empty(cell: Any) -> bool:
    return cell is None or cell == [] or (isinstance(cell, str) and not cell.strip())


def _as_text(item: Any) -> str:
    """A name or number as text, for example "3" of 3 and of 3.0."""
    is_whole = isinstance(item, bool | float) and float(item).is_integer()
    return str(int(item)) if is_whole else str(item).strip()


__all__ = [
    "IMAGE_HEADERS",
    "LabelReader",
    "choose_class_names",
    "ids_from_names",
    "ids_from_vector",
    "read_csv_rows",
    "read_label_file",
    "vector_length",
]
