"""Writes a tiny SynerNet with random weights, for tests, documentation and trying things out.

    python scripts/make_tiny_checkpoint.py runs/tiny

The folder holds model, config and image processor, about 300 kB; `synernet predict` reads it like any other. What
it predicts is meaningless.
"""

import argparse
import sys
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, run_command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("out", type=Path, help="new folder for the model")
    parser.add_argument("--class_names", nargs="+", default=["cat", "dog"], help="foreground classes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import torch
from convert_timm_vit_to_hf import save_checked
from transformers import ViTConfig

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor


def make_tiny_model(class_names: list[str], seed: int = 0) -> SynerNetForWeaklySupervisedSegmentation:
    """
    A SynerNet of two layers, width 32 and patch 8.

    Args:
        class_names (`list[str]`): Foreground classes, without the background.
        seed (`int`, *optional*, defaults to 0): Seed of the random weights.

    Returns:
        [`SynerNetForWeaklySupervisedSegmentation`], in evaluation mode.
    """
    torch.manual_seed(seed)
    backbone = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    config = SynerNetConfig(
        backbone_config=backbone,
        id2label=dict(enumerate(["background", *class_names])),
        auxiliary_layer_index=-2,
        decoder_hidden_size=16,
        projection_hidden_size=32,
        projection_bottleneck_size=16,
        prototype_size=32,
    )
    return SynerNetForWeaklySupervisedSegmentation(config).eval()


def make(args: argparse.Namespace) -> None:
    """Draws and writes the model."""
    model = make_tiny_model(args.class_names, args.seed)
    save_checked(model, model.state_dict(), args.out, SynerNetImageProcessor(size_divisor=model.config.patch_size))
    print(f"{sum(parameter.numel() for parameter in model.parameters())} random weights in {args.out}")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(make, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
