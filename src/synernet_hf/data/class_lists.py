"""Labels of a source → its class list and label vectors, by name and never by chance."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from synernet_hf.data.label_files import multi_hot, name_some
from synernet_hf.data.schema import class_index, id2label_from


def infer_class_names(labels: Sequence[Sequence[str]]) -> list[str]:
    """
    Makes the class list of a source that has none: its names in alphabetical order, numbers by their size.

    Args:
        labels (`Sequence[Sequence[str]]`):
            Class names of each picture.

    Returns:
        `list[str]`: class names, `"background"` first.

    Raises:
        ValueError: There is no label.
    """
    names = {name for picture in labels for name in picture} - {"background"}
    if not names:
        raise ValueError("No picture has a label: fill in the labels, or check which column holds them.")
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


def vector_from_names(names: Sequence[str], class_names: Sequence[str], place: str) -> np.ndarray:
    """
    Turns the labels of one picture into a vector.

    Args:
        names (`Sequence[str]`):
            Class names, or, where no class is called so, ids of foreground classes (1 to C) as text.
        class_names (`Sequence[str]`):
            C + 1 class names, background first.
        place (`str`):
            Where the labels stand, for the error sentence.

    Returns:
        `np.ndarray`: `(C,)` uint8 multi-hot.

    Raises:
        ValueError: A name or id is not in the class list.
    """
    try:
        return multi_hot([_name_of(name, class_names) for name in names], class_names)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _name_of(name: str, class_names: Sequence[str]) -> str:
    if name in class_names or not name.isdecimal():
        class_index(name, class_names)
        return name
    if not 1 <= int(name) < len(class_names):
        raise ValueError(f"The class id {name} is not one of 1 to {len(class_names) - 1} (0 is the background).")
    return class_names[int(name)]


def vector_from_numbers(values: Sequence[Any], num_classes: int, place: str) -> np.ndarray:
    """
    Checks a multi-hot vector.

    Args:
        values (`Sequence[Any]`):
            A 0 or 1 for each foreground class.
        num_classes (`int`):
            Number C of foreground classes.
        place (`str`):
            Where the vector stands, for the error sentence.

    Returns:
        `np.ndarray`: `(C,)` uint8 multi-hot.

    Raises:
        ValueError: It has another length or other values.
    """
    vector = np.asarray(values, dtype=float)
    if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
        raise ValueError(
            f"{place}: the label vector {list(values)[:8]} does not hold one 0 or 1 for each of the {num_classes} "
            "foreground classes."
        )
    return vector.astype(np.uint8)


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
    "checked_class_names",
    "infer_class_names",
    "numbered_names",
    "vector_from_names",
    "vector_from_numbers",
]
