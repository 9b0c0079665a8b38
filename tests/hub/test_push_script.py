"""`synernet push` against the loopback hub."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_client import client_environment
from hub_repos import validate_card
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from synernet_hf import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.commands import main
from synernet_hf.commands.push import without_projection_head
from synernet_hf.model_card import SynerNetModelCardData, generate_model_card


SCORES = {"mean_iou": 0.5, "mean_iou_present": 0.5, "recall": 0.6, "precision": 0.7, "num_images": 3}


@pytest.fixture(scope="module")
def run_folder(tiny_run_folder) -> Path:
    """The tiny run with a card and what a training leaves beside it."""
    settings = {
        "backbone": "./weights/encoder",
        "dataset": "shapes",
        "per_device_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "crop_size": 32,
        "seed": 0,
    }
    card = generate_model_card(
        SynerNetModelCardData(
            model_name="tiny",
            settings=settings,
            class_names=["background", "cat", "dog"],
            num_train=4,
            steps=2,
            minutes=0.1,
            num_processes=1,
            precision="no",
            hardware="cpu",
            versions={"torch": "2.13.0"},
            results={"segmentation": SCORES | {"per_class_iou": {"background": 0.9, "cat": 0.1, "dog": None}}},
            images="images.png",
            num_images=3,
        )
    )
    card.save(tiny_run_folder / "README.md")
    (tiny_run_folder / "images.png").write_bytes((tiny_run_folder / "image.png").read_bytes())
    (tiny_run_folder / "training_args.json").write_text(json.dumps({"data_dir": "a/private/folder"}))
    return tiny_run_folder


def run_script(hub, home: Path, *words: str, token: str = "hf_owner", **changes: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "synernet_hf", "push", *words],
        env=client_environment(hub, home, token, **changes),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_one_commit_holds_weights_processor_code_and_card(hub, run_folder, tmp_path):
    words = [str(run_folder), "owner/one_commit", "--license", "apache-2.0", "--message", "First release"]
    done = run_script(hub, tmp_path, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"MiB are at {hub.endpoint}/owner/one_commit/commit/" in done.stdout
    repo = hub.repos["models", "owner/one_commit"]
    commit = repo.commit_at("main")
    assert [repo.commits[oid].title for oid in repo.commits] == ["initial commit", "First release"]
    code = {
        path.name
        for path in (Path(__file__).resolve().parents[2] / "src" / "synernet_hf" / "model").glob("*_synernet.py")
    }
    others = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "images.png"}
    assert set(commit.files) == code | others | {".gitattributes"}
    assert commit.files["model.safetensors"].sha256 == _sha256(run_folder / "model.safetensors")

    text = commit.files["README.md"].path.read_text(encoding="utf-8")
    assert validate_card(text) == ([], [])
    card = ModelCard(text)
    assert card.data.license == "apache-2.0"
    assert "- Weights: apache-2.0. They start from a local encoder (encoder)" in card.text
    assert 'name = "owner/one_commit"' in card.text
    assert "](images.png)" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [0.5]


def test_private_branch_inference_only_form_and_pull_request(hub, run_folder, tmp_path):
    repo_id = "owner/inference_only"
    words = ["--private", "--revision", "small", "--no_projection_head", "--no_images"]
    done = run_script(hub, tmp_path, str(run_folder), repo_id, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    repo = hub.repos["models", repo_id]
    assert repo.private
    assert set(repo.commit_at("main").files) == {".gitattributes"}
    files = repo.commit_at("small").files
    names = set(load_file(files["model.safetensors"].path))
    assert names
    assert not any("projection_head" in name or "prototypes" in name for name in names)
    assert json.loads(files["config.json"].path.read_text())["with_projection_head"] is False
    assert "images.png" not in files
    assert "](images.png)" not in files["README.md"].path.read_text(encoding="utf-8")

    repo.private = False
    done = run_script(hub, tmp_path, str(run_folder), repo_id, "--create_pr", token="hf_guest")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{hub.endpoint}/{repo_id}/discussions/1" in done.stdout
    assert repo.commit_at("refs/pr/1").author == "guest"
    assert set(repo.commit_at("main").files) == {".gitattributes"}


def test_private_refuses_a_public_repository(hub, run_folder, tmp_path):
    repo_id = "owner/public_already"
    assert run_script(hub, tmp_path, str(run_folder), repo_id).returncode == 0
    commits = len(hub.repos["models", repo_id].commits)
    done = run_script(hub, tmp_path, str(run_folder), repo_id, "--private", "--revision", "secret")
    assert done.returncode == 2
    assert "owner/public_already is public already" in done.stderr and "Nothing was pushed" in done.stderr
    repo = hub.repos["models", repo_id]
    assert len(repo.commits) == commits and "refs/heads/secret" not in repo.refs


def test_the_inference_only_form_gives_the_same_logits(tiny_run_folder):
    model = AutoModelForSemanticSegmentation.from_pretrained(tiny_run_folder)
    smaller = without_projection_head(model)
    assert isinstance(smaller, SynerNetForWeaklySupervisedSegmentation)
    pixel_values = torch.randn(1, 3, 40, 33, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(smaller(pixel_values).logits, model(pixel_values).logits)
    assert model.config.with_projection_head
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


def test_mistakes_are_told_in_one_sentence(hub, run_folder, tmp_path):
    done = run_script(hub, tmp_path, str(run_folder), "owner/refused", token="hf_expired")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "Invalid credentials" in done.stderr
    assert "Traceback" not in done.stderr
    for changes, told in (
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "error: The Hub cannot be reached ([Errno 111]"),
        ({"HF_HUB_OFFLINE": "1"}, "offline mode is enabled"),
    ):
        done = run_script(hub, tmp_path, str(run_folder), "owner/refused", **changes)
        assert done.returncode == 2
        assert told in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr
    assert main(["push", str(tmp_path / "nothing"), "owner/refused"]) == 2
    assert ("models", "owner/refused") not in hub.repos


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_space_that_shows_the_model(hub, run_folder, tmp_path):
    done = run_script(hub, tmp_path, str(run_folder), "owner/shown", "--space", "owner/page", "--private")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"is at {hub.endpoint}/spaces/owner/page/commit/" in done.stdout
    repo = hub.repos["spaces", "owner/page"]
    files = repo.commit_at("main").files
    assert repo.private and repo.owner == "owner"
    assert {
        "app.py",
        "analysis.py",
        "requirements.txt",
        "examples/image.png",
        "synernet_hf/review_template.html",
    } <= set(files)
    assert not [name for name in files if "__pycache__" in name or name.endswith(".safetensors")]
    data = ModelCard.load(files["README.md"].path).data
    assert data.models == ["owner/shown"] and data.sdk == "gradio" and data.app_file == "app.py"
