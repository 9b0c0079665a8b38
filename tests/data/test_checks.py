import logging

import datasets
import numpy as np
import pytest
import torch
from devkit_utils import save_mask
from PIL import Image

from synernet_hf.data import (
    PolygonMask,
    SynerNetDataCollator,
    TrainDataset,
    TrainTransform,
    build_split,
    check_dataset,
    checks,
    class_names,
    inspect_dataset,
    load_shapes,
    load_voc2012,
    same_columns,
    write_parquet,
)


NAMES = ["background", "cat", "dog"]


def split_of(labels):
    ids = [f"image_{index}" for index in range(len(labels))]
    return build_split([f"{name}.jpg" for name in ids], ids, labels, NAMES)


def test_a_good_data_set_passes_and_is_counted(devkit):
    loaded = load_voc2012(devkit.root)
    assert check_dataset(loaded)["train"]._fingerprint == loaded["train"]._fingerprint
    counts = {name: split.class_counts for name, split in inspect_dataset(loaded).splits.items()}
    for split, ids in (("train", devkit.train_ids), ("validation", devkit.validation_ids)):
        for name in ("cat", "dog", "person", "sofa"):
            assert counts[split][name] == sum(name in devkit.labels[image_id] for image_id in ids)
    assert sum(inspect_dataset(load_shapes(4, 2)).splits["train"].class_counts.values()) >= 4


def test_empty_split():
    with pytest.raises(ValueError, match="'validation' is empty"):
        check_dataset(datasets.DatasetDict(train=split_of([[0]]), validation=split_of([])))
    with pytest.raises(ValueError, match="has no split"):
        check_dataset(datasets.DatasetDict())


@pytest.mark.parametrize("labels", [None, [None], [-1], [1, 0], [1, 1]])
def test_labels_that_are_no_sorted_ids(labels):
    split = split_of([[0], [0, 1]])
    wrong = datasets.Dataset.from_dict(split.to_dict() | {"labels": [[0], labels]}, features=split.features)
    with pytest.raises(
        ValueError, match=r"1 of 2 records of the split 'train' have wrong labels \(image_1\): .* 0 to 1"
    ):
        check_dataset(datasets.DatasetDict(train=wrong))


def test_no_positive_label_at_all():
    with pytest.raises(ValueError, match="No image of the split 'train' has a positive label"):
        check_dataset(datasets.DatasetDict(train=split_of([[], []])))


def test_class_without_images_is_only_reported(caplog):
    with caplog.at_level(logging.WARNING):
        check_dataset(datasets.DatasetDict(train=split_of([[1]])), decode_images=False)
    assert "No training image shows cat" in caplog.text


@pytest.mark.parametrize("broken", ["text", "truncated", "missing"])
def test_image_that_does_not_decode(devkit, broken):
    loaded = load_voc2012(devkit.root)
    path = devkit.voc / "JPEGImages" / f"{devkit.train_ids[2]}.jpg"
    content = path.read_bytes()
    if broken == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no image" if broken == "text" else content[: len(content) // 2])
    sentence = (
        f"1 of 6 records of the split 'train' cannot be used: the image {devkit.train_ids[2]} .* does not decode"
    )
    with pytest.raises(ValueError, match=sentence):
        check_dataset(loaded)
    check_dataset(loaded, decode_images=False)


def test_mask_of_another_size_or_broken(devkit):
    first, second = devkit.validation_ids[:2]
    save_mask(np.zeros((10, 12), dtype=np.uint8), devkit.voc / "SegmentationClassAug" / f"{first}.png")
    (devkit.voc / "SegmentationClassAug" / f"{second}.png").write_bytes(b"no mask")
    loaded = load_voc2012(devkit.root)
    with pytest.raises(
        ValueError, match=rf"mask of {first} .*{first}.png\) is 12 x 10 .*the mask of {second} .* does"
    ):
        check_dataset(loaded)


def checked(image, mask):
    """What the checks say about one validation record; both are stored as they are."""
    split = build_split([image], ["image_0"], [[0]], NAMES, [mask])
    check_dataset(datasets.DatasetDict(validation=split))


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (Image.new("P", (12, 10), 40), r"mask of image_0 holds the ids 40; 0 to 2 and 255 \(ignore\) are expected"),
        (Image.new("L", (12, 10), 3), "mask of image_0 holds the ids 3;"),
        (Image.new("RGB", (12, 10)), "mask of image_0 has mode RGB; a palette or greyscale image"),
        (Image.new("LA", (12, 10)), "mask of image_0 has mode LA;"),
        (None, "mask of image_0 is missing"),
    ],
)
def test_mask_that_could_not_be_scored(mask, sentence):
    with pytest.raises(ValueError, match=f"1 of 1 records of the split 'validation' cannot be used: the {sentence}"):
        checked(Image.new("RGB", (12, 10)), mask)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_masks_of_other_depths(tmp_path, dtype):
    path = tmp_path / "mask.tif"
    Image.fromarray(np.array([[0, 1, 2, 255]], dtype=dtype)).save(path)
    checked(Image.new("RGB", (4, 1)), str(path))
    Image.fromarray(np.array([[0, 1, 2, 65_535]], dtype=dtype)).save(path)
    with pytest.raises(ValueError, match=r"mask.tif\) holds the ids 65535"):
        checked(Image.new("RGB", (4, 1)), str(path))
    if dtype == np.float32:
        Image.fromarray(np.array([[0, 0.5, 1]], dtype=dtype)).save(path)
        with pytest.raises(ValueError, match="has mode F"):
            checked(Image.new("RGB", (3, 1)), str(path))


@pytest.mark.parametrize("value", [0, 255])
def test_masks_that_show_no_class_although_labels_name_some(value, caplog):
    """A score of 100 would be of the background alone."""
    checked(Image.new("RGB", (12, 10)), Image.new("L", (12, 10), value))
    assert "masks of the split 'validation' show no class, although the labels name some" in caplog.text


@pytest.mark.parametrize("mode", ["P", "L", "1"])
def test_masks_of_class_ids_pass(mode):
    pixels = np.array([[0, 1, 1, 0]] if mode == "1" else [[0, 1, 2, 255]], dtype=np.uint8)
    mask = Image.fromarray(pixels * 255).convert("1") if mode == "1" else Image.fromarray(pixels)
    if mode == "P":
        mask.putpalette(list(range(256)) * 3)
    assert mask.mode == mode
    checked(Image.new("RGB", (4, 1)), mask)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_mask_is_compared_with_the_upright_image(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = str(tmp_path / f"image_0.{suffix}")
    Image.new("RGB", (12, 10)).save(path, exif=exif)
    stored, turned = Image.new("P", (12, 10)), Image.new("P", (10, 12))
    right, wrong = (turned, stored) if orientation in (6, 8) else (stored, turned)
    checked(path, right)
    with pytest.raises(ValueError, match="mask of image_0 is .* turned as their EXIF orientation says"):
        checked(path, wrong)
    wrong.save(tmp_path / "mask.png", exif=exif)
    if orientation in (6, 8):
        checked(path, str(tmp_path / "mask.png"))  # a mask with the tag is turned too


def test_training_masks_are_not_touched():
    loaded = load_shapes(3, 2, with_train_masks=True)
    broken = [{"bytes": b"no mask", "path": None}] * 3
    columns = loaded["train"].cast_column("image", datasets.Image(decode=False)).remove_columns("mask")[:]
    train = build_split(
        columns["image"], columns["image_id"], columns["labels"], ["background"] + list("abcde"), broken
    )
    check_dataset(datasets.DatasetDict(train=train))


def test_the_checks_give_the_records_to_use_and_say_what_they_leave_out(devkit):
    broken = devkit.voc / "JPEGImages" / f"{devkit.train_ids[2]}.jpg"
    broken.write_bytes(b"none")
    loaded, skipped, left_out = load_voc2012(devkit.root), {}, {}
    kept = check_dataset(loaded, "skip", skipped=skipped, left_out=left_out)
    assert left_out == {"train": [2]}
    assert kept["train"]["image_id"][:] == [name for name in devkit.train_ids if name != devkit.train_ids[2]]
    assert kept["validation"]["image_id"][:] == devkit.validation_ids
    assert list(skipped) == ["train"] and str(broken) in skipped["train"][0]
    with pytest.raises(ValueError, match="on_bad_image is 'drop'"):
        check_dataset(loaded, "drop")


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_split_in_any_format(devkit, tmp_path, kind):
    plain = load_voc2012(devkit.root)
    loaded = datasets.DatasetDict({name: split.with_format(kind) for name, split in plain.items()})
    assert class_names(loaded) == class_names(plain)
    (devkit.voc / "JPEGImages" / f"{devkit.train_ids[2]}.jpg").write_bytes(b"none")
    left_out = {}
    kept = check_dataset(loaded, "skip", left_out=left_out)
    assert left_out == {"train": [2]} and kept["train"].format["type"] == kind
    assert inspect_dataset(loaded).to_dict() == inspect_dataset(plain).to_dict()
    good = plain["train"].select([0, 1])
    transform = TrainTransform(32)
    for index in range(2):
        samples = [TrainDataset(split, transform)[index, index] for split in (good, good.with_format(kind))]
        batches = [SynerNetDataCollator(20)([sample]) for sample in samples]
        numbers = [(batch.pop("max_labels"), batch.pop("draws")) for batch in batches]
        assert numbers[0] == numbers[1]
        assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    kept["train"] = kept["train"].select([0, 1])
    write_parquet(kept, tmp_path / "out")
    written = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    for name in ("train", "validation"):
        assert written[name]["labels"][:] == plain[name]["labels"][: len(written[name])]
    assert np.array_equal(written["validation"][0]["mask"], plain["validation"][0]["mask"])


def test_annotated_masks_in_any_format():
    cell = {"height": 10, "width": 12, "objects": "[[1,[[1,1,5,1,5,5,1,5]]]]"}
    image = Image.new("RGB", (12, 10))
    split = build_split([image], ["a"], [[0]], NAMES, [cell], PolygonMask()).with_format("torch")
    check_dataset(datasets.DatasetDict(validation=split))
    aligned = same_columns(datasets.DatasetDict(validation=split))
    assert (np.asarray(aligned["validation"].with_format(None)[0]["mask"]) == 1).sum() == 16


def test_a_long_check_says_how_far_it_is(devkit, capsys, monkeypatch):
    lines = []
    monkeypatch.setattr(checks, "progress_bar", lambda scans, *given, **_: lines.append(given) or scans)
    check_dataset(load_voc2012(devkit.root))
    assert ("checking the split 'train'", 6) in lines


def test_the_reason_is_told_where_every_record_is_left_out(devkit):
    loaded = load_voc2012(devkit.root)
    for image_id in devkit.train_ids:
        (devkit.voc / "JPEGImages" / f"{image_id}.jpg").write_bytes(b"none")
    sentence = "The split 'train' is empty after all 6 records were left out: the image .* does not decode"
    with pytest.raises(ValueError, match=sentence):
        check_dataset(loaded, "skip")


def test_records_are_read_a_few_at_once(tmp_path, monkeypatch):
    paths = [tmp_path / f"{index}.png" for index in range(40)]
    for index, path in enumerate(paths):
        Image.new("RGB", (3, 2)).save(path) if index != 21 else path.write_bytes(b"no image")
    split = build_split([str(path) for path in paths], [path.stem for path in paths], [[0]] * 40, NAMES)
    asked, original = [], datasets.Dataset.__getitem__
    monkeypatch.setattr(datasets.Dataset, "__getitem__", lambda split, key: asked.append(key) or original(split, key))
    left_out = {}
    kept = check_dataset(datasets.DatasetDict(train=split), "skip", left_out=left_out)
    assert left_out == {"train": [21]} and len(kept["train"]) == 39
    assert len(asked) < 10 and not any(isinstance(key, int) for key in asked)
