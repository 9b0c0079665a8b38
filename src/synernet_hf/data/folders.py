"""A folder of images with tables of labels, or with one subfolder for each class → splits of records."""

import io
import logging
import os
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from synernet_hf.data.coco import PolygonMask, outline_cell
from synernet_hf.data.files import (
    IMAGE_SUFFIXES,
    MASK_FOLDER,
    ImageIndex,
    find_folder,
    is_hidden,
    parse_json,
    read_text,
    unique_ids,
)
from synernet_hf.data.labels import (
    IMAGE_HEADERS,
    NO_LABEL,
    choose_class_names,
    flag,
    read_csv_rows,
    read_labels,
    usual_name,
)
from synernet_hf.data.schema import (
    build_split,
    choose_splits,
    name_some,
    note_skipped,
    renumber_masks,
    split_meaning,
)


logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
TABLE_NAMES = ("labels.csv", "metadata.csv", "metadata.jsonl", "_classes.csv")
LABEL_HEADERS = tuple(
    "labels label image_labels classes class class_name tags categories category choice choices labelname label_name "
    "objects".split()
)
# files that may hold labels, and folders that hold images of all classes
UNREAD_SUFFIXES = (*TABLE_SUFFIXES, ".json", ".xml", ".xls", ".xlsx", ".parquet")
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "data", "photos", "jpegimages"}
MASK_HEADERS = ("mask", "mask_file_name", "mask_file")
SPLIT_HEADERS = ("split", "subset", "partition", "set", "dataset_split", "data_split", "usage")
# what Label Studio writes beside the labels
OTHER_HEADERS = {"annotator", "annotation_id", "created_at", "updated_at", "lead_time"}
# of an image with several rows, whichever is at fault
FURTHER = " and further rows"
# the layouts of Open Images, as CVAT writes it, and of FiftyOne
OPEN_IMAGES = "-annotations-human-imagelabels.csv"
FIFTYONE = "labels.json"


@dataclass
class LabelledImages:
    """
    Images of one split before their labels become ids.

    Args:
        paths (`list[str]`): the files.
        image_ids (`list[str]`): unique names.
        labels (`list[list[Any]]`): the cells in the rows of each image, as [`LabelReader.plain`] takes them.
        places (`list[str]`): where the labels of each image come from, for error messages.
        masks (`list`): mask files, or what [`outline_cell`] takes; `None` where there is none.
        class_names (`list[str]`, *optional*): class list that the source itself gives.
        label_column (`str`, *optional*): name of the column of labels.
        skipped (`list[str]`): what was left out and why.
        mask_faults (`list[str]`): why masks that are named cannot be used.
    """

    paths: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    labels: list[list[Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    class_names: list[str] | None = None
    label_column: str | None = None
    skipped: list[str] = field(default_factory=list)
    mask_faults: list[str] = field(default_factory=list)


def build_splits(
    splits: dict[str, LabelledImages],
    path: Path,
    class_names: Sequence[str] | None,
    on_bad_image: str,
    skipped: dict[str, list[str]] | None,
) -> datasets.DatasetDict:
    """
    The splits of records, with a class list for all of them; `path` is their source.

    Raises `FileNotFoundError` if images or masks are missing, `ValueError` if a label is not in the class list.
    """
    # first the files, for labels of images that are not there say nothing
    missing = [phrase for images in splits.values() for phrase in images.skipped]
    if missing and (on_bad_image == "raise" or not any(images.paths for images in splits.values())):
        raise FileNotFoundError(
            f"{len(missing)} of {len(missing) + sum(len(images.paths) for images in splits.values())} images are "
            f"missing ({name_some(missing)}): add them, take the rows out, or leave them out with on_bad_image='skip' "
            "(--on_bad_image skip)."
        )
    first = next(iter(splits.values()))
    names = choose_class_names(class_names, first.class_names, str(path))
    cells = {split: list(zip(images.labels, images.places, strict=True)) for split, images in splits.items()}
    labels, names = read_labels(cells, first.label_column, names, str(path))
    built = {}
    for split, images in splits.items():
        unlabelled = [image_id for image_id, ids in zip(images.image_ids, labels[split], strict=True) if not ids]
        if unlabelled:
            text = "%s: %d images of the split %r have no label (%s); they count as images of background alone."
            logger.warning(text, path, len(unlabelled), split, name_some(unlabelled))
        masks, feature = None if split == "train" else _masks(images, split, path), None
        if masks and not isinstance(masks[0], str):
            masks, feature = [outline_cell(*mask, names) for mask in masks], PolygonMask()
        note_skipped(skipped, split, images.skipped)
        built[split] = build_split(images.paths, images.image_ids, labels[split], names, masks, feature)
        if feature is None:
            built[split] = renumber_masks(built[split], first.class_names or class_names or ())
    return datasets.DatasetDict(built)


def find_tables(folder: Path) -> dict[str, Path]:
    """
    The tables of labels in a folder by the names of their splits, `""` where one table holds all.

    They are called `labels.csv` or the like, or anything if their headers name images and labels.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLE_SUFFIXES and path.is_file()]
    usual = [path for name in TABLE_NAMES for path in files if path.name.lower() == name]
    if usual:
        return {"": usual[0]}
    annotations = find_folder(folder, "annotations")
    tables = sorted(annotations.glob(f"*{OPEN_IMAGES}")) if annotations else []
    tables = tables or [path for path in files if not is_hidden(path.name) and _is_table(path)]
    if len(tables) == 1:
        return {"": tables[0]}
    found = {path.name.removesuffix(OPEN_IMAGES).split(".")[0]: path for path in tables}
    if found and not any(map(split_meaning, found)):
        names = name_some([path.name for path in tables])
        raise ValueError(f"{folder} has the tables {names}: give the path of the one to read, or call it labels.csv.")
    return found


def read_table(
    path: Path, columns: dict[str, str | None], root: Path | None = None, ignore_splits: bool = False
) -> dict[str, LabelledImages]:
    """
    Reads a table of labels (`.csv`, `.tsv` or `.jsonl`) and finds its images, below its own folder or `root`.

    The image column has a usual name (`file_name`, `image`, `id`, ...) or is the first; the label column has a usual
    name (`labels`, `label`, `class`, ...) or is the only one left, or all that are left if they hold 0 and 1 only. Rows
    of one image are taken together. Images that are not there are in `skipped`.

    Returns splits by the value of the column `split`; `""` is the key where there is none, or with `ignore_splits`.
    Raises `ValueError` that names file and row for what cannot be read or is ambiguous.
    """
    rows, allow_outside = _read_rows(path), (columns := dict(columns)).pop("allow_outside", False)
    headers = list(dict.fromkeys(key for _, row in rows for key in row))
    named = [name for name in headers if name and not name.startswith("Unnamed: ")]
    # pandas writes its index without a name: row numbers, or images where no other column names them
    headers = named if headers[0] in named or usual_name(named, IMAGE_HEADERS) else [headers[0], *named]
    for argument, name in columns.items():
        if name is not None and name not in headers:
            raise ValueError(f"{path} has no column {name!r} ({argument}): it has {', '.join(headers)}.")
    image_column = columns.get("image_column") or usual_name(headers, IMAGE_HEADERS) or headers[0]
    mask_column = columns.get("mask_column") or usual_name(headers, MASK_HEADERS)
    split_column = usual_name(headers, SPLIT_HEADERS)
    label_column = columns.get("label_column") or usual_name(headers, LABEL_HEADERS)
    class_columns = []
    if label_column is None:
        rest = [name for name in headers if name not in (image_column, mask_column, split_column)]
        if OTHER_HEADERS & set(rest):
            rest = [name for name in rest if name not in OTHER_HEADERS | {"id"}]
        is_vector = all(flag(_text(row.get(name)) or 0) is not None for _, row in rows for name in rest)
        if len(rest) == 1 and not is_vector:
            label_column = rest[0]
        elif rest and is_vector:
            class_columns = rest
        else:
            raise ValueError(
                f"{path} has no column of labels among {', '.join(headers)}: name it with label_column, or give one "
                "column of 0 and 1 for each class."
            )
    codes = _open_images_names(path)
    # of Open Images: people looked for the label and did not see it
    unseen = usual_name(headers, ("confidence",)) if label_column and label_column.lower() == "labelname" else None
    root = root or path.parent
    masks = [_text(row.get(mask_column)) for _, row in rows]
    index, seen, splits = ImageIndex(root, filter(None, masks), allow_outside=allow_outside), {}, {}
    all_files = ImageIndex(root, with_masks=True, allow_outside=allow_outside) if any(masks) else index
    for (number, row), mask in zip(rows, masks, strict=True):
        split = "" if ignore_splits else _text(row.get(split_column)).lower()
        images = splits.setdefault(split, LabelledImages(label_column=label_column))
        if class_columns:
            images.class_names = class_columns
            names = [name for name in class_columns if flag(row.get(name))]
        else:
            names = None if unseen and flag(row[unseen]) is False else row.get(label_column)
            names = codes.get(names, names) if codes else names
        place = f"{path}, row {number}"
        position = _add(images, index, (place, row.get(image_column), names), seen)
        if position is not None and mask:
            file = all_files.find_first([mask], place)
            if file is None:
                images.mask_faults.append(f"{place}, names the mask {mask}, which is not there")
            elif images.places[position] != place and images.masks[position] != file:
                images.mask_faults.append(
                    f"{place}, names the mask {mask}, but {images.places[position]}, another one"
                )
            images.masks[position] = file
    unused = len(index.paths) - len(seen)
    if unused > 0:
        logger.info("%s does not name %d of the images below %s.", path, unused, root)
    if len(splits) > 1 and "" in splits:
        logger.warning("%s: %d images without a split are not used.", path, len(splits.pop("").paths))
    parents = map(Path, {os.path.dirname(found) for found in seen})
    tops = {top for path in parents if path.is_relative_to(root) for top in path.relative_to(root).parts[:1]}
    if set(splits) == {""} and not ignore_splits and len(set(map(split_meaning, tops)) - {None}) > 1:
        raise ValueError(
            f"{path} has no column 'split', but names images in {name_some(sorted(tops))}: add it, or one table for each."
        )
    for images in splits.values():
        images.image_ids = unique_ids(images.paths, index.folder)
    return splits


def _add(images: LabelledImages, index: ImageIndex, row: tuple, seen: dict[str, tuple]) -> int | None:
    """Adds a row to its split, or its labels to the image's earlier row. Returns the position of the image."""
    place, name, names = row
    name = _text(name, empty=("",))
    if not name:
        raise ValueError(f"{place}, names no image: fill it in or take the row out.")
    found = index.find_first([name], place)
    if found is None:
        images.skipped.append(f"{place}: there is no image {name} below {index.folder}")
        return None
    if found in seen:
        earlier, position = seen[found]
        if earlier is not images:
            raise ValueError(f"{place}, puts {name} into a second split: give an image one split.")
        images.labels[position].append(names)
        images.places[position] = f"{images.places[position].removesuffix(FURTHER)}{FURTHER}"
        return position
    seen[found] = (images, len(images.paths))
    images.paths.append(found)
    images.labels.append([names])
    images.places.append(place)
    images.masks.append(index.mask_of(found))
    return len(images.paths) - 1


def _text(cell: Any, empty: Container[str] = NO_LABEL) -> str:
    """A cell as text, a whole number without its point; `""` for one of the words that mean nothing."""
    if cell is None or cell != cell:
        return ""
    is_whole = isinstance(cell, float) and cell.is_integer()
    text = str(int(cell) if is_whole else cell).strip()
    return "" if text.lower() in empty else text


def _is_table(path: Path) -> bool:
    try:
        first = list(_read_rows(path)[0][1])
    except ValueError:
        return False
    return usual_name(first, IMAGE_HEADERS) is not None and usual_name(first, LABEL_HEADERS) is not None


def _open_images_names(path: Path) -> dict[str, str]:
    """The names of the codes in a table of Open Images."""
    names = path.with_name("class-descriptions.csv")
    if not path.name.endswith(OPEN_IMAGES) or not names.is_file():
        return {}
    return {cells[0]: cells[1] for _, cells in read_csv_rows(names) if len(cells) == 2}


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
            row = parse_json(line)
        except ValueError as error:
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
        # spreadsheets leave empty cells at the end
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
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
        return ["file_name", "label"]
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


def read_folder(
    path: Path, columns: dict[str, str | None], wanted: tuple[str | None, str | None]
) -> dict[str, LabelledImages]:
    """
    Reads the splits of a folder, or of a table in it; no image is opened.

    `columns` are `image_column`, `label_column` and `mask_column` of a table, `wanted` the names of the training split
    and of the one to evaluate on, as far as they are given.
    """
    tables = {"": path} if path.is_file() else find_tables(path)
    root = path.parent if path.is_file() else path
    if path.is_file() and root.name.lower() == "annotations":
        root = root.parent
    if set(tables) == {""}:
        source = tables[""]
        found = read_table(source, columns, root)
        if set(found) == {""} and any(wanted):
            raise ValueError(
                f"{source} has no column 'split', so there is no split {wanted[1] or wanted[0]!r}: add the "
                "column, or put the images into the folders train and validation with a table each."
            )
        read: dict[str, Callable[[], LabelledImages]] = {name: lambda part=part: part for name, part in found.items()}
    elif tables:
        source = path
        read = {name: lambda table=table: read_table(table, columns, root, True)[""] for name, table in tables.items()}
    else:
        folders = _image_folders(path)
        inner = next(iter(folders.values()), path)
        is_only = len(folders) == 1 and split_meaning(inner.name) is None and inner.name not in wanted
        if is_only and _is_part(inner, of_splits=True):
            # a folder around the data, as archives have it
            return read_folder(inner, columns, wanted)
        source, folders = path, folders if any(wanted) else _split_folders(path, folders)
        read = {name: lambda folder=folder: _read_part(folder, columns) for name, folder in folders.items()}
        loose = [file.name for file in sorted(path.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
        if loose and set(folders) != {""}:
            logger.warning(
                "%s: %d images beside the folders of splits are not used (%s).", path, len(loose), name_some(loose)
            )
    if set(read) == {""}:
        return {"train": read[""]()}
    chosen = choose_splits(read, *wanted, source)
    if not chosen:
        raise ValueError(
            f"{source} has neither the split 'train' nor one to evaluate on: it has {', '.join(read)}. Name "
            "one with train_split or validation_split."
        )
    return {split: read[name]() for split, name in chosen.items()}


def _image_folders(root: Path) -> dict[str, Path]:
    """The subfolders with images or tables in them by their names, without those of masks and of the system."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not is_hidden(path.name)]
    folders = [path for path in folders if path.name.lower() != MASK_FOLDER]
    return {path.name: path for path in folders if ImageIndex(path).paths or find_tables(path)}


def _split_folders(root: Path, folders: dict[str, Path]) -> dict[str, Path]:
    """
    The folders of the splits by their names; `root` itself by `""` if it is not divided.

    Raises `ValueError` if folders of splits and others cannot be told apart.
    """
    meant = [name for name in folders if split_meaning(name)]
    others = [name for name in folders if name not in meant]
    if meant and not others:
        return folders
    # a class may be called "train": like the others it holds images, and neither a table nor subfolders
    if len(meant) > 1 or any(_is_part(folders[name]) for name in meant):
        raise ValueError(
            f"{root} has {name_some(meant)}, which are names of splits, beside {name_some(others, 10)}: name the splits "
            "with train_split and validation_split (--train_split, --validation_split), or move the other folders."
        )
    if meant:
        logger.warning("%s: the folder %r is read as a class, like %s.", root, meant[0], name_some(others))
    return {"": root}


def _is_part(folder: Path, of_splits: bool = False) -> bool:
    """Whether a folder has a table or folders of classes, or `of_splits`, a table or folders of splits."""
    inner = [path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    divided = [name for name in inner if split_meaning(name)] if of_splits else inner
    return bool(divided) or bool(find_tables(folder)) or (folder / FIFTYONE).is_file()


def _read_part(folder: Path, columns: dict[str, str | None]) -> LabelledImages:
    tables = find_tables(folder)
    if len(tables) == 1:
        return read_table(next(iter(tables.values())), columns, folder, ignore_splits=True)[""]
    given = [f"{argument}={name}" for argument, name in columns.items() if name is not None]
    if given:
        raise ValueError(f"{folder} has no table, so {given[0]} names nothing: add a table or leave it out.")
    return _read_fiftyone(folder) or read_class_folders(folder)


def _read_fiftyone(folder: Path) -> LabelledImages | None:
    """Reads FiftyOne's layout: `data/` and `labels.json`, an object of `classes` and of `labels` by identifier."""
    path = folder / FIFTYONE
    if not path.is_file():
        return None
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from error
    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        return None
    classes = content.get("classes")
    images, index, seen = LabelledImages(class_names=classes), ImageIndex(find_folder(folder, "data") or folder), {}
    for key, label in content["labels"].items():
        place = f"{path}, {key}"
        labels = label if isinstance(label, list) else [label]
        names = [item.get("label") if isinstance(item, dict) else item for item in labels]
        for position, name in enumerate(names):
            if classes and isinstance(name, int):
                if not 0 <= name < len(classes):
                    raise ValueError(f"{place}: the label {name} is not a position in the {len(classes)} classes.")
                names[position] = classes[name]
        _add(images, index, (place, key, names), seen)
    images.image_ids = unique_ids(images.paths, index.folder)
    return images


def read_class_folders(folder: Path) -> LabelledImages:
    """Reads a folder in which each subfolder holds the images of one class; those of `background` have no class."""
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
    if index.links:
        logger.warning("%s: of the folders that are links, %s.", folder, name_some(index.links))
    names = [path.split("/")[0] for path in index.paths]
    inner = {path.split("/")[1] for path in index.paths} if all(path.count("/") > 1 for path in index.paths) else set()
    if inner and (len(set(names)) == 1 or (len(inner) > 1 and all(map(split_meaning, inner)))):
        raise ValueError(
            f"{folder} has {name_some(sorted(set(names)))}, with the folders {name_some(sorted(inner))} in it: give the "
            "folder that holds the classes, or the splits with the classes in them (train/cat)."
        )
    unread = [path.name for path in sorted(folder.iterdir()) if path.suffix.lower() in UNREAD_SUFFIXES]
    if set(map(str.lower, names)) <= IMAGE_FOLDERS:
        raise ValueError(
            f"The only folder of images in {folder} is {names[0]!r}, which is not the name of a class: add labels.csv with "
            "the columns file_name and labels" + (f" ({name_some(unread)} is none)." if unread else ".")
        )
    if unread:
        logger.warning("%s: %s is not read, as no table of images and labels.", folder, name_some(unread))
    paths = [str(folder / path) for path in index.paths]
    masks = [index.mask_of(path) for path in paths]
    mask_folder = find_folder(folder, MASK_FOLDER)
    in_masks = ImageIndex(mask_folder, with_masks=True).paths if mask_folder else []
    if in_masks and not any(masks):
        raise ValueError(
            f"None of the {len(in_masks)} files in {mask_folder} ({name_some(in_masks)}) is named after an "
            "image (masks/FOLDER/NAME.png): name them so if they are masks, or rename the folder if it is a class."
        )
    return LabelledImages(
        paths=paths,
        image_ids=unique_ids(paths, folder),
        # in lists, for the names of folders are never taken apart
        labels=[[[name]] for name in names],
        places=[f"the folder {folder / name}" for name in names],
        masks=masks,
    )


def _masks(images: LabelledImages, split: str, path: Path) -> list[Any] | None:
    if images.mask_faults:
        raise FileNotFoundError(
            f"{len(images.mask_faults)} masks of the split {split!r} cannot be used ({name_some(images.mask_faults)}): "
            "add them, give each image one, or leave the cells empty."
        )
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


__all__ = [
    "LABEL_HEADERS",
    "MASK_HEADERS",
    "TABLE_SUFFIXES",
    "LabelledImages",
    "build_splits",
    "find_tables",
    "read_folder",
]
