import io
import json

import datasets
import numpy as np
import pytest
from devkit_utils import ids_of
from PIL import Image

from synernet_hf.commands import main
from synernet_hf.data import (
    PolygonMask,
    build_split,
    inspect_dataset,
    load_shapes,
    load_voc2012,
    write_parquet,
)


NAMES = ["background", "cat", "dog", "cow"]


def encoded(seed, size=(20, 10), mode="RGB", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, **{"format": "PNG"} | options)
    return {"bytes": stream.getvalue(), "path": None}


def mask_of(size, value=1):
    stream = io.BytesIO()
    Image.new("L", size, value).save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


@pytest.fixture
def faulty():
    """Splits with one of each fault."""
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [encoded(0), encoded(1, (30, 40), "L"), {"bytes": b"none", "path": None}, encoded(0)]
    images += [encoded(2, (16, 8), format="JPEG", exif=exif)]
    labels = [[1, 0, 0], [0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]]
    train = build_split(images, ["a", "b", "c", "d", "d"], ids_of(labels), NAMES)
    masks = [mask_of((20, 10)), mask_of((10, 20)), None, mask_of((20, 10), 77)]
    validation = build_split(
        [encoded(0), encoded(3), encoded(4), encoded(5)], list("efgh"), [[0, 1, 2]] * 4, NAMES, masks
    )
    return datasets.DatasetDict(train=train, validation=validation)


@pytest.mark.parametrize("number, found", [(5, True), (4, False)])
def test_a_rare_class_with_the_name_of_a_common_one_is_shown(number, found):
    names = ["background", "cat", "caat", "cow"]
    labels = np.zeros((number + 1, 3), dtype=int)
    labels[:number, 0], labels[number, 1] = 1, 1
    split = build_split(
        [encoded(seed) for seed in range(number + 1)], [f"{i}" for i in range(number + 1)], ids_of(labels), names
    )
    text = inspect_dataset(datasets.DatasetDict(train=split)).text()
    assert (f"almost the name of a common one (caat: 1, cat: {number})" in text) == found


def test_everything_wrong_is_found(faulty):
    report = inspect_dataset(faulty)
    train, validation = report.splits["train"], report.splits["validation"]
    assert train.class_counts == {"cat": 3, "dog": 2, "cow": 0}
    assert train.unlabelled == ["b"] and list(train.undecodable) == ["c"] and train.repeated_ids == ["d"]
    # the JPEG lies on its side: 8 x 16 when turned upright
    assert train.widths == [8, 20, 30] and train.heights == [10, 13, 40]
    assert train.formats == {"JPEG RGB": 1, "PNG L": 1, "PNG RGB": 2}
    assert report.duplicates == [["train/a", "train/d", "validation/e"]]
    assert set(validation.unusable_masks) == {"f", "g", "h"}
    assert "77" in validation.unusable_masks["h"] and "missing" in validation.unusable_masks["g"]
    text = report.text()
    for words in ("c: cannot identify", "1 of 5 images have no class (b)", "1 of 3 classes are in no image (cow)"):
        assert words in text
    assert "train/a = train/d = validation/e" in text and "in more than one split" in text
    assert json.loads(json.dumps(report.to_dict()))["splits"]["train"]["num_images"] == 5


def test_wrong_labels_are_named():
    split = build_split([encoded(0), encoded(1)], ["a", "b"], [[0], [0]], NAMES)
    split = datasets.Dataset.from_dict(split.to_dict() | {"labels": [[0], [-1]]}, features=split.features)
    report = inspect_dataset(datasets.DatasetDict(train=split))
    assert report.splits["train"].bad_labels == ["b"] and report.splits["train"].class_counts["cat"] == 1


def test_nothing_is_found_where_nothing_is_wrong(devkit):
    report = inspect_dataset(load_voc2012(devkit.root))
    expected = ("classes are in no image", "classes are in fewer than 10 images", "classes are in no mask")
    assert [problem for problem in report.problems() if not any(words in problem for words in expected)] == []
    assert report.splits["train"].num_images == 6
    files = [devkit.voc / "JPEGImages" / f"{image_id}.jpg" for image_id in devkit.train_ids]
    assert report.splits["train"].num_bytes == sum(path.stat().st_size for path in files)


def test_training_masks_are_not_opened():
    split = build_split([encoded(0)], ["a"], [[0, 1, 2]], NAMES, [{"bytes": b"none", "path": None}])
    assert inspect_dataset(datasets.DatasetDict(train=split)).splits["train"].unusable_masks == {}


def test_parquet_files_hold_images_and_classes(devkit, tmp_path):
    splits = load_voc2012(devkit.root)
    paths = write_parquet(splits, tmp_path / "out", images_per_file=4)
    assert [path.name for path in paths] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "validation-00000-of-00001.parquet",
    ]
    expected = {split: [np.asarray(record["image"]) for record in splits[split]] for split in splits}
    for path in (devkit.voc / "JPEGImages").iterdir():
        path.unlink()
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    kind = loaded["train"].features["labels"].feature
    for name in ("train", "validation"):
        assert loaded[name]["image_id"][:] == splits[name]["image_id"][:]
        for record, pixels in zip(loaded[name], expected[name], strict=True):
            assert np.array_equal(np.asarray(record["image"]), pixels)
            assert sorted(kind.int2str(record["labels"])) == sorted(devkit.labels[record["image_id"]])
    assert loaded["train"][0]["mask"] is None
    assert loaded["validation"][0]["mask"].mode == "P"
    with pytest.raises(ValueError, match="other parquet files, such as train-00000-of-00002"):
        write_parquet(splits, tmp_path / "out", images_per_file=100)
    with pytest.raises(ValueError, match="images_per_file is 0"):
        write_parquet(splits, tmp_path, images_per_file=0)


def run(*words):
    return main(["check-data", *words])


def test_the_script_reports_draws_and_writes(devkit, tmp_path, capsys, monkeypatch):
    uploaded = {}
    monkeypatch.setattr(datasets.DatasetDict, "push_to_hub", lambda splits, repo: uploaded.update({repo: splits}))
    words = [
        "--data_dir",
        str(devkit.root),
        "--output",
        str(tmp_path / "out"),
        "--parquet",
        "--push_to_hub",
        "me/pets",
    ]
    assert run(*words) == 0
    output = capsys.readouterr().out
    assert "train: 6 images" in output and "2 parquet files" in output and "uploaded: me/pets" in output
    assert uploaded["me/pets"]["train"].features["labels"].feature.names[7] == "cat"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    shown = [count for count in report["splits"]["train"]["class_counts"].values() if count]
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        # three classes, a row each
        assert len(shown) == 3 and sheet.height > 3 * 60 and np.asarray(sheet).std() > 5


def test_the_script_keeps_undecodable_images_out(devkit, tmp_path, capsys):
    (devkit.voc / "JPEGImages" / f"{devkit.train_ids[2]}.jpg").write_bytes(b"none")
    words = ["--data_dir", str(devkit.root), "--output", str(tmp_path / "out"), "--parquet"]
    assert run(*words) == 2
    assert "1 of 6 records of the split 'train' cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out" / "data").exists()
    assert run(*words, "--on_bad_image", "skip") == 0
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded["image_id"][:] == [name for name in devkit.train_ids if name != devkit.train_ids[2]]


def test_the_script_names_every_missing_image(devkit, tmp_path, capsys):
    for image_id in devkit.train_ids[:5]:
        (devkit.voc / "JPEGImages" / f"{image_id}.jpg").unlink()
    words = ["--data_dir", str(devkit.root), "--output", str(tmp_path / "out")]
    assert run(*words) == 0
    output = capsys.readouterr().out
    assert "train: 5 records were left out by the loader" in output
    assert all(image_id in output for image_id in devkit.train_ids[:5])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["splits"]["train"]["missing"]) == 5 and report["splits"]["validation"]["missing"] == []
    assert run(*words, "--parquet") == 2
    assert "Images are missing: add them, or leave them out with --on_bad_image skip" in capsys.readouterr().err
    assert run(*words, "--parquet", "--on_bad_image", "skip") == 0


def test_rare_classes_and_classes_in_no_mask_are_named():
    masks = [mask_of((20, 10)), mask_of((20, 10))]
    split = build_split([encoded(0), encoded(1)], ["a", "b"], [[0], [0, 1]], NAMES, masks)
    report = inspect_dataset(datasets.DatasetDict(validation=split))
    assert report.splits["validation"].mask_counts == {"cat": 2, "dog": 0, "cow": 0}
    text = report.text()
    assert "2 of 3 classes are in fewer than 10 images (cat: 2, dog: 1)" in text
    assert "2 of 3 classes are in no mask (dog, cow)" in text
    # masks of the training split are not opened
    assert inspect_dataset(datasets.DatasetDict(train=split)).splits["train"].mask_counts is None


def test_the_script_refuses_bad_options(tmp_path, capsys):
    for words, expected in (
        (["--dataset", "shapes", "--parquet"], "--parquet needs --output"),
        (["--dataset", "shapes", "--num_threads", "0"], "--num_threads is 0"),
        (["--dataset", "voc2012"], "needs data_dir"),
        (["--dataset", "nothing"], "Unknown data set"),
    ):
        assert run(*words) == 2
        errors = capsys.readouterr().err
        assert errors.count("error:") == 1 and expected in errors


def test_generated_images_are_shared_too(tmp_path):
    splits = load_shapes(3, 2, image_size=32)
    write_parquet(splits, tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for record, original in zip(loaded["train"], splits["train"], strict=True):
        assert np.array_equal(np.asarray(record["image"]), np.asarray(original["image"]))
        assert record["labels"] == original["labels"]


@pytest.fixture
def annotated():
    """Splits with masks that are kept as annotations."""
    objects = json.dumps([[2, [[2, 2, 8, 2, 8, 8, 2, 8]]]])
    cells = [{"height": 10, "width": 20, "objects": objects}, {"height": 20, "width": 10, "objects": objects}]
    validation = build_split([encoded(1), encoded(2)], ["good", "turned"], [[1]] * 2, NAMES, cells, PolygonMask())
    return datasets.DatasetDict(train=build_split([encoded(0)], ["a"], [[0]], NAMES), validation=validation)


def test_annotations_are_looked_at_and_shared_as_masks(annotated, tmp_path):
    faults = inspect_dataset(annotated).splits["validation"].unusable_masks
    assert list(faults) == ["turned"] and "10 x 20 pixels" in faults["turned"]
    write_parquet(annotated, tmp_path / "out")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for record, original in zip(loaded["validation"], annotated["validation"], strict=True):
        assert np.array_equal(np.asarray(record["mask"]), np.asarray(original["mask"]))
        assert set(np.unique(record["mask"])) == {0, 2}
    assert loaded["train"][0]["mask"] is None


def test_an_empty_split_is_not_left_out_in_silence(annotated, tmp_path):
    annotated["validation"] = annotated["validation"].select([])
    with pytest.raises(ValueError, match="split 'validation' is empty"):
        write_parquet(annotated, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_streamed_data_is_refused_by_the_script(tmp_path, capsys):
    write_parquet(load_shapes(2, 1, image_size=32), tmp_path / "data")
    words = ["--dataset", "hub", "--data_dir", str(tmp_path / "data"), "--dataset_options", '{"streaming": true}']
    assert run(*words) == 2
    assert "Streamed data cannot be counted" in capsys.readouterr().err
