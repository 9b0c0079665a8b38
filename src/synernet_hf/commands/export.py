"""
Write a trained model as ONNX: one graph of its inference.

The graph takes `pixel_values`, float32 `(batch, 3, height, width)`, normalised, of any size, and gives `logits`
`(batch, num_labels, height, width)` of that size. `post_process_semantic_segmentation` of the image processor, with
`target_sizes`, makes label maps of the size of the image of them. It needs the extra `onnx`.
"""

import argparse
import sys
from pathlib import Path

from synernet_hf.cli import CommandParser
from synernet_hf.files import one_line


def make_parser() -> CommandParser:
    """It has no option of other formats."""
    parser = CommandParser(prog="synernet export", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="folder of a trained model, or its name on the Hub")
    parser.add_argument("--onnx", type=Path, required=True, metavar="OUT", help="the ONNX file to write")
    parser.add_argument(
        "--inference_branches", choices=("both", "broad", "precise"), default="both", help="encoders in the graph"
    )
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit accepted")
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and find its mistakes before anything is loaded."""
    args = make_parser().parse_args(argv)
    if args.onnx.is_dir():
        raise ValueError(f"{args.onnx} is a folder; name a file, such as {args.onnx / 'model.onnx'}.")
    return args


def run(args: argparse.Namespace) -> int:
    """Write the graph and print how far it is from the model; status 1 if that is too far."""
    from synernet_hf.export import export_onnx
    from synernet_hf.model_folder import load_model

    try:
        differences = export_onnx(load_model(args.model), args.onnx, args.inference_branches, args.tolerance)
    except RuntimeError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    for shape, difference in differences.items():
        print(f"pixel_values {shape}: logits differ by at most {difference:.1e}")
    print(f"{args.onnx}: {args.onnx.stat().st_size / 1e6:.1f} MB, inference_branches={args.inference_branches}")
    return 0


__all__ = ["make_parser", "read", "run"]
