"""A training of four steps on a few 32-pixel images, and what is compared of it."""

import json
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from testing_utils import TRAINED_MODEL as MODEL

from synernet_hf import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.training import DataArguments, ModelArguments, SynerNetTrainingArguments, engine, train


DATA = {"dataset": "shapes", "dataset_options": {"num_train": 6, "num_validation": 2, "image_size": 32}}
TRAINING = {
    "max_steps": 4,
    "crop_size": 32,
    "per_device_batch_size": 2,
    "learning_rate": 1e-3,
    "eval_steps": 4,
    "save_steps": 2,
    "save_total_limit": None,
    "logging_steps": 1,
    "report_to": "none",
}


def run(folder: Path, model=None, data=None, **training) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return train(
        ModelArguments(**(MODEL | (model or {}))),
        DataArguments(**({"num_workers": 0} | DATA | (data or {}))),
        SynerNetTrainingArguments(**(TRAINING | {"output_dir": str(folder)} | training)),
    )


def state_of(folder: Path) -> dict:
    return json.loads((folder / "trainer_state.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model folder or of a checkpoint; the two name the encoder's weights differently on disk."""
    if (folder / "config.json").exists():
        return SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder).state_dict()
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one: Path, other: Path):
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name}: {(first[name] - second[name]).abs().max():.1e}"
    print(f"{one.name} and {other.name}: {len(first)} tensors bit-equal")


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def stop_at(monkeypatch, passes: int, action):
    """Calls `action` in place of the forward pass number `passes`, counted from 0."""
    original, count = engine.train_step, iter(range(10**6))

    def step(*args):
        if next(count) == passes:
            return action(original, *args)
        return original(*args)

    monkeypatch.setattr(engine, "train_step", step)
