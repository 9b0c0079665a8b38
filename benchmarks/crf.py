"""
DenseCRF on an image's likely classes and in worker processes, against the plain call on all classes.

    python benchmarks/crf.py runs/voc_animals --data_dir path/to/VOCdevkit --image_labels labels.npz

The model's multi-scale segmentation of validation images is refined in turns, four images at a time. Processes
take whole images, their transport included. The CRF has ten iterations unless a row says five. A row gives its time per image, how many times as fast as the plain call
it is (median of the groups), mean IoU, and the share of pixels with the plain call's class. Needs the extra `crf`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from synernet_hf.cli import answer_early, needs_extra, run_command


with needs_extra("train"):
    from synernet_hf.training import data_parser, read_data_arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; data options that are not on it are None."""
    parser = data_parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained model")
    parser.add_argument("--max_samples", type=int, default=96, help="the first so many images (default: 96)")
    parser.add_argument("--processes", type=int, default=2, help="processes of the last rows (default: 2)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
from side_by_side import median_ratio, save_record
from tqdm.auto import tqdm

from synernet_hf.crf import DenseCRF, crf_workers
from synernet_hf.metrics import MeanIoU
from synernet_hf.model import segment_images
from synernet_hf.model_folder import load_model_folder


with needs_extra("train"):
    from synernet_hf.training import load_data


GROUP = 4


def refine(crf: Callable, groups: list[tuple[np.ndarray, np.ndarray]], pool=None) -> list[np.ndarray]:
    """Refined probabilities of images and their probabilities, here or in a pool of processes."""
    if pool is None:
        return [crf(*pair) for pair in groups]
    return [future.result() for future in [pool.submit(crf, *pair) for pair in groups]]


def measure(model, processor, split, processes: int) -> dict:
    """Times, ratios and scores of each way, and the mean number of classes that are likely."""
    ways = {
        "plain": DenseCRF(min_probability=0.0),
        "likely classes": DenseCRF(),
        "likely classes and 5 iterations": DenseCRF(num_iterations=5),
    }
    names = [*ways, *(f"{name}, {processes} processes" for name in ways)]
    metrics = {name: MeanIoU(model.config.num_labels) for name in ("before", *names)}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    equal, kept, pixels = dict.fromkeys(names, 0), 0, 0
    with ExitStack() as stack:
        pools = dict.fromkeys(ways)
        for name, crf in ways.items():
            pools[f"{name}, {processes} processes"] = pool = stack.enter_context(crf_workers(crf, processes))
            # processes take their time to start
            refine(crf, [(np.zeros((8, 8, 3), np.uint8), np.full((2, 8, 8), 0.5, np.float32))] * 2 * processes, pool)
        for start in tqdm(range(0, len(split), GROUP), desc="groups"):
            records = [split[index] for index in range(start, min(start + GROUP, len(split)))]
            images = [np.asarray(record["image"].convert("RGB")) for record in records]
            segmented = segment_images(model, processor, [record["image"] for record in records], scales=None)
            given = [item.scores(model.config.num_labels).numpy() for item in segmented]
            masks = [np.asarray(record["mask"]) for record in records]
            for maps, mask in zip(given, masks, strict=True):
                metrics["before"].update(maps.argmax(axis=0), mask)
            plain = None
            for name in names:
                started = time.perf_counter()
                refined = refine(ways[name.split(", ")[0]], list(zip(images, given, strict=True)), pools[name])
                seconds[name].append(time.perf_counter() - started)
                label_maps = [maps.argmax(axis=0) for maps in refined]
                plain = label_maps if plain is None else plain
                for label_map, expected, mask in zip(label_maps, plain, masks, strict=True):
                    metrics[name].update(label_map, mask)
                    equal[name] += int((label_map == expected).sum())
                if name == "likely classes":
                    kept += sum(int(maps.any(axis=(1, 2)).sum()) for maps in refined)
            pixels += sum(mask.size for mask in masks)
    variants = {
        name: {
            "seconds": sum(seconds[name]) / len(split),
            "times_as_fast": median_ratio({"all_seconds": seconds["plain"]}, {"all_seconds": seconds[name]}),
            "all_seconds": seconds[name],
            "equal_pixels": equal[name] / pixels,
        }
        for name in names
    }
    return {
        "num_images": len(split),
        "pixels": pixels,
        "num_labels": model.config.num_labels,
        "mean_likely_classes": kept / len(split),
        "min_probability": ways["likely classes"].min_probability,
        "variants": variants,
        "metrics": metrics,
    }


def run(args: argparse.Namespace) -> None:
    """Loads run and images, measures and prints the table."""
    data_args = read_data_arguments(args, args.run)
    model, processor = load_model_folder(args.run)
    split = load_data(data_args, splits=("validation",))["validation"]
    split = split.select(range(min(args.max_samples, len(split))))
    figures = measure(model, processor, split, args.processes)
    class_ids = [model.config.label2id[name] for name in data_args.metric_classes or model.config.label2id]
    scores = {name: 100 * metric.compute(class_ids)["mean_iou"] for name, metric in figures.pop("metrics").items()}
    figures["mean_iou"] = scores
    print(f"| CRF on {len(split)} images | s an image | times as fast | mean IoU | equal pixels |")
    print("| --- | ---: | ---: | ---: | ---: |")
    print(f"| none | - | - | {scores['before']:.2f} | - |")
    for name, entry in figures["variants"].items():
        cells = f"{entry['seconds']:.2f} | {entry['times_as_fast']:.2f} | {scores[name]:.2f}"
        print(f"| {name} | {cells} | {100 * entry['equal_pixels']:.4f} % |")
    print(f"Likely classes of an image: {figures['mean_likely_classes']:.2f} of {figures['num_labels']}.")
    save_record(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
