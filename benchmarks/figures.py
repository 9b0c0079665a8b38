"""
What a trained SynerNet sees in single images, step by step from the layers' CAMs to the segmentation.

    python benchmarks/figures.py runs/voc_animals --images 2007_000123 2008_000345 --data_dir path/to/VOCdevkit

    python benchmarks/figures.py runs/voc_animals --number 12

    python benchmarks/figures.py runs/voc_animals --images horse.jpg --labels horse person

One PNG per image goes to RUN/figures (or --output): CAMs of both layers of both branches, the labels they vote for
and how far they agree; then each branch's own refined label, the two fused ones that teach the branches, and the
segmentation, beside image and ground truth. A number after a title is the mean IoU with the ground truth over the
classes of this image, in percent; uncertain pixels count as background there.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from synernet_hf.cli import CommandParser, answer_early, needs_extra, run_command
from synernet_hf.files import safe_file_names


with needs_extra("train"):
    from synernet_hf.training import DataArguments, InvalidArguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained model")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--images", nargs="+", default=[], help="ids of the validation split, or image files")
    chosen.add_argument("--number", type=int, help="so many images at equal distances in the validation split")
    parser.add_argument("--labels", nargs="+", help="classes of image files (default: those the model finds)")
    parser.add_argument("--output", type=Path, help="folder of the figures (default: RUN/figures)")
    parser.add_argument("--panel_size", type=int, default=176, help="width and height of a panel in pixels")
    data = parser.add_argument_group("data (default: as in training, from RUN/training_args.json)")
    data.add_argument("--data_dir", help="folder of the data set")
    data.add_argument("--image_labels", help="source of the image labels")
    data.add_argument("--validation_split", help="list of images that the ids are looked up in")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from synernet_hf.metrics import MeanIoU
from synernet_hf.model import (
    BranchPair,
    SynerNetPixelAdaptiveRefinement,
    cams_to_pseudo_labels,
    fuse_branches,
    layer_confidence,
    mask_absent_classes,
    multi_scale_cams,
    open_image,
    prepare_image,
    refine_pseudo_labels,
    segment_images,
)
from synernet_hf.model_folder import load_model_folder
from synernet_hf.visualization import colorize, figure_panels, heat_map, with_legend


with needs_extra("train"):
    from synernet_hf.data import multi_hot
    from synernet_hf.training import load_data


LETTERS = {"broad": "B", "precise": "P"}
UNCERTAIN = 255


def read_file(path: Path, labels: list[str] | None, names: list[str]) -> dict[str, Any]:
    """A record of an image file; without `labels` its labels are None."""
    unknown = [name for name in labels or () if name not in names[1:]]
    if unknown:
        raise InvalidArguments(f"--labels has unknown classes {', '.join(unknown)}; known are {', '.join(names[1:])}.")
    try:
        image = open_image(path)
    except (OSError, ValueError) as error:
        raise InvalidArguments(f"{error} Give a JPEG, PNG or the like.") from error
    label_ids = None if labels is None else [names.index(name) - 1 for name in labels]
    return {"image": image, "image_id": path.stem, "labels": label_ids, "mask": None}


def read_records(args: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    """
    The chosen images: files as they are, everything else looked up in the validation split.

    Raises:
        InvalidArguments: if an image is neither, two would write the same figure, or the split has fewer.
    """
    wanted = [name for name in args.images if not Path(name).is_file()]
    found, images = {}, args.images
    if wanted or args.number is not None:
        path = args.run / "training_args.json"
        settings = json.loads(path.read_text(encoding="utf-8"))["data_args"] if path.is_file() else {}
        overrides = {name: getattr(args, name) for name in ("data_dir", "image_labels", "validation_split")}
        settings |= {name: value for name, value in overrides.items() if value is not None}
        if settings.get("dataset") is None:
            asked = f"{', '.join(wanted)}: no such files" if wanted else f"--number {args.number}: no image is given"
            raise InvalidArguments(f"{asked}, and {path} names no data set with such ids; give --images FILE.")
        try:
            split = load_data(DataArguments(**settings), splits=("validation",))["validation"]
        except (OSError, ValueError) as error:
            raise InvalidArguments(" ".join(str(error).split())) from error
        if args.number is not None:
            if not 1 <= args.number <= len(split):
                raise InvalidArguments(f"--number is {args.number}; the validation split has {len(split)} images.")
            images = wanted = [split["image_id"][i * len(split) // args.number] for i in range(args.number)]
        positions = {image_id: position for position, image_id in enumerate(split["image_id"])}
        missing = [name for name in wanted if name not in positions]
        if missing:
            raise InvalidArguments(
                f"{', '.join(missing)}: neither files nor ids of the validation split, whose first is "
                f"{next(iter(positions))}."
            )
        found = {name: split[positions[name]] for name in wanted}
    records = [found[name] if name in found else read_file(Path(name), args.labels, names) for name in images]
    ids = [record["image_id"] for record in records]
    twice = sorted({image_id for image_id in ids if ids.count(image_id) > 1})
    if twice:
        raise InvalidArguments(f"{', '.join(twice)} would write the same figure twice; give each image once.")
    return records


@torch.no_grad()
def inspect_image(model, processor, image: Image.Image, label_ids: list[int] | None) -> dict[str, Any]:
    """
    Everything the model makes of one image, seen as in evaluation, at the image's size.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]):
            The model, in evaluation mode.
        processor ([`SynerNetImageProcessor`]):
            Resizes, where the model was trained for that, and normalises.
        image (`PIL.Image.Image`):
            Image in any mode, H × W.
        label_ids (`list[int]`, *optional*):
            Ids of its foreground classes, from 0; None takes the classes whose score is above 0, or else the best one.

    Returns:
        `dict[str, Any]`: `labels` `(C,)`; by (branch, layer) `cams` `(H, W)` (largest class, in [0, 1]) and `votes`
        `(H, W)` (255 = uncertain); `confidence` `(H, W)`; `agreed` `(H, W)` (255 = not confident); by name
        `label_maps` `(H, W)`: refined labels, fused labels and segmentations. Arrays of numpy.
    """
    config = model.config
    prepared = prepare_image(processor, image)
    pixel_values = prepared.pixel_values[None].to(model.device, model.dtype)
    # at most `processor.max_pixels`, in which the network and the refinement see the image
    size = (prepared.image.height, prepared.image.width)
    if label_ids is None:
        scores = model(pixel_values).classification_logits
        labels = ((scores > 0) | (scores == scores.amax(dim=1, keepdim=True))).float()
    else:
        labels = multi_hot(label_ids, config.num_labels - 1)[None].to(model.device)
    low, high = config.low_threshold, config.high_threshold

    def at_image(maps: torch.Tensor) -> torch.Tensor:
        maps = mask_absent_classes(maps, labels)
        return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)

    seen = multi_scale_cams(model, pixel_values, None, config.cam_scales, config.cam_flip)
    cams = BranchPair(*(tuple(map(at_image, maps)) for maps in seen))
    names = ["last", "aux", *(f"block {layer}" for layer in config.additional_cam_layers)]
    layers = {
        (branch, name): layer
        for branch, maps in zip(BranchPair._fields, cams, strict=True)
        for name, layer in zip(names, maps, strict=True)
    }
    votes = {
        key: cams_to_pseudo_labels(maps, labels, low, high, ignore_index=UNCERTAIN) for key, maps in layers.items()
    }
    voting = {names[config.cam_layers.index(layer)] for layer in config.voting_layers}
    counted = [vote for (_, name), vote in votes.items() if name in voting]
    confidence, agreed = layer_confidence(torch.stack(counted), UNCERTAIN)
    agreed = agreed.masked_fill(confidence[:, 0] < config.confidence_threshold, UNCERTAIN)

    pixels = torch.from_numpy(np.array(prepared.image)).to(model.device)
    unit_pixels = pixels.permute(2, 0, 1)[None].float() / 255
    refinement = SynerNetPixelAdaptiveRefinement(config.refinement_dilations, config.refinement_iterations)
    fused, _ = fuse_branches(config, cams, labels)
    sources = {f"refined {LETTERS[name]}-CAM": maps[0] for name, maps in cams._asdict().items()}
    sources |= {f"label that teaches {LETTERS[name]}": maps for name, maps in fused._asdict().items()}
    label_maps = {
        name: refine_pseudo_labels(unit_pixels, maps, labels, low, high, None, UNCERTAIN, refinement)
        for name, maps in sources.items()
    }
    for branches, title in (
        ("both", "segmentation"),
        ("broad", "segmentation of B"),
        ("precise", "segmentation of P"),
    ):
        (segmented,) = segment_images(model, processor, [prepared], inference_branches=branches)
        label_maps[title] = segmented.label_map[None]

    def whole(maps: torch.Tensor) -> np.ndarray:
        return F.interpolate(maps[None, None].double(), size=prepared.size)[0, 0].to(maps.dtype).cpu().numpy()

    return {
        "labels": labels[0].cpu().numpy(),
        "cams": {key: whole(maps[0].amax(dim=0)) for key, maps in layers.items()},
        "votes": {key: whole(maps[0]) for key, maps in votes.items()},
        "confidence": whole(confidence[0, 0]),
        "agreed": whole(agreed[0]),
        "label_maps": {name: whole(maps[0]) for name, maps in label_maps.items()},
    }


def image_iou(label_map: np.ndarray, truth: np.ndarray, num_labels: int) -> float:
    """Mean IoU over the classes in `truth` `(H, W)`, in [0, 1]; 255 is left out of it and is background elsewhere."""
    metric = MeanIoU(num_labels, UNCERTAIN)
    metric.update(np.where(label_map == UNCERTAIN, 0, label_map), truth)
    return metric.compute()["mean_iou_present"]


def draw(record: dict[str, Any], seen: dict[str, Any], names: list[str], panel_size: int) -> Image.Image:
    """
    The figure of one image.

    Args:
        record (`dict`):
            `image`, `image_id` and `mask` (or None).
        seen (`dict`):
            Of [`inspect_image`].
        names (`list[str]`):
            Class names, background first.
        panel_size (`int`):
            Width and height of a panel in pixels.

    Returns:
        `PIL.Image.Image`: rows of CAMs, of votes and of labels, and a legend of the classes.
    """
    image = open_image(record["image"])
    truth = None if record["mask"] is None else np.asarray(record["mask"]).astype(np.int64)
    blank = Image.new("RGB", image.size, "white")

    def labelled(title: str, label_map: np.ndarray) -> tuple[str, Image.Image]:
        score = "" if truth is None else f" {100 * image_iou(label_map, truth, len(names)):.0f}"
        return title + score, colorize(label_map)

    maps = seen["label_maps"]
    wrong = blank
    if truth is not None:
        # wrong pixels light, all others dark
        missed = (maps["segmentation"] != truth) & (truth != UNCERTAIN)
        wrong = heat_map(missed.astype(np.float32), image, alpha=0.6)
    present = [name for name, label in zip(names[1:], seen["labels"], strict=True) if label > 0]
    rows = [
        [
            (", ".join(present), image),
            *(
                (f"{LETTERS[branch]}-CAM, {layer} layer", heat_map(cam, image))
                for (branch, layer), cam in seen["cams"].items()
            ),
            ("share of equal votes", heat_map(seen["confidence"])),
            ("errors of the segmentation" if truth is not None else "", wrong),
        ],
        [
            ("ground truth", colorize(truth)) if truth is not None else ("no ground truth", blank),
            *(
                labelled(f"vote of {LETTERS[branch]}, {layer}", vote)
                for (branch, layer), vote in seen["votes"].items()
            ),
            labelled("confident label", seen["agreed"]),
        ],
        [labelled(name, maps[name]) for name in ("segmentation", *(name for name in maps if name != "segmentation"))],
    ]
    shown = np.unique(
        np.concatenate([np.unique(label_map) for label_map in (*maps.values(), *seen["votes"].values())])
    )
    legend = {int(index): "uncertain" if index == UNCERTAIN else names[index] for index in shown}
    return with_legend(figure_panels(rows, panel_size=(panel_size, panel_size)), legend)


def make_figures(args: argparse.Namespace) -> None:
    """Loads run and images, and writes one figure per image."""
    if args.panel_size < 32:
        raise InvalidArguments(f"--panel_size is {args.panel_size}; give at least 32 pixels.")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, processor = load_model_folder(args.run)
    model = model.to(device)
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    records = read_records(args, names)
    output = args.output or args.run / "figures"
    files = safe_file_names([record["image_id"] for record in records], ".png")
    for record, file in zip(records, files, strict=True):
        seen = inspect_image(model, processor, record["image"], record["labels"])
        path = output / file
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(record, seen, names, args.panel_size).save(path)
        print(path, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(make_figures, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
