"""Class activation maps: ranges, symmetries and the voting between layers and branches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from testing_utils import SynerNetModelTester

from synernet_hf import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.model.cam_synernet import (
    BranchPair,
    area_shares,
    cams_to_pseudo_labels,
    crop_to_input,
    fuse_cams,
    fusion_shares,
    joint_features,
    layer_confidence,
    mask_absent_classes,
    multi_scale_cams,
    normalize_cams,
    propagate_cams,
)
from synernet_hf.model.refinement_synernet import present_classes, spread_classes


LOW, HIGH = 0.25, 0.7
SEEDS = st.integers(0, 999)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def seeded(seed, *shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model():
    return SynerNetModelTester(num_classes=4).model()


# making them


def test_a_cam_is_the_classifier_at_every_token(model):
    head, features = model.synernet.broad_branch.cam_head, torch.randn(2, 16, 3, 4)
    with torch.no_grad():
        scores, cams = head(features)
        assert cams.shape == (2, 4, 3, 4) and scores.shape == (2, 4)
        torch.testing.assert_close(cams[1, :, 2, 3], head.classifier.weight @ features[1, :, 2, 3])
        torch.testing.assert_close(cams, head.classifier(features.movedim(1, -1)).movedim(-1, 1))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(1e-3, 1e4), st.floats(0, 10))
def test_normalised_maps_lie_in_the_unit_interval(seed, scale, shift):
    cams = normalize_cams(seeded(seed, 2, 3, 4, 5) * scale + shift)
    assert cams.min() == 0
    assert 0.9 < cams.amax(dim=(-2, -1)).min() and cams.max() <= 1


def test_normalising_a_constant_map_gives_zeros():
    assert not normalize_cams(torch.full((1, 2, 3, 3), 4.0)).any()


def test_masking_keeps_the_maps_of_the_labels():
    cams, labels = torch.rand(2, 3, 4, 4), torch.tensor([[1, 0, 1], [0, 0, 0]])
    masked = mask_absent_classes(cams, labels)
    assert torch.equal(masked[0, [0, 2]], cams[0, [0, 2]])
    assert not masked[0, 1].any() and not masked[1].any()
    assert mask_absent_classes(cams, None) is cams


def test_crop_to_input_is_resize_then_crop():
    maps = torch.rand(1, 2, 3, 4)
    assert crop_to_input(maps, (24, 32), 8) is maps
    cropped = crop_to_input(maps, (19, 30), 8)
    whole = torch.nn.functional.interpolate(maps, size=(24, 32), mode="bilinear", align_corners=False)
    assert torch.equal(cropped, whole[..., :19, :30])


def _all_classes(model, pixel_values, labels, scales, flip=True, seen=None, plain=False):
    """CAMs of the present classes, spread over all classes; of all classes without labels."""
    present = None if labels is None else present_classes(labels)
    cams = multi_scale_cams(model, pixel_values, present, scales, flip, plain, seen)
    if labels is None:
        return cams
    return BranchPair(*(tuple(spread_classes(maps, present, labels.shape[1]) for maps in layers) for layers in cams))


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (30, 45), (7, 5)])
@pytest.mark.parametrize("flip", [True, False])
def test_multi_scale_cams_fit_the_image(model, size, flip):
    pixel_values = torch.randn(2, 3, *size)
    cams = multi_scale_cams(model, pixel_values, scales=(1.0, 0.5, 1.25), flip=flip)
    for last, auxiliary in (cams.broad, cams.precise):
        for maps in (last, auxiliary):
            assert maps.shape == (2, 4, *size)
            assert not maps.requires_grad
            assert 0 <= maps.min() and maps.max() <= 1


@pytest.mark.parametrize("rows", [[[1, 0, 0, 1], [0, 1, 0, 0]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[0] * 4, [0] * 4]])
def test_only_the_classes_of_the_labels_are_computed_and_equal_masking_afterwards(model, rows):
    pixel_values, labels = torch.randn(2, 3, 32, 24), torch.tensor(rows).float()
    present = present_classes(labels)
    own = multi_scale_cams(model, pixel_values, present, scales=(1.0, 0.75))
    everything = multi_scale_cams(model, pixel_values, None, scales=(1.0, 0.75))
    for layers, all_layers in zip(own, everything, strict=True):
        for actual, maps in zip(layers, all_layers, strict=True):
            assert actual.shape[1] == max(int(labels.sum(dim=1).max()), 1)
            torch.testing.assert_close(spread_classes(actual, present, 4), mask_absent_classes(maps, labels))


def test_mirrored_images_have_mirrored_cams(model):
    # sides and scaled sides are multiples of the patch, so that nothing is cut or padded at one side
    pixel_values = torch.randn(1, 3, 32, 48)
    straight = multi_scale_cams(model, pixel_values, scales=(1.0, 0.5, 1.5), flip=True)
    mirrored = multi_scale_cams(model, pixel_values.flip(-1), scales=(1.0, 0.5, 1.5), flip=True)
    for layers, straight_layers in zip(mirrored, straight, strict=True):
        for actual, expected in zip(layers, straight_layers, strict=True):
            torch.testing.assert_close(actual, expected.flip(-1), atol=1e-5, rtol=1e-5)


def test_scales_are_summed_before_normalising(model):
    pixel_values = torch.randn(1, 3, 32, 32)

    def at(scale):
        size = [int(32 * scale)] * 2
        resized = torch.nn.functional.interpolate(pixel_values, size=size, mode="bilinear", align_corners=False)
        with torch.no_grad():
            logits = model.cam_logits(resized).broad[0]
        return torch.nn.functional.interpolate(logits, size=(32, 32), mode="bilinear", align_corners=False).relu()

    expected = normalize_cams(at(1.0) + at(0.5))
    torch.testing.assert_close(multi_scale_cams(model, pixel_values, scales=(1.0, 0.5), flip=False).broad[0], expected)


def test_an_image_has_the_same_cams_alone_and_in_a_batch(model):
    pixel_values, labels = torch.randn(3, 3, 32, 32), torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    together = _all_classes(model, pixel_values, labels, (1.0,)).precise[0]
    for index in range(3):
        part = slice(index, index + 1)
        alone = _all_classes(model, pixel_values[part], labels[part], (1.0,)).precise[0]
        torch.testing.assert_close(alone, together[part], atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.02, 2.0))
def test_propagated_maps_are_means_over_the_image(seed, temperature):
    cams, features = seeded(seed, 2, 3, 4, 5) * 4 - 1, seeded(seed + 1, 2, 6, 4, 5) - 0.5
    spread = propagate_cams(cams, features, temperature)
    cut = cams.relu()
    assert spread.shape == cams.shape
    for extreme, inside in (
        (cut.amax((-2, -1)), spread.amax((-2, -1))),
        (-cut.amin((-2, -1)), -spread.amin((-2, -1))),
    ):
        assert (inside <= extreme + 1e-5).all()
    # a longer or shorter feature is the same token
    torch.testing.assert_close(propagate_cams(cams, 7 * features, temperature), spread)
    # at a low temperature nothing is like a token but itself
    torch.testing.assert_close(propagate_cams(cams, features, 1e-4), cut, atol=1e-3, rtol=1e-3)


def test_propagation_reaches_tokens_that_look_alike():
    # tokens 0, 1 and 3 look alike; the class is seen on the first of them only
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 0]]).T.reshape(1, 2, 1, 4)
    cams = torch.tensor([3.0, 0, -2, 0]).reshape(1, 1, 1, 4)
    spread = propagate_cams(cams, features, 0.01)
    torch.testing.assert_close(spread.flatten(), torch.tensor([1.0, 1, 0, 1]))
    assert propagate_cams(cams.bfloat16(), features.bfloat16(), 0.01).dtype == torch.bfloat16


def test_propagation_counts_in_float32_under_autocast():
    cams, features = torch.rand(2, 3, 6, 6), torch.rand(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = propagate_cams(cams, features, 0.05)
    assert torch.equal(inside, propagate_cams(cams, features, 0.05))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(1, 3))
def test_the_cosine_of_joint_features_is_the_mean_cosine(seed, count):
    features = [seeded(seed + index, 2, 3 + index, 2, 4) - 0.5 for index in range(count)]
    joint = joint_features(*features)
    assert joint.shape == (2, sum(maps.shape[1] for maps in features), 2, 4)

    def cosines(maps):
        tokens = maps.flatten(2)
        return torch.nn.functional.cosine_similarity(tokens[..., :, None], tokens[..., None, :], dim=1)

    torch.testing.assert_close(cosines(joint), sum(map(cosines, features)) / count)
    assert joint_features(features[0].bfloat16()).dtype == torch.float32


def test_only_the_configured_branch_is_propagated_by_what_both_see():
    pixel_values = torch.randn(1, 3, 32, 48)
    plain = SynerNetModelTester().model().eval()
    for name, other in (("broad", "precise"), ("precise", "broad")):
        model = SynerNetModelTester(**{f"{name}_propagation_temperature": 0.1}).model().eval()
        model.load_state_dict(plain.state_dict())
        with torch.no_grad():
            before, after = plain.synernet(pixel_values), model.cam_logits(pixel_values)
            assert torch.equal(getattr(after, other)[0], before[other].cam_logits)
            for place, kind in enumerate(("", "auxiliary_")):
                alike = joint_features(*(before[branch][f"{kind}features"] for branch in ("precise", "broad")))
                expected = propagate_cams(before[name][f"{kind}cam_logits"], alike, 0.1)
                torch.testing.assert_close(getattr(after, name)[place], expected)
            # the temperature is read at every call, as the thresholds are
            plainly = model.cam_logits(pixel_values, plain=True)
            setattr(model.config, f"{name}_propagation_temperature", None)
            for maps in (plainly, model.cam_logits(pixel_values)):
                assert torch.equal(getattr(maps, name)[0], before[name].cam_logits)


@pytest.mark.parametrize("layers", [None, [-1, -2, -3], [-2, -3]])
@pytest.mark.parametrize("labels", [None, [[1.0, 0, 1], [0, 1, 0]]])
def test_the_consensus_is_the_least_of_the_precise_voting_layers(layers, labels):
    model = SynerNetModelTester(confidence_layers=layers).model().eval()
    pixel_values = torch.randn(2, 3, 32, 48)
    labels = None if labels is None else torch.tensor(labels)
    before = _all_classes(model, pixel_values, labels, (1.0, 0.5))
    model.config.precise_consensus = True
    after = _all_classes(model, pixel_values, labels, (1.0, 0.5))
    # of the last, the auxiliary (-3) and the additional layers
    voting = {None: (0, 1), (-1, -2, -3): (0, 2, 1), (-2, -3): (2, 1)}[layers and tuple(layers)]
    expected = before.precise[voting[0]]
    for place in voting[1:]:
        expected = torch.minimum(expected, before.precise[place])
    assert torch.equal(after.precise[0], expected)
    assert not torch.equal(expected, before.precise[0])
    for maps, old_maps in zip((*after.broad, *after.precise[1:]), (*before.broad, *before.precise[1:]), strict=True):
        assert torch.equal(maps, old_maps)
    plain = _all_classes(model, pixel_values, labels, (1.0, 0.5), plain=True)
    assert torch.equal(plain.precise[0], before.precise[0])


def count_encoded(model, monkeypatch):
    """The shapes of the batches that are encoded from now on, in a list that grows."""
    encoded, pad = [], type(model.synernet).pad
    counting = lambda self, images: encoded.append(tuple(images.shape)) or pad(self, images)  # noqa: E731
    monkeypatch.setattr(type(model.synernet), "pad", counting)
    return encoded


@pytest.mark.parametrize("size", [(32, 48), (30, 45)])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shared", [0, 1])
def test_what_training_has_seen_is_not_encoded_again(size, flip, shared, monkeypatch):
    fields = {"confidence_layers": [-2, -3, -1], "precise_consensus": True}
    fields |= {"broad_propagation_temperature": 0.2, "precise_propagation_temperature": 0.3}
    model = SynerNetModelTester(**fields, shared_encoder_layers=shared).model().eval()
    pixel_values, labels = torch.randn(2, 3, *size), torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 0]])
    expected = _all_classes(model, pixel_values, labels, (1.0, 0.5), flip)
    seen = model.synernet.seen_in(model.synernet(pixel_values), size)
    assert not any(maps.requires_grad for views in seen.values() for view in views.values() for maps in view.features)
    encoded = count_encoded(model, monkeypatch)
    cams = _all_classes(model, pixel_values, labels, (1.0, 0.5), flip, seen)
    half = (2 * (1 + flip), 3, size[0] // 2, size[1] // 2)
    assert encoded == ([(2, 3, *size), half] if flip else [half])
    # nor what an earlier call has seen
    again = _all_classes(model, pixel_values, labels, (1.0, 0.5), flip, seen)
    assert len(encoded) == 1 + flip
    assert all(map(torch.equal, again.broad + again.precise, cams.broad + cams.precise))
    for layers, slow_layers in zip(cams, expected, strict=True):
        assert len(layers) == len(slow_layers) == 3
        for fast, slow in zip(layers, slow_layers, strict=True):
            torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "fields", "calls"),
    [
        ((32, 48), {"cam_scales": (1.0,), "cam_flip": False}, 0),
        ((30, 45), {"cam_scales": (1.0, 0.5), "cam_flip": True}, 2),
        ((32, 48), {"cam_scales": (0.5,), "cam_flip": False}, 1),
        ((30, 48), {"cam_scales": (1.0,), "cam_flip": False, "floor_scaled_views": True}, 1),
    ],
)
def test_a_training_step_encodes_only_what_it_has_not_seen(size, fields, calls, monkeypatch):
    tester = SynerNetModelTester(broad_propagation_temperature=0.2, **fields)
    model = tester.model().train()
    inputs = {"pixel_values": torch.randn(2, 3, *size), "labels": torch.tensor([[1.0, 0, 1], [0, 1, 0]])}
    inputs["loss_weights"] = {"cls": 1.0, "patch_contrast": 0.2, "segmentation": 0.2}
    encoded = count_encoded(model, monkeypatch)
    fast = model(**inputs)
    # the forward itself is one more
    assert len(encoded) == 1 + calls
    monkeypatch.setattr(type(model.synernet), "seen_in", lambda self, outputs, size: None)
    slow = model(**inputs)
    torch.testing.assert_close(fast.loss, slow.loss)
    assert (fast.pseudo_labels == slow.pseudo_labels).float().mean() > 0.99


def test_views_that_are_cut_are_encoded_again(monkeypatch):
    model = SynerNetModelTester(floor_scaled_views=True).model().eval()
    encoded = count_encoded(model, monkeypatch)
    for size, reused in (((32, 48), True), ((30, 48), False)):
        pixel_values, seen = torch.randn(1, 3, *size), {}
        logits = model.multi_scale_logits(pixel_values, (1.0, 0.5), seen=seen)
        cams = model.generate_cams(pixel_values, scales=(1.0,), flip=False, seen=seen)
        assert torch.equal(cams.broad_cams, model.generate_cams(pixel_values, scales=(1.0,), flip=False).broad_cams)
        assert torch.equal(logits, model.multi_scale_logits(pixel_values, (1.0, 0.5)))
        assert len(encoded) == 5 + (not reused)
        encoded.clear()


# reading labels off them


def test_label_bands_by_hand():
    cams = torch.tensor([0.25, 0.26, 0.7, 0.71]).view(1, 1, 1, 4).repeat(1, 2, 1, 1)
    cams[:, 1] = 0.9  # an absent class, stronger everywhere
    labels = torch.tensor([[1.0, 0.0]])
    assert cams_to_pseudo_labels(cams, labels, LOW, HIGH).flatten().tolist() == [0, 255, 255, 1]
    assert cams_to_pseudo_labels(cams, labels, 0.5, 0.5).flatten().tolist() == [0, 0, 1, 1]
    boxes = torch.tensor([[0, 1, 0, 3]])
    assert cams_to_pseudo_labels(cams, labels, LOW, HIGH, boxes, -1).flatten().tolist() == [0, -1, -1, -1]


def test_an_image_without_classes_is_background():
    assert not cams_to_pseudo_labels(torch.rand(1, 3, 4, 4), torch.zeros(1, 3), LOW, HIGH).any()


def test_thresholds_must_not_cross():
    with pytest.raises(ValueError, match="low must not be above high, got 0.7 and 0.25; swap them"):
        cams_to_pseudo_labels(torch.rand(1, 1, 2, 2), torch.ones(1, 1), HIGH, LOW)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0, 1), st.floats(0, 1))
def test_area_shares_grow_with_the_coverage(seed, first, second):
    cams, labels = seeded(seed, 2, 3, 5, 6), (seeded(seed + 1, 2, 3) > 0.4).float()
    low_share, high_share = (area_shares(cams, labels, value, LOW, HIGH) for value in sorted((first, second)))
    assert (low_share <= high_share).all()
    assert 0 <= low_share.min() and high_share.max() <= 0.99
    assert not high_share[labels == 0].any()


def test_area_shares_by_hand():
    cams = torch.zeros(1, 3, 1, 10)
    cams[0, 0, 0, :2] = 0.9  # certain
    cams[0, 1, 0, 2] = 0.9
    cams[0, 2, 0, 3:7] = 0.5  # uncertain, and no certain pixel of this class
    shares = area_shares(cams, torch.ones(1, 3), 0.5, LOW, HIGH)
    torch.testing.assert_close(shares, torch.tensor([[0.2 + 0.5 * 0.4 / 2, 0.1 + 0.5 * 0.4 / 2, 0.0]]))
    torch.testing.assert_close(area_shares(cams, torch.ones(1, 3), -1.0, LOW, HIGH), torch.tensor([[0.2, 0.1, 0.0]]))
    assert area_shares(torch.ones(1, 1, 2, 2), torch.ones(1, 1), 0.2, LOW, HIGH).item() == pytest.approx(0.99)


# comparing them


def test_unanimous_votes_give_the_agreed_label():
    label = torch.randint(0, 4, (2, 5, 6))
    confidence, agreed = layer_confidence(label.expand(4, -1, -1, -1))
    assert confidence.shape == (2, 1, 5, 6)
    assert (confidence == 1).all()
    assert torch.equal(agreed, label)


@pytest.mark.parametrize(
    ("votes", "share", "label"),
    [
        ([1, 1, 1, 2], 0.75, 1),
        ([2, 1, 2, 1], 0.5, 2),
        ([3, 255, 3, 255], 0.5, 3),
        ([255, 255, 255, 0], 0.25, 0),
        ([255, 255, 255, 255], 0.0, 255),
        ([0, 0, 255, 1], 0.5, 0),
    ],
)
def test_layer_confidence_by_hand(votes, share, label):
    confidence, agreed = layer_confidence(torch.tensor(votes).view(4, 1, 1, 1))
    assert confidence.item() == share
    assert agreed.item() == label


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), SEEDS)
def test_layer_confidence_does_not_depend_on_the_order_of_votes(num_votes, seed):
    votes = (seeded(seed, num_votes, 1, 3, 3) * 3).long()
    votes[seeded(seed + 1, num_votes, 1, 3, 3) < 0.2] = 255
    confidence, agreed = layer_confidence(votes)
    assert torch.equal(confidence, layer_confidence(votes.flip(0))[0])
    support = (votes == agreed[None]).float().mean(dim=0) * (agreed != 255)
    torch.testing.assert_close(confidence[:, 0], support)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), SEEDS)
def test_fusion_shares_stay_within_reach(share, reach, seed):
    broad, precise = seeded(seed, 1, 1, 3, 3), seeded(seed + 1, 1, 1, 3, 3)
    broad[..., 0, 0] = precise[..., 0, 0] = 0.0
    shares = fusion_shares(broad, precise, share, reach)
    assert (shares - share).abs().max() <= reach + 1e-6
    assert 0 <= shares.min() and shares.max() <= 1
    assert shares[..., 0, 0].item() == pytest.approx(share)


def test_fusion_shares_follow_the_branch_that_agrees_with_itself():
    agreement = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    shares = fusion_shares(agreement, agreement.flip(-1), 0.5, 0.2)
    torch.testing.assert_close(shares, torch.tensor([[[[0.7, 0.5, 0.3]]]]))


# fusing them


def test_without_agreement_fusion_is_a_mix():
    broad, precise = torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4)
    torch.testing.assert_close(fuse_cams(broad, precise, 0.3), 0.3 * broad + 0.7 * precise)
    nothing_agreed = torch.full((1, 4, 4), 255)
    torch.testing.assert_close(fuse_cams(broad, precise, 0.3, nothing_agreed), 0.3 * broad + 0.7 * precise)
    share = torch.rand(1, 1, 4, 4)
    torch.testing.assert_close(fuse_cams(broad, broad, share), broad)


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.floats(0.05, 0.5), st.floats(0.5, 0.95), st.floats(0, 1))
def test_the_agreed_label_wins_whatever_the_cams_say(seed, low, high, share):
    broad, precise = seeded(seed, 2, 3, 5, 5), seeded(seed + 1, 2, 3, 5, 5)
    agreed = (seeded(seed + 2, 2, 5, 5) * 5).long()
    agreed[agreed == 4] = 255
    fused = fuse_cams(broad, precise, share, agreed, low, high)
    assert 0 <= fused.min() and fused.max() <= 1
    label = cams_to_pseudo_labels(fused, torch.ones(2, 3), low, high)
    assert torch.equal(label[agreed != 255], agreed[agreed != 255])
    plain = fuse_cams(broad, precise, share)
    undecided = (agreed == 255)[:, None].expand_as(fused)
    assert torch.equal(fused[undecided], plain[undecided])


def test_no_row_or_column_of_a_scaled_view_is_lost(monkeypatch):
    # at 0.75 a 32-pixel image gives 24 pixels, one and a half patches of 16
    tester = SynerNetModelTester()
    config = tester.config()
    config.backbone_config.patch_size = 16
    torch.manual_seed(0)
    model = SynerNetForWeaklySupervisedSegmentation(config).eval()
    image = torch.randn(1, 3, 32, 32)
    changed = image.clone()
    changed[..., -6:, -6:] += 3
    difference = {}
    for floor in (False, True):
        model.config.floor_scaled_views = floor
        before, after = (multi_scale_cams(model, x, None, (0.75,), False).broad[0] for x in (image, changed))
        difference[floor] = (before - after).abs().max().item()
    assert difference[False] > 1e-3
    assert difference[True] == 0


@pytest.mark.parametrize("size", [(30, 45), (32, 48)])
def test_only_present_classes_are_enlarged(size, monkeypatch):
    # 40 classes of which one is there: no map of another class at the size of the image, padded or not
    tester = SynerNetModelTester(num_classes=40)
    model, enlarged = tester.model(), []
    interpolate = torch.nn.functional.interpolate

    def spy(maps, *args, **kwargs):
        enlarged.append(maps.shape[1])
        return interpolate(maps, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "interpolate", spy)
    labels = torch.zeros(2, 40)
    labels[:, 7] = 1
    pixel_values = torch.randn(2, 3, *size)
    few = model.generate_cams(pixel_values, labels, all_classes=False)
    # images have three channels, position embeddings sixteen
    assert set(enlarged) <= {1, 3, 16} and few.fused_cams.shape == (2, 1, *size)
    every = model.generate_cams(pixel_values, labels)
    for name, maps in few.items():
        if name != "confidence":
            assert torch.equal(maps, every[name][:, 7:8]) and not every[name][:, :7].any()
