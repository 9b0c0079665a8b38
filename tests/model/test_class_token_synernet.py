"""The classifier of the class token: its loss, the class scores of an image, the prior on the segmentation."""

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import ALL_TERMS, FAMILIES, SynerNetModelTester
from torch.nn import functional as F
from transformers import pipeline

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.model.cam_synernet import lower_unlikely_classes


def scores_of(model, pixel_values):
    """Class-token scores of both branches, from the class tokens."""
    scores = {}
    for name in ("broad", "precise"):
        branch = getattr(model.synernet.pair, name)
        tokens = branch.encode(pixel_values)[0]
        head = branch.class_token_head
        scores[name] = branch.class_token(tokens) @ head.weight.T + head.bias
    return scores


def test_models_have_no_such_head_unless_asked():
    tester = SynerNetModelTester()
    model = tester.model()
    output = model(**tester.inputs(), loss_weights=model.config.loss_weights)
    assert not [name for name in model.state_dict() if "class_token_head" in name]
    assert "loss_cls_token" not in output.loss_dict
    assert model.synernet(tester.inputs()["pixel_values"]).broad.class_token_logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_its_loss_is_the_soft_margin_of_the_class_token(family):
    tester = SynerNetModelTester(family, with_class_token_head=True, cls_token_weight=0.5)
    model, inputs = tester.model(), tester.inputs()
    with torch.no_grad():
        scores = scores_of(model, inputs["pixel_values"])
    expected = [F.multilabel_soft_margin_loss(values, inputs["labels"]) for values in scores.values()]
    output = model(**inputs, loss_weights={"cls_token": model.config.loss_weights["cls_token"]})
    assert set(output.loss_dict) == {"loss_cls_token"}
    torch.testing.assert_close(output.loss_dict["loss_cls_token"], sum(expected) / 2)
    torch.testing.assert_close(output.loss, 0.5 * sum(expected))


def test_the_class_scores_are_those_of_the_class_tokens():
    tester = SynerNetModelTester(with_class_token_head=True)
    model, pixel_values = tester.model(), tester.inputs()["pixel_values"]
    with torch.no_grad():
        scores = scores_of(model, pixel_values)
        both = model(pixel_values).classification_logits
        broad = model(pixel_values, inference_branches="broad").classification_logits
    torch.testing.assert_close(both, (scores["broad"] + scores["precise"]) / 2)
    torch.testing.assert_close(broad, scores["broad"])


@pytest.mark.parametrize("size", [(32, 32), (36, 45)])
@pytest.mark.parametrize("branches", ["both", "precise"])
def test_the_prior_lowers_each_class_by_its_distance_to_the_likeliest(size, branches):
    logits = {}
    for weight in (0.0, 2.0):
        tester = SynerNetModelTester(with_class_token_head=True, class_prior_weight=weight)
        model, pixel_values = tester.model(), tester.inputs(2, *size)["pixel_values"]
        with torch.no_grad():
            logits[weight] = model(pixel_values, inference_branches=branches).logits
    with torch.no_grad():
        scores = scores_of(model, model.synernet.pad(pixel_values))
    # mixed as the decoders' logits are
    shares = {"broad": 0.7, "precise": 0.3} if branches == "both" else {branches: 1.0}
    prior = sum(share * scores[name].sigmoid().log() for name, share in shares.items())
    prior = prior - prior.amax(dim=1, keepdim=True)
    moved = logits[2.0] - logits[0.0]
    assert torch.equal(moved[:, 0], torch.zeros_like(moved[:, 0]))
    torch.testing.assert_close(moved[:, 1:], 2 * prior[:, :, None, None].expand_as(moved[:, 1:]))
    # none gains, and one class of each image keeps what it has
    assert (moved <= 0).all()
    assert (moved[:, 1:].amax(dim=1) == 0).all()


def test_the_prior_is_none_of_the_losses_business():
    losses = []
    for weight in (0.0, 3.0):
        tester = SynerNetModelTester(with_class_token_head=True, class_prior_weight=weight)
        output = tester.model()(**tester.inputs(), loss_weights=ALL_TERMS | {"cls_token": 1.0})
        losses.append(output.loss)
    assert torch.equal(*losses)


def test_every_parameter_has_a_gradient():
    tester = SynerNetModelTester(with_class_token_head=True)
    model = tester.model()
    model(**tester.inputs(), loss_weights=ALL_TERMS | {"cls_token": 1.0}, training_progress=0.7).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_the_head_is_saved_and_loaded(tmp_path):
    tester = SynerNetModelTester(with_class_token_head=True, shared_encoder_layers=1)
    model, pixel_values = tester.model(), tester.inputs()["pixel_values"]
    model.save_pretrained(tmp_path)
    loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(pixel_values).logits, model(pixel_values).logits)
    assert loaded.config.with_class_token_head


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_prior_counts_in_half_precision_too(dtype):
    tester = SynerNetModelTester(with_class_token_head=True)
    model, pixel_values = tester.model(), tester.inputs()["pixel_values"]
    with torch.no_grad():
        expected = model(pixel_values).logits
        half = model.to(dtype)(pixel_values.to(dtype))
    assert half.logits.dtype == torch.float32 and half.classification_logits.dtype == dtype
    torch.testing.assert_close(half.logits, expected, atol=0.05, rtol=0.05)


def test_one_branch_alone_has_its_own_prior():
    tester = SynerNetModelTester(with_class_token_head=True)
    model, pixel_values = tester.model(), tester.inputs()["pixel_values"]
    with torch.no_grad():
        model.config.class_prior_weight = 0.0
        plain = model(pixel_values)
        model.config.class_prior_weight = 4.0
        alone = model(pixel_values, inference_branches="precise")
        scores = scores_of(model, pixel_values)["precise"]
    torch.testing.assert_close(plain.logits, 0.7 * plain.broad_logits + 0.3 * plain.precise_logits)
    # a branch's own logits are its decoder's
    assert torch.equal(alone.precise_logits, plain.precise_logits)
    expected = lower_unlikely_classes(plain.precise_logits, F.logsigmoid(scores), model.config.class_prior_weight)
    torch.testing.assert_close(alone.logits, expected)


def test_the_prior_is_left_out_where_the_classes_are_known():
    tester = SynerNetModelTester(with_class_token_head=True)
    model = tester.model()
    with torch.no_grad():
        for name in ("broad", "precise"):
            branch = getattr(model.synernet.pair, name)
            # sure of the first class, whatever the image shows
            branch.class_token_head.bias.copy_(torch.tensor([5.0, -5.0, -5.0]))
            for parameter in branch.decode_head.parameters():
                parameter.normal_()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    names = model.config.id2label
    segmenter = pipeline(
        "weakly-supervised-segmentation", model=model, image_processor=SynerNetImageProcessor(), device="cpu"
    )

    def labels_of(**options):
        answer = segmenter(image, return_scores=True, **options)
        return [segment["label"] for segment in answer["segments"]], answer["scores"][names[2]]

    known = dict.fromkeys((0.0, 4.0))
    for weight in known:
        model.config.class_prior_weight = weight
        known[weight] = labels_of(image_labels=[names[2]])
    assert known[0.0][0] == known[4.0][0] and names[2] in known[4.0][0]
    np.testing.assert_array_equal(known[0.0][1], known[4.0][1])
    # nobody says what is there, or the classifiers do: then they count
    assert names[2] not in labels_of()[0]
    assert names[2] not in labels_of(image_labels="predicted")[0]


def test_all_views_together_say_which_classes_there_are():
    tester = SynerNetModelTester(with_class_token_head=True)
    model, pixel_values = tester.model(), tester.inputs()["pixel_values"]
    scales, likely, best = (1.0, 0.75), [], None
    with torch.no_grad():
        for scale in scales:
            for mirrored in (False, True):
                image = F.interpolate(pixel_values, scale_factor=scale, mode="bilinear")
                image = image.flip(-1) if mirrored else image
                scores = scores_of(model, image)
                likely.append(0.7 * F.logsigmoid(scores["broad"]) + 0.3 * F.logsigmoid(scores["precise"]))
                logits = model.multi_scale_logits(image, (1.0,), class_prior_weight=0.0)
                logits = logits.flip(-1) if mirrored else logits
                logits = F.interpolate(logits, size=pixel_values.shape[-2:], mode="bilinear")
                best = logits if best is None else torch.maximum(best, logits)
        expected = lower_unlikely_classes(best, torch.stack(likely).mean(dim=0), model.config.class_prior_weight)
        found = model.multi_scale_logits(pixel_values, scales, flip=True)
    # a view of another size is resized to the image once here, from its tokens there
    assert (found.argmax(dim=1) == expected.argmax(dim=1)).float().mean() > 0.97
    torch.testing.assert_close(found.mean(dim=(2, 3)), expected.mean(dim=(2, 3)), atol=0.02, rtol=0.02)
    own = torch.maximum(*(model.multi_scale_logits(pixel_values, (scale,), flip=True) for scale in scales))
    assert not torch.allclose(found.mean(dim=(2, 3)), own.mean(dim=(2, 3)), atol=0.02, rtol=0.02)
