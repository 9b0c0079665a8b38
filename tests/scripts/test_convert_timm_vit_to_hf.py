"""timm's ViT and DeiT weights: the same outputs as timm's arithmetic, written out here, and clear refusals."""

import pytest
import torch
from safetensors.torch import save_file
from testing_utils import load_script
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification

from synernet_hf import SynerNetForWeaklySupervisedSegmentation


WIDTH, LAYERS, HEADS, PATCH = 24, 2, 3, 4
converter = load_script("convert_timm_vit_to_hf")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def timm_weights(distilled=False, head=True, qkv_bias=True):
    """Random weights under timm's names, for 16-pixel images."""
    prefix_tokens = 2 if distilled else 1
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, 16 + prefix_tokens, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,),
        "norm.bias": (WIDTH,),
    }
    linears = {
        "attn.qkv": (3 * WIDTH, WIDTH),
        "attn.proj": (WIDTH, WIDTH),
        "mlp.fc1": (40, WIDTH),
        "mlp.fc2": (WIDTH, 40),
    }
    for index in range(LAYERS):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{norm}.{kind}": (WIDTH,) for kind in ("weight", "bias")}
        for name, shape in linears.items():
            shapes |= {f"blocks.{index}.{name}.weight": shape, f"blocks.{index}.{name}.bias": shape[:1]}
    heads = ["head", "head_dist"] if distilled else ["head"]
    for name in heads if head else []:
        shapes |= {f"{name}.weight": (5, WIDTH), f"{name}.bias": (5,)}
    if distilled:
        shapes["dist_token"] = (1, 1, WIDTH)
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items() if qkv_bias or "qkv.bias" not in name}


def timm_forward(weights, pixel_values):
    """The final states of timm's ViT, one operation after another."""
    patches = F.conv2d(
        pixel_values, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=PATCH
    )
    prefix = [weights[name] for name in ("cls_token", "dist_token") if name in weights]
    tokens = torch.cat([*prefix, patches.flatten(2).transpose(1, 2)], dim=1) + weights["pos_embed"]

    def linear(values, name):
        return F.linear(values, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(values, name):
        return F.layer_norm(values, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)

    for index in range(LAYERS):
        block = f"blocks.{index}"
        qkv = linear(norm(tokens, f"{block}.norm1"), f"{block}.attn.qkv")
        query, key, value = qkv.reshape(1, -1, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attention = (query @ key.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5).softmax(dim=-1)
        tokens = tokens + linear((attention @ value).transpose(1, 2).flatten(2), f"{block}.attn.proj")
        tokens = tokens + linear(
            F.gelu(linear(norm(tokens, f"{block}.norm2"), f"{block}.mlp.fc1")), f"{block}.mlp.fc2"
        )
    return norm(tokens, "norm")


def run(tmp_path, content, name="weights.pth", arguments=("--num_heads", str(HEADS))):
    source, out = tmp_path / name, tmp_path / "converted"
    save_file(content, source) if name.endswith("safetensors") else torch.save(content, source)
    return converter.main([str(source), str(out), *arguments]), out


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("distilled", [True, False])
def test_the_converted_encoder_computes_what_timm_does(tmp_path, capsys, distilled, head, qkv_bias):
    weights = timm_weights(distilled, head, qkv_bias)
    code, out = run(tmp_path, weights)
    assert code == 0
    assert f"{len(weights)} tensors became" in capsys.readouterr().out
    encoder = AutoModel.from_pretrained(out, add_pooling_layer=False).eval()
    assert encoder.config.model_type == ("deit" if distilled else "vit")
    pixel_values = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        states = encoder(pixel_values).last_hidden_state
        torch.testing.assert_close(states, timm_forward(weights, pixel_values), atol=1e-5, rtol=1e-5)
        if head:
            classifier = AutoModelForImageClassification.from_pretrained(out).eval()
            heads = ["head", "head_dist"] if distilled else ["head"]
            logits = [
                F.linear(states[:, index], weights[f"{name}.weight"], weights[f"{name}.bias"])
                for index, name in enumerate(heads)
            ]
            expected = torch.stack(logits).mean(dim=0)
            torch.testing.assert_close(classifier(pixel_values).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_synernet_starts_from_the_folder(tmp_path):
    weights = timm_weights()
    _, out = run(tmp_path, weights, "weights.safetensors")
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        out, num_labels=3, auxiliary_layer_index=-2, with_projection_head=False
    ).eval()
    pixel_values = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        token = model.synernet(pixel_values).precise.class_token
    torch.testing.assert_close(token, timm_forward(weights, pixel_values)[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"model": weights},
        lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    ],
)
def test_wrapped_weights(tmp_path, wrap):
    assert run(tmp_path, wrap(timm_weights()))[0] == 0


def test_what_is_left_out_is_said(tmp_path, capsys):
    weights = timm_weights() | {
        "pre_logits.fc.weight": torch.randn(WIDTH, WIDTH),
        "pre_logits.fc.bias": torch.randn(WIDTH),
    }
    code, out = run(tmp_path, {"model": weights, "optimizer": {"lr": 0.1}, "epoch": 3})
    assert code == 0
    printed = capsys.readouterr().out
    for name in ("pre_logits.fc.weight", "pre_logits.fc.bias", "head.weight", "head.bias"):
        assert f"dropped  {name}" in printed
    assert "left out beside the weights: epoch, optimizer" in printed
    assert AutoModel.from_pretrained(out).config.architectures == ["ViTModel"]


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without("blocks.1.mlp.fc2.bias"), "The checkpoint lacks the weights of vit.layers.1.mlp.fc2.bias."),
        (without("blocks.1.attn.qkv.bias"), "lacks the weights of vit.layers.1.attention.q_proj.bias"),
        (without("cls_token"), "The checkpoint is no ViT under timm's names: it has no cls_token."),
        (lambda weights: weights | {"blocks.0.ls1.gamma": torch.ones(WIDTH)}, "does not have: blocks.0.ls1.gamma."),
        (
            lambda weights: weights | {"norm.weight": torch.ones(3)},
            "do not fit together: vit.layernorm.weight (3,) instead",
        ),
        (lambda weights: weights | {"pos_embed": torch.ones(1, 16, WIDTH)}, "position grid must be square"),
        (lambda weights: list(weights.values()), "holds list instead of tensors by name; give a state dict."),
        (lambda weights: {"names": ["a"]}, "holds entries that are no named tensors (names); give a state dict."),
        (lambda weights: {}, "holds dict instead of tensors by name"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, capsys, change, sentence):
    code, out = run(tmp_path, change(timm_weights()))
    assert code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and sentence in message and message.count("\n") == 1
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, capsys):
    code, out = run(tmp_path, timm_weights(), arguments=("--num_heads", "5"))
    assert code == 2 and not out.exists()
    assert "Width 24 cannot be split into 5 heads; pass --num_heads." in capsys.readouterr().err


class Surprise:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the file was run')",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [{"model": Surprise()}, "text", b"\x80\x04N."])
def test_files_that_could_run_code_or_are_damaged_are_refused(tmp_path, capsys, content):
    source = tmp_path / "weights.pth"
    if isinstance(content, dict):
        torch.save(content, source)
    else:
        source.write_bytes(content.encode() if isinstance(content, str) else content)
    assert converter.main([str(source), str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert "is refused: it is damaged or holds more than plain tensors" in message or "instead of tensors" in message
    assert not (tmp_path / "out").exists()


def test_paths_that_cannot_be_used_are_refused(tmp_path, capsys):
    assert converter.main([str(tmp_path / "none.pth"), str(tmp_path / "out")]) == 2
    assert "There is no checkpoint file" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("kept")
    torch.save(timm_weights(), tmp_path / "weights.pth")
    assert converter.main([str(tmp_path / "weights.pth"), str(tmp_path / "full"), "--num_heads", "3"]) == 2
    assert "exists and is not empty; give a new folder." in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious"]
