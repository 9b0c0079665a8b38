"""What can be known to be wrong with a data set before training starts."""

import logging
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
from PIL import Image, ImageOps

from synernet_hf.data.label_files import name_some
from synernet_hf.data.polygon_mask import IGNORE_INDEX, PolygonMask
from synernet_hf.data.schema import class_names, note_skipped
from synernet_hf.data.transforms import ORIENTATION_TAG, TRANSPOSED_ORIENTATIONS, open_image


logger = logging.getLogger(__name__)

DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def check_dataset(
    dataset_dict: datasets.DatasetDict, decode_images: bool = True, num_threads: int = 2
) -> dict[str, dict[str, int]]:
    """
    Checks every split and says in one sentence what is wrong.

    The `mask` column of a split named `train` is not touched.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            What a loader of this package returned.
        decode_images (`bool`, *optional*, defaults to `True`):
            Decodes every image, JPEGs at an eighth of their size, so that a truncated file is found now and not in
            the middle of a run, and every mask; `False` leaves images and masks unopened.
        num_threads (`int`, *optional*, defaults to 2):
            Threads that decode.

    Returns:
        `dict[str, dict[str, int]]`: for each split and foreground class, the number of images with that class.

    Raises:
        ValueError: No split, an empty split, labels that are missing or hold other ids than those of the class list, no
            positive label in the training split, an image that does not decode, or, outside the training split, a
            mask that is missing, does not decode, is no palette or greyscale image, has another size than its
            image (both turned as their EXIF orientation says), or holds an id that is neither a class nor 255.
    """
    if not dataset_dict:
        raise ValueError("The data set has no split: a 'train' split is needed for training, 'validation' for scores.")
    empty = [name for name, split in dataset_dict.items() if len(split) == 0]
    if empty:
        raise ValueError(f"The split {empty[0]!r} is empty: give at least one image.")
    names = class_names(dataset_dict)[1:]
    counts = {}
    for split_name, split in dataset_dict.items():
        positives = _check_labels(split, split_name, len(names))
        counts[split_name] = dict(zip(names, positives.tolist(), strict=True))
        if split_name == "train":
            absent = [name for name, count in counts["train"].items() if count == 0]
            if len(absent) == len(names):
                raise ValueError(
                    "No image of the split 'train' has a positive label: training from image-level labels needs "
                    "images with classes, so check the label source."
                )
            if absent:
                logger.warning("No training image shows %s: these classes can not be learned.", ", ".join(absent))
    if decode_images:
        for split_name, split in dataset_dict.items():
            _check_images(split, split_name, len(names) + 1, num_threads)
    return counts


def drop_bad_records(
    dataset_dict: datasets.DatasetDict, num_threads: int = 2, skipped: dict[str, list[str]] | None = None
) -> datasets.DatasetDict:
    """
    Leaves out the records that [`check_dataset`] would refuse for their image or mask.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            What a loader of this package returned.
        num_threads (`int`, *optional*, defaults to 2):
            Threads that decode.
        skipped (`dict[str, list[str]]`, *optional*):
            Dictionary to which what is left out is added, a phrase for each record, by split.

    Returns:
        `datasets.DatasetDict`: the other records. What is left out is logged too.
    """
    names = class_names(dataset_dict)
    kept = {}
    for split_name, split in dataset_dict.items():
        complaints = _complaints(split, split_name, len(names), num_threads)
        phrases = [complaint for complaint in complaints if complaint]
        kept[split_name] = split
        if phrases:
            kept[split_name] = split.select([index for index, complaint in enumerate(complaints) if not complaint])
            note_skipped(skipped, split_name, phrases)
    return datasets.DatasetDict(kept)


def mask_ids(
    mask: Image.Image, size: tuple[int, int], num_labels: int, ignore_index: int = IGNORE_INDEX
) -> np.ndarray:
    """
    Reads the class ids of a mask and says in one sentence what is wrong with it.

    Args:
        mask (`PIL.Image.Image`):
            Palette or greyscale image of ids, upright.
        size (`tuple[int, int]`):
            Width and height of its image, upright.
        num_labels (`int`):
            Number of classes, background included.
        ignore_index (`int`, *optional*, defaults to 255):
            The id of pixels that are not scored.

    Returns:
        `np.ndarray`: `(height, width)` int64, each 0 to `num_labels - 1` or `ignore_index`.

    Raises:
        ValueError: The size, the mode or an id is another one. The message is a predicate, such as `"has mode RGB"`:
            the caller puts the name of the mask before it.
    """
    if mask.size != size:
        raise ValueError(
            f"is {mask.size[0]} x {mask.size[1]} (width x height), its image {size[0]} x {size[1]} pixels; equal "
            "sizes are expected, after both are turned as their EXIF orientation says"
        )
    ids = np.asarray(mask)
    if ids.ndim != 2 or ids.dtype.kind not in "bui":
        raise ValueError(f"has mode {mask.mode}; a palette or greyscale image of class ids is expected")
    scored = ids[ids != ignore_index]
    if scored.size and not 0 <= int(scored.min()) <= int(scored.max()) < num_labels:
        outside = [int(i) for i in np.unique(scored) if not 0 <= i < num_labels]
        raise ValueError(
            f"holds the ids {name_some([str(i) for i in outside])}; 0 to {num_labels - 1} and {ignore_index} (ignore) "
            "are expected"
        )
    return ids.astype(np.int64)


def undecoded(split: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
    """
    Columns of a split with images and masks as they are stored.

    Args:
        split (`datasets.Dataset`):
            Of a loader of this package.
        columns (`list[str]`):
            Names of the columns.

    Returns:
        `datasets.Dataset`: these columns; cells of `image` and `mask` are dictionaries.
    """
    split = split.select_columns(columns)
    for column in [name for name in ("image", "mask") if name in columns]:
        kind = PolygonMask if isinstance(split.features[column], PolygonMask) else datasets.Image
        split = split.cast_column(column, kind(decode=False))
    return split


def decode_size(image: Image.Image) -> tuple[int, int]:
    """
    Decodes an image to see whether it does, a JPEG at an eighth of its size.

    Args:
        image (`PIL.Image.Image`):
            As [`open_image`] gives it.

    Returns:
        `tuple[int, int]`: width and height of the upright image.

    Raises:
        One of `DECODING_ERRORS`: It does not decode.
    """
    size = image.size
    image.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))
    image.load()
    # asked after loading: a TIFF is turned by loading, and a PNG may have its EXIF after the pixels
    return size[::-1] if image.getexif().get(ORIENTATION_TAG) in TRANSPOSED_ORIENTATIONS else size


def examine_mask(cell: dict | None, size: tuple[int, int], num_labels: int) -> tuple[str | None, np.ndarray | None]:
    """
    Looks at one stored mask.

    Args:
        cell (`dict`, *optional*):
            What [`undecoded`] gives.
        size (`tuple[int, int]`):
            Width and height of its image, upright.
        num_labels (`int`):
            Number of classes, background included.

    Returns:
        `tuple[str | None, np.ndarray | None]`: what is wrong, a predicate such as `"is missing"`, or `None`; and the
        ids as in [`mask_ids`] where the mask was opened and can be used. Annotations are not drawn.
    """
    if cell is None:
        return "is missing", None
    if "objects" in cell:
        # drawn from annotations, as large as these say and with the classes they name
        if (cell["width"], cell["height"]) == size:
            return None, None
        return (
            f"is drawn from annotations for {cell['width']} x {cell['height']} pixels (width x height), its image "
            f"has {size[0]} x {size[1]}",
            None,
        )
    try:
        mask = open_image(cell)
        mask.load()
        mask = ImageOps.exif_transpose(mask)
    except DECODING_ERRORS as error:
        return f"does not decode ({error})", None
    try:
        return None, mask_ids(mask, size, num_labels)
    except ValueError as error:
        return str(error), None


def _check_labels(split: datasets.Dataset, split_name: str, num_classes: int) -> np.ndarray:
    table = split.select_columns(["image_id", "labels"])[:]
    counts = np.zeros(num_classes, dtype=int)
    bad = []
    for image_id, ids in zip(table["image_id"], table["labels"], strict=True):
        if good_labels(ids, num_classes):
            counts[ids] += 1
        else:
            bad.append(f"{image_id}: {ids}")
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(split)} records of the split {split_name!r} have wrong labels ({name_some(bad)}): a "
            f"list of different ids from 0 to {num_classes - 1}, sorted, is expected."
        )
    return counts


def good_labels(label_ids: list[int] | None, num_classes: int) -> bool:
    """
    Says whether the labels of a record are as the contract has them.

    Args:
        label_ids (`list[int]`, *optional*):
            The cell.
        num_classes (`int`):
            Number C of foreground classes.

    Returns:
        `bool`: They are ids from 0 to C - 1, sorted and without repeats.
    """
    if label_ids is None or None in label_ids or sorted(set(label_ids)) != label_ids:
        return False
    return not label_ids or 0 <= label_ids[0] <= label_ids[-1] < num_classes


def _check_images(split: datasets.Dataset, split_name: str, num_labels: int, num_threads: int) -> None:
    complaints = [complaint for complaint in _complaints(split, split_name, num_labels, num_threads) if complaint]
    if complaints:
        raise ValueError(
            f"{len(complaints)} of {len(split)} records of the split {split_name!r} can not be used: "
            f"{name_some(complaints)}. Repair them or take them out of the split (on_bad_image='skip', --on_bad_image skip, leaves them out)."
        )


def _complaints(split: datasets.Dataset, split_name: str, num_labels: int, num_threads: int) -> list[str | None]:
    """What is wrong with each record, `None` where nothing is."""
    scored = "mask" in split.column_names and split_name != "train"
    columns = ["image", "image_id", "labels", "mask"] if scored else ["image", "image_id"]
    split = undecoded(split, columns)
    with ThreadPoolExecutor(num_threads) as pool:
        outcomes = list(pool.map(lambda index: _examine(split[index], num_labels), range(len(split))))
    contradictions = sum(contradicts for _, contradicts in outcomes)
    if contradictions > len(split) / 2:
        logger.warning(
            "In %d of %d records of the split %r the mask shows classes that the image labels do not name: ids in "
            "masks are positions in the class list, so check its order.",
            contradictions,
            len(split),
            split_name,
        )
    return [complaint for complaint, _ in outcomes]


def _examine(record: dict, num_labels: int) -> tuple[str | None, bool]:
    """What is wrong with a record, and whether its mask shows a class that its labels do not name."""
    path = record["image"].get("path")
    name = f"the image {record['image_id']}" + (f" ({path})" if path else "")
    try:
        size = decode_size(open_image(record["image"]))
    except DECODING_ERRORS as error:
        return f"{name} does not decode ({error})", False
    if "mask" not in record:
        return None, False
    fault, ids = examine_mask(record["mask"], size, num_labels)
    if fault:
        path = (record["mask"] or {}).get("path")
        return f"the mask of {record['image_id']}" + (f" ({path})" if path else "") + f" {fault}", False
    named = {0, IGNORE_INDEX, *(label + 1 for label in record["labels"])}
    return None, ids is not None and not named.issuperset(np.unique(ids).tolist())


__all__ = ["check_dataset", "decode_size", "drop_bad_records", "examine_mask", "good_labels", "mask_ids", "undecoded"]
