"""Disturbed trainings: what the soak compares, and a small one."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from testing_utils import load_script


def test_a_difference_in_any_file_is_named_and_times_are_none(tmp_path):
    script, one, other = load_script("soak"), tmp_path / "one", tmp_path / "other"
    for number in (10, 8):
        checkpoint = one / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        torch.save({"state": [torch.ones(2), (1, None)]}, checkpoint / "optimizer.bin")
        state = {"history": [{"step": number, "loss": 0.5}], "elapsed_seconds": 1.0, "digest": "a"}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    save_file({"weight": torch.ones(3)}, one / "model.safetensors")
    (one / "training_args.json").write_text("{}")
    shutil.copytree(one, other)
    (other / "training_args.json").write_text('{"output_dir": "other"}')
    path = other / "checkpoint-10" / "trainer_state.json"
    path.write_text(path.read_text().replace("1.0", "2.0").replace('"a"', '"b"'))
    # an older checkpoint may be gone
    shutil.rmtree(other / "checkpoint-8")
    assert script.differences(one, other) == []
    path.write_text(path.read_text().replace("0.5", "0.25"))
    torch.save({"state": [torch.ones(2), (1, 2)]}, other / "checkpoint-10" / "optimizer.bin")
    (other / "model.safetensors").unlink()
    found = ["checkpoint-10/optimizer.bin", "checkpoint-10/trainer_state.json", "model.safetensors"]
    assert sorted(script.differences(one, other)) == found


@pytest.mark.slow
@pytest.mark.resume
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_short_soak_ends_without_a_difference(root, tmp_path):
    words = "--kills 2 --kills_in_saves 1 --damages 1 --power_cuts 0 --num_workers 0".split()
    command = [sys.executable, str(root / "scripts" / "soak.py"), str(tmp_path / "soak"), *words]
    environment = os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"1 damaged checkpoints \(1 passed over\), 0 power cuts: [1-9]\d* runs finished, 0 failures", done.stdout
    )
