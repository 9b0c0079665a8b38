"""Anybody's images with image-level labels: a folder with a table, class folders, a Hub data set, parquet files."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import datasets

from synernet_hf.data.class_lists import LabelReader, checked_class_names
from synernet_hf.data.image_columns import load_columns
from synernet_hf.data.image_folder import (
    VALIDATION_NAMES,
    LabelledImages,
    find_table,
    read_class_folders,
    read_table,
    split_folders,
)
from synernet_hf.data.label_files import name_some
from synernet_hf.data.schema import as_streams, build_split, check_on_bad_image, note_skipped


logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")


class ColumnNames(TypedDict, total=False):
    """
    Which columns of a table or data set to take.

    Attributes:
        image_column (`str`, *optional*):
            Images, or in a table their files. Found by itself where its name is a usual one (`image`, `file_name`).
        label_column (`str`, *optional*):
            Labels. Found by itself where its name is a usual one (`labels`, `label`, `class`).
        mask_column (`str`, *optional*):
            Masks of the images to evaluate on, or in a table their files; `mask` where there is such a column.
    """

    image_column: str | None
    label_column: str | None
    mask_column: str | None


def load_image_labels(
    data_dir: str | Path,
    class_names: Sequence[str] | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    on_bad_image: str = "raise",
    streaming: bool = False,
    skipped: dict[str, list[str]] | None = None,
    **columns: Unpack[ColumnNames],
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Loads images with image-level labels from wherever they are, without decoding one.

    - **A folder with a table** (`labels.csv`, `metadata.csv` or `metadata.jsonl`, or the table itself): a row for each
      image, with its file (or its name without suffix) and its labels; several labels are separated by `;`, `|` or
      `,`, or stand in rows or in 0/1 columns of their own. The column `split` says what is `train` and `validation`.
    - **A folder with a subfolder for each class.**
    - **A folder with `train` and `validation`** (or `val`, `test`), each of one of these two kinds.
    - **A Hub data set, a folder of parquet files, or what `save_to_disk` wrote**: the label column is a `ClassLabel`,
      a name, a class id, or a list of these, or a list of one 0 or 1 for each class.

    Masks for evaluation come from the mask column, or from `masks/NAME.png` beside the images of a folder
    (`masks/FOLDER/NAME.png` where images share a name). Masks of the training split are not looked at.

    Args:
        data_dir (`str` or `Path`):
            The folder, table or Hub id.
        class_names (`Sequence[str]`, *optional*):
            The class list, background first. Without it, it is the one that the source has (`ClassLabel`, names of 0/1
            columns), or else the names that occur in the training split, in alphabetical order (numbers by size).
            Ids in masks are positions in this list.
        train_split (`str`, *optional*, defaults to `"train"`):
            Name of the training split.
        validation_split (`str`, *optional*):
            Name of the split to evaluate on; `validation`, `val` or `test` where it is not given.
        on_bad_image (`str`, *optional*, defaults to `"raise"`):
            What to do about images that a table names and that are not there: `"raise"`, or `"skip"` to leave them
            out, log them and list them in `skipped`.
        streaming (`bool`, *optional*, defaults to `False`):
            Gives an `IterableDatasetDict` to go through; a Hub or parquet data set is read meanwhile. Not for
            training, which draws images at random.
        skipped (`dict[str, list[str]]`, *optional*):
            Dictionary to which what is left out is added, a phrase for each record, by split.
        columns ([`ColumnNames`]):
            `image_column`, `label_column` and `mask_column`.

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`: `train` (`image`, `image_id`, `labels`) and
        `validation` (the same and, where there are masks, `mask`), as far as they are there.

    Raises:
        FileNotFoundError: The source, an image or a mask is missing; of a table, the row is named.
        ValueError: A table that can not be read, an ambiguous image, a column that is not there, a label that is not
            in the class list.

    Example:

    ```python
    >>> from synernet_hf.data import load_image_labels

    >>> pets = load_image_labels("path/to/pets", label_column="species")  # doctest: +SKIP
    >>> hub = load_image_labels("user/pets", validation_split="test")  # doctest: +SKIP
    ```"""
    check_on_bad_image(on_bad_image)
    known = ColumnNames.__annotations__
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise TypeError(f"load_image_labels does not take {', '.join(unknown)}: columns are {', '.join(known)}.")
    path = Path(data_dir).expanduser()
    is_table = path.is_file() and path.suffix.lower() in TABLE_SUFFIXES
    if is_table or (path.is_dir() and not _holds_columns(path)):
        built = _build(
            _read_folder(path, columns, train_split, validation_split), path, class_names, on_bad_image, skipped
        )
        return as_streams(built) if streaming else built
    if not path.exists() and str(data_dir).count("/") != 1:
        raise FileNotFoundError(f"There is no folder {data_dir}, and it is no Hub id of the form owner/name.")
    splits = load_columns(data_dir, dict(columns), class_names, (train_split, validation_split), streaming)
    return datasets.IterableDatasetDict(splits) if streaming else datasets.DatasetDict(splits)


def _holds_columns(folder: Path) -> bool:
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    return saved or (find_table(folder) is None and next(folder.rglob("*.parquet"), None) is not None)


def _read_folder(
    path: Path, columns: ColumnNames, train_split: str | None, validation_split: str | None
) -> dict[str, LabelledImages]:
    table = path if path.is_file() else find_table(path)
    if table is not None:
        found = read_table(table, **columns)
        if set(found) == {""}:
            if validation_split or train_split:
                raise ValueError(
                    f"{table} has no column 'split', so there is no split {validation_split or train_split!r}: add the "
                    "column, or put the images into the folders train and validation with a table each."
                )
            return {"train": found[""]}
        missing = [name for name in (train_split, validation_split) if name and name not in found]
        if missing:
            raise ValueError(f"{table} has no row of the split {missing[0]!r}: it has {', '.join(found)}.")
        names = {"train": train_split or "train"}
        names["validation"] = validation_split or next((name for name in VALIDATION_NAMES if name in found), "")
        left_out = [name for name in found if name not in names.values()]
        if left_out:
            logger.warning("%s: rows of the splits %s are not used.", table, ", ".join(map(repr, left_out)))
        splits = {split: found[name] for split, name in names.items() if name in found}
        if not splits:
            raise ValueError(
                f"{table} has neither rows of the split 'train' nor of one to evaluate on: it has {', '.join(found)}. "
                "Name one with train_split or validation_split."
            )
        return splits
    folders = split_folders(path, train_split, validation_split)
    if folders is None and (train_split or validation_split):
        raise FileNotFoundError(
            f"{path} is not divided into splits, so there is no {validation_split or train_split!r}: make the folders "
            "train and validation."
        )
    return {split: _read_part(folder, columns) for split, folder in (folders or {"train": path}).items()}


def _read_part(folder: Path, columns: ColumnNames) -> LabelledImages:
    table = find_table(folder)
    given = [f"{argument}={name}" for argument, name in columns.items() if name is not None]
    if table is None and given:
        raise ValueError(f"{folder} has no table, so {given[0]} names nothing: add a table or leave it out.")
    if table is None:
        return read_class_folders(folder)
    return read_table(table, **columns, ignore_splits=True)[""]


def _build(
    splits: dict[str, LabelledImages],
    path: Path,
    class_names: Sequence[str] | None,
    on_bad_image: str,
    skipped: dict[str, list[str]] | None,
) -> datasets.DatasetDict:
    first = next(iter(splits.values()))
    names = checked_class_names(class_names, first.class_names, str(path))
    cells = (cell for images in splits.values() for image in images.labels for cell in image)
    reader = LabelReader(cells, first.label_column, names)
    if names is None:
        names = reader.infer_class_names(zip(first.labels, first.places, strict=True))
        logger.info("%s: %d classes: %s.", path, len(names) - 1, ", ".join(names[1:]))
    built = {}
    for split, images in splits.items():
        if images.skipped and on_bad_image == "raise":
            raise FileNotFoundError(
                f"{len(images.skipped)} images are missing ({name_some(images.skipped)}): add them, take the "
                "rows out, or leave them out with on_bad_image='skip' (--on_bad_image skip)."
            )
        labels = [reader.ids(cells, names, place) for cells, place in zip(images.labels, images.places, strict=True)]
        unlabelled = [image_id for image_id, ids in zip(images.image_ids, labels, strict=True) if not ids]
        if unlabelled:
            logger.warning(
                "%s: %d images of the split %r have no label (%s); they count as images of background alone.",
                path,
                len(unlabelled),
                split,
                name_some(unlabelled),
            )
        masks = None if split == "train" else _masks(images, split, path)
        note_skipped(skipped, split, images.skipped)
        built[split] = build_split(images.paths, images.image_ids, labels, names, masks)
    return datasets.DatasetDict(built)


def _masks(images: LabelledImages, split: str, path: Path) -> list[str] | None:
    without = [place for place, mask in zip(images.places, images.masks, strict=True) if mask is None]
    if len(without) == len(images.masks):
        logger.warning("%s: the split %r has no masks: it can not be scored.", path, split)
        return None
    if without:
        raise FileNotFoundError(
            f"{len(without)} of {len(images.masks)} images of the split {split!r} have no mask "
            f"({name_some(without)}): add them, under the path of the image (as masks/cat/1.png) where two share a "
            "name, or take the images out."
        )
    return list(images.masks)


__all__ = ["ColumnNames", "load_image_labels"]
