"""One branch of SynerNet: a ViT encoder with its CAM heads, decoder and projection head."""

import copy
import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig

from .cam_synernet import class_activation_maps
from .configuration_synernet import SynerNetConfig
from .outputs_synernet import SynerNetBranchOutput


class SynerNetClassActivationHead(nn.Module):
    """A bias-free linear classifier, read once on pooled tokens (class scores) and once on every token (CAM)."""

    def __init__(self, config: SynerNetConfig, pooling_top_k: int):
        super().__init__()
        self.pooling_top_k = pooling_top_k
        self.classifier = nn.Linear(config.backbone_config.hidden_size, config.num_foreground_labels, bias=False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, D, h, w)` features → class scores `(B, C)` and CAM logits `(B, C, h, w)`."""
        tokens = features.flatten(2)
        pooled = tokens.topk(min(self.pooling_top_k, tokens.shape[-1]), dim=-1).values.mean(dim=-1)
        return self.classifier(pooled), self.cam_logits(features)

    def cam_logits(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, D, h, w)` features → CAM logits `(B, C, h, w)`."""
        return class_activation_maps(features, self.classifier.weight)


class SynerNetDecodeHead(nn.Module):
    """LargeFOV decoder: two dilated 3×3 convolutions and a 1×1 one, no biases (authors' code)."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        width, dilation = config.decoder_hidden_size, config.decoder_dilation
        dilated = {"kernel_size": 3, "padding": dilation, "dilation": dilation, "bias": False}
        self.conv_in = nn.Conv2d(config.backbone_config.hidden_size, width, **dilated)
        self.conv_mid = nn.Conv2d(width, width, **dilated)
        self.classifier = nn.Conv2d(width, config.num_labels, kernel_size=1, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, D, h, w)` features → segmentation logits `(B, K, h, w)`."""
        return self.classifier(self.conv_mid(self.conv_in(features).relu()).relu())


class SynerNetProjectionHead(nn.Module):
    """Projects class tokens for instance learning, and keeps the class prototypes (authors' code)."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        hidden, bottleneck = config.projection_hidden_size, config.projection_bottleneck_size
        self.layers = nn.Sequential(
            nn.Linear(config.backbone_config.hidden_size, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.directions = nn.Linear(bottleneck, config.prototype_size, bias=False)
        self.register_buffer("prototypes", torch.zeros(config.num_foreground_labels, config.prototype_size))

    def forward(self, class_token: torch.Tensor) -> torch.Tensor:
        """`(B, D)` class tokens → embeddings `(B, P)`: cosines to the rows of the last layer."""
        bottleneck = F.normalize(self.layers(class_token), dim=-1)
        return F.linear(bottleneck, F.normalize(self.directions.weight, dim=-1))


class SynerNetSharedEncoder(nn.Module):
    """The first `config.shared_encoder_layers` blocks of the encoder, run once for both branches."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        self.backbone = _part_of_encoder(config, config.shared_encoder_layers)
        # the final normalisation belongs to the branches
        setattr(self.backbone, _norm_name(self.backbone), nn.Identity())
        self.backbone_arguments = _forward_arguments(self.backbone)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`(B, 3, H, W)`, sides multiples of the patch → embeddings and every shared block's output, `(B, N, D)` each."""
        return self.backbone(
            pixel_values, output_hidden_states=True, return_dict=True, **self.backbone_arguments
        ).hidden_states


class SynerNetBranch(nn.Module):
    """One encoder, or what follows the shared blocks, with its CAM heads, decoder and projection head."""

    def __init__(self, config: SynerNetConfig, pooling_top_k: int):
        super().__init__()
        self.auxiliary_layer_index = config.auxiliary_layer_index
        self.additional_cam_layers = config.additional_cam_layers
        shared = config.shared_encoder_layers
        self.backbone = _part_of_encoder(config, config.backbone_config.num_hidden_layers - shared)
        if shared:
            self.backbone.embeddings = nn.Identity()
        self.backbone_arguments = _forward_arguments(self.backbone)
        self.cam_head = SynerNetClassActivationHead(config, pooling_top_k)
        self.auxiliary_cam_head = SynerNetClassActivationHead(config, pooling_top_k)
        self.class_token_head = None
        if config.with_class_token_head:
            self.class_token_head = nn.Linear(config.backbone_config.hidden_size, config.num_foreground_labels)
        self.decode_head = SynerNetDecodeHead(config)
        self.projection_head = SynerNetProjectionHead(config) if config.with_projection_head else None

    def encode(
        self,
        pixel_values: torch.Tensor,
        shared_states: tuple[torch.Tensor, ...] | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """
        Runs the encoder.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): sides multiples of the patch.
            shared_states (`tuple[torch.Tensor]`, *optional*): of [`SynerNetSharedEncoder`], where blocks are shared.
            output_attentions (`bool`, *optional*, defaults to `False`): whether to return attention maps.

        Returns:
            `tuple`: all tokens after the final normalisation, `(B, N, D)`; the hidden states, embeddings first;
            the attention maps or `None`.
        """
        if shared_states is not None:
            return *self._continue(pixel_values, shared_states), None
        encoded = self.backbone(
            pixel_values,
            output_hidden_states=True,
            output_attentions=output_attentions,
            return_dict=True,
            **self.backbone_arguments,
        )
        return encoded.last_hidden_state, encoded.hidden_states, encoded.attentions

    def _continue(self, pixel_values: torch.Tensor, shared_states: tuple[torch.Tensor, ...]):
        tokens, states = shared_states[-1], list(shared_states)
        arguments = {}
        if hasattr(self.backbone, "rope_embeddings"):
            arguments["position_embeddings"] = self.backbone.rope_embeddings(pixel_values.to(tokens.dtype))
        for block in encoder_blocks(self.backbone):
            tokens = block(tokens, **arguments)
            states.append(tokens)
        return getattr(self.backbone, _norm_name(self.backbone))(tokens), tuple(states)

    def cam_logits(
        self, pixel_values: torch.Tensor, patch_size: int, shared_states: tuple[torch.Tensor, ...] | None = None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """
        CAM logits `(B, C, h, w)` of the last, the auxiliary and the additional layers, without the decoder, and the
        features `(B, D, h, w)` that each was read from.
        """
        tokens, hidden_states, _ = self.encode(pixel_values, shared_states)
        layers = (self.auxiliary_layer_index, *self.additional_cam_layers)
        features = [
            patch_map(states, pixel_values, patch_size) for states in (tokens, *map(hidden_states.__getitem__, layers))
        ]
        maps = [self.cam_head.cam_logits(features[0]), *map(self.auxiliary_cam_head.cam_logits, features[1:])]
        return maps, features

    @torch.no_grad()
    def cam_logits_of(self, output: SynerNetBranchOutput) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What `cam_logits` gives for the images whose `output`, of `forward`, is there already; without gradient."""
        grid = output.features.shape[-2:]
        earlier = [token_map(output.hidden_states[layer], grid) for layer in self.additional_cam_layers]
        maps = [output.cam_logits, output.auxiliary_cam_logits, *map(self.auxiliary_cam_head.cam_logits, earlier)]
        features = [output.features, output.auxiliary_features, *earlier]
        return [cam.detach() for cam in maps], [states.detach() for states in features]

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_size: int,
        shared_states: tuple[torch.Tensor, ...] | None = None,
        output_attentions: bool = False,
    ) -> SynerNetBranchOutput:
        """`(B, 3, H, W)` images, sides multiples of the patch → everything the branch computes."""
        tokens, hidden_states, attentions = self.encode(pixel_values, shared_states, output_attentions)
        features = patch_map(tokens, pixel_values, patch_size)
        auxiliary = patch_map(hidden_states[self.auxiliary_layer_index], pixel_values, patch_size)
        scores, cam_logits = self.cam_head(features)
        auxiliary_scores, auxiliary_cam_logits = self.auxiliary_cam_head(auxiliary)
        class_token = tokens[:, 0]
        return SynerNetBranchOutput(
            classification_logits=scores,
            auxiliary_classification_logits=auxiliary_scores,
            class_token_logits=None if self.class_token_head is None else self.class_token_head(class_token),
            cam_logits=cam_logits,
            auxiliary_cam_logits=auxiliary_cam_logits,
            logits=self.decode_head(features),
            features=features,
            auxiliary_features=auxiliary,
            class_token=class_token,
            hidden_states=hidden_states,
            attentions=attentions,
        )


def lower_unlikely_classes(logits: torch.Tensor, log_probabilities: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Segmentation logits, each class lowered by how much less likely it is in the image than the likeliest (ours).

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): segmentation logits, background first.
        log_probabilities (`torch.Tensor` of shape `(B, C)`): of each class in the image, log σ of its score.
        weight (`float`): of the difference; 0 changes nothing.

    Returns:
        `torch.Tensor` of shape `(B, K, h, w)`: the likeliest class and the background stay as they are.
    """
    penalty = weight * (log_probabilities.amax(dim=1, keepdim=True) - log_probabilities)
    return logits - F.pad(penalty, (1, 0))[..., None, None]


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


def _part_of_encoder(config: SynerNetConfig, num_blocks: int) -> nn.Module:
    """An encoder of `config.backbone_config` with `num_blocks` blocks."""
    backbone_config = config.backbone_config
    if num_blocks != backbone_config.num_hidden_layers:
        backbone_config = copy.deepcopy(backbone_config)
        backbone_config.num_hidden_layers = num_blocks
    return AutoModel.from_config(backbone_config, **pooling_arguments(backbone_config))


def _norm_name(backbone: nn.Module) -> str:
    return "layernorm" if hasattr(backbone, "layernorm") else "norm"


def _forward_arguments(backbone: nn.Module) -> dict[str, bool]:
    accepted = inspect.signature(type(backbone).forward).parameters
    return {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}


def patch_map(tokens: torch.Tensor, pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Tokens `(B, prefix + h·w, D)` of padded images `(B, 3, h·p, w·p)` → `(B, D, h, w)`."""
    return token_map(tokens, (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size))


def token_map(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    Tokens `(B, prefix + h·w, D)` of a `grid` (h, w) → `(B, D, h, w)`; prefix tokens (class, distillation, registers)
    come first in every family.
    """
    return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)


def pooling_arguments(backbone_config: PreTrainedConfig) -> dict[str, bool]:
    """ViT and DeiT would add a pooling layer that nothing here uses; other families know no such argument."""
    return {"add_pooling_layer": False} if backbone_config.model_type in ("vit", "deit") else {}


def select_states(
    states: tuple[torch.Tensor, ...], wanted: bool | int | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """What `output_hidden_states` asks for: all states, none, or those at some indices with `None` for the others."""
    if wanted is None or isinstance(wanted, bool):
        return states if wanted else None
    indices = {range(len(states))[index] for index in ([wanted] if isinstance(wanted, int) else wanted)}
    return tuple(state if index in indices else None for index, state in enumerate(states))


__all__ = [
    "SynerNetBranch",
    "SynerNetClassActivationHead",
    "SynerNetDecodeHead",
    "SynerNetProjectionHead",
    "SynerNetSharedEncoder",
    "copy_encoder",
    "encoder_blocks",
    "lower_unlikely_classes",
    "patch_map",
    "pooling_arguments",
    "select_states",
]
