"""Segment images with a trained SynerNet: `python examples/predict.py RUN IMAGE…` writes masks and overlays."""

import argparse
import functools
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from synernet_hf.cli import CommandParser, run_command
from synernet_hf.crf import DenseCRF
from synernet_hf.files import replace_file
from synernet_hf.model import open_image, segment_images
from synernet_hf.model_folder import load_model_folder
from synernet_hf.visualization import overlay, palette_image


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a trained model, such as runs/voc_animals")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--output_dir", type=Path, default=Path("predictions"), help="folder of the results")
    parser.add_argument("--scales", type=float, nargs="+", help="scales to use (default: those of the model)")
    parser.add_argument("--flip", action="store_true", help="also use the mirrored image at every scale")
    parser.add_argument("--crf", action="store_true", help="refine the result with DenseCRF (extra `crf`)")
    return parser.parse_args(argv)


def read_image(path: Path) -> Image.Image:
    """An image as the model sees it, upright and in colour; [`ValueError`] says what is wrong with it."""
    if not path.is_file():
        raise ValueError(f"There is no image {path}; check the path.")
    try:
        return open_image(path)
    except ValueError as error:
        raise ValueError(f"The image {path} cannot be decoded; give a valid JPEG, PNG or the like.") from error


def check_arguments(args: argparse.Namespace) -> None:
    """Find every mistake before the model is loaded and anything is written."""
    if not (args.run / "config.json").is_file():
        raise ValueError(f"{args.run} holds no trained model (no config.json); give the folder of a finished run.")
    if args.scales is not None and not all(0 < scale < math.inf for scale in args.scales):
        raise ValueError(f"The scales {args.scales} are not all positive numbers; give factors such as 1.0 1.25 1.5.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"{args.output_dir} is a file; give a folder for the results.")
    seen = {}
    for path in args.images:
        read_image(path)
        if path.stem in seen:
            raise ValueError(f"{seen[path.stem]} and {path} would write the same results; segment them separately.")
        seen[path.stem] = path


def predict(args: argparse.Namespace) -> None:
    """Segment every image and write its results."""
    check_arguments(args)
    crf = DenseCRF() if args.crf else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, processor = load_model_folder(args.run)
    model = model.to(device).eval()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for path in args.images:
        image = read_image(path)
        scales = args.scales and tuple(args.scales)
        [segmented] = segment_images(model, processor, [image], scales=scales, flip=args.flip, crf=crf)
        label_map = segmented.label_map.cpu().numpy()
        mask_path = args.output_dir / f"{path.stem}_mask.png"
        overlay_path = args.output_dir / f"{path.stem}_overlay.png"
        for drawn, target in ((palette_image(label_map), mask_path), (overlay(image, label_map), overlay_path)):
            replace_file(target, functools.partial(drawn.save, format="PNG"))
        ids, counts = np.unique(label_map, return_counts=True)
        found = (
            f"{model.config.id2label[int(i)]} {100 * n / label_map.size:.1f} %"
            for i, n in zip(ids, counts, strict=True)
        )
        print(f"{path}: {', '.join(found)} -> {mask_path}, {overlay_path}")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(predict, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
