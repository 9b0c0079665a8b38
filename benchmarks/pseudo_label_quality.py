"""
How good the pseudo-labels of a trained SynerNet are, by every part of the method that acts on labels.

    python benchmarks/pseudo_label_quality.py runs/voc_animals --max_samples 100

    python benchmarks/pseudo_label_quality.py runs/voc_animals --variants thresholds --set fusion=fixed high_threshold=0.6

The weights are those of the run and the images the same for all, so a difference is that of the labels alone. Labels are
made from image labels, as in training, and compared with the masks of the validation split. A table goes to the screen:
for each variant and each taught branch the mean IoU over decided pixels, recall, precision and the share of decided
pixels, in percent, each with its difference from the model's own settings; that of the mean IoU with a 95 % interval
of a paired bootstrap over images. Labels that decide less are right more often, so read the mean IoU beside recall and
the decided share. `--set` names one variant more, by any fields of the configuration.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

from synernet_hf.cli import answer_early, needs_extra, positive, run_command
from synernet_hf.files import read_json


with needs_extra("train"):
    from synernet_hf.training import InvalidArguments, data_parser, read_data_arguments


# name of a group -> fields of its variants; those that a model has already are left out
VARIANTS = {
    "fusion": [{"fusion": "fixed"}, {"fusion": "confidence"}, {"cross_supervision": False}],
    "thresholds": [
        *({"low_threshold": value} for value in (0.15, 0.2, 0.25, 0.3, 0.35)),
        *({"high_threshold": value} for value in (0.3, 0.4, 0.5, 0.6, 0.7)),
    ],
    "refinement": [
        {"refinement_iterations": 0},
        *({"refinement_dilations": [1, 2, 4, 8, 12, 24][:number]} for number in (1, 2, 3, 4, 6)),
    ],
    "propagation": [
        {"broad_propagation_temperature": None},
        {"precise_propagation_temperature": None},
        *(
            {"broad_propagation_temperature": value, "precise_propagation_temperature": value}
            for value in (None, 0.1, 0.14, 0.2)
        ),
    ],
    "consensus": [{"precise_consensus": False}, {"precise_consensus": True}],
    "scales": [
        {"cam_scales": [1.0], "cam_flip": False},
        {"cam_scales": [1.0], "cam_flip": True},
        {"cam_scales": [1.0, 1.5], "cam_flip": False},
        {"cam_scales": [1.0, 0.5, 0.75, 1.5], "cam_flip": True},
    ],
}
OWN = "the model's own settings"
RESAMPLES = 1000
BRANCHES = ("broad", "precise")
# fields that CAMs do not depend on
AFTER_CAMS = (
    "fusion fusion_range confidence_threshold cross_supervision broad_share_in_broad_label broad_share_in_precise_label "
    "low_threshold high_threshold background_threshold refinement_dilations refinement_iterations"
).split()


def field_and_value(word: str) -> tuple[str, object]:
    """Reads `FIELD=VALUE`; a value that is not JSON is a text."""
    name, equals, value = word.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"takes FIELD=VALUE, got {word!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; data options that are not on it are None."""
    parser = data_parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained model")
    parser.add_argument("--size", type=positive, help="shortest edge of the images (default: the run's crop size)")
    parser.add_argument("--max_samples", type=positive, default=100, help="the first so many images (default: 100)")
    parser.add_argument(
        "--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="groups of variants (default: all)"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        action="append",
        type=field_and_value,
        default=[],
        metavar="FIELD=VALUE",
        help="one variant more; may be repeated",
    )
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch
from side_by_side import save_record

from synernet_hf import SynerNetConfig
from synernet_hf.model import (
    SynerNetPixelAdaptiveRefinement,
    denormalize,
    fuse_branches,
    multi_scale_cams,
    refine_pseudo_labels,
)
from synernet_hf.model_folder import load_model_folder


with needs_extra("train"):
    from synernet_hf.data import class_names
    from synernet_hf.training import load_data


def chosen_variants(config: SynerNetConfig, groups: list[str], more: list[list[tuple]]) -> dict[str, dict]:
    """
    The variants by name: the model's own settings first, without those that do not differ from them.

    Raises:
        InvalidArguments: if a field is unknown or has a value it cannot have.
    """
    variants = {OWN: {}}
    asked = [(fields, False) for group in groups for fields in VARIANTS[group]] + [(dict(own), True) for own in more]
    saved = config.to_dict()
    for fields, must in asked:
        name = ", ".join(f"{field} {json.dumps(value)}" for field, value in fields.items())
        unknown = sorted(set(fields) - set(SynerNetConfig.__annotations__))
        if unknown:
            raise InvalidArguments(f"SynerNetConfig has no field {', '.join(unknown)}.")
        if all(json.dumps(saved[field]) == json.dumps(value) for field, value in fields.items()):
            continue
        try:
            SynerNetConfig.from_dict(saved | fields)
        except Exception as error:
            if must:
                reason = error.__cause__ or error
                raise InvalidArguments(f"{name} does not go with the model's configuration: {reason}") from error
            # such as thresholds in the wrong order
            continue
        variants[name] = fields
    return variants


@contextmanager
def settings(config: SynerNetConfig, fields: dict) -> Iterator[None]:
    """Other fields in the configuration that the model reads."""
    before = {name: getattr(config, name) for name in fields}
    try:
        for name, value in fields.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@torch.no_grad()
def taught_labels(model, pixel_values: torch.Tensor, classes: list[int], variants: dict[str, dict]) -> torch.Tensor:
    """
    The labels that teach both branches. Each view is encoded once, and CAMs are made once for all variants of what
    comes after them.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): in evaluation mode.
        pixel_values (`torch.Tensor` of shape `(1, 3, H, W)`): one image.
        classes (`list[int]`): that it shows, from 0 without background.
        variants (`dict[str, dict]`): fields by name.

    Returns:
        `torch.Tensor` of shape `(V, 2, H, W)`: int64 labels.
    """
    config, made, seen, found = model.config, {}, {}, []
    images = denormalize(pixel_values, config.image_mean, config.image_std)
    ids = torch.tensor([classes or [0]], device=pixel_values.device)
    own = torch.full(ids.shape, float(bool(classes)), device=pixel_values.device)
    present = SimpleNamespace(ids=ids, mask=own.bool())
    names = torch.arange(256, device=pixel_values.device)
    names[1 : 1 + ids.shape[1]] = ids[0] + 1
    names[255] = config.semantic_loss_ignore_index
    for fields in variants.values():
        with settings(config, fields):
            key = json.dumps({name: value for name, value in fields.items() if name not in AFTER_CAMS})
            if key not in made:
                # of other layers the encoder keeps other features
                views = seen.setdefault(tuple(config.cam_layers), {})
                made[key] = multi_scale_cams(
                    model, pixel_values, present, config.cam_scales, config.cam_flip, seen=views
                )
            fused = torch.stack(list(fuse_branches(config, made[key], own)[0]))
            refinement = SynerNetPixelAdaptiveRefinement(config.refinement_dilations, config.refinement_iterations)
            planes = (config.low_threshold, config.high_threshold)
            labels = refine_pseudo_labels(images, fused, own, *planes, None, 255, refinement)[:, 0]
            found.append(names[labels])
    return torch.stack(found)


def measure(model, processor, split, variants: dict[str, dict], size: int | None) -> np.ndarray:
    """
    Counts of true against pseudo-labels.

    Args:
        model, processor: as loaded.
        split (`datasets.Dataset`): records with `labels` and `mask`.
        variants (`dict[str, dict]`): fields by name.
        size (`int`, *optional*): shortest edge in pixels; the processor's by default.

    Returns:
        `np.ndarray` of shape `(N, V, 2, K, K + 1)`: int64, by image, variant and taught branch; undecided pixels in the
        last column.
    """
    num_labels, ignore_index = model.config.num_labels, model.config.semantic_loss_ignore_index
    resize = {} if size is None else {"size": {"shortest_edge": size}, "do_resize": True}
    counts = np.zeros((len(split), len(variants), 2, num_labels, num_labels + 1), dtype=np.int64)
    for image, record in enumerate(split):
        inputs = processor(images=record["image"], do_center_crop=False, do_pad=False, return_tensors="pt", **resize)
        pixel_values = inputs["pixel_values"].to(model.device)
        height, width = pixel_values.shape[-2:]
        truth = np.asarray(record["mask"].resize((width, height), 0)).astype(np.int64)
        scored = truth != ignore_index
        labels = taught_labels(model, pixel_values, list(record["labels"]), variants).cpu().numpy()
        labels = np.where(labels == ignore_index, num_labels, labels)[..., scored]
        places = truth[scored] * (num_labels + 1) + labels
        for variant, branch in np.ndindex(places.shape[:2]):
            own = np.bincount(places[variant, branch], minlength=counts[0, 0, 0].size)
            counts[image, variant, branch] = own.reshape(num_labels, num_labels + 1)
    return counts


def scores_of(counts: np.ndarray, class_ids: list[int]) -> dict[str, np.ndarray]:
    """
    Scores of counts `(..., K, K + 1)`, `(...)` float64 in percent: mean IoU over decided pixels of the classes
    `class_ids`, mean recall and precision of those that are not background, where undecided pixels count as missed,
    and the share of decided pixels.
    """
    counts = counts.astype(np.float64)
    right = np.diagonal(counts, axis1=-2, axis2=-1)
    true, decided, given = counts.sum(axis=-1), counts[..., :-1].sum(axis=-1), counts[..., :-1].sum(axis=-2)
    foreground = [class_id for class_id in class_ids if class_id]

    def mean(part: np.ndarray, whole: np.ndarray, ids: list[int]) -> np.ndarray:
        part, whole = part[..., ids], whole[..., ids]
        exists = whole > 0
        shares = np.divide(part, whole, out=np.zeros_like(part), where=exists)
        return 100 * shares.sum(axis=-1) / np.maximum(exists.sum(axis=-1), 1)

    return {
        "mean_iou": mean(right, decided + given - right, class_ids),
        "recall": mean(right, true, foreground),
        "precision": mean(right, given, foreground),
        "decided": 100 * decided.sum(axis=-1) / np.maximum(true.sum(axis=-1), 1),
    }


def compare(counts: np.ndarray, names: list[str], class_ids: list[int]) -> dict[str, dict]:
    """
    Scores by variant, taught branch and score, each with its difference from the first variant and the 95 % interval
    of that difference in 1,000 resamples of the images (seed 0; the same images for both).
    """
    resamples = np.random.default_rng(0).multinomial(len(counts), [1 / len(counts)] * len(counts), RESAMPLES)
    figures: dict[str, dict] = {}
    first = {}
    for index, name in enumerate(names):
        # variant by variant, for the resampled counts of all of them would be large
        own = counts[:, index]
        summed = (resamples.astype(np.float64) @ own.reshape(len(own), -1)).reshape(RESAMPLES, *own.shape[1:])
        values, resampled = scores_of(own.sum(axis=0), class_ids), scores_of(summed, class_ids)
        if not index:
            first = {score: (values[score], resampled[score]) for score in values}
        figures[name] = {branch: {} for branch in BRANCHES}
        for score, (value, drawn) in first.items():
            difference = values[score] - value
            interval = np.percentile(resampled[score] - drawn, [2.5, 97.5], axis=0)
            for place, branch in enumerate(BRANCHES):
                entry = {"value": float(values[score][place])}
                if index:
                    entry |= {"difference": float(difference[place]), "interval": interval[:, place].tolist()}
                figures[name][branch][score] = entry
    return figures


def table(figures: dict[str, dict]) -> str:
    """The figures as a Markdown table."""
    lines = ["| variant | label of | mIoU | 95 % | recall | precision | decided |", "| --- | --- |" + " ---: |" * 5]
    for name, branches in figures.items():
        for branch, scores in branches.items():
            cells = {
                score: f"{entry['value']:.1f}" + (f" ({entry['difference']:+.1f})" if "difference" in entry else "")
                for score, entry in scores.items()
            }
            interval = scores["mean_iou"].get("interval")
            between = "" if interval is None else "{:+.1f} to {:+.1f}".format(*interval)
            values = [cells["mean_iou"], between, cells["recall"], cells["precision"], cells["decided"]]
            lines.append(f"| {name} | {branch} | {' | '.join(values)} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Loads run and images, measures, and prints the table."""
    model, processor = load_model_folder(args.run)
    variants = chosen_variants(model.config, args.variants, args.set)
    data_args, size = read_data_arguments(args, args.run), args.size
    record = args.run / "training_args.json"
    if size is None and record.is_file():
        size = read_json(record)["training_args"]["crop_size"]
    splits = load_data(data_args, splits=("validation",))
    names = class_names(splits)
    if names != list(model.config.id2label.values()):
        raise InvalidArguments("The data has other classes than the model: give the data that it was trained on.")
    class_ids = [names.index(name) for name in data_args.metric_classes or names]
    split = splits["validation"].select(range(min(args.max_samples, len(splits["validation"]))))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    counts = measure(model.to(device), processor, split, variants, size)
    figures = compare(counts, list(variants), class_ids)
    print(table(figures))
    summary = {"run": args.run.resolve().name, "num_images": len(split), "size": size, "resamples": RESAMPLES}
    save_record(args.output, summary | {"fields": variants, "variants": figures})


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
