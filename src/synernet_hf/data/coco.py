"""COCO annotation files → `datasets.DatasetDict`, with masks that are drawn from polygons when they are read."""

import json
import logging
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets.features.features import register_feature
from datasets.table import array_cast
from PIL import Image
from pycocotools import mask as mask_utils

from synernet_hf.data.files import ImageIndex, parse_json, read_text, unique_ids
from synernet_hf.data.labels import NO_LABEL, choose_class_names
from synernet_hf.data.schema import (
    IGNORE_INDEX,
    as_streams,
    build_split,
    check_on_bad_image,
    class_index,
    clean_label,
    is_background,
    name_some,
    note_skipped,
)


logger = logging.getLogger(__name__)

PART_SIZE = 1000
# labelme's name for what is not scored
IGNORED_LABEL = "__ignore__"
# an annotation file of another kind is known by a key of its annotations
OTHER_KINDS = {"segments_info": "panoptic segments", "caption": "captions"}


def load_coco2014(
    data_dir: str | Path,
    train_split: str = "train2014",
    validation_split: str = "val2014",
    on_bad_image: str = "raise",
    streaming: bool = False,
    skipped: dict[str, list[str]] | None = None,
    splits: Sequence[str] = ("train", "validation"),
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Loads COCO 2014, or any folder in its layout, without decoding an image.

    The classes are the categories in the order of their ids, numbered from 1 without gaps: for the official files the
    80 of `COCO_CLASSES`. An object or crowd of a class labels its image; images without an annotation are left out, as
    is usual (82,081 and 40,137 images of the official splits remain). Masks of the validation split are drawn when a
    record is opened, see [`PolygonMask`]. A file without outlines, such as a detection export, gives no masks.

    Args:
        data_dir (`str` or `Path`): The folder that holds `annotations` and the folders of images.
        train_split (`str`, *optional*, defaults to `"train2014"`): The folder `<split>/` of training images, with
            `annotations/instances_<split>.json`.
        validation_split (`str`, *optional*, defaults to `"val2014"`): The same of the images to evaluate on.
        on_bad_image, streaming, skipped, splits:
            See [`load_image_labels`].

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`: `train` (`image`, `image_id`, `labels`) and
        `validation` (the same and, where there are outlines, `mask`).

    Raises:
        FileNotFoundError: A folder, an annotation file or an image is missing.
        ValueError: An annotation file is not in COCO's format or gives an id twice, it has more than 254 categories, or
            the two files do not list the same categories.
    """
    root = Path(data_dir).expanduser()
    if not (root / "annotations").is_dir():
        raise FileNotFoundError(
            f"There is no folder {root / 'annotations'}: give the folder that holds annotations, {train_split} and "
            f"{validation_split}."
        )
    names = {"train": train_split, "validation": validation_split}
    files = {split: (root / "annotations" / f"instances_{names[split]}.json", root / names[split]) for split in splits}
    loaded = load_coco_files(files, None, on_bad_image, skipped)
    return as_streams(loaded) if streaming else loaded


def load_coco_files(
    files: Mapping[str, tuple[Path, Path]],
    class_names: Sequence[str] | None,
    on_bad_image: str,
    skipped: dict[str, list[str]] | None,
) -> datasets.DatasetDict:
    """
    Loads the annotation file and the folder of images of each split, as [`load_coco2014`] describes.

    No file is ever held in memory as a tree of objects.
    """
    check_on_bad_image(on_bad_image)
    readers = {split: _CocoFile(path, keep_outlines=split != "train") for split, (path, _) in files.items()}
    first, *others = readers.values()
    background = _background_ids(first, set().union(*(reader.used() for reader in readers.values())))
    listed = sorted(set(first.categories) - background)
    if len(listed) >= IGNORE_INDEX:
        raise ValueError(
            f"The annotation file {first.path} has {len(listed)} categories, but masks of 8 bits hold at most "
            f"{IGNORE_INDEX - 1}, for {IGNORE_INDEX} is ignore: leave out or join categories."
        )
    for other in others:
        if other.categories != first.categories:
            raise ValueError(
                f"The categories of {other.path} are not those of {first.path}: use two files of one data set."
            )
    categories = [clean_label(first.categories[category]) for category in listed]
    repeated = [name for name, number in Counter(categories).items() if number > 1]
    if repeated:
        ids = [str(category) for category, name in zip(listed, categories, strict=True) if name == repeated[0]]
        raise ValueError(
            f"The annotation file {first.path} calls the categories {name_some(ids)} {repeated[0]!r}, which occurs more "
            "than once: give each class one id."
        )
    names = choose_class_names(class_names, ["background", *categories], str(first.path))
    class_ids = {category: index for index, category in enumerate(listed, start=1)}
    built = datasets.DatasetDict()
    for split, reader in readers.items():
        built[split], missing = _build(files[split][1], reader, class_ids, names, on_bad_image)
        note_skipped(skipped, split, missing)
    return built


class _CocoFile:
    """
    An annotation file, read in one pass: the JSON reader yields each object as soon as it is complete. Kept are the
    class ids of each image, and its segmentations as text with `keep_outlines`.
    """

    def __init__(self, path: Path, keep_outlines: bool) -> None:
        self.path = path
        self.keep_outlines = keep_outlines
        self.has_outlines = False
        # image id → [(category id, is a crowd, annotation id, segmentation as JSON text)]
        self.annotations: dict[int, list[tuple[int, bool, Any, str | None]]] = {}
        if not path.is_file():
            found = sorted(other.name for other in path.parent.glob("*.json"))
            raise FileNotFoundError(
                f"There is no annotation file {path}: the folder has {', '.join(found) or 'no instances_*.json'}."
            )
        text = read_text(path)
        try:
            content = parse_json(text, self._reduce)
            left = next((entry for entry in content["annotations"] if entry is not None), {})
            images = [(int(entry["id"]), self._image(entry)) for entry in content["images"]]
            rows = content.get("categories") or []
            categories = [(int(entry["id"]), entry["name"]) for entry in rows]
            nameless = [str(key) for key, name in categories if not isinstance(name, str)]
            if nameless:
                raise ValueError(f"the name of the category {name_some(nameless)} is no text")
            self.supercategories = {int(entry["id"]): entry.get("supercategory") for entry in rows}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"The annotation file {path} is not in COCO's format ({type(error).__name__}: {error}): images, "
                "annotations and categories are expected."
            ) from error
        if left or not categories:
            kind = next((OTHER_KINDS[key] for key in OTHER_KINDS if key in left), "no labels of classes")
            raise ValueError(
                f"The annotation file {path} holds {kind}: give a file of objects with an image_id and a category_id "
                "(instances_*.json)."
            )
        self.images = self._by_id("images", images)
        self.categories = self._by_id("categories", categories)
        self._check_references()

    def _reduce(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        if "category_id" not in entry or "image_id" not in entry:
            return entry
        text = None
        if self.keep_outlines:
            self.has_outlines |= not _is_empty(entry.get("segmentation"))
            text = json.dumps(entry.get("segmentation"), separators=(",", ":"))
        item = (int(entry["category_id"]), bool(entry.get("iscrowd")), entry.get("id", "without id"), text)
        self.annotations.setdefault(int(entry["image_id"]), []).append(item)
        return None

    def _image(self, entry: dict[str, Any]) -> tuple[str, int, int]:
        height, width = (int(entry.get(side) or 0) if self.keep_outlines else 0 for side in ("height", "width"))
        return str(entry["file_name"]), height, width

    def _by_id(self, kind: str, entries: list[tuple[int, Any]]) -> dict[int, Any]:
        """The entries of a list of the file by their ids, each of which is expected once."""
        by_id = dict(entries)
        if len(by_id) < len(entries):
            key = Counter(key for key, _ in entries).most_common(1)[0][0]
            texts = [value if isinstance(value, str) else value[0] for _, value in entries]
            places = [
                f"{texts[place - 1]} (entry {place})" for place, (other, _) in enumerate(entries, 1) if other == key
            ]
            raise ValueError(
                f"The annotation file {self.path} gives the id {key} to several {kind}: {name_some(places)}. Number "
                "them anew, or join files with a tool that does."
            )
        return by_id

    def _check_references(self) -> None:
        orphans = [str(image_id) for image_id in self.annotations if image_id not in self.images]
        if orphans:
            raise ValueError(
                f"The annotation file {self.path} annotates {len(orphans)} images that it does not list "
                f"({name_some(orphans)}): list them under images."
            )
        unknown = sorted(self.used() - set(self.categories))
        if unknown:
            raise ValueError(
                f"The annotation file {self.path} uses the category ids {name_some([str(i) for i in unknown])}, which "
                "it does not list: list them under categories."
            )

    def used(self) -> set[int]:
        """The category ids of all annotations."""
        return {category for items in self.annotations.values() for category, *_ in items}

    def pop_mask(self, image_id: int, class_ids: Mapping[int, int]) -> dict[str, Any]:
        """The cell of an image in the mask column; its annotations are freed."""
        _, height, width = self.images[image_id]
        objects = (
            f'[{IGNORE_INDEX if is_crowd else class_ids[category]},{text},"annotation {key} of image {image_id}"]'
            for category, is_crowd, key, text in self.annotations.pop(image_id)
            if category in class_ids
        )
        return {"height": height, "width": width, "objects": f"[{','.join(objects)}]"}


def _background_ids(reader: _CocoFile, used: set[int]) -> set[int]:
    """Ids of categories that are not classes: the background, and the row for all classes that Roboflow writes."""
    names = reader.categories
    background = {key for key, name in names.items() if is_background(name)}
    if background:
        logger.warning(
            "%s: the category %s is the background: its annotations are left out.",
            reader.path,
            name_some([repr(names[key]) for key in sorted(background)]),
        )
    others = {group for key, group in reader.supercategories.items() if key != 0}
    if 0 in names and 0 not in used and others == {names[0]}:
        logger.warning("%s: the category %r stands for all classes and is left out.", reader.path, names[0])
        background.add(0)
    return background


def _build(
    folder: Path, reader: _CocoFile, class_ids: Mapping[int, int], names: Sequence[str], on_bad_image: str
) -> tuple[datasets.Dataset, list[str]]:
    """A split, and a phrase for each image that is not there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder} with the images of {reader.path.name}.")
    annotated = sorted(reader.annotations)
    if len(annotated) < len(reader.images):
        without = len(reader.images) - len(annotated)
        logger.warning("%s: %d images without annotations are left out.", reader.path, without)
    index = ImageIndex(folder)
    found = {
        image_id: index.find_first([reader.images[image_id][0]], f"{reader.path}, image {image_id}")
        for image_id in annotated
    }
    missing = [reader.images[image_id][0] for image_id, path in found.items() if path is None]
    if missing and on_bad_image == "raise":
        raise FileNotFoundError(
            f"{reader.path} names {len(missing)} of {len(annotated)} images that are not in {folder} "
            f"({name_some(missing)}): add them, or leave them out with on_bad_image='skip' (--on_bad_image skip)."
        )
    kept = [image_id for image_id, path in found.items() if path is not None]
    if not kept:
        raise ValueError(
            f"None of the images of {reader.path} is in {folder} and annotated: there is nothing to load."
        )
    paths = [found[image_id] for image_id in kept]
    repeated = [path for path, number in Counter(paths).items() if number > 1]
    if repeated:
        ids = [str(image_id) for image_id in kept if found[image_id] == repeated[0]]
        raise ValueError(
            f"The annotation file {reader.path} lists the image {repeated[0]} more than once, under the ids "
            f"{name_some(ids)}: keep one of them, with all annotations."
        )
    with_masks = reader.keep_outlines and reader.has_outlines
    if reader.keep_outlines and not with_masks:
        logger.warning(
            "%s: no annotation has an outline, so the split has no masks: it cannot be scored.", reader.path
        )
    ids = unique_ids(paths, folder)
    parts = []
    # in parts, so that an annotation is in memory either as text or in the table
    for start in range(0, len(kept), PART_SIZE):
        part = kept[start : start + PART_SIZE]
        labels = [
            [class_ids[key] - 1 for key, *_ in reader.annotations[image_id] if key in class_ids] for image_id in part
        ]
        masks = [reader.pop_mask(image_id, class_ids) for image_id in part] if with_masks else None
        end = start + len(part)
        parts.append(build_split(paths[start:end], ids[start:end], labels, names, masks, PolygonMask()))
    return datasets.concatenate_datasets(parts), [f"the image {file} is not in {folder}" for file in missing]


@dataclass
class PolygonMask:
    """
    Feature of a `mask` column whose images are kept as annotations and drawn on access.

    A cell holds `height`, `width` and `objects`, JSON text of lists `[class id, segmentation, name]`. The class id of a
    crowd is 255 (ignore), a segmentation is a list of polygons or a run-length encoding as in COCO, and the name
    appears in error sentences. Crowds are drawn first, then objects from the largest to the smallest, so that a small
    object in front of a large one stays visible (our choice; annotations say nothing about depth).

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


def outline_cell(
    height: int, width: int, outlines: Sequence[tuple[str, Any, str]], class_names: Sequence[str]
) -> dict[str, Any]:
    """
    The cell of a [`PolygonMask`] with outlines given as (class name, segmentation, name for error sentences).

    Outlines of the background and without a label are left out; those called `__ignore__` become 255.
    """
    objects = [
        (IGNORE_INDEX if label == IGNORED_LABEL else class_index(clean_label(label), class_names), segmentation, name)
        for label, segmentation, name in outlines
        if not is_background(label) and (label in class_names or clean_label(label).lower() not in NO_LABEL)
    ]
    return {"height": height, "width": width, "objects": json.dumps(objects, separators=(",", ":"))}


def draw_objects(objects: list[tuple], height: int, width: int) -> np.ndarray:
    """
    Draws the objects of a [`PolygonMask`] one above the other: `(height, width)` uint8.

    Raises `ValueError` for a class id that is not between 1 and 255, and for a segmentation that encloses nothing, is
    none of COCO's kinds or belongs to an image of another size.
    """
    encoded = []
    for class_id, segmentation, *name in objects:
        if not 1 <= class_id <= IGNORE_INDEX:
            raise ValueError(
                f"An object has the class id {class_id}, expected are 1 to {IGNORE_INDEX - 1}, or {IGNORE_INDEX} for a "
                "crowd: masks have 8 bits."
            )
        fault = _fault_of(segmentation, height, width)
        if fault:
            raise ValueError(
                f"{name[0] if name else 'An object'}: the segmentation {json.dumps(segmentation)[:60]} {fault}; polygons "
                f"of three points or more, or a run-length encoding of {height} x {width} pixels (height x width), are "
                "expected."
            )
        encoded.append((class_id, _run_lengths(segmentation, height, width)))
    encoded.sort(key=lambda item: (item[0] != IGNORE_INDEX, -int(mask_utils.area(item[1]))))
    ids = np.zeros((height, width), dtype=np.uint8)
    for class_id, runs in encoded:
        ids[mask_utils.decode(runs).astype(bool)] = class_id
    return ids


def _is_empty(segmentation: Any) -> bool:
    """Whether there is no outline: nothing at all, or polygons of fewer than three points only."""
    if isinstance(segmentation, dict):
        return not segmentation.get("counts")
    polygons = segmentation if isinstance(segmentation, list) else [segmentation]
    return all(polygon is None or (isinstance(polygon, list) and len(polygon) < 6) for polygon in polygons)


def _fault_of(segmentation: Any, height: int, width: int) -> str | None:
    """Why a segmentation cannot be drawn, a predicate. pycocotools would end the process or draw noise."""
    if _is_empty(segmentation):
        return "encloses nothing"
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [height, width]:
            return f"has the size {segmentation.get('size')}"
        return None if _num_pixels(segmentation["counts"]) == height * width else "does not cover the image"
    if not isinstance(segmentation, list) or not all(isinstance(polygon, list) for polygon in segmentation):
        return "is not a list of polygons [[x, y, x, y, x, y, ...], ...]"
    reach = 10 * max(height, width)
    for polygon in segmentation:
        if len(polygon) % 2 or not all(isinstance(value, int | float) and abs(value) <= reach for value in polygon):
            return "has points that are not pairs of numbers in or near the image"
    if all(
        min(polygon[::2]) >= width or min(polygon[1::2]) >= height or max(polygon[::2]) < 0 or max(polygon[1::2]) < 0
        for polygon in segmentation
        if polygon
    ):
        return "lies outside the image"
    return None


def _num_pixels(counts: list[int] | str) -> int | None:
    """The number of pixels that a run-length encoding covers; `None` where it is none."""
    if isinstance(counts, list):
        return sum(counts) if all(isinstance(count, int) and count >= 0 for count in counts) else None
    if not isinstance(counts, str) or not all(48 <= ord(character) < 112 for character in counts):
        return None
    # COCO's text: five bits a character, the sixth says that the number goes on, the last character has its sign;
    # from the third number on, the difference to the last but one
    numbers, number, shift = [], 0, 0
    for code in (ord(character) - 48 for character in counts):
        number |= (code & 31) << shift
        shift += 5
        if not code & 32:
            number -= (1 << shift) if code & 16 else 0
            numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
            number, shift = 0, 0
    return sum(numbers) if not shift and min(numbers) >= 0 else None


def _run_lengths(segmentation: Any, height: int, width: int) -> dict:
    if isinstance(segmentation, list):
        # pycocotools takes four numbers for a box
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, height, width)
    return segmentation


with warnings.catch_warnings():
    # datasets marks the registration of features as experimental, on every call
    warnings.simplefilter("ignore")
    register_feature(PolygonMask, "SynerNetPolygonMask")


__all__ = ["IGNORED_LABEL", "PolygonMask", "load_coco2014", "load_coco_files", "outline_cell"]
