"""What goes through a folder comes back: saving, loading, drawing weights, starting from a pretrained encoder."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from testing_utils import FAMILIES, SynerNetModelTester, tiny_backbone_config
from transformers import AutoModel, AutoModelForSemanticSegmentation, ViTForImageClassification

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetModel
from synernet_hf.model.encoder_synernet import pooling_arguments


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tester():
    return SynerNetModelTester()


@pytest.fixture
def model(tester):
    return tester.model()


def every_tensor(model):
    """Parameters and buffers, those that are not saved too."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


# saving and loading


def fill_with_constants(model):
    with torch.no_grad():
        for index, value in enumerate(every_tensor(model).values()):
            value.fill_((index % 97 + 1) / 64)


READ_IN_A_NEW_PROCESS = """
import sys
from safetensors.torch import save_file
from synernet_hf import SynerNetForWeaklySupervisedSegmentation

model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(sys.argv[1])
tensors = dict(model.named_parameters()) | dict(model.named_buffers())
save_file({name: value.detach().contiguous() for name, value in tensors.items()}, sys.argv[2])
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_constants_come_back_as_they_were_saved(family, tmp_path):
    model = SynerNetModelTester(family).model()
    fill_with_constants(model)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path)
    saved, back = every_tensor(model), every_tensor(loaded)
    assert set(saved) == set(back)
    not_saved = {name for name in saved if name not in model.state_dict()}
    assert not_saved == {name for name in saved if name.endswith(("rope_embeddings.inv_freq", "position_ids"))}
    fresh = every_tensor(SynerNetModelTester(family).model())
    for name, value in back.items():
        expected = fresh[name] if name in not_saved else saved[name]
        assert torch.equal(value, expected), f"{name} changed on its way through the folder"


def test_constants_come_back_in_a_new_process(model, root, tmp_path):
    fill_with_constants(model)
    model.save_pretrained(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-c", READ_IN_A_NEW_PROCESS, str(tmp_path / "model"), str(tmp_path / "back")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    back = load_file(tmp_path / "back")
    assert set(back) == set(every_tensor(model))
    for name, value in every_tensor(model).items():
        assert torch.equal(back[name], value), f"{name} changed on its way through the folder"


def test_missing_tensors_are_drawn_anew_and_others_are_kept(model, tmp_path):
    fill_with_constants(model)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = "synernet.broad_branch.decode_head.classifier.weight"
    prototypes = "synernet.precise_branch.projection_head.prototypes"
    del tensors[lost], tensors[prototypes]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, report = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {lost, prototypes}
    back = every_tensor(loaded)
    assert back[lost].isfinite().all() and 0 < back[lost].std() < 0.1
    assert not back[prototypes].any()
    for name, value in every_tensor(model).items():
        assert name in (lost, prototypes) or torch.equal(back[name], value)


def test_logits_and_cams_are_the_same_after_loading(tester, model, tmp_path):
    inputs = tester.inputs(1, 30, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(loaded) is SynerNetForWeaklySupervisedSegmentation
    with torch.no_grad():
        assert torch.equal(loaded(inputs["pixel_values"]).logits, model(inputs["pixel_values"]).logits)
    assert torch.equal(loaded.generate_cams(**inputs).fused_cams, model.generate_cams(**inputs).fused_cams)


def test_the_base_model_loads_from_the_task_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is SynerNetModel
    for name, value in model.synernet.state_dict().items():
        assert torch.equal(base.state_dict()[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_meta_device_has_the_same_tensors(family):
    tester = SynerNetModelTester(family)
    with torch.device("meta"):
        model = SynerNetForWeaklySupervisedSegmentation(tester.config())
    real = every_tensor(tester.model())
    assert {name: value.shape for name, value in every_tensor(model).items()} == {
        name: value.shape for name, value in real.items()
    }
    assert all(value.is_meta for value in model.parameters())


def test_fresh_weights_are_drawn_as_configured(tester):
    model = SynerNetForWeaklySupervisedSegmentation(tester.config())
    for name, value in every_tensor(model).items():
        assert value.isfinite().all()
        if name.endswith("prototypes"):
            assert not value.any()
        elif "decode_head" in name or "cam_head" in name:
            assert 0.01 < value.std() < 0.03, name
    branches = model.synernet.broad_branch.state_dict(), model.synernet.precise_branch.state_dict()
    assert not torch.equal(branches[0]["cam_head.classifier.weight"], branches[1]["cam_head.classifier.weight"])


# starting from a pretrained encoder


@pytest.fixture
def vit_folder(tmp_path):
    config = tiny_backbone_config(id2label={0: "tench", 1: "goldfish"})
    vit = ViTForImageClassification(config)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_(0, 0.1)
    vit.save_pretrained(tmp_path / "vit")
    return vit, tmp_path / "vit"


def test_both_branches_start_from_the_pretrained_encoder(vit_folder, tmp_path):
    vit, folder = vit_folder
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        folder, id2label={0: "background", 1: "cat"}, auxiliary_layer_index=-2, prototype_size=8
    )
    for branch in ("broad", "precise"):
        weights = getattr(model.synernet.pair, branch).backbone.state_dict()
        assert weights.keys() == vit.vit.state_dict().keys()
        assert all(torch.equal(weights[name], value) for name, value in vit.vit.state_dict().items())
    assert model.config.id2label == {0: "background", 1: "cat"}
    assert model.config.prototype_size == 8
    model.save_pretrained(tmp_path / "synernet")
    text = (tmp_path / "synernet" / "config.json").read_text()
    assert "goldfish" not in text and "tench" not in text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_starts_from_a_folder(family, tmp_path):
    config = tiny_backbone_config(family)
    encoder = AutoModel.from_config(config, **pooling_arguments(config))
    fill_with_constants(encoder)
    encoder.save_pretrained(tmp_path)
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        tmp_path, num_labels=3, auxiliary_layer_index=-2
    )
    for branch in ("broad", "precise"):
        weights = getattr(model.synernet.pair, branch).backbone.state_dict()
        assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in weights.items())


def test_encoder_settings_can_be_overridden(vit_folder):
    _, folder = vit_folder
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        folder, num_labels=2, backbone_overrides={"qkv_bias": False, "layer_norm_eps": 1e-5}
    )
    assert not any("q_proj.bias" in name for name in model.state_dict())
    assert model.config.backbone_config.layer_norm_eps == 1e-5


@pytest.mark.parametrize("saved", [torch.float16, torch.bfloat16])
def test_an_encoder_of_half_precision_gives_a_model_of_one_dtype(vit_folder, tmp_path, saved):
    vit, _ = vit_folder
    type(vit).from_pretrained(vit_folder[1], dtype=saved).save_pretrained(tmp_path / "half")
    start = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained
    pixel_values = torch.randn(1, 3, 32, 32)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        model = start(tmp_path / "half", num_labels=2, auxiliary_layer_index=-2, dtype=dtype)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {expected}
        assert model.dtype == expected
        with torch.no_grad():
            assert model(pixel_values).logits.isfinite().all()
        model.save_pretrained(tmp_path / "saved")
        loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "saved")
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {expected}
        # the dtype asked for when loading wins over those that the folder names
        loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "saved", dtype=torch.float32)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}


def test_starting_without_labels_or_with_unknown_fields_is_refused(vit_folder):
    _, folder = vit_folder
    start = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained
    with pytest.raises(ValueError, match="Got neither num_labels nor id2label"):
        start(folder)
    with pytest.raises(ValueError, match="SynerNetConfig has no field hihg_threshold"):
        start(folder, num_labels=2, hihg_threshold=0.8)
    with pytest.raises(ValueError, match=r"has no field qkv_bais: did you mean qkv_bias\?"):
        start(folder, num_labels=2, backbone_overrides={"qkv_bais": False})
    with pytest.raises(OSError):
        start(folder.parent / "nothing here", num_labels=2)
