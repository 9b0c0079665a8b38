"""The plan of a run before it starts; the model card of a run and the image grid that it shows."""

import copy
import importlib
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from PIL import Image

from synernet_hf.data.schema import multi_hot
from synernet_hf.data.streams import is_stream
from synernet_hf.files import replace_file, write_text
from synernet_hf.model import (
    PreparedBatch,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    generate_image_cams,
    prepare_image,
    resize_maps,
    segment_images,
)
from synernet_hf.model_card import SynerNetModelCardData, generate_model_card
from synernet_hf.training.checkpoints import CARD_FILE, IMAGES_FILE
from synernet_hf.training.evaluation import inference_mode_of
from synernet_hf.training.stopping import batches_of
from synernet_hf.visualization import colorize, figure_panels, heat_map, overlay, with_legend


try:
    import resource
except ModuleNotFoundError:
    # Windows
    resource = None


NUM_IMAGES = 4
# more than the panels show: CAMs at the eight views of a million pixels take a minute
MAX_PIXELS = 2**18
# of which the length of a run is estimated
TIMED_STEPS = 3


def describe_plan(run, train_step: Callable) -> str:
    """
    Says what a [`TrainingRun`] will do and need, a line for each fact. Time and memory are those of three steps with all
    losses. Every process calls this; the weights of the run are of no use afterwards.
    """
    args, done, total = run.training_args, run.state.step, run.training_args.max_steps
    seconds, train = _seconds_of_a_step(run, train_step), run.splits["train"]
    passes, processes = args.gradient_accumulation_steps, run.accelerator.num_processes
    images = args.per_device_batch_size * passes * processes
    streamed, names = is_stream(train), run.record["class_names"][1:]
    counts = Counter() if streamed else Counter(label for labels in train["labels"][:] for label in labels)
    classes = names if streamed else (f"{name} {counts[label]:,}" for label, name in enumerate(names))
    left_out = sum(map(len, run.record["skipped"].values()))
    scored = (run.record["scored_on"] or {"num_images": 0})["num_images"]
    weights = _bytes_of(run.bare_model.state_dict().values())
    saved = weights + _bytes_of(value for state in run.optimizer.state.values() for value in state.values())
    evaluations = f"every {args.eval_steps:,} steps and after the last: {_times(done, total, args.eval_steps):,}"
    saves = _times(done, total, args.save_steps)
    kept = saves if args.save_total_limit is None else min(saves, args.save_total_limit)
    # a checkpoint is written before an older one goes
    needed = saved * (kept + (kept < saves)) + weights * (1 + run.can_evaluate)
    existing = next(path for path in (run.output_dir.absolute(), *run.output_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    number = sum(parameter.numel() for parameter in run.bare_model.parameters())
    lines = {
        "images": f"{'a stream' if streamed else f'{len(train):,}'} to train on, {scored:,} to evaluate on, {left_out:,} left out",
        "classes": ", ".join(classes),
        "model": f"{number / 1e6:.2f} million parameters, precision {run.accelerator.mixed_precision}",
        "steps": f"{total - done:,} of {images} images (processes {processes}, passes {passes}, "
        f"{args.per_device_batch_size} in a pass)"
        + ("" if streamed else f": {(total - done) * images / len(train):.1f} epochs"),
        "evaluations": evaluations if run.can_evaluate else "none, without masks",
        "checkpoints": f"every {args.save_steps:,} steps and after the last: {saves:,}, of which {kept:,} are kept",
        "time": f"{duration(seconds * (total - done)).lower()} at {seconds:.2g} s a step with all losses, evaluations and "
        "checkpoints not counted",
        "memory": _peak_memory(run.accelerator.device),
        "disk": f"{_size(needed)} at most ({_size(saved)} a checkpoint), {_size(free)} are free",
    }
    text = "".join(f"\n  {name:<12} {line}" for name, line in lines.items())
    return f"The plan of {run.output_dir} (nothing was written):{text}"


def _seconds_of_a_step(run, train_step: Callable) -> float:
    """Of the last step of the run, which has all losses: the mean of three, after one that does not count."""
    done, device, batches = run.state.step, run.accelerator.device, batches_of(run.loader, run.stop)
    run.model.train()
    run.state.step, started = run.training_args.max_steps - 1, 0.0
    for number in range(1 + TIMED_STEPS):
        started = time.perf_counter() if number == 1 else started
        for _ in range(run.training_args.gradient_accumulation_steps):
            train_step(run, next(batches))
        if device.type != "cpu":
            torch.accelerator.synchronize()
    run.state.step = done
    return (time.perf_counter() - started) / TIMED_STEPS


def _times(done: int, total: int, every: int) -> int:
    """How many steps after `done` are multiples of `every` or the last one."""
    return -(-total // every) - done // every


def _bytes_of(values: Iterable[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor))


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{_size(torch.cuda.max_memory_allocated(device))} of the device in each process"
    if resource is None:
        return "not known on this system"
    # macOS counts bytes, others kibibytes
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{_size(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)} in each process, without its workers"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Reads such as `About 38 minutes`."""
    if seconds < 120:
        return "Less than a minute" if seconds < 60 else "About a minute"
    return f"About {seconds / 60:.0f} minutes" if seconds < 5400 else f"About {seconds / 3600:.1f} hours"


def hardware(accelerator: Accelerator) -> str:
    """Names the hardware of a run, such as `2 × NVIDIA A100` or `cpu (x86_64, 2 threads)`."""
    count = f"{accelerator.num_processes} × " if accelerator.num_processes > 1 else ""
    if accelerator.device.type == "cuda":
        return count + torch.cuda.get_device_name(accelerator.device)
    return f"{count}{accelerator.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def write_card(
    output_dir: Path,
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    splits: Mapping[str, datasets.Dataset],
    record: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    **facts: Any,
) -> None:
    """
    Writes `README.md` of a run from its record and results, with `facts` of [`SynerNetModelCardData`], and the first
    validation images where there are results.
    """
    num_images = 0
    if results:
        num_images = write_image_grid(output_dir / IMAGES_FILE, model, processor, splits["validation"])
    card = generate_model_card(
        SynerNetModelCardData(
            model_name=output_dir.resolve().name,
            settings=record["model_args"] | record["data_args"] | record["training_args"],
            class_names=record["class_names"],
            num_train=record["run"]["num_train"],
            versions=record["versions"],
            results=results,
            images=IMAGES_FILE if num_images else None,
            num_images=num_images,
            **facts,
        )
    )
    write_text(output_dir / CARD_FILE, str(card))


def write_image_grid(
    path: Path,
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    split: datasets.Dataset,
    num_images: int = NUM_IMAGES,
) -> int:
    """Draws [`image_grid`] into a file; returns the number of images."""
    grid, number = image_grid(model, processor, split, num_images)
    replace_file(path, lambda temporary: grid.save(temporary, format="PNG"))
    return number


def image_grid(
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    split: datasets.Dataset,
    num_images: int = NUM_IMAGES,
) -> tuple[Image.Image, int]:
    """
    The first images of a split with mask, segmentation at one scale and the CAM of each branch and of both; and their
    number.
    """
    processor = copy.copy(processor)
    processor.max_pixels = min(processor.max_pixels or MAX_PIXELS, MAX_PIXELS)
    with inference_mode_of(model):
        rows = [_panels(model, processor, split[index]) for index in range(min(num_images, len(split)))]
    # masks of VOC have contours that are not scored
    names = model.config.id2label | {model.config.semantic_loss_ignore_index: "not scored"}
    return with_legend(figure_panels(rows, panel_size=(160, 160)), names), len(rows)


def show_images(
    trackers: Sequence[GeneralTracker],
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    split: datasets.Dataset,
    step: int,
) -> None:
    """Gives [`image_grid`] to those trackers of accelerate that take images, each of which takes them in another form."""
    if not trackers:
        return
    grid, _ = image_grid(model, processor, split)
    for tracker in trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"eval/images": np.asarray(grid)[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "trackio":
            tracker.log({"eval/images": importlib.import_module("trackio").Image(grid)}, step=step)
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"eval/images": [grid]}, step=step)


def _panels(model, processor, record: dict) -> list[tuple[str, Image.Image]]:
    prepared = prepare_image(processor, record["image"])
    labels = multi_hot(record["labels"], model.config.num_labels - 1)
    batch = PreparedBatch([prepared])
    [segmented] = segment_images(model, processor, batch)
    [cams] = generate_image_cams(model, processor, batch, [labels])
    image = prepared.image
    size, names = (image.height, image.width), ("broad", "precise", "fused")
    maps = torch.stack([cams[f"{name}_cams"].amax(dim=0) for name in names])
    maps = dict(zip(names, resize_maps(maps, size).cpu().numpy(), strict=True))
    # at the size of the whole image
    segmentation = Image.fromarray(segmented.label_map.cpu().numpy().astype(np.uint8)).resize(image.size, 0)
    return [
        ("image", image),
        ("ground truth", colorize(np.asarray(record["mask"]))),
        ("segmentation", overlay(image, np.asarray(segmentation))),
        *((f"{name} CAM", heat_map(cam, image)) for name, cam in maps.items()),
    ]
