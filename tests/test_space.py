"""The page of examples/space: what it computes and how its errors read, and the page itself in a browser."""

import csv
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import RepoCard
from PIL import Image

from synernet_hf.model_folder import load_model_folder
from synernet_hf.pseudo_labels import PseudoLabeler, PseudoLabelOptions


ROOT = Path(__file__).resolve().parents[1]
SPACE = ROOT / "examples" / "space"
sys.path.insert(0, str(SPACE))

import analysis  # noqa: E402


@pytest.fixture
def settings(tiny_run_folder):
    config = analysis.load(str(tiny_run_folder))[0].config
    names = ("low_threshold", "high_threshold", "class_prior_weight", "fusion")
    return analysis.Settings((1.0,), False, *(getattr(config, name) for name in names))


def spoilt(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    (folder / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:1000])
    return folder


def test_an_image_is_looked_into(tiny_run_folder, settings):
    image = Image.open(tiny_run_folder / "image.png")
    seen = analysis.analyse(str(tiny_run_folder), image, ["dog"], settings)
    assert seen.note == "Classes as ticked: dog." and set(seen.shares) <= {"dog", "undecided"}
    titles = ["B-CAM", "P-CAM", "Agreement", "Confidence", "Fused", "Segmentation"]
    assert [title.split()[0] for title, _ in seen.panels] == titles
    assert {map_.size for _, map_ in seen.panels} == {image.size}
    # of the segmentation
    alpha = np.asarray(seen.panels[-1][1])[..., 3]
    assert (alpha > 0).mean() == pytest.approx(seen.shares.get("dog", (0, 0))[1])
    text = analysis.page([analysis.Analysis(**{**vars(seen), "name": "<b>"}), seen])
    assert text.count("<figure>") == 14 and "<h3>&lt;b&gt;</h3>" in text


def test_settings_change_one_image_alone(tiny_run_folder, settings):
    config = analysis.load(str(tiny_run_folder))[0].config
    before = config.to_dict()
    image = Image.open(tiny_run_folder / "image.png")
    undecided = []
    for low, high in ((0.0, 1.0), (0.45, 0.5)):
        wanted = analysis.Settings((1.0,), False, low, high, 0.0, "fixed")
        label_map, _ = analysis.segment(str(tiny_run_folder), image, ["cat", "dog"], wanted, "pseudo-label")
        undecided.append((label_map == 255).mean())
    assert undecided[0] > undecided[1] and config.to_dict() == before
    with pytest.raises(ValueError, match=r"background threshold .0.8. must be below the class threshold .0.7."):
        analysis.Settings((1.0,), False, 0.8, 0.7, 0.0, "fixed")
    with pytest.raises(ValueError, match="tick at least one"):
        analysis.Settings((), False, 0.2, 0.7, 0.0, "fixed")


def test_nothing_found_is_told(tiny_run_folder, settings, monkeypatch):
    monkeypatch.setattr(analysis, "predict_labels", lambda *_: [torch.zeros(2)])
    seen = analysis.analyse(str(tiny_run_folder), Image.new("RGB", (32, 32)), [], settings)
    assert seen.note.startswith("Nothing found: the model sees none of its classes")


def test_files_and_checkpoints_that_cannot_be_used(tiny_run_folder, tmp_path, monkeypatch):
    (tmp_path / "notes.jpg").write_text("no image")
    with pytest.raises(ValueError, match="notes.jpg is no image that can be read: give a JPEG, PNG or WebP file."):
        analysis.open_upload(tmp_path / "notes.jpg")
    content = (tiny_run_folder / "image.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.png is damaged: save it again"):
        analysis.open_upload(tmp_path / "cut.png")
    monkeypatch.setattr(analysis, "MAX_MEGAPIXELS", 0.003)
    with pytest.raises(
        ValueError, match=r"image.png has 64x48 pixels, too many for this page, which takes 0.003 megapixels"
    ):
        analysis.open_upload(tiny_run_folder / "image.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image.png has more than 100 pixels, too many for this page"):
        analysis.open_upload(tiny_run_folder / "image.png")
    folder = spoilt(tiny_run_folder, tmp_path / "spoilt")
    with pytest.raises(ValueError, match=r"^The checkpoint .*spoilt cannot be loaded: [^\n]+$"):
        analysis.load(str(folder))
    assert analysis.problem(ValueError("<x>")) == '<p role="alert">&lt;x&gt;</p>'


def test_masks_of_many_images(tiny_run_folder, settings, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "other").mkdir()
    shutil.copy(tiny_run_folder / "image.png", tmp_path / "other" / "image.png")
    paths = [str(tiny_run_folder / "image.png"), str(tmp_path / "notes.txt"), str(tmp_path / "other" / "image.png")]
    archive, table, told = analysis.make_masks(str(tiny_run_folder), paths, ["cat"], settings, "pseudo-label")
    assert told.startswith("2 masks are in the archive. notes.txt is no image")
    with zipfile.ZipFile(archive) as file:
        names = set(file.namelist())
        with Image.open(file.open("masks/image.png.png")) as mask:
            label_map = np.array(mask)
    assert names == {"masks.csv", "coco.json", "yolo/data.yaml"} | {
        name for stem in ("image", "_image") for name in (f"masks/{stem}.png.png", f"yolo/labels/{stem}.txt")
    }
    model, processor = load_model_folder(tiny_run_folder)
    options = PseudoLabelOptions(scales=(1.0,), flip=False)
    expected, _ = PseudoLabeler(model, processor, options)(Image.open(paths[0]), [0])
    np.testing.assert_array_equal(label_map, expected)
    with open(table, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["image.png", "_image.png"]
    assert float(rows[0]["cat"]) == pytest.approx((expected == 1).mean(), abs=1e-4)
    assert sum(float(rows[0][name]) for name in ("background", "cat", "dog", "undecided")) == pytest.approx(
        1, abs=1e-3
    )
    with pytest.raises(ValueError, match="notes.txt is no image"):
        analysis.make_masks(str(tiny_run_folder), paths[1:2], [], settings, "segmentation")


def test_the_folder_is_a_space():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["train"]}
    listed = set((SPACE / "requirements.txt").read_text(encoding="utf-8").split("\n")) - {""}
    assert set(project["dependencies"]) <= listed <= known
    data = RepoCard.load(SPACE / "README.md").data
    assert data.sdk == "gradio" and (SPACE / data.app_file).is_file() and data.models == []
    [wanted] = project["optional-dependencies"]["demo"]
    assert int(data.sdk_version.split(".")[0]) >= int(re.search(r">=(\d+)", wanted)[1])


@pytest.fixture
def page(tiny_run_folder, tmp_path):
    """The page in a headless browser; its second model cannot be loaded."""
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Debian's chromium and chromium-driver are not installed")
    words = [str(tiny_run_folder), str(spoilt(tiny_run_folder, tmp_path / "spoilt")), "--port", "7899"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(SPACE / "app.py"), *words]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(word)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    browser = None
    try:
        for line in server.stdout:
            if "7899" in line:
                break
        assert server.poll() is None
        browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        browser.get("http://127.0.0.1:7899")
        yield browser
    finally:
        if browser is not None:
            browser.quit()
        server.terminate()
        server.wait(120)


def until(question, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            answer = question()
        except Exception:
            # elements come and go while the page is drawn
            answer = None
        if answer:
            return answer
        time.sleep(0.2)
    raise AssertionError("the page did not come to show this in time")


@pytest.mark.slow
def test_the_page_in_a_browser(page, tiny_run_folder, tmp_path):
    def all_of(selector):
        return page.find_elements("css selector", selector)

    def press(selector):
        element = all_of(selector)[0]
        page.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].click()", element)

    def shown(text, place="#result"):
        return until(lambda: text in all_of(place)[0].text)

    until(lambda: len(all_of("#classes input")) == 2)
    press("#run")
    shown("There is no image: drop one, or take an example.")
    # a file that is none
    (tmp_path / "notes.jpg").write_text("no image")
    all_of("#images input[type=file]")[0].send_keys(str(tmp_path / "notes.jpg"))
    until(lambda: ".jpg" in all_of("#images")[0].text)
    press("#run")
    shown("notes.jpg is no image that can be read")
    assert all_of("#result [role=alert]")
    # an image, one class ticked, by keyboard
    press("#images button[aria-label='Clear']")
    until(lambda: ".jpg" not in all_of("#images")[0].text)
    all_of("#images input[type=file]")[0].send_keys(str(tiny_run_folder / "image.png"))
    until(lambda: ".png" in all_of("#images")[0].text)
    all_of("#classes input")[1].send_keys(" ")
    all_of("#run")[0].send_keys("\n")
    shown("Classes as ticked: dog.")
    assert len(all_of("#result figure")) == 7
    # opacity and overlay act in the browser
    opacity = all_of("#opacity input[type=range]")[0]
    opacity.send_keys(*["\ue012"] * 4)
    until(lambda: page.execute_script("return document.documentElement.style.getPropertyValue('--map')") == "0.4")
    press("#overlay input")
    until(lambda: page.execute_script("return document.documentElement.style.getPropertyValue('--base')") == "0")
    # a second model that cannot be loaded
    page.execute_script("arguments[0].scrollIntoView({block: 'center'})", all_of("#other input")[0])
    all_of("#other input")[0].click()
    until(lambda: [item for item in all_of("[role=option]") if item.text.endswith("spoilt")])[0].click()
    press("#run")
    shown("spoilt cannot be loaded")
    # masks to take home
    page.execute_script(
        "[...document.querySelectorAll('button')].find(b => b.textContent.includes('Masks of all')).click()"
    )
    until(lambda: all_of("#batch") and all_of("#batch")[0].is_displayed())
    press("#batch")
    shown("1 masks are in the archive.", "#told")
    until(lambda: len(all_of("#masks a[download]")) >= 1)
    assert "masks.zip" in page.page_source and "masks.csv" in page.page_source
    # as wide as a phone, nothing sticks out
    page.set_window_size(500, 900)
    assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
