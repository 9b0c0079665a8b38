"""Modules that others put in the place of ours: LoRA adapters (peft), quantisers, hooks, compiled modules."""

import copy

import pytest
import torch
from testing_utils import ALL_TERMS, SynerNetModelTester
from torch import nn


@pytest.fixture
def tester():
    return SynerNetModelTester(with_class_token_head=True)


def answers(model, inputs):
    """Everything a model says of images, CAMs by each of the ways on which they are made."""
    with torch.no_grad():
        output = model(**inputs)
        cams = model.generate_cams(inputs["pixel_values"], inputs["labels"])
    found = {name: output[name] for name in ("loss", "logits", "classification_logits", "broad_cams", "precise_cams")}
    return found | {f"generated {name}": maps for name, maps in cams.items()}


def heads_of(model):
    return [head for branch in model.synernet.pair for head in (branch.cam_head, branch.auxiliary_cam_head)]


@pytest.mark.parametrize("targets", [["classifier"], "all-linear"])
def test_lora_reaches_the_cams_and_merging_leaves_them(tester, targets):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    inputs, plain = tester.inputs(2, 32, 48), tester.model()
    config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    before, found = answers(plain, inputs), answers(adapted, inputs)
    for name in ("loss", "broad_cams", "precise_cams", "generated fused_cams"):
        assert (found[name] - before[name]).abs().max() > 1e-2, name
    merged = answers(adapted.merge_and_unload(), inputs)
    for name, values in found.items():
        torch.testing.assert_close(merged[name], values, atol=1e-4, rtol=1e-4, msg=name)


def test_all_adapters_learn_in_a_training_step(tester):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    adapted = peft.get_peft_model(tester.model(), peft.LoraConfig(target_modules="all-linear", r=2)).train()
    adapted(**tester.inputs(), loss_weights=ALL_TERMS | {"cls_token": 1.0}).loss.backward()
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    silent = {name for name in trained if adapted.get_parameter(name).grad is None}
    assert not silent


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_model_answers_about_alike(tester):
    inputs, plain = tester.inputs(2, 32, 48), tester.model()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
    assert any("dynamic" in type(module).__module__ for module in quantised.modules())
    before, found = answers(plain, inputs), answers(quantised, inputs)
    torch.testing.assert_close(found["loss"], before["loss"], rtol=0.05, atol=0.05)
    for name, values in before.items():
        assert (found[name] - values).abs().mean() <= 0.05 * values.abs().max(), name
    # quantised weights of the CAM heads as well
    for head in heads_of(quantised):
        linear = nn.Linear(head.classifier.in_features, head.classifier.out_features, bias=False)
        linear.load_state_dict(head.classifier.state_dict())
        head.classifier = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear), {nn.Linear})[0]
    for name, values in answers(quantised, inputs).items():
        assert (values - before[name]).abs().mean() <= 0.05 * before[name].abs().max(), name


def test_weights_of_another_kind_are_read_as_those_of_a_linear_layer(tester):
    torchao = pytest.importorskip("torchao.quantization", reason="the int8 extra is not installed")
    inputs, plain = tester.inputs(2, 32, 48), tester.model()
    quantised = copy.deepcopy(plain)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    before, found = answers(plain, inputs), answers(quantised, inputs)
    for name, values in before.items():
        assert (found[name] - values).abs().mean() <= 0.05 * values.abs().max(), name


def test_a_module_in_the_place_of_a_classifier_decides_scores_and_cams(tester):
    class Halved(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = linear

        def forward(self, tokens):
            return 0.5 * self.linear(tokens)

    inputs, model = tester.inputs(2, 30, 45), tester.model()
    with torch.no_grad():
        before, cams_before = model.synernet(inputs["pixel_values"]), model.cam_logits(inputs["pixel_values"])
        for head in heads_of(model):
            head.classifier = Halved(head.classifier)
        found, cams = model.synernet(inputs["pixel_values"]), model.cam_logits(inputs["pixel_values"])
    for name in ("classification_logits", "cam_logits", "auxiliary_cam_logits", "auxiliary_classification_logits"):
        for branch in ("broad", "precise"):
            torch.testing.assert_close(found[branch][name], 0.5 * before[branch][name])
    for layers, layers_before in zip(cams, cams_before, strict=True):
        for maps, maps_before in zip(layers, layers_before, strict=True):
            torch.testing.assert_close(maps, 0.5 * maps_before)


def test_hooks_see_the_tokens_of_the_cams(tester):
    model, seen = tester.model(), []
    model.synernet.broad_branch.cam_head.classifier.register_forward_hook(
        lambda module, given, answer: seen.append((tuple(given[0].shape), tuple(answer.shape)))
    )
    with torch.no_grad():
        model(tester.inputs(2, 32, 48)["pixel_values"])
    assert ((2, 4, 6, 16), (2, 4, 6, 3)) in seen and ((2, 16), (2, 3)) in seen


def test_the_cosines_are_those_of_the_directions_that_the_module_applies(tester):
    head = tester.model().synernet.broad_branch.projection_head
    tokens = torch.randn(5, 16)
    bottleneck = nn.functional.normalize(head.layers(tokens), dim=-1)
    expected = nn.functional.linear(bottleneck, nn.functional.normalize(head.directions.weight, dim=-1))
    assert torch.equal(head(tokens), expected)
    embeddings = head(tokens)
    head.directions.register_forward_hook(lambda module, given, answer: answer.flip(-1))
    torch.testing.assert_close(head(tokens), embeddings.flip(-1))
