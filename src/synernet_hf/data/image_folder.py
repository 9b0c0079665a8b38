"""A folder of images with a table of labels, or with one subfolder for each class → columns of records."""

import csv
import io
import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synernet_hf.data.label_files import IMAGE_SUFFIXES, name_some, strip_image_suffix


TABLE_NAMES = ("labels.csv", "metadata.csv", "metadata.jsonl")
MASK_FOLDER = "masks"
SPLIT_FOLDERS = ("train", "validation", "val", "test")
VALIDATION_NAMES = ("validation", "val", "test")

IMAGE_HEADERS = ("file_name", "filename", "file", "path", "image", "image_id", "picture", "name", "id", "ids")
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
        masks (`list[str | None]`): mask files, `None` where there is none.
        class_names (`list[str]`, *optional*): class list that the source itself gives, background first.
        label_column (`str`, *optional*): name of the column of labels.
        skipped (`list[str]`): what was left out and why.
    """

    paths: list[str] = field(default_factory=list)
    image_ids: list[str] = field(default_factory=list)
    labels: list[list[Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    masks: list[str | None] = field(default_factory=list)
    class_names: list[str] | None = None
    label_column: str | None = None
    skipped: list[str] = field(default_factory=list)


def find_table(folder: Path) -> Path | None:
    """
    Finds the table of labels of a folder.

    Args:
        folder (`Path`):
            Its folder.

    Returns:
        `Path` or `None`: the first of `labels.csv`, `metadata.csv` and `metadata.jsonl` that is there.
    """
    return next((folder / name for name in TABLE_NAMES if (folder / name).is_file()), None)


def split_folders(root: Path, train_split: str | None, validation_split: str | None) -> dict[str, Path] | None:
    """
    Says which folders hold the splits.

    Args:
        root (`Path`):
            The folder of the data set.
        train_split (`str`, *optional*):
            Folder of the training images, `train` where it is not given.
        validation_split (`str`, *optional*):
            Folder of the images to evaluate on; `validation`, `val` or `test` where it is not given.

    Returns:
        `dict[str, Path]` or `None`: folders of `train` and `validation`, as far as they are there; `None` if `root`
        is not divided into folders of splits.

    Raises:
        FileNotFoundError: A folder that was named is not there.
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
    found = {"train": train_split or "train"}
    found["validation"] = validation_split or next((name for name in VALIDATION_NAMES if name in folders), "")
    return {split: root / name for split, name in found.items() if name in folders}


class ImageIndex:
    """
    The images below a folder, found by path, file name or name without suffix.

    Args:
        folder (`Path`):
            The folder; its subfolder `masks` and hidden files are not looked into.
        left_out (`Iterable[str]`, *optional*):
            Paths below the folder that are no images, such as masks.
    """

    def __init__(self, folder: Path, left_out: Iterable[str] = ()) -> None:
        self.folder = folder
        self.paths: list[str] = []
        self.by_key: dict[str, list[str]] = {}
        self.mask_paths: Counter[Path] = Counter()
        self.mask_names: Counter[str] = Counter()
        left_out = {posixpath.normpath(path.replace("\\", "/")) for path in left_out}
        for parent, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != MASK_FOLDER)
            for file in sorted(files):
                path = (Path(parent) / file).relative_to(folder).as_posix()
                is_image = not file.startswith(".") and Path(file).suffix.lower() in IMAGE_SUFFIXES
                if is_image and path not in left_out:
                    self.paths.append(path)
                    mask = Path(path).with_suffix(".png")
                    self.mask_paths[mask] += 1
                    self.mask_names[mask.name] += 1
                    for key in {path, file, strip_image_suffix(file)}:
                        self.by_key.setdefault(key, []).append(path)

    def find(self, name: str) -> str | None:
        """
        Finds an image.

        Args:
            name (`str`):
                A path below the folder, an absolute path, a file name, or a name without suffix.

        Returns:
            `str` or `None`: the file, `None` where there is none.

        Raises:
            ValueError: Several images have that name. The message is a predicate: the caller says where.
        """
        name = posixpath.normpath(name.strip().replace("\\", "/"))
        if Path(name).is_absolute():
            inside = os.path.relpath(name, self.folder).replace(os.sep, "/")
            if inside not in self.by_key.get(inside, []):
                return name if Path(name).is_file() else None
            name = inside
        found = self.by_key.get(name, [])
        if len(found) > 1 and name not in found:
            raise ValueError(f"names {name!r}, which may be {' or '.join(found[:3])}: write the path")
        chosen = name if name in found else next(iter(found), None)
        return None if chosen is None else str(self.folder / chosen)

    def mask_of(self, image: str) -> str | None:
        """
        Finds the mask of an image in the subfolder `masks`.

        Args:
            image (`str`):
                File of the image.

        Returns:
            `str` or `None`: the PNG file under the path of the image or else under its bare name, unless it might
            just as well be that of another image.
        """
        path = Path(os.path.relpath(image, self.folder)).with_suffix(".png")
        masks = self.folder / MASK_FOLDER
        for mask, sharing in ((masks / path, self.mask_paths[path]), (masks / path.name, self.mask_names[path.name])):
            if sharing <= 1 and mask.is_file():
                return str(mask)
        return None


def unique_ids(paths: Sequence[str], root: Path) -> list[str]:
    """
    Names images: by file name without suffix, or where two share it, by their path.

    Args:
        paths (`Sequence[str]`):
            N files.
        root (`Path`):
            The folder that paths start from.

    Returns:
        `list[str]`: N names, without slashes.
    """
    stems = [strip_image_suffix(path) for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    relative = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    without = [path.rsplit(".", 1)[0] for path in relative]
    # names may hold underscores: more of them than any name has tell all paths apart
    longest = max(len(run) for path in relative for run in re.findall("_*", path))
    for number in range(2, max(longest + 2, 3)):
        for names in (without, relative):
            ids = [name.replace("/", "_" * number) for name in names]
            if len(set(ids)) == len(ids):
                return ids
    return ids


def read_class_folders(folder: Path) -> LabelledImages:
    """
    Reads a folder in which each subfolder holds the images of one class; those of `background` have no class.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        [`LabelledImages`]: in the order of the paths.

    Raises:
        ValueError: There is no image in a subfolder, images lie beside the subfolders, or the folder `masks` holds
            no mask of them.
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
    Reads a table of labels and finds its images.

    Args:
        path (`Path`):
            A `.csv` (also separated by `;` or tabulators) or `.jsonl` file beside the images.
        image_column (`str`, *optional*):
            Column of the images; the first with a usual name (`file_name`, `image`, `id`, ...) or else the first.
        label_column (`str`, *optional*):
            Column of the labels; the first with a usual name (`labels`, `label`, `class`, ...), else the only one
            left, else all that are left if they hold 0 and 1 only.
        mask_column (`str`, *optional*):
            Column of the masks' files; `mask` or `mask_file_name` where there is one.
        ignore_splits (`bool`, *optional*, defaults to `False`):
            Takes all rows for one split.

    Returns:
        `dict[str, LabelledImages]`: by the value of the column `split`, `""` where there is none. Rows of one
        image are taken together. Images that are not there are in `skipped`.

    Raises:
        ValueError: The table can not be read, a column is missing, or a row is ambiguous; the sentence names file and
            row.
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
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, row {row}, is not UTF-8 text (byte 0x{content[error.start]:02x}): save the table as UTF-8."
        ) from error
    rows = _read_json_lines(path, text) if path.suffix.lower() == ".jsonl" else _read_csv(path, text)
    if not rows:
        raise ValueError(f"The table {path} has no rows: give at least one image.")
    return rows


def _read_json_lines(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    # not splitlines, which also splits at characters that may stand in names
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
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


def _read_csv(path: Path, text: str) -> list[tuple[int, dict[str, Any]]]:
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    rows, header = [], None
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if header is None:
                header = _header(f"{path}, row {reader.line_num}", cells)
                if header is cells:
                    continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path}, row {reader.line_num}, has {len(cells)} cells, but {len(header)} are expected "
                    f"({', '.join(header)}): put several labels in quotes or separate them by a semicolon."
                )
            rows.append((reader.line_num, dict(zip(header, cells, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, row {reader.line_num}, is not a row of a table ({error}).") from error
    return rows


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


__all__ = [
    "ImageIndex",
    "LabelledImages",
    "find_table",
    "read_class_folders",
    "read_table",
    "split_folders",
    "unique_ids",
]
