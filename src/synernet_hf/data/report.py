"""What a data set is like, told without training on it: counts, sizes, duplicates, and what can not be used."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from synernet_hf.data.checks import DECODING_ERRORS, decode_size, examine_mask, good_labels, undecoded
from synernet_hf.data.label_files import name_some
from synernet_hf.data.schema import class_names
from synernet_hf.data.transforms import open_image


@dataclass
class SplitReport:
    """
    What one split is like.

    Args:
        num_images (`int`): records of the split.
        num_bytes (`int`): size of the image files together.
        class_counts (`dict[str, int]`): per foreground class, the number of images that show it.
        unlabelled (`list[str]`): identifiers of images without any class.
        bad_labels (`list[str]`): identifiers of images whose labels are missing, or hold other ids than those of the
            class list.
        repeated_ids (`list[str]`): identifiers that occur more than once.
        undecodable (`dict[str, str]`): per image that does not decode, why.
        unusable_masks (`dict[str, str]`): per mask that evaluation would refuse, why. Masks of `train` are not opened.
        widths (`list[int]`, *optional*): smallest, median and largest width of the upright images, in pixels.
        heights (`list[int]`, *optional*): smallest, median and largest height, in pixels.
        formats (`dict[str, int]`): images per file format and mode, such as `"JPEG RGB"`.
    """

    num_images: int
    num_bytes: int
    class_counts: dict[str, int]
    unlabelled: list[str] = field(default_factory=list)
    bad_labels: list[str] = field(default_factory=list)
    repeated_ids: list[str] = field(default_factory=list)
    undecodable: dict[str, str] = field(default_factory=dict)
    unusable_masks: dict[str, str] = field(default_factory=dict)
    widths: list[int] | None = None
    heights: list[int] | None = None
    formats: dict[str, int] = field(default_factory=dict)


@dataclass
class DatasetReport:
    """
    What a data set is like.

    Args:
        splits (`dict[str, SplitReport]`): by name.
        duplicates (`list[list[str]]`): groups of images whose files are equal byte for byte, each as
            `"split/image_id"`, over all splits.
    """

    splits: dict[str, SplitReport]
    duplicates: list[list[str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as mappings, lists, text and numbers."""
        return asdict(self)

    def problems(self) -> list[str]:
        """One sentence for each kind of thing that is worth a look; empty where nothing is."""
        found = []
        for name, split in self.splits.items():
            for fault, items in (
                ("do not decode", [f"{key}: {why}" for key, why in split.undecodable.items()]),
                ("have labels that are no ids of the class list", split.bad_labels),
                ("have no class", split.unlabelled),
                ("have a mask that can not be used", [f"{key} {why}" for key, why in split.unusable_masks.items()]),
            ):
                if items:
                    found.append(f"{name}: {len(items)} of {split.num_images} images {fault} ({name_some(items)}).")
            if split.repeated_ids:
                found.append(
                    f"{name}: {len(split.repeated_ids)} identifiers occur twice ({name_some(split.repeated_ids)})."
                )
            absent = [label for label, count in split.class_counts.items() if count == 0]
            if absent:
                found.append(
                    f"{name}: {len(absent)} of {len(split.class_counts)} classes are in no image "
                    f"({name_some(absent)})."
                )
            doubtful = _likely_misspelt(split.class_counts)
            if doubtful:
                found.append(f"{name}: rare classes with almost the name of a common one ({name_some(doubtful)}).")
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
                lines.append(
                    f"  width {_range(split.widths)}, height {_range(split.heights)} (smallest, median, largest)"
                )
                lines.append(f"  {', '.join(f'{count:,} {kind}' for kind, count in split.formats.items())}")
        names = list(next(iter(self.splits.values())).class_counts)
        width = max([len(name) for name in names] + [len("class")])
        columns = [max(len(name), 7) for name in self.splits]
        lines += [
            "",
            "  ".join([f"{'class':<{width}}", *(n.rjust(w) for n, w in zip(self.splits, columns, strict=True))]),
        ]
        for label in names:
            counts = [f"{split.class_counts[label]:,}" for split in self.splits.values()]
            lines.append("  ".join([f"{label:<{width}}", *(c.rjust(w) for c, w in zip(counts, columns, strict=True))]))
        problems = self.problems()
        lines += [
            "",
            f"{len(problems)} {'thing' if len(problems) == 1 else 'things'} to look at:"
            if problems
            else "Nothing found that needs a look.",
        ]
        return "\n".join(lines + [f"- {problem}" for problem in problems])


def inspect_dataset(dataset_dict: datasets.DatasetDict, num_threads: int = 2) -> DatasetReport:
    """
    Looks at every record of every split, and goes on where [`check_dataset`] would raise.

    Every image file is read and decoded once, JPEGs at an eighth of their size. The `mask` column of a split named
    `train` is not touched.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            What a loader of this package returned.
        num_threads (`int`, *optional*, defaults to 2):
            Threads that decode.

    Returns:
        [`DatasetReport`]: `text()` to read, `to_dict()` to keep.

    Raises:
        ValueError: There is no split, or the splits do not share one class list.
    """
    names = class_names(dataset_dict)
    splits, places = {}, {}
    for split_name, split in dataset_dict.items():
        ids = list(split["image_id"])
        report = _label_report(split, ids, names)
        seen = _look_at_images(split, split_name, len(names), num_threads)
        for image_id, image in zip(ids, seen, strict=True):
            if image["digest"] is not None:
                places.setdefault(image["digest"], []).append(f"{split_name}/{image_id}")
            if image["fault"]:
                report.undecodable[image_id] = image["fault"]
            if image["mask_fault"]:
                report.unusable_masks[image_id] = image["mask_fault"]
        good = [image for image in seen if not image["fault"]]
        report.num_bytes = sum(image["num_bytes"] for image in seen)
        if good:
            report.widths, report.heights = (_three([image["size"][axis] for image in good]) for axis in (0, 1))
        kinds = [image["kind"] for image in good]
        report.formats = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
        splits[split_name] = report
    return DatasetReport(splits, [group for group in places.values() if len(group) > 1])


def _label_report(split: datasets.Dataset, ids: list[str], names: list[str]) -> SplitReport:
    counts = np.zeros(len(names) - 1, dtype=int)
    unlabelled, bad = [], []
    for image_id, labels in zip(ids, split["labels"], strict=True):
        if not good_labels(labels, len(counts)):
            bad.append(image_id)
        elif not labels:
            unlabelled.append(image_id)
        else:
            counts[labels] += 1
    once: set[str] = set()
    repeated = {image_id for image_id in ids if image_id in once or once.add(image_id)}
    class_counts = dict(zip(names[1:], counts.tolist(), strict=True))
    return SplitReport(len(ids), 0, class_counts, unlabelled, bad, sorted(repeated))


def _look_at_images(
    split: datasets.Dataset, split_name: str, num_labels: int, num_threads: int
) -> list[dict[str, Any]]:
    columns = ["image"] + ["mask"] * ("mask" in split.column_names and split_name != "train")
    split = undecoded(split, columns)
    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(lambda index: _look_at(split[index], num_labels), range(len(split))))


def _look_at(record: dict, num_labels: int) -> dict[str, Any]:
    seen = {"digest": None, "num_bytes": 0, "size": None, "kind": None, "fault": None, "mask_fault": None}
    try:
        content = record["image"]["bytes"]
        content = Path(record["image"]["path"]).read_bytes() if content is None else content
        seen |= {"digest": hashlib.sha256(content).digest(), "num_bytes": len(content)}
        image = open_image({"bytes": content, "path": None})
        seen["kind"] = f"{image.format} {image.mode}"
        seen["size"] = decode_size(image)
    except DECODING_ERRORS as error:
        seen["fault"] = " ".join(str(error).split())
        return seen
    if "mask" in record:
        seen["mask_fault"], _ = examine_mask(record["mask"], seen["size"], num_labels)
    return seen


def _likely_misspelt(class_counts: dict[str, int]) -> list[str]:
    """Classes at most a tenth as frequent as another of nearly the same name."""
    found = []
    for label, count in class_counts.items():
        common = [other for other, number in class_counts.items() if number >= 10 * max(count, 1)]
        near = get_close_matches(label, common, n=1, cutoff=0.8) if count else []
        found += [f"{label}: {count}, {other}: {class_counts[other]}" for other in near]
    return found


def _three(values: list[int]) -> list[int]:
    return [min(values), int(np.median(values)), max(values)]


def _range(values: list[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


__all__ = ["DatasetReport", "SplitReport", "inspect_dataset"]
