"""One branch of SynerNet: a ViT encoder with its CAM heads, decoder and projection head."""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig
from transformers.utils import ModelOutput

from .cam_synernet import class_activation_maps
from .configuration_synernet import SynerNetConfig


@dataclass
class SynerNetBranchOutput(ModelOutput):
    """
    What one branch makes of a batch; `h` and `w` count tokens.

    Args:
        classification_logits (`torch.FloatTensor` of shape `(B, C)`): pooled class scores of the last layer.
        auxiliary_classification_logits (`torch.FloatTensor` of shape `(B, C)`): those of the auxiliary layer.
        cam_logits (`torch.FloatTensor` of shape `(B, C, h, w)`): the last layer's CAM, unnormalised.
        auxiliary_cam_logits (`torch.FloatTensor` of shape `(B, C, h, w)`): the auxiliary layer's CAM, unnormalised.
        logits (`torch.FloatTensor` of shape `(B, K, h, w)`): segmentation logits.
        features (`torch.FloatTensor` of shape `(B, D, h, w)`): patch features after the final normalisation.
        auxiliary_features (`torch.FloatTensor` of shape `(B, D, h, w)`): patch features of the auxiliary layer.
        class_token (`torch.FloatTensor` of shape `(B, D)`): class token after the final normalisation.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): embeddings and every block's output, if asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*): attention maps, if asked for.
    """

    classification_logits: torch.FloatTensor | None = None
    auxiliary_classification_logits: torch.FloatTensor | None = None
    cam_logits: torch.FloatTensor | None = None
    auxiliary_cam_logits: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    features: torch.FloatTensor | None = None
    auxiliary_features: torch.FloatTensor | None = None
    class_token: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None

    @property
    def tokens(self) -> torch.Tensor:
        """Class token and patch features as one sequence, `(B, 1 + h·w, D)`."""
        return torch.cat([self.class_token[:, None], self.features.flatten(2).transpose(1, 2)], dim=1)


@dataclass
class SynerNetModelOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, 1 + h·w, n·D)`): class token and patch features after the
            final normalisation, the n branches that ran side by side, broad first.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): of the branches that ran, broad first.
        attentions (`tuple(torch.FloatTensor)`, *optional*): of the branches that ran, broad first.
        broad ([`SynerNetBranchOutput`], *optional*): the broad branch's output, if it was asked for.
        precise ([`SynerNetBranchOutput`], *optional*): the precise branch's output, if it was asked for.
    """

    last_hidden_state: torch.FloatTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    broad: SynerNetBranchOutput | None = None
    precise: SynerNetBranchOutput | None = None


class SynerNetClassActivationHead(nn.Module):
    """A bias-free linear classifier, read once on pooled tokens (class scores) and once on every token (CAM)."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        self.pooling_top_k = config.pooling_top_k
        self.classifier = nn.Linear(config.backbone_config.hidden_size, config.num_foreground_labels, bias=False)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, D, h, w)` features → class scores `(B, C)` and CAM logits `(B, C, h, w)`."""
        tokens = features.flatten(2)
        pooled = tokens.topk(min(self.pooling_top_k, tokens.shape[-1]), dim=-1).values.mean(dim=-1)
        return self.classifier(pooled), class_activation_maps(features, self.classifier.weight)


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


class SynerNetBranch(nn.Module):
    """One encoder with its CAM heads, decoder and projection head."""

    def __init__(self, config: SynerNetConfig):
        super().__init__()
        self.auxiliary_layer_index = config.auxiliary_layer_index
        self.backbone = AutoModel.from_config(config.backbone_config, **pooling_arguments(config.backbone_config))
        accepted = inspect.signature(type(self.backbone).forward).parameters
        self.backbone_arguments = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}
        self.cam_head = SynerNetClassActivationHead(config)
        self.auxiliary_cam_head = SynerNetClassActivationHead(config)
        self.decode_head = SynerNetDecodeHead(config)
        self.projection_head = SynerNetProjectionHead(config) if config.with_projection_head else None

    def encode(self, pixel_values: torch.Tensor, patch_size: int, output_attentions: bool = False):
        """
        `(B, 3, H, W)`, sides multiples of the patch → features and auxiliary features `(B, D, h, w)`, class token
        `(B, D)`, hidden states and attentions.
        """
        encoded = self.backbone(
            pixel_values,
            output_hidden_states=True,
            output_attentions=output_attentions,
            return_dict=True,
            **self.backbone_arguments,
        )
        grid = (pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size)

        def patch_map(tokens: torch.Tensor) -> torch.Tensor:
            # prefix tokens (class, distillation, registers) come first in every family
            return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).unflatten(2, grid)

        tokens = encoded.last_hidden_state
        auxiliary = patch_map(encoded.hidden_states[self.auxiliary_layer_index])
        return patch_map(tokens), auxiliary, tokens[:, 0], encoded.hidden_states, encoded.attentions

    def forward(
        self, pixel_values: torch.Tensor, patch_size: int, output_attentions: bool = False
    ) -> SynerNetBranchOutput:
        """`(B, 3, H, W)` pictures, sides multiples of the patch → everything the branch computes."""
        features, auxiliary, class_token, hidden_states, attentions = self.encode(
            pixel_values, patch_size, output_attentions
        )
        scores, cam_logits = self.cam_head(features)
        auxiliary_scores, auxiliary_cam_logits = self.auxiliary_cam_head(auxiliary)
        return SynerNetBranchOutput(
            classification_logits=scores,
            auxiliary_classification_logits=auxiliary_scores,
            cam_logits=cam_logits,
            auxiliary_cam_logits=auxiliary_cam_logits,
            logits=self.decode_head(features),
            features=features,
            auxiliary_features=auxiliary,
            class_token=class_token,
            hidden_states=hidden_states,
            attentions=attentions,
        )


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
    "SynerNetBranchOutput",
    "SynerNetClassActivationHead",
    "SynerNetDecodeHead",
    "SynerNetModelOutput",
    "SynerNetProjectionHead",
    "pooling_arguments",
    "select_states",
]
