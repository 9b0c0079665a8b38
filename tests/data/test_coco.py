"""The COCO 2014 layout: labels and lazily drawn masks, without the annotations ever standing in memory as a tree."""

import json
import tracemalloc

import datasets
import numpy as np
import pytest
from PIL import Image

from synernet_hf.data import COCO_CLASSES, check_dataset, class_names, load_coco2014
from synernet_hf.data import coco as coco_module


# official ids have gaps: 18 is the 17th category, 90 the 80th
CATEGORIES = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}, {"id": 90, "name": "toothbrush"}]
NAMES = ["background", "person", "dog", "toothbrush"]


def square(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def write_coco(root, split="val2014", entries=(), categories=CATEGORIES, extra_images=(), size=(20, 16)):
    """`entries`: (image id, category id, segmentation, is a crowd); images are `size` = (width, height)."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / split).mkdir(exist_ok=True)
    images = []
    for image_id in sorted({entry[0] for entry in entries} | set(extra_images)):
        name = f"COCO_{split}_{image_id:012d}.jpg"
        Image.new("RGB", size, (90, 120, 40)).save(root / split / name)
        images.append({"id": image_id, "file_name": name, "width": size[0], "height": size[1]})
    annotations = [
        {"id": number, "image_id": i, "category_id": c, "segmentation": s, "iscrowd": int(crowd), "area": 1.0}
        for number, (i, c, s, crowd) in enumerate(entries)
    ]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": list(categories)}
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def coco(tmp_path):
    root = tmp_path / "coco"
    write_coco(root, "train2014", [(5, 18, square(1, 1, 4), False), (3, 1, square(1, 1, 4), False)])
    crowd = {"counts": [0, 16 * 4, 16 * 16], "size": [16, 20]}  # the 4 leftmost columns
    entries = [
        (7, 90, square(6, 6, 4), False),
        (7, 18, square(4, 4, 10), False),
        (7, 1, crowd, True),
        (9, 1, [[1, 1, 2, 2], *square(8, 8, 4)], False),
    ]
    write_coco(root, "val2014", entries, extra_images=[8])
    return root


def test_classes_labels_and_ids(coco):
    loaded = load_coco2014(coco)
    assert class_names(loaded) == NAMES
    assert loaded["train"]["image_id"][:] == ["COCO_train2014_000000000003", "COCO_train2014_000000000005"]
    assert loaded["train"]["labels"][:] == [[0], [1]]
    assert loaded["train"].column_names == ["image", "image_id", "labels"]
    # image 8 has no annotation; a crowd of persons is a label of image 7
    assert loaded["validation"]["labels"][:] == [[0, 1, 2], [0]]
    check_dataset(loaded)


def test_masks_hold_small_objects_above_large_ones_and_crowds_as_ignore(coco):
    mask = np.asarray(load_coco2014(coco)["validation"][0]["mask"])
    assert mask.shape == (16, 20) and mask.dtype == np.uint8
    assert (mask[:, :4] == 255).all()
    assert (mask[6:10, 6:10] == 3).all()
    assert mask[5, 5] == mask[12, 12] == 2
    assert mask[0, 10] == mask[15, 19] == 0
    # a polygon of two corners encloses nothing
    mask = np.asarray(load_coco2014(coco)["validation"][1]["mask"])
    assert (mask[8:12, 8:12] == 1).all() and (mask == 1).sum() == 16


def test_streams_give_the_same_records(coco):
    loaded, streamed = load_coco2014(coco), load_coco2014(coco, streaming=True)
    assert class_names(streamed) == NAMES
    for record, expected in zip(streamed["validation"], loaded["validation"], strict=True):
        assert record["image_id"] == expected["image_id"]
        assert np.array_equal(np.asarray(record["mask"]), np.asarray(expected["mask"]))


def test_a_mask_is_drawn_when_its_record_is_opened_and_not_before(coco, monkeypatch):
    drawn = []
    original = coco_module.draw_objects
    monkeypatch.setattr(coco_module, "draw_objects", lambda *args: drawn.append(1) or original(*args))
    loaded = load_coco2014(coco)
    check_dataset(loaded, decode_images=False)
    assert loaded["validation"]["labels"][0] == [0, 1, 2]
    assert not drawn
    loaded["validation"][1]
    assert len(drawn) == 1
    check_dataset(loaded)
    assert len(drawn) == 3


def test_masks_survive_what_is_done_to_data_sets(coco, tmp_path):
    loaded = load_coco2014(coco)
    expected = np.asarray(loaded["validation"][0]["mask"])
    loaded.save_to_disk(tmp_path / "saved")
    again = datasets.load_from_disk(tmp_path / "saved")
    assert class_names(again) == NAMES
    split = again["validation"].filter(lambda labels: 1 in labels, input_columns="labels")
    assert len(split) == 1
    assert np.array_equal(split.select_columns(["mask"])[0]["mask"], expected)


def test_annotations_never_stand_in_memory_as_a_tree(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_module, "PART_SIZE", 5)
    root = tmp_path / "coco"
    corners = np.random.default_rng(0).uniform(0, 16, (600, 200)).round(2).tolist()
    entries = [(1 + number % 20, 18, [polygon], False) for number, polygon in enumerate(corners)]
    sizes = {split: write_coco(root, split, entries).stat().st_size for split in ("train2014", "val2014")}
    assert min(sizes.values()) > 500_000

    def peak(function):
        tracemalloc.start()
        kept = function()
        current, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return current, most, kept

    tree, _, _ = peak(lambda: json.loads((root / "annotations" / "instances_val2014.json").read_text()))
    load_coco2014(root)
    _, most, loaded = peak(lambda: load_coco2014(root))
    # one file as bytes and as text while it is read, or its polygons, but never the tree or both files
    assert most < 2.4 * sizes["val2014"] < tree
    assert len(loaded["validation"]) == 20


def test_missing_images_are_refused_or_left_out(coco, caplog):
    (coco / "val2014" / "COCO_val2014_000000000007.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 1 of 2 images .*000000000007.jpg.*on_bad_image='skip'"):
        load_coco2014(coco)
    skipped = {}
    loaded = load_coco2014(coco, on_bad_image="skip", skipped=skipped)
    assert loaded["validation"]["image_id"][:] == ["COCO_val2014_000000000009"]
    assert "000000000007.jpg" in skipped["validation"][0] and "train" not in skipped
    assert "1 records of the split 'validation' are left out" in caplog.text
    with pytest.raises(ValueError, match="on_bad_image is 'ignore'"):
        load_coco2014(coco, on_bad_image="ignore")


def test_an_image_of_another_size_than_its_annotations(coco):
    Image.new("RGB", (16, 20)).save(coco / "val2014" / "COCO_val2014_000000000009.jpg")
    with pytest.raises(
        ValueError, match="mask of COCO_val2014_000000000009 is drawn from annotations for 20 x 16 .* has 16 x 20"
    ):
        check_dataset(load_coco2014(coco))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda c: c["annotations"].append({"image_id": 7, "category_id": 4, "segmentation": []}), "category ids 4"),
        (
            lambda c: c["annotations"].append({"image_id": 6, "category_id": 1, "segmentation": []}),
            "does not list .6.",
        ),
        (lambda c: c["categories"].pop(), "categories of .* are not those|category ids 90"),
        (lambda c: c.pop("images"), "not in COCO's format"),
        (
            lambda c: c["annotations"][0].pop("segmentation"),
            "mask of COCO_val2014_000000000007 does not decode .annotation 0 of image 7: the segmentation null encloses",
        ),
    ],
    ids=["category", "image", "categories", "images", "segmentation"],
)
def test_annotation_files_with_a_mistake(coco, change, sentence):
    path = coco / "annotations" / "instances_val2014.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        check_dataset(load_coco2014(coco))


def test_missing_folders_and_files(coco, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*annotations"):
        load_coco2014(tmp_path)
    with pytest.raises(FileNotFoundError, match="instances_val2017.json: the folder has instances_train2014.json"):
        load_coco2014(coco, validation_split="val2017")
    (coco / "annotations" / "instances_val2014.json").write_text("{")
    with pytest.raises(ValueError, match="instances_val2014.json is not in COCO's format"):
        load_coco2014(coco)


def test_the_real_sample(root):
    folder = root.parent / "shared" / "data" / "coco"
    if not folder.is_dir():
        pytest.skip("../shared/data/coco is not here")
    loaded = load_coco2014(folder)
    assert class_names(loaded) == COCO_CLASSES
    check_dataset(loaded)
    for record in loaded["validation"]:
        mask = np.asarray(record["mask"])
        assert mask.shape == (record["image"].height, record["image"].width)
        named = {label + 1 for label in record["labels"]}
        assert set(np.unique(mask)) - {0, 255} <= named


def test_more_categories_than_a_mask_can_hold_are_refused(tmp_path):
    categories = [{"id": index, "name": f"class {index}"} for index in range(1, 255)]
    for split in ("train2014", "val2014"):
        write_coco(tmp_path, split, [(1, 254, square(1, 1, 4), False)], categories)
    assert np.asarray(load_coco2014(tmp_path)["validation"][0]["mask"]).max() == 254
    categories.append({"id": 255, "name": "one more"})
    write_coco(tmp_path, "train2014", [(1, 255, square(1, 1, 4), False)], categories)
    with pytest.raises(ValueError, match="has 255 categories, but masks of 8 bits hold at most 254"):
        load_coco2014(tmp_path)


@pytest.mark.parametrize("class_id", [-1, 0, 256, 300])
def test_an_object_with_an_impossible_class_id_is_refused(class_id):
    with pytest.raises(ValueError, match=f"class id {class_id}, expected are 1 to 254"):
        coco_module.draw_objects([(class_id, square(1, 1, 4))], 16, 20)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def without_outlines(content):
    for annotation, outline in zip(content["annotations"], ([], None, [[1, 1, 4, 4]], [[]]), strict=True):
        annotation["segmentation"] = outline


@pytest.mark.parametrize("change", [without_outlines, lambda c: [a.pop("segmentation") for a in c["annotations"]]])
def test_a_detection_export_gives_no_masks(coco, change, caplog):
    rewrite(coco / "annotations" / "instances_val2014.json", change)
    loaded = check_dataset(load_coco2014(coco))
    assert loaded["validation"].column_names == ["image", "image_id", "labels"]
    assert loaded["validation"]["labels"][:] == [[0, 1, 2], [0]]
    assert caplog.text.count("no annotation has an outline, so the split has no masks: it cannot be scored") == 1


@pytest.mark.parametrize("streaming", [False, True])
def test_no_masks_in_a_stream_of_a_detection_export(coco, streaming):
    rewrite(coco / "annotations" / "instances_val2014.json", without_outlines)
    record = next(iter(load_coco2014(coco, streaming=streaming)["validation"]))
    assert "mask" not in record


FAULTY = {
    "empty": ([], r"the segmentation \[\] encloses nothing"),
    "null": (None, "the segmentation null encloses nothing"),
    "two points": ([[1, 1, 4, 4]], "encloses nothing"),
    "outside": ([[90, 1, 95, 1, 95, 9]], "lies outside the image"),
    "flat": ([1, 1, 4, 1, 4, 4], "is not a list of polygons"),
    "odd": ([[1, 1, 4, 1, 4, 4, 7]], "points that are not pairs of numbers"),
    "text": ([["1", "1", "4", "1", "4", "4"]], "points that are not pairs of numbers"),
    "not finite": ([[1, 1, float("nan"), 1, 4, 4]], "points that are not pairs of numbers"),
    "far away": ([[1, 1, 1e12, 1, 4, 4]], "points that are not pairs of numbers"),
    "swapped": ({"counts": [0, 320], "size": [20, 16]}, r"has the size \[20, 16\]"),
    "short": ({"counts": [0, 100], "size": [16, 20]}, "does not cover the image"),
    "negative": ({"counts": [-5, 325], "size": [16, 20]}, "does not cover the image"),
    "cut off": ({"counts": "0T1", "size": [16, 20]}, "does not cover the image"),
    "no text": ({"counts": "\u00e9", "size": [16, 20]}, "does not cover the image"),
    "word": ("box", "is not a list of polygons"),
}


@pytest.mark.parametrize("outline, sentence", FAULTY.values(), ids=FAULTY)
def test_an_outline_that_cannot_be_drawn_is_named_by_the_check(coco, outline, sentence):
    def change(content):
        content["annotations"][1] |= {"segmentation": outline, "id": 4711}

    rewrite(coco / "annotations" / "instances_val2014.json", change)
    loaded = load_coco2014(coco)
    place = r"1 of 2 records .* the mask of COCO_val2014_000000000007 does not decode \(annotation 4711 of image 7: "
    with pytest.raises(ValueError, match=f"{place}.*{sentence}.*of 16 x 20 pixels"):
        check_dataset(loaded)
    assert check_dataset(loaded, "skip")["validation"]["image_id"][:] == ["COCO_val2014_000000000009"]
    with pytest.raises(ValueError, match="annotation 4711 of image 7"):
        loaded["validation"][0]


def test_compressed_run_lengths_are_drawn(coco):
    shown = np.zeros((16, 20), dtype=np.uint8)
    shown[3:9, 5:17:2] = 1
    runs = coco_module.mask_utils.encode(np.asfortranarray(shown))
    outline = {"size": runs["size"], "counts": runs["counts"].decode()}
    assert np.array_equal(coco_module.draw_objects([(1, outline)], 16, 20), shown)


def test_an_image_id_given_twice_is_refused_with_both_places(coco):
    path = coco / "annotations" / "instances_train2014.json"
    rewrite(path, lambda c: c["images"][1].update(id=3))
    with pytest.raises(
        ValueError, match=r"the id 3 to several images: .*0003.jpg.*\(entry 1\), .*0005.jpg.*\(entry 2\)"
    ):
        load_coco2014(coco)


def test_a_category_id_given_twice_is_refused_with_both_places(coco):
    for split in ("train2014", "val2014"):
        rewrite(coco / "annotations" / f"instances_{split}.json", lambda c: c["categories"][1].update(id=1))
    with pytest.raises(ValueError, match=r"the id 1 to several categories: person \(entry 1\), dog \(entry 2\)"):
        load_coco2014(coco)


def test_a_file_or_a_name_given_twice_is_refused(coco):
    path = coco / "annotations" / "instances_train2014.json"
    rewrite(path, lambda c: c["images"][1].update(file_name=c["images"][0]["file_name"]))
    with pytest.raises(ValueError, match=r"lists the image .*0003.jpg more than once, under the ids 3, 5"):
        load_coco2014(coco)
    for split in ("train2014", "val2014"):
        rewrite(coco / "annotations" / f"instances_{split}.json", lambda c: c["categories"][1].update(name="person"))
    with pytest.raises(ValueError, match="calls the categories 1, 18 'person', which occurs more than once"):
        load_coco2014(coco)


@pytest.mark.parametrize("name", ["background", "_background_", "Background"])
@pytest.mark.parametrize("background_id", [0, 2])
def test_a_category_for_the_background_is_no_class(tmp_path, name, background_id, caplog):
    categories = [{"id": background_id, "name": name}, *CATEGORIES]
    entries = [(7, background_id, square(0, 0, 12), False), (7, 18, square(4, 4, 4), False)]
    for split in ("train2014", "val2014"):
        write_coco(tmp_path, split, [*entries, (9, background_id, square(0, 0, 12), False)], categories)
    loaded = check_dataset(load_coco2014(tmp_path))
    assert class_names(loaded) == NAMES
    assert loaded["train"]["labels"][:] == loaded["validation"]["labels"][:] == [[1], []]
    mask = np.asarray(loaded["validation"][0]["mask"])
    assert (mask == 2).sum() == 16 and (mask == 0).sum() == mask.size - 16
    assert caplog.text.count(f"the category {name!r} is the background") == 1


def test_images_are_found_and_named_as_everywhere(tmp_path):
    entries = [(1, 18, square(1, 1, 4), False), (2, 1, square(1, 1, 4), False), (3, 1, square(1, 1, 4), False)]
    entries.append((4, 90, square(1, 1, 4), False))
    for split in ("train2014", "val2014"):
        path = write_coco(tmp_path, split, entries)
        folder = tmp_path / split
        files = [folder / f"COCO_{split}_{number:012d}.jpg" for number in range(1, 5)]
        (folder / "farm").mkdir()
        for file, name in zip(files, ("a.JPEG", "a.png", "farm/b c.jpg", "caf\u0065\u0301.jpg"), strict=True):
            file.rename(folder / name)
        names = ("a.jpeg", f"{split}/a.png", "farm\\b c.jpg", "caf\u00e9.jpg")
        rewrite(path, lambda c, names=names: [i.update(file_name=n) for i, n in zip(c["images"], names, strict=True)])
    loaded = check_dataset(load_coco2014(tmp_path))
    for split in loaded.values():
        assert split["labels"][:] == [[1], [0], [0], [2]]
        ids = split["image_id"][:]
        assert len(set(ids)) == 4 and ids[0].lower().startswith("a.jp") and ids[1] == "a.png"


def test_the_validation_split_alone(coco):
    for path in (coco / "annotations" / "instances_train2014.json", *(coco / "train2014").iterdir()):
        path.unlink()
    assert list(load_coco2014(coco, splits=["validation"])) == ["validation"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_annotation_files_in_other_encodings(coco, encoding):
    path = coco / "annotations" / "instances_val2014.json"
    path.write_text(path.read_text(), encoding=encoding)
    assert load_coco2014(coco)["validation"]["labels"][:] == [[0, 1, 2], [0]]
    path.write_bytes(b'{"images": "\xe9"}')
    with pytest.raises(ValueError, match="instances_val2014.json, line 1, is not UTF-8 text"):
        load_coco2014(coco)
