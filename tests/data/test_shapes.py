import colorsys

import numpy as np
import pytest

from synernet_hf.data import SHAPES_CLASSES, class_names, load_shapes
from synernet_hf.data.shapes import CLUTTER_WITH_CLASS, CLUTTER_WITHOUT_CLASS


def pairs(split):
    """Images and masks as arrays."""
    return [(np.asarray(record["image"]), np.asarray(record["mask"])) for record in split]


def drawn_shapes(number, image_size, seed=0):
    return pairs(load_shapes(number, 1, image_size, seed, with_train_masks=True)["train"])


@pytest.fixture(scope="module")
def drawn():
    return drawn_shapes(150, 64)


def test_splits_columns_and_classes():
    loaded = load_shapes(5, 3, image_size=48)
    assert loaded["train"].column_names == ["image", "image_id", "labels"]
    assert loaded["validation"].column_names == ["image", "image_id", "labels", "mask"]
    assert (len(loaded["train"]), len(loaded["validation"])) == (5, 3)
    assert class_names(loaded) == SHAPES_CLASSES
    assert loaded["train"][0]["image"].size == loaded["validation"][0]["mask"].size == (48, 48)


def test_labels_are_the_classes_in_the_mask():
    loaded = load_shapes(20, 1, with_train_masks=True)
    for record in loaded["train"]:
        present = np.isin(np.arange(1, 6), np.asarray(record["mask"]))
        assert record["labels"] == np.flatnonzero(present).tolist()
        assert 1 <= present.sum() <= 3


def test_same_seed_same_images_and_a_larger_set_starts_with_the_smaller():
    small, large, other = (drawn_shapes(number, 40, seed) for number, seed in ((3, 1), (6, 1), (3, 2)))
    for (image, mask), (same_image, same_mask) in zip(small, large, strict=False):
        assert (image == same_image).all() and (mask == same_mask).all()
    assert not any((one == two).all() for (one, _), (two, _) in zip(small, other, strict=True))


def test_train_and_validation_share_no_image():
    loaded = load_shapes(10, 10, 40, with_train_masks=True)
    images = [image for split in loaded.values() for image, _ in pairs(split)]
    assert len({image.tobytes() for image in images}) == 20


def test_all_classes_occur_often_and_objects_have_many_sizes(drawn):
    frequencies = np.mean([np.isin(np.arange(1, 6), mask) for _, mask in drawn], axis=0)
    assert (frequencies > 0.2).all() and (frequencies < 0.6).all()
    areas = np.array([(mask == index).mean() for _, mask in drawn for index in np.unique(mask)[1:]])
    assert areas.min() > 0.002, "an object too small to see"
    assert areas.max() > 8 * areas.min() and np.quantile(areas, 0.9) > 3 * np.quantile(areas, 0.1)
    assert 0.7 < np.mean([(mask == 0).mean() for _, mask in drawn]) < 0.9


def test_objects_often_touch(drawn):
    def touching(mask):
        return any(
            ((one != other) & (one > 0) & (other > 0)).any()
            for one, other in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]))
        )

    several = [mask for _, mask in drawn if len(np.unique(mask)) > 2]
    assert np.mean([touching(mask) for mask in several]) > 0.4


def test_a_part_of_an_object_is_strongly_textured_and_most_of_it_is_plain(drawn):
    shares = []
    for image, mask in drawn:
        values = image.max(axis=-1).astype(float)
        steps = np.abs(np.diff(values, axis=1, prepend=values[:, :1]))
        inner = (mask > 0) & (np.roll(mask, 1, axis=1) == mask) & (np.roll(mask, -1, axis=1) == mask)
        shares.append((steps[inner] > 40).mean() if inner.any() else 0.0)
    assert 0.05 < np.mean(shares) < 0.4


def test_heads_have_the_hue_of_their_class(drawn):
    for class_id in range(1, 6):
        strong = np.concatenate([image[(mask == class_id)] for image, mask in drawn]) / 255
        hues = [colorsys.rgb_to_hsv(*pixel) for pixel in strong[:: max(1, len(strong) // 2000)]]
        vivid = np.array([hue for hue, saturation, value in hues if saturation > 0.8 and value > 0.8])
        distance = np.abs((vivid - (class_id - 1) / 5 + 0.5) % 1 - 0.5)
        assert len(vivid) > 20 and np.median(distance) < 0.05


def test_clutter_goes_with_its_class(drawn):
    assert CLUTTER_WITH_CLASS > 3 * CLUTTER_WITHOUT_CLASS
    # turquoise bars: the clutter of dots, a hue that no head, body or distractor of that strength has
    with_class, without = [], []
    for image, mask in drawn:
        pixels = image.astype(float)[mask == 0]
        low, high = pixels.min(axis=1), pixels.max(axis=1)
        turquoise = (pixels[:, 0] < 0.75 * high) & (np.abs(pixels[:, 1] - pixels[:, 2]) < 0.2 * high)
        share = (turquoise & (high - low > 40)).mean()
        (with_class if (mask == 3).any() else without).append(share > 0.02)
    assert np.mean(with_class) > np.mean(without) + 0.3


def test_bad_sizes_get_a_sentence():
    with pytest.raises(ValueError, match="give at least one of each"):
        load_shapes(0, 5)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        load_shapes(5, 5, image_size=16)
