"""COCO 2014 folder → `datasets.DatasetDict`, with masks that are drawn from polygons when they are read."""

import json
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets.features.features import register_feature
from datasets.table import array_cast
from PIL import Image
from pycocotools import mask as mask_utils

from synernet_hf.data.files import ImageIndex
from synernet_hf.data.schema import (
    IGNORE_INDEX,
    as_streams,
    build_split,
    check_on_bad_image,
    id2label_from,
    name_some,
    note_skipped,
)


logger = logging.getLogger(__name__)

PART_SIZE = 1000


def load_coco2014(
    data_dir: str | Path,
    train_split: str = "train2014",
    validation_split: str = "val2014",
    on_bad_image: str = "raise",
    streaming: bool = False,
    skipped: dict[str, list[str]] | None = None,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Loads COCO 2014, or any folder in its layout, without decoding an image.

    Read are `annotations/instances_<split>.json` and the images in `<split>/`. The classes are the categories of the
    file in the order of their ids, numbered from 1 without gaps: for the official files the 80 of `COCO_CLASSES`. A
    class is an image-level label of an image if any object or crowd of it is annotated there; images without an
    annotation are left out, as is usual in this field (82,081 and 40,137 images remain of the official splits).
    Masks of the validation split are drawn from the polygons when a record is opened, see [`PolygonMask`]; crowds are
    255 (ignore). Polygons of the training split are thrown away while its file is read, and no file is ever held in
    memory as a tree of objects.

    Args:
        data_dir (`str` or `Path`): The folder that holds `annotations` and the folders of images.
        train_split (`str`, *optional*, defaults to `"train2014"`): Name of the training images' folder and of their
            annotation file.
        validation_split (`str`, *optional*, defaults to `"val2014"`): The same of the images to evaluate on.
        on_bad_image, streaming, skipped:
            See [`load_image_labels`].

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`: `train` (`image`, `image_id`, `labels`) and
        `validation` (the same and `mask`).

    Raises:
        FileNotFoundError: A folder, an annotation file or an image is missing.
        ValueError: An annotation file is not in COCO's format, it has more than 254 categories, or the two files do not
            list the same categories.
    """
    check_on_bad_image(on_bad_image)
    root = Path(data_dir).expanduser()
    if not (root / "annotations").is_dir():
        raise FileNotFoundError(
            f"There is no folder {root / 'annotations'}: give the folder that holds annotations, {train_split} and "
            f"{validation_split}."
        )
    names, splits = None, {}
    for split, name in (("train", train_split), ("validation", validation_split)):
        path = root / "annotations" / f"instances_{name}.json"
        reader = _AnnotationReader(path, keep_polygons=split == "validation")
        if names is not None and reader.class_names != names:
            raise ValueError(
                f"The categories of {path} are not those of the file for {train_split}: use two files of one data set."
            )
        names = reader.class_names
        splits[split], missing = _build(root / name, reader, on_bad_image)
        note_skipped(skipped, split, missing)
    return as_streams(splits) if streaming else datasets.DatasetDict(splits)


class _AnnotationReader:
    """
    Reads an annotation file in one pass. The JSON reader hands over each object as soon as it is complete, so that
    only what is needed stays: the class ids of each image, and its segmentations as text where masks are wanted.
    """

    def __init__(self, path: Path, keep_polygons: bool) -> None:
        self.path = path
        self.keep_polygons = keep_polygons
        # image id → [(category id, is a crowd, segmentation as JSON text)]
        self.annotations: dict[int, list[tuple[int, bool, str | None]]] = {}
        if not path.is_file():
            found = sorted(other.name for other in path.parent.glob("instances_*.json"))
            raise FileNotFoundError(
                f"There is no annotation file {path}: the folder has {', '.join(found) or 'no instances_*.json'}."
            )
        try:
            with path.open(encoding="utf-8") as stream:
                content = json.load(stream, object_hook=self._reduce)
            images, categories = content["images"], content["categories"]
            by_id = {int(category["id"]): str(category["name"]) for category in categories}
            self.images = {
                int(entry["id"]): (entry["file_name"], int(entry["height"]), int(entry["width"])) for entry in images
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The annotation file {path} is not in COCO's format ({type(error).__name__}: {error}): images, "
                "annotations and categories are expected."
            ) from error
        self.class_ids = {category_id: index for index, category_id in enumerate(sorted(by_id), start=1)}
        self.class_names = ["background", *(by_id[category_id] for category_id in sorted(by_id))]
        if len(by_id) >= IGNORE_INDEX:
            raise ValueError(
                f"The annotation file {path} has {len(by_id)} categories, but masks of 8 bits hold at most "
                f"{IGNORE_INDEX - 1}, for {IGNORE_INDEX} is ignore: leave out or join categories."
            )
        id2label_from(self.class_names)
        self._check_references()

    def _reduce(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        if "category_id" not in entry or "image_id" not in entry:
            return entry
        text = None
        if self.keep_polygons:
            text = json.dumps(entry["segmentation"], separators=(",", ":"))
        item = (int(entry["category_id"]), bool(entry.get("iscrowd", 0)), text)
        self.annotations.setdefault(int(entry["image_id"]), []).append(item)
        return None

    def _check_references(self) -> None:
        orphans = [str(image_id) for image_id in self.annotations if image_id not in self.images]
        if orphans:
            raise ValueError(
                f"The annotation file {self.path} annotates {len(orphans)} images that it does not list "
                f"({name_some(orphans)}): list them under images."
            )
        used = {category_id for items in self.annotations.values() for category_id, _, _ in items}
        unknown = sorted(used - set(self.class_ids))
        if unknown:
            raise ValueError(
                f"The annotation file {self.path} uses the category ids {name_some([str(i) for i in unknown])}, which "
                "it does not list: list them under categories."
            )

    def labels(self, image_id: int) -> list[int]:
        """Label ids of an image."""
        return [self.class_ids[category_id] - 1 for category_id, _, _ in self.annotations[image_id]]

    def pop_mask(self, image_id: int) -> dict[str, Any]:
        """The cell of an image in the mask column; its annotations are given up."""
        _, height, width = self.images[image_id]
        objects = (
            f"[{IGNORE_INDEX if is_crowd else self.class_ids[category_id]},{text}]"
            for category_id, is_crowd, text in self.annotations.pop(image_id)
        )
        return {"height": height, "width": width, "objects": f"[{','.join(objects)}]"}


def _build(folder: Path, reader: _AnnotationReader, on_bad_image: str) -> tuple[datasets.Dataset, list[str]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with the images of {reader.path.name}.")
    there = ImageIndex(folder).by_key
    annotated = sorted(reader.annotations)
    if len(annotated) < len(reader.images):
        without = len(reader.images) - len(annotated)
        logger.info("%s: %d images without annotations are left out.", reader.path, without)
    missing = [reader.images[image_id][0] for image_id in annotated if reader.images[image_id][0] not in there]
    if missing and on_bad_image == "raise":
        raise FileNotFoundError(
            f"{reader.path} names {len(missing)} of {len(annotated)} images that are not in {folder} "
            f"({name_some(missing)}): add them, or leave them out with on_bad_image='skip' (--on_bad_image skip)."
        )
    kept = [image_id for image_id in annotated if reader.images[image_id][0] in there]
    if not kept:
        raise ValueError(
            f"None of the images of {reader.path} is in {folder} and annotated: there is nothing to load."
        )
    skipped = [f"the image {file} is not in {folder}" for file in missing]
    # in parts, so that an annotation is in memory either as text or in the table
    parts = [_build_part(folder, reader, kept[i : i + PART_SIZE]) for i in range(0, len(kept), PART_SIZE)]
    return datasets.concatenate_datasets(parts), skipped


def _build_part(folder: Path, reader: _AnnotationReader, image_ids: list[int]) -> datasets.Dataset:
    files = [reader.images[image_id][0] for image_id in image_ids]
    return build_split(
        [str(folder / file) for file in files],
        [Path(file).stem for file in files],
        [reader.labels(image_id) for image_id in image_ids],
        reader.class_names,
        [reader.pop_mask(image_id) for image_id in image_ids] if reader.keep_polygons else None,
        mask_feature=PolygonMask() if reader.keep_polygons else None,
    )


@dataclass
class PolygonMask:
    """
    Feature of a `mask` column whose images are kept as annotations and drawn on access.

    A cell holds `height`, `width` and `objects`, JSON text of pairs `[class id, segmentation]`; the class id of a crowd
    is 255 (ignore), and a segmentation is what COCO allows: a list of polygons, or a run-length encoding. Crowds are
    drawn first, then objects from the largest to the smallest, so that a small object in front of a large one stays
    visible (our choice; annotations say nothing about depth).

    Args:
        decode (`bool`, *optional*, defaults to `True`): Gives images (`PIL.Image.Image`, mode `L`); `False` gives the
            cell.

    Raises:
        ValueError: On access, if a segmentation cannot be drawn.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "PIL.Image.Image"
    pa_type: ClassVar[Any] = datasets.Features(
        {"height": datasets.Value("int32"), "width": datasets.Value("int32"), "objects": datasets.Value("string")}
    ).type
    _type: str = field(default="SynerNetPolygonMask", init=False, repr=False)

    def __call__(self) -> Any:
        """The type of the column in Arrow."""
        return self.pa_type

    def encode_example(self, value: dict) -> dict:
        """A cell as it is stored."""
        return value

    def cast_storage(self, storage: Any) -> Any:
        """The stored column, with the numbers in the type they are stored in."""
        return array_cast(storage, self.pa_type)

    def decode_example(self, value: dict, token_per_repo_id: dict | None = None) -> Image.Image:
        """Draws a mask: mode `L`, 0 = background, 1..C = classes, 255 = ignore."""
        return Image.fromarray(draw_objects(json.loads(value["objects"]), value["height"], value["width"]))


def draw_objects(objects: list[tuple[int, Any]], height: int, width: int) -> np.ndarray:
    """
    Draws pairs of class id (255 for a crowd) and COCO segmentation over one another: crowds, then the largest to the
    smallest.

    Returns `(height, width)` uint8. Raises `ValueError` for a class id that is not between 1 and 255, and for a
    segmentation that is none of COCO's kinds or belongs to an image of another size.
    """
    wrong = [class_id for class_id, _ in objects if not 1 <= class_id <= IGNORE_INDEX]
    if wrong:
        raise ValueError(
            f"An object has the class id {wrong[0]}, expected are 1 to {IGNORE_INDEX - 1}, or {IGNORE_INDEX} for a "
            "crowd: masks have 8 bits."
        )
    encoded = [(class_id, _run_lengths(segmentation, height, width)) for class_id, segmentation in objects]
    encoded = [(class_id, runs) for class_id, runs in encoded if runs is not None]
    encoded.sort(key=lambda item: (item[0] != IGNORE_INDEX, -int(mask_utils.area(item[1]))))
    ids = np.zeros((height, width), dtype=np.uint8)
    for class_id, runs in encoded:
        ids[mask_utils.decode(runs).astype(bool)] = class_id
    return ids


def _run_lengths(segmentation: Any, height: int, width: int) -> dict | None:
    if isinstance(segmentation, list):
        # fewer than three corners enclose nothing, and pycocotools takes four numbers for a box
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, height, width)) if polygons else None
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(
            f"A segmentation is a list of polygons or a run-length encoding of {height} x {width} pixels (height x "
            f"width), not {str(segmentation)[:60]}: repair the annotation."
        )
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, height, width)
    return segmentation


with warnings.catch_warnings():
    # datasets marks the registration of features as experimental, on every call
    warnings.simplefilter("ignore")
    register_feature(PolygonMask, "SynerNetPolygonMask")


__all__ = ["PolygonMask", "draw_objects", "load_coco2014"]
