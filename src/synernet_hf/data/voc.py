"""PASCAL VOC 2012 devkit folder → `datasets.DatasetDict`."""

import logging
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import datasets
import numpy as np
from PIL import Image

from synernet_hf.data.files import ImageIndex, first_file, image_name
from synernet_hf.data.labels import ids_from_names, read_label_file
from synernet_hf.data.schema import VOC_CLASSES, as_streams, build_split, check_on_bad_image, name_some, note_skipped


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
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Loads PASCAL VOC 2012, or any folder in its layout, without decoding an image.

    Read are `JPEGImages/`, `ImageSets/Segmentation/`, for the validation masks `SegmentationClassAug/` or else
    `SegmentationClass/`, and the image-level labels. The training split has no `mask` column and its masks are never
    opened, unless `image_labels="masks"` asks for it by name.

    Args:
        data_dir (`str` or `Path`): The `VOCdevkit` folder that holds `VOC2012`, or the `VOC2012` folder itself.
        image_labels (`str` or `Path`, *optional*, defaults to `"annotations"`): Where the image-level labels come
            from: `"annotations"` (the `object/name` entries of `Annotations/*.xml`, difficult objects included, as is
            usual in this field), `"masks"` (the class ids that occur in the masks), or the path of an `.npz`, `.json`
            or `.csv` file, see [`read_label_file`].
        train_split (`str`, *optional*, defaults to `"train_aug"`): The list in `ImageSets/Segmentation` to train on.
            Where it is not given and `train_aug` does not exist, `train` is taken and logged.
        validation_split (`str`, *optional*, defaults to `"val"`): The list to evaluate on.
        on_bad_image, streaming, skipped:
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
    train_list = train_split or _default_train_split(root)
    ids = {"train": _read_list(root, train_list), "validation": _read_list(root, validation_split)}
    source = "annotations" if image_labels is None else image_labels
    table = None if source in ("annotations", "masks") else read_label_file(source, VOC_CLASSES)

    images = ImageIndex(root / "JPEGImages").by_key
    splits = {}
    for split, split_ids in ids.items():
        list_name = train_list if split == "train" else validation_split
        missing = [image_id for image_id in split_ids if image_id not in images]
        if missing and on_bad_image == "raise":
            raise FileNotFoundError(
                f"The split {list_name!r} names {len(missing)} images that are not in {root / 'JPEGImages'} "
                f"({name_some(missing)}): add them or take them out of the list."
            )
        split_ids = [image_id for image_id in split_ids if image_id in images]
        if not split_ids:
            raise ValueError(f"None of the images of the split {list_name!r} is in {root / 'JPEGImages'}.")
        doubled = [image_id for image_id in split_ids if len(images[image_id]) > 1]
        if doubled:
            raise ValueError(
                f"{len(doubled)} images of the split {list_name!r} are there more than once "
                f"({name_some(images[doubled[0]])} in {root / 'JPEGImages'}): keep one file of each name."
            )
        if source == "annotations":
            labels = _labels_from_annotations(root, split_ids)
        elif source == "masks":
            labels = _labels_from_masks(_find_masks(root, split_ids, list_name, required=True))
        else:
            labels = _labels_from_table(table, split_ids, source, list_name)
        masks = _find_masks(root, split_ids, list_name) if split == "validation" else None
        paths = [str(root / "JPEGImages" / images[image_id][0]) for image_id in split_ids]
        phrases = [f"{image_id} of the list {list_name} is not in {root / 'JPEGImages'}" for image_id in missing]
        note_skipped(skipped, split, phrases)
        splits[split] = build_split(paths, split_ids, labels, VOC_CLASSES, masks)
    return as_streams(splits) if streaming else datasets.DatasetDict(splits)


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


def _read_list(root: Path, name: str) -> list[str]:
    path = root / "ImageSets" / "Segmentation" / f"{name}.txt"
    if not path.is_file():
        existing = sorted(other.stem for other in path.parent.glob("*.txt"))
        raise FileNotFoundError(
            f"There is no list {path} for the split {name!r}: the folder has {', '.join(existing) or 'no lists'}."
        )
    # Lists of the field's repositories hold "/JPEGImages/ID.jpg /SegmentationClassAug/ID.png" instead of "ID".
    ids = [image_name(line.split()[0]) for line in path.read_text().splitlines() if line.strip()]
    if not ids:
        raise ValueError(f"The list {path} of the split {name!r} is empty: give at least one image.")
    return ids


def _find_masks(root: Path, image_ids: Sequence[str], split: str, required: bool = False) -> list[str] | None:
    masks = [first_file(root / folder / f"{image_id}.png" for folder in MASK_FOLDERS) for image_id in image_ids]
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


def _labels_from_table(
    table: dict[str, list[int]], image_ids: Sequence[str], source: str | Path, split: str
) -> list[list[int]]:
    missing = [image_id for image_id in image_ids if image_id not in table]
    if missing:
        raise ValueError(
            f"The label file {source} lacks {len(missing)} of the {len(image_ids)} images of the split {split!r} "
            f"({name_some(missing)}): add them to the file or take them out of the split."
        )
    return [table[image_id] for image_id in image_ids]


def _labels_from_annotations(root: Path, image_ids: Sequence[str]) -> list[list[int]]:
    folder = root / "Annotations"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The folder {root} has no Annotations: give image_labels as the path of an .npz, .json or .csv file, or "
            "as 'masks' to read the labels off the masks."
        )
    missing = [image_id for image_id in image_ids if not (folder / f"{image_id}.xml").is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(image_ids)} images have no annotation in {folder} ({name_some(missing)}): add "
            "them or give image_labels as the path of a label file."
        )
    labels = []
    for image_id in image_ids:
        path = folder / f"{image_id}.xml"
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
            ids = np.unique(np.asarray(mask))
        ids = ids[(ids != 0) & (ids != 255)]
        if (ids >= len(VOC_CLASSES)).any():
            raise ValueError(
                f"The mask {path} holds the class id {ids.max()}, but ids go from 0 to {len(VOC_CLASSES) - 1} and 255 "
                "is ignore."
            )
        labels.append([int(class_id) - 1 for class_id in ids])
    return labels


__all__ = ["load_voc2012"]
