"""
Score a trained model on a split with masks.

Without data options, the data is that of the training. Several devices: `accelerate launch -m synernet_hf evaluate MODEL`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synernet_hf.cli import CommandParser, add_json_option
from synernet_hf.files import write_json
from synernet_hf.training import DataArguments, data_parser, read_data_arguments


if TYPE_CHECKING:
    import datasets
    from accelerate import Accelerator


def make_parser() -> CommandParser:
    """Data options that are not on the command line are None."""
    parser = data_parser(prog="synernet evaluate", description=__doc__)
    parser.add_argument("run", metavar="MODEL", help="folder or Hub id of a trained model, such as runs/voc_animals")
    data = parser.add_argument_group("what to score on (default: the data of the training, MODEL/training_args.json)")
    data.add_argument("--classes", nargs="+", help="classes that the means are taken over")
    data.add_argument(
        "--no_check_data", dest="check_data", action="store_false", default=None, help="decode no image beforehand"
    )
    data.add_argument(
        "--masks", type=Path, help="score on these corrected pseudo-labels, which `pseudo-labels --from` made"
    )
    data.add_argument("--max_samples", type=int, help="score the first so many images only")
    data.add_argument("--num_workers", type=int, help="processes that decode images, and as many for the CRF")
    kinds = parser.add_argument_group("what to score")
    kinds.add_argument("--multi_scale", action="store_true", default=True, help="multi-scale segmentation (default)")
    kinds.add_argument("--no_multi_scale", dest="multi_scale", action="store_false", help="plain segmentation only")
    kinds.add_argument("--flip", action="store_true", help="also multi-scale segmentation with mirror")
    kinds.add_argument("--no_cams", dest="cams", action="store_false", help="leave the class activation maps out")
    kinds.add_argument(
        "--parts", action="store_true", help="also each branch alone, the segmentation given labels, the class scores"
    )
    kinds.add_argument(
        "--baselines", action="store_true", help="also a plain single-scale CAM and nothing but background"
    )
    kinds.add_argument("--crf", action="store_true", help="also DenseCRF on the last segmentation (extra `crf`)")
    parser.add_argument("--output", type=Path, help="write the scores to this JSON file")
    parser.add_argument(
        "--figures",
        type=Path,
        help="folder of charts: scores.png by class, confusion.png with --parts, curves.png where MODEL/logs has curves",
    )
    add_json_option(parser, "the scores as in the file")
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and find its mistakes before anything is loaded."""
    args = make_parser().parse_args(argv)
    if args.max_samples is not None and args.max_samples < 1:
        raise ValueError(f"--max_samples is {args.max_samples}; a positive number of images is expected.")
    if args.num_workers is not None and args.num_workers < 0:
        raise ValueError(f"--num_workers is {args.num_workers}; 0 (none) or more processes are expected.")
    if args.output is not None and args.output.is_dir():
        raise ValueError(f"--output {args.output} is a folder; give the name of a JSON file.")
    if args.figures is not None and args.figures.exists() and not args.figures.is_dir():
        raise ValueError(f"--figures {args.figures} is a file; give the name of a folder.")
    # what cannot be written is found before the scoring
    for folder in (args.output and args.output.parent, args.figures):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    return args


def load_split(
    data_args: DataArguments,
    id2label: dict[int, str],
    accelerator: "Accelerator",
    max_samples: int | None = None,
    masks: Path | None = None,
) -> tuple["datasets.DatasetDict", list[str], list[str]]:
    """
    Load the split to evaluate on, alone in a dictionary; also return its class names, background first, and what was
    left out. The main process alone checks the images.

    Images of one's own that come without a class list get that of the model, `id2label`, so that their labels are
    read by name. Lists, labels and images of the training split may be missing. With `masks`, those of a folder of
    corrected pseudo-labels, the images are those that it has, of either split.
    """
    from datasets import DatasetDict

    from synernet_hf.data import class_names
    from synernet_hf.training import check_on_main_process, load_data

    skipped: dict[str, list[str]] = {}
    splits = load_data(
        data_args, skipped, id2label, splits=("validation",) if masks is None else ("train", "validation")
    )
    if masks is not None:
        from synernet_hf.review import with_corrected_masks

        splits["validation"] = with_corrected_masks(splits, masks)
    if "validation" not in splits:
        raise ValueError(f"The data has no split to evaluate on, only {', '.join(splits)}; see docs/data.md.")
    split = splits["validation"]
    if max_samples is not None:
        split = split.select(range(min(max_samples, len(split))))
    checked = check_on_main_process(DatasetDict(validation=split), data_args, accelerator, skipped)
    return checked, class_names(splits), skipped.get("validation", [])


def draw_figures(output: Path, folder: Path, results: dict[str, dict], metric_classes: Sequence[str]) -> None:
    """Draw scores by class, what classes are taken for, and the scores that a training logged."""
    from synernet_hf.visualization import confusion_chart, curves, score_bars

    kinds = [kind for kind in ("segmentation", "segmentation_multi_scale", "fused_cam") if kind in results]
    by_class = {kind: {name: results[kind]["per_class_iou"].get(name) for name in metric_classes} for kind in kinds}
    score_bars(by_class).save(output / "scores.png")
    confusion = results["segmentation"].get("confusion", {})
    shown = {name: confusion[name] for name in metric_classes if name in confusion}
    if shown:
        confusion_chart(shown, metric_classes).save(output / "confusion.png")
    series: dict[str, list[tuple[float, float]]] = {}
    for log in sorted((folder / "logs").glob("*/events.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(log)).Reload()
        for tag in (tag for tag in events.Tags()["scalars"] if tag.startswith("eval/") and tag.endswith("/mean_iou")):
            points = [(event.step, 100 * event.value) for event in events.Scalars(tag)]
            series.setdefault(tag.split("/")[1], []).extend(points)
    if series:
        curves({kind: sorted(points) for kind, points in series.items()}, ylabel="mIoU, percent").save(
            output / "curves.png"
        )


def run(args: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """Load the run and its data, score, print and write."""
    from accelerate import Accelerator

    from synernet_hf.crf import DenseCRF
    from synernet_hf.model_folder import check_model_folder, find_model_folder, load_model_folder
    from synernet_hf.training import evaluate_model, results_table

    folder = find_model_folder(args.run)
    data_args = read_data_arguments(args, args.run)
    metric_classes = args.classes or data_args.metric_classes
    try:
        id2label = check_model_folder(folder).id2label
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} Please give the folder of a finished run.") from error
    crf = DenseCRF() if args.crf else None
    accelerator = Accelerator()
    splits, names, skipped = load_split(data_args, id2label, accelerator, args.max_samples, args.masks)
    model, processor = load_model_folder(folder)
    results = evaluate_model(
        model.to(accelerator.device),
        processor,
        splits["validation"],
        class_names=names,
        metric_classes=metric_classes,
        accelerator=accelerator,
        multi_scale=args.multi_scale,
        flip=args.flip,
        cams=args.cams,
        parts=args.parts,
        baselines=args.baselines,
        crf=crf,
        progress=True,
        num_workers=data_args.num_workers,
    )
    if accelerator.is_main_process:
        # the model may know classes that the data set does not have
        metric_classes = metric_classes or list(model.config.id2label.values())
        print(results_table(results, metric_classes))
        scores = {
            "run": args.run,
            "dataset": data_args.dataset,
            "validation_split": data_args.validation_split,
            "masks": args.masks and str(args.masks),
            "metric_classes": list(metric_classes),
            "skipped": skipped,
            "results": results,
        }
        answer(scores)
        if args.output is not None:
            write_json(args.output, scores)
            print(f"scores written to {args.output}")
        if args.figures is not None:
            draw_figures(args.figures, folder, results, metric_classes)
            print(f"charts written to {args.figures}")
    accelerator.end_training()


__all__ = ["make_parser", "read", "run"]
