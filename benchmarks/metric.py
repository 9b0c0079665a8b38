"""
Seconds of mean IoU on label maps of VOC's size: ours against `evaluate`, `torchmetrics` and plain numpy, equal values.

    python benchmarks/metric.py --output runs/metric.json

`evaluate` fetches its `mean_iou` from the Hub; the module here is written from the documented behaviour of that one
(areas by `np.histogram`, image by image) and goes through the same `evaluate.Metric`, which keeps label maps in an
Arrow table and hands them over as lists. `torchmetrics` is left out where it is not installed.
"""

import argparse
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, positive


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--num_images", type=positive, default=100, help="images (default: 100)")
    parser.add_argument("--size", type=int, nargs=2, default=(375, 500), help="height and width (default: 375 500)")
    parser.add_argument("--num_labels", type=int, default=21, help="classes with background (default: 21)")
    parser.add_argument("--rounds", type=positive, default=3, help="timed calls of each (default: 3)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import datasets
import evaluate
import numpy as np
import torch
from side_by_side import median_ratio, save_record, time_in_turns

from synernet_hf.metrics import MeanIoU


IGNORE = 255
OURS = Path(inspect.getfile(MeanIoU)).parent / "mean_iou"


def make_label_maps(num_images: int, size: tuple[int, int], num_labels: int) -> tuple[list, list]:
    """Predictions int64, as a model makes them, and masks uint8 of shape `size`, in regions of a class, 5 % ignored."""
    generator = np.random.default_rng(0)
    predictions, references = [], []
    for _ in range(num_images):
        coarse = generator.integers(0, num_labels, (8, 8), dtype=np.int64)
        truth = np.kron(coarse, np.ones((-(-size[0] // 8), -(-size[1] // 8)), dtype=np.int64))[: size[0], : size[1]]
        wrong = generator.random(size) < 0.3
        predictions.append(np.where(wrong, generator.integers(0, num_labels, size), truth))
        references.append(np.where(generator.random(size) < 0.05, IGNORE, truth).astype(np.uint8))
    return predictions, references


def histogram_ious(predictions: list, references: list, num_labels: int) -> np.ndarray:
    """IoU of every class, from the areas of each image."""
    totals = np.zeros((3, num_labels))
    bins = np.arange(num_labels + 1)
    for prediction, reference in zip(map(np.array, predictions), map(np.array, references), strict=True):
        scored = reference != IGNORE
        prediction, reference = prediction[scored], reference[scored]
        for index, ids in enumerate((prediction[prediction == reference], prediction, reference)):
            totals[index] += np.histogram(ids, bins)[0]
    hits, predicted, given = totals
    return hits / (predicted + given - hits)


class HubMeanIoU(evaluate.Metric):
    """`evaluate`'s `mean_iou` by its documented behaviour."""

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        features = datasets.Features({"predictions": label_map, "references": label_map})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references, num_labels: int) -> dict:
        return {"per_class_iou": histogram_ious(predictions, references, num_labels)}


def numpy_ious(predictions: list, references: list, num_labels: int, count: Callable) -> np.ndarray:
    """IoU of every class from a confusion matrix that `count(references, predictions, num_labels)` makes per image."""
    confusion = np.zeros((num_labels, num_labels))
    for prediction, reference in zip(predictions, references, strict=True):
        scored = reference != IGNORE
        confusion += count(reference[scored], prediction[scored], num_labels)
    hits = np.diag(confusion)
    return hits / (confusion.sum(axis=0) + confusion.sum(axis=1) - hits)


def by_bincount(rows: np.ndarray, columns: np.ndarray, num_labels: int) -> np.ndarray:
    """The line that most training scripts have."""
    counts = np.bincount(num_labels * rows.astype(np.int64) + columns, minlength=num_labels**2)
    return counts.reshape(num_labels, num_labels)


def by_histogram(rows: np.ndarray, columns: np.ndarray, num_labels: int) -> np.ndarray:
    """The confusion matrix as a histogram in two dimensions."""
    return np.histogram2d(rows, columns, bins=num_labels, range=[[0, num_labels]] * 2)[0]


def torchmetrics_ious(index, predictions: list, references: list) -> np.ndarray:
    """IoU of every class from `torchmetrics`."""
    index.reset()
    for prediction, reference in zip(predictions, references, strict=True):
        index.update(torch.from_numpy(prediction), torch.from_numpy(reference).long())
    return index.compute().numpy()


def our_ious(predictions: list, references: list, num_labels: int) -> np.ndarray:
    """IoU of every class from [`MeanIoU`]."""
    metric = MeanIoU(num_labels)
    for prediction, reference in zip(predictions, references, strict=True):
        metric.update(prediction, reference)
    return np.array(metric.compute()["per_class_iou"])


def variants_of(predictions: list, references: list, num_labels: int) -> dict[str, Callable[[], np.ndarray]]:
    """Each a function that returns the IoU of every class, by name."""
    hub, ours = HubMeanIoU(), evaluate.load(str(OURS))

    def through(module):
        scores = module.compute(predictions=predictions, references=references, num_labels=num_labels)
        return np.array(scores["per_class_iou"])

    variants = {
        "evaluate": lambda: through(hub),
        "evaluate's arithmetic alone": lambda: histogram_ious(predictions, references, num_labels),
        "ours through evaluate": lambda: through(ours),
        "np.histogram2d": lambda: numpy_ious(predictions, references, num_labels, by_histogram),
        "np.bincount": lambda: numpy_ious(predictions, references, num_labels, by_bincount),
    }
    try:
        from torchmetrics.classification import MulticlassJaccardIndex
    except ImportError:
        print("torchmetrics is not installed and left out: `pip install torchmetrics` brings its row.")
    else:
        index = MulticlassJaccardIndex(num_labels, average=None, ignore_index=IGNORE)
        variants["torchmetrics"] = lambda: torchmetrics_ious(index, predictions, references)
    return variants | {"ours": lambda: our_ious(predictions, references, num_labels)}


def measure(num_images: int, size: tuple[int, int], num_labels: int, rounds: int) -> dict:
    """Seconds of each for all images, how many times as fast as `evaluate`, and the largest difference of an IoU."""
    variants = variants_of(*make_label_maps(num_images, size, num_labels), num_labels)
    expected = variants["evaluate"]()
    differences = {name: float(np.abs(run() - expected).max()) for name, run in variants.items()}
    times = time_in_turns(variants, rounds)
    for name, entry in times.items():
        entry |= {"times_as_fast": median_ratio(times["evaluate"], entry), "difference": differences[name]}
    return {"num_images": num_images, "size": list(size), "num_labels": num_labels, "variants": times}


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = parse_arguments(argv)
    figures = measure(args.num_images, tuple(args.size), args.num_labels, args.rounds)
    print(f"| mean IoU of {args.num_images} images | ms an image | times as fast | largest difference |")
    print("| --- | ---: | ---: | ---: |")
    for name, entry in figures["variants"].items():
        milliseconds = 1000 * entry["seconds"] / args.num_images
        print(f"| {name} | {milliseconds:.2f} | {entry['times_as_fast']:.1f} | {entry['difference']:.0e} |")
    save_record(args.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
