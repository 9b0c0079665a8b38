"""Checks of a data set and the report on it: one scan of the records serves to check, to skip and to report."""

import hashlib
import itertools
import logging
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageOps

from synernet_hf.data.coco import PolygonMask
from synernet_hf.data.schema import (
    IGNORE_INDEX,
    check_on_bad_image,
    class_names,
    likely_misspelt,
    name_some,
    note_skipped,
)
from synernet_hf.data.streams import NUM_SAMPLED, first_records, is_stream
from synernet_hf.data.transforms import ORIENTATION_TAG, TRANSPOSED_ORIENTATIONS, open_stored
from synernet_hf.model import to_rgb
from synernet_hf.progress import progress_bar


logger = logging.getLogger(__name__)

FEW_IMAGES = 10
# read together, bytes of images stored in tables among them
RECORDS_AT_ONCE = 16
DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(slots=True)
class RecordScan:
    """
    Findings on one record: the `complaint` about it in one phrase, SHA-256 and size of the file, width and height of
    the upright image, its format and mode, why image or mask cannot be used, the class ids in the mask (`None` where no
    mask was read), and whether the labels lack one of them.
    """

    complaint: str | None = None
    digest: bytes | None = None
    num_bytes: int = 0
    size: tuple[int, int] | None = None
    kind: str | None = None
    fault: str | None = None
    mask_fault: str | None = None
    shown: frozenset[int] | None = None
    contradicts: bool = False


@dataclass
class SplitReport:
    """
    Report on one split.

    Args:
        num_images (`int`): Number of records.
        num_bytes (`int`): Size of the image files together.
        class_counts (`dict[str, int]`): For each foreground class, the number of images that show it.
        unlabelled (`list[str]`): Identifiers of images without any class.
        bad_labels (`list[str]`): Identifiers of images with labels that are not ids of the class list.
        repeated_ids (`list[str]`): Identifiers that occur more than once.
        missing (`list[str]`): A phrase for each record that the loader left out.
        undecodable (`dict[str, str]`): For each image that does not decode, why.
        unusable_masks (`dict[str, str]`): For each mask that evaluation would refuse, why; not for `train`, whose
            masks are not opened.
        mask_counts (`dict[str, int]`, *optional*): For each foreground class, the number of masks that show it.
        widths (`list[int]`, *optional*): Smallest, median and largest width of the upright images, in pixels.
        heights (`list[int]`, *optional*): The same of the heights.
        formats (`dict[str, int]`): Number of images of each file format and mode, such as `"JPEG RGB"`.
    """

    num_images: int
    num_bytes: int
    class_counts: dict[str, int]
    unlabelled: list[str] = field(default_factory=list)
    bad_labels: list[str] = field(default_factory=list)
    repeated_ids: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    undecodable: dict[str, str] = field(default_factory=dict)
    unusable_masks: dict[str, str] = field(default_factory=dict)
    mask_counts: dict[str, int] | None = None
    widths: list[int] | None = None
    heights: list[int] | None = None
    formats: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """One sentence for each kind of problem."""
        number, classes = self.num_images, self.class_counts
        unusable = [f"{key} {why}" for key, why in self.unusable_masks.items()]
        rare = [f"{label}: {count}" for label, count in classes.items() if 0 < count < FEW_IMAGES]
        unseen = [label for label, count in (self.mask_counts or {}).items() if count == 0]
        doubtful = [f"{a}: {classes[a]}, {b}: {classes[b]}" for a, b in likely_misspelt(classes)]
        found = (
            (self.missing, "records were left out by the loader", 20),
            ([f"{key}: {why}" for key, why in self.undecodable.items()], f"of {number} images do not decode", 3),
            (self.bad_labels, f"of {number} images have labels that are not ids of the class list", 3),
            (self.unlabelled, f"of {number} images have no class", 3),
            (unusable, f"of {number} images have a mask that cannot be used", 3),
            (self.repeated_ids, "identifiers occur twice", 3),
            ([label for label in classes if not classes[label]], f"of {len(classes)} classes are in no image", 5),
            (rare, f"of {len(classes)} classes are in fewer than {FEW_IMAGES} images", 20),
            (unseen, f"of {len(classes)} classes are in no mask", 20),
            (doubtful, "rare classes with almost the name of a common one", 3),
        )
        return [f"{len(items)} {fault} ({name_some(items, limit)})." for items, fault, limit in found if items]


@dataclass
class DatasetReport:
    """
    Report on a data set.

    Args:
        splits (`dict[str, SplitReport]`): Reports by name.
        duplicates (`list[list[str]]`): Groups of images, each as `"split/image_id"`, whose files are equal byte for
            byte.
    """

    splits: dict[str, SplitReport]
    duplicates: list[list[str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as mappings, lists, text and numbers."""
        return asdict(self)

    def problems(self) -> list[str]:
        """One sentence for each kind of problem; empty where there is none."""
        found = [f"{name}: {problem}" for name, split in self.splits.items() for problem in split.problems()]
        if self.duplicates:
            groups = [" = ".join(group) for group in self.duplicates]
            found.append(f"{len(groups)} groups of images are equal, byte for byte ({name_some(groups)}).")
            across = [group for group in self.duplicates if len({member.split("/", 1)[0] for member in group}) > 1]
            if across:
                found.append(f"{len(across)} of these groups are in more than one split: scores would be too good.")
        return found

    def text(self) -> str:
        """The report to read: sizes and formats, a table of class counts, and the problems."""
        lines = []
        for name, split in self.splits.items():
            lines.append(f"{name}: {split.num_images:,} images, {split.num_bytes / 1e6:,.1f} MB")
            if split.widths:
                widths, heights = (", ".join(f"{v:,}" for v in values) for values in (split.widths, split.heights))
                lines.append(f"  width {widths}, height {heights} (smallest, median, largest)")
                lines.append(f"  {', '.join(f'{count:,} {kind}' for kind, count in split.formats.items())}")
        names = list(next(iter(self.splits.values())).class_counts)
        rows = [["class", *self.splits]]
        rows += [[label, *(f"{split.class_counts[label]:,}" for split in self.splits.values())] for label in names]
        widths = [max(len(row[0]) for row in rows), *(max(len(name), 7) for name in self.splits)]
        lines.append("")
        for first, *counts in rows:
            cells = [count.rjust(width) for count, width in zip(counts, widths[1:], strict=True)]
            lines.append("  ".join([first.ljust(widths[0]), *cells]))
        problems = self.problems()
        things = f"{len(problems)} {'thing' if len(problems) == 1 else 'things'} to look at:"
        lines += ["", things if problems else "Nothing found that needs a look."]
        return "\n".join(lines + [f"- {problem}" for problem in problems])


def check_dataset(
    dataset_dict: datasets.DatasetDict,
    on_bad_image: str = "raise",
    decode_images: bool = True,
    skipped: dict[str, list[str]] | None = None,
    num_threads: int = 2,
    left_out: dict[str, list[int]] | None = None,
) -> datasets.DatasetDict:
    """
    Checks that every record can be used.

    The `mask` column of a split named `train` is not touched. Of a stream the first 64 records are checked.

    Args:
        dataset_dict (`datasets.DatasetDict`): What a loader of this package returned.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): What to do about an image or mask that cannot be
            used: `"raise"`, or `"skip"` to leave the record out.
        decode_images (`bool`, *optional*, defaults to `True`): Decodes every image, JPEGs at an eighth of their size,
            and every mask; `False` leaves them unopened.
        skipped (`dict[str, list[str]]`, *optional*): Receives, by split, a phrase for each record that is left out.
        num_threads (`int`, *optional*, defaults to 2): Threads that decode.
        left_out (`dict[str, list[int]]`, *optional*): Receives, by split, the positions of records that are left out.

    Returns:
        `datasets.DatasetDict`: the records to use.

    Raises:
        ValueError: No split, an empty split, a stream with `"skip"`, labels that are missing or hold other ids than those of the
            class list, no label in the training split, an image that does not decode, or, outside the training split,
            a mask that is missing, does not decode, is not a palette or greyscale image, has another size than its image
            (both turned as their EXIF orientation says), or holds an id that is neither a class nor 255.
    """
    check_on_bad_image(on_bad_image)
    if any(map(is_stream, dataset_dict.values())):
        if on_bad_image == "skip":
            raise ValueError(
                "Streamed data is not read beforehand, so no record can be left out of it: take unusable images out, or "
                "leave out on_bad_image='skip' (--on_bad_image skip)."
            )
        held, _ = datasets.DatasetDict(), class_names(dataset_dict)
        for name, split in dataset_dict.items():
            if is_stream(split):
                # not called "train", of which all classes are expected
                name, split = f"{name} (first {NUM_SAMPLED} records)", first_records(split, NUM_SAMPLED)
            held[name] = split
        check_dataset(held, decode_images=decode_images, num_threads=num_threads)
        return dataset_dict
    _check_labels(dataset_dict)
    if not decode_images:
        return dataset_dict
    num_labels = len(class_names(dataset_dict))
    kept = datasets.DatasetDict()
    for name, split in dataset_dict.items():
        scans = _scan(split, name, num_labels, num_threads)
        bad = {index: scan.complaint for index, scan in enumerate(scans) if scan.complaint}
        if bad and on_bad_image == "raise":
            raise ValueError(
                f"{len(bad)} of {len(split)} records of the split {name!r} cannot be used: "
                f"{name_some(list(bad.values()))}. Repair them or take them out of the split (on_bad_image='skip', "
                "--on_bad_image skip, leaves them out)."
            )
        if len(bad) == len(split):
            raise ValueError(
                f"The split {name!r} is empty after all {len(bad)} records were left out: "
                f"{name_some(list(bad.values()))}. Repair them."
            )
        shown = [scan.shown for scan in scans if scan.shown is not None]
        if shown and not any(shown) and any(split.with_format(None)["labels"][:]):
            logger.warning(
                "The masks of the split %r show no class, although the labels name some, so that scores say nothing: 0 "
                "is the background and %d is not scored; a class needs an id from 1 to %d in a mask.",
                name,
                IGNORE_INDEX,
                num_labels - 1,
            )
        contradictions = sum(scan.contradicts for scan in scans)
        if contradictions > len(split) / 2:
            logger.warning(
                "In %d of %d records of the split %r the mask shows classes that the image labels do not name: ids in "
                "masks are positions in the class list, so check its order.",
                contradictions,
                len(split),
                name,
            )
        note_skipped(skipped, name, list(bad.values()))
        if bad and left_out is not None:
            left_out[name] = list(bad)
        kept[name] = split.select([index for index in range(len(split)) if index not in bad]) if bad else split
    if any(len(kept[name]) < len(dataset_dict[name]) for name in kept):
        _check_labels(kept)
    return kept


def inspect_dataset(dataset_dict: datasets.DatasetDict, num_threads: int = 2) -> DatasetReport:
    """
    Inspects every record of every split, and continues where [`check_dataset`] would raise.

    Args:
        dataset_dict (`datasets.DatasetDict`): What a loader of this package returned.
        num_threads (`int`, *optional*, defaults to 2): Threads that decode.

    Returns:
        [`DatasetReport`]: `text()` to read, `to_dict()` to keep.

    Raises:
        ValueError: There is no split, or the splits do not share one class list.
    """
    names = class_names(dataset_dict)
    splits, places = {}, {}
    for split_name, split in dataset_dict.items():
        split = split.with_format(None)
        report = splits[split_name] = _label_report(split, names[1:])
        scans = _scan(split, split_name, len(names), num_threads)
        for image_id, scan in zip(split["image_id"][:], scans, strict=True):
            if scan.digest is not None:
                places.setdefault(scan.digest, []).append(f"{split_name}/{image_id}")
            if scan.fault:
                report.undecodable[image_id] = scan.fault
            if scan.mask_fault:
                report.unusable_masks[image_id] = scan.mask_fault
        report.num_bytes = sum(scan.num_bytes for scan in scans)
        good = [scan for scan in scans if not scan.fault]
        if good:
            report.widths, report.heights = (_three([scan.size[axis] for scan in good]) for axis in (0, 1))
        report.formats = dict(sorted(Counter(scan.kind for scan in good).items()))
        if split_name != "train" and "mask" in split.column_names:
            shown = Counter(label for scan in scans for label in scan.shown or ())
            report.mask_counts = {name: shown[index] for index, name in enumerate(names) if index}
    return DatasetReport(splits, [group for group in places.values() if len(group) > 1])


def mask_ids(
    mask: Image.Image, size: tuple[int, int], num_labels: int, ignore_index: int = IGNORE_INDEX
) -> np.ndarray:
    """
    Reads the class ids of a mask.

    Args:
        mask (`PIL.Image.Image`): Palette or greyscale image of ids, upright.
        size (`tuple[int, int]`): Width and height of its image, upright.
        num_labels (`int`): Number of classes, background included.
        ignore_index (`int`, *optional*, defaults to 255): The id of pixels that are not scored.

    Returns:
        `np.ndarray`: `(height, width)` int64, each 0 to `num_labels - 1` or `ignore_index`.

    Raises:
        ValueError: The size, the mode or an id is wrong. The message is a predicate, such as `"has mode RGB"`.
    """
    if mask.size != size:
        raise ValueError(
            f"is {mask.size[0]} x {mask.size[1]} (width x height), its image {size[0]} x {size[1]} pixels; equal "
            "sizes are expected, after both are turned as their EXIF orientation says"
        )
    ids = np.asarray(mask)
    # numbers that are stored with a point, as by programs for maps, may be ids
    is_whole = ids.dtype.kind == "f" and np.equal(np.mod(ids, 1), 0).all()
    if ids.ndim != 2 or not (is_whole or ids.dtype.kind in "bui"):
        raise ValueError(f"has mode {mask.mode}; a palette or greyscale image of class ids is expected")
    scored = ids[ids != ignore_index]
    if scored.size and not 0 <= int(scored.min()) <= int(scored.max()) < num_labels:
        outside = [int(i) for i in np.unique(scored) if not 0 <= i < num_labels]
        raise ValueError(
            f"holds the ids {name_some([str(i) for i in outside])}; 0 to {num_labels - 1} and {ignore_index} (ignore) "
            "are expected"
        )
    return ids.astype(np.int64)


def _check_labels(dataset_dict: datasets.DatasetDict) -> None:
    if not dataset_dict:
        raise ValueError("The data set has no split: a 'train' split is needed for training, 'validation' for scores.")
    empty = [name for name, split in dataset_dict.items() if len(split) == 0]
    if empty:
        raise ValueError(f"The split {empty[0]!r} is empty: give at least one image.")
    names = class_names(dataset_dict)[1:]
    for split_name, split in dataset_dict.items():
        report = _label_report(split, names)
        if report.bad_labels:
            raise ValueError(
                f"{len(report.bad_labels)} of {len(split)} records of the split {split_name!r} have wrong labels "
                f"({name_some(report.bad_labels)}): a list of different ids from 0 to {len(names) - 1}, sorted, is "
                "expected."
            )
        absent = [name for name, count in report.class_counts.items() if count == 0]
        if split_name == "train" and len(absent) == len(names):
            raise ValueError(
                "No image of the split 'train' has a positive label: training from image-level labels needs "
                "images with classes, so check the label source."
            )
        if split_name == "train" and absent:
            logger.warning("No training image shows %s: these classes cannot be learned.", ", ".join(absent))


def _label_report(split: datasets.Dataset, names: list[str]) -> SplitReport:
    """Report on the identifiers and labels of a split; `names` are those of the foreground classes."""
    table = split.with_format(None).select_columns(["image_id", "labels"])[:]
    counts, unlabelled, bad, known = [0] * len(names), [], [], set(range(len(names)))
    for image_id, ids in zip(table["image_id"], table["labels"], strict=True):
        if ids is None or None in ids or sorted(set(ids)) != ids or not known.issuperset(ids):
            bad.append(image_id)
        elif not ids:
            unlabelled.append(image_id)
        else:
            for label in ids:
                counts[label] += 1
    repeated = sorted(image_id for image_id, number in Counter(table["image_id"]).items() if number > 1)
    return SplitReport(len(split), 0, dict(zip(names, counts, strict=True)), unlabelled, bad, repeated)


def _scan(split: datasets.Dataset, split_name: str, num_labels: int, num_threads: int) -> list[RecordScan]:
    """Reads and decodes every image once, and every mask outside the training split."""
    split = split.with_format(None)
    columns = ["image", "image_id", "labels"] + ["mask"] * ("mask" in split.column_names and split_name != "train")
    split = split.select_columns(columns).cast_column("image", datasets.Image(decode=False))
    if "mask" in columns:
        kind = PolygonMask if isinstance(split.features["mask"], PolygonMask) else datasets.Image
        split = split.cast_column("mask", kind(decode=False))

    def scan(start: int) -> list[RecordScan]:
        # a few at once take a fraction of the time of as many single ones
        found = split[start : start + RECORDS_AT_ONCE]
        return [
            _scan_record(dict(zip(found, cells, strict=True)), num_labels)
            for cells in zip(*found.values(), strict=True)
        ]

    with ThreadPoolExecutor(num_threads) as pool:
        scans = itertools.chain.from_iterable(pool.map(scan, range(0, len(split), RECORDS_AT_ONCE)))
        text = f"checking the split {split_name!r}"
        return list(progress_bar(scans, text, len(split), leave=False, delay=1))


def _scan_record(record: dict, num_labels: int) -> RecordScan:
    scan = RecordScan()
    try:
        content, path = record["image"]["bytes"], record["image"].get("path")
        content = Path(path).read_bytes() if content is None else content
        scan.digest, scan.num_bytes = hashlib.sha256(content).digest(), len(content)
        image = open_stored({"bytes": content, "path": None})
        scan.kind = f"{image.format} {image.mode}"
        scan.size = _decoded_size(image)
    except DECODING_ERRORS as error:
        scan.fault = _reason(error)
        scan.complaint = f"the image {_named(record, 'image')} does not decode ({scan.fault})"
        return scan
    if "mask" in record:
        try:
            ids = _stored_mask_ids(record["mask"], scan.size, num_labels)
            scan.shown = frozenset(np.unique(ids).tolist()) - {0, IGNORE_INDEX}
            scan.contradicts = not scan.shown <= {label + 1 for label in record["labels"]}
        except ValueError as error:
            scan.mask_fault = str(error)
            scan.complaint = f"the mask of {_named(record, 'mask')} {error}"
    return scan


def _named(record: dict, column: str) -> str:
    path = (record[column] or {}).get("path")
    return record["image_id"] + (f" ({path})" if path else "")


def _reason(error: Exception) -> str:
    """The message of an error, to stand in a sentence, without the address of a stream."""
    return re.sub(r" <_io\.BytesIO.*?>", "", " ".join(str(error).split())).rstrip(".")


def _decoded_size(image: Image.Image) -> tuple[int, int]:
    """Decodes an image, a JPEG at an eighth of its size; gives width and height of the upright image."""
    size = image.size
    image.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))
    image.load()
    if image.mode[0] in "IF":
        # the range of more than 8 bits may be unknown
        to_rgb(image)
    # asked after loading: a TIFF is turned by loading, and a PNG may have its EXIF after the pixels
    return size[::-1] if image.getexif().get(ORIENTATION_TAG) in TRANSPOSED_ORIENTATIONS else size


def _stored_mask_ids(cell: dict | None, size: tuple[int, int], num_labels: int) -> np.ndarray:
    """The ids of a stored mask. Raises `ValueError` with a predicate, as [`mask_ids`] does."""
    if cell is None:
        raise ValueError("is missing")
    if "objects" in cell and (cell["width"], cell["height"]) != size:
        raise ValueError(
            f"is drawn from annotations for {cell['width']} x {cell['height']} pixels (width x height), its image has "
            f"{size[0]} x {size[1]}"
        )
    try:
        if "objects" in cell:
            mask = PolygonMask().decode_example(cell)
        else:
            mask = open_stored(cell)
            mask.load()
            mask = ImageOps.exif_transpose(mask)
    except DECODING_ERRORS as error:
        raise ValueError(f"does not decode ({_reason(error)})") from error
    return mask_ids(mask, size, num_labels)


def _three(values: list[int]) -> list[int]:
    return [min(values), int(np.median(values)), max(values)]


__all__ = ["DatasetReport", "SplitReport", "check_dataset", "inspect_dataset", "mask_ids"]
