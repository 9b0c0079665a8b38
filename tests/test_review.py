"""Pseudo-labels corrected by people: exported, read back into a new folder, and shown on a page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from synernet_hf.commands import main
from synernet_hf.data import build_split
from synernet_hf.files import write_json
from synernet_hf.pseudo_label_files import build_manifest, file_names, read_manifest, write_manifest, write_mask
from synernet_hf.pseudo_labels import with_pseudo_labels
from synernet_hf.review import export_masks, import_masks, with_corrected_masks, write_report
from synernet_hf.visualization import palette_image


HOSTILE = '"><script>alert(1)</script>'
NAMES = ["background", "cat", HOSTILE]
IDS = ["one", "cat_two", f"<img src=x onerror=alert(2)>{HOSTILE}"]
FILES = ["one.jpg", "cat/two.jpg", "three.jpg"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pseudo-labels of three images, as a finished run leaves them."""
    records, rng = [], np.random.default_rng(0)
    for number, image_id in enumerate(IDS):
        label_map = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), size=(6 + number, 8))
        mask = f"masks/{image_id if number < 2 else 'three'}.png"
        confidence = {"confidence": 0.9 - number / 10, "coverage": 0.5, "foreground": 0.5}
        found = {"labels": [1, 2], "found": [1, 2], "label_source": "known", "width": 8, "height": 6 + number}
        write_mask(tmp_path / "labels" / mask, label_map, confidence | found | {"image": "digest"})
        records.append({"image_id": image_id, "mask": mask, "file_name": FILES[number]})
    write_manifest(tmp_path / "labels", build_manifest(tmp_path / "labels", records, dict(enumerate(NAMES))))
    settings = {"map": "pseudo_label", "id2label": {str(index): name for index, name in enumerate(NAMES)}}
    write_json(tmp_path / "labels" / "pseudo_labels.json", settings)
    return tmp_path / "labels"


def images() -> list[Image.Image]:
    return [Image.new("RGB", (8, 6 + number), "teal") for number in range(3)]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as mask:
        return np.array(mask)


@pytest.mark.parametrize("kind", ["coco", "yolo", "labelstudio", "cvat", "png"])
def test_masks_that_nobody_changed_stay_as_they_are(folder, kind):
    """Undecided pixels too, which COCO and YOLO do not hold."""
    source = folder / "masks" if kind == "png" else export_masks(folder, [kind])[0]
    if kind == "labelstudio":
        tasks = json.loads(source.read_text())
        assert [task["predictions"][0]["score"] for task in tasks] == pytest.approx([0.7, 0.8, 0.9])
        source.write_text(json.dumps([task | {"annotations": task["predictions"]} for task in tasks]))
    assert import_masks(source, folder, folder.parent / "new") == (3, 0)
    for path in (folder / "masks").rglob("*.png"):
        np.testing.assert_array_equal(pixels(folder.parent / "new" / path.relative_to(folder)), pixels(path))
    # somebody has seen them
    assert {(row["label_source"], row["confidence"]) for row in read_manifest(folder.parent / "new")[1]} == {
        ("corrected", 1.0)
    }


def test_corrected_masks_are_read_back_for_training(folder, capsys):
    # of one image, under the name that an annotation tool gave it
    corrected = np.full((7, 8), 2, dtype=np.uint8)
    source = folder.parent / "corrected"
    source.mkdir()
    palette_image(corrected).save(source / "two.png")
    assert main(["pseudo-labels", str(folder), "--from", str(source), "--output", str(folder.parent / "new")]) == 0
    assert "1 masks read, 1 of which differ" in capsys.readouterr().out
    names, rows = read_manifest(folder.parent / "new")
    assert names == NAMES and [row["image_id"] for row in rows] == [IDS[2], IDS[0], IDS[1]]
    assert rows[2]["label_source"] == "corrected" and rows[2]["confidence"] == 1.0 and rows[2]["classes"] == [HOSTILE]
    split = build_split(images(), IDS, [[0, 1]] * 3, NAMES)
    joined = with_pseudo_labels(split, folder.parent / "new")
    np.testing.assert_array_equal(np.array(joined[1]["mask"]), corrected)
    np.testing.assert_array_equal(np.array(joined[0]["mask"]), pixels(folder / "masks" / "one.png"))
    # scored are those that somebody has seen, of whichever split
    scored = with_corrected_masks(
        datasets.DatasetDict(validation=split.select([0]), train=split), folder.parent / "new"
    )
    assert scored["image_id"][:] == [IDS[1]] and np.asarray(scored[0]["mask"]).tolist() == corrected.tolist()
    with pytest.raises(
        ValueError, match="None of the 0 corrected masks in .* is of an image of the splits train: give"
    ):
        with_corrected_masks(datasets.DatasetDict(train=split), folder)
    # neither overwritten nor taken for a run's own
    assert main(["pseudo-labels", str(folder), "--from", str(source), "--output", str(folder.parent / "new")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert json.loads((folder.parent / "new" / "pseudo_labels.json").read_text())["map"] == "corrected"


def test_corrections_that_cannot_be_read(folder):
    source, new = folder.parent / "corrected", folder.parent / "new"
    source.mkdir()
    palette_image(np.zeros((7, 8), dtype=np.uint8)).save(source / "four.png")
    with pytest.raises(ValueError, match=r"four.png: the image 'four.png' is not among the 3 of"):
        import_masks(source, folder, new)
    (source / "four.png").rename(source / "one.png")
    with pytest.raises(ValueError, match=r"one.png: the mask is 8x7, but the image is 8x6"):
        import_masks(source, folder, new)
    Image.new("RGB", (8, 6)).save(source / "one.png")
    with pytest.raises(ValueError, match="one.png is no mask: a palette or grey image of the ids 0 to 2 and 255"):
        import_masks(source, folder, new)
    with pytest.raises(FileNotFoundError, match="There is no .*nothing: give the file or folder"):
        import_masks(folder.parent / "nothing", folder, new)
    tasks = export_masks(folder, ["labelstudio"])[0]
    with pytest.raises(ValueError, match="no finished mask"):
        import_masks(tasks, folder, new)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["corrected", "labels"]


def test_names_of_files_below_their_common_folder():
    paths = ["/data/pets/train/cat/1.jpg", "/data/pets/train/dog/1.jpg", None, "../../up.png"]
    names = file_names([(f"masks/{number}.png", path) for number, path in enumerate(paths)])
    assert names == ["data/pets/train/cat/1.jpg", "data/pets/train/dog/1.jpg", "2.png", "up.png"]
    assert file_names([("masks/a.png", paths[0]), ("masks/b.png", paths[1])]) == ["cat/1.jpg", "dog/1.jpg"]
    assert file_names([("masks/a.png", "1.jpg"), ("masks/b.png", "1.jpg")]) == ["a.png", "b.png"]


class Page(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_the_least_confident_and_nothing_from_elsewhere(folder):
    split = build_split(images(), IDS, [[0, 1]] * 3, NAMES)
    text = write_report(folder, split, limit=2).read_text(encoding="utf-8")
    page = Page(text)
    cards = [attributes for tag, attributes in page.tags if tag == "article"]
    assert [card["data-name"] for card in cards] == [IDS[2], IDS[1]]
    assert [json.loads(card["data-classes"]) for card in cards] == [NAMES[1:]] * 2
    assert "2 of 3 images" in text
    # names of files and classes are text: one script, no handler, no address but data
    assert [tag for tag, _ in page.tags].count("script") == 1
    sources = [attributes["src"] for tag, attributes in page.tags if "src" in attributes]
    assert len(sources) == 4 and all(source.startswith("data:image/") for source in sources)
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "href"]
    assert "{{" not in text and not re.search(r"https?:", text)
