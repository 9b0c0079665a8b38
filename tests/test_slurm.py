"""examples/slurm.sbatch, run by bash with stand-ins for Slurm's commands, and for torchrun but in one test."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from testing_utils import TRAINED_MODEL as MODEL
from training_utils import DATA, TRAINING, assert_equal_weights, run

from synernet_hf.training.checkpoints import list_checkpoints


SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
while [ "${1#--}" != "$1" ]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
[ "$1" = requeue ] || printf 'node7\\nnode8\\n'
"""
# ends by itself where it resumes or is to fail; else at SIGTERM, once a checkpoint is saved, as torchrun does
TORCHRUN = """#!/usr/bin/env bash
[ -z "$FAILS" ] || exit 1
mkdir -p "$FOLDER"
touch "$FOLDER/training_args.json"
[ "${*#*latest}" = "$*" ] || exit 0
trap 'sleep 0.3; touch "$FOLDER/saved"; exit "${ENDS_WITH:-1}"' TERM
touch "$FOLDER/training"
while :; do sleep 0.05; done
"""


@pytest.fixture
def start(root, tmp_path):
    """Runs the script until it ends, or sends it SIGTERM once a file is there; returns status and calls."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN}.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    calls = tmp_path / "calls"

    def started(*words, until: Path | None = None, **variables):
        calls.write_text("")
        environment = os.environ | {
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
        }
        environment |= {"PATH": f"{commands}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": ""} | variables
        script = subprocess.Popen(["bash", "examples/slurm.sbatch", *words], cwd=root, env=environment)
        while until is not None and not until.exists() and script.poll() is None:
            time.sleep(0.02)
        if until is not None:
            script.send_signal(signal.SIGTERM)
        return script.wait(300), calls.read_text()

    return started


def test_a_job_whose_time_is_over_is_requeued_and_resumes(start, tmp_path):
    folder = tmp_path / "a run"
    status, calls = start(str(folder), "--seed", "3", until=folder / "training", FOLDER=str(folder))
    assert status == 1 and (folder / "saved").exists()
    assert "--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id 12345 --rdzv_endpoint node7:22345 " in calls
    assert f"examples/train.py --seed 3 --output_dir {folder}\n" in calls
    assert calls.endswith("scontrol requeue 12345\n")
    # the lock of a machine that was lost goes with the job's second start, that of another run stays
    (folder / ".lock").touch()
    status, calls = start(str(folder), "--seed", "3", FOLDER=str(folder))
    assert status == 0 and (folder / ".lock").exists()
    status, calls = start(str(folder), "--seed", "3", FOLDER=str(folder), SLURM_RESTART_COUNT="1")
    assert not (folder / ".lock").exists()
    assert status == 0 and f"--output_dir {folder} --resume_from_checkpoint latest\n" in calls
    assert "requeue" not in calls


def test_a_job_that_fails_or_ends_by_itself_is_not_requeued(start, tmp_path):
    folder = tmp_path / "run"
    status, calls = start(str(folder), FAILS="yes", FOLDER=str(folder))
    assert status == 1 and "requeue" not in calls
    # the signal came amid the last step
    status, calls = start(str(folder), until=folder / "training", FOLDER=str(folder), ENDS_WITH="0")
    assert status == 0 and (folder / "saved").exists() and "requeue" not in calls
    status, calls = start("--config", "recipe.yaml")
    assert status == 2 and not calls


@pytest.mark.slow
@pytest.mark.resume
def test_a_requeued_training_equals_an_undisturbed_one(start, root, tmp_path):
    folder = tmp_path / "run"
    shutil.copy(shutil.which("torchrun", path=Path(sys.executable).parent), tmp_path / "bin" / "torchrun")
    (tmp_path / "bin" / "scontrol").write_text("#!/usr/bin/env bash\necho localhost\n")
    settings = MODEL | DATA | TRAINING | {"num_workers": 0, "max_steps": 40, "save_steps": 2, "save_total_limit": 2}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings | {"eval_steps": 40}))
    variables = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root / "src"), "SLURM_JOB_NUM_NODES": "1"}
    words = [str(folder), "--config", str(tmp_path / "recipe.yaml")]
    status, _ = start(*words, until=folder / "checkpoint-2", **variables)
    assert status == 1
    last = list_checkpoints(folder)[-1]
    print(f"SIGTERM after checkpoint-2, {last.name} is the last one")
    assert not (folder / "model.safetensors").exists()
    status, _ = start(*words, **variables)
    assert status == 0
    run(tmp_path / "straight", data={"num_workers": 0}, max_steps=40, save_steps=40, eval_steps=40)
    assert_equal_weights(tmp_path / "straight", folder)
