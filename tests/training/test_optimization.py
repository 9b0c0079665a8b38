"""Learning rate against the authors' recorded schedule, gates, and parameter groups."""

import numpy as np
import pytest
import torch
from testing_utils import SynerNetModelTester
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation
from synernet_hf.training import LossWeightSchedule, learning_rate_multiplier, parameter_groups
from synernet_hf.training.optimization import BF16_ATTENTION, SHORT_SEQUENCE, bf16_attention


def test_golden_schedule(root):
    recorded = np.load(root / "tests" / "fixtures" / "golden" / "functions_seed0.npz")
    total, warmup = int(recorded["schedule/T"]), int(recorded["schedule/warmup"])
    ours = [learning_rate_multiplier(step, warmup, total) for step in range(total)]
    difference = np.abs(np.array(ours) - recorded["schedule/multiplier"]).max()
    print(f"schedule: max difference {difference:.1e}")
    assert difference < 1e-6


def test_schedule_of_the_full_run():
    factors = [learning_rate_multiplier(step, 1500, 8000) for step in range(8001)]
    assert factors[0] == pytest.approx(6e-6)
    assert factors[1499] == pytest.approx(1 - (1 - 6e-6) / 1500)
    assert factors[1500] == pytest.approx(0.8125**0.9)
    assert factors[8000] == 0
    assert np.all(np.diff(factors[:1500]) > 0)
    assert np.all(np.diff(factors[1500:]) < 0)


def test_schedule_without_warmup_and_past_the_end():
    assert learning_rate_multiplier(0, 0, 10) == 1
    assert learning_rate_multiplier(11, 0, 10) == 0
    # a run without steps has nothing to divide by
    assert learning_rate_multiplier(0, 0, 0) == 0


@pytest.mark.parametrize(
    ("term", "start"), [("segmentation", 0.25), ("spatial_bce", 0.375), ("prototype_contrast", 0.375)]
)
def test_a_gate_opens_after_its_share_of_the_run(term, start):
    config = SynerNetConfig(num_labels=3)
    schedule = LossWeightSchedule(config)
    weights = [schedule(step / 8000)[term] for step in range(8000)]
    # the authors' first open steps, counted from 0: 2,001 and 3,001
    first = round(start * 8000) + 1
    assert weights[:first] == [0.0] * first
    assert weights[first:] == [config.loss_weights[term]] * (8000 - first)


def test_terms_without_a_gate_always_count():
    config = SynerNetConfig(num_labels=3, cls_weight=0.5, patch_contrast_weight=0.3)
    schedule = LossWeightSchedule(config)
    for progress in (0.0, 0.5, 1.0):
        weights = schedule(progress)
        assert (weights["cls"], weights["cls_aux"], weights["patch_contrast"]) == (0.5, 1.0, 0.3)
        assert set(weights) == set(config.loss_weights)


def test_gates_are_settings():
    config = SynerNetConfig(num_labels=3, segmentation_start=0.0, spatial_bce_start=1.0)
    schedule = LossWeightSchedule(config)
    # a start of 0 is no gate
    assert schedule(0.0)["segmentation"] == config.segmentation_weight
    assert schedule(0.999)["spatial_bce"] == schedule(1.0)["spatial_bce"] == 0


@pytest.mark.parametrize("progress", [-0.1, 1.1])
def test_progress_is_a_share(progress):
    with pytest.raises(ValueError, match="share of the run"):
        LossWeightSchedule(SynerNetConfig(num_labels=3))(progress)


def test_every_parameter_is_in_one_group_with_its_rate(tiny_config):
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config)
    encoder, heads = parameter_groups(model, 6e-5, 0.01)
    assert (encoder["lr"], heads["lr"]) == (pytest.approx(1.2e-4), pytest.approx(6e-4))
    assert encoder["weight_decay"] == heads["weight_decay"] == 0.01
    grouped = [id(parameter) for group in (encoder, heads) for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    branches = [getattr(model.synernet.pair, name).backbone for name in ("broad", "precise")]
    assert {id(p) for branch in branches for p in branch.parameters()} == {id(p) for p in encoder["params"]}


def test_frozen_parameters_are_left_out(tiny_config):
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config)
    branch = model.synernet.broad_branch
    branch.decode_head.requires_grad_(False)
    grouped = {id(parameter) for group in parameter_groups(model, 1e-4, 0.0) for parameter in group["params"]}
    assert not grouped & {id(parameter) for parameter in branch.decode_head.parameters()}


def test_a_model_without_encoder_names_is_refused(tiny_config):
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config)
    with pytest.raises(ValueError, match="Expected encoder parameters"):
        parameter_groups(model.synernet.broad_branch.decode_head, 1e-4, 0.0)


@pytest.mark.parametrize("length", [17, SHORT_SEQUENCE + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_in_bf16_is_that_of_pytorch_but_for_rounding(length, dtype):
    torch.manual_seed(0)
    exact = [torch.randn(2, 3, length, 16) for _ in range(3)]
    results = {}
    for name, attend in (("ours", bf16_attention), ("fused", sdpa_attention_forward)):
        states = [state.to(dtype).requires_grad_() for state in exact]
        output, weights = attend(torch.nn.Module(), *states, None, scaling=0.25, dropout=0.0, is_causal=False)
        assert weights is None and output.shape == (2, length, 3, 16) and output.dtype == dtype
        output.square().sum().backward()
        results[name] = [output.detach(), *(state.grad for state in states)]
    ours, fused = results.values()
    explicit = dtype == torch.bfloat16 and length <= SHORT_SEQUENCE
    assert all(map(torch.equal, ours, fused)) != explicit
    for one, other in zip(ours, fused, strict=True):
        torch.testing.assert_close(one.float(), other.float(), atol=0.03, rtol=0.03)


def test_a_model_attends_in_bf16_where_it_is_set():
    tester = SynerNetModelTester()
    model, pixel_values = tester.model().eval(), tester.inputs()["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits
        model.set_attn_implementation(BF16_ATTENTION)
        assert model.synernet.precise_branch.backbone.config._attn_implementation == BF16_ATTENTION
        assert torch.equal(model(pixel_values).logits, logits)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(pixel_values).logits, logits, atol=0.1, rtol=0.1)
