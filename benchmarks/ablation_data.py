"""
What the ablation does with the data beside the package: a split to choose settings on, training on true masks, and the
pseudo-labels of a training compared with them.
"""

import dataclasses
import importlib
import inspect
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from synernet_hf.data import StreamBatchSampler, TrainTransform, multi_hot
from synernet_hf.files import write_text
from synernet_hf.model import BranchPair
from synernet_hf.training import InvalidArguments, load_data


TUNING_IMAGES = 300
TRAIN_LIST = "train_aug"
LISTS = Path("ImageSets") / "Segmentation"


def cut_tuning_split(data_args, folder: Path):
    """
    Cuts images off the training list to choose settings on, so that the validation split stays for reports.

    Args:
        data_args ([`DataArguments`]): VOC or a folder in its layout; left as they are.
        folder (`Path`): Gets a devkit of links to the images and masks, with the lists `tuning_train` and
            `tuning_val`: of the sorted training list, shuffled by `random.Random(0)`, the first 300 are scored.

    Returns:
        [`DataArguments`]: of that devkit.

    Raises:
        InvalidArguments: if the data is not VOC or has too few images.
    """
    if data_args.dataset != "voc2012" or data_args.data_dir is None:
        raise InvalidArguments("--tuning cuts images off VOC's training list: it needs --data voc_animals --data_dir.")
    root = Path(data_args.data_dir).expanduser().resolve()
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    path = root / LISTS / f"{data_args.train_split or TRAIN_LIST}.txt"
    if not path.is_file():
        raise InvalidArguments(f"There is no training list {path} to cut images off: give the devkit as --data_dir.")
    ids = sorted(path.read_text(encoding="utf-8").split())
    if len(ids) <= TUNING_IMAGES:
        raise InvalidArguments(
            f"{path} lists {len(ids)} images; --tuning scores {TUNING_IMAGES} and trains on others."
        )
    random.Random(0).shuffle(ids)
    (folder / LISTS).mkdir(parents=True, exist_ok=True)
    for name in ("JPEGImages", "SegmentationClassAug", "SegmentationClass", "Annotations"):
        if (root / name).is_dir():
            # the process beside this one may have been faster
            with suppress(FileExistsError):
                (folder / name).symlink_to(root / name, target_is_directory=True)
    for name, own in (("tuning_val", ids[:TUNING_IMAGES]), ("tuning_train", ids[TUNING_IMAGES:])):
        write_text(folder / LISTS / f"{name}.txt", "".join(f"{image_id}\n" for image_id in sorted(own)))
    return dataclasses.replace(
        data_args, data_dir=str(folder), train_split="tuning_train", validation_split="tuning_val"
    )


class MaskStream:
    """
    True masks of the training stream, cropped and mirrored as their images: one plane for each class goes through the
    transform of the image, and the largest plane of a pixel is its class.

    Args:
        data_args ([`DataArguments`]), training_args ([`SynerNetTrainingArguments`]): of the training.
    """

    def __init__(self, data_args, training_args):
        if data_args.dataset == "shapes":
            options = data_args.dataset_options | {"with_train_masks": True}
            self.split = load_data(dataclasses.replace(data_args, dataset_options=options))["train"]
        else:
            own = dataclasses.replace(data_args, validation_split=data_args.train_split or TRAIN_LIST)
            self.split = load_data(own, splits=("validation",))["validation"]
        if "mask" not in self.split.column_names:
            raise InvalidArguments("The ceiling learns from masks, and the training images have none: leave it out.")
        self.split = self.split.select_columns(["mask", "image_id", "labels"])
        self.args = training_args
        self.transform = TrainTransform(
            training_args.crop_size, tuple(training_args.scale_range), training_args.flip, training_args.seed
        )

    def mask(self, index: int, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask `(S, S)` int64, 255 outside the image, and valid box `(4,)` at a position of the stream."""
        record = self.split[index]
        mask = np.asarray(record.pop("mask"))
        classes = np.unique(mask)
        planes = []
        for start in range(0, len(classes), 3):
            channels = [255 * (mask == class_id).astype(np.uint8) for class_id in classes[start : start + 3]]
            channels += [np.zeros_like(mask, dtype=np.uint8)] * (3 - len(channels))
            sample = self.transform(record | {"image": Image.fromarray(np.stack(channels, axis=-1))}, position)
            planes.append(sample["image"])
        ids = torch.from_numpy(classes.astype(np.int64))[torch.cat(planes)[: len(classes)].max(dim=0).indices]
        top, bottom, left, right = sample["valid_box"].tolist()
        outside = torch.ones_like(ids, dtype=torch.bool)
        outside[top:bottom, left:right] = False
        return ids.masked_fill(outside, 255), sample["valid_box"]

    def __call__(self, step: int, valid_boxes: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Masks `(B, S, S)` of the batch of a step; `ValueError` if its boxes or labels are not those of the images."""
        size = self.args.per_device_batch_size
        keys = next(iter(StreamBatchSampler(len(self.split), size, step + 1, self.args.seed, step)))
        masks, boxes = map(torch.stack, zip(*(self.mask(*key) for key in keys), strict=True))
        own = torch.stack([multi_hot(self.split[index]["labels"], labels.shape[1]) for index, _ in keys])
        if not (torch.equal(boxes, valid_boxes.cpu()) and torch.equal(own, labels.float().cpu())):
            raise ValueError(
                f"The masks of step {step} are not those of its images. The ceiling runs in one process, without "
                "accumulation of gradients and with every image of the list; so does every row whose training images "
                "have masks."
            )
        return masks.to(valid_boxes.device)


# every so many steps the labels of a batch are compared with its masks
RECORD_EVERY = 10


@contextmanager
def labels_against_masks(data_args, training_args, record: Path, teach: bool) -> Iterator[None]:
    """
    Compares the pseudo-labels of a training with the true masks, and with `teach` replaces them by these and nothing
    else. The package opens no mask of a training image, so its objective is patched here.

    Args:
        data_args ([`DataArguments`]), training_args ([`SynerNetTrainingArguments`]): of the training.
        record (`Path`): JSON lines, see [`label_counts`]; one line each `RECORD_EVERY` steps with labels. A run that
            goes on adds to it.
        teach (`bool`): Whether the decoders learn from the masks.

    Raises:
        InvalidArguments: if the training images have no masks and `teach` needs them.
    """
    try:
        stream = MaskStream(data_args, training_args)
    except InvalidArguments:
        if teach:
            raise
        yield
        return
    objective = importlib.import_module("synernet_hf.model.objective_synernet")
    make_targets = objective.make_targets
    signature = inspect.signature(make_targets)

    def with_masks(*args, **kwargs):
        targets, confidence = make_targets(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        step = round(given["progress"] * training_args.max_steps)
        if given["weights"]["segmentation"] and (teach or step % RECORD_EVERY == 0):
            masks = stream(step, given["valid_boxes"], given["labels"])
            if step % RECORD_EVERY == 0:
                counts = {"step": step} | label_counts(*(own.pseudo_labels for own in targets), masks)
                with record.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(counts) + "\n")
            if teach:
                targets = BranchPair(*(own._replace(pseudo_labels=masks) for own in targets))
        return targets, confidence

    with mock.patch.object(objective, "make_targets", with_masks):
        yield


def label_counts(broad: torch.Tensor, precise: torch.Tensor, masks: torch.Tensor) -> dict[str, Any]:
    """
    How the labels that teach both branches, `(B, H, W)` int64, meet the masks `(B, H, W)`; 255 is undecided in labels
    and unknown in masks.

    Returns:
        `dict`: `broad` and `precise`, per class id (a text) the pixels labelled so and rightly so, labelled so, and of
        this class, all where the mask is known; `differ`, the foreground pixels of either label where both are decided,
        and those of them where they differ.
    """
    known = masks != 255
    counts: dict[str, Any] = {}
    for name, labels in (("broad", broad), ("precise", precise)):
        counts[name] = {}
        for class_id in torch.cat([masks[known], labels[known & (labels != 255)]]).unique().tolist():
            of_class, labelled = masks == class_id, (labels == class_id) & known
            numbers = (labelled & of_class, labelled, of_class)
            counts[name][str(class_id)] = [int(number.sum()) for number in numbers]
    either = (broad != 255) & (precise != 255) & ((broad > 0) | (precise > 0))
    return counts | {"differ": [int(either.sum()), int((either & (broad != precise)).sum())]}


def label_quality(record: Path, max_steps: int, class_ids: Sequence[int], names: Sequence[str]) -> list[dict]:
    """
    The lines of a record in tenths of the training.

    Args:
        record (`Path`): Of [`labels_against_masks`].
        max_steps (`int`): Steps of the training.
        class_ids (`Sequence[int]`): Foreground classes that count. names (`Sequence[str]`): All classes by id.

    Returns:
        `list[dict]`: per tenth with labels its end as a share of the training, `until`; of each branch `precision` and
        `recall`, in [0, 1], per class of its labels against the masks and as `mean`; and `differ`, the share of
        foreground pixels whose two labels differ.
    """
    # a run that went on from a checkpoint has done some steps twice: the later line counts
    lines = {line["step"]: line for line in map(json.loads, record.read_text(encoding="utf-8").splitlines())}
    tenths: dict[int, list[dict]] = {}
    for step, line in sorted(lines.items()):
        tenths.setdefault(10 * step // max_steps, []).append(line)
    quality = []
    for tenth, own in tenths.items():
        entry: dict[str, Any] = {"until": min(round((tenth + 1) / 10, 1), 1.0)}
        for branch in BranchPair._fields:
            sums = {
                class_id: np.sum([line[branch].get(str(class_id), [0, 0, 0]) for line in own], axis=0)
                for class_id in class_ids
            }
            for name, column in (("precision", 1), ("recall", 2)):
                shares = {names[i]: counts[0] / counts[column] for i, counts in sums.items() if counts[column]}
                shares["mean"] = sum(shares.values()) / max(len(shares), 1)
                entry.setdefault(branch, {})[name] = shares
        decided, differing = np.sum([line["differ"] for line in own], axis=0)
        quality.append(entry | {"differ": differing / max(decided, 1)})
    return quality
