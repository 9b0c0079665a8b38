"""
Go the whole way on generated images, without download: train, evaluate, predict, draw.

Options that are not listed are those of `synernet train`, such as --max_steps 100 for a short demo.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from synernet_hf.cli import CommandParser, InvalidArguments
from synernet_hf.training import DataArguments, parse_arguments


if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


# What a training run leaves in its folder; only a folder that holds one of these is ever removed.
RUN_MARKS = ("training_args.json", "checkpoint-*", "logs")
KINDS = {
    "segmentation": "segmentation, one scale",
    "segmentation_multi_scale": "segmentation, several scales",
    "broad_cam": "B-CAM (broad branch)",
    "precise_cam": "P-CAM (precise branch)",
    "fused_cam": "fused CAM",
    "single_scale_cam": "baseline: single-scale CAM, true image labels",
    "single_scale_cam_predicted": "baseline: single-scale CAM, predicted labels",
    "background_only": "baseline: background only",
}


def make_parser() -> CommandParser:
    """What it does not know is for the training."""
    parser = CommandParser(prog="synernet demo", description=__doc__)
    parser.add_argument("--config", metavar="RECIPE", default="tiny_cpu", help="recipe of the run")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("runs/demo"), help="folder of the run; an earlier run in it is removed"
    )
    parser.add_argument("--num_images", type=int, default=6, help="rows of the figure")
    return parser


def read(argv: list[str]) -> tuple[argparse.Namespace, list[str], DataArguments]:
    """Read the demo's options, the words that are for the training, and the data that these name."""
    options, extra = make_parser().parse_known_args(argv)
    if options.num_images < 1:
        raise InvalidArguments(f"--num_images is {options.num_images}; give at least 1.")
    words = ["--config", options.config, "--output_dir", str(options.output_dir), *extra]
    return options, extra, parse_arguments(words, further_options=["--num_images"])[1]


def say(act: str) -> None:
    """Announce what happens next."""
    print(f"\n== {act}", flush=True)


def clear(folder: Path) -> None:
    """Remove the run that an earlier demo left in the folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or not any(any(folder.glob(mark)) for mark in RUN_MARKS):
        raise InvalidArguments(f"{folder} is there but holds no earlier run; give another folder as --output_dir.")
    print(f"Removing the earlier run in {folder}.")
    shutil.rmtree(folder)


def train(config: str, output_dir: Path, extra: list[str]) -> int:
    """Train in a process of its own, which ends when this one is interrupted; return its exit status."""
    words = ["train", "--config", config, "--output_dir", str(output_dir), *extra]
    print(f"synernet {shlex.join(words)}", flush=True)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    command = [sys.executable, "-m", "synernet_hf", *words]
    training = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    try:
        return training.wait()
    except KeyboardInterrupt:
        # Ctrl-C in a terminal reaches the training too, SIGTERM to this process does not
        training.terminate()
        training.wait()
        raise


def print_scores(results: dict[str, dict]) -> None:
    """One line per kind of prediction: mIoU, recall and precision over all classes, in percent."""
    print(f"{'':<46}  mIoU  recall  precision")
    for kind, title in KINDS.items():
        scores = results[kind]
        print(
            f"{title:<46}  {100 * scores['mean_iou']:4.1f}  {100 * scores['recall']:6.1f}"
            f"  {100 * scores['precision']:9.1f}"
        )


def predict_one(model, processor, record: dict, folder: Path) -> None:
    """Save one image, segment it with the pipeline, and save its mask and overlay beside it."""
    import numpy as np

    from synernet_hf import SynerNetSegmentationPipeline
    from synernet_hf.model import open_image
    from synernet_hf.visualization import overlay, palette_image

    image = open_image(record["image"])
    image.save(folder / "image.png")
    segmenter = SynerNetSegmentationPipeline(model=model, image_processor=processor)
    label_map = np.zeros((image.height, image.width), dtype=np.uint8)
    for segment in segmenter(str(folder / "image.png"), scales=model.config.inference_scales):
        where = np.asarray(segment["mask"]) > 0
        label_map[where] = model.config.label2id[segment["label"]]
        print(f"{segment['label']:<12} {100 * where.mean():5.1f} % of the image, score {segment['score']:.2f}")
    palette_image(label_map).save(folder / "image_mask.png")
    overlay(image, label_map, class_names=model.config.id2label).save(folder / "image_overlay.png")
    print(f"Wrote {folder / 'image_mask.png'} and {folder / 'image_overlay.png'}.")


def panels_of(model, processor, record: dict) -> list[tuple[str, "Image.Image"]]:
    """A row of the figure: the image, the truth, and everything the model makes of the image."""
    import numpy as np
    import torch

    from synernet_hf.data import multi_hot
    from synernet_hf.model import prepare_image, resize_maps, segment_images
    from synernet_hf.visualization import colorize, heat_map

    prepared = prepare_image(processor, record["image"])
    image = prepared.image
    pixel_values = prepared.pixel_values[None].to(model.device, model.dtype)
    labels = multi_hot(record["labels"], model.config.num_labels - 1)[None].to(model.device)
    # With image labels the model returns what it teaches itself with: CAMs, confidence and the refined fused label.
    with torch.no_grad():
        teaching = model(pixel_values, labels=labels, loss_weights={"segmentation": 1.0}, training_progress=1.0)
    [segmented] = segment_images(model, processor, [prepared], scales=None)

    def heat(maps: torch.Tensor) -> "Image.Image":
        strongest = resize_maps(maps[0].amax(dim=0, keepdim=True), (image.height, image.width))
        return heat_map(strongest[0].cpu().numpy(), image)

    return [
        ("image", image),
        ("ground truth", colorize(np.asarray(record["mask"]))),
        ("CAM, broad branch", heat(teaching.broad_cams)),
        ("CAM, precise branch", heat(teaching.precise_cams)),
        ("confidence", heat_map(teaching.confidence[0, 0].cpu().numpy())),
        ("fused pseudo-label", colorize(teaching.pseudo_labels[0].cpu().numpy())),
        ("segmentation", colorize(segmented.label_map.cpu().numpy())),
    ]


def legend(names: list[str], width: int) -> list[tuple[str, "np.ndarray"]]:
    """What the colours of the figure mean: classes, undecided pixels, and the two ends of the heat map."""
    import numpy as np

    from synernet_hf.visualization import colorize, heat_map

    size = (14, width)
    swatches = [(name, colorize(np.full(size, index))) for index, name in enumerate(names)]
    swatches.append(("undecided", colorize(np.full(size, 255))))
    return swatches + [("low", heat_map(np.zeros(size))), ("high", heat_map(np.ones(size)))]


def pick_records(split, number: int) -> list[dict]:
    """The first images with the most classes, which show most."""
    counts = [len(labels) for labels in split["labels"]]
    return [split[index] for index in sorted(range(len(counts)), key=lambda index: -counts[index])[:number]]


def run(given: tuple[argparse.Namespace, list[str], DataArguments]) -> int:
    """Run all steps of the demo; return its exit code."""
    options, extra, data_args = given
    start = time.monotonic()
    folder = options.output_dir
    clear(folder)

    say("1/4 Training on generated images with image labels only")
    status = train(options.config, folder, extra)
    if status < 0:
        raise ValueError(f"The training was ended by signal {-status}; its last message is above.")
    if status:
        # the training has said why
        return status

    import torch

    from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
    from synernet_hf.data import class_names, load_wsss_dataset
    from synernet_hf.training import evaluate_model
    from synernet_hf.visualization import figure_panels

    say("2/4 Evaluating the segmentation, each branch's CAM and baselines on images with known masks")
    splits = load_wsss_dataset(
        data_args.dataset,
        data_args.data_dir,
        data_args.image_labels,
        data_args.train_split,
        data_args.validation_split,
        data_args.dataset_options,
    )
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder).to(device)
    processor = SynerNetImageProcessor.from_pretrained(folder)
    results = evaluate_model(
        model,
        processor,
        splits["validation"],
        class_names=class_names(splits),
        metric_classes=data_args.metric_classes,
        multi_scale=True,
        baselines=True,
    )

    say("3/4 Predicting one image")
    records = pick_records(splits["validation"], options.num_images)
    predict_one(model, processor, records[0], folder)

    say("4/4 Drawing the figure")
    figure = folder / "figure.png"
    rows = [panels_of(model, processor, record) for record in records]
    colours, width = legend(class_names(splits), 144), len(rows[0])
    rows += [colours[start : start + width] for start in range(0, len(colours), width)]
    figure_panels(rows, panel_size=(144, 144)).save(figure)

    number = results["segmentation"]["num_images"]
    say(f"Results on {number} images, in percent, after {(time.monotonic() - start) / 60:.1f} minutes")
    print_scores(results)
    print(f"\nSaved model: {folder}\nFigure:      {figure}")
    return 0


__all__ = ["make_parser", "read", "run"]
