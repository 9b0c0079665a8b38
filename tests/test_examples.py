"""The scripts under examples/ answer to --help and say what is wrong in one sentence before doing any work."""

import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import SynerNetModelTester

from synernet_hf import SynerNetImageProcessor
from synernet_hf.commands import demo
from synernet_hf.visualization import colorize, heat_map


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
RECIPES = sorted((ROOT / "src" / "synernet_hf" / "recipes").glob("*.yaml"))


def run_script(name: str, *words: str, capsys, monkeypatch) -> tuple[int, str, str]:
    """Run a script in this process as `python examples/NAME WORDS`; its exit status, output and errors."""
    monkeypatch.setattr(sys, "argv", [name, *words])
    with pytest.raises(SystemExit) as finished:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    output = capsys.readouterr()
    return finished.value.code or 0, output.out, output.err


def assert_refused(result: tuple[int, str, str], *words: str) -> None:
    """The script ended with status 2 and one complaint that names `words`, without a traceback."""
    status, _, errors = result
    assert status == 2
    assert "Traceback" not in errors
    complaints = [line for line in errors.splitlines() if "error:" in line]
    assert len(complaints) == 1, errors
    for word in words:
        assert word in complaints[0]


def test_train_help_in_a_process_of_its_own():
    command = [sys.executable, str(EXAMPLES / "train.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for option in ("--config", "--data_dir", "--image_labels", "--backbone", "--output_dir", "--max_steps"):
        assert option in done.stdout


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "train.py"])
def test_help(script, capsys, monkeypatch):
    status, output, _ = run_script(script, "--help", capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0
    assert "usage:" in output


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_read(recipe):
    from synernet_hf.training import parse_arguments

    _, data_args, training_args = parse_arguments(["--config", str(recipe), "--output_dir", "run"])
    assert data_args.dataset
    assert training_args.problems() == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config", "no_such_recipe.yaml"], ["no_such_recipe.yaml"]),
        (["--dataset", "shapes", "--no_such_option", "1"], ["--no_such_option"]),
        (["--max_steps", "many"], ["--max_steps", "many"]),
        (["--dataset_options", "[1"], ["dataset_options"]),
    ],
    ids=["recipe", "option", "number", "mapping"],
)
def test_train_refuses_bad_options(words, expected, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_script("train.py", *words, capsys=capsys, monkeypatch=monkeypatch), *expected)
    assert not any(tmp_path.iterdir())


def test_train_refuses_an_unknown_key_of_a_recipe(capsys, monkeypatch, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("dataset: shapes\nmax_step: 3\n")
    result = run_script("train.py", "--config", str(recipe), capsys=capsys, monkeypatch=monkeypatch)
    assert_refused(result, "max_step", "mine.yaml")


@pytest.mark.parametrize("script", ["evaluate.py", "predict.py"])
def test_a_folder_without_a_model_is_refused(script, capsys, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    image = tmp_path / "image.png"
    image.touch()
    words = [str(tmp_path / "empty"), str(image)][: 1 if script == "evaluate.py" else 2]
    result = run_script(script, *words, capsys=capsys, monkeypatch=monkeypatch)
    assert_refused(result, str(tmp_path / "empty"), "config.json")


@pytest.mark.parametrize("script", ["prepare_data.py", "pseudo_labels.py"])
def test_scripts_that_open_every_image_anyway_offer_no_check(script, capsys, monkeypatch):
    words = ["run", "--output", "out"] if script == "pseudo_labels.py" else []
    result = run_script(script, *words, "--no_check_data", capsys=capsys, monkeypatch=monkeypatch)
    assert_refused(result, "--no_check_data")


def test_demo_never_removes_a_folder_that_is_no_run(capsys, monkeypatch, tmp_path):
    keepsake = tmp_path / "keepsake.txt"
    keepsake.write_text("keep")
    result = run_script("demo.py", "--output_dir", str(tmp_path), capsys=capsys, monkeypatch=monkeypatch)
    assert_refused(result, str(tmp_path), "--output_dir")
    assert keepsake.read_text() == "keep"


def test_predict_writes_a_mask_and_an_overlay(tiny_run_folder, capsys, monkeypatch, tmp_path):
    words = [str(tiny_run_folder), str(tiny_run_folder / "image.png"), "--output_dir", str(tmp_path)]
    status, output, errors = run_script("predict.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, errors
    with Image.open(tmp_path / "image_mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (64, 48))
        assert set(np.unique(mask)) <= {0, 1, 2}
    with Image.open(tmp_path / "image_overlay.png") as overlay:
        # below the image there is a legend of the classes it shows
        assert overlay.width >= 64 and (overlay.height > 48) == bool(
            set(np.unique(Image.open(tmp_path / "image_mask.png"))) - {0}
        )
    assert str(tmp_path / "image_mask.png") in output


def test_the_figure_of_the_demo_names_its_colours():
    legend = demo.legend(["background", "dots"], 30)
    assert [name for name, _ in legend] == ["background", "dots", "undecided", "low", "high"]
    assert all(np.asarray(swatch).shape == (14, 30, 3) for _, swatch in legend)
    assert len({np.asarray(swatch).tobytes() for _, swatch in legend}) == 5


def test_the_demo_draws_what_the_model_makes_of_an_image(tmp_path):
    model = SynerNetModelTester().model()
    deep = np.linspace(0, 65535, 40 * 56).reshape(40, 56).astype(np.uint16)
    record = {"image": Image.fromarray(deep), "mask": np.zeros((40, 56), dtype=np.uint8), "labels": [0, 2]}
    native = SynerNetImageProcessor(size_divisor=8)
    panels = demo.panels_of(model, native, record)
    assert [title for title, _ in panels] == [
        "image",
        "ground truth",
        "CAM, broad branch",
        "CAM, precise branch",
        "confidence",
        "fused pseudo-label",
        "segmentation",
    ]
    # all shades of a 16-bit image are there
    grey = (deep >> 8).astype(np.uint8)
    assert np.array_equal(np.asarray(panels[0][1]), np.stack([grey] * 3, axis=-1))
    pixel_values = native(np.asarray(panels[0][1]), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        taught = model(pixel_values, labels=torch.tensor([[1.0, 0.0, 1.0]]), loss_weights={"segmentation": 1.0})
        logits = model.multi_scale_logits(pixel_values)
    for (_, panel), expected in zip(
        panels[2:],
        (
            heat_map(taught.broad_cams[0].amax(dim=0).numpy(), panels[0][1]),
            heat_map(taught.precise_cams[0].amax(dim=0).numpy(), panels[0][1]),
            heat_map(taught.confidence[0, 0].numpy()),
            colorize(taught.pseudo_labels[0].numpy()),
            colorize(logits[0].argmax(dim=0).numpy()),
        ),
        strict=True,
    ):
        assert np.array_equal(np.asarray(panel), np.asarray(expected))
    # padding is no part of the figure, and a processor that resizes leaves the image as it is
    padding = SynerNetImageProcessor(do_pad=True, size_divisor=64)
    for (title, panel), (_, other) in zip(panels, demo.panels_of(model, padding, record), strict=True):
        assert np.array_equal(np.asarray(panel), np.asarray(other)), title
    resizing = demo.panels_of(model, SynerNetImageProcessor(do_resize=True, size={"shortest_edge": 24}), record)
    assert [panel.size for _, panel in resizing if panel.size != (33, 24)] == [(56, 40)] * 5

    demo.predict_one(model, native, record, tmp_path)
    with Image.open(tmp_path / "image.png") as saved:
        assert np.array_equal(np.asarray(saved), np.asarray(panels[0][1]))


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, os.kill),
        pytest.param(signal.SIGINT, os.kill, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.slow),
        (signal.SIGINT, os.killpg),
    ],
)
def test_a_demo_that_is_ended_ends_its_training(tmp_path, number, send):
    options = ["--dataset_options", "{num_train: 32, num_validation: 4}", "--num_workers", "1", "--save_steps", "1"]
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--output_dir", str(tmp_path / "demo"), *options]
    # a shell's background jobs ignore Ctrl-C, and so would all that this test starts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    # a group of its own, which holds the demo, the training and its loader
    demo = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 120
    while not list(tmp_path.glob("demo/checkpoint-?")) and time.monotonic() < limit:
        time.sleep(0.1)
    send(demo.pid, number)
    # ends only when the training has closed the pipe too
    output, _ = demo.communicate(timeout=60)
    status, word = (143, "Terminated") if number == signal.SIGTERM else (130, "Interrupted")
    assert demo.returncode == status, output
    assert f"error: {word} after step" in output and "Traceback" not in output
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path):
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--output_dir", str(tmp_path / "demo"), "--max_steps", "8"]
    command += ["--num_images", "2", "--dataset_options", "{num_train: 32, num_validation: 4}"]
    for attempt in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("Removing the earlier run" in done.stdout) == bool(attempt)
        for line in ("segmentation, one scale", "B-CAM", "P-CAM", "single-scale CAM", "background only"):
            assert line in done.stdout
        assert (tmp_path / "demo" / "figure.png").is_file()
        assert (tmp_path / "demo" / "model.safetensors").is_file()
