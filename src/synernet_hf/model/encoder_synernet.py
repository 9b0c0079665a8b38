"""Encoders of the ViT families of transformers, and what differs between them."""

import copy
import difflib
import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion


def closest_name(name: str, known: list[str]) -> str | None:
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
        ValueError: if an override is not a field of the configuration.
    """
    overrides = overrides or {}
    config = AutoConfig.from_pretrained(name_or_path)
    known = [name for name in config.to_dict() if not name.startswith("_")]
    for name, value in overrides.items():
        if name not in known:
            hint = closest_name(name, known) or f"it has {', '.join(sorted(known))}."
            raise ValueError(f"The configuration of the encoder {name_or_path} has no field {name}: {hint}")
        # not built anew: some families save the names of their last layers, which fewer layers would refuse
        setattr(config, name, value)
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
    """ViT and DeiT would add a pooling layer that nothing here uses; other families know no such argument."""
    return {"add_pooling_layer": False} if backbone_config.model_type in ("vit", "deit") else {}


def part_of_encoder(config: PreTrainedConfig, num_blocks: int) -> nn.Module:
    """An encoder of `config.backbone_config` with `num_blocks` blocks."""
    backbone_config = config.backbone_config
    if num_blocks != backbone_config.num_hidden_layers:
        backbone_config = copy.deepcopy(backbone_config)
        backbone_config.num_hidden_layers = num_blocks
    # one dtype for encoder and heads, whatever the encoder was saved in
    return AutoModel.from_config(
        backbone_config, dtype=torch.get_default_dtype(), **pooling_arguments(backbone_config)
    )


def encoder_blocks(backbone: nn.Module) -> nn.ModuleList:
    """The blocks of a ViT-family encoder, which each family keeps under another name."""
    for owner in (backbone, getattr(backbone, "encoder", None), getattr(backbone, "model", None)):
        for name in ("layers", "layer"):
            if isinstance(getattr(owner, name, None), nn.ModuleList):
                return getattr(owner, name)
    raise ValueError(
        f"Sharing blocks needs a ViT-family encoder whose blocks are a module list, got {type(backbone).__name__}; "
        "set `shared_encoder_layers` to 0."
    )


def copy_encoder(source: nn.Module, target: nn.Module, first_block: int = 0):
    """Gives `target`, all or a run of the blocks of the encoder `source` from `first_block` on, its weights."""
    for block, original in zip(encoder_blocks(target), encoder_blocks(source)[first_block:], strict=False):
        block.load_state_dict(original.state_dict())
    for name in ("embeddings", "layernorm", "norm"):
        part = getattr(target, name, None)
        if part is not None and not isinstance(part, nn.Identity):
            part.load_state_dict(getattr(source, name).state_dict())


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


def norm_name(backbone: nn.Module) -> str:
    """Name of the final normalisation of an encoder."""
    return "layernorm" if hasattr(backbone, "layernorm") else "norm"


def forward_arguments(backbone: nn.Module) -> dict[str, bool]:
    """Arguments with which an encoder takes images of any size."""
    accepted = inspect.signature(type(backbone).forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}


__all__ = ["pretrained_backbone_config", "pretrained_encoder"]
