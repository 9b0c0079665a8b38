"""
How good the pseudo-labels of a trained SynerNet are, by thresholds and by reach of the refinement.

    python benchmarks/pseudo_label_quality.py runs/voc_animals --size 160 --max_samples 30

Pseudo-labels are made from image labels, as in training, and compared with the masks of the validation split. A table
goes to the screen: per row the shares of the foreground that is decided and that is labelled right, the share of
labelled foreground that is right, the share of the background that is decided, and the mean IoU over the decided
pixels. Use it to choose thresholds and dilations for image sizes other than that of the full recipe.
"""

import argparse
import copy
import itertools
import sys
from pathlib import Path

from synernet_hf.cli import answer_early, needs_extra, run_command


with needs_extra("train"):
    from synernet_hf.training import InvalidArguments, data_parser, read_data_arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; data options that are not on it are None."""
    parser = data_parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained model")
    parser.add_argument("--size", type=int, help="shortest edge of the images (default: the processor's)")
    parser.add_argument("--max_samples", type=int, default=30, help="the first so many images (default: 30)")
    parser.add_argument("--low", nargs="+", type=float, default=[0.25], help="low thresholds to try")
    parser.add_argument("--high", nargs="+", type=float, default=[0.7, 0.5], help="high thresholds to try")
    parser.add_argument(
        "--dilations",
        nargs="+",
        default=["1,2,4,8,12,24", "1,2,4,8", "1,2,4", "1"],
        help="lists of dilations to try, numbers separated by commas",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch

from synernet_hf.metrics import MeanIoU
from synernet_hf.model import (
    SynerNetPixelAdaptiveRefinement,
    denormalize,
    fuse_branches,
    mask_absent_classes,
    multi_scale_cams,
    refine_pseudo_labels,
)
from synernet_hf.model_folder import load_model_folder


with needs_extra("train"):
    from synernet_hf.data import multi_hot
    from synernet_hf.training import load_data


HEADER = ("low, high", "dilations", "fg decided", "fg right", "fg precision", "bg decided", "mIoU of decided")


def score(counts: np.ndarray) -> list[float]:
    """The figures of one row in percent, from counts `(K, K + 1)` of true against given labels, undecided last."""
    metric = MeanIoU(len(counts))
    metric.confusion = counts[:, :-1]
    foreground, labelled = counts[1:], counts[:, 1:-1]
    right = np.trace(counts[1:, 1:])
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = [
            foreground[:, :-1].sum() / foreground.sum(),
            right / foreground.sum(),
            right / labelled.sum(),
            counts[0, :-1].sum() / counts[0].sum(),
        ]
    return [100 * float(share) for share in (*shares, metric.compute()["mean_iou_present"])]


@torch.no_grad()
def measure(model, processor, split, settings: list[tuple], size: int | None) -> list[np.ndarray]:
    """
    Counts of true against pseudo-labels for each of `settings`.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): in evaluation mode.
        processor ([`SynerNetImageProcessor`]): its processor.
        split (`datasets.Dataset`): records with `labels` and `mask`.
        settings (`list[tuple]`): (low, high, dilations).
        size (`int`, *optional*): shortest edge in pixels; the processor's by default.

    Returns:
        `list[np.ndarray]`: per setting `(K, K + 1)` int64, undecided pixels in the last column.
    """
    config, num_labels = model.config, model.config.num_labels
    ignore_index = config.semantic_loss_ignore_index
    counts = [np.zeros((num_labels, num_labels + 1), dtype=np.int64) for _ in settings]
    resize = {} if size is None else {"size": {"shortest_edge": size}, "do_resize": True}
    for record in split:
        inputs = processor(images=record["image"], do_center_crop=False, do_pad=False, return_tensors="pt", **resize)
        pixel_values = inputs["pixel_values"].to(model.device)
        labels = multi_hot(record["labels"], num_labels - 1)[None].to(model.device)
        height, width = pixel_values.shape[-2:]
        truth = np.asarray(record["mask"].resize((width, height), 0)).astype(np.int64)
        scored = truth != ignore_index
        cams = multi_scale_cams(model, pixel_values, None, config.cam_scales, config.cam_flip)
        images = denormalize(pixel_values, config.image_mean, config.image_std)
        for count, (low, high, dilations) in zip(counts, settings, strict=True):
            # of the fields a copy: what the model reads is not set
            tried = copy.copy(config)
            tried.low_threshold, tried.high_threshold = low, high
            fused = mask_absent_classes(fuse_branches(tried, cams, labels)[0].precise, labels)
            refinement = SynerNetPixelAdaptiveRefinement(dilations, config.refinement_iterations)
            given = refine_pseudo_labels(images, fused, labels, low, high, None, ignore_index, refinement)[0]
            given = np.where((given := given.cpu().numpy()) == ignore_index, num_labels, given)
            places = truth[scored] * (num_labels + 1) + given[scored]
            count += np.bincount(places, minlength=count.size).reshape(count.shape)
    return counts


def run(args: argparse.Namespace) -> None:
    """Loads run and images, and prints the table."""
    try:
        dilations = [tuple(int(number) for number in words.split(",")) for words in args.dilations]
    except ValueError as error:
        raise InvalidArguments(f"--dilations takes lists such as 1,2,4, got {args.dilations}.") from error
    settings = [(low, high, reach) for low, high, reach in itertools.product(args.low, args.high, dilations)]
    for low, high, _ in settings:
        if not 0 <= low <= high <= 1:
            raise InvalidArguments(f"Thresholds must rise within [0, 1], got low {low} and high {high}.")
    model, processor = load_model_folder(args.run)
    split = load_data(read_data_arguments(args, args.run), splits=("validation",))["validation"]
    split = split.select(range(min(args.max_samples, len(split))))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = model.to(device)
    print("| " + " | ".join(HEADER) + " |\n" + "| --- | --- |" + " ---: |" * (len(HEADER) - 2))
    for (low, high, reach), count in zip(settings, measure(model, processor, split, settings, args.size), strict=True):
        figures = " | ".join(f"{value:.1f}" for value in score(count))
        print(f"| {low}, {high} | {', '.join(map(str, reach))} | {figures} |")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
