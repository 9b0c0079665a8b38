"""Trained from image labels alone, the broad branch finds more of the objects and the precise one errs less."""

from pathlib import Path

import pytest

from synernet_hf.training import parse_arguments, train


RECIPES = Path(__file__).resolve().parents[2] / "src" / "synernet_hf" / "recipes"


@pytest.mark.slow
def test_branches_take_their_roles_on_shapes(tmp_path):
    words = ["--config", str(RECIPES / "tiny_cpu.yaml"), "--output_dir", str(tmp_path), "--max_steps", "250"]
    words += ["--eval_steps", "250", "--save_steps", "250", "--num_workers", "0", "--report_to", "none"]
    model_args, data_args, training_args = parse_arguments(words)
    # the default: the recipe gives the loss to both branches, which segment better and take no roles
    model_args.model_config["spatial_bce_branches"] = ["precise"]
    results = train(model_args, data_args, training_args)
    broad, precise = results["broad_cam"], results["precise_cam"]
    assert broad["foreground_recall"] > precise["foreground_recall"] + 0.05
    assert precise["foreground_precision"] > broad["foreground_precision"] + 0.05
    assert results["fused_cam"]["mean_iou"] > 0.5
