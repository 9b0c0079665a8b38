"""Annotation files as tools write them (COCO, Label Studio, labelme) → splits of records."""

import base64
import io
import logging
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image
from pycocotools import mask as mask_utils

from synernet_hf.data.coco import IGNORED_LABEL, load_coco_files
from synernet_hf.data.files import ImageIndex, find_folder, is_hidden, parse_json, read_text, unique_ids
from synernet_hf.data.folders import LabelledImages, build_splits
from synernet_hf.data.schema import choose_splits, is_background, name_some, split_meaning


logger = logging.getLogger(__name__)

# what tells the kind of a file in its first characters; the first kind that is there is read
KINDS = {
    "COCO": r'^\{(?!.*"shapes"\s*:).*"(images|annotations|categories)"\s*:\s*\[',
    "Label Studio": r'^\[.*"(data|annotations|completions|annotator|annotation_id)"\s*:',
    # where keys are sorted, the image's data come before the shapes
    "labelme": r'^\{.*"(shapes"\s*:\s*\[|imageData"\s*:)',
}
# what COCO gives beside its files of objects
OTHER_COCO_FILES = ("captions_", "person_keypoints_", "panoptic_", "stuff_", "image_info_")
# fields of a task in Label Studio's short form that are no labels
TASK_FIELDS = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "inner_id"}


def find_annotations(path: Path) -> tuple[str, dict[str, list[Path]]] | None:
    """
    Finds annotation files: their kind, and the files by the name of their split, `""` where there are no splits.

    A file in a folder of a split belongs to it; COCO's others tell the split by their name (`instances_val2017.json`).
    `path` may also be a file. Returns `None` if there is no file of a known kind.
    """
    root = _root(path)
    found: dict[str, dict[str, list[Path]]] = {}
    for file in [path] if path.is_file() else sorted(root.rglob("*.[jJ][sS][oO][nN]")):
        parts = file.relative_to(root).parts
        kind = None if any(map(is_hidden, parts)) else _kind_of(file)
        if kind:
            split = parts[0] if len(parts) > 1 and split_meaning(parts[0]) else ""
            found.setdefault(kind, {}).setdefault(split, []).append(file)
    for kind in KINDS:
        if kind in found:
            if len(found) > 1:
                logger.warning("%s has annotation files of %s: those of %s are read.", path, " and ".join(found), kind)
            return kind, _coco_splits(found[kind]) if kind == "COCO" else found[kind]
    return None


def load_annotations(
    path: Path,
    found: tuple[str, dict[str, list[Path]]],
    label_column: str | None,
    class_names: Sequence[str] | None,
    wanted: tuple[str | None, str | None],
    splits: Sequence[str],
    on_bad_image: str,
    skipped: dict[str, list[str]] | None,
) -> datasets.DatasetDict:
    """
    Loads what [`find_annotations`] found; see [`load_image_labels`] for the other arguments.

    Raises `FileNotFoundError` if an image is missing, and `ValueError` if a file cannot be read or the splits cannot be
    told apart.
    """
    kind, files = found
    root = _root(path)
    chosen = choose_splits(files, *wanted, root)
    if not chosen and len(files) == 1:
        chosen = {"train": next(iter(files))}
    if not chosen:
        raise ValueError(
            f"{root} has annotation files of {', '.join(map(repr, files))}, none of which is clearly the split "
            "'train': name the ones to take with train_split and validation_split."
        )
    if kind == "COCO" or class_names is not None:
        # without a class list, the labels of the training split are needed too
        chosen = {split: name for split, name in chosen.items() if split in splits} or chosen
    if kind == "COCO":
        parts = {
            split: (_only(files[name]), _image_folder(root, files[name][0], name)) for split, name in chosen.items()
        }
        return load_coco_files(parts, class_names, on_bad_image, skipped)
    images = {}
    for split, name in chosen.items():
        folder = root / name
        if kind == "labelme":
            images[split] = _read_labelme(folder, files[name], with_masks=split != "train")
        else:
            images[split] = _read_tasks(folder, _only(files[name]), label_column)
    return build_splits(images, root, class_names, on_bad_image, skipped)


def _root(path: Path) -> Path:
    """The folder of an annotation file, or the innermost of folders that hold one folder and nothing else."""
    root = path.parent if path.is_file() else path
    while path.is_dir():
        inner = [item for item in root.iterdir() if not is_hidden(item.name)]
        if len(inner) != 1 or not inner[0].is_dir() or split_meaning(inner[0].name):
            break
        root = inner[0]
    return root


def _kind_of(path: Path) -> str | None:
    with path.open("rb") as stream:
        # the ASCII in UTF-8 or UTF-16, without byte order marks
        head = stream.read(8192).replace(b"\0", b"").decode("ascii", errors="ignore").strip()
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, head, re.DOTALL)), None)


def _coco_splits(found: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Object files by split name: that of the folder or else of the file, as in `instances_val.json`."""
    chosen: dict[str, list[Path]] = {}
    for name, files in found.items():
        objects = [file for file in files if not file.name.startswith(OTHER_COCO_FILES)] or files
        if len(objects) < len(files):
            others = [file.name for file in files if file not in objects]
            logger.warning("%s: not read, as no files of objects: %s.", files[0].parent, name_some(others))
        for file in objects:
            chosen.setdefault(name or re.sub("^(instances|person_keypoints)_", "", file.stem), []).append(file)
    return chosen


def _only(files: list[Path]) -> Path:
    if len(files) > 1:
        raise ValueError(
            f"{files[0].parent} has the annotation files {name_some([file.name for file in files])}: keep one of them, "
            "or give the path of the one to read."
        )
    return files[0]


def _image_folder(root: Path, file: Path, split: str) -> Path:
    """The folder of the images of a COCO file: that of its split where there is one, else the one that holds both."""
    if split:
        for parent in (root, find_folder(root, "images")):
            found = parent and find_folder(parent, split)
            if found:
                return found
    return file.parent.parent if file.parent.name.lower() == "annotations" else file.parent


def _read_json(path: Path) -> Any:
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"The annotation file {path} is not valid JSON ({error}).") from error


def _read_tasks(folder: Path, path: Path, tag: str | None) -> LabelledImages:
    """
    Reads an export of Label Studio: the choices made for each image of a folder, and the names of its boxes and
    outlines. `tag` is the one whose labels are taken, where there are several.
    """
    try:
        tasks = [(f"{path}, task {task.get('id', n)}", *_task(task)) for n, task in enumerate(_read_json(path), 1)]
    except (AttributeError, KeyError, StopIteration, TypeError) as error:
        raise ValueError(
            f"{path} is not an export of Label Studio ({type(error).__name__}: {error}): export tasks with images as JSON."
        ) from error
    tags = sorted({name for _, _, answers in tasks for answer in answers for name in answer})
    if tag is None and len(tags) > 1:
        raise ValueError(
            f"{path} has labels of the tags {', '.join(tags)}: name the one to take with label_column (--label_column)."
        )
    if tag is not None and tag not in tags:
        raise ValueError(
            f"{path} has no labels of the tag {tag!r} (label_column): it has {', '.join(tags) or 'none'}."
        )
    for number, fault in (
        (sum(not answers for _, _, answers in tasks), "tasks without a finished annotation are left out"),
        (sum(len(answers) > 1 for _, _, answers in tasks), "tasks have several annotations, whose labels are joined"),
    ):
        if number:
            logger.warning("%s: %d %s.", path, number, fault)
    images, index, positions = LabelledImages(), ImageIndex(folder), {}
    for place, reference, answers in tasks:
        if not answers:
            continue
        image = index.find_first([reference], place)
        labels = [label for answer in answers for label in answer.get(tag or "".join(tags), ())]
        if image is None:
            images.skipped.append(f"{place}: there is no image {reference} below {folder}")
        elif image in positions:
            images.labels[positions[image]].append(labels)
        else:
            positions[image] = len(images.paths)
            _append(images, image, labels, place)
    images.image_ids = unique_ids(images.paths, folder)
    return images


def _append(images: LabelledImages, image: str, labels: list[str], place: str, mask: Any = None) -> None:
    images.paths.append(image)
    images.labels.append([labels])
    images.places.append(place)
    images.masks.append(mask)


def _task(task: dict[str, Any]) -> tuple[str, list[dict[str, list[str]]]]:
    """The image of a task, and for each finished annotation the labels of each tag."""
    data = task.get("data", task)
    texts = {key: value for key, value in data.items() if isinstance(value, str)}
    image = texts.get("image") or next(value for value in texts.values() if re.search(r"\.\w{3,4}$|\?d=", value))
    if "data" not in task:
        fields = {key: value for key, value in task.items() if key not in TASK_FIELDS and value != image}
        return image, [{key: _values(value) for key, value in fields.items()}]
    answers = []
    for annotation in task.get("annotations", task.get("completions", [])):
        if not annotation.get("was_cancelled"):
            answer: dict[str, list[str]] = {}
            for item in annotation["result"]:
                labels = _values(item.get("value"))
                if labels:
                    answer.setdefault(item["from_name"], []).extend(labels)
            answers.append(answer)
    return image, answers


def _values(value: Any) -> list[str]:
    """The labels in an answer: a text, a list, or `{"choices": [...]}`, `{"polygonlabels": [...], ...}` and the like."""
    if isinstance(value, list):
        return [label for item in value for label in _values(item)]
    if isinstance(value, dict):
        return [
            label for key, found in value.items() if key.endswith(("choices", "labels")) for label in _values(found)
        ]
    return [value] if isinstance(value, str) else []


def _read_labelme(folder: Path, files: list[Path], with_masks: bool) -> LabelledImages:
    """Reads labelme's files, one for each image: the names of its shapes, or else of its flags."""
    images, index, places = LabelledImages(), ImageIndex(folder), {}
    kinds = set()
    for path in files:
        content = _read_json(path)
        try:
            shapes = [(str(shape["label"] or ""), shape, f"shape {n}") for n, shape in enumerate(content["shapes"], 1)]
            flags = [name for name, is_set in (content.get("flags") or {}).items() if is_set]
            names = [label for label, *_ in shapes if label != IGNORED_LABEL and not is_background(label)]
            names = names if shapes else flags
            mask = None
            if with_masks:
                height, width = int(content["imageHeight"]), int(content["imageWidth"])
                outlines = [(label, _segmentation(shape, height, width), place) for label, shape, place in shapes]
                mask = (height, width, outlines)
                kinds.update(_shape_type(shape) for _, shape, _ in shapes)
            name = content["imagePath"].replace("\\", "/")
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a labelme file ({type(error).__name__}: {error}).") from error
        beside = os.path.normpath(path.parent.relative_to(folder) / name)
        image = index.find_first((beside, name, path.stem), str(path))
        if image is None:
            images.skipped.append(f"{path}: there is no image {name} below {folder}")
            continue
        if image in places:
            raise ValueError(f"{places[image]} and {path} are both of the image {image}: keep one of them.")
        places[image] = path
        _append(images, image, names, str(path), mask)
    others = len(index.paths) - len(places)
    if others > 0:
        logger.warning("%s: %d images without an annotation file are left out.", folder, others)
    # boxes, lines and points alone are no outlines
    if not kinds & {"polygon", "circle", "mask"}:
        images.masks = [None] * len(images.paths)
    images.image_ids = unique_ids(images.paths, folder)
    return images


def _shape_type(shape: dict[str, Any]) -> str:
    return shape.get("shape_type") or "polygon"


def _segmentation(shape: dict[str, Any], height: int, width: int) -> Any:
    """The outline of a shape as a COCO segmentation; `None` for lines and points."""
    kind, points = _shape_type(shape), shape["points"]
    if kind == "rectangle" and len(points) == 2:
        (left, top), (right, bottom) = points
        return [[left, top, right, top, right, bottom, left, bottom]]
    if kind in ("polygon", "rectangle", "rotation"):
        return [[value for point in points for value in point]]
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * step / 64 for step in range(64)]
        return [[value for turn in turns for value in (x + radius * math.cos(turn), y + radius * math.sin(turn))]]
    if kind == "mask":
        # the pixels of a box as a PNG file
        canvas = Image.new("L", (width, height))
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"]))) as pixels:
            canvas.paste(pixels.convert("L"), tuple(int(value) for value in points[0]))
        runs = mask_utils.encode(np.asfortranarray(np.asarray(canvas) > 0, dtype=np.uint8))
        return {"size": [height, width], "counts": runs["counts"].decode("ascii")}
    return None


__all__ = ["find_annotations", "load_annotations"]
