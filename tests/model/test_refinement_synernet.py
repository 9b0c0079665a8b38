"""Pixel-adaptive refinement and the two-hypothesis label: properties, and a slow implementation written out here."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from synernet_hf.model.refinement_synernet import (
    SynerNetPixelAdaptiveRefinement,
    box_mask,
    denormalize,
    ignore_outside,
    masks_to_boxes,
    present_classes,
    refine_pseudo_labels,
)


LOW, HIGH = 0.25, 0.7


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def test_affinity_sums_to_one_and_a_hundredth():
    images = torch.rand(2, 3, 9, 7)
    weights = SynerNetPixelAdaptiveRefinement((1, 2)).affinity(images)
    assert weights.shape == (2, 16, 9, 7)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.full((2, 9, 7), 1.01))


@settings(max_examples=10, deadline=None)
@given(st.floats(0, 1), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_constant_maps_stay_constant(value, iterations, height, width, seed):
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    refined = SynerNetPixelAdaptiveRefinement((1, 3), iterations)(images, torch.full((1, 2, height, width), value))
    torch.testing.assert_close(refined, torch.full_like(refined, value * 1.01**iterations))


def test_a_flat_image_has_finite_weights():
    refined = SynerNetPixelAdaptiveRefinement((1, 2), 3)(torch.full((1, 3, 5, 5), 0.4), torch.rand(1, 2, 5, 5))
    assert refined.isfinite().all()


def test_equal_to_loops_over_pixels():
    dilations, iterations, height, width = (1, 2), 2, 4, 5
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(3, height, width, generator=generator, dtype=torch.float64)
    maps = torch.rand(2, height, width, generator=generator, dtype=torch.float64)
    offsets = [
        (row * dilation, column * dilation)
        for dilation in dilations
        for row, column in itertools.product((-1, 0, 1), repeat=2)
        if (row, column) != (0, 0)
    ]
    lengths = torch.tensor([math.hypot(*offset) for offset in offsets], dtype=torch.float64)
    position = torch.softmax(-((lengths / (lengths.std() + 1e-8) / 0.3) ** 2), dim=0)

    def at(array, y, x):
        return array[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    expected = maps
    for _ in range(iterations):
        step = torch.empty_like(expected)
        for y, x in itertools.product(range(height), range(width)):
            colours = torch.stack([at(image, y + dy, x + dx) for dy, dx in offsets])
            scaled = (colours - image[:, y, x]).abs() / (colours.std(dim=0) + 1e-8) / 0.3
            weights = torch.softmax(-(scaled**2).mean(dim=1), dim=0) + 0.01 * position
            values = torch.stack([at(expected, y + dy, x + dx) for dy, dx in offsets])
            step[:, y, x] = (weights[:, None] * values).sum(dim=0)
        expected = step
    actual = SynerNetPixelAdaptiveRefinement(dilations, iterations)(image[None], maps[None])[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_maps_of_another_size_are_resized_to_the_image():
    refinement = SynerNetPixelAdaptiveRefinement((1,), 1)
    images, maps = torch.rand(1, 3, 8, 6), torch.rand(1, 2, 4, 3)
    resized = torch.nn.functional.interpolate(maps, size=(8, 6), mode="bilinear", align_corners=False)
    torch.testing.assert_close(refinement(images, maps), refinement(images, resized))


@pytest.mark.parametrize("dilations", [(), (0,), (1, -2)])
def test_dilations_must_be_positive(dilations):
    with pytest.raises(ValueError, match="dilations must be positive integers"):
        SynerNetPixelAdaptiveRefinement(dilations)


def two_colours(height=40, width=48, edge=24):
    images = torch.zeros(1, 3, height, width)
    images[..., edge:] = 1.0
    return images


def test_a_noisy_label_snaps_to_the_colour_edge():
    images = two_colours()
    cams = torch.zeros(1, 2, *images.shape[-2:])
    cams[:, 0, :, 28:] = 0.95  # four columns short of the edge
    noise = torch.rand(images.shape[-2:], generator=torch.Generator().manual_seed(0)) < 0.1
    cams[:, 0] = torch.where(noise, 1.0 - cams[:, 0], cams[:, 0])
    labels = torch.tensor([[1.0, 0.0]])
    truth = (images[:, 0] > 0.5).long()
    label = refine_pseudo_labels(images, cams, labels, LOW, HIGH)
    decided = label != 255
    assert decided.float().mean() > 0.9
    assert (label == truth)[decided].float().mean() > 0.99
    raw = (cams[:, 0] > 0.5).long()
    assert (label == truth).float().mean() > (raw == truth).float().mean() + 0.05


@pytest.mark.parametrize("num_classes", [1, 2, 5, 20, 80])
@pytest.mark.parametrize("size", [(16, 16), (17, 30), (31, 9)])
def test_labels_are_own_classes_background_or_ignored(num_classes, size):
    generator = torch.Generator().manual_seed(num_classes)
    labels = (torch.rand(3, num_classes, generator=generator) > 0.6).float()
    labels[0] = 1.0  # every class
    labels[1] = 0.0  # none
    cams = torch.rand(3, num_classes, *size, generator=generator)
    label = refine_pseudo_labels(torch.rand(3, 3, *size, generator=generator), cams, labels, LOW, HIGH)
    assert label.shape == (3, *size)
    assert label.dtype == torch.int64
    assert (label[1] == 0).all()
    for image in range(3):
        allowed = {0, 255} | {index + 1 for index in range(num_classes) if labels[image, index]}
        assert set(label[image].unique().tolist()) <= allowed


def test_an_image_is_refined_alone_and_in_a_batch_alike():
    generator = torch.Generator().manual_seed(0)
    images, cams = torch.rand(3, 3, 20, 24, generator=generator), torch.rand(3, 4, 20, 24, generator=generator)
    labels = torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
    together = refine_pseudo_labels(images, cams, labels, LOW, HIGH)
    for index in range(3):
        part = slice(index, index + 1)
        assert torch.equal(refine_pseudo_labels(images[part], cams[part], labels[part], LOW, HIGH)[0], together[index])


def test_maps_of_absent_classes_do_not_matter():
    images, cams = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    labels = torch.tensor([[0.0, 1.0, 0.0]])
    others = cams.clone()
    others[:, [0, 2]] = 1.0
    assert torch.equal(
        refine_pseudo_labels(images, cams, labels, LOW, HIGH), refine_pseudo_labels(images, others, labels, LOW, HIGH)
    )


def test_certain_maps_are_certain_labels():
    images = torch.rand(1, 3, 16, 16)
    cams = torch.ones(1, 1, 16, 16)
    assert (refine_pseudo_labels(images, cams, torch.ones(1, 1), LOW, HIGH) == 1).all()
    assert (refine_pseudo_labels(images, 0 * cams, torch.ones(1, 1), LOW, HIGH) == 0).all()
    assert (refine_pseudo_labels(images, 0.5 * cams, torch.ones(1, 1), LOW, HIGH) == 255).all()


def test_outside_the_box_is_ignored():
    images, cams, labels = torch.rand(2, 3, 16, 20), torch.rand(2, 2, 16, 20), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    boxes = torch.tensor([[2, 10, 3, 17], [0, 16, 5, 20]])
    label = refine_pseudo_labels(images, cams, labels, LOW, HIGH, boxes)
    inside = box_mask(boxes, (16, 20))
    assert (label[~inside] == 255).all()
    assert (label[1][inside[1]] == 0).all()
    free = refine_pseudo_labels(images, cams, labels, LOW, HIGH)
    assert torch.equal(label[inside], free[inside])


def test_another_ignore_index():
    label = refine_pseudo_labels(
        torch.rand(1, 3, 8, 8), torch.full((1, 1, 8, 8), 0.5), torch.ones(1, 1), LOW, HIGH, ignore_index=-100
    )
    assert (label == -100).all()


def test_an_image_of_one_pixel():
    label = refine_pseudo_labels(torch.rand(1, 3, 1, 1), torch.ones(1, 1, 1, 1), torch.ones(1, 1), LOW, HIGH)
    assert label.tolist() == [[[1]]]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=4))
def test_own_classes_are_all_present_ones_and_no_other(rows):
    labels = torch.tensor(rows).float()
    order, present = present_classes(labels)
    assert order.shape == present.shape == (len(rows), max(int(labels.sum(dim=1).max()), 1))
    for row, ids, kept in zip(rows, order, present, strict=True):
        assert sorted(ids[kept].tolist()) == [index for index, value in enumerate(row) if value]


def test_box_mask_is_half_open():
    mask = box_mask(torch.tensor([[1, 3, 0, 2], [0, 0, 0, 4]]), (4, 4))
    assert mask[0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert not mask[1].any()


def test_ignoring_outside_leaves_the_given_map_as_it_is():
    label_map = torch.ones(1, 4, 4, dtype=torch.long)
    result = ignore_outside(label_map, torch.tensor([[0, 2, 0, 4]]))
    assert (label_map == 1).all()
    assert (result[:, 2:] == 255).all() and (result[:, :2] == 1).all()
    assert ignore_outside(label_map, None) is label_map


def test_several_sets_of_cams_are_refined_as_if_one_by_one():
    torch.manual_seed(0)
    images, cams = torch.rand(2, 3, 24, 32), torch.rand(3, 2, 4, 24, 32)
    labels = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]])
    together = refine_pseudo_labels(images, cams, labels, 0.25, 0.7)
    one_by_one = torch.stack([refine_pseudo_labels(images, maps, labels, 0.25, 0.7) for maps in cams])
    assert torch.equal(together, one_by_one)


@pytest.mark.parametrize("mean, std", [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ([0.5] * 3, [0.5] * 3)])
@pytest.mark.parametrize("route", ["division", "rescaling"])
def test_all_levels_of_an_8_bit_image_come_back(mean, std, route):
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    unit = levels.float() / 255 if route == "division" else levels.float() * (1 / 255)
    shape = (1, 3, 1, 1)
    pixel_values = (unit - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    found = denormalize(pixel_values, list(mean), list(std))
    assert torch.equal(found, levels.float() / 255)
    assert torch.equal((found * 255).round().to(torch.uint8), levels)


def test_a_box_spans_the_gaps_of_its_mask():
    mask = torch.zeros(4, 8, 10)
    mask[0, 1:3, 2:4] = mask[0, 5:7, 6:9] = 1
    mask[1, :, :] = 1
    mask[2, 7, 9] = 1
    assert masks_to_boxes(mask).tolist() == [[1, 7, 2, 9], [0, 8, 0, 10], [7, 8, 9, 10], [0, 0, 0, 0]]


@pytest.mark.parametrize("size", [(6, 8), (24, 32), (5, 40)])
def test_cams_of_another_size_are_resized_to_the_images(size):
    images, labels = torch.rand(2, 3, 12, 16), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    cams = torch.rand(2, 3, *size)
    expected = torch.nn.functional.interpolate(cams, size=(12, 16), mode="bilinear", align_corners=False)
    refinement = SynerNetPixelAdaptiveRefinement((1, 2), 2)
    found = refine_pseudo_labels(images, cams, labels, LOW, HIGH, refinement=refinement)
    assert found.shape == (2, 12, 16)
    assert torch.equal(found, refine_pseudo_labels(images, expected, labels, LOW, HIGH, refinement=refinement))


@pytest.mark.parametrize("size", [(12, 16), (6, 8)])
def test_cams_that_are_no_numbers_count_as_zero(size):
    images, labels = torch.rand(2, 3, 12, 16), torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    cams = torch.rand(2, 3, *size)
    broken = cams.clone()
    broken[0, 0, 2, 3] = broken[1, 1, 4] = float("nan")
    refinement = SynerNetPixelAdaptiveRefinement((1, 2), 2)
    found = refine_pseudo_labels(images, broken, labels, LOW, HIGH, refinement=refinement)
    cleared = torch.where(broken.isnan(), 0.0, cams)
    assert torch.equal(found, refine_pseudo_labels(images, cleared, labels, LOW, HIGH, refinement=refinement))


def test_the_number_of_images_at_once_and_empty_maps_change_nothing(monkeypatch):
    refinement = SynerNetPixelAdaptiveRefinement((1, 3), 3)
    images, maps = torch.rand(5, 3, 9, 7), torch.rand(5, 4, 9, 7)
    maps[1, 2] = 0
    maps[3] = 0
    together = refinement(images, maps)
    for floats in (1, 600):
        monkeypatch.setattr("synernet_hf.model.refinement_synernet._CACHED_FLOATS", floats)
        assert torch.equal(refinement(images, maps), together)
    alone = [refinement(image[None], maps[index : index + 1]) for index, image in enumerate(images)]
    assert torch.equal(torch.cat(alone), together)
    assert not together[3].any() and together[0].all()
