"""What a batch's CAMs teach: coverage schedule, token labels, fused labels and the classes of instance learning."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_utils import ALL_TERMS, SynerNetModelTester
from torch.utils._python_dispatch import TorchDispatchMode

from synernet_hf.model import objective_synernet
from synernet_hf.model.cam_synernet import (
    BranchPair,
    area_shares,
    cams_to_pseudo_labels,
    fuse_branches,
    mask_absent_classes,
)
from synernet_hf.model.objective_synernet import coverage, label_tokens, make_targets, pick_instance_classes
from synernet_hf.model.refinement_synernet import (
    SynerNetPixelAdaptiveRefinement,
    denormalize,
    present_classes,
    refine_pseudo_labels,
    select_classes,
)


NONE = dict.fromkeys(ALL_TERMS, 0.0)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def make_config(**fields):
    return SynerNetModelTester(**fields).config()


def random_cams(labels, size=(32, 32)):
    """As `multi_scale_cams` gives them, both branches and layers unlike."""
    maps = [mask_absent_classes(torch.rand(*labels.shape, *size), labels) for _ in range(4)]
    return BranchPair(tuple(maps[:2]), tuple(maps[2:]))


@pytest.fixture
def targets_of(monkeypatch):
    """`make_targets` with the given CAMs of all classes in place of a model's."""

    def run(config, cams, images, labels, boxes, weights, progress):
        class Model:
            def seen_in(self, outputs, size):
                return None

        def chosen(model, pixel_values, present, *_, **__):
            return BranchPair(*(tuple(select_classes(maps, present.ids) for maps in layers) for layers in cams))

        Model.config = config
        monkeypatch.setattr(objective_synernet, "multi_scale_cams", chosen)
        return make_targets(Model(), images, None, labels, boxes, weights, progress)

    return run


# coverage


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["broad", "precise"]))
def test_coverage_is_never_negative(progress, switch, branch):
    config = make_config(coverage_switch=switch)
    assert 0 <= coverage(config, branch, progress) <= config.broad_coverage


def test_coverage_schedule_of_the_broad_branch():
    config = make_config()
    assert coverage(config, "broad", 0.0) == coverage(config, "broad", 0.499) == 0.2
    assert coverage(config, "broad", 0.5) == pytest.approx(0.1)
    assert coverage(config, "broad", 0.75) == pytest.approx(0.1 * math.cos(math.pi / 4))
    assert coverage(config, "broad", 1.0) == pytest.approx(0.0)
    assert coverage(config, "broad", 1.5) == 0.0
    late = [coverage(config, "broad", 0.5 + 0.05 * step) for step in range(11)]
    assert late == sorted(late, reverse=True)


def test_coverage_of_the_precise_branch_is_constant():
    config = make_config(precise_coverage=0.05)
    assert {coverage(config, "precise", progress) for progress in (0.0, 0.5, 1.0)} == {0.05}


# token labels


def test_token_labels_are_the_bands_of_the_resized_cams():
    config, labels = make_config(), torch.tensor([[1.0, 0, 1]])
    cams = torch.rand(1, 3, 32, 40)
    resized = torch.nn.functional.interpolate(cams, size=(4, 5), mode="bilinear", align_corners=False)
    expected = cams_to_pseudo_labels(resized, labels, config.low_threshold, config.high_threshold, ignore_index=-1)
    assert torch.equal(label_tokens(config, cams, labels, None), expected)


def test_tokens_outside_the_box_are_ignored():
    config, labels = make_config(), torch.zeros(2, 3)
    boxes = torch.tensor([[0, 31, 8, 32], [16, 32, 0, 15]])
    tokens = label_tokens(config, torch.rand(2, 3, 32, 32), labels, boxes)
    expected = torch.full((2, 4, 4), -1)
    expected[0, 0:3, 1:4] = 0  # row 3 holds one padded line
    expected[1, 2:4, 0:1] = 0
    assert torch.equal(tokens, expected)


@pytest.mark.parametrize("boxes", [None, torch.tensor([[0, 30, 0, 45]])])
def test_tokens_reaching_past_the_image_are_ignored(boxes):
    config = make_config()
    tokens = label_tokens(config, torch.ones(1, 3, 30, 45), torch.tensor([[0.0, 1, 0]]), boxes)
    assert tokens.shape == (1, 4, 6)
    assert (tokens[:, :3, :5] == 2).all()
    assert (tokens[:, 3] == -1).all() and (tokens[:, :, 5] == -1).all()


# fusion


def test_fixed_fusion_is_the_constant_mix():
    labels = torch.tensor([[1.0, 1, 0]])
    cams = random_cams(labels)
    fused, confidence = fuse_branches(make_config(fusion="fixed"), cams, labels)
    broad, precise = cams.broad[0], cams.precise[0]
    torch.testing.assert_close(fused.broad, 0.3 * broad + 0.7 * precise)
    torch.testing.assert_close(fused.precise, 0.5 * broad + 0.5 * precise)
    assert confidence.shape == (1, 1, 32, 32)


def test_without_cross_supervision_each_branch_keeps_its_own_cam():
    labels = torch.ones(1, 3)
    cams = random_cams(labels)
    fused, _ = fuse_branches(make_config(cross_supervision=False), cams, labels)
    for maps, layers in zip(fused, cams, strict=True):
        assert torch.equal(maps, layers[0])


@pytest.mark.parametrize("threshold", [1.0, 0.75, 0.5])
def test_confident_pixels_take_the_agreed_label_in_both_fused_cams(threshold):
    config = make_config(confidence_threshold=threshold)
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    cams = random_cams(labels)
    fused, confidence = fuse_branches(config, cams, labels)
    first, second = (
        cams_to_pseudo_labels(maps, labels, config.low_threshold, config.high_threshold) for maps in fused
    )
    confident = confidence[:, 0] >= threshold
    assert confident.any() and not confident.all()
    assert torch.equal(first[confident], second[confident])
    assert (first[confident] != 255).all()
    assert (confidence[1] == 1).all() and (first[1] == 0).all()


def test_unanimous_layers_decide_the_fused_label():
    config, labels = make_config(), torch.ones(1, 3)
    same = torch.rand(1, 3, 16, 16)
    fused, confidence = fuse_branches(config, BranchPair((same, same), (same, same)), labels)
    states = cams_to_pseudo_labels(same, labels, config.low_threshold, config.high_threshold)
    assert torch.equal(confidence[:, 0] == 1, states != 255)
    for maps in fused:
        fused_states = cams_to_pseudo_labels(maps, labels, config.low_threshold, config.high_threshold)
        assert torch.equal(fused_states, states)


@pytest.mark.parametrize("fusion", ["confidence", "fixed"])
def test_fused_cams_stay_in_range_and_within_the_labels(fusion):
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 1]])
    fused, confidence = fuse_branches(make_config(fusion=fusion), random_cams(labels), labels)
    assert 0 <= confidence.min() and confidence.max() <= 1
    for maps in fused:
        assert 0 <= maps.min() and maps.max() <= 1
        assert not maps[labels == 0].any()


# everything together


def test_only_what_a_loss_needs_is_made(targets_of):
    config, labels = make_config(), torch.tensor([[1.0, 0, 1]])
    cams, images = random_cams(labels), torch.rand(1, 3, 32, 32)

    def made(**weights):
        targets, confidence = targets_of(config, cams, images, labels, None, NONE | weights, 0.0)
        assert (confidence is None) == (targets.broad.pseudo_labels is None)
        return {name for target in targets for name, value in target._asdict().items() if value is not None}

    assert made() == set()
    assert made(cls=1.0, cls_aux=1.0) == set()
    assert made(patch_contrast=1.0) == {"token_labels"}
    assert made(spatial_bce=1.0) == {"area_shares"}
    assert made(segmentation=1.0) == made(prototype_contrast=1.0) == {"pseudo_labels"}


@pytest.mark.parametrize(("progress", "source"), [(0.4, "auxiliary"), (0.5, "mean")])
def test_area_shares_are_read_from_the_auxiliary_cams_first_and_the_mean_later(targets_of, progress, source):
    config, labels = make_config(spatial_bce_branches=("broad", "precise")), torch.tensor([[1.0, 1, 1], [0, 0, 1]])
    cams = random_cams(labels)
    weights = NONE | {"spatial_bce": 1.0}
    targets, _ = targets_of(config, cams, torch.rand(2, 3, 32, 32), labels, None, weights, progress)
    for branch, layers, target in zip(BranchPair._fields, cams, targets, strict=True):
        maps = layers[1] if source == "auxiliary" else 0.5 * (cams.broad[0] + cams.precise[0])
        rho = coverage(config, branch, progress)
        assert torch.equal(target.area_shares, area_shares(maps, labels, rho, 0.25, 0.7))


def test_the_broad_branch_gets_more_area_than_the_precise_one(targets_of):
    config, labels = make_config(spatial_bce_branches=("broad", "precise")), torch.ones(1, 3)
    same = torch.rand(1, 3, 32, 32)
    cams = BranchPair((same, same), (same, same))
    for progress in (0.0, 0.5, 0.9):
        weights = NONE | {"spatial_bce": 1.0}
        targets, _ = targets_of(config, cams, torch.rand(1, 3, 32, 32), labels, None, weights, progress)
        assert (targets.broad.area_shares > targets.precise.area_shares).all()


def test_spatial_branches_are_the_configured_ones(targets_of):
    config, labels = make_config(spatial_bce_branches=("broad",)), torch.ones(1, 3)
    weights = NONE | {"spatial_bce": 1.0}
    targets, _ = targets_of(config, random_cams(labels), torch.rand(1, 3, 32, 32), labels, None, weights, 0.0)
    assert targets.broad.area_shares is not None and targets.precise.area_shares is None


def test_pseudo_labels_are_the_refined_fused_cams(targets_of):
    # classes at different places, one image with all, one with none
    labels = torch.tensor([[0.0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]])
    config = make_config(semantic_loss_ignore_index=77)
    images, boxes = torch.rand(4, 3, 32, 32), torch.tensor([[0, 24, 8, 32]] * 4)
    # patches large enough to outlive the refinement
    enlarge = torch.nn.UpsamplingNearest2d(scale_factor=16)
    cams = BranchPair(*(tuple(map(enlarge, layers)) for layers in random_cams(labels, (2, 2))))
    weights = NONE | {"segmentation": 1.0, "patch_contrast": 1.0}
    targets, seen_confidence = targets_of(config, cams, images, labels, boxes, weights, 0.0)
    fused, confidence = fuse_branches(config, cams, labels)
    refinement = SynerNetPixelAdaptiveRefinement((1, 2), 2)
    pixels = denormalize(images, config.image_mean, config.image_std)
    names = torch.nn.functional.pad(present_classes(labels).ids + 1, (1, 0))
    for layers, maps, target in zip(cams, fused, targets, strict=True):
        expected = refine_pseudo_labels(pixels, maps, labels, 0.25, 0.7, boxes, 77, refinement)
        assert torch.equal(target.pseudo_labels, expected)
        assert {1, 2, 3, 77} <= set(expected.unique().tolist())
        # tokens are counted over the classes of each image
        named = names.gather(1, target.token_labels.clamp(min=0).flatten(1)).view_as(target.token_labels)
        named = named.masked_fill(target.token_labels == -1, -1)
        assert torch.equal(named, label_tokens(config, layers[1], labels, boxes))
    assert torch.equal(seen_confidence, confidence)


# what a step does not do


class CopiesBetweenDevices(TorchDispatchMode):
    """Notes whether each copy from one device to another lets the host go on."""

    def __init__(self):
        super().__init__()
        self.goes_on = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() == "aten::_to_copy" and args[0].device != result.device:
            self.goes_on.append((kwargs or {}).get("non_blocking", False))
        return result


@pytest.mark.parametrize("fields", [{}, {"precise_propagation_temperature": 0.2, "with_class_token_head": True}])
def test_a_training_step_never_waits_for_the_device(monkeypatch, fields):
    """Tensors of the device `meta` have no values: whatever asks for one fails."""
    tester = SynerNetModelTester(**fields)
    model, inputs = tester.model().train(), tester.inputs()
    inputs["valid_boxes"] = torch.tensor([[0, 24, 8, 32]] * len(inputs["labels"]))
    monkeypatch.setattr(torch, "autocast", lambda **_: nullcontext())  # which knows no `meta`
    model.to("meta")
    inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    with CopiesBetweenDevices() as copies:
        model(**inputs, loss_weights=ALL_TERMS, training_progress=0.7, max_labels=2).loss.backward()
    assert copies.goes_on and all(copies.goes_on)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(**inputs, loss_weights=ALL_TERMS)  # reads how many classes the images have


def test_the_number_of_classes_may_be_given():
    tester = SynerNetModelTester()
    model, inputs = tester.model().eval(), tester.inputs()
    most = int(inputs["labels"].sum(dim=1).max())
    read, given = (model(**inputs, loss_weights=ALL_TERMS, max_labels=number) for number in (None, most))
    assert torch.equal(read.loss, given.loss) and torch.equal(read.pseudo_labels, given.pseudo_labels)


def test_decoders_rest_until_their_loss_counts():
    tester = SynerNetModelTester()
    model, inputs = tester.model().train(), tester.inputs()
    calls = []
    for branch in model.synernet.pair:
        branch.decode_head.register_forward_hook(lambda *_: calls.append(1))
    weights = ALL_TERMS | {"prototype_contrast": 0.0}  # whose term moves its prototypes
    closed = model(**inputs, loss_weights=weights | {"segmentation": 0.0})
    assert not calls and closed.logits is None and closed.broad_logits is None and closed.precise_logits is None
    opened = model(**inputs, loss_weights=weights)
    assert len(calls) == 2 and opened.logits.shape[-2:] == inputs["pixel_values"].shape[-2:]
    assert (
        closed.loss_dict == {name: opened.loss_dict[name] for name in closed.loss_dict} and len(closed.loss_dict) > 2
    )
    model.eval()
    assert model(**inputs, loss_weights=ALL_TERMS | {"segmentation": 0.0}).logits is not None


# instance learning


def test_instance_classes_are_drawn_evenly_from_the_label_map():
    label_map = torch.zeros(1, 4, 4, dtype=torch.long)
    label_map[0, 0, 0], label_map[0, 1:3] = 1, 3  # one pixel of class 0, many of class 2
    label_map[0, 3] = 255
    drawn = pick_instance_classes(
        label_map.expand(6, -1, -1), torch.ones(6, 4), torch.tensor([0, 1, 2, 3, 4, 2**62 + 1])
    )
    assert drawn.tolist() == [0, 2, 0, 2, 0, 2]


@pytest.mark.parametrize("filling", [0, 255])
def test_instance_classes_fall_back_on_the_image_labels(filling):
    label_map = torch.full((4, 2, 2), filling)
    labels = torch.tensor([[0.0, 1, 1, 0]]).expand(4, -1)
    assert pick_instance_classes(label_map, labels, torch.arange(4)).tolist() == [1, 2, 1, 2]


def test_an_image_without_any_class_gets_minus_one():
    label_map = torch.zeros(3, 2, 2, dtype=torch.long)
    label_map[1, 0, 0] = 2
    drawn = pick_instance_classes(label_map, torch.tensor([[0.0, 0, 0], [0, 0, 0], [0, 0, 1]]), torch.arange(3))
    assert drawn.tolist() == [-1, 1, 2]
    assert drawn.dtype == torch.int64


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=4), st.integers(0, 2**63 - 1))
def test_an_absent_class_is_never_drawn(rows, draw):
    labels = torch.zeros(len(rows), 5)
    for index, classes in enumerate(rows):
        labels[index, sorted(classes)] = 1
    drawn = pick_instance_classes(torch.full((len(rows), 2, 2), 255), labels, torch.full((len(rows),), draw)).tolist()
    for class_id, classes in zip(drawn, rows, strict=True):
        assert class_id in classes if classes else class_id == -1


def test_the_affinity_is_built_once_per_image(monkeypatch, targets_of):
    calls = []
    original = SynerNetPixelAdaptiveRefinement.affinity

    def counting(self, images):
        calls.append(images.shape[0])
        return original(self, images)

    monkeypatch.setattr(SynerNetPixelAdaptiveRefinement, "affinity", counting)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    targets, _ = targets_of(
        make_config(), random_cams(labels), torch.rand(2, 3, 32, 32), labels, None, NONE | {"segmentation": 1.0}, 0.5
    )
    assert calls == [2]
    assert all(target.pseudo_labels is not None for target in targets)
