"""Score a trained SynerNet on a split with masks: `python examples/evaluate.py RUN` (or `accelerate launch` it)."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.crf import DenseCRF
from synernet_hf.data import class_names, load_wsss_dataset
from synernet_hf.training.evaluation import evaluate_model, results_table


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained model, such as runs/voc_animals")
    data = parser.add_argument_group("data (default: as in training, from RUN/training_args.json)")
    data.add_argument("--dataset", help="voc2012 or shapes")
    data.add_argument("--data_dir", help="folder of the data set")
    data.add_argument(
        "--image_labels", help="source of the image labels: a npz, json or csv file, annotations or masks"
    )
    data.add_argument("--validation_split", help="list of pictures to evaluate on, such as val")
    data.add_argument("--classes", nargs="+", help="classes that the means are taken over")
    data.add_argument("--max_samples", type=int, help="score the first so many pictures only")
    kinds = parser.add_argument_group("what to score")
    kinds.add_argument("--multi_scale", action="store_true", default=True, help="multi-scale segmentation (default)")
    kinds.add_argument("--no_multi_scale", dest="multi_scale", action="store_false", help="plain segmentation only")
    kinds.add_argument("--flip", action="store_true", help="also multi-scale segmentation with mirror")
    kinds.add_argument("--no_cams", dest="cams", action="store_false", help="leave the class activation maps out")
    kinds.add_argument(
        "--baselines", action="store_true", help="also a plain single-scale CAM and nothing but background"
    )
    kinds.add_argument("--crf", action="store_true", help="also DenseCRF on the last segmentation (extra `crf`)")
    parser.add_argument("--output", type=Path, help="write the scores to this JSON file")
    return parser.parse_args(argv)


def data_settings(args: argparse.Namespace) -> dict[str, Any]:
    """
    Settings of the data set: those of the run, overridden by the command line.

    A data set named on the command line that is not the run's starts from nothing, for the run's folder, labels and
    classes belong to another one.
    """
    path = args.run / "training_args.json"
    settings = json.loads(path.read_text(encoding="utf-8"))["data_args"] if path.is_file() else {}
    if args.dataset is not None and args.dataset != settings.get("dataset"):
        settings = {}
    overrides = {
        "dataset": args.dataset,
        "data_dir": args.data_dir,
        "image_labels": args.image_labels,
        "validation_split": args.validation_split,
        "metric_classes": args.classes,
    }
    settings |= {name: value for name, value in overrides.items() if value is not None}
    if settings.get("dataset") is None:
        raise ValueError(f"{args.run} does not say which data set to evaluate on; name one with --dataset.")
    return settings


def load_split(settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """Load the split to evaluate on and the class names, background first."""
    names = ("data_dir", "image_labels", "train_split", "validation_split", "dataset_options")
    splits = load_wsss_dataset(settings["dataset"], **{name: settings.get(name) for name in names})
    return splits["validation"], class_names(splits)


def write_scores(scores: dict[str, Any], path: Path) -> None:
    """Write JSON under a temporary name and rename it; a score that is not defined becomes null."""

    def defined(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: defined(item) for key, item in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(defined(scores), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def evaluate(args: argparse.Namespace) -> None:
    """Load the run and its data, score, print and write."""
    if not (args.run / "config.json").is_file():
        raise ValueError(f"{args.run} holds no trained model (no config.json); give the folder of a finished run.")
    settings = data_settings(args)
    crf = DenseCRF() if args.crf else None
    split, names = load_split(settings)
    accelerator = Accelerator()
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(args.run).to(accelerator.device)
    processor = SynerNetImageProcessor.from_pretrained(args.run)
    results = evaluate_model(
        model,
        processor,
        split,
        class_names=names,
        metric_classes=settings.get("metric_classes"),
        max_samples=args.max_samples,
        accelerator=accelerator,
        multi_scale=args.multi_scale,
        flip=args.flip,
        cams=args.cams,
        baselines=args.baselines,
        crf=crf,
        progress=True,
    )
    if accelerator.is_main_process:
        metric_classes = settings.get("metric_classes") or names
        print(results_table(results, metric_classes))
        if args.output is not None:
            scores = {
                "run": str(args.run),
                "dataset": settings["dataset"],
                "validation_split": settings.get("validation_split"),
                "metric_classes": list(metric_classes),
                "results": results,
            }
            write_scores(scores, args.output)
            print(f"scores written to {args.output}")
    accelerator.end_training()


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    args = parse_arguments(argv)
    try:
        evaluate(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
