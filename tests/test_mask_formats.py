"""Masks in the formats of annotation tools: what is written comes back, and is what the tools' own readers see."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from synernet_hf.mask_encodings import outlines, pack_runs, unpack_runs
from synernet_hf.mask_formats import EXPORTS, MaskRecord, read_masks, write_masks


NAMES = ["background", *(f'class {index} <&">' for index in range(1, 21))]


def label_map(height: int, width: int, seed: int, colours: int) -> np.ndarray:
    """A few of the ids 0 to 20 and 255, thrown at pixels: specks, holes and pixels that touch at corners."""
    rng = np.random.default_rng(seed)
    return rng.choice(rng.choice([0, 255, *range(1, 21)], size=colours), size=(height, width)).astype(np.uint8)


SOME = st.builds(label_map, st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(1, 4))


def written(kind: str, folder: Path, *masks: np.ndarray) -> Path:
    records = [MaskRecord(f"a & b/{number}.jpg", mask, 0.5) for number, mask in enumerate(masks)]
    path = write_masks(kind, folder, records, NAMES)
    if kind == "labelstudio":
        # as a person accepts predictions
        tasks = json.loads(path.read_text())
        path.write_text(json.dumps([{"data": task["data"], "annotations": task["predictions"]} for task in tasks]))
    return path


def read(path: Path, *masks: np.ndarray) -> list[np.ndarray]:
    found = {}

    def find(name, place):
        number = int(re.search(r"(\d+)(\.jpg)?$", name)[1])
        return {"number": number, "height": masks[number].shape[0], "width": masks[number].shape[1]}

    for image, back, _ in read_masks(path, NAMES, find):
        found[image["number"]] = back
    return [found[number] for number in range(len(masks))]


@pytest.mark.parametrize("kind", EXPORTS)
@settings(max_examples=25, deadline=None)
@given(masks=st.lists(SOME, min_size=1, max_size=3))
def test_every_label_map_comes_back(kind, masks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    carries_undecided = kind in ("labelstudio", "cvat")
    for mask, back in zip(masks, read(written(kind, folder, *masks), *masks), strict=True):
        np.testing.assert_array_equal(back, mask if carries_undecided else np.where(mask == 255, 0, mask))
    shutil.rmtree(folder)


def test_pycocotools_reads_the_masks(tmp_path, capsys):
    mask = label_map(30, 20, 3, 4)
    coco = COCO(str(written("coco", tmp_path, mask)))
    drawn = np.zeros_like(mask)
    for annotation in coco.anns.values():
        part = coco.annToMask(annotation)
        assert annotation["area"] == part.sum() and annotation["iscrowd"] == 0
        drawn[part > 0] = annotation["category_id"]
    np.testing.assert_array_equal(drawn, np.where(mask == 255, 0, mask))
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == NAMES[1:]


def test_an_outline_per_part_with_its_holes():
    mask = np.zeros((11, 12), dtype=bool)
    mask[1:10, 1:10] = True
    mask[2:4, 2:4] = mask[5:8, 4:7] = False
    mask[6, 5] = True
    # touches the frame at a corner only
    mask[10, 10] = True
    frame, inner, corner = outlines(mask)
    # rings of 4, 4 and 4 corners, each hole with its first corner again, and the corners where the cuts begin
    assert len(frame) == 4 + 2 * (4 + 2) and len(inner) == len(corner) == 4
    assert inner.tolist() == [[5.25, 6.25], [5.75, 6.25], [5.75, 6.75], [5.25, 6.75]]
    # OpenCV takes whole numbers and draws the edge too: all corners must be pixels of the mask
    for outline in (frame, inner, corner):
        x, y = outline.astype(int).T
        assert mask[y, x].all()


def test_label_studio_packs_as_its_own_converter():
    # what label_studio_sdk.converter.brush.mask2rle gives for this mask, and a run that it writes value by value
    mask = np.array([[0, 1, 1], [0, 0, 1]], dtype=bool)
    packed = [0, 0, 0, 24, 57, 27, 252, 96, 19, 255, 206, 1, 31, 248]
    assert pack_runs(mask) == packed
    raw = "".join(
        (f"{4:032b}", "00111", "0000000100100011", "0", "01", "11", *(f"{value:08b}" for value in (9, 9, 9, 200)))
    )
    raw = [int(raw[start : start + 8].ljust(8, "0"), 2) for start in range(0, len(raw), 8)]
    assert unpack_runs(raw, 1, 1).tolist() == [[True]]
    with pytest.raises(ValueError, match="ends too early"):
        unpack_runs(packed[:-3], 2, 3)


def test_polygons_and_skipped_tasks_are_read(tmp_path):
    size = {"original_width": 4, "original_height": 2}
    square = {"points": [[25, 0], [75, 0], [75, 100], [25, 100]], "polygonlabels": [NAMES[2]]}
    answer = {"result": [{"type": "polygonlabels", "value": square, **size}]}
    data = {"image": "/data/upload/1/0.jpg"}
    tasks = [
        {"data": data, "annotations": [answer | {"was_cancelled": True}]},
        {"data": data, "annotations": [answer]},
    ]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    expected = [[0, 2, 2, 0], [0, 2, 2, 0]]
    assert read(tmp_path / "tasks.json", np.zeros((2, 4)))[0].tolist() == expected
    text = '<annotations><image name="0.jpg" width="4" height="2"><polygon label="class 2 &lt;&amp;&quot;&gt;" points="1,0;3,0;3,2;1,2"/></image></annotations>'
    (tmp_path / "annotations.xml").write_text(text)
    assert read(tmp_path / "annotations.xml", np.zeros((2, 4)))[0].tolist() == expected


def test_masks_that_cannot_be_used(tmp_path):
    mask = label_map(4, 5, 0, 3)
    coco = written("coco", tmp_path, mask)
    with pytest.raises(ValueError, match=r"image a & b/0.jpg: the mask is 5x4, but the image is 4x5"):
        read(coco, mask.T)
    coco.write_text(coco.read_text().replace('"name": "class 2 ', '"name": "clas 2 '))
    with pytest.raises(ValueError, match="category 2: Unknown class name 'clas 2 .*did you mean class 2 "):
        read(coco, mask)
    coco.write_text('{"images": [{"id": 1}], "annotations": [], "categories": []}')
    with pytest.raises(ValueError, match="not in the format coco that it looks like .KeyError: 'file_name'."):
        read(coco, mask)
    archive = written("cvat", tmp_path, mask)
    with zipfile.ZipFile(archive) as file:
        text = file.read("annotations.xml").decode()
    (tmp_path / "wrong.xml").write_text(re.sub('rle="', 'rle="1, ', text))
    with pytest.raises(ValueError, match="does not fill its box"):
        read(tmp_path / "wrong.xml", mask)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no masks: give one file of COCO"):
        read(tmp_path / "empty", mask)
    with pytest.raises(ValueError, match=r"There is no mask format 'voc'; one of coco"):
        write_masks("voc", tmp_path, [], NAMES)
    with pytest.raises(ValueError, match="Two images are called x: YOLO names labels"):
        write_masks("yolo", tmp_path, [MaskRecord("x.jpg", mask), MaskRecord("x.png", mask)], NAMES)
    assert not (tmp_path / "yolo").exists() and not list(tmp_path.glob(".*"))
