"""`synernet predict`: what it takes for images, what it calls its results, and what it says of mistakes."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from synernet_hf.commands import main


ROOT = Path(__file__).resolve().parents[1]
# hides packages as if they were not installed
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else super().find_spec(name, path, target)

sys.meta_path[:] = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
"""
EXTRAS = set("accelerate datasets evaluate kornia pycocotools pyarrow pandas tensorboard trackio".split())
EXTRAS |= set("pydensecrf onnx onnxruntime onnxscript torchao gradio".split())


def draw(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """`photos/` with images of any spelling, files that are none, and hidden ones."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(
        ("a.png", "b.JPG", "sub/a.png", "sub/été 1.png", ".hidden.png", ".cache/c.png", "@eaDir/a.png")
    ):
        draw(tmp_path / "photos" / name, number)
    for name in ("notes.txt", "report.pdf"):
        (tmp_path / "photos" / name).write_text("none")
    return tmp_path / "photos"


def predict(*words) -> int:
    return main(["predict", *map(str, words)])


def masks(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*_mask.png")}


def test_a_folder_is_predicted_with_its_subfolders(tiny_run_folder, photos, capsys):
    assert predict(tiny_run_folder, photos, "--output_dir", "out") == 0
    assert masks(Path("out")) == {"a_mask.png", "b_mask.png", "sub/a_mask.png", "sub/été 1_mask.png"}
    assert capsys.readouterr().out.count(" -> ") == 4
    with Image.open("out/sub/a_overlay.png") as overlay:
        # the image, and below it the legend
        assert overlay.width >= 32 and overlay.height >= 24


def test_earlier_results_in_the_folder_are_no_images(tiny_run_folder, photos):
    for _ in range(2):
        assert predict(tiny_run_folder, "photos", "--output_dir", "photos/out") == 0
    assert len(masks(photos / "out")) == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["photos/*.png"], {"a_mask.png"}),
        (["photos/**/a.*"], {"a_mask.png", "sub/a_mask.png"}),
        (["photos/a.png", "photos/a.png"], {"a_mask.png"}),
        (["photos/a.png", "photos/sub/été 1.png"], {"a_mask.png", "été 1_mask.png"}),
    ],
)
def test_patterns_and_files(tiny_run_folder, photos, words, expected):
    assert predict(tiny_run_folder, *words, "--output_dir", "out") == 0
    assert masks(Path("out")) == expected


def test_files_of_one_stem_keep_their_suffix(tiny_run_folder, photos):
    draw(photos / "A.bmp", 7)
    assert predict(tiny_run_folder, photos, "--output_dir", "out") == 0
    assert masks(Path("out")) == {
        "A.bmp_mask.png",
        "a.png_mask.png",
        "b_mask.png",
        "sub/a_mask.png",
        "sub/été 1_mask.png",
    }
    shutil.rmtree("out")
    assert predict(tiny_run_folder, "photos/a.png", "photos/A.bmp", "--output_dir", "out") == 0
    assert masks(Path("out")) == {"A.bmp_mask.png", "a.png_mask.png"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["photos/nothing.png"], "There is no image photos/nothing.png"),
        (["photos/*.webp"], "photos/*.webp holds no image"),
        (["photos/empty"], "photos/empty holds no image"),
        (["photos/a.png", "photos/sub/a.png"], "would write the same results"),
        (["photos/notes.txt"], "photos/notes.txt cannot be decoded"),
        (["photos/a.png", "--scales", "0"], "not all positive"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tiny_run_folder, photos, capsys, words, told):
    (photos / "empty").mkdir()
    assert predict(tiny_run_folder, *words, "--output_dir", "out") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and told in errors and errors.count("\n") == 1
    assert not Path("out").exists()


def test_a_wrong_model_is_told_first(photos, capsys):
    assert predict("photo", photos) == 2
    assert "error: photo: no such folder; did you mean photos?" in capsys.readouterr().err
    assert predict(photos, photos) == 2
    assert "photos holds no trained model (no config.json)" in capsys.readouterr().err


def test_of_a_folder_what_does_not_decode_is_left_out_and_counted(tiny_run_folder, photos, capsys):
    (photos / "broken.png").write_bytes(b"no image")
    assert predict(tiny_run_folder, photos, "--output_dir", "out") == 2
    assert len(masks(Path("out"))) == 4
    errors = capsys.readouterr().err
    assert "left out: The image" in errors and "1 of 5 images cannot be decoded" in errors.splitlines()[-1]


def test_inference_needs_no_extra(tiny_run_folder, photos):
    code = (
        HIDE.format(hidden=EXTRAS)
        + f"""
from transformers import pipeline
import synernet_hf
from synernet_hf.commands import main
from synernet_hf.export import export_onnx, quantize_weights
from synernet_hf.metrics import MeanIoU
from synernet_hf.model_card import generate_model_card
from synernet_hf.model_folder import load_model_folder
from synernet_hf.visualization import figure_panels

status = main(["predict", {str(tiny_run_folder)!r}, "photos", "--output_dir", "out"])
assert status == 0, status
segmenter = pipeline("weakly-supervised-segmentation", model={str(tiny_run_folder)!r})
assert segmenter("photos/a.png", image_labels="predicted")
model, _ = load_model_folder({str(tiny_run_folder)!r})
for function, extra in ((lambda: export_onnx(model, "m.onnx"), "onnx"), (lambda: quantize_weights(model), "int8")):
    try:
        function()
    except ImportError as error:
        assert f'pip install -e ".[{{extra}}]"' in str(error), error
    else:
        raise AssertionError(extra)
status = main(["predict", {str(tiny_run_folder)!r}, "photos", "--crf", "--output_dir", "crf"])
assert status == 2, status
for module in ("data", "training", "pseudo_labels"):
    try:
        __import__(f"synernet_hf.{{module}}")
    except ModuleNotFoundError as error:
        assert 'is not installed: install the extra `train` of synernet_hf' in str(error), error
    else:
        raise AssertionError(module)
assert not set(sys.modules) & {EXTRAS!r}
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'pip install -e ".[crf]"' in done.stderr
    assert len(masks(Path("out"))) == 4
