"""What other runtimes and number formats change: mIoU on real images, equal pixels, logits, time.

    python benchmarks/runtimes.py runs/voc_animals --data_dir path/to/VOCdevkit --image_labels labels.npz

Every runtime segments the same validation images at one scale, as prepared by the run's image processor, and is
compared with float32 in PyTorch. `onnx` needs the extra `onnx`, `int8` the extra `int8`, `compile` a C++ compiler. The
times are of the machine as it is, after one image to warm up; `compile` compiles again for images of every
new size, at most eight times: give it one size with --square.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from synernet_hf.cli import answer_early, needs_extra, run_command


with needs_extra("train"):
    from synernet_hf.training import data_parser, read_data_arguments


RUNTIMES = "float32 broad precise averaged bfloat16 float16 int8 export onnx compile".split()


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = data_parser(description=__doc__)
    parser.add_argument("run", help="folder of a trained model")
    parser.add_argument("--max_samples", type=int, default=30, help="validation images")
    parser.add_argument("--square", type=int, help="side that every image is squeezed to (default: as in the run)")
    parser.add_argument("--metric_classes", nargs="+", help="classes in the mean; all that occur if left out")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
import torch
from torch.nn import functional as F

from synernet_hf import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.export import export_onnx, export_program, quantize_weights
from synernet_hf.metrics import MeanIoU
from synernet_hf.model import prepare_image
from synernet_hf.model_folder import load_model_folder


with needs_extra("train"):
    from synernet_hf.training import load_data


Runtime = Callable[[torch.Tensor], torch.Tensor]
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def in_torch(model, inference_branches: str | None = None) -> Runtime:
    """The model as it is, its logits at the size of `pixel_values`."""
    dtype = next(model.parameters()).dtype

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        return model.multi_scale_logits(pixel_values.to(dtype), (1.0,), inference_branches=inference_branches)

    return run


def averaged_branches(model) -> Runtime:
    """One encoder with the mean of both branches' weights: what merging them into one would give."""
    merged = SynerNetForWeaklySupervisedSegmentation(model.config).eval()
    merged.load_state_dict(model.state_dict())
    precise = model.synernet.precise_branch.state_dict()
    means = {name: (value + precise[name]) / 2 for name, value in model.synernet.broad_branch.state_dict().items()}
    merged.synernet.broad_branch.load_state_dict(means)
    return in_torch(merged, "broad")


def compiled(model) -> Runtime:
    """`torch.compile` of the model's forward, one graph."""
    forward = torch.compile(model, fullgraph=True, dynamic=False)

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return forward(pixel_values).logits

    return run


def in_onnxruntime(model) -> Runtime:
    """The ONNX graph of both branches."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        export_onnx(model, Path(folder) / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(Path(folder) / "model.onnx"), options)
    return lambda pixel_values: torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


def exported(model) -> Runtime:
    """The program of `torch.export`."""
    module = export_program(model).module()

    def run(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return module(pixel_values)

    return run


def of_format(model, dtype: torch.dtype) -> Runtime:
    """The model with all weights and activations in another float format."""
    half = SynerNetForWeaklySupervisedSegmentation(model.config).eval()
    half.load_state_dict(model.state_dict())
    return in_torch(half.to(dtype))


MAKERS: dict[str, Callable] = {
    "float32": in_torch,
    "broad": lambda model: in_torch(model, "broad"),
    "precise": lambda model: in_torch(model, "precise"),
    "averaged": averaged_branches,
    **{name: lambda model, dtype=dtype: of_format(model, dtype) for name, dtype in FORMATS.items()},
    "int8": lambda model: in_torch(quantize_weights(model)),
    "export": exported,
    "onnx": in_onnxruntime,
    "compile": compiled,
}


def measure(runtime: Runtime, inputs: list[torch.Tensor], masks: list[np.ndarray], reference: list | None) -> dict:
    """
    Segment every image.

    Returns:
        `dict`: `metric` ([`MeanIoU`]), `seconds` (median of an image), `logits` (of every image, where there is
        no `reference`), and otherwise `equal_pixels` (share) and `largest_difference` (of a logit).
    """
    metric = MeanIoU(runtime(inputs[0]).shape[1])
    seconds, kept, equal, pixels, largest = [], [], 0, 0, 0.0
    for index, (pixel_values, mask) in enumerate(zip(inputs, masks, strict=True)):
        start = time.perf_counter()
        logits = runtime(pixel_values)[0].float()
        seconds.append(time.perf_counter() - start)
        if reference is None:
            kept.append(logits)
        else:
            same = logits.argmax(dim=0) == reference[index].argmax(dim=0)
            equal, pixels = equal + int(same.sum()), pixels + same.numel()
            largest = max(largest, float((logits - reference[index]).abs().max()))
        resized = F.interpolate(logits[None], size=mask.shape, mode="bilinear", align_corners=False)
        metric.update(resized[0].argmax(dim=0), mask.astype(np.int64))
    found = {"metric": metric, "seconds": statistics.median(seconds), "logits": kept}
    return found | ({"equal_pixels": equal / pixels, "largest_difference": largest} if reference else {})


def read_images(args: argparse.Namespace, processor) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Pixel values and masks of validation images spread over the split."""
    split = load_data(read_data_arguments(args, args.run), splits=("validation",))["validation"]
    if args.square:
        processor.do_resize, processor.size = True, {"height": args.square, "width": args.square}
    chosen = np.linspace(0, len(split) - 1, min(args.max_samples, len(split))).astype(int).tolist()
    inputs, masks = [], []
    for index in chosen:
        record = split[index]
        inputs.append(prepare_image(processor, record["image"]).pixel_values[None])
        masks.append(np.asarray(record["mask"]))
    return inputs, masks


def compare(args: argparse.Namespace) -> None:
    """Measures one runtime after the other and prints the table."""
    model, processor = load_model_folder(args.run)
    unknown = [name for name in args.metric_classes or () if name not in model.config.label2id]
    if unknown:
        raise ValueError(f"--metric_classes has {', '.join(unknown)}; known are {', '.join(model.config.label2id)}.")
    inputs, masks = read_images(args, processor)
    class_ids = [model.config.label2id[name] for name in args.metric_classes] if args.metric_classes else None
    rows: dict[str, dict] = {}
    reference = None
    print("| runtime | mIoU | equal pixels | largest difference of a logit | seconds per image |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for name in ["float32", *(name for name in args.runtimes if name != "float32")]:
        found = measure(MAKERS[name](model), inputs, masks, reference)
        reference = reference or found["logits"]
        row = {key: value for key, value in found.items() if key not in ("metric", "logits")}
        rows[name] = {"mean_iou": found["metric"].compute(class_ids)["mean_iou"]} | row
        same = f"{row['equal_pixels']:.4%} | {row['largest_difference']:.1e}" if name != "float32" else "– | –"
        print(f"| {name} | {100 * rows[name]['mean_iou']:.2f} | {same} | {row['seconds']:.3f} |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(compare, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
