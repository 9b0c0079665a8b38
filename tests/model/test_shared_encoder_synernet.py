"""Blocks of the encoder that both branches share, and the layers that vote on the confidence."""

import pytest
import torch
from testing_utils import ALL_TERMS, FAMILIES, SynerNetModelTester, tiny_backbone_config
from transformers import AutoModel

from synernet_hf import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.model.encoder_synernet import copy_encoder, encoder_blocks


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def sharing(family, num_shared, **config_fields):
    """A model whose branches share blocks, and one that shares none with the very same weights."""
    whole = SynerNetModelTester(family, **config_fields).model()
    for name in ("broad", "precise"):
        copy_encoder(whole.synernet.broad_branch.backbone, getattr(whole.synernet.pair, name).backbone)
    with torch.no_grad():
        for block in encoder_blocks(whole.synernet.precise_branch.backbone)[num_shared:]:
            for parameter in block.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    shared = SynerNetModelTester(family, shared_encoder_layers=num_shared, **config_fields).model()
    copy_encoder(whole.synernet.broad_branch.backbone, shared.synernet.shared_encoder.backbone)
    for name in ("broad", "precise"):
        branch, original = getattr(shared.synernet.pair, name), getattr(whole.synernet.pair, name)
        copy_encoder(original.backbone, branch.backbone, num_shared)
        for part in ("cam_head", "auxiliary_cam_head", "decode_head", "projection_head"):
            getattr(branch, part).load_state_dict(getattr(original, part).state_dict())
    return shared, whole


@pytest.mark.parametrize("num_shared", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_blocks_compute_what_equal_blocks_compute(family, num_shared):
    shared, whole = sharing(family, num_shared)
    inputs = SynerNetModelTester(family).inputs(2, 32, 45)
    with torch.no_grad():
        outputs = [model(inputs["pixel_values"], output_hidden_states=True) for model in (shared, whole)]
        trained = []
        for model in (shared, whole):
            torch.manual_seed(0)  # instance learning draws a class
            trained.append(model(**inputs, loss_weights=ALL_TERMS))
        cams = [model.generate_cams(inputs["pixel_values"], inputs["labels"]) for model in (shared, whole)]
        alone = [model(inputs["pixel_values"], inference_branches="precise") for model in (shared, whole)]
    for actual, expected in (outputs, trained, cams, alone):
        torch.testing.assert_close(dict(actual), dict(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["broad", "precise"])
def test_shared_blocks_learn_from_either_branch(name):
    tester = SynerNetModelTester(shared_encoder_layers=2)
    model = tester.model()
    model(tester.inputs()["pixel_values"], inference_branches=name).logits.sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.any() for parameter in model.synernet.shared_encoder.parameters()
    )
    assert any(parameter.grad is None for parameter in model.synernet.parameters())


def test_shared_blocks_exist_once():
    model, whole = SynerNetModelTester(shared_encoder_layers=2).model(), SynerNetModelTester().model()
    backbone = whole.synernet.broad_branch.backbone
    saved = sum(p.numel() for part in (backbone.embeddings, encoder_blocks(backbone)[:2]) for p in part.parameters())
    assert whole.num_parameters() - model.num_parameters() == saved


def test_shared_blocks_start_from_a_pretrained_encoder_and_survive_saving(tmp_path):
    torch.manual_seed(1)
    backbone = AutoModel.from_config(tiny_backbone_config("dinov2"))
    backbone.save_pretrained(tmp_path / "backbone")
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        tmp_path / "backbone", num_labels=3, shared_encoder_layers=2, auxiliary_layer_index=-2
    ).eval()
    pixel_values = SynerNetModelTester().inputs()["pixel_values"]
    with torch.no_grad():
        expected = backbone.eval()(pixel_values).last_hidden_state
        for name in ("broad", "precise"):
            tokens = getattr(model.synernet.pair, name).encode(
                pixel_values, model.synernet.shared_states(pixel_values)
            )[0]
            torch.testing.assert_close(tokens, expected)
        model.save_pretrained(tmp_path / "saved")
        again = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "saved").eval()
        assert torch.equal(again(pixel_values).logits, model(pixel_values).logits)


def test_shared_blocks_can_be_checkpointed():
    tester = SynerNetModelTester(shared_encoder_layers=2)
    plain, saving = tester.model().train(), tester.model().train()
    saving.gradient_checkpointing_enable()
    for model in (plain, saving):
        torch.manual_seed(0)  # instance learning draws a class
        model(**tester.inputs(), loss_weights=ALL_TERMS).loss.backward()
    for (name, expected), actual in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)


@pytest.mark.parametrize("num_shared", [3, 4])
def test_sharing_every_block_is_refused(num_shared):
    with pytest.raises(ValueError, match=f"leave each branch one of the encoder's 3 blocks, got {num_shared}"):
        SynerNetModelTester(shared_encoder_layers=num_shared).model()


def test_attention_maps_of_shared_blocks_are_refused():
    tester = SynerNetModelTester(shared_encoder_layers=1)
    with pytest.raises(ValueError, match="Attention maps need `shared_encoder_layers` = 0"):
        tester.model()(tester.inputs()["pixel_values"], output_attentions=True)


# layers that vote


def test_more_layers_vote_on_the_confidence():
    tester = SynerNetModelTester(
        confidence_layers=[1, -2, -1], low_threshold=0.4, background_threshold=0.5, high_threshold=0.6
    )
    inputs = tester.inputs(2, 32, 48)
    two = SynerNetModelTester(low_threshold=0.4, background_threshold=0.5, high_threshold=0.6).model()
    three = tester.model()
    cams = three.cam_logits(inputs["pixel_values"])
    assert len(cams.broad) == 3
    states = three.synernet(inputs["pixel_values"]).broad.hidden_states[1]
    expected = three.synernet.broad_branch.auxiliary_cam_head.cam_logits(
        states[:, 1:].transpose(1, 2).unflatten(2, (4, 6))
    )
    torch.testing.assert_close(cams.broad[2], expected)
    confidence = [model.generate_cams(**inputs).confidence for model in (two, three)]
    assert set((confidence[1] * 6).round().unique().tolist()) <= set(range(7))
    torch.testing.assert_close(confidence[1] * 6, (confidence[1] * 6).round())
    assert not torch.equal(*confidence)
    same = SynerNetModelTester(
        confidence_layers=[-2, -1], low_threshold=0.4, background_threshold=0.5, high_threshold=0.6
    ).model()
    assert torch.equal(same.generate_cams(**inputs).confidence, confidence[0])


@pytest.mark.parametrize("layers, message", [([5], "hidden states, got 5"), ([], "at least one layer")])
def test_wrong_confidence_layers_are_refused(layers, message):
    with pytest.raises(Exception, match=message):
        SynerNetModelTester(confidence_layers=layers).model()
