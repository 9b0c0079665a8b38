"""
How time and memory grow: with classes, image size, images and processes.

    python benchmarks/scaling.py --output runs/scaling.json --figure runs/scaling.png

A narrow encoder of two blocks stands for the real one, so that the work around it shows. A row has the seconds at each
value, the exponent between the outer two (2 means four times the time for twice the value), and the exponent that the
arithmetic allows. `memory` gives the peak memory of a COCO batch's supervision (CAMs at all scales of the recipe,
fusion, refined labels; encoder included) and that of the naive form, which keeps the maps of all classes at full size
for every scale and refines image by image; the naive form runs on fewer images and grows with them. Memory needs
Linux. The curves need matplotlib.
"""

import argparse
import ctypes
import io
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

from synernet_hf.cli import CommandParser, answer_early, needs_extra, positive, run_command


with needs_extra("train"):
    from synernet_hf.training import read_recipe


PARTS = ("classes", "size", "images", "processes", "memory")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure (default: all)"
    )
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 80, 1000], help="numbers of classes")
    parser.add_argument(
        "--size", type=int, default=224, help="side of the images where it does not vary (default: 224)"
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 672, 1024], help="sides of images")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000, 100000], help="numbers of images")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--batch_size", type=int, default=24, help="images of the COCO batch (default: 24)")
    parser.add_argument("--crop_size", type=int, default=448, help="side of its images (default: 448)")
    parser.add_argument(
        "--naive_images", type=int, default=1, help="the naive form runs on so many, and twice as many"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, help="timed calls, of which the shortest counts (default: 3)"
    )
    parser.add_argument("--figure", type=Path, help="PNG of the curves")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch
from PIL import Image
from side_by_side import save_record
from torch.nn import functional as F
from transformers import ViTConfig

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.metrics import MeanIoU
from synernet_hf.model import cams_to_pseudo_labels, layer_confidence, normalize_cams, refine_pseudo_labels


with needs_extra("train"):
    from synernet_hf.data import build_split
    from synernet_hf.pseudo_labels import PseudoLabeler, write_pseudo_labels


RECIPE = Path(__file__).resolve().parents[1] / "src" / "synernet_hf" / "recipes" / "coco14.yaml"


def make_model(num_classes: int) -> SynerNetForWeaklySupervisedSegmentation:
    """COCO's recipe on an encoder of two blocks, 48 wide, with so many classes and random weights."""
    encoder = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
    fields = read_recipe(RECIPE)["model_config"] | {"auxiliary_layer_index": -2, "decoder_hidden_size": 32}
    torch.manual_seed(0)
    names = ["background", *(f"class {index}" for index in range(1, num_classes + 1))]
    fields["semantic_loss_ignore_index"] = max(255, len(names))
    config = SynerNetConfig(backbone_config=encoder, id2label=dict(enumerate(names)), **fields)
    return SynerNetForWeaklySupervisedSegmentation(config)


def make_batch(num_images: int, num_classes: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth normalised images `(B, 3, H, W)`, and labels `(B, C)` of one to six classes in turn."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(num_images, 3, size // 16, size // 16, generator=generator)
    labels = torch.zeros(num_images, num_classes)
    for index in range(num_images):
        labels[index, torch.randperm(num_classes, generator=generator)[: index % 6 + 1]] = 1
    return F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False), labels


@torch.no_grad()
def supervise(model, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Refined labels `(2, B, H, W)` for both branches, in slots of the present classes."""
    cams = model.generate_cams(pixel_values, labels, all_classes=False).fused_cams
    slots = torch.arange(cams.shape[1])[None] < labels.sum(dim=1)[:, None]
    images = pixel_values.sigmoid()
    config = model.config
    return refine_pseudo_labels(
        images, torch.stack([cams, cams]), slots.float(), config.low_threshold, config.high_threshold
    )


@torch.no_grad()
def supervise_naively(model, pixel_values: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The same from maps of all classes at full size, kept for all scales, and images refined one by one."""
    config, size, full = model.config, pixel_values.shape[-2:], labels[:, :, None, None]
    cams = []
    for branch in range(2):
        kept: list[list[torch.Tensor]] = [[], []]
        for scale in config.cam_scales:
            views = F.interpolate(pixel_values, scale_factor=scale, mode="bilinear", align_corners=False)
            logits = model.cam_logits(torch.cat([views, views.flip(-1)]))[branch]
            for layer, maps in zip(kept, logits, strict=False):
                maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
                straight, mirrored = maps.chunk(2)
                layer.append(torch.maximum(straight, mirrored.flip(-1)).relu())
        cams.append([normalize_cams(torch.stack(layer).sum(dim=0)) * full for layer in kept])
    low, high = config.low_threshold, config.high_threshold
    votes = [cams_to_pseudo_labels(maps, labels, low, high) for layers in cams for maps in layers]
    layer_confidence(torch.stack(votes))
    fused = 0.5 * cams[0][0] + 0.5 * cams[1][0]
    images, rows = pixel_values.sigmoid(), range(len(labels))
    return torch.stack(
        [
            torch.cat([refine_pseudo_labels(*(x[i, None] for x in (images, fused, labels)), low, high) for i in rows])
            for _ in range(2)
        ]
    )


def train_once(model, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """One step without the optimiser, all terms of the loss on."""
    model.train()
    model(pixel_values, labels=labels).loss.backward()
    model.zero_grad()
    model.eval()


def score(num_labels: int, size: int, num_images: int) -> MeanIoU:
    """The confusion matrix of so many pairs of label maps."""
    generator = np.random.default_rng(0)
    prediction, reference = generator.integers(0, num_labels, (2, size, size))
    metric = MeanIoU(num_labels, ignore_index=num_labels)
    for _ in range(num_images):
        metric.update(prediction, reference)
    return metric


def seconds_of(work: Callable, rounds: int) -> float:
    """The shortest of `rounds` calls after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def curve(values: list[int], times: list[float], allowed: float) -> dict:
    """A row: values, seconds, the exponent between the outer values and the one that the arithmetic allows."""
    exponent = math.log(times[-1] / times[0]) / math.log(values[-1] / values[0]) if len(values) > 1 else math.nan
    return {"values": values, "seconds": times, "exponent": exponent, "allowed": allowed}


def by_classes(counts: list[int], size: int, rounds: int) -> dict[str, dict]:
    """Time against the number of classes; only what has a map of each class may follow it."""
    times: dict[str, list[float]] = {}
    for count in counts:
        model, (pixel_values, labels) = make_model(count).eval(), make_batch(2, count, size)
        works = {
            "CAMs, fusion, refinement": partial(supervise, model, pixel_values, labels),
            "training step": partial(train_once, model, pixel_values, labels),
            "segmentation": partial(model.multi_scale_logits, pixel_values, (1.0,)),
            "confusion matrix": partial(score, count + 1, size, 4),
        }
        for name, work in works.items():
            times.setdefault(name, []).append(seconds_of(work, rounds))
    # scores of C classes on N tokens; decoder and loss have C maps; a confusion matrix has C² counts
    allowed = {"CAMs, fusion, refinement": 1, "training step": 1, "segmentation": 1, "confusion matrix": 2}
    return {name: curve(counts, taken, allowed[name]) for name, taken in times.items()}


def by_size(sizes: list[int], rounds: int) -> dict[str, dict]:
    """Time against the number of pixels; attention and patch-token contrast may follow its square."""
    model, times = make_model(20).eval(), {}
    for size in sizes:
        pixel_values, labels = make_batch(1, 20, size)
        cams = torch.rand(1, 20, size, size, generator=torch.Generator().manual_seed(0))
        works = {
            "refinement": partial(refine_pseudo_labels, pixel_values.sigmoid(), cams, labels, 0.25, 0.65),
            "CAMs, fusion, refinement": partial(supervise, model, pixel_values, labels),
            "training step": partial(train_once, model, pixel_values, labels),
            "confusion matrix": partial(score, 21, size, 4),
        }
        for name, work in works.items():
            times.setdefault(name, []).append(seconds_of(work, rounds))
    allowed = {"refinement": 1, "CAMs, fusion, refinement": 2, "training step": 2, "confusion matrix": 1}
    return {name: curve([size**2 for size in sizes], taken, allowed[name]) for name, taken in times.items()}


def peak_memory(work: Callable) -> float:
    """MiB by which the resident memory of this process grows at most while it works."""

    def resident(name: str) -> float:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024

    # memory that was freed before would be used again unseen
    ctypes.CDLL(None).malloc_trim(0)
    # sets the peak to what is in use now
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


class FixedLabeler(PseudoLabeler):
    """The same small label map for every image, so that the cost of the records shows."""

    def __call__(self, image: Image.Image, label_ids: list[int]) -> tuple[np.ndarray, dict]:
        """A label map and what is known of it."""
        found = {"width": 16, "height": 16, "labels": [label + 1 for label in label_ids], "label_source": "known"}
        return np.zeros((16, 16), np.uint8), found | {
            "found": [],
            "confidence": 0.5,
            "coverage": 1.0,
            "foreground": 0.0,
        }


def by_images(counts: list[int]) -> dict[str, dict]:
    """Time and memory against the number of images: scores, records of pseudo-labels, and the same once more."""
    model, processor, file = make_model(4).eval(), SynerNetImageProcessor(), io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format="PNG")
    times, memory = {}, {}
    for count in counts:
        ids = [f"{index:07d}" for index in range(count)]
        names = list(model.config.id2label.values())
        split = build_split([{"bytes": file.getvalue(), "path": None}] * count, ids, [[1]] * count, names)
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch("synernet_hf.pseudo_labels.PseudoLabeler", FixedLabeler),
        ):
            write = partial(write_pseudo_labels, model, processor, split, Path(folder) / "labels")
            works = {"confusion matrix": partial(score, 21, 64, count), "pseudo-labels, records": write}
            for name, work in (works | {"pseudo-labels, found finished": write}).items():
                started = time.perf_counter()
                memory.setdefault(name, []).append(peak_memory(work))
                times.setdefault(name, []).append(time.perf_counter() - started)
    return {name: curve(counts, taken, 1) | {"peak_mib": memory[name]} for name, taken in times.items()}


def by_processes(counts: list[int], size: int, rounds: int) -> dict[str, dict]:
    """Time of 200 images' scores against the processes that share them."""
    times = []
    for count in counts:
        with ProcessPoolExecutor(count, get_context("spawn")) as pool:

            def work(pool=pool, count=count):
                return [future.result() for future in [pool.submit(score, 21, size, 200 // count)] * count]

            times.append(seconds_of(work, rounds))
    return {"confusion matrix": curve(counts, times, -1)}


def supervision_memory(batch_size: int, size: int, naive_images: int) -> dict:
    """Peak MiB of a COCO batch's supervision, and of the naive form per image."""
    model = make_model(80).eval()
    batch = make_batch(batch_size, 80, size)
    ours = peak_memory(lambda: supervise(model, *batch))
    # the difference of two sizes leaves out what does not grow
    few, many = (
        peak_memory(lambda count=count: supervise_naively(model, *(x[:count] for x in batch)))
        for count in (naive_images, 2 * naive_images)
    )
    naive = many + (many - few) / naive_images * (batch_size - 2 * naive_images)
    labels = [supervise(model, *(x[:1] for x in batch)), supervise_naively(model, *(x[:1] for x in batch))]
    # one class: its slot is the first
    equal = float(((labels[0] == 1) == ((labels[1] > 0) & (labels[1] < 255))).float().mean())
    return {
        "batch_size": batch_size,
        "size": size,
        "most_classes": int(batch[1].sum(dim=1).max()),
        "ours_mib": ours,
        "naive_mib": naive,
        "naive_measured_mib": {naive_images: few, 2 * naive_images: many},
        "ratio": naive / ours,
        "equal_foreground": equal,
    }


def draw(figures: dict, path: Path) -> None:
    """The curves as a PNG, both axes logarithmic."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ValueError(
            "Curves need matplotlib, which is not installed: leave --figure out, or install it."
        ) from error
    parts = [part for part in PARTS if part in figures and part != "memory"]
    figure, axes = pyplot.subplots(1, len(parts), figsize=(4 * len(parts), 4), squeeze=False)
    labels = {"classes": "classes", "size": "pixels", "images": "images", "processes": "processes"}
    for axis, part in zip(axes[0], parts, strict=True):
        for name, row in figures[part].items():
            axis.loglog(row["values"], row["seconds"], marker="o", label=f"{name}: {row['exponent']:.2f}")
        axis.set_xlabel(labels[part])
        axis.set_ylabel("seconds")
        axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def run(args) -> None:
    """Measures the parts, prints their tables and writes them."""
    measured = {
        "classes": lambda: by_classes(args.classes, args.size, args.rounds),
        "size": lambda: by_size(args.sizes, args.rounds),
        "images": lambda: by_images(args.images),
        "processes": lambda: by_processes(args.processes, args.size, args.rounds),
        "memory": lambda: supervision_memory(args.batch_size, args.crop_size, args.naive_images),
    }
    figures: dict = {}
    for part in args.parts:
        figures[part] = measured[part]()
        if part == "memory":
            continue
        print(
            f"| {part} | seconds at each | exponent | allowed | peak MiB at each |\n| --- | --- | ---: | ---: | --- |"
        )
        for name, row in figures[part].items():
            taken = ", ".join(f"{n:,}: {t:.3g}" for n, t in zip(row["values"], row["seconds"], strict=True))
            memory = ", ".join(f"{value:.0f}" for value in row.get("peak_mib", ())) or "-"
            print(f"| {name} | {taken} | {row['exponent']:.2f} | {row['allowed']} | {memory} |", flush=True)
        print()
        save_record(args.output, figures)
    if "memory" in figures:
        entry = figures["memory"]
        batch = f"{entry['batch_size']} images of {entry['size']} px, 80 classes, at most {entry['most_classes']} each"
        print(f"Supervision of {batch}: {entry['ours_mib']:,.0f} MiB, naively {entry['naive_mib']:,.0f} MiB, ", end="")
        print(f"{entry['ratio']:.1f} times as much.")
    if args.figure is not None:
        draw(figures, args.figure)
    save_record(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
