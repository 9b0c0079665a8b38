"""Labels as people write them → class lists and label ids."""

import ast
import csv
import io
import itertools
import json
import logging
import posixpath
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from synernet_hf.data.files import image_name, parse_json, read_text
from synernet_hf.data.schema import (
    background_first,
    class_index,
    clean_label,
    id2label_from,
    is_background,
    likely_misspelt,
    name_some,
)


logger = logging.getLogger(__name__)

LABEL_SEPARATORS = ";|,"
IMAGE_HEADERS = tuple(
    "file_name filename file path image image_id picture name image_name image_path file_path filepath imageid img "
    "id ids".split()
)
# how spreadsheets and programs write that there is no label, and the folder of images without one in CVAT and FiftyOne
NO_LABEL = {"", "-", "--", "?", "nan", "none", "null", "n/a", "na", "<na>", "#n/a", "nat", "no_label", "_unlabeled"}
# where detection metadata and annotation tools keep the names in an object
CATEGORY_KEYS = ("category", "categories", "label", "labels", "class", "classes", "choices")


class LabelReader:
    """
    Reads cells of labels. [`plain`] makes each a text with one or several names, a number, a list or `None`; [`settle`]
    decides from those of all splits what a cell alone does not say; [`ids`] and [`infer_class_names`] take plain cells.

    Args:
        column (`str`, *optional*): Name of the column. Spaces separate names where no text holds `;`, `|` or `,` and
            the name is a plural (`labels`, `tags`), so that `traffic light` in a column `label` stays whole.
        class_names (`Sequence[str]`, *optional*): Known class names; a text that is one of them is not taken apart.
        streamed (`bool`): Other cells are not known: a list of a 0 or 1 for each class is a label vector.
    """

    def __init__(
        self, column: str | None = None, class_names: Sequence[str] | None = None, streamed: bool = False
    ) -> None:
        self.column = column
        self.known = frozenset(class_names or ())
        self.streamed = streamed
        self.vector_length: int | None = None
        self.separators: list[str] = list(LABEL_SEPARATORS)
        self._dropped: set[str] = set()

    def plain(self, cell: Any, place: str) -> Any:
        """
        A cell as `None` (no label), a text, a number, or a list of texts and numbers.

        A text that writes a list or an object is read as one; detection metadata gives its categories, a mapping to 0
        and 1 its names. Raises `ValueError`, beginning with `place`, for all else.
        """
        if isinstance(cell, str):
            text = clean_label(cell)
            if text in self.known or not re.fullmatch(r"\[.*\]|\{.*\}", text, re.DOTALL):
                return self._label(text, place)
            cell = _parsed(text, place)
        if isinstance(cell, np.ndarray | np.generic):
            cell = cell.tolist()
        if isinstance(cell, dict):
            return self._of_object(cell, place)
        if not isinstance(cell, list | tuple):
            return self._scalar(cell, place)
        items = []
        for item in cell:
            items += self._of_object(item, place) if isinstance(item, dict) else [self._scalar(item, place)]
        return [item for item in items if item is not None]

    def settle(self, cells: Iterable[Any]) -> None:
        """Decides whether lists are label vectors, and whether spaces separate names."""
        cells = [cell for cell in cells if cell not in (None, [])]
        self.vector_length = _vector_length(cells)
        texts = [cell for cell in cells if isinstance(cell, str) and cell not in self.known]
        column = (self.column or "").lower()
        if column.endswith("s") and column != "class" and not any(set(LABEL_SEPARATORS) & set(text) for text in texts):
            self.separators = [*LABEL_SEPARATORS, r"\s"]

    def names(self, cell: Any, place: str) -> list[str]:
        """The names in a plain cell that holds no label vector, numbers as text, without repeats and background."""
        if isinstance(cell, str):
            cell = [part for part in self._parts(cell, self.separators) if self._label(part, place)]
        elif isinstance(cell, list):
            numbers = [item for item in cell if not isinstance(item, str)]
            if 0 in numbers or len(set(numbers)) < len(numbers):
                raise ValueError(
                    f"{place}: the labels {cell[:8]} are neither a vector as all others, of one 0 or 1 for each "
                    "class, nor class ids from 1 without repeats: write one or the other in every row."
                )
        else:
            cell = [] if cell is None else [cell]
        names = dict.fromkeys(map(_as_text, cell))
        return [name for name in names if not (is_background(name) and self._drop(name, place))]

    def ids(self, cells: Sequence[Any], place: str, class_names: Sequence[str]) -> list[int]:
        """
        The label ids of one image from the cells of all its rows, sorted: 0-based over the foreground classes.

        Raises `ValueError`, beginning with `place`, for a vector, name or id that does not fit the class list.
        """
        number, found = len(class_names) - 1, set()
        for cell in cells:
            if cell and (self.vector_length or (self.streamed and _vector_length([cell]) == number)):
                found |= set(_ids_from_vector(cell, number, place))
            else:
                found |= set(ids_from_names(self.names(cell, place), class_names, place))
        return sorted(found)

    def infer_class_names(self, images: Iterable[tuple[Sequence[Any], str]], source: str) -> list[str]:
        """
        The class list of labels that come without one: names in alphabetical order, numbers by their size.

        `images` are the cells of each image of the training split, with their places. Label vectors give `class_1`,
        `class_2`, ... Rare names that resemble a frequent one are logged. Raises `ValueError` where there is no label.
        """
        if self.vector_length is not None:
            return ["background", *(f"class_{index}" for index in range(1, self.vector_length + 1))]
        counts: Counter[str] = Counter()
        # images with equal cells are read once
        read: dict[str, set[str]] = {}
        for cells, place in images:
            key = repr(cells)
            if key not in read:
                read[key] = {name for cell in cells for name in self.names(cell, place)}
            counts.update(read[key])
        if not counts:
            raise ValueError("No image has a label: fill in the labels, or check which column holds them.")
        for name, other in likely_misspelt(counts):
            text = "%s: the class %r has %d images and %r has %d: did you mean %r?"
            logger.warning(text, source, name, counts[name], other, counts[other], other)
        by_size = all(name.isdecimal() for name in counts)
        names = sorted(counts, key=lambda name: (int(name), name) if by_size else name)
        logger.info("%s: %d classes: %s.", source, len(names), ", ".join(names))
        return ["background", *names]

    def _drop(self, text: str, place: str) -> bool:
        """Says of each word that means no class, at its first place, that it is read so."""
        if text and text not in self._dropped:
            self._dropped.add(text)
            said = "%s: %r in the labels means no class; give class_names that name it if it is one."
            logger.warning(said, place, text)
        return True

    def _label(self, text: str, place: str) -> str | None:
        text = clean_label(text)
        is_none = text not in self.known and text.lower() in NO_LABEL
        return None if is_none and self._drop(text, place) else text

    def _scalar(self, item: Any, place: str) -> Any:
        item = item.item() if isinstance(item, np.generic) else item
        if item is None or item != item:
            return None
        if isinstance(item, str):
            return self._label(item, place)
        if isinstance(item, bool | int | float):
            return item
        raise _no_label(item, place)

    def _of_object(self, cell: dict, place: str) -> list[str]:
        """The names that have a 1 in a mapping, or the categories of detection metadata."""
        for key in CATEGORY_KEYS:
            if key in cell:
                found = self.plain(cell[key], place)
                return list(
                    dict.fromkeys(map(_as_text, found if isinstance(found, list) else [found] * (found is not None)))
                )
        if any(flag(value) is None for value in cell.values() if value is not None and value == value):
            raise _no_label(cell, place)
        return [clean_label(str(name)) for name, value in cell.items() if flag(value)]

    def _parts(self, text: str, separators: Sequence[str]) -> list[str]:
        text = text.strip()
        if text in self.known or not separators:
            return [text]
        pieces = re.split(f"[{separators[0]}]", text)
        return [part for piece in pieces for part in self._parts(piece, separators[1:])]


def usual_name(headers: Iterable[str], usual: Sequence[str]) -> str | None:
    """The header with the first of several usual names, in any case."""
    lower = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in headers}
    return next((lower[name] for name in usual if name in lower), None)


def read_labels(
    splits: Mapping[str, Sequence[tuple[Sequence[Any], str]]],
    column: str | None,
    class_names: Sequence[str] | None,
    source: str,
) -> tuple[dict[str, list[list[int]]], list[str]]:
    """
    The label ids of the images of each split, and the class list: the given one or that of the labels in the first
    split. `splits` hold the cells of each image and their place; see [`LabelReader`].
    """
    reader = LabelReader(column, class_names)
    plain = {
        split: [([reader.plain(cell, place) for cell in cells], place) for cells, place in images]
        for split, images in splits.items()
    }
    reader.settle(cell for images in plain.values() for cells, _ in images for cell in cells)
    names = class_names or reader.infer_class_names(next(iter(plain.values())), source)
    read: dict[str, list[int]] = {}
    for cells, place in itertools.chain.from_iterable(plain.values()):
        key = repr(cells)
        if key not in read:
            read[key] = reader.ids(cells, place, names)
    return {split: [read[repr(cells)] for cells, _ in images] for split, images in plain.items()}, list(names)


def _vector_length(cells: Iterable[Any]) -> int | None:
    """
    The length of label vectors, if all cells (none empty) are lists of as many numbers 0 and 1; else `None`.

    Lists of a single number must hold a 0 somewhere, for `[1]` is also a list of ids.
    """
    lengths, single = set(), set()
    for cell in cells:
        if not isinstance(cell, list) or not all(isinstance(item, int | float) and item in (0, 1) for item in cell):
            return None
        lengths.add(len(cell))
        single.add(next(iter(cell), None))
    if len(lengths) != 1 or (lengths == {1} and 0 not in single):
        return None
    return lengths.pop()


def ids_from_names(names: Iterable[str], class_names: Sequence[str], place: str) -> list[int]:
    """
    The sorted ids, 0-based over the foreground classes, of class names or, where no class is called by a number, of
    positions 1 to C in the class list as text.

    Raises `ValueError`, beginning with `place`, for what is not in the list, and for the background.
    """
    # where classes are called "1" and "3", a "2" is no position
    with_numbers = any(name.isdecimal() for name in class_names[1:])
    ids = set()
    for name in map(clean_label, names):
        if is_background(name):
            raise ValueError(f"{place}: {name!r} is not an image-level label: leave it out.")
        if name in class_names or with_numbers or not name.isdecimal():
            try:
                index = class_index(name, class_names)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
        else:
            index = int(name)
            if not 1 <= index < len(class_names):
                raise ValueError(
                    f"{place}: The class id {name} is not one of 1 to {len(class_names) - 1} (0 is the background)."
                )
        ids.add(index - 1)
    return sorted(ids)


def _ids_from_vector(values: Sequence[Any], num_classes: int, place: str) -> list[int]:
    """The sorted 0-based ids of a 0 or 1 for each foreground class. Raises `ValueError`, beginning with `place`."""
    flags = [flag(value) for value in values]
    if len(flags) == num_classes and None not in flags:
        return [index for index, is_set in enumerate(flags) if is_set]
    fault = f"has the length {len(values)}" if len(values) != num_classes else "holds values other than 0 and 1"
    raise ValueError(
        f"{place}: the label vector {list(values)[:8]} does not hold one 0 or 1 for each of the {num_classes} "
        f"foreground classes: it {fault}."
    )


def flag(cell: Any) -> bool | None:
    """A 0 or 1 in any of its spellings, `None` for all else."""
    return {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}.get(
        str(cell).strip().lower()
    )


def choose_class_names(given: Sequence[str] | None, own: Sequence[str] | None, source: str) -> list[str] | None:
    """
    Decides between the class list that the user gave and the one that a source itself numbers, background first.

    The order of the source wins, because the ids in its masks follow it. Raises `ValueError` if the given list is no
    class list or lacks a class of the source.
    """
    if given is not None:
        given = list(id2label_from(given).values())
    if own is None:
        return given
    own = list(id2label_from(background_first(own, source)).values())
    unknown = [name for name in own if given is not None and name not in given]
    if unknown:
        raise ValueError(
            f"{source} has the classes {name_some(unknown, 5)}, which are not in the class list "
            f"({', '.join(given[1:])}): rename them, or take a model that knows them."
        )
    return own


def read_label_file(path: str | Path, class_names: Sequence[str]) -> dict[str, list[int]]:
    """
    Reads image-level labels from a file.

    - `.npz`: `ids` (`(N,)` strings) and `labels` (`(N, C)`, 0 or 1, columns in the order of `class_names[1:]`).
    - `.json`: one object from identifier to a list of class names or to a list of C numbers 0 and 1.
    - `.csv`: with or without a header; either two columns (identifier; names separated as [`LabelReader`] has it), or
      1 + C columns (identifier; 0 or 1 for each class, in the order of the header's class names if it has them, else
      of `class_names[1:]`). Several rows of one identifier are joined.

    Identifiers may carry an image suffix or a folder; both are dropped.

    Args:
        path (`str` or `Path`): The file; its suffix chooses the format.
        class_names (`Sequence[str]`): C + 1 class names, background first.

    Returns:
        `dict[str, list[int]]`: for each identifier, its label ids: 0-based over the foreground classes, sorted.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Unknown format, a truncated or otherwise unreadable file, a label vector of another length or with
            other values than 0 and 1, an unknown class name, or an identifier that names two images.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no label file {path}: give 'annotations', 'masks', or the path of an .npz, .json or .csv file."
        )
    readers = {".npz": _read_npz, ".json": _read_json, ".csv": _read_label_csv}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"The label file {path} has the suffix {path.suffix!r}, but .npz, .json or .csv is expected.")
    rows = list(readers[suffix](path, class_names))
    found, _ = read_labels({"": [([cell], place) for _, cell, place in rows]}, "labels", class_names, str(path))
    table: dict[str, list[int]] = {}
    written: dict[str, tuple[str, str]] = {}
    for (name, _, place), ids in zip(rows, found[""], strict=True):
        key = image_name(name)
        earlier, first_place = written.setdefault(key, (name, place))
        # a.jpg and a.png, x/a and y/a are two images, and only the rows of a table may come one for each label
        is_other = "." in earlier and "." in name and Path(earlier).suffix.lower() != Path(name).suffix.lower()
        folders = {posixpath.dirname(text.replace("\\", "/")) for text in (earlier, name)}
        is_other |= "" not in folders and len(folders) > 1
        if is_other or (suffix != ".csv" and table.get(key, ids) != ids):
            raise ValueError(f"{first_place} and {place} both give labels of {key}: keep one of them.")
        table[key] = sorted({*table.get(key, ()), *ids})
    return table


def read_csv_rows(path: Path) -> list[tuple[int, list[str]]]:
    """
    Line number, from 1, and stripped cells of each row that is not empty.

    Cells are separated by `,`, `;` or tabulators, whichever comes first in the first line. Raises `ValueError` that
    names the row where the file is not text or not a table.
    """
    text = read_text(path)
    # how Excel says which separator it used
    text = re.sub(r'\A"?sep=.?"?\n', "\n", text, flags=re.IGNORECASE)
    first = text.lstrip("\n").split("\n", 1)[0]
    delimiter = next((character for character in first if character in ",;\t"), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}, is not a row of a table ({error}).") from error
    rows = [(number, cells) for number, cells in rows if any(cells)]
    # pandas writes the numbers of the rows before the first column
    if len(rows) > 1 and rows[0][1][0] in ("", "Unnamed: 0") and all(cells[0].isdecimal() for _, cells in rows[1:]):
        rows = [(number, cells[1:]) for number, cells in rows]
    return rows


def _read_npz(path: Path, class_names: Sequence[str]) -> Iterable[tuple[str, Any, str]]:
    """The identifier of each row, a cell of labels and its place; likewise for the other formats."""
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
    for row, (name, values) in enumerate(zip(ids.astype(str).tolist(), labels.tolist(), strict=True)):
        ids = _ids_from_vector(values, num_classes, f"{path}, {name}")
        yield name, [class_names[label + 1] for label in ids], f"{path}, row {row} ({name})"


def _read_json(path: Path, class_names: Sequence[str]) -> Iterable[tuple[str, Any, str]]:
    text = read_text(path)
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise ValueError(f"The label file {path} is not valid JSON ({error}).") from error
    if not isinstance(entries, dict) or not all(isinstance(value, list | dict | None) for value in entries.values()):
        raise ValueError(f"The label file {path} must hold one object from identifier to a list of names or numbers.")
    return [(key, cell, f"{path}, {key}") for key, cell in entries.items()]


def _read_label_csv(path: Path, class_names: Sequence[str]) -> Iterable[tuple[str, Any, str]]:
    rows, num_classes = read_csv_rows(path), len(class_names) - 1
    if not rows:
        raise ValueError(f"The label file {path} is empty.")
    first = [clean_label(cell) for cell in rows[0][1]]
    names = class_names[1:]
    if first[0].lower() in IMAGE_HEADERS or set(first[1:]) == set(names):
        rows = rows[1:]
        if len(first) > 2:
            names = [class_names[class_index(name, class_names)] for name in first[1:]]
            if sorted(names) != sorted(class_names[1:]):
                raise ValueError(
                    f"The header of the label file {path} names {len(names)} classes, but each of the {num_classes} "
                    "foreground classes is expected once."
                )
    for number, (image, *cells) in rows:
        place = f"{path}, row {number} ({image})"
        is_vector = len(cells) > 1
        yield (
            image,
            [names[i] for i in _ids_from_vector(cells, num_classes, place)] if is_vector else "".join(cells),
            place,
        )


def _parsed(text: str, place: str) -> Any:
    """The list or object that a text writes as JSON or Python."""
    for read in (json.loads, ast.literal_eval):
        # numpy prints ['a' 'b'], which Python reads as ['ab']
        if not re.search(r"""['"]\s+['"]""", text):
            try:
                return read(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                pass
    raise _no_label(text, place)


def _no_label(found: Any, place: str) -> ValueError:
    return ValueError(
        f"{place}: the labels {str(found)[:80]} cannot be read: a name, a number, a list of these, names with 0 or 1, "
        f"or detection metadata with one of {', '.join(CATEGORY_KEYS[:4])} is expected."
    )


def _as_text(item: Any) -> str:
    """A name or number as text, for example "3" of 3, 3.0 and "3.0"."""
    is_whole = isinstance(item, bool | float) and float(item).is_integer()
    return str(int(item)) if is_whole else re.sub(r"^(\d+)\.0$", r"\1", clean_label(str(item)))


__all__ = [
    "CATEGORY_KEYS",
    "IMAGE_HEADERS",
    "NO_LABEL",
    "LabelReader",
    "choose_class_names",
    "flag",
    "ids_from_names",
    "read_csv_rows",
    "read_label_file",
    "read_labels",
    "usual_name",
]
