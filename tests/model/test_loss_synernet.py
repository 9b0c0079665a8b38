"""The losses: their values on cases worked out by hand, their limits, and gradients that are always finite."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from synernet_hf.model.objective_synernet import (
    classification_loss,
    cross_supervised_segmentation_loss,
    patch_token_contrast_loss,
    prototype_contrast_terms,
    spatial_bce_loss,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def gradient_of(function, tensor):
    tensor = tensor.detach().clone().requires_grad_()
    value = function(tensor)
    value.backward()
    assert value.ndim == 0
    assert value.isfinite() and tensor.grad.isfinite().all()
    return value.detach(), tensor.grad


# classification


def test_classification_is_the_mean_of_sigmoid_cross_entropies():
    logits, labels = torch.randn(3, 5), (torch.rand(3, 5) > 0.5).long()
    torch.testing.assert_close(
        classification_loss(logits, labels), F.binary_cross_entropy_with_logits(logits, labels.float())
    )


# spatial BCE


def positives(cam_logits, labels, shares):
    """Which entries the loss pushes up: those of negative gradient."""
    return gradient_of(lambda maps: spatial_bce_loss(maps, labels, shares), cam_logits)[1] < 0


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.99), st.integers(2, 6), st.integers(2, 6), st.integers(0, 99))
def test_spatial_bce_counts_its_positives(share, height, width, seed):
    maps = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(seed))
    count = positives(maps, torch.ones(1, 1), torch.tensor([[share]])).sum().item()
    tokens = height * width
    assert count == min((tokens * torch.tensor(share)).round().int().item() + 1, tokens)


def test_spatial_bce_takes_every_entry_equal_to_the_last_one():
    maps = torch.tensor([5.0, 2.0, 2.0, 2.0, 1.0, 0.0, -1.0, -1.0, -2.0]).view(1, 1, 3, 3)
    taken = positives(maps, torch.ones(1, 1), torch.tensor([[1 / 9]]))
    assert taken.flatten().tolist() == [True, True, True, True, False, False, False, False, False]


def test_spatial_bce_without_area_takes_the_maximum_alone():
    maps = torch.randn(1, 1, 4, 4)
    taken = positives(maps, torch.ones(1, 1), torch.zeros(1, 1))
    assert taken.sum() == 1 and taken.flatten()[maps.argmax()]


def test_spatial_bce_pushes_absent_classes_down_everywhere():
    maps, labels = torch.randn(2, 3, 4, 4), torch.tensor([[1.0, 0, 0], [0, 0, 0]])
    taken = positives(maps, labels, torch.full((2, 3), 0.5))
    assert taken[0, 0].any()
    assert not taken[0, 1:].any() and not taken[1].any()


def test_spatial_bce_weighs_the_two_groups():
    maps = torch.tensor([[[[3.0, 1.0], [0.0, -2.0]]]])
    loss = spatial_bce_loss(maps, torch.ones(1, 1), torch.tensor([[0.25]]))
    softplus = F.softplus
    foreground = (softplus(torch.tensor(-3.0)) + softplus(torch.tensor(-1.0))) / 2
    background = (softplus(torch.tensor(0.0)) + softplus(torch.tensor(-2.0))) / 2
    torch.testing.assert_close(loss, 0.9 * foreground + 0.1 * background)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("present", [0.0, 1.0])
def test_spatial_bce_with_an_empty_group_is_finite(share, present):
    labels, shares = torch.full((2, 3), present), torch.full((2, 3), share)
    for maps in (torch.randn(2, 3, 2, 5), torch.zeros(2, 3, 2, 5), torch.full((2, 3, 2, 5), 300.0)):
        gradient_of(lambda logits: spatial_bce_loss(logits, labels, shares), maps)


def test_spatial_bce_falls_as_the_area_is_filled():
    labels, shares = torch.ones(1, 1), torch.tensor([[0.5]])
    maps = torch.randn(1, 1, 6, 6)
    before, gradient = gradient_of(lambda logits: spatial_bce_loss(logits, labels, shares), maps)
    assert spatial_bce_loss(maps - 0.5 * gradient / gradient.abs().max(), labels, shares) < before


# patch-token contrast


def test_patch_contrast_does_not_see_the_scale_or_sign_of_a_token():
    features, labels = torch.randn(2, 8, 3, 4), torch.randint(0, 3, (2, 3, 4))
    factors = torch.rand(2, 1, 3, 4) * 10 + 0.1
    signs = torch.randint(0, 2, (2, 1, 3, 4)) * 2 - 1
    torch.testing.assert_close(
        patch_token_contrast_loss(features * factors * signs, labels), patch_token_contrast_loss(features, labels)
    )


def test_patch_contrast_of_two_pairs():
    # tokens a a b: 2 ordered pairs alike with |cos| 1, 4 pairs unlike with |cos| ½
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]]).T.view(1, 2, 1, 3)
    loss = patch_token_contrast_loss(features, torch.tensor([[[1, 1, 0]]]))
    torch.testing.assert_close(loss, torch.tensor(0.5 * (1 - 2 / 3) + 0.5 * (2 / 5)))


def test_patch_contrast_leaves_ignored_tokens_alone():
    labels = torch.randint(0, 2, (1, 4, 4))
    labels[:, 1] = 255
    _, gradient = gradient_of(lambda maps: patch_token_contrast_loss(maps, labels), torch.randn(1, 5, 4, 4))
    assert not gradient[:, :, 1].any()
    assert gradient[:, :, 0].any()


def test_patch_contrast_does_not_compare_images():
    features, labels = torch.randn(2, 5, 2, 2), torch.zeros(2, 2, 2, dtype=torch.long)
    swapped = labels.clone()
    swapped[1] = 1
    torch.testing.assert_close(
        patch_token_contrast_loss(features, labels), patch_token_contrast_loss(features, swapped)
    )


@pytest.mark.parametrize("label", [0, 2, 255])
def test_patch_contrast_without_pairs_of_a_kind_is_finite(label):
    labels = torch.full((2, 3, 3), label)
    loss, _ = gradient_of(lambda maps: patch_token_contrast_loss(maps, labels), torch.randn(2, 4, 3, 3))
    if label == 255:
        assert loss == 0.5
    gradient_of(lambda maps: patch_token_contrast_loss(maps, labels), torch.zeros(2, 4, 3, 3))
    gradient_of(lambda maps: patch_token_contrast_loss(maps, labels[:, :1, :1]), torch.randn(2, 4, 1, 1))


# segmentation


def test_segmentation_is_the_mean_of_two_means():
    logits, labels = torch.randn(2, 4, 6, 6), torch.randint(0, 4, (2, 6, 6))
    labels[:, :, 0] = 255
    each = F.cross_entropy(logits, labels, ignore_index=255, reduction="none")
    foreground = (labels > 0) & (labels < 255)
    expected = 0.5 * each[labels == 0].mean() + 0.5 * each[foreground].mean()
    torch.testing.assert_close(cross_supervised_segmentation_loss(logits, labels), expected)


def test_segmentation_with_nothing_to_learn_is_zero():
    labels = torch.full((2, 8, 8), 255)
    loss, gradient = gradient_of(
        lambda logits: cross_supervised_segmentation_loss(logits, labels), torch.randn(2, 3, 4, 4)
    )
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("label", [0, 1])
def test_segmentation_with_one_group_is_half_its_mean(label):
    logits, labels = torch.randn(1, 2, 5, 5), torch.full((1, 5, 5), label)
    loss, _ = gradient_of(lambda values: cross_supervised_segmentation_loss(values, labels), logits)
    torch.testing.assert_close(loss, 0.5 * F.cross_entropy(logits, labels))


def test_segmentation_resizes_logits_to_the_label():
    logits, labels = torch.randn(1, 3, 2, 3), torch.randint(0, 3, (1, 9, 12))
    resized = F.interpolate(logits, size=(9, 12), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        cross_supervised_segmentation_loss(logits, labels), cross_supervised_segmentation_loss(resized, labels)
    )


def test_segmentation_leaves_the_label_map_as_it_is():
    labels = torch.randint(0, 3, (1, 4, 4))
    labels[0, 0, 0] = 255
    before = labels.clone()
    cross_supervised_segmentation_loss(torch.randn(1, 3, 4, 4), labels)
    assert torch.equal(labels, before)


# prototype contrast


def prototype_contrast(embeddings, class_ids, prototypes):
    """Mean over the images that count, and the new prototypes."""
    terms, moved = prototype_contrast_terms(embeddings, class_ids, prototypes)
    return terms.sum() / max(int((class_ids >= 0).sum()), 1), moved


def step_by_step(embeddings, class_ids, prototypes, momentum=0.01, temperature=0.5):
    prototypes, losses = prototypes.clone().double(), []
    for embedding, class_id in zip(embeddings.double(), class_ids.tolist(), strict=True):
        if class_id < 0:
            continue
        current = prototypes[class_id]
        if current.norm() == 0:
            prototypes[class_id] = embedding / embedding.norm()
        else:
            step = momentum * abs(current @ embedding / embedding.norm())
            mixed = (1 - step) * current + step * embedding
            prototypes[class_id] = mixed / mixed.norm()
        scores = (prototypes @ embedding / temperature).exp()
        losses.append(-torch.log(scores[class_id] / (scores.sum() + 1e-4)))
    return torch.stack(losses).mean() if losses else torch.tensor(0.0), prototypes


@pytest.mark.parametrize("ids", [[0, 1, 2, 0], [1, 1, 1, 1], [-1, 2, -1, 2], [0, -1, -1, -1]])
def test_prototype_contrast_takes_images_one_after_another(ids):
    embeddings, prototypes = torch.randn(4, 6), torch.zeros(3, 6)
    prototypes[2] = F.normalize(torch.randn(6), dim=0)
    before = prototypes.clone()
    loss, moved = prototype_contrast(embeddings, torch.tensor(ids), prototypes)
    expected_loss, expected = step_by_step(embeddings, torch.tensor(ids), prototypes)
    torch.testing.assert_close(loss, expected_loss.float())
    torch.testing.assert_close(moved, expected.float())
    assert torch.equal(prototypes, before)


def test_prototype_contrast_order_matters():
    embeddings, ids = torch.randn(2, 6), torch.tensor([0, 0])
    loss, moved = prototype_contrast(embeddings, ids, torch.zeros(2, 6))
    other_loss, other_moved = prototype_contrast(embeddings.flip(0), ids, torch.zeros(2, 6))
    assert not torch.allclose(moved, other_moved)
    assert not torch.allclose(loss, other_loss)


def test_prototypes_stay_normalised_and_untouched_where_no_image_is():
    prototypes = torch.zeros(4, 6)
    for seed in range(5):
        embeddings = torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) * 3
        _, prototypes = prototype_contrast(embeddings, torch.tensor([0, 2, 0]), prototypes)
    torch.testing.assert_close(prototypes[[0, 2]].norm(dim=1), torch.ones(2))
    assert not prototypes[[1, 3]].any()


def test_prototype_contrast_without_any_image_is_zero():
    ids = torch.tensor([-1, -1])
    loss, gradient = gradient_of(
        lambda embeddings: prototype_contrast(embeddings, ids, torch.zeros(3, 4))[0], torch.randn(2, 4)
    )
    assert loss == 0
    assert not gradient.any()


def test_prototype_contrast_has_gradient_for_embeddings_only():
    prototypes = torch.zeros(3, 4)
    embeddings = torch.randn(3, 4, requires_grad=True)
    terms, moved = prototype_contrast_terms(embeddings, torch.tensor([0, -1, 1]), prototypes)
    assert not moved.requires_grad
    assert terms.shape == (3,) and terms[1] == 0
    terms.sum().backward()
    assert embeddings.grad[0].any() and not embeddings.grad[1].any()


def test_prototype_contrast_is_finite_for_long_embeddings():
    prototypes = torch.eye(3, 4)
    gradient_of(
        lambda embeddings: prototype_contrast(embeddings, torch.tensor([0, 1]), prototypes)[0],
        torch.randn(2, 4) * 1000,
    )


def test_bfloat16_does_not_widen_the_area_of_the_spatial_loss():
    torch.manual_seed(0)
    logits, labels, shares = torch.randn(1, 1, 28, 28), torch.ones(1, 1), torch.full((1, 1), 0.3)
    expected = spatial_bce_loss(logits, labels, shares)
    with torch.autocast("cpu", torch.bfloat16):
        actual = spatial_bce_loss(logits, labels, shares)
    assert torch.equal(actual, expected)
