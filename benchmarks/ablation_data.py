"""What the ablation does with the data beside the package: a split to choose settings on, and training on true masks."""

import dataclasses
import importlib
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
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
                "accumulation of gradients and with every image of the list."
            )
        return masks.to(valid_boxes.device)


@contextmanager
def taught_by_masks(data_args, training_args) -> Iterator[None]:
    """
    Replaces the pseudo-labels of a training by the true masks, and nothing else, from the step on at which the
    segmentation starts. The package opens no mask of a training image, so its objective is patched here.
    """
    stream = MaskStream(data_args, training_args)
    objective = importlib.import_module("synernet_hf.model.objective_synernet")
    make_targets = objective.make_targets
    signature = inspect.signature(make_targets)

    def with_masks(*args, **kwargs):
        targets, confidence = make_targets(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if given["weights"]["segmentation"]:
            step = round(given["progress"] * training_args.max_steps)
            masks = stream(step, given["valid_boxes"], given["labels"])
            targets = BranchPair(*(own._replace(pseudo_labels=masks) for own in targets))
        return targets, confidence

    with mock.patch.object(objective, "make_targets", with_masks):
        yield
