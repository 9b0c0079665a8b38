"""A folder of images with a table of labels, or with one subfolder for each class → splits of records."""

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from synernet_hf.data.coco import PolygonMask, outline_cell
from synernet_hf.data.files import IMAGE_SUFFIXES, MASK_FOLDER, ImageIndex, read_text, unique_ids
from synernet_hf.data.labels import IMAGE_HEADERS, LabelReader, choose_class_names, read_csv_rows
from synernet_hf.data.schema import build_split, choose_splits, name_some, note_skipped


logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLE_NAMES = ("labels.csv", "metadata.csv", "metadata.jsonl")
SPLIT_FOLDERS = ("train", "validation", "val", "test")

LABEL_HEADERS = ("labels", "label", "image_labels", "classes", "class", "class_name", "tags", "categories", "category")
MASK_HEADERS = ("mask", "mask_file_name", "mask_file")
SPLIT_HEADER = "split"


@dataclass
class LabelledImages:
    """
    Images of one split before their labels become vectors.

    Args:
        paths (`list[str]`): the files.
        image_ids (`list[str]`): unique names.
        labels (`list[list[Any]]`): what the rows of each image hold: a text, a number or a list.
        places (`list[str]`): where each image's labels stand, for error sentences.
        masks (`list`): mask files, or what [`outline_cell`] takes; `None` where there is none.
        class_names (`list[str]`, *optional*): class list that the source itself gives, background first.
        label_column (`str`, *optional*): name of the column of labels.
        skipped (`list[str]`): what was left out and why.
    """

    paths: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    labels: list[list[Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    class_names: list[str] | None = None
    label_column: str | None = None
    skipped: list[str] = field(default_factory=list)


def load_folder(
    path: Path,
    columns: dict[str, str | None],
    class_names: Sequence[str] | None,
    wanted: tuple[str | None, str | None],
    on_bad_image: str,
    skipped: dict[str, list[str]] | None,
) -> datasets.DatasetDict:
    """
    Loads a folder of images with labels, or a table in it; no image is opened.

    `columns` are `image_column`, `label_column` and `mask_column` of a table, `wanted` the names of the training split
    and of the one to evaluate on, as far as they are given; see [`load_image_labels`] for the others.

    Raises `FileNotFoundError` if a split, an image or a mask is missing, and `ValueError` if a table cannot be read
    or a label is not in the class list.
    """
    return build_splits(_read_folder(path, columns, *wanted), path, class_names, on_bad_image, skipped)


def build_splits(
    splits: dict[str, LabelledImages],
    path: Path,
    class_names: Sequence[str] | None,
    on_bad_image: str,
    skipped: dict[str, list[str]] | None,
) -> datasets.DatasetDict:
    """The splits of records, with a class list for all of them; `path` is their source."""
    first = next(iter(splits.values()))
    names = choose_class_names(class_names, first.class_names, str(path))
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
        feature = None
        if masks and not isinstance(masks[0], str):
            masks, feature = [outline_cell(*mask, names) for mask in masks], PolygonMask()
        note_skipped(skipped, split, images.skipped)
        built[split] = build_split(images.paths, images.image_ids, labels, names, masks, feature)
    return datasets.DatasetDict(built)


def find_table(folder: Path) -> Path | None:
    """The first of `labels.csv`, `metadata.csv` and `metadata.jsonl` that is in a folder."""
    return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)


def split_folders(root: Path, train_split: str | None, validation_split: str | None) -> dict[str, Path] | None:
    """
    The folders of `train` and `validation`, as far as they are there; `None` if `root` is not divided into splits.

    Raises `FileNotFoundError` if a folder that was named is not there.
    """
    if find_table(root) is not None:
        return None
    folders = {path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    named = {name for name in (train_split, validation_split) if name}
    # a class may be called "train": folders are splits only if all of them are
    if not folders or folders - set(SPLIT_FOLDERS) - named - {MASK_FOLDER}:
        return None
    missing = sorted(named - folders)
    if missing:
        raise FileNotFoundError(
            f"There is no folder {root / missing[0]}: {root} has the folders {', '.join(sorted(folders))}."
        )
    return {split: root / name for split, name in choose_splits(folders, train_split, validation_split, root).items()}


def read_class_folders(folder: Path) -> LabelledImages:
    """
    Reads a folder in which each subfolder holds the images of one class; those of `background` have no class.

    Raises `ValueError` if no image is in a subfolder, images lie beside the subfolders, or the folder `masks` holds no
    mask of them.
    """
    index = ImageIndex(folder)
    if not index.paths:
        raise ValueError(
            f"The folder {folder} has neither a table ({', '.join(TABLE_NAMES)}) nor images in subfolders named "
            "after their classes: add one of them."
        )
    loose = [path for path in index.paths if "/" not in path]
    if loose:
        raise ValueError(
            f"{len(loose)} images lie in {folder} itself ({name_some(loose)}): add a table ({TABLE_NAMES[0]}), or "
            "put every image into the subfolder of its class."
        )
    names = [path.split("/")[0] for path in index.paths]
    paths = [str(folder / path) for path in index.paths]
    masks = [index.mask_of(path) for path in paths]
    in_masks = ImageIndex(folder / MASK_FOLDER).paths
    if in_masks and not any(masks):
        raise ValueError(
            f"None of the {len(in_masks)} files in {folder / MASK_FOLDER} ({name_some(in_masks)}) is named after an "
            "image (masks/FOLDER/NAME.png): name them so if they are masks, or rename the folder if it is a class."
        )
    return LabelledImages(
        paths=paths,
        image_ids=unique_ids(paths, folder),
        labels=[[] if name == "background" else [[name]] for name in names],
        places=[f"the folder {folder / name}" for name in names],
        masks=masks,
    )


def read_table(
    path: Path,
    image_column: str | None = None,
    label_column: str | None = None,
    mask_column: str | None = None,
    ignore_splits: bool = False,
) -> dict[str, LabelledImages]:
    """
    Reads a table of labels (`.csv`, `.tsv` or `.jsonl`) and finds its images.

    The image column is the first with a usual name (`file_name`, `image`, `id`, ...) or else the first; the label
    column the first with a usual name (`labels`, `label`, `class`, ...), else the only one left, else all that are
    left if they hold 0 and 1 only; the mask column `mask` or `mask_file_name`. Rows of one image are taken together.
    Images that are not there are in `skipped`.

    Returns splits by the value of the column `split`; `""` is the key where there is none, or with `ignore_splits`.
    Raises `ValueError` that names file and row if the table cannot be read, a column is missing or a row is
    ambiguous.
    """
    rows = _read_rows(path)
    headers = list(dict.fromkeys(key for _, row in rows for key in row))
    image_column = _column(path, headers, image_column, "image_column", IMAGE_HEADERS) or headers[0]
    mask_column = _column(path, headers, mask_column, "mask_column", MASK_HEADERS)
    split_column = _column(path, headers, None, "", (SPLIT_HEADER,))
    label_column = _column(path, headers, label_column, "label_column", LABEL_HEADERS)
    rest = [name for name in headers if name not in (image_column, mask_column, split_column)]
    class_columns = []
    if label_column is None:
        is_vector = all(str(row.get(name, "")).strip() in ("0", "1") for _, row in rows for name in rest)
        if len(rest) == 1 and not is_vector:
            label_column = rest[0]
        elif rest and is_vector:
            class_columns = rest
        else:
            raise ValueError(
                f"{path} has no column of labels among {', '.join(headers)}: name it with label_column, or give one "
                "column of 0 and 1 for each class."
            )
    splits: dict[str, LabelledImages] = {}
    masks = (str(row[mask_column]).strip() for _, row in rows if row.get(mask_column))
    index, seen = ImageIndex(path.parent, left_out=masks), {}
    for number, row in rows:
        place = f"{path}, row {number}"
        split = "" if ignore_splits or not split_column else str(row.get(split_column) or "").strip()
        images = splits.setdefault(split, LabelledImages(label_column=label_column))
        if class_columns:
            images.class_names = ["background", *class_columns]
            names = [name for name in class_columns if str(row[name]).strip() == "1"]
        else:
            names = row.get(label_column)
        _add(images, index, (place, row.get(image_column), names, row.get(mask_column)), seen)
    for images in splits.values():
        images.image_ids = unique_ids(images.paths, path.parent)
    return splits


def _add(images: LabelledImages, index: ImageIndex, row: tuple, seen: dict[str, tuple]) -> None:
    """Adds a row to its split, or its labels to the image's earlier row."""
    place, name, names, mask = row
    if name is None or not str(name).strip():
        raise ValueError(f"{place}, names no image: fill it in or take the row out.")
    try:
        found = index.find(str(name))
    except ValueError as error:
        raise ValueError(f"{place}, {error}.") from error
    if found is None:
        images.skipped.append(f"{place}: there is no image {name} below {index.folder}")
        return
    if found in seen:
        earlier, position = seen[found]
        if earlier is not images:
            raise ValueError(f"{place}, puts {name} into a second split: give an image one split.")
        images.labels[position].append(names)
        return
    seen[found] = (images, len(images.paths))
    mask_file = None
    if mask is not None and str(mask).strip():
        mask_file = str(index.folder / str(mask).strip())
        if not Path(mask_file).is_file():
            raise FileNotFoundError(f"{place}, names the mask {mask}, which is not there: add it or leave it empty.")
    images.paths.append(found)
    images.labels.append([names])
    images.places.append(place)
    images.masks.append(mask_file or index.mask_of(found))


def _column(path: Path, headers: Sequence[str], given: str | None, argument: str, usual: Sequence[str]) -> str | None:
    if given is not None:
        if given not in headers:
            raise ValueError(f"{path} has no column {given!r} ({argument}): it has {', '.join(headers)}.")
        return given
    lower = {name.lower(): name for name in headers}
    return next((lower[name] for name in usual if name in lower), None)


def _read_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Numbered rows; the header of a table is row 1."""
    rows = _read_json_lines(path) if path.suffix.lower() == ".jsonl" else _read_table_rows(path)
    if not rows:
        raise ValueError(f"The table {path} has no rows: give at least one image.")
    return rows


def _read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    # not splitlines, which also splits at characters that may stand in names
    for number, line in enumerate(io.StringIO(read_text(path), newline=""), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, row {number}, is not JSON ({error}).") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}, is not a JSON object: write one in braces for each image.")
        rows.append((number, row))
    return rows


def _read_table_rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    rows = read_csv_rows(path)
    if not rows:
        return []
    number, first = rows[0]
    header = _header(f"{path}, row {number}", first)
    rows = rows[1:] if header is first else rows
    for number, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, row {number}, has {len(cells)} cells, but {len(header)} are expected ({', '.join(header)}): "
                "put several labels in quotes or separate them by a semicolon."
            )
    return [(number, dict(zip(header, cells, strict=True))) for number, cells in rows]


def _header(place: str, cells: list[str]) -> list[str]:
    """The first row, or the headers of a table that begins with an image and its labels."""
    is_image = Path(cells[0]).suffix.lower() in IMAGE_SUFFIXES
    is_vector = len(cells) > 1 and set(cells[1:]) <= {"0", "1"} and cells[0].lower() not in IMAGE_HEADERS
    if is_image and len(cells) == 2:
        return ["file_name", "labels"]
    if is_image or is_vector:
        raise ValueError(
            f"{place}, names an image ({cells[0]}) where the headers are expected: give the first row the headers "
            "file_name and, for columns of 0 and 1, the names of the classes."
        )
    repeated = sorted({name for name in cells if name and cells.count(name) > 1})
    if repeated:
        raise ValueError(
            f"{place}, has the headers {name_some(repeated)} more than once: give each column a name of its own."
        )
    return cells


def _read_folder(
    path: Path, columns: dict[str, str | None], train_split: str | None, validation_split: str | None
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
        names = choose_splits(found, train_split, validation_split, table)
        left_out = [name for name in found if name not in names.values()]
        if left_out:
            logger.warning("%s: rows of the splits %s are not used.", table, ", ".join(map(repr, left_out)))
        if not names:
            raise ValueError(
                f"{table} has neither rows of the split 'train' nor of one to evaluate on: it has {', '.join(found)}. "
                "Name one with train_split or validation_split."
            )
        return {split: found[name] for split, name in names.items()}
    folders = split_folders(path, train_split, validation_split)
    if folders is None and (train_split or validation_split):
        raise FileNotFoundError(
            f"{path} is not divided into splits, so there is no {validation_split or train_split!r}: make the folders "
            "train and validation."
        )
    return {split: _read_part(folder, columns) for split, folder in (folders or {"train": path}).items()}


def _read_part(folder: Path, columns: dict[str, str | None]) -> LabelledImages:
    table = find_table(folder)
    given = [f"{argument}={name}" for argument, name in columns.items() if name is not None]
    if table is None and given:
        raise ValueError(f"{folder} has no table, so {given[0]} names nothing: add a table or leave it out.")
    if table is None:
        return read_class_folders(folder)
    return read_table(table, **columns, ignore_splits=True)[""]


def _masks(images: LabelledImages, split: str, path: Path) -> list[str] | None:
    without = [place for place, mask in zip(images.places, images.masks, strict=True) if mask is None]
    if len(without) == len(images.masks):
        logger.warning("%s: the split %r has no masks: it cannot be scored.", path, split)
        return None
    if without:
        raise FileNotFoundError(
            f"{len(without)} of {len(images.masks)} images of the split {split!r} have no mask "
            f"({name_some(without)}): add them, under the path of the image (as masks/cat/1.png) where two share a "
            "name, or take the images out."
        )
    return list(images.masks)


__all__ = ["LABEL_HEADERS", "TABLE_SUFFIXES", "find_table", "load_folder"]
