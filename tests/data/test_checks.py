import logging

import datasets
import numpy as np
import pytest
from devkit_utils import save_mask

from synernet_hf.data import build_split, check_dataset, load_shapes, load_voc2012


NAMES = ["background", "cat", "dog"]


def split_of(labels):
    ids = [f"picture_{index}" for index in range(len(labels))]
    return build_split([f"{name}.jpg" for name in ids], ids, np.array(labels).reshape(-1, 2), NAMES)


def test_a_good_data_set_passes_and_is_counted(devkit):
    counts = check_dataset(load_voc2012(devkit.root))
    for split, ids in (("train", devkit.train_ids), ("validation", devkit.validation_ids)):
        for name in ("cat", "dog", "person", "sofa"):
            assert counts[split][name] == sum(name in devkit.labels[image_id] for image_id in ids)
    assert sum(check_dataset(load_shapes(4, 2))["train"].values()) >= 4


def test_empty_split():
    with pytest.raises(ValueError, match="'validation' is empty"):
        check_dataset(datasets.DatasetDict(train=split_of([[1, 0]]), validation=split_of([])))
    with pytest.raises(ValueError, match="has no split"):
        check_dataset(datasets.DatasetDict())


def test_label_vector_of_wrong_length():
    split = split_of([[1, 0], [0, 1]])
    info = split.info.copy()
    table = split.to_dict() | {"image_labels": [[1, 0], [0, 1, 0]]}
    wrong = datasets.Dataset.from_dict(table, features=split.features, info=info)
    with pytest.raises(
        ValueError, match="picture_1 in the split 'train' has the length 3, but there are 2 foreground"
    ):
        check_dataset(datasets.DatasetDict(train=wrong))


def test_label_values_other_than_zero_and_one():
    with pytest.raises(ValueError, match="picture_1 in the split 'train' holds values other than 0 and 1"):
        check_dataset(datasets.DatasetDict(train=split_of([[1, 0], [0, 3]])))


def test_no_positive_label_at_all():
    with pytest.raises(ValueError, match="No picture of the split 'train' has a positive label"):
        check_dataset(datasets.DatasetDict(train=split_of([[0, 0], [0, 0]])))


def test_class_without_pictures_is_only_reported(caplog):
    with caplog.at_level(logging.WARNING):
        check_dataset(datasets.DatasetDict(train=split_of([[0, 1]])), decode_pictures=False)
    assert "No training picture shows cat" in caplog.text


@pytest.mark.parametrize("broken", ["text", "truncated", "missing"])
def test_picture_that_does_not_decode(devkit, broken):
    loaded = load_voc2012(devkit.root)
    path = devkit.voc / "JPEGImages" / f"{devkit.train_ids[2]}.jpg"
    content = path.read_bytes()
    if broken == "missing":
        path.unlink()
    else:
        path.write_bytes(b"no picture" if broken == "text" else content[: len(content) // 2])
    sentence = (
        f"1 of 6 records of the split 'train' can not be used: the picture {devkit.train_ids[2]} does not decode"
    )
    with pytest.raises(ValueError, match=sentence):
        check_dataset(loaded)
    check_dataset(loaded, decode_pictures=False)


def test_mask_of_another_size_or_broken(devkit):
    first, second = devkit.validation_ids[:2]
    save_mask(np.zeros((10, 12), dtype=np.uint8), devkit.voc / "SegmentationClassAug" / f"{first}.png")
    (devkit.voc / "SegmentationClassAug" / f"{second}.png").write_bytes(b"no mask")
    loaded = load_voc2012(devkit.root)
    with pytest.raises(ValueError, match=rf"mask of {first} is \(12, 10\).*the mask of {second} does not decode"):
        check_dataset(loaded)


def test_training_masks_are_not_touched():
    loaded = load_shapes(3, 2, with_train_masks=True)
    broken = [{"bytes": b"no mask", "path": None}] * 3
    columns = loaded["train"].cast_column("image", datasets.Image(decode=False)).remove_columns("mask")[:]
    train = build_split(
        columns["image"], columns["image_id"], columns["image_labels"], ["background"] + list("abcde"), broken
    )
    check_dataset(datasets.DatasetDict(train=train))
