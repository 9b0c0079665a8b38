"""The network and its training arithmetic on models of a few thousand weights."""

import pytest
import torch
from testing_utils import ALL_TERMS, EARLY_TERMS, FAMILIES, SynerNetModelTester, tiny_backbone_config
from torch.nn import functional as F

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation
from synernet_hf.model import objective_synernet
from synernet_hf.model.cam_synernet import crop_to_input
from synernet_hf.model.objective_synernet import prototype_contrast_terms


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tester():
    return SynerNetModelTester()


@pytest.fixture
def model(tester):
    return tester.model()


def without_gradient(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}


# outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_every_encoder_family(family):
    tester = SynerNetModelTester(family)
    model = tester.model()
    with torch.no_grad():
        output = model(tester.inputs(2, 32, 48)["pixel_values"])
    assert output.logits.shape == output.broad_logits.shape == output.precise_logits.shape == (2, 4, 32, 48)
    assert output.broad_cams.shape == output.precise_cams.shape == (2, 3, 32, 48)
    assert output.classification_logits.shape == (2, 3)
    for cams in (output.broad_cams, output.precise_cams):
        assert 0 <= cams.min() and cams.max() <= 1
    assert output.loss is output.loss_dict is output.pseudo_labels is output.hidden_states is output.attentions is None
    torch.testing.assert_close(output.logits, 0.7 * output.broad_logits + 0.3 * output.precise_logits)
    assert not torch.allclose(output.broad_logits, output.precise_logits)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_with_labels(tester, model, training):
    inputs = tester.inputs(2, 32, 48)
    output = model.train(training)(**inputs, loss_weights=ALL_TERMS)
    assert output.loss.ndim == 0 and output.loss.requires_grad and output.loss.isfinite()
    assert output.logits.shape == output.broad_logits.shape == output.precise_logits.shape == (2, 4, 32, 48)
    assert output.confidence.shape == (2, 1, 32, 48)
    assert output.pseudo_labels.shape == (2, 32, 48) and output.pseudo_labels.dtype == torch.int64
    if training:
        assert output.broad_cams is output.precise_cams is None
    else:
        # the labels change nothing in what the model predicts
        free = model(inputs["pixel_values"])
        for name in ("logits", "broad_logits", "precise_logits", "broad_cams", "precise_cams"):
            assert torch.equal(output[name], free[name]), name
    allowed = torch.cat([inputs["labels"].new_ones(2, 1), inputs["labels"]], dim=1).bool()
    for label_map, own in zip(output.pseudo_labels, allowed, strict=True):
        assert all(value == 255 or own[value] for value in label_map.unique().tolist())


@pytest.mark.parametrize("branch", ["broad", "precise"])
def test_one_branch_alone(tester, model, branch):
    pixel_values = tester.inputs()["pixel_values"]
    with torch.no_grad():
        both, alone = model(pixel_values), model(pixel_values, inference_branches=branch)
    other = "precise" if branch == "broad" else "broad"
    assert torch.equal(alone.logits, both[f"{branch}_logits"])
    assert torch.equal(alone[f"{branch}_cams"], both[f"{branch}_cams"])
    assert f"{other}_logits" not in alone and f"{other}_cams" not in alone
    assert torch.equal(model(pixel_values, inference_branches="both").logits, both.logits)


def test_states_and_attentions_come_broad_first(tester, model):
    model.set_attn_implementation("eager")
    pixel_values = tester.inputs(1, 32, 40)["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values, output_hidden_states=True, output_attentions=True)
        broad = model.synernet.broad_branch.backbone(
            pixel_values, output_hidden_states=True, output_attentions=True, interpolate_pos_encoding=True
        )
    assert len(output.hidden_states) == 2 * (3 + 1) and len(output.attentions) == 2 * 3
    for actual, expected in zip(output.hidden_states[:4], broad.hidden_states, strict=True):
        assert torch.equal(actual, expected)
    for actual, expected in zip(output.attentions[:3], broad.attentions, strict=True):
        assert torch.equal(actual, expected)
    torch.testing.assert_close(output.attentions[5].sum(dim=-1), torch.ones(1, 2, 21))
    assert not torch.equal(output.hidden_states[0], output.hidden_states[4])


def test_a_tuple_instead_of_an_output(tester, model):
    pixel_values = tester.inputs()["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model(pixel_values, return_dict=False)[0], model(pixel_values).logits)


def test_attention_implementations_agree(tester, model):
    pixel_values = tester.inputs()["pixel_values"]
    with torch.no_grad():
        sdpa = model(pixel_values).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(pixel_values).logits, sdpa)


# sizes


@pytest.mark.parametrize("size", [(30, 45), (33, 32), (8, 47), (5, 3)])
@pytest.mark.parametrize("family", ["vit", "dinov3_vit"])
def test_other_sizes_are_padded_resized_and_cropped(family, size):
    tester = SynerNetModelTester(family)
    model = tester.model()
    pixel_values = tester.inputs(2, *size)["pixel_values"]
    rows, columns = -(-size[0] // 8), -(-size[1] // 8)
    padded = torch.zeros(2, 3, rows * 8, columns * 8)
    padded[..., : size[0], : size[1]] = pixel_values
    with torch.no_grad():
        output, expected = model(pixel_values), model(padded)
    assert output.logits.shape == (2, 4, *size)
    torch.testing.assert_close(output.logits, expected.logits[..., : size[0], : size[1]])
    assert output.broad_cams.shape == (2, 3, *size)
    torch.testing.assert_close(output.classification_logits, expected.classification_logits)


def test_the_last_row_and_column_of_any_image_count(tester, model):
    pixel_values = tester.inputs(1, 33, 41)["pixel_values"]
    changed = pixel_values.clone()
    changed[..., 32, 40] += 3.0
    with torch.no_grad():
        assert not torch.allclose(model(pixel_values).logits, model(changed).logits)


@pytest.mark.parametrize("size", [(30, 45), (16, 56)])
def test_training_at_other_sizes(tester, model, size):
    output = model(**tester.inputs(2, *size), loss_weights=ALL_TERMS, training_progress=0.9)
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.pseudo_labels.shape == (2, *size)


@pytest.mark.parametrize("size", [(32, 48), (30, 45), (5, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scale_is_what_forward_gives(tester, model, size, dtype):
    pixel_values = tester.inputs(2, *size)["pixel_values"]
    model.to(dtype)
    with torch.no_grad():
        output = model(pixel_values)
    assert torch.equal(model.multi_scale_logits(pixel_values, scales=(1.0,)), output.logits)
    cams = model.generate_cams(pixel_values, scales=(1.0,), flip=False, plain=True)
    torch.testing.assert_close(cams.broad_cams, output.broad_cams)
    assert output.logits.is_contiguous()
    assert torch.equal(model.class_scores(pixel_values), output.classification_logits)


@pytest.mark.parametrize("size", [(32, 32), (29, 50)])
@pytest.mark.parametrize("flip", [True, False])
def test_multi_scale_logits_are_the_larger_of_each_scale(tester, model, size, flip):
    pixel_values = tester.inputs(1, *size)["pixel_values"]

    expected = []
    for scale in (1.0, 1.5):
        scaled_size = [int(scale * side) for side in size]
        scaled = F.interpolate(pixel_values, size=scaled_size, mode="bilinear", align_corners=False)
        with torch.no_grad():
            outputs = [model.synernet(scaled)] + ([model.synernet(scaled.flip(-1))] if flip else [])
        for index, output in enumerate(outputs):
            # straight from the token grid, but where padding has to be cut off first
            view = crop_to_input(0.7 * output.broad.logits + 0.3 * output.precise.logits, tuple(scaled_size), 8)
            view = view.flip(-1) if index else view
            expected.append(F.interpolate(view, size=size, mode="bilinear", align_corners=False))
    actual = model.multi_scale_logits(pixel_values, flip=flip)
    assert actual.shape == (1, 4, *size) and not actual.requires_grad
    torch.testing.assert_close(actual, torch.stack(expected).amax(dim=0), atol=1e-5, rtol=1e-5)


def test_generated_cams(tester, model):
    inputs = tester.inputs(2, 30, 44)
    cams = model.generate_cams(**inputs)
    free = model.generate_cams(inputs["pixel_values"])
    for name in ("broad_cams", "precise_cams", "broad_aux_cams", "precise_aux_cams", "fused_cams"):
        assert cams[name].shape == (2, 3, 30, 44) and not cams[name].requires_grad
        assert 0 <= cams[name].min() and cams[name].max() <= 1
        assert not cams[name][inputs["labels"] == 0].any()
        assert free[name].amax(dim=(-2, -1)).min() > 0
    assert cams.confidence.shape == (2, 1, 30, 44)
    single = model.generate_cams(**inputs, scales=(1.0,), flip=False)
    assert not torch.allclose(single.broad_cams, cams.broad_cams)


# losses


@pytest.mark.parametrize("term", ALL_TERMS)
def test_a_term_appears_only_where_it_weighs_something(tester, model, term):
    names = {f"loss_{name}" for name in ALL_TERMS}
    all_terms = model(**tester.inputs(), loss_weights=ALL_TERMS).loss_dict
    assert set(all_terms) == names
    assert not any(value.requires_grad for value in all_terms.values())
    without = model(**tester.inputs(), loss_weights=ALL_TERMS | {term: 0.0}).loss_dict
    assert set(without) == names - {f"loss_{term}"}
    alone = model(**tester.inputs(), loss_weights={term: 0.5})
    assert set(alone.loss_dict) == {f"loss_{term}"}


def test_weights_come_from_the_config_unless_given(tester, model):
    inputs = tester.inputs()
    torch.manual_seed(3)
    expected = model(**inputs, loss_weights=model.config.loss_weights)
    torch.manual_seed(3)
    assert torch.equal(model(**inputs).loss, expected.loss)


@pytest.mark.parametrize("weights", [{}, dict.fromkeys(ALL_TERMS, 0.0)])
def test_without_any_term_the_loss_is_zero(tester, model, weights):
    output = model(**tester.inputs(), loss_weights=weights)
    assert torch.is_tensor(output.loss) and output.loss == 0
    assert output.loss_dict == {}


@pytest.mark.parametrize("weights", [ALL_TERMS, EARLY_TERMS, {"cls": 1.0, "spatial_bce": 0.4}, {"segmentation": 3.0}])
def test_the_terms_add_up_to_the_loss(weights):
    tester = SynerNetModelTester(spatial_bce_branches=("broad", "precise"))
    output = tester.model()(**tester.inputs(), loss_weights=weights)
    torch.testing.assert_close(sum(output.loss_dict.values()), output.loss.detach())
    assert all(value > 0 for value in output.loss_dict.values())


def test_a_term_is_its_weight_times_its_sum_over_the_branches():
    tester = SynerNetModelTester(spatial_bce_branches=("broad", "precise"))
    model, inputs = tester.model(), tester.inputs()
    weighted = model(**inputs, loss_weights=ALL_TERMS).loss_dict
    for name in ("cls_aux", "patch_contrast", "segmentation", "prototype_contrast"):
        alone = model(**inputs, loss_weights={name: 1.0}).loss_dict[f"loss_{name}"]
        torch.testing.assert_close(weighted[f"loss_{name}"], ALL_TERMS[name] * alone)
    # the spatial term takes its share from the classification
    plain = model(**inputs, loss_weights={"cls": 1.0}).loss_dict["loss_cls"]
    torch.testing.assert_close(weighted["loss_cls"], (1 - 0.4) * plain)
    with torch.no_grad():
        outputs = model.synernet(inputs["pixel_values"])
    scores = (outputs.broad.classification_logits, outputs.precise.classification_logits)
    torch.testing.assert_close(plain, sum(F.multilabel_soft_margin_loss(part, inputs["labels"]) for part in scores))


def test_each_branch_pools_as_many_tokens_as_it_is_told():
    pooled = {}
    for fields in ({}, {"broad_pooling_top_k": 7}):
        tester = SynerNetModelTester(pooling_top_k=2, **fields)
        outputs = tester.model().synernet(tester.inputs()["pixel_values"])
        for name in ("broad", "precise"):
            cams, scores = outputs[name].features.flatten(2), outputs[name].classification_logits
            pooled[name, len(fields)] = [k for k in (2, 7) if torch.allclose(scores, classify(tester, name, cams, k))]
    assert pooled == {("broad", 0): [2], ("precise", 0): [2], ("broad", 1): [7], ("precise", 1): [2]}


def test_class_scores_can_be_pooled_from_the_cam():
    tester = SynerNetModelTester(logits_pooling_share=0.5)
    with torch.no_grad():
        outputs = tester.model().synernet(tester.inputs()["pixel_values"])
    for branch in outputs.pair:
        for scores, maps in (
            (branch.classification_logits, branch.cam_logits),
            (branch.auxiliary_classification_logits, branch.auxiliary_cam_logits),
        ):
            tokens = maps.flatten(2)
            expected = tokens.sort(dim=-1, descending=True).values[..., : tokens.shape[-1] // 2].mean(dim=-1)
            torch.testing.assert_close(scores, expected)


def classify(tester, name, features, top_k):
    """Class scores of the mean of each channel's `top_k` largest values."""
    weight = getattr(tester.model().synernet.pair, name).cam_head.classifier.weight
    return features.sort(dim=-1, descending=True).values[..., :top_k].mean(dim=-1) @ weight.T


def test_the_spatial_share_is_taken_from_its_branches_only():
    tester = SynerNetModelTester(spatial_bce_branches=("broad",))
    model, inputs = tester.model(), tester.inputs()
    terms = model(**inputs, loss_weights={"cls": 1.0, "spatial_bce": 0.4})
    with torch.no_grad():
        outputs = model.synernet(inputs["pixel_values"])
    broad, precise = (
        F.multilabel_soft_margin_loss(outputs[name].classification_logits, inputs["labels"])
        for name in ("broad", "precise")
    )
    torch.testing.assert_close(terms.loss_dict["loss_cls"], 0.6 * broad + precise)
    torch.testing.assert_close(terms.loss, 0.6 * broad + precise + terms.loss_dict["loss_spatial_bce"])


def test_before_the_gates_decoder_and_projection_have_no_gradient(tester, model):
    model(**tester.inputs(), loss_weights=EARLY_TERMS).loss.backward()
    untouched = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    idle = {name for name in dict(model.named_parameters()) if "decode_head" in name or "projection_head" in name}
    assert untouched == idle


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_terms_every_parameter_has_a_gradient(family):
    tester = SynerNetModelTester(family)
    model = tester.model()
    model(**tester.inputs(2, 40, 32), loss_weights=ALL_TERMS, training_progress=0.7).loss.backward()
    # DINO's mask token is for its own pretraining
    assert {name for name in without_gradient(model) if not name.endswith("mask_token")} == set()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_targets_carry_no_gradient(tester, model):
    """The classifiers make the CAMs of every target; segmentation alone must not move them."""
    inputs = tester.inputs()
    output = model(**inputs, loss_weights={"segmentation": 1.0})
    output.loss.backward()
    assert output.loss > 0
    for value in (output.broad_cams, output.precise_cams, output.confidence, *output.loss_dict.values()):
        assert not value.requires_grad
    touched = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched and not any("cam_head" in name or "projection_head" in name for name in touched)


def test_patch_contrast_does_not_move_the_classifiers(tester, model):
    model(**tester.inputs(), loss_weights={"patch_contrast": 1.0}).loss.backward()
    assert not any(
        parameter.grad is not None for name, parameter in model.named_parameters() if "cam_head.classifier" in name
    )


def test_the_spatial_loss_moves_the_last_classifier_only(tester, model):
    model(**tester.inputs(), loss_weights={"spatial_bce": 0.4}).loss.backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and "cam_head" in name}
    assert moved == {"synernet.precise_branch.cam_head.classifier.weight"}


@pytest.mark.parametrize("rows", [[[0, 0, 0]], [[1, 1, 1]], [[0, 0, 0], [1, 1, 1]], [[0, 0, 0], [0, 0, 0]]])
@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_images_with_no_and_with_every_class(tester, model, rows, progress):
    labels = torch.tensor(rows)
    pixel_values = tester.inputs(len(rows), 32, 40)["pixel_values"]
    output = model.train()(pixel_values, labels=labels, loss_weights=ALL_TERMS, training_progress=progress)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(value.isfinite() for value in output.loss_dict.values())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    assert not output.pseudo_labels[labels.sum(dim=1) == 0].any()


def test_boxes_are_ignored_outside_and_may_be_empty(tester, model):
    inputs = tester.inputs(2, 32, 32)
    boxes = torch.tensor([[0, 16, 8, 32], [0, 0, 0, 0]])
    output = model(**inputs, valid_boxes=boxes, loss_weights=ALL_TERMS)
    output.loss.backward()
    assert output.loss.isfinite()
    assert (output.pseudo_labels[0, 16:] == 255).all() and (output.pseudo_labels[0, :, :8] == 255).all()
    assert (output.pseudo_labels[1] == 255).all()


def test_a_constant_image_trains(tester, model):
    inputs = tester.inputs(1)
    output = model(torch.zeros_like(inputs["pixel_values"]), labels=inputs["labels"], loss_weights=ALL_TERMS)
    output.loss.backward()
    assert output.loss.isfinite()


def test_a_few_steps_lower_the_loss(tester, model):
    inputs = tester.inputs(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**inputs, loss_weights=EARLY_TERMS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


# prototypes


def test_prototypes_move_in_training_only(tester, model):
    inputs = tester.inputs()
    weights = {"prototype_contrast": 0.05}
    before = model.synernet.broad_branch.projection_head.prototypes.clone()
    model.eval()(**inputs, loss_weights=weights)
    assert torch.equal(model.synernet.broad_branch.projection_head.prototypes, before)
    model.train()(**inputs, loss_weights=EARLY_TERMS)
    assert torch.equal(model.synernet.broad_branch.projection_head.prototypes, before)
    model.train()(**inputs, loss_weights=weights)
    for branch in ("broad", "precise"):
        prototypes = getattr(model.synernet.pair, branch).projection_head.prototypes
        lengths = prototypes.norm(dim=1)
        assert not prototypes.requires_grad
        assert torch.all((lengths == 0) | ((lengths - 1).abs() < 1e-5)) and lengths.any()


def test_prototypes_are_saved(tester, model, tmp_path):
    model.train()(**tester.inputs(), loss_weights={"prototype_contrast": 0.05})
    model.save_pretrained(tmp_path)
    loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path)
    for branch in ("broad", "precise"):
        saved = getattr(model.synernet.pair, branch).projection_head.prototypes
        assert saved.any()
        assert torch.equal(getattr(loaded.synernet.pair, branch).projection_head.prototypes, saved)


def test_prototype_branches_are_the_configured_ones():
    tester = SynerNetModelTester(prototype_branches=("precise",))
    model = tester.model().train()
    model(**tester.inputs(), loss_weights={"prototype_contrast": 0.05}).loss.backward()
    assert not model.synernet.broad_branch.projection_head.prototypes.any()
    assert model.synernet.precise_branch.projection_head.prototypes.any()
    assert model.synernet.broad_branch.projection_head.directions.weight.grad is None


def test_without_projection_heads():
    tester = SynerNetModelTester(with_projection_head=False)
    model = tester.model()
    assert not any("projection_head" in name for name in model.state_dict())
    output = model(**tester.inputs(), loss_weights=ALL_TERMS)
    assert "loss_prototype_contrast" not in output.loss_dict
    output.loss.backward()


# refused input


@pytest.mark.parametrize("shape", [(2, 4), (2, 2), (6,), (2, 32, 32)])
def test_labels_of_the_wrong_width_are_refused(tester, model, shape):
    with pytest.raises(ValueError, match=r"labels must be multi-hot, .* without background: \(2, 3\), got"):
        model(tester.inputs()["pixel_values"], labels=torch.zeros(shape))


def test_generate_cams_checks_labels_too(tester, model):
    with pytest.raises(ValueError, match=r"\(2, 3\), got \(2, 5\)"):
        model.generate_cams(tester.inputs()["pixel_values"], labels=torch.zeros(2, 5))


def test_unknown_arguments_are_refused(tester, model):
    inputs = tester.inputs()
    with pytest.raises(TypeError, match=r"forward does not know pixel_value: did you mean pixel_values\?"):
        model(**inputs, pixel_value=torch.zeros(1))
    with pytest.raises(TypeError, match=r"does not know output_hidden_state: did you mean output_hidden_states\?"):
        model.synernet(inputs["pixel_values"], output_hidden_state=True)
    with pytest.raises(TypeError, match="does not know interpolate: it takes pixel_values, branches"):
        model.synernet(inputs["pixel_values"], interpolate=True)
    # what the Trainer hands in changes nothing
    expected = model(**inputs, loss_weights=EARLY_TERMS).loss
    assert torch.equal(model(**inputs, loss_weights=EARLY_TERMS, num_items_in_batch=7).loss, expected)


def test_a_batch_of_no_images_is_refused(tester, model):
    pixel_values, labels = torch.zeros(0, 3, 32, 40), torch.zeros(0, 3)
    for run in (model, model.synernet, model.cam_logits, model.multi_scale_logits):
        with pytest.raises(ValueError, match="Got a batch of no images; give at least one"):
            run(pixel_values)
    with pytest.raises(ValueError, match="Got a batch of no images; give at least one"):
        model.generate_cams(pixel_values, labels)


def test_a_broken_image_leaves_the_prototypes_finite(tester, model):
    inputs = tester.inputs()
    model.train()(**inputs, loss_weights={"prototype_contrast": 0.05})
    inputs["pixel_values"][0, 0, 3, 3] = float("nan")
    output = model(**inputs, loss_weights={"prototype_contrast": 0.05})
    assert not output.loss.isfinite()
    assert all(buffer.isfinite().all() for buffer in model.buffers())


def test_gathered_embeddings_move_the_prototypes_of_every_process(tester):
    inputs, weights = tester.inputs(4), {"prototype_contrast": 0.05}
    # one class per image, so that the class for instance learning is the same in every draw
    inputs["labels"] = F.one_hot(torch.tensor([0, 1, 1, 2]), 3).float()
    whole, part = tester.model().train(), tester.model().train()
    recorded, calls = [], []

    def record(embeddings, class_ids):
        recorded.append((embeddings.detach(), class_ids))
        return embeddings, class_ids, slice(None)

    whole(**inputs, loss_weights=weights, gather_embeddings=record)
    assert [class_ids.tolist() for _, class_ids in recorded] == [[0, 1, 1, 2]] * 2

    # the second half of the batch, with the first half coming from elsewhere
    def gather(embeddings, class_ids):
        others, other_ids = recorded[len(calls)]
        calls.append(class_ids.tolist())
        return torch.cat([others[:2], embeddings]), torch.cat([other_ids[:2], class_ids]), slice(2, 4)

    part(**{name: value[2:] for name, value in inputs.items()}, loss_weights=weights, gather_embeddings=gather)
    assert calls == [[1, 2]] * 2
    for name in ("broad_branch", "precise_branch"):
        expected, found = (getattr(model.synernet, name).projection_head.prototypes for model in (whole, part))
        assert expected.any(dim=1).all()
        torch.testing.assert_close(found, expected)


def test_a_pixel_mask_stands_for_the_valid_box(tester, model):
    inputs = tester.inputs()
    height, width = inputs["pixel_values"].shape[-2:]
    mask = torch.zeros(2, height, width)
    mask[0, : height - 8, : width - 16] = 1
    mask[1, 8:] = 1
    boxes = torch.tensor([[0, height - 8, 0, width - 16], [8, height, 0, width]])
    inputs.pop("valid_boxes", None)
    weights = EARLY_TERMS | {"segmentation": 0.17}
    by_mask = model(**inputs, pixel_mask=mask, loss_weights=weights)
    by_box = model(**inputs, valid_boxes=boxes, loss_weights=weights)
    assert torch.equal(by_mask.pseudo_labels, by_box.pseudo_labels)
    assert (by_mask.pseudo_labels[1, :8] == 255).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_with_half_precision_weights(tester, model, dtype):
    inputs = tester.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    output = model.to(dtype)(**inputs, loss_weights=ALL_TERMS)
    assert output.loss.dtype == torch.float32
    assert output.loss.isfinite()
    output.loss.backward()
    cams = model.generate_cams(inputs["pixel_values"], inputs["labels"])
    assert cams.fused_cams.isfinite().all()


def test_losses_count_in_float32_under_autocast(tester, model, monkeypatch):
    seen = {}

    def spy(embeddings, class_ids, prototypes, *rest):
        terms, moved = prototype_contrast_terms(embeddings, class_ids, prototypes, *rest)
        seen.update(autocast=torch.is_autocast_enabled("cpu"), terms=terms.dtype, moved=moved.dtype)
        return terms, moved

    monkeypatch.setattr(objective_synernet, "prototype_contrast_terms", spy)
    with torch.autocast("cpu", torch.bfloat16):
        model(**tester.inputs(), loss_weights=ALL_TERMS)
    assert seen == {"autocast": False, "terms": torch.float32, "moved": torch.float32}


def test_tuples_are_returned_when_the_configuration_asks_for_them(tester, model):
    model.config.return_dict = False
    outputs = model(tester.inputs()["pixel_values"])
    assert isinstance(outputs, tuple)
    assert outputs[0].shape[1] == model.config.num_labels


def test_another_ignore_index_changes_nothing_but_the_label(tester):
    usual, other = (tester.model(seed=0).train() for _ in range(2))
    other.config.semantic_loss_ignore_index = -100
    outputs = []
    for model in (usual, other):
        torch.manual_seed(0)
        outputs.append(model(**tester.inputs(), loss_weights=ALL_TERMS))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].pseudo_labels == 255, outputs[1].pseudo_labels == -100)


def test_unknown_terms_and_branches_are_refused(tester, model):
    inputs = tester.inputs()
    with pytest.raises(ValueError, match="loss_weights knows cls, .*, got segmentaton"):
        model(**inputs, loss_weights={"segmentaton": 1.0})
    with pytest.raises(ValueError, match="inference_branches must be 'broad', 'precise' or 'both', got 'wide'"):
        model(inputs["pixel_values"], inference_branches="wide")
    with pytest.raises(ValueError, match="Training needs both branches, got inference_branches='broad'"):
        model(**inputs, inference_branches="broad")


def test_a_model_without_classes_or_with_a_wrong_layer_is_refused():
    with pytest.raises(ValueError, match="at least one class, got 1 labels; set `id2label`"):
        SynerNetForWeaklySupervisedSegmentation(SynerNetConfig(backbone_config=tiny_backbone_config(), num_labels=1))
    with pytest.raises(ValueError, match="must pick out of the encoder's 4 hidden states, got -5"):
        SynerNetModelTester(auxiliary_layer_index=-5).model()


# precision and memory


def test_bfloat16(tester, model):
    inputs = tester.inputs()
    with torch.no_grad():
        expected = model(inputs["pixel_values"]).logits
        output = model.to(torch.bfloat16)(inputs["pixel_values"].bfloat16())
        # resized logits are float32; images of another dtype are cast
        from_float = model(inputs["pixel_values"])
    assert output.logits.dtype == torch.float32 and output.classification_logits.dtype == torch.bfloat16
    assert torch.equal(output.logits, from_float.logits)
    atol = 0.05 * expected.abs().max().item()
    torch.testing.assert_close(output.logits, expected, atol=atol, rtol=0.05)
    assert model.multi_scale_logits(inputs["pixel_values"]).isfinite().all()
    assert model.generate_cams(**inputs).fused_cams.isfinite().all()


def test_training_under_bfloat16_autocast(tester, model):
    inputs = tester.inputs()
    expected = model(**inputs, loss_weights=EARLY_TERMS | {"spatial_bce": 0.4}).loss_dict
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, loss_weights=ALL_TERMS)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    for name, value in expected.items():
        torch.testing.assert_close(output.loss_dict[name].float(), value, atol=0.02, rtol=0.02)


# the newer name is not in every version of transformers that this package works with
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_gives_equal_gradients(family):
    tester = SynerNetModelTester(family)
    inputs = tester.inputs()
    gradients = []
    for checkpointing in (False, True):
        model = tester.model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        torch.manual_seed(5)
        model(**inputs, loss_weights=ALL_TERMS).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# blocks that both branches share
