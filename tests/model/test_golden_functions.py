"""The pure functions against recorded outputs of the authors' code (float32, CPU)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from synernet_hf.model.cam_synernet import area_shares, cams_to_pseudo_labels
from synernet_hf.model.objective_synernet import (
    cross_supervised_segmentation_loss,
    patch_token_contrast_loss,
    prototype_contrast_terms,
    spatial_bce_loss,
)
from synernet_hf.model.refinement_synernet import SynerNetPixelAdaptiveRefinement, box_mask, refine_pseudo_labels
from synernet_hf.training.optimization import learning_rate_multiplier


GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "functions_seed0.npz"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def assert_close(name, actual, expected, tolerance=TOLERANCE):
    difference = (actual - expected).abs().max().item()
    print(f"golden {name}: max difference {difference:.2e}")
    assert difference <= tolerance


def test_golden_pixel_adaptive_refinement(golden):
    refined = SynerNetPixelAdaptiveRefinement()(golden["par/images"], golden["par/maps"])
    assert_close("PAR", refined, golden["par/out"])


def test_golden_cam_bands(golden):
    cams, labels, boxes = golden["common/cams"], golden["common/labels"], golden["common/boxes"]
    band = cams_to_pseudo_labels(cams, labels, 0.25, 0.7, valid_boxes=boxes)
    single = cams_to_pseudo_labels(cams, labels, 0.5, 0.5)
    assert torch.equal(band, golden["cam_to_label/band"])
    assert torch.equal(single, golden["cam_to_label/single"])


def test_golden_refined_labels(golden):
    label = refine_pseudo_labels(
        golden["common/images"], golden["common/cams"], golden["common/labels"], 0.25, 0.7, golden["common/boxes"]
    )
    expected = golden["refined/label"].long()
    outside = ~box_mask(golden["common/boxes"], label.shape[-2:])
    assert outside.any() and (label[outside] == 255).all()
    decided = (label != 255) | (expected != 255)
    agreement = (label == expected)[decided].float().mean().item()
    print(f"golden refined labels: {100 * agreement:.3f} % equal")
    assert agreement >= 0.999


@pytest.mark.parametrize("coverage", [0.2, 0.05])
def test_golden_spatial_bce(golden, coverage):
    group = f"spatial_bce_{coverage}"
    shares = area_shares(golden["common/aux"], golden["common/labels"], coverage, 0.25, 0.7)
    assert_close("area shares", shares, golden[f"{group}/area_share"])
    logits = golden[f"{group}/cam_logits"].requires_grad_()
    loss = spatial_bce_loss(logits, golden["common/labels"], shares)
    loss.backward()
    assert_close("spatial BCE", loss, golden[f"{group}/loss"])
    assert_close("spatial BCE gradient", logits.grad, golden[f"{group}/grad"])


def test_golden_patch_token_contrast(golden):
    features = golden["patch_token_contrast/features"].requires_grad_()
    loss = patch_token_contrast_loss(features, golden["patch_token_contrast/token_labels"])
    loss.backward()
    assert_close("patch-token contrast", loss, golden["patch_token_contrast/loss"])
    assert_close("patch-token contrast gradient", features.grad, golden["patch_token_contrast/grad"])


def test_golden_segmentation(golden):
    logits = golden["segmentation/logits"].requires_grad_()
    loss = cross_supervised_segmentation_loss(logits, golden["refined/label"].long())
    loss.backward()
    assert_close("segmentation", loss, golden["segmentation/loss"])
    assert_close("segmentation gradient sum", logits.grad.abs().sum(), golden["segmentation/grad_sum"])


def test_golden_prototype_contrast(golden):
    prototypes = torch.zeros_like(golden["prototype_contrast/prototypes"][0])
    steps = zip(
        golden["prototype_contrast/z"],
        golden["prototype_contrast/class_ids_1_based"] - 1,
        golden["prototype_contrast/loss"],
        golden["prototype_contrast/prototypes"],
        strict=True,
    )
    for embeddings, class_ids, expected_loss, expected_prototypes in steps:
        terms, prototypes = prototype_contrast_terms(embeddings, class_ids, prototypes)
        assert_close("prototype contrast", terms.mean(), expected_loss)
        assert_close("prototypes", prototypes, expected_prototypes)


def test_golden_learning_rate_schedule(golden):
    total, warmup = int(golden["schedule/T"]), int(golden["schedule/warmup"])
    multipliers = torch.tensor([learning_rate_multiplier(step, warmup, total) for step in range(total)])
    assert_close("learning-rate multiplier", multipliers.double(), golden["schedule/multiplier"])
