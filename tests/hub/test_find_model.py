"""Models named by their Hub id, in the scripts that take a model."""

import subprocess
import sys
from pathlib import Path

import pytest
from hub_client import client_environment


ROOT = Path(__file__).resolve().parents[2]


def find(hub, home: Path, name: str, token: str | None = "hf_guest", **changes: str) -> tuple[str, float]:
    """What `find_model_folder` answers in a process of its own, and the seconds it took once imported."""
    code = f"""
import time
from synernet_hf.model_folder import load_model_folder
started = time.perf_counter()
try:
    model, processor = load_model_folder({name!r})
    print(type(model).__name__, type(processor).__name__)
except ValueError as error:
    print(error)
print(time.perf_counter() - started)
"""
    environment = client_environment(hub, home, token, **changes)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer, seconds = done.stdout.strip().splitlines()
    return answer, float(seconds)


def test_a_model_is_found_by_its_id_and_kept(hub, pushed, tmp_path):
    start = len(hub.requests)
    assert find(hub, tmp_path, pushed)[0] == "SynerNetForWeaklySupervisedSegmentation SynerNetImageProcessor"
    fetched = {path.rsplit("/", 1)[-1] for method, path, _ in hub.requests[start:] if "/resolve/" in path}
    assert "model.safetensors" in fetched and not any(name.endswith(".py") for name in fetched)
    # from then on without network
    for changes in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        assert find(hub, tmp_path, pushed, **changes)[0].startswith("SynerNetFor")


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("owner/nowhere", {}, "owner/nowhere: no such folder, and no such model on the Hub, or a private one"),
        ("owner/nowhere", {"HF_HUB_OFFLINE": "1"}, "owner/nowhere: no such folder, and the Hub cannot be reached"),
        ("owner/nowhere", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "and the Hub cannot be reached ([Errno 111]"),
        ("owner/nowhere", {"HF_ENDPOINT": "http://no.such.host.invalid"}, "and the Hub cannot be reached ("),
    ],
)
def test_a_wrong_id_is_told_quickly(hub, tmp_path, name, changes, told):
    answer, seconds = find(hub, tmp_path, name, **changes)
    assert told in answer
    assert seconds < 10


def test_the_prediction_script_takes_an_id(hub, pushed, tiny_run_folder, tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "predict.py"), pushed, str(tiny_run_folder / "image.png")]
    done = subprocess.run(
        command, env=client_environment(hub, tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "predictions" / "image_mask.png").is_file()
