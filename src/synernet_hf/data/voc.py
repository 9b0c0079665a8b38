"""PASCAL VOC 2012 devkit folder → `datasets.DatasetDict`."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
from PIL import Image

from synernet_hf.data.checks import mask_ids
from synernet_hf.data.files import ImageIndex, image_name, read_text, unique_ids
from synernet_hf.data.labels import ids_from_names, read_label_file
from synernet_hf.data.schema import (
    IGNORE_INDEX,
    VOC_CLASSES,
    as_streams,
    build_split,
    check_on_bad_image,
    name_some,
    note_skipped,
)


logger = logging.getLogger(__name__)

MASK_FOLDERS = ("SegmentationClassAug", "SegmentationClass")


def load_voc2012(
    data_dir: str | Path,
    image_labels: str | Path | None = None,
    train_split: str | None = None,
    validation_split: str = "val",
    on_bad_image: str = "raise",
    streaming: bool = False,
    skipped: dict[str, list[str]] | None = None,
    splits: Sequence[str] = ("train", "validation"),
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Loads PASCAL VOC 2012, or any folder in its layout, without decoding an image.

    Reads `JPEGImages/`, `ImageSets/Segmentation/`, the image-level labels, and for the validation masks
    `SegmentationClassAug/` or else `SegmentationClass/`. Training masks are never opened, unless
    `image_labels="masks"` asks for it by name.

    Args:
        data_dir (`str` or `Path`): The `VOCdevkit` folder that holds `VOC2012`, or the `VOC2012` folder itself.
        image_labels (`str` or `Path`, *optional*, defaults to `"annotations"`): Where the image-level labels come
            from: `"annotations"` (the `object/name` entries of `Annotations/*.xml`, difficult objects included), `"masks"` (the class ids in the masks), or the path of an `.npz`, `.json` or `.csv`
            file, see [`read_label_file`].
        train_split (`str`, *optional*, defaults to `"train_aug"`): The list in `ImageSets/Segmentation` to train on;
            without a name, `train` where `train_aug` does not exist.
        validation_split (`str`, *optional*, defaults to `"val"`): The list to evaluate on.
        on_bad_image, streaming, skipped, splits:
            See [`load_image_labels`].

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`: `train` (`image`, `image_id`, `labels`) and
        `validation` (the same and, where masks exist, `mask`).

    Raises:
        FileNotFoundError: A folder, list, image, annotation or mask is missing.
        ValueError: An empty list, two images of one name, or labels that are missing, of the wrong length or of an
            unknown class.
    """
    check_on_bad_image(on_bad_image)
    root = _find_root(Path(data_dir).expanduser())
    source = "annotations" if image_labels is None else image_labels
    table = None if source in ("annotations", "masks") else read_label_file(source, VOC_CLASSES)
    index = ImageIndex(root / "JPEGImages")
    built = datasets.DatasetDict()
    for split in splits:
        name = validation_split if split == "validation" else train_split or _default_train_split(root)
        paths, missing = _read_list(root, name, index)
        if missing and on_bad_image == "raise":
            raise FileNotFoundError(
                f"The split {name!r} names {len(missing)} images that are not in {index.folder} ({name_some(missing)}): "
                "add them or take them out of the list."
            )
        if not paths:
            raise ValueError(f"None of the images of the split {name!r} is in {index.folder}.")
        ids = [image_name(path) for path in paths]
        masks = None
        if split == "validation" or source == "masks":
            masks = _find_masks(root, ids, name, required=source == "masks")
        if source == "annotations":
            labels = _labels_from_annotations(root, ids)
        elif source == "masks":
            labels = _labels_from_masks(masks)
        else:
            lacking = [image_id for image_id in ids if image_id not in table]
            if lacking:
                raise ValueError(
                    f"The label file {source} lacks {len(lacking)} of the {len(ids)} images of the split {name!r} "
                    f"({name_some(lacking)}): add them to the file or take them out of the split."
                )
            labels = [table[image_id] for image_id in ids]
        note_skipped(skipped, split, [f"{other} of the list {name} is not in {index.folder}" for other in missing])
        image_ids = unique_ids(paths, index.folder)
        built[split] = build_split(paths, image_ids, labels, VOC_CLASSES, masks if split == "validation" else None)
    return as_streams(built) if streaming else built


def _find_root(data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise FileNotFoundError(f"There is no folder {data_dir}: give the VOCdevkit folder or the VOC2012 folder.")
    root = data_dir / "VOC2012" if (data_dir / "VOC2012").is_dir() else data_dir
    for needed in ("JPEGImages", "ImageSets/Segmentation"):
        if not (root / needed).is_dir():
            raise FileNotFoundError(
                f"The folder {root} has no {needed}: give the VOCdevkit folder that holds VOC2012, or VOC2012 itself; "
                "images of your own are the data set image_folder (--dataset image_folder)."
            )
    return root


def _default_train_split(root: Path) -> str:
    folder = root / "ImageSets" / "Segmentation"
    if not (folder / "train_aug.txt").is_file() and (folder / "train.txt").is_file():
        logger.warning("%s has no train_aug.txt: training on the list train.txt instead.", folder)
        return "train"
    return "train_aug"


def _read_list(root: Path, name: str, index: ImageIndex) -> tuple[list[str], list[str]]:
    """The images of a list, and the names in it that are no image."""
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        existing = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"There is no list {path} for the split {name!r}: the folder has {', '.join(existing) or 'no lists'}."
        )
    found, missing = Counter(), []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        # Lists of the field's repositories hold "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png" instead of "ID".
        listed = re.split(r"(?<=\.jpg|jpeg|\.png)\s+|\s+(?=[/\\])", line.strip(), flags=re.IGNORECASE)[0]
        if not listed:
            continue
        image = index.find_first((listed, listed.split()[0]), f"{path}, line {number}")
        if image is None:
            missing.append(image_name(listed))
        else:
            found[image] += 1
    if not found and not missing:
        raise ValueError(f"The list {path} of the split {name!r} is empty: give at least one image.")
    repeated = [image_name(image) for image, count in found.items() if count > 1]
    if repeated:
        logger.warning(
            "%s names %d images more than once (%s): each is used once.", path, len(repeated), name_some(repeated)
        )
    return list(found), missing


def _find_masks(root: Path, image_ids: Sequence[str], split: str, required: bool) -> list[str] | None:
    indices = [ImageIndex(root / folder) for folder in MASK_FOLDERS]
    place = f"The list {split}"
    masks = [
        next(filter(None, (index.find_first([image_id], place) for index in indices)), None) for image_id in image_ids
    ]
    missing = [image_id for image_id, mask in zip(image_ids, masks, strict=True) if mask is None]
    if len(missing) == len(masks) and not required:
        logger.warning("The split %r has no masks in %s: it cannot be scored.", split, " or ".join(MASK_FOLDERS))
        return None
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(image_ids)} images of the split {split!r} have no mask in "
            f"{' or '.join(MASK_FOLDERS)} of {root} ({name_some(missing)}): add them or take them out of the list."
        )
    return masks


def _labels_from_annotations(root: Path, image_ids: Sequence[str]) -> list[list[int]]:
    folder = root / "Annotations"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder {root} has no Annotations: give image_labels as the path of an .npz, .json or .csv file, or "
            "as 'masks' to read the labels off the masks."
        )
    files = {image_name(path.stem): path for path in folder.iterdir() if path.suffix.lower() == ".xml"}
    missing = [image_id for image_id in image_ids if image_id not in files]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(image_ids)} images have no annotation in {folder} ({name_some(missing)}): add "
            "them or give image_labels as the path of a label file."
        )
    labels = []
    for path in (files[image_id] for image_id in image_ids):
        try:
            names = [(node.text or "").strip() for node in ElementTree.parse(path).iterfind("object/name")]
        except ElementTree.ParseError as error:
            raise ValueError(f"The annotation {path} cannot be read: {error}.") from error
        labels.append(ids_from_names(names, VOC_CLASSES, str(path)))
    return labels


def _labels_from_masks(masks: Sequence[str]) -> list[list[int]]:
    labels = []
    for path in masks:
        with Image.open(path) as mask:
            try:
                ids = np.unique(mask_ids(mask, mask.size, len(VOC_CLASSES))).tolist()
            except ValueError as error:
                raise ValueError(f"The mask {path} {error}.") from error
        labels.append([class_id - 1 for class_id in ids if class_id not in (0, IGNORE_INDEX)])
    return labels


__all__ = ["load_voc2012"]
