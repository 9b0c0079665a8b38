"""Checkpoints under the authors' names: every tensor accounted for, nothing dropped without a word."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from testing_utils import load_script
from torch.nn import functional as F

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.data import COCO_CLASSES, VOC_CLASSES
from synernet_hf.training import read_recipe


converter = load_script("convert_synernet_to_hf")
# sizes of the authors' ViT-B → sizes of the checkpoints here
TINY = {768: 16, 2304: 48, 3072: 32, 2048: 20, 512: 8, 1024: 12, 1000: 7, 197: 17, 196: 16}
LAYERS = 3


@pytest.fixture(scope="module")
def authors_shapes(root):
    return json.loads((root / "tests/fixtures/golden/authors_state_dict_shapes.json").read_text())


@pytest.fixture
def weights(authors_shapes):
    """A checkpoint with the authors' names and three narrow blocks."""
    torch.manual_seed(0)
    tensors = {}
    for name, shape in authors_shapes.items():
        block = re.search(r"blocks\.(\d+)", name)
        if block and int(block.group(1)) >= LAYERS:
            continue
        sizes = [TINY.get(size, size) for size in shape]
        if name.endswith("patch_embed.proj.weight"):
            sizes[2:] = [8, 8]
        tensors[name] = torch.ones(sizes) if name.endswith("weight_g") else torch.randn(sizes) * 0.2
    return tensors


def run(tmp_path, content, name="checkpoint.pth"):
    source, out = tmp_path / name, tmp_path / "converted"
    torch.save(content, source)
    return converter.main([str(source), str(out), "--num_heads", "2"]), out


def wrapped(weights):
    return {"model": {f"module.{name}": value for name, value in weights.items()}}


def test_every_tensor_arrives_or_is_named(tmp_path, capsys, weights):
    code, out = run(tmp_path, wrapped(weights))
    printed = capsys.readouterr().out
    assert code == 0
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out)
    held = model.state_dict()
    arrived = set()
    for name, value in weights.items():
        mapped = re.search(rf"^mapped +{re.escape(name)} -> (.+)$", printed, flags=re.MULTILINE)
        if mapped is None:
            assert re.search(rf"^dropped +{re.escape(name)}: .+$", printed, flags=re.MULTILINE), name
            assert name.split(".", 1)[1].startswith(("head.", "pos_embed_pat", "patch_proj.last_layer.weight_g"))
            continue
        targets = mapped.group(1).split(", ")
        together = torch.cat([held[target] for target in targets])
        assert torch.equal(together, value.reshape(together.shape)), name
        arrived |= set(targets)
    prototypes = {name for name in held if name.endswith("prototypes")}
    assert arrived | prototypes == set(held)
    assert not any(held[name].any() for name in prototypes)
    assert "started  prototypes: zeros" in printed
    dropped = sum(line.startswith("dropped") for line in printed.splitlines())
    assert dropped == 8
    assert f"{len(weights) - dropped} tensors became {len(held) - 2}, 8 were dropped; all weights equal" in printed


def test_the_authors_branches_change_places(tmp_path, weights):
    _, out = run(tmp_path, wrapped(weights))
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out)
    for branch, ours in (("branch1", model.synernet.precise_branch), ("branch2", model.synernet.broad_branch)):
        assert torch.equal(ours.cam_head.classifier.weight, weights[f"{branch}.classifier.weight"].flatten(1))
        assert torch.equal(
            ours.auxiliary_cam_head.classifier.weight, weights[f"{branch}.aux_classifier.weight"].flatten(1)
        )


def test_the_projection_computes_what_the_authors_does(tmp_path, weights):
    _, out = run(tmp_path, wrapped(weights))
    head = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out).synernet.broad_branch.projection_head
    token = torch.randn(2, 16)
    values = token
    for index in (0, 2, 4):
        prefix = f"branch2.patch_proj.mlp.{index}"
        values = F.linear(values, weights[f"{prefix}.weight"], weights[f"{prefix}.bias"])
        values = F.gelu(values) if index < 4 else F.normalize(values, dim=-1)
    last = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(8, 12, bias=False))
    with torch.no_grad():
        last.parametrizations.weight.original0.copy_(weights["branch2.patch_proj.last_layer.weight_g"])
        last.parametrizations.weight.original1.copy_(weights["branch2.patch_proj.last_layer.weight_v"])
        torch.testing.assert_close(head(token), last(values))


def test_settings_are_the_authors(tmp_path, weights):
    _, out = run(tmp_path, wrapped(weights))
    config = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out).config
    assert list(config.id2label.values()) == VOC_CLASSES
    backbone = config.backbone_config
    assert (backbone.qkv_bias, backbone.layer_norm_eps, backbone.num_hidden_layers) == (False, 1e-5, LAYERS)
    assert (backbone.patch_size, backbone.image_size, backbone.num_attention_heads) == (8, 32, 2)
    recipe = read_recipe(
        Path(__file__).resolve().parents[2] / "src" / "synernet_hf" / "recipes" / "voc12_authors.yaml"
    )["model_config"]
    assert recipe["fusion"] == "fixed" and recipe["spatial_bce_branches"] == ["broad"]
    for name, value in recipe.items():
        given = getattr(config, name)
        assert (list(given) if isinstance(given, tuple) else given) == value
    assert (config.projection_hidden_size, config.projection_bottleneck_size, config.prototype_size) == (20, 8, 12)
    assert SynerNetImageProcessor.from_pretrained(out).size_divisor == 8


def test_a_coco_checkpoint(tmp_path, weights):
    for branch in ("branch1", "branch2"):
        weights[f"{branch}.classifier.weight"] = torch.randn(80, 16, 1, 1)
        weights[f"{branch}.aux_classifier.weight"] = torch.randn(80, 16, 1, 1)
        weights[f"{branch}.decoder.conv8.weight"] = torch.randn(81, 8, 1, 1)
    code, out = run(tmp_path, wrapped(weights))
    assert code == 0
    config = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out).config
    assert list(config.id2label.values()) == COCO_CLASSES
    assert (config.low_threshold, config.background_threshold, config.high_threshold) == (0.25, 0.45, 0.65)
    assert list(config.cam_scales) == [1.0, 0.5, 0.75, 1.25, 1.5]


def test_a_checkpoint_of_another_number_of_classes(tmp_path, capsys, weights):
    for branch in ("branch1", "branch2"):
        weights[f"{branch}.classifier.weight"] = torch.randn(3, 16, 1, 1)
        weights[f"{branch}.aux_classifier.weight"] = torch.randn(3, 16, 1, 1)
        weights[f"{branch}.decoder.conv8.weight"] = torch.randn(4, 8, 1, 1)
    code, out = run(tmp_path, wrapped(weights))
    assert code == 0
    config = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out).config
    assert list(config.id2label.values()) == ["background", "class_1", "class_2", "class_3"]
    # settings are those for PASCAL VOC
    assert (config.background_threshold, config.high_threshold) == (0.5, 0.7)
    arguments = [str(tmp_path / "checkpoint.pth"), str(tmp_path / "named"), "--num_heads", "2", "--classes"]
    assert converter.main([*arguments, "cell", "nucleus", "debris"]) == 0
    config = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "named").config
    assert list(config.id2label.values()) == ["background", "cell", "nucleus", "debris"]
    arguments[1] = str(tmp_path / "refused")
    capsys.readouterr()
    assert converter.main([*arguments, "cell", "nucleus"]) == 2
    assert "has 3 classes, got 2 names; give one for each" in capsys.readouterr().err
    assert converter.main([*arguments, "cell", "cell", "debris"]) == 2
    assert "Class names must differ" in capsys.readouterr().err


@pytest.mark.parametrize("wrap", [lambda weights: weights, lambda weights: {"model": weights}, wrapped])
def test_with_or_without_wrapper_keys(tmp_path, weights, wrap):
    code, out = run(tmp_path, wrap(weights))
    assert code == 0
    held = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out).state_dict()
    assert torch.equal(held["synernet.precise_branch.backbone.embeddings.cls_token"], weights["branch1.cls_token"])


def test_what_stands_beside_the_weights_is_named(tmp_path, capsys, weights):
    assert run(tmp_path, wrapped(weights) | {"optimizer": {"step": 3}, "iteration": 8000})[0] == 0
    printed = capsys.readouterr().out
    assert "dropped  iteration: not a weight of the network" in printed
    assert "dropped  optimizer: not a weight of the network" in printed


def test_a_checkpoint_without_projection_heads(tmp_path, capsys, weights):
    weights = {name: value.half() for name, value in weights.items() if "patch_proj" not in name}
    code, out = run(tmp_path, weights)
    assert code == 0
    assert "without  projection heads: the checkpoint has none" in capsys.readouterr().out
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(out)
    assert not model.config.with_projection_head
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def removed(*names):
    return lambda weights: {key: value for key, value in weights.items() if key not in names}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            removed("branch2.blocks.1.attn.proj.bias"),
            "lacks the weights of synernet.broad_branch.backbone.layers.1.attention.o_proj.bias.",
        ),
        (removed("branch1.aux_classifier.weight"), "lacks the weights of synernet.precise_branch.auxiliary_cam_head"),
        (removed("branch1.classifier.weight"), "branch1 has no classifier.weight."),
        (removed("branch2.patch_proj.mlp.0.bias"), "lacks the weights of synernet.broad_branch.projection_head"),
        (
            lambda weights: {name: value for name, value in weights.items() if "branch2" not in name},
            "is not the authors' network: it needs keys branch1.… and branch2.…",
        ),
        (
            lambda weights: weights | {"branch1.blocks.0.gate": torch.ones(1)},
            "keys that the authors' network does not have: branch1.blocks.0.gate.",
        ),
        (
            lambda weights: weights | {"branch3.cls_token": torch.ones(1)},
            "keys that the authors' network does not have: branch3.cls_token.",
        ),
        (
            lambda weights: weights | {"branch1.head_extra.weight": torch.ones(1)},
            "keys that the authors' network does not have: branch1.head_extra.weight.",
        ),
        (
            lambda weights: weights | {"branch2.patch_proj.last_layer.weight_g": torch.full((12, 1), 0.5)},
            "branch2.patch_proj.last_layer.weight_g must be 1 everywhere, as the authors fix it, but lies in [0.5, 0.5]",
        ),
        (
            lambda weights: weights | {"branch1.classifier.weight": torch.ones(7, 16, 1, 1)},
            "do not fit together: synernet.",
        ),
        (
            lambda weights: weights | {"branch2.classifier.weight": torch.ones(80, 16, 1, 1)},
            "do not fit together: synernet.broad_branch",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, capsys, weights, change, sentence):
    code, out = run(tmp_path, change(weights))
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and sentence in message and message.count("\n") == 1
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["checkpoint.pth"]


class Surprise:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


def test_a_checkpoint_that_could_run_code_is_refused(tmp_path, capsys, weights):
    code, out = run(tmp_path, wrapped(weights) | {"args": Surprise()})
    assert code == 2 and not out.exists()
    message = capsys.readouterr().err
    assert "is refused: it is damaged or holds more than plain tensors" in message and message.count("\n") == 1


def test_the_authors_shapes_fit(authors_shapes):
    """ViT-B, every shape as the authors save it; one number stands for each tensor."""
    weights = {
        name: torch.tensor(float(name.endswith("weight_g"))).expand(shape) for name, shape in authors_shapes.items()
    }
    model, conversion = converter.build_model(weights)
    assert set(conversion.mapped) | set(conversion.dropped) == set(authors_shapes)
    config = model.config
    assert (config.backbone_config.num_attention_heads, config.backbone_config.image_size) == (12, 224)
    assert (config.prototype_size, config.projection_hidden_size, config.decoder_hidden_size) == (1024, 2048, 512)


@pytest.mark.slow
def test_a_full_size_checkpoint(tmp_path, capsys, authors_shapes):
    weights = {
        name: (torch.ones if name.endswith("weight_g") else torch.zeros)(shape)
        for name, shape in authors_shapes.items()
    }
    source, out = tmp_path / "checkpoint.pth", tmp_path / "converted"
    torch.save(wrapped(weights), source)
    assert converter.main([str(source), str(out)]) == 0
    assert "300 tensors became 348, 8 were dropped; all weights equal" in capsys.readouterr().out
    with safe_open(out / "model.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    prototypes = [shape for name, shape in shapes.items() if name.endswith("prototypes")]
    assert prototypes == [(20, 1024)] * 2
    assert len(shapes) == 350
