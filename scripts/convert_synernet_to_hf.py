"""Turns a checkpoint of the authors' SynerNet code into a model folder of this package.

    python scripts/convert_synernet_to_hf.py checkpoint.pth converted/synernet-vit-base-voc12

The folder holds the model, its config with the authors' settings, and the image processor. Every tensor of the
checkpoint is mapped, or dropped under a name that the script prints; it is read without running code from it.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, needs_extra, run_command


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="torch file of plain tensors, as the authors' code saves it")
    parser.add_argument("out", type=Path, help="new folder for the model")
    parser.add_argument("--num_heads", type=int, help="attention heads (default: width / 64)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="class names, the background left out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import torch
from convert_timm_vit_to_hf import (
    ENCODER_NAMES,
    check_free,
    encoder_fields,
    fill,
    read_state_dict,
    rename,
    save_checked,
    some,
    split_qkv,
)
from transformers import ViTConfig

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor


with needs_extra("train"):
    from synernet_hf.data import COCO_CLASSES, VOC_CLASSES, id2label_from


# The branch with the area-expanding loss is the broad one.
BRANCHES = {"branch1": "precise_branch", "branch2": "broad_branch"}

# The authors' name within a branch, as a pattern over the whole key → ours. `None`: dropped, with its reason below.
NAMES = {
    **{pattern: f"backbone.{name}" for pattern, name in ENCODER_NAMES.items()},
    r"patch_proj\.mlp\.(\d)\.(weight|bias)": r"projection_head.layers.\1.\2",
    r"patch_proj\.last_layer\.weight_v": "projection_head.directions.weight",
    r"decoder\.conv6\.weight": "decode_head.conv_in.weight",
    r"decoder\.conv7\.weight": "decode_head.conv_mid.weight",
    r"decoder\.conv8\.weight": "decode_head.classifier.weight",
    r"classifier\.weight": "cam_head.classifier.weight",
    r"aux_classifier\.weight": "auxiliary_cam_head.classifier.weight",
}
DROPPED = {
    "head.weight": "the ImageNet classifier, which nothing uses",
    "head.bias": "the ImageNet classifier, which nothing uses",
    "pos_embed_pat": "position embeddings without the class token, which nothing uses",
    "patch_proj.last_layer.weight_g": "the gain of the projection, fixed at 1 as ours",
}
# What the authors' code does in ways our defaults do not, by number of foreground classes.
AUTHORS_FIELDS = {
    "fusion": "fixed",
    "floor_scaled_views": True,
    "spatial_bce_branches": ("broad",),
    "spatial_bce_share": 0.4,
    "coverage_switch": 0.5,
    "prototype_contrast_weight": 0.05,
    "prototype_branches": ("broad", "precise"),
    "broad_pooling_top_k": None,
    "broad_propagation_temperature": None,
    "precise_propagation_temperature": None,
    "precise_consensus": False,
    "with_class_token_head": False,
    "broad_share_in_logits": 0.7,
}
DATASETS = {
    20: (VOC_CLASSES, {}),
    80: (
        COCO_CLASSES,
        {
            "background_threshold": 0.45,
            "high_threshold": 0.65,
            "cam_scales": (1.0, 0.5, 0.75, 1.25, 1.5),
            "broad_share_in_broad_label": 0.5,
            "coverage_switch": 0.0,
            "spatial_bce_share": 0.3,
            "segmentation_weight": 0.15,
            "segmentation_start": 0.15,
            "spatial_bce_start": 0.2,
            "prototype_contrast_start": 0.2,
        },
    ),
}


@dataclass
class Conversion:
    """
    Attributes:
        weights (`dict[str, torch.Tensor]`): Tensors under our names.
        mapped (`dict[str, list[str]]`): The authors' key → our names (three for query, key and value).
        dropped (`dict[str, str]`): The authors' key → why it is left out.
        with_projection_head (`bool`): Whether the checkpoint has the projection heads.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    mapped: dict[str, list[str]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    with_projection_head: bool = False


def convert_state_dict(state_dict: Mapping[str, torch.Tensor]) -> Conversion:
    """
    Renames the tensors of the authors' network to those of `SynerNetForWeaklySupervisedSegmentation`.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Keys `branch1.…` and `branch2.…`.

    Returns:
        [`Conversion`]: The prototypes, which the authors do not save, are zeros in it: "not seen yet".

    Raises:
        ValueError: A key is not known, or the gain of a projection is not 1.
    """
    result = Conversion()
    unknown = []
    for key, value in state_dict.items():
        branch, _, name = key.partition(".")
        new_name = rename(NAMES, name) if branch in BRANCHES else None
        if branch in BRANCHES and name in DROPPED:
            if name.endswith("weight_g") and not torch.equal(value.float(), torch.ones_like(value.float())):
                raise ValueError(
                    f"{key} must be 1 everywhere, as the authors fix it, but lies in [{value.min():.4g}, "
                    f"{value.max():.4g}]; this model has no gain to put it in."
                )
            result.dropped[key] = DROPPED[name]
        elif new_name is None:
            unknown.append(key)
        else:
            if name.endswith("classifier.weight"):
                value = value.flatten(1)
            named = split_qkv(f"synernet.{BRANCHES[branch]}.{new_name}", value)
            result.weights |= named
            result.mapped[key] = list(named)
    if unknown:
        raise ValueError(f"The checkpoint has keys that the authors' network does not have: {some(unknown)}.")
    for name in [name for name in result.weights if name.endswith("projection_head.directions.weight")]:
        scores = result.weights[name.replace("projection_head.directions", "cam_head.classifier")]
        prototypes = torch.zeros(scores.shape[0], result.weights[name].shape[0])
        result.weights[name.replace("directions.weight", "prototypes")] = prototypes
    result.with_projection_head = any(".projection_head." in name for name in result.weights)
    return result


def authors_config(
    state_dict: Mapping[str, torch.Tensor], num_heads: int | None = None, classes: list[str] | None = None
) -> SynerNetConfig:
    """
    The config of a checkpoint: sizes from its shapes, settings from the authors' code.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`): Keys `branch1.…` and `branch2.…`.
        num_heads (`int`, *optional*, defaults to width / 64): Attention heads.
        classes (`list[str]`, *optional*): Names of the classes without the background. By default those of PASCAL VOC
            for 20 classes, those of COCO for 80, and `class_1`, `class_2`, … for any other number. The settings are
            the authors' for COCO with 80 classes, and theirs for PASCAL VOC otherwise.

    Returns:
        [`SynerNetConfig`]

    Raises:
        ValueError: A branch or a tensor that tells a size is missing, or the number of `classes` is another than the
            checkpoint's.
    """
    branch = {key.partition(".")[2]: value for key, value in state_dict.items() if key.startswith("branch1.")}
    if not branch or not any(key.startswith("branch2.") for key in state_dict):
        raise ValueError("The checkpoint is not the authors' network: it needs keys branch1.… and branch2.…")
    missing = [name for name in ("classifier.weight", "decoder.conv6.weight") if name not in branch]
    if missing:
        raise ValueError(f"The checkpoint is not the authors' network: branch1 has no {some(missing)}.")
    num_classes = branch["classifier.weight"].shape[0]
    default_names = ["background", *(f"class_{index}" for index in range(1, num_classes + 1))]
    names, dataset_fields = DATASETS.get(num_classes, (default_names, {}))
    if classes is not None:
        if len(classes) != num_classes:
            raise ValueError(f"The checkpoint has {num_classes} classes, got {len(classes)} names; give one for each.")
        if len(set(classes)) < len(classes):
            raise ValueError(f"Class names must differ, got {', '.join(classes)}.")
        names = ["background", *classes]
    fields = AUTHORS_FIELDS | dataset_fields | {"id2label": id2label_from(names)}
    fields["decoder_hidden_size"] = branch["decoder.conv6.weight"].shape[0]
    fields["with_projection_head"] = any(".patch_proj." in key for key in state_dict)
    if "patch_proj.mlp.4.weight" in branch and "patch_proj.last_layer.weight_v" in branch:
        bottleneck, hidden = branch["patch_proj.mlp.4.weight"].shape
        fields["projection_hidden_size"], fields["projection_bottleneck_size"] = hidden, bottleneck
        fields["prototype_size"] = branch["patch_proj.last_layer.weight_v"].shape[0]
    backbone = ViTConfig(**encoder_fields(branch, num_heads), layer_norm_eps=1e-5)
    return SynerNetConfig(backbone_config=backbone, **fields)


def build_model(
    state_dict: Mapping[str, torch.Tensor], num_heads: int | None = None, classes: list[str] | None = None
) -> tuple[SynerNetForWeaklySupervisedSegmentation, Conversion]:
    """
    The model of an authors' state dict, and the account of where each tensor went.

    Raises:
        ValueError: Keys are unknown or missing, shapes do not fit together, or a projection has a gain.
    """
    config = authors_config(state_dict, num_heads, classes)
    conversion = convert_state_dict(state_dict)
    with torch.device("meta"):
        model = SynerNetForWeaklySupervisedSegmentation(config)
    fill(model, conversion.weights)
    return model.eval(), conversion


def report(conversion: Conversion, others: list[str]) -> None:
    """Prints where each tensor went."""
    for key, names in conversion.mapped.items():
        print(f"mapped   {key} -> {', '.join(names)}")
    for key, reason in conversion.dropped.items():
        print(f"dropped  {key}: {reason}")
    for name in others:
        print(f"dropped  {name}: not a weight of the network")
    if conversion.with_projection_head:
        print("started  prototypes: zeros, the authors' code does not save them")
    else:
        print("without  projection heads: the checkpoint has none")


def convert(args: argparse.Namespace) -> None:
    """Reads, converts, writes, and prints what became of each tensor."""
    check_free(args.out)
    state_dict, others = read_state_dict(args.checkpoint)
    model, conversion = build_model(state_dict, args.num_heads, args.classes)
    processor = SynerNetImageProcessor(size_divisor=model.config.patch_size)
    save_checked(model, conversion.weights, args.out, processor)
    report(conversion, others)
    print(
        f"{len(conversion.mapped)} tensors became {sum(map(len, conversion.mapped.values()))}, "
        f"{len(conversion.dropped)} were dropped; all weights equal after loading {args.out} again"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    return run_command(convert, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
