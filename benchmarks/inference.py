"""
Images per second of the pipeline and of the bare model against two bare encoder passes of the same sizes, the limit.

    python benchmarks/inference.py --backbone facebook/deit-tiny-patch16-224 --output runs/inference.json

The model is that of the recipe `voc_animals`, its heads drawn at random; images are noise in colour. At one scale, and
at the scales of `config.inference_scales` with their mirror images. The limit counts the backbones of both branches
alone; the row below it adds the decoders, which every segmentation runs. ONNX Runtime (extra `onnx`) runs the graph of
one scale. Last, the pipeline segments an image of 12 megapixels in a process of its own, whose peak memory is printed.
"""

import argparse
import copy
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, needs_extra, positive, run_command


RECIPE = Path(__file__).resolve().parents[1] / "src" / "synernet_hf" / "recipes" / "voc_animals.yaml"
LARGE = (4000, 3000)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--backbone", required=True, help="Hub id or folder of the encoder")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="whose model fields count (default: voc_animals)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 448], help="sides of the images in pixels")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="images at once")
    parser.add_argument("--rounds", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--no_onnx", dest="onnx", action="store_false", help="leave ONNX Runtime out")
    parser.add_argument("--no_large", dest="large", action="store_false", help="leave the 12 megapixels out")
    parser.add_argument("--large_only", action="store_true", help="only print what the 12 megapixels take")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch
from PIL import Image
from side_by_side import choose_clock, median_ratio, save_record, time_in_turns
from transformers import pipeline

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.export import export_onnx


with needs_extra("train"):
    from synernet_hf.data import VOC_CLASSES
    from synernet_hf.training import read_recipe


def build(args: argparse.Namespace):
    """The recipe's model with random heads, on its device."""
    torch.manual_seed(0)
    fields = read_recipe(args.recipe)["model_config"]
    id2label = dict(enumerate(VOC_CLASSES))
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        args.backbone, id2label=id2label, **fields
    )
    return model.eval().to(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def segmenter_of(model):
    """The pipeline of a model, for images that keep their size."""
    return pipeline(
        "weakly-supervised-segmentation", model=model, image_processor=SynerNetImageProcessor(), device=model.device
    )


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft blobs of colour."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@torch.inference_mode()
def bare_passes(model, side: int, number: int, scales: tuple[float, ...], flip: bool, decode: bool) -> None:
    """Runs both encoders, and the decoders if `decode`, on images of the views' sizes, a view and its mirror at once."""
    patch = model.config.patch_size
    for scale in scales:
        grid = -(-int(scale * side) // patch)
        images = torch.zeros(number * (1 + flip), 3, grid * patch, grid * patch, device=model.device)
        shared_states = model.synernet.shared_states(images)
        for branch in model.synernet.pair:
            tokens = branch.encode(images, shared_states)[0]
            if decode:
                branch.decode_head(tokens[:, -(grid**2) :].transpose(1, 2).unflatten(2, (grid, grid)))


def onnx_runner(model, pixel_values: torch.Tensor):
    """A call of ONNX Runtime on these images, with as many threads as PyTorch has."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options)
    images = pixel_values.cpu().numpy()
    return lambda: session.run(["logits"], {"pixel_values": images})


def finished(call: Callable) -> Callable:
    """A call that waits for the GPU."""
    return lambda: (call(), torch.cuda.synchronize())


def measure(model, side: int, number: int, multi_scale: bool, rounds: int, onnx: bool) -> dict:
    """Images per second of each variant, and their share of the limit."""
    scales, flip = (tuple(model.config.inference_scales), True) if multi_scale else ((1.0,), False)
    segmenter = segmenter_of(model)
    images = [noise(side, side, seed) for seed in range(number)]
    pixel_values = SynerNetImageProcessor()(images, return_tensors="pt")["pixel_values"].to(model.device)
    bare = (model, side, number, scales, flip)
    variants = {
        "limit": lambda: bare_passes(*bare, decode=False),
        "encoders and decoders": lambda: bare_passes(*bare, decode=True),
        "model": lambda: model.multi_scale_logits(pixel_values, scales, flip),
        "pipeline": lambda: segmenter(images, batch_size=number, scales=scales, flip=flip),
    }
    if model.config.refine_predictions:
        plain = copy.copy(model)
        plain.config = copy.deepcopy(model.config)
        plain.config.refine_predictions = False
        unrefined = segmenter_of(plain)
        variants["pipeline, unrefined"] = lambda: unrefined(images, batch_size=number, scales=scales, flip=flip)
    if onnx and not multi_scale:
        variants["ONNX Runtime"] = onnx_runner(model, pixel_values)
    if model.device.type == "cuda":
        variants = {name: finished(call) for name, call in variants.items()}
    times = time_in_turns(variants, rounds, choose_clock(model.device.type))
    for entry in times.values():
        entry["images_per_second"] = number / entry["seconds"]
        entry["share_of_limit"] = median_ratio(times["limit"], entry)
    return {"side": side, "batch_size": number, "multi_scale": multi_scale, "variants": times}


def segment_large(args: argparse.Namespace) -> None:
    """Segments an image of 12 megapixels; prints seconds, peak memory before and after in MiB."""
    segmenter = segmenter_of(build(args))
    image = noise(*LARGE)
    segmenter(noise(64, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    started = time.perf_counter()
    segmenter(image)
    print(time.perf_counter() - started, before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def large_image(args: argparse.Namespace) -> dict[str, float]:
    """What `segment_large` prints, of another process."""
    words = ["--backbone", args.backbone, "--recipe", str(args.recipe), "--large_only"]
    words += ["--device", args.device] if args.device else []
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    names = ("seconds", "peak_memory_mib_before", "peak_memory_mib")
    return dict(zip(names, map(float, done.stdout.split()[-3:]), strict=True))


def run(args: argparse.Namespace) -> None:
    """Measures, prints and saves."""
    if args.large_only:
        return segment_large(args)
    model = build(args)
    figures = {"device": model.device.type, "clock": choose_clock(model.device.type).__name__, "cases": []}
    print("| side | batch | scales | variant | images per second | share of the limit |")
    print("| ---: | ---: | --- | --- | ---: | ---: |", flush=True)
    for side in args.sides:
        for number in args.batch_sizes:
            for multi_scale in (False, True):
                case = measure(model, side, number, multi_scale, args.rounds, args.onnx)
                figures["cases"].append(case)
                kind = "several, mirrored" if multi_scale else "one"
                for name, entry in case["variants"].items():
                    rate, share = entry["images_per_second"], 100 * entry["share_of_limit"]
                    print(f"| {side} | {number} | {kind} | {name} | {rate:.2f} | {share:.0f} % |", flush=True)
    if args.large:
        figures["large_image"] = large = large_image(args)
        print(
            f"An image of 12 megapixels takes {large['seconds']:.1f} s and a peak of {large['peak_memory_mib']:.0f} MiB, "
            f"{large['peak_memory_mib_before']:.0f} MiB of them before it is read."
        )
    return save_record(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
