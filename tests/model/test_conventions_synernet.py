"""What users of transformers expect of any model; the library's own suites run with `pytest -m hf_common`."""

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import SynerNetModelTester
from torch import nn
from transformers import pipeline

from synernet_hf import (
    SynerNetConfig,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    SynerNetModel,
)


@pytest.fixture
def tester():
    return SynerNetModelTester()


@pytest.fixture
def model(tester):
    return tester.model()


def test_the_loss_is_the_first_of_the_tuple(tester, model):
    inputs = tester.inputs()
    with torch.no_grad():
        named, plain = model(**inputs), model(**inputs, return_dict=False)
    assert len(plain) == len(named.to_tuple()) and torch.equal(plain[0], named.loss)
    assert list(named)[:3] == ["loss", "loss_dict", "logits"]
    for one, other in zip(plain[2:], named.to_tuple()[2:], strict=True):
        assert torch.equal(one, other)


def test_the_loss_of_a_model_in_evaluation_mode_does_not_vary(tester, model):
    inputs = tester.inputs(batch_size=4)
    inputs["labels"] = torch.ones_like(inputs["labels"])
    with torch.no_grad():
        losses = {float(model(**inputs).loss) for _ in range(4)}
    assert len(losses) == 1


def test_the_base_model_answers_with_tokens_first(tester, model):
    inputs = tester.inputs(height=24, width=30)
    with torch.no_grad():
        output = model.synernet(inputs["pixel_values"])
    assert output[0] is output.last_hidden_state and output[0].shape == (2, 1 + 3 * 4, 2 * 16)
    broad, precise = output.last_hidden_state.split(16, dim=-1)
    assert torch.equal(broad[:, 0], output.broad.class_token)
    assert torch.equal(precise[:, 1:].transpose(1, 2).unflatten(2, (3, 4)), output.precise.features)
    with torch.no_grad():
        alone = model.synernet(inputs["pixel_values"], branches=("precise",))
    assert torch.equal(alone.last_hidden_state, precise)


def test_the_stock_pipeline_for_features_runs(model):
    extractor = pipeline(
        "image-feature-extraction", model=model.synernet, image_processor=SynerNetImageProcessor(), return_tensors=True
    )
    image = Image.fromarray(np.zeros((16, 24, 3), dtype=np.uint8))
    assert extractor(image).shape == (1, 1 + 2 * 3, 2 * 16)


@pytest.mark.parametrize("part", ["base", "task"])
def test_everything_that_the_processor_hands_out_is_taken(model, part):
    inputs = SynerNetImageProcessor()(
        [Image.new("RGB", (20, 30))] * 2, do_pad=True, size_divisor=8, return_tensors="pt"
    )
    assert set(inputs) == {"pixel_values", "pixel_mask"}
    with torch.no_grad():
        (model.synernet if part == "base" else model)(**inputs)


@pytest.mark.parametrize("wanted", [[0, 3], [-1], 2])
def test_single_hidden_states_can_be_asked_for(tester, model, wanted):
    pixel_values = tester.inputs()["pixel_values"]
    with torch.no_grad():
        every = model(pixel_values, output_hidden_states=True).hidden_states
        some = model(pixel_values, output_hidden_states=wanted).hidden_states
    assert len(some) == len(every) == 8
    kept = {index % 8 for index in ([wanted] if isinstance(wanted, int) else wanted)}
    for index, (state, expected) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(state, expected) if index in kept else state is None


def test_the_input_embedding_is_the_patch_projection(model):
    embedding = model.get_input_embeddings()
    assert embedding is model.synernet.broad_branch.backbone.get_input_embeddings()
    assert any(isinstance(module, nn.Conv2d) for module in embedding.modules())
    assert model.get_output_embeddings() is None
    model.enable_input_require_grads()
    model.disable_input_require_grads()


@pytest.mark.parametrize("model_class", [SynerNetModel, SynerNetForWeaklySupervisedSegmentation])
def test_every_missing_weight_is_drawn_as_when_built(tester, model_class):
    torch.manual_seed(0)
    built = model_class(tester.config())
    torch.manual_seed(0)
    drawn = model_class.from_pretrained(None, config=tester.config(), state_dict={})
    assert {name for name, _ in built.named_parameters()} == {name for name, _ in drawn.named_parameters()}
    buffers = dict(drawn.named_buffers())
    for name, value in built.named_buffers():
        assert torch.equal(value, buffers[name]), name
    parameters = dict(drawn.named_parameters())
    for name, value in built.named_parameters():
        other = parameters[name]
        assert not other.is_meta and other.shape == value.shape
        # drawn in another order: equal in kind, not in value
        assert float(other.detach().mean()) == pytest.approx(float(value.detach().mean()), abs=0.05), name
        assert float(other.detach().std(correction=0)) == pytest.approx(
            float(value.detach().std(correction=0)), abs=0.02, rel=0.5
        ), name


def test_another_number_of_labels_is_refused_unless_asked_for(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError):
        SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path, num_labels=9)
    loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(
        tmp_path, num_labels=9, ignore_mismatched_sizes=True
    )
    branch, other = loaded.synernet.broad_branch, model.synernet.broad_branch
    assert branch.decode_head.classifier.out_channels == 9 and branch.cam_head.classifier.out_features == 8
    assert torch.equal(branch.decode_head.conv_in.weight, other.decode_head.conv_in.weight)


def test_the_configuration_survives_files_and_subfolders(tester, tmp_path):
    config = tester.config()
    config.save_pretrained(tmp_path / "parent" / "config")
    again = SynerNetConfig.from_pretrained(tmp_path / "parent", subfolder="config")
    assert again.to_dict() == config.to_dict()
    config.to_json_file(tmp_path / "config.json")
    assert SynerNetConfig.from_json_file(tmp_path / "config.json").to_dict() == config.to_dict()
    assert len(SynerNetConfig(num_labels=5).id2label) == 5
    assert SynerNetConfig.from_pretrained(tmp_path, num_labels=3).num_labels == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_of_its_type(tester, model, dtype, tmp_path):
    pixel_values = tester.inputs(height=30, width=40)["pixel_values"]
    model.save_pretrained(tmp_path)
    half = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path, dtype=dtype)
    with torch.no_grad():
        expected, output = model(pixel_values).logits, half(pixel_values.to(dtype))
    found = output.logits
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    # logits are resized in float32
    assert found.dtype is torch.float32 and output.classification_logits.dtype is dtype
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    assert half.multi_scale_logits(pixel_values.to(dtype)).isfinite().all()
    assert half.generate_cams(pixel_values.to(dtype)).fused_cams.isfinite().all()
