"""Turns ViT or DeiT weights under timm's names into a folder that transformers reads.

    python scripts/convert_timm_vit_to_hf.py deit_small_patch16_224.pth weights/deit-small-patch16-224

The folder can be given to `SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained` or to `--backbone` of
`synernet train`.
"""

import argparse
import math
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, run_command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="safetensors file, or torch file of plain tensors")
    parser.add_argument("out", type=Path, help="new folder for the model")
    parser.add_argument("--num_heads", type=int, help="attention heads (default: width / 64)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import torch
from safetensors.torch import load_file
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)


# timm's name, as a pattern over the whole key → the name in transformers' ViTModel and DeiTModel.
ENCODER_NAMES = {
    r"cls_token": "embeddings.cls_token",
    r"dist_token": "embeddings.distillation_token",
    r"pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(weight|bias)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(weight|bias)": r"layers.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)": r"layers.\1.attention.qkv.\2",
    r"blocks\.(\d+)\.attn\.proj\.(weight|bias)": r"layers.\1.attention.o_proj.\2",
    r"blocks\.(\d+)\.norm2\.(weight|bias)": r"layers.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.mlp\.(fc1|fc2)\.(weight|bias)": r"layers.\1.mlp.\2.\3",
    r"norm\.(weight|bias)": r"layernorm.\1",
}
HEAD_NAMES = {
    "vit": {r"head\.(weight|bias)": r"classifier.\1"},
    "deit": {
        r"head\.(weight|bias)": r"cls_classifier.\1",
        r"head_dist\.(weight|bias)": r"distillation_classifier.\1",
    },
}
# timm's standard widths all have heads of 64 channels
HEAD_SIZE = 64
MAX_NAMED = 5


def read_state_dict(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    Reads a safetensors or torch file, running no code from it.

    Args:
        path (`Path`): The file. A torch file may wrap its tensors in a dictionary under `model` or `state_dict`.

    Returns:
        `tuple[dict[str, torch.Tensor], list[str]]`: Tensors by name, a leading `module.` of all names taken off; and
        the names of the wrapper's other entries.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file cannot be read without running code from it, or does not hold named tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint file {path}.")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make its reader fail in any way
        raise ValueError(
            f"{path} is refused: it is damaged or holds more than plain tensors, and loading such a file could run "
            "code; save only its state dict with torch.save and convert that."
        ) from error
    others = []
    for wrapper in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            others = sorted(str(name) for name in content if name != wrapper)
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds {type(content).__name__} instead of tensors by name; give a state dict.")
    wrong = [str(name) for name, value in content.items() if not (isinstance(name, str) and torch.is_tensor(value))]
    if wrong:
        raise ValueError(f"{path} holds entries that are no named tensors ({some(wrong)}); give a state dict.")
    if all(name.startswith("module.") for name in content):
        content = {name.removeprefix("module."): value for name, value in content.items()}
    return dict(content), others


def some(names: list[str]) -> str:
    """The first few of `names` and the number of the others, for a message."""
    rest = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def rename(names: Mapping[str, str], key: str) -> str | None:
    """The new name of `key` by a table of whole-key patterns, `None` where the table does not know it."""
    for pattern, replacement in names.items():
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(replacement)
    return None


def split_qkv(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """timm keeps query, key and value in one tensor, in this order along dimension 0; others stay as they are."""
    if ".qkv." not in name:
        return {name: value}
    parts = zip("qkv", value.chunk(3), strict=True)
    return {name.replace(".qkv.", f".{letter}_proj."): part.contiguous() for letter, part in parts}


def encoder_fields(state_dict: Mapping[str, torch.Tensor], num_heads: int | None = None) -> dict[str, int | bool]:
    """
    Reads the config fields of a timm ViT off the shapes of its tensors.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors under timm's names.
        num_heads (`int`, *optional*, defaults to width / 64): Attention heads, which no shape tells.

    Returns:
        `dict[str, int | bool]`: Fields of `ViTConfig`.

    Raises:
        ValueError: A tensor that tells a size is missing, patches or the position grid are not square, or the number
            of heads does not fit.
    """
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")
    missing = [name for name in needed if name not in state_dict]
    if missing:
        raise ValueError(f"The checkpoint is no ViT under timm's names: it has no {some(missing)}.")
    width, _, patch_height, patch_width = state_dict["patch_embed.proj.weight"].shape
    num_prefix_tokens = 2 if "dist_token" in state_dict else 1
    num_patches = state_dict["pos_embed"].shape[1] - num_prefix_tokens
    side = math.isqrt(max(num_patches, 0))
    if patch_height != patch_width or side < 1 or side * side != num_patches:
        raise ValueError(
            f"Patches and the position grid must be square, got {patch_height}×{patch_width} pixels and "
            f"{num_patches} positions."
        )
    num_heads = max(width // HEAD_SIZE, 1) if num_heads is None else num_heads
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"Width {width} cannot be split into {num_heads} heads; pass --num_heads.")
    return {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")),
        "num_attention_heads": num_heads,
        "intermediate_size": state_dict["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": side * patch_height,
        "patch_size": patch_height,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
    }


def fill(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> None:
    """
    Puts float32 `weights` into a model, every one and nothing else.

    Raises:
        ValueError: Names or shapes are not exactly the model's.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in expected if name not in weights]
    unknown = [name for name in weights if name not in expected]
    wrong = [name for name in expected if name in weights and tuple(weights[name].shape) != expected[name]]
    if missing:
        raise ValueError(f"The checkpoint lacks the weights of {some(missing)}.")
    if unknown:
        raise ValueError(f"The checkpoint has weights without a place: {some(unknown)}.")
    if wrong:
        shapes = [f"{name} {tuple(weights[name].shape)} instead of {expected[name]}" for name in wrong]
        raise ValueError(f"Shapes in the checkpoint do not fit together: {some(shapes)}.")
    model.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)


def unequal(model: PreTrainedModel, weights: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of `weights` that a model does not hold bit by bit (as float32)."""
    held = model.state_dict()
    return [name for name, value in weights.items() if name not in held or not torch.equal(held[name], value.float())]


def save_checked(model: PreTrainedModel, weights: Mapping[str, torch.Tensor], out: Path, *companions) -> None:
    """
    Saves a model and its companions (a processor), loads the model again, compares every weight, and only then lets
    the folder appear.

    Raises:
        FileExistsError: `out` is a file, or a folder that is not empty.
        ValueError: A weight is not the same after loading.
    """
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "model"
        for item in (model, *companions):
            item.save_pretrained(folder)
        changed = unequal(type(model).from_pretrained(folder), weights)
        if changed:
            raise ValueError(f"After saving and loading, {some(changed)} differ; nothing was written.")
        if out.exists():
            out.rmdir()
        folder.rename(out)


def check_free(out: Path) -> None:
    """Raises `FileExistsError` where `out` holds anything already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; give a new folder.")


def convert(state_dict: Mapping[str, torch.Tensor], num_heads: int | None = None):
    """
    Builds the transformers model of a timm ViT or DeiT.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Tensors under timm's names.
        num_heads (`int`, *optional*, defaults to width / 64): Attention heads.

    Returns:
        `tuple[PreTrainedModel, dict[str, torch.Tensor], list[str]]`: The model (with its classifier where the
        checkpoint has one, DeiT where it has a distillation token), the weights by their new names, and the names
        that were dropped: a `pre_logits` layer, and the classifier behind it.

    Raises:
        ValueError: A key is not known or missing, or shapes do not fit together.
    """
    kind = "deit" if "dist_token" in state_dict else "vit"
    dropped = []
    if any(name.startswith("pre_logits.") for name in state_dict):
        dropped = sorted(name for name in state_dict if name.startswith(("pre_logits.", "head.")))
    kept = {name: value for name, value in state_dict.items() if name not in dropped}
    fields = encoder_fields(kept, num_heads) | {"layer_norm_eps": 1e-6}
    with_head = any(name.startswith("head.") for name in kept)
    prefix = f"{kind}." if with_head else ""
    weights, unknown = {}, []
    for key, value in kept.items():
        encoder_name = rename(ENCODER_NAMES, key)
        head_name = rename(HEAD_NAMES[kind], key) if with_head else None
        if encoder_name is not None:
            weights |= split_qkv(prefix + encoder_name, value)
        elif head_name is not None:
            weights[head_name] = value
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f"The checkpoint has keys that a plain ViT or DeiT does not have: {some(unknown)}.")
    if with_head:
        fields["num_labels"] = kept["head.weight"].shape[0]
    config = (DeiTConfig if kind == "deit" else ViTConfig)(**fields)
    with torch.device("meta"):
        if with_head:
            model = (DeiTForImageClassificationWithTeacher if kind == "deit" else ViTForImageClassification)(config)
        else:
            model = (DeiTModel if kind == "deit" else ViTModel)(config, add_pooling_layer=False)
    fill(model, weights)
    return model, weights, dropped


def convert_file(args: argparse.Namespace) -> None:
    """Reads, converts, writes, and prints what was dropped."""
    check_free(args.out)
    state_dict, others = read_state_dict(args.checkpoint)
    model, weights, dropped = convert(state_dict, args.num_heads)
    save_checked(model, weights, args.out)
    for name in dropped:
        print(f"dropped  {name}: a head that transformers' {type(model).__name__} does not have")
    if others:
        print(f"left out beside the weights: {', '.join(others)}")
    print(f"{len(state_dict) - len(dropped)} tensors became {len(weights)}, all equal after loading {args.out} again")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(convert_file, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
