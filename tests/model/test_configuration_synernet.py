"""The config: what it refuses, what survives saving, and where it says a default comes from."""

import dataclasses
import inspect
import json
import re

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from testing_utils import FAMILIES, SynerNetModelTester, tiny_backbone_config
from transformers import AutoConfig, ViTConfig

from synernet_hf import SynerNetConfig
from synernet_hf.model.configuration_synernet import OLD_NAMES
from synernet_hf.model.encoder_synernet import pretrained_backbone_config


def test_the_default_encoder_is_vit_base():
    config = SynerNetConfig(num_labels=21)
    assert isinstance(config.backbone_config, ViTConfig)
    assert (config.backbone_config.hidden_size, config.patch_size) == (768, 16)
    assert config.num_foreground_labels == 20


def test_labels_count_the_background():
    config = SynerNetConfig(id2label={0: "background", 1: "cat", 2: "dog"})
    assert (config.num_labels, config.num_foreground_labels) == (3, 2)
    assert config.label2id == {"background": 0, "cat": 1, "dog": 2}


def test_loss_weights_name_every_term():
    config = SynerNetConfig(num_labels=2, segmentation_weight=0.5)
    assert config.loss_weights["segmentation"] == 0.5
    assert set(config.loss_weights) == {
        "cls",
        "cls_aux",
        "cls_token",
        "spatial_bce",
        "patch_contrast",
        "prototype_contrast",
        "segmentation",
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_survives_saving(family, tmp_path):
    config = SynerNetModelTester(family, fusion="fixed", cam_scales=(1.0, 2), high_threshold=0.9).config()
    config.save_pretrained(tmp_path)
    for loaded in (SynerNetConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SynerNetConfig
        assert type(loaded.backbone_config) is type(config.backbone_config)
        assert loaded.backbone_config.to_dict() == config.backbone_config.to_dict()
        for name in set(SynerNetConfig.__annotations__) - {"backbone_config"}:
            saved, now = getattr(config, name), getattr(loaded, name)
            # JSON knows lists only
            assert (tuple(now) if isinstance(saved, tuple) else now) == saved, name
        assert loaded.id2label == config.id2label


def test_the_encoder_can_be_given_as_a_dictionary():
    fields = tiny_backbone_config("dinov2").to_dict()
    config = SynerNetConfig(backbone_config=fields, num_labels=3)
    assert config.backbone_config.model_type == "dinov2"
    assert config.patch_size == 8


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"low_threshold": 0.8}, "low, background and high threshold must rise within"),
        ({"background_threshold": 0.2}, "low, background and high threshold must rise within"),
        ({"high_threshold": 1.2}, "low, background and high threshold must rise within"),
        ({"broad_share_in_broad_label": 1.5}, r"`broad_share_in_broad_label` must lie in \[0, 1\]"),
        ({"spatial_bce_share": 1.1}, r"`spatial_bce_share` must lie in \[0, 1\]"),
        ({"fusion_range": -1.0}, r"`fusion_range` must lie in \[0, 1\]"),
        ({"confidence_threshold": 7}, r"`confidence_threshold` must lie in \[0, 1\]"),
        ({"segmentation_start": 5}, r"`segmentation_start` must lie in \[0, 1\]"),
        ({"pooling_top_k": 0}, "`pooling_top_k` must be positive, got 0"),
        ({"broad_pooling_top_k": 0}, "`broad_pooling_top_k` must be positive or left out, got 0"),
        ({"logits_pooling_share": 0}, r"`logits_pooling_share` must lie in \(0, 1\] or be left out, got 0"),
        ({"precise_propagation_temperature": 0.0}, "`precise_propagation_temperature` must be at least 0.001 or left"),
        ({"broad_propagation_temperature": 1e-40}, "`broad_propagation_temperature` must be at least 0.001 or left"),
        ({"broad_propagation_temperature": float("nan")}, "must be at least 0.001 or left out, got nan"),
        ({"decoder_dilation": 0}, "`decoder_dilation` must be positive, got 0"),
        ({"prototype_temperature": 0}, "`prototype_temperature` must be positive, got 0"),
        ({"prototype_temperature": float("nan")}, "`prototype_temperature` must be positive, got nan"),
        ({"cls_weight": -1}, "`cls_weight` must be finite and not negative, got -1"),
        ({"cls_weight": float("nan")}, "`cls_weight` must be finite and not negative, got nan"),
        ({"cls_token_weight": -1}, "`cls_token_weight` must be finite and not negative, got -1"),
        ({"segmentation_weight": float("inf")}, "`segmentation_weight` must be finite and not negative, got inf"),
        ({"spatial_bce_share": -0.1}, r"`spatial_bce_share` must lie in \[0, 1\], got -0.1"),
        ({"spatial_bce_share": float("nan")}, r"`spatial_bce_share` must lie in \[0, 1\], got nan"),
        ({"class_prior_weight": -1}, "`class_prior_weight` must be finite and not negative, got -1"),
        ({"class_prior_weight": float("nan")}, "`class_prior_weight` must be finite and not negative, got nan"),
        ({"class_prior_weight": float("inf")}, "`class_prior_weight` must be finite and not negative, got inf"),
        ({"refinement_dilations": []}, "`refinement_dilations` must be a non-empty list of positive numbers"),
        ({"image_mean": [0.5]}, "`image_mean` needs one number per colour channel"),
        ({"semantic_loss_ignore_index": 1}, "`semantic_loss_ignore_index` 1 is one of the"),
        ({"cam_scales": ()}, "`cam_scales` must be a non-empty list of positive numbers"),
        ({"inference_scales": (1.0, 0.0)}, "`inference_scales` must be a non-empty list of positive numbers"),
        ({"spatial_bce_branches": ("wide",)}, "names branches out of broad and precise, got .*wide"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, sentence):
    with pytest.raises(StrictDataclassClassValidationError) as caught:
        SynerNetConfig(num_labels=2, **fields)
    assert re.search(sentence, str(caught.value.__cause__ or caught.value))


@pytest.mark.parametrize(
    "fields", [{"pooling_top_k": "five"}, {"fusion": "mean"}, {"cam_flip": "yes"}, {"cam_scales": 1.0}]
)
def test_values_of_the_wrong_kind_are_refused(fields):
    with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
        SynerNetConfig(num_labels=2, **fields)


def test_every_field_is_documented_with_its_default_and_its_source():
    documented = inspect.getdoc(SynerNetConfig).split("Raises:")[0]
    entries = re.findall(r"^ +(\w+) \((.+?)\):\s+((?:(?! +\w+ \(`).*\n?)+)", documented, flags=re.MULTILINE)
    assert [name for name, *_ in entries] == list(SynerNetConfig.__annotations__)
    defaults = {field.name: field.default for field in dataclasses.fields(SynerNetConfig)}
    for name, kind, text in entries:
        assert re.search(r"\[(authors|paper|ours)[^\]]*\]", text), f"{name} does not say where its default comes from"
        stated = re.search(r"defaults to `(.+?)`\)?$", kind)
        if stated:
            value = defaults[name]
            shown = f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')
            assert stated.group(1) == shown, f"{name} defaults to {shown}, its documentation says {stated.group(1)}"


def test_old_names_of_fields_are_read_from_saved_folders(tmp_path):
    old = {
        "broad_inference_weight": 0.6,
        "broad_label_share": 0.4,
        "precise_label_share": 0.45,
        "spatial_bce_weight": 0.2,
        "confidence_weighting": 0.0,
    }
    config = SynerNetConfig(num_labels=3)
    fields = {name: value for name, value in config.to_dict().items() if name not in OLD_NAMES.values()}
    (tmp_path / "config.json").write_text(json.dumps(fields | old))
    loaded = SynerNetConfig.from_pretrained(tmp_path)
    assert set(old) == set(OLD_NAMES)
    assert (loaded.broad_share_in_logits, loaded.spatial_bce_share) == (0.6, 0.2)
    assert (loaded.broad_share_in_broad_label, loaded.broad_share_in_precise_label) == (0.4, 0.45)
    assert not set(OLD_NAMES) & set(loaded.to_dict())


@pytest.mark.parametrize("old", [old for old, new in OLD_NAMES.items() if new])
def test_an_old_name_beside_the_new_one_is_refused(old, tmp_path):
    new = OLD_NAMES[old]
    fields = SynerNetConfig(num_labels=3).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields | {old: 0.2}))
    # the new one may well have its default value
    for build in (
        lambda: SynerNetConfig(num_labels=3, **{old: 0.2, new: 0.3}),
        lambda: SynerNetConfig(num_labels=3, **{old: 0.2, new: fields[new]}),
        lambda: SynerNetConfig.from_pretrained(tmp_path),
        lambda: AutoConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=f"`{old}` is the old name of `{new}`, and both are given"):
            build()


def test_every_loss_weight_is_checked():
    config = SynerNetConfig(num_labels=3)
    for term in config.loss_weights:
        name = "spatial_bce_share" if term == "spatial_bce" else f"{term}_weight"
        for value in (-1.0, float("nan"), float("inf")):
            with pytest.raises(StrictDataclassClassValidationError) as caught:
                SynerNetConfig(num_labels=3, **{name: value})
            assert f"`{name}` must" in str(caught.value.__cause__ or caught.value)


def test_misspelt_fields_of_the_encoder_are_refused(tmp_path):
    tiny_backbone_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no field qkv_bais: did you mean qkv_bias\?"):
        pretrained_backbone_config(str(tmp_path), {"qkv_bais": False})
    assert pretrained_backbone_config(str(tmp_path), {"qkv_bias": False}).qkv_bias is False


@pytest.mark.parametrize("family", FAMILIES)
def test_the_configuration_of_an_encoder_is_read_once(family, tmp_path, monkeypatch):
    saved = tiny_backbone_config(family)
    saved.save_pretrained(tmp_path)
    overrides = {"num_hidden_layers": saved.num_hidden_layers - 1, "image_size": 64}
    expected = AutoConfig.from_pretrained(tmp_path, **overrides)
    reads, read = [], AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *args: reads.append(args) or read(*args))
    found = pretrained_backbone_config(str(tmp_path), overrides)
    assert len(reads) == 1
    assert found.to_dict() == expected.to_dict()


RELABELLED = {0: "background", 1: "dog", 2: "cat"}


@pytest.mark.parametrize(
    "given",
    [
        {"id2label": RELABELLED},
        {"id2label": {"2": "cat", "0": "background", "1": "dog"}},
        {"label2id": {"background": 0, "dog": 1, "cat": 2}},
        {"label2id": {"cat": "2", "background": "0", "dog": "1"}, "id2label": RELABELLED},
        {"id2label": RELABELLED, "label2id": {"background": 0, "dog": 1, "cat": 2}},
    ],
    ids=str,
)
def test_the_two_maps_of_labels_stay_inverse(given, tmp_path):
    saved = SynerNetConfig(id2label={0: "background", 1: "cat", 2: "dog"})
    saved.save_pretrained(tmp_path)
    assigned = SynerNetConfig.from_pretrained(tmp_path)
    for name, value in given.items():
        setattr(assigned, name, value)
    loaded = SynerNetConfig.from_pretrained(tmp_path, **given)
    for config in (SynerNetConfig(**given), loaded, AutoConfig.from_pretrained(tmp_path, **given), assigned):
        assert list(config.id2label.items()) == list(RELABELLED.items())
        assert config.label2id == {"background": 0, "dog": 1, "cat": 2}
        config.save_pretrained(tmp_path / "again")
        assert SynerNetConfig.from_pretrained(tmp_path / "again").label2id == config.label2id
    saved.num_labels = 4
    assert saved.label2id == {f"LABEL_{index}": index for index in range(4)}


def test_a_contradicting_label2id_is_named_and_left_out(monkeypatch):
    said = []
    monkeypatch.setattr("synernet_hf.model.configuration_synernet.logger.warning", said.append)
    config = SynerNetConfig(id2label=RELABELLED, label2id={"background": 0, "cat": 1, "dog": 2})
    assert config.label2id == {"background": 0, "dog": 1, "cat": 2}
    assert len(said) == 1 and "contradicts `id2label`" in said[0]


@pytest.mark.parametrize(
    ("maps", "sentence"),
    [
        ({"id2label": {0: "background", 2: "cat"}}, r"must number its 2 labels from 0 on, got \[0, 2\]"),
        ({"id2label": {1: "background", 2: "cat"}}, r"must number its 2 labels from 0 on, got \[1, 2\]"),
        ({"id2label": {0: "background", 1: "cat", "1": "dog"}}, "must number its 3 labels from 0 on"),
        ({"id2label": {0: "background", 1: "cat", 2: "cat"}}, "a name of its own, got 'cat' 2 times"),
        (
            {"id2label": {0: "cat", 1: "background"}},
            "Label 0 of `id2label` is the background, got 'background' as label 1",
        ),
        ({"id2label": {0: "cat", 1: "dog", 2: "__Background__"}}, "got '__Background__' as label 2; put it first"),
        ({"id2label": {"background": 0, "cat": 1}}, "`id2label` gives numbers their names, got {'background': 0"),
        ({"id2label": ["background", "cat"]}, "`id2label` is a dictionary"),
        ({"label2id": {"background": 0, "cat": 1, "dog": 1}}, "must number its 3 labels from 0 on"),
    ],
    ids=str,
)
def test_labels_with_gaps_or_duplicates_are_refused(maps, sentence, tmp_path):
    SynerNetConfig(id2label={0: "background", 1: "cat"}).save_pretrained(tmp_path)
    config = SynerNetConfig.from_pretrained(tmp_path)
    for build in (
        lambda: SynerNetConfig(**maps),
        lambda: SynerNetConfig.from_pretrained(tmp_path, **maps),
        lambda: [setattr(config, name, value) for name, value in maps.items()],
    ):
        with pytest.raises(ValueError, match=sentence):
            build()
