"""
Scoring of a split against the bare encoder passes that it needs, each view encoded once, in turns over the same images.

    python benchmarks/evaluation.py --data_dir path/to/VOCdevkit --image_labels labels.npz \\
        --backbone facebook/deit-tiny-patch16-224 --output runs/evaluation.json

The model is that of the recipe `voc_animals`, its heads drawn at random. Bare are the backbones of both branches on
noise, in batches and sizes as they are scored; the decoders are those of the views that a segmentation asks for. The
scores are compared with those of a path that encodes everything anew, image by image, and resizes all classes at
once. Peak memory is that of a process that scores generated images.
"""

import argparse
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

from synernet_hf.cli import answer_early, needs_extra, positive, run_command


with needs_extra("train"):
    from synernet_hf.training import data_parser, read_data_arguments


RECIPE = Path(__file__).resolve().parents[1] / "src" / "synernet_hf" / "recipes" / "voc_animals.yaml"
KINDS = {
    "plain": {"cams": False},
    "several scales": {"cams": False, "multi_scale": True},
    "CAMs": {},
    "plain, several scales, CAMs": {"multi_scale": True},
    "+ mirror, baselines": {"multi_scale": True, "flip": True, "baselines": True},
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    parser = data_parser(description=__doc__)
    parser.set_defaults(dataset="voc2012")
    parser.add_argument("--backbone", required=True, help="Hub id or folder of the encoder")
    parser.add_argument("--size", type=int, default=224, help="shortest side in pixels (default: 224)")
    parser.add_argument("--num_images", type=positive, default=24, help="validation images, spread over the split")
    parser.add_argument("--rounds", type=positive, default=3, help="timed calls of each (default: 3)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS)[:-1], help="what is timed")
    parser.add_argument("--workers", type=int, default=0, help="also the last kind with so many workers that decode")
    parser.add_argument("--memory_images", type=int, nargs="*", default=[100, 1000], help="generated images")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose model fields count (default: voc_animals)")
    parser.add_argument("--generated", type=int, help="score so many generated images and print the peak memory")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch
from side_by_side import choose_clock, median_ratio, save_record, time_in_turns
from torch.nn import functional as F

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.data import class_names, load_shapes, multi_hot
from synernet_hf.metrics import MeanIoU
from synernet_hf.model import prepare_image
from synernet_hf.training import evaluate_model, load_data, read_recipe


CAMS = ("broad_cam", "precise_cam", "fused_cam", "broad_aux_cam", "precise_aux_cam")


def views_of(config, kinds: dict) -> tuple[set, set]:
    """Scale and mirror of the views that a segmentation needs, and of all views."""
    decoded = {(1.0, False)}
    if kinds.get("multi_scale"):
        decoded |= {(float(scale), False) for scale in config.inference_scales}
    if kinds.get("flip"):
        decoded |= {(float(scale), mirrored) for scale in config.inference_scales for mirrored in (False, True)}
    seen = set(decoded)
    if kinds.get("cams", True):
        seen |= {
            (float(scale), mirrored)
            for scale in config.cam_scales
            for mirrored in (False, True)[: 1 + config.cam_flip]
        }
    return decoded, seen


def batches_of(model, score) -> list[tuple[int, int, int]]:
    """Images, height and width of the batches in which `score` segments."""
    shapes, plain = [], model.multi_scale_logits
    model.multi_scale_logits = lambda images, *rest: (
        shapes.append((len(images), *images.shape[-2:])),
        plain(images, *rest),
    )[1]
    score()
    del model.multi_scale_logits
    return shapes


@torch.no_grad()
def bare_passes(model, shapes: list, kinds: dict, decode: bool) -> None:
    """Runs both encoders on noise of the views' sizes, and the decoders where a segmentation asks for them."""
    decoded, seen = views_of(model.config, kinds)
    patch = model.config.patch_size
    for number, *size in shapes:
        for scale in {scale for scale, _ in seen}:
            views = sum(other == scale for other, _ in seen)
            padded = [-(-int(scale * side) // patch) * patch for side in size]
            images = torch.zeros(number * views, 3, *padded)
            shared_states = model.synernet.shared_states(images)
            segmented = number * sum(other == scale for other, _ in decoded)
            for branch in model.synernet.pair:
                tokens = branch.encode(images, shared_states)[0]
                if decode and segmented:
                    grid = [side // patch for side in padded]
                    maps = tokens[:segmented, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)
                    branch.decode_head(maps)


@torch.no_grad()
def score_anew(model, processor, split, kinds: dict) -> dict[str, MeanIoU]:
    """The matrices of the kinds, every kind of every image with passes of its own."""
    config, metrics = model.config, {}
    num_classes = config.num_labels - 1
    names = {"segmentation": ((1.0,), False)}
    if kinds.get("multi_scale"):
        names["segmentation_multi_scale"] = (tuple(config.inference_scales), False)
    if kinds.get("flip"):
        names["segmentation_multi_scale_flip"] = (tuple(config.inference_scales), True)
    for record in split:
        pixel_values = prepare_image(processor, record["image"]).pixel_values[None]
        mask, labels = np.asarray(record["mask"]), multi_hot(record["labels"], num_classes)[None]
        maps = {name: model.multi_scale_logits(pixel_values, *options) for name, options in names.items()}
        if kinds.get("cams", True):
            maps |= {name: model.generate_cams(pixel_values, labels)[f"{name}s"] for name in CAMS}
        if kinds.get("baselines"):
            predicted = (model.class_scores(pixel_values) > 0).float()
            for name, given in (("single_scale_cam", labels), ("single_scale_cam_predicted", predicted)):
                cams = model.generate_cams(pixel_values, given, (1.0,), flip=False, plain=True)
                mean = (cams.broad_cams + cams.precise_cams) / 2
                maps[name] = mean / (mean.amax(dim=(2, 3), keepdim=True) + 1e-5)
        for name, values in maps.items():
            values = F.interpolate(values, size=mask.shape, mode="bilinear", align_corners=False)[0]
            largest, ids = values.max(dim=0)
            if name not in names:
                ids = torch.where(largest > config.background_threshold, ids + 1, 0)
            metric = metrics.setdefault(name, MeanIoU(config.num_labels, config.semantic_loss_ignore_index))
            metric.update(ids, mask.astype(np.int64))
    return metrics


def largest_difference(found: dict[str, dict], expected: dict[str, MeanIoU], names: list[str]) -> float:
    """Largest difference of an IoU or a pixel accuracy: 0 where all counts are equal."""
    largest = 0.0
    for name, metric in expected.items():
        scores = metric.compute()
        pairs = [(found[name]["pixel_accuracy"], scores["pixel_accuracy"])]
        pairs += zip([found[name]["per_class_iou"][label] for label in names], scores["per_class_iou"], strict=True)
        # `None` and `nan`, a class that does not occur, count as -1
        pairs = [(-1 if one is None else one, -1 if math.isnan(other) else other) for one, other in pairs]
        largest = max(largest, *(abs(one - other) for one, other in pairs))
    return largest


def build(args: argparse.Namespace, id2label: dict[int, str]):
    """The recipe's model with random heads, and its processor."""
    torch.manual_seed(0)
    fields = read_recipe(args.recipe)["model_config"]
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        args.backbone, id2label=id2label, **fields
    )
    return model.eval(), SynerNetImageProcessor(do_resize=True, size={"shortest_edge": args.size})


def peak_memory(args: argparse.Namespace, words: list[str]) -> dict[int, float]:
    """Peak memory in MiB of processes that score so many generated images."""
    peaks = {}
    for number in args.memory_images:
        command = [sys.executable, __file__, *words, "--generated", str(number)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[number] = float(done.stdout.split()[-1])
    return peaks


def score_generated(args: argparse.Namespace) -> None:
    """Scores generated images and prints the peak memory of this process in MiB."""
    splits = load_shapes(num_train=1, num_validation=args.generated, image_size=64)
    names = class_names(splits)
    model, processor = build(args, dict(enumerate(names)))
    processor.do_resize = False
    evaluate_model(model, processor, splits["validation"], class_names=names)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def measure(args: argparse.Namespace, words: list[str]) -> dict:
    """Seconds of each kind and of its bare passes, shares, differences of scores, peak memory."""
    splits = load_data(read_data_arguments(args), splits=("validation",))
    split, names = splits["validation"], class_names(splits)
    chosen = np.linspace(0, len(split) - 1, min(args.num_images, len(split))).astype(int).tolist()
    split = split.select(chosen)
    model, processor = build(args, dict(enumerate(names)))

    def score(num_workers: int = 0, **kinds) -> dict:
        return evaluate_model(model, processor, split, class_names=names, num_workers=num_workers, **kinds)

    shapes = batches_of(model, lambda: score(cams=False))
    variants = {}
    for name in args.kinds:
        kinds = KINDS[name]
        variants[f"{name}: encoders"] = lambda kinds=kinds: bare_passes(model, shapes, kinds, decode=False)
        variants[f"{name}: encoders and decoders"] = lambda kinds=kinds: bare_passes(model, shapes, kinds, decode=True)
        variants[f"{name}: scored"] = lambda kinds=kinds: score(**kinds)
    if args.workers:
        variants["workers"] = lambda: score(args.workers, **kinds)
    # the process does not see the seconds of its workers
    clock = time.perf_counter if args.workers else choose_clock()
    times = time_in_turns(variants, args.rounds, clock)
    rows = {}
    for name in args.kinds:
        bare = times[f"{name}: encoders"]
        rows[name] = {"seconds per image": times[f"{name}: scored"]["seconds"] / len(split)}
        for other in ("encoders and decoders", "scored"):
            rows[name][other] = median_ratio(times[f"{name}: {other}"], bare)
    if args.workers:
        rows[f"{name}, {args.workers} workers decode"] = {
            "seconds per image": times["workers"]["seconds"] / len(split),
            "encoders and decoders": rows[name]["encoders and decoders"],
            "scored": median_ratio(times["workers"], bare),
        }
    last = list(KINDS.values())[-1]
    anew = score_anew(model, processor, split, last)
    return {
        "num_images": len(split),
        "batches": len(shapes),
        "size": args.size,
        "clock": clock.__name__,
        "rows": rows,
        "times": times,
        "largest_difference_of_a_score": largest_difference(score(**last), anew, names),
        "peak_memory_mib": peak_memory(args, words),
    }


def run(args: argparse.Namespace) -> None:
    """Measures, prints and saves."""
    if args.generated:
        return score_generated(args)
    words = ["--backbone", args.backbone, "--size", str(args.size), "--recipe", str(args.recipe)]
    figures = measure(args, words)
    print(f"times of the bare encoder passes, {figures['num_images']} images, shortest side {args.size} px")
    print("| what is scored | seconds per image | encoders and decoders | scored |")
    print("| --- | ---: | ---: | ---: |")
    for name, row in figures["rows"].items():
        seconds, *shares = row.values()
        print(f"| {name} | {seconds:.3f} | {' | '.join(f'{share:.2f}' for share in shares)} |")
    print(
        f"Largest difference of a score from that of everything encoded anew: {figures['largest_difference_of_a_score']}"
    )
    for number, peak in figures["peak_memory_mib"].items():
        print(f"Peak memory over {number} images: {peak:.0f} MiB")
    return save_record(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
