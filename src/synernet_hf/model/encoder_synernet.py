"""Encoders of the ViT families of transformers, and what differs between them."""

import copy
import difflib
import inspect
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .configuration_synernet import encoder_family


def closest_name(name: str, known: Sequence[str]) -> str | None:
    """The question whether one of the `known` names was meant by an unknown one; `None` where none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else None


def check_keywords(given: dict, function: Callable) -> None:
    """Refuses keyword arguments that `function` does not name."""
    known = [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]
    for name in given:
        hint = closest_name(name, known) or f"it takes {', '.join(known)}."
        raise TypeError(f"forward does not know {name}: {hint}")


def pretrained_backbone_config(name_or_path: str, overrides: dict | None = None) -> PreTrainedConfig:
    """
    Configuration of the pretrained encoder `name_or_path`, Hub id or folder of a ViT-family model, with the fields
    `overrides` changed.

    Raises:
        OSError: if the encoder cannot be found.
        ValueError: if an override is not a field of the configuration, or for what [`encoder_family`] refuses.
    """
    overrides = overrides or {}
    config = AutoConfig.from_pretrained(name_or_path)
    # CLIP and SigLIP are mostly saved with their text encoder
    config = getattr(config, "vision_config", config)
    known = [name for name in config.to_dict() if not name.startswith("_")]
    for name, value in overrides.items():
        if name not in known:
            hint = closest_name(name, known) or f"it has {', '.join(sorted(known))}."
            raise ValueError(f"The configuration of the encoder {name_or_path} has no field {name}: {hint}")
        # not built anew: some families save the names of their last layers, which fewer layers would refuse
        setattr(config, name, value)
    encoder_family(config)
    return config


def pretrained_encoder(name_or_path: str, overrides: dict | None = None) -> nn.Module:
    """
    A pretrained encoder in float32, with the arguments and errors of [`pretrained_backbone_config`]; its configuration
    keeps no labels, which are of another task, and no dtype, which is that of a file.
    """
    config = pretrained_backbone_config(name_or_path, overrides)
    backbone = AutoModel.from_pretrained(name_or_path, config=config, dtype=torch.float32, **pooling_arguments(config))
    other = ("id2label", "label2id", "dtype")
    backbone.config = type(config)(**{k: v for k, v in backbone.config.to_dict().items() if k not in other})
    return backbone


def pooling_arguments(backbone_config: PreTrainedConfig) -> dict[str, bool]:
    """Leaves out a pooling layer that nothing here uses, and keeps one that holds the final normalisation."""
    if backbone_config.model_type in ("beit", "data2vec-vision"):
        return {"add_pooling_layer": backbone_config.use_mean_pooling}
    # other families know no such argument, or add none by themselves
    return {"add_pooling_layer": False} if backbone_config.model_type in ("vit", "deit") else {}


def part_of_encoder(config: PreTrainedConfig, first: int, last: int) -> nn.Module:
    """
    The blocks from `first` to before `last` of an encoder of `config.backbone_config`, with its embeddings if they are
    the first, with its final normalisation and pooling head if they are the last.
    """
    backbone_config, depth = config.backbone_config, config.backbone_config.num_hidden_layers
    if last - first != depth:
        backbone_config = copy.deepcopy(backbone_config)
        backbone_config.num_hidden_layers = last - first
    # one dtype for encoder and heads, whatever the encoder was saved in
    backbone = AutoModel.from_config(
        backbone_config, dtype=torch.get_default_dtype(), **pooling_arguments(backbone_config)
    )
    # SigLIP would run its pooling head, which `SynerNetBranch.class_token` runs
    backbone.use_head = False
    elsewhere = ["embeddings", "pre_layrnorm"] if first else []
    elsewhere += ["layernorm", "norm", "post_layernorm", "head", "pooler"] if last < depth else []
    for name in elsewhere:
        if getattr(backbone, name, None) is not None:
            setattr(backbone, name, nn.Identity())
    if not first:
        # otherwise installed during the first forward, which `torch.compile(fullgraph=True)` cannot trace
        maybe_install_capturing_hooks(backbone)
    return backbone


def encoder_blocks(backbone: nn.Module) -> nn.ModuleList:
    """The blocks of an encoder, which each family keeps under another name."""
    for owner in (backbone, getattr(backbone, "encoder", None), getattr(backbone, "model", None)):
        for name in ("layers", "layer"):
            if isinstance(getattr(owner, name, None), nn.ModuleList):
                return getattr(owner, name)
    raise ValueError(f"{type(backbone).__name__} keeps its blocks where no family of encoders does.")


def copy_encoder(source: nn.Module, target: nn.Module, first_block: int = 0):
    """Gives `target`, all or a run of the blocks of the encoder `source` from `first_block` on, its weights."""
    saved, blocks = source.state_dict(), encoder_blocks(target)
    [prefix] = [f"{name}." for name, module in target.named_modules() if module is blocks]

    def name_in_source(name: str) -> str:
        if not name.startswith(prefix):
            return name
        block, rest = name.removeprefix(prefix).split(".", 1)
        return f"{prefix}{int(block) + first_block}.{rest}"

    target.load_state_dict({name: saved[name_in_source(name)] for name in target.state_dict()})


def block_arguments(backbone: nn.Module, tokens: torch.Tensor, pixel_values: torch.Tensor) -> dict:
    """What an encoder hands to each of its blocks beside the `tokens` of `pixel_values` `(B, 3, H, W)`."""
    size, config = tuple(pixel_values.shape[-2:]), backbone.config
    grid = token_grid(pixel_values, config.patch_size)
    if config.model_type == "data2vec-vision":
        bias = backbone.encoder.relative_position_bias(grid) if config.use_shared_relative_position_bias else None
        return {"relative_position_bias": bias, "resolution": size}
    if config.model_type == "beit":
        bias = backbone.shared_position_bias(grid) if config.use_shared_relative_position_bias else None
        return {"attention_mask": bias, "resolution": size}
    if config.model_type == "dinov3_vit":
        return {"position_embeddings": backbone.rope_embeddings(pixel_values.to(tokens.dtype))}
    return {"attention_mask": None}


def run_blocks(backbone: nn.Module, tokens: torch.Tensor, pixel_values: torch.Tensor) -> list[torch.Tensor]:
    """The output `(B, N, D)` of each block of a part of an encoder without embeddings, in order."""
    arguments, states = block_arguments(backbone, tokens, pixel_values), [tokens]
    for block in encoder_blocks(backbone):
        output = block(states[-1], **arguments)
        states.append(output[0] if isinstance(output, tuple) else output)
    return states[1:]


def token_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """Rows and columns of tokens of padded images `(B, 3, h·p, w·p)`."""
    return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size


def select_states(
    states: tuple[torch.Tensor, ...], wanted: bool | int | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """What `output_hidden_states` asks for: all states, none, or those at some indices with `None` for the others."""
    if wanted is None or isinstance(wanted, bool):
        return states if wanted else None
    indices = {range(len(states))[index] for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(state if index in indices else None for index, state in enumerate(states))


def with_current_names(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict with the names of saved files, where encoders keep older ones, under the names of the `model`."""
    own = model.state_dict()
    if state_dict.keys() <= own.keys():
        return state_dict
    names = {id(tensor): name for name, tensor in own.items()}
    # what saving renames; what it computes anew is not known here, and stays as it is
    current = {name: names.get(id(tensor), name) for name, tensor in revert_weight_conversion(model, own).items()}
    return {current.get(name, name): tensor for name, tensor in state_dict.items()}


def forward_arguments(backbone: nn.Module) -> dict[str, bool]:
    """Arguments with which an encoder takes images of any size."""
    accepted = inspect.signature(type(backbone).forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}


__all__ = ["pretrained_backbone_config", "pretrained_encoder"]
