"""Labels of a source → its class list and label ids, by name and never by chance."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from synernet_hf.data.label_files import label_ids, name_some
from synernet_hf.data.schema import class_index, id2label_from


LABEL_SEPARATORS = ";|,"


class LabelReader:
    """
    Reads cells of labels, each a text with one or several names, a number, or a list of names, ids or 0 and 1.

    What a cell alone does not say is decided once, from those of all splits: whether lists are label vectors, and
    whether spaces separate names.

    Args:
        cells (`Iterable[Any]`, *optional*):
            The cells of all splits.
        column (`str`, *optional*):
            Name of a column of texts in which spaces may separate names: they do where no text holds `;`, `|` or `,`
            and the column has a plural name (`labels`, `classes`, `tags`), so that `traffic light` in a column `label`
            stays whole.
        class_names (`Sequence[str]`, *optional*):
            Class names that are known; a text that is one of them is not taken apart.

    Attributes:
        vector_length (`int` or `None`): number of classes of the lists, if they are label vectors.
    """

    def __init__(
        self, cells: Iterable[Any] = (), column: str | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self.known = frozenset(class_names or ())
        cells = [cell for cell in cells if not is_empty(cell)]
        self.vector_length = vector_length(cells)
        texts = [cell for cell in cells if isinstance(cell, str) and cell.strip() not in self.known]
        has_separator = any(separator in text for text in texts for separator in LABEL_SEPARATORS)
        is_plural = column is not None and column.lower().endswith("s") and column.lower() != "class"
        self.separators = [*LABEL_SEPARATORS, *([r"\s"] if is_plural and not has_separator else [])]

    def names(self, cell: Any, place: str) -> list[str]:
        """
        The names or ids in one cell that holds no label vector.

        Args:
            cell (`Any`):
                The cell.
            place (`str`):
                Where it stands, for the error sentence.

        Returns:
            `list[str]`: names, or numbers as text, without repeats.

        Raises:
            ValueError: It is a list of numbers with a 0 or a repeat, which ids of classes do not have.
        """
        if is_empty(cell):
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
        names = (as_text(item) for item in cell)
        return list(dict.fromkeys(name for name in names if name))

    def ids(self, cells: Sequence[Any], class_names: Sequence[str], place: str) -> list[int]:
        """
        The label ids of one image.

        Args:
            cells (`Sequence[Any]`):
                Its cells, one for each row that the image has.
            class_names (`Sequence[str]`):
                C + 1 class names, background first.
            place (`str`):
                Where they stand, for the error sentence.

        Returns:
            `list[int]`: 0-based ids over the foreground classes, sorted.

        Raises:
            ValueError: A label vector of another length, or a name or id that is not in the class list.
        """
        if self.vector_length is None:
            return ids_from_names([name for cell in cells for name in self.names(cell, place)], class_names, place)
        found = [ids_from_vector(cell, len(class_names) - 1, place) for cell in cells if not is_empty(cell)]
        return sorted({label for ids in found for label in ids})

    def infer_class_names(self, images: Iterable[tuple[Sequence[Any], str]]) -> list[str]:
        """
        The class list of labels that come without one.

        Args:
            images (`Iterable[tuple[Sequence[Any], str]]`):
                Cells of each image of the training split, and where they stand.

        Returns:
            `list[str]`: class names, `"background"` first.

        Raises:
            ValueError: There is no label.
        """
        if self.vector_length is not None:
            return numbered_names(self.vector_length)
        return infer_class_names([[n for cell in cells for n in self.names(cell, place)] for cells, place in images])

    def _parts(self, text: str, separators: Sequence[str]) -> list[str]:
        text = text.strip()
        if text in self.known or not separators:
            return [text]
        pieces = re.split(f"[{separators[0]}]", text)
        return [part for piece in pieces for part in self._parts(piece, separators[1:])]


def is_empty(cell: Any) -> bool:
    """
    Says whether a cell holds no label.

    Args:
        cell (`Any`):
            The cell.

    Returns:
        `bool`: It is missing, an empty list or an empty text.
    """
    return cell is None or cell == [] or (isinstance(cell, str) and not cell.strip())


def as_text(item: Any) -> str:
    """
    Writes a name or number as text.

    Args:
        item (`Any`):
            A name or number.

    Returns:
        `str`: For example `"cat"`, or `"3"` of 3 and of 3.0.
    """
    is_whole = isinstance(item, bool | float) and float(item).is_integer()
    return str(int(item)) if is_whole else str(item).strip()


def vector_length(cells: Iterable[Any]) -> int | None:
    """
    Says whether cells are label vectors.

    Args:
        cells (`Iterable[Any]`):
            Cells that are not empty.

    Returns:
        `int` or `None`: their length if each is a list of as many numbers 0 and 1; lists of a single number must hold
        a 0 somewhere, for `[1]` is also a list of ids.
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


def infer_class_names(labels: Sequence[Sequence[str]]) -> list[str]:
    """
    Makes the class list of a source that has none: its names in alphabetical order, numbers by their size.

    Args:
        labels (`Sequence[Sequence[str]]`):
            Class names of each image.

    Returns:
        `list[str]`: class names, `"background"` first.

    Raises:
        ValueError: There is no label.
    """
    names = {name for image in labels for name in image} - {"background"}
    if not names:
        raise ValueError("No image has a label: fill in the labels, or check which column holds them.")
    by_size = all(name.isdecimal() for name in names)
    return ["background", *sorted(names, key=lambda name: (int(name), name) if by_size else name)]


def checked_class_names(given: Sequence[str] | None, own: Sequence[str] | None, source: str) -> list[str] | None:
    """
    Decides between a class list that was asked for and the one that a source has.

    Args:
        given (`Sequence[str]`, *optional*):
            Class names, background first, as the user gave them.
        own (`Sequence[str]`, *optional*):
            Class names that the source itself numbers.
        source (`str`):
            Where they come from, for the error sentence.

    Returns:
        `list[str]` or `None`: the source's own order where it has one, for the ids in its masks follow it; else the
        given one.

    Raises:
        ValueError: The given list is no class list, or lacks a class of the source.
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


def ids_from_names(names: Sequence[str], class_names: Sequence[str], place: str) -> list[int]:
    """
    Turns the labels of one image into ids.

    Args:
        names (`Sequence[str]`):
            Class names, or, where no class is called by a number, ids of foreground classes (1 to C) as text.
        class_names (`Sequence[str]`):
            C + 1 class names, background first.
        place (`str`):
            Where the labels stand, for the error sentence.

    Returns:
        `list[int]`: 0-based ids over the foreground classes, sorted.

    Raises:
        ValueError: A name or id is not in the class list.
    """
    try:
        return label_ids([_name_of(name, class_names) for name in names], class_names)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _name_of(name: str, class_names: Sequence[str]) -> str:
    # where classes are called "1" and "3", a "2" is no id
    if name in class_names or not name.isdecimal() or any(other.isdecimal() for other in class_names[1:]):
        class_index(name, class_names)
        return name
    if not 1 <= int(name) < len(class_names):
        raise ValueError(f"The class id {name} is not one of 1 to {len(class_names) - 1} (0 is the background).")
    return class_names[int(name)]


def ids_from_vector(values: Sequence[Any], num_classes: int, place: str) -> list[int]:
    """
    Reads a multi-hot vector.

    Args:
        values (`Sequence[Any]`):
            A 0 or 1 for each foreground class.
        num_classes (`int`):
            Number C of foreground classes.
        place (`str`):
            Where the vector stands, for the error sentence.

    Returns:
        `list[int]`: 0-based ids over the foreground classes, sorted.

    Raises:
        ValueError: It has another length or other values.
    """
    vector = np.asarray(values, dtype=float)
    if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
        raise ValueError(
            f"{place}: the label vector {list(values)[:8]} does not hold one 0 or 1 for each of the {num_classes} "
            "foreground classes."
        )
    return np.flatnonzero(vector).tolist()


def numbered_names(num_classes: int) -> list[str]:
    """
    Names for classes that come without.

    Args:
        num_classes (`int`):
            Number C of foreground classes.

    Returns:
        `list[str]`: `["background", "class_1", ...]`.
    """
    return ["background", *(f"class_{index}" for index in range(1, num_classes + 1))]


__all__ = [
    "LabelReader",
    "as_text",
    "checked_class_names",
    "ids_from_names",
    "ids_from_vector",
    "infer_class_names",
    "is_empty",
    "numbered_names",
    "vector_length",
]
