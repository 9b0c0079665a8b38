"""The scripts under examples/ answer to --help and say what is wrong in one sentence before doing any work."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))


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
    words = [str(tmp_path / "empty"), "image.png"][: 1 if script == "evaluate.py" else 2]
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
    from PIL import Image

    words = [str(tiny_run_folder), str(tiny_run_folder / "image.png"), "--output_dir", str(tmp_path)]
    status, output, errors = run_script("predict.py", *words, capsys=capsys, monkeypatch=monkeypatch)
    assert status == 0, errors
    with Image.open(tmp_path / "image_mask.png") as mask:
        assert (mask.mode, mask.size) == ("P", (64, 48))
        assert set(np.unique(mask)) <= {0, 1, 2}
    with Image.open(tmp_path / "image_overlay.png") as overlay:
        assert overlay.size == (64, 48)
    assert str(tmp_path / "image_mask.png") in output


def test_the_figure_of_the_demo_names_its_colours():
    legend = runpy.run_path(str(EXAMPLES / "demo.py"))["legend"](["background", "dots"], 30)
    assert [name for name, _ in legend] == ["background", "dots", "undecided", "low", "high"]
    assert all(np.asarray(swatch).shape == (14, 30, 3) for _, swatch in legend)
    assert len({np.asarray(swatch).tobytes() for _, swatch in legend}) == 5


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
