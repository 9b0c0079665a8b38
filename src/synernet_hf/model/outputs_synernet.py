"""What the models return."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class SynerNetBranchOutput(ModelOutput):
    """
    What one branch makes of a batch; `h` and `w` count tokens.

    Args:
        classification_logits (`torch.FloatTensor` of shape `(B, C)`): pooled class scores of the last layer.
        auxiliary_classification_logits (`torch.FloatTensor` of shape `(B, C)`): those of the auxiliary layer.
        class_token_logits (`torch.FloatTensor` of shape `(B, C)`, *optional*): class scores of the class token, with
            `config.with_class_token_head`.
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
    class_token_logits: torch.FloatTensor | None = None
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


@dataclass
class SynerNetSegmenterOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor`, *optional*): scalar, returned with `labels`.
        loss_dict (`dict[str, torch.FloatTensor]`, *optional*):
            Active terms before weighting, each the mean over the branches that have it, without gradient: `loss_cls`,
            `loss_cls_aux`, `loss_cls_token`, `loss_spatial_bce`, `loss_patch_contrast`, `loss_prototype_contrast`,
            `loss_segmentation`.
        logits (`torch.FloatTensor` of shape `(B, K, h, w)`):
            Segmentation scores of both branches mixed by `config.broad_inference_weight`, one per token; `(B, K, H, W)`
            where the image had to be padded because its height or width is no multiple of the patch. With a class
            token head, classes that are not likely in the image are lowered.
        broad_logits (`torch.FloatTensor`, *optional*):
            The broad branch's share of `logits`, as its decoder gives it; same shape.
        precise_logits (`torch.FloatTensor`, *optional*): the same of the precise branch.
        classification_logits (`torch.FloatTensor` of shape `(B, C)`):
            Class scores of the image, mean of the branches: the class tokens' where the model has heads for them, the
            pooled patches' otherwise.
        broad_cams (`torch.FloatTensor` of shape `(B, C, h, w)`):
            The broad branch's CAMs in [0, 1], not masked: single-scale and as the classifier gives them, on the grid of
            `logits`; where targets were made from `labels`, the multi-scale ones they come from, `(B, C, H, W)`, absent classes zeroed.
        precise_cams (`torch.FloatTensor` of shape `(B, C, h, w)`): the same of the precise branch.
        confidence (`torch.FloatTensor` of shape `(B, 1, H, W)`, *optional*):
            Share of layers and branches that agree on a pixel, returned when pseudo-labels are made.
        pseudo_labels (`torch.LongTensor` of shape `(B, H, W)`, *optional*):
            The refined fused label that teaches the precise branch, 255 where undecided; returned with `labels` when
            a loss that needs it is active.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*): of both branches, broad first, if asked for.
        attentions (`tuple(torch.FloatTensor)`, *optional*): of both branches, broad first, if asked for.
    """

    loss: torch.FloatTensor | None = None
    loss_dict: dict[str, torch.FloatTensor] | None = None
    logits: torch.FloatTensor | None = None
    broad_logits: torch.FloatTensor | None = None
    precise_logits: torch.FloatTensor | None = None
    classification_logits: torch.FloatTensor | None = None
    broad_cams: torch.FloatTensor | None = None
    precise_cams: torch.FloatTensor | None = None
    confidence: torch.FloatTensor | None = None
    pseudo_labels: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class SynerNetCamOutput(ModelOutput):
    """
    Multi-scale CAMs at the image's size, `(B, C, H, W)` float in [0, 1].

    Args:
        broad_cams (`torch.FloatTensor`): last layer of the broad branch.
        precise_cams (`torch.FloatTensor`): last layer of the precise branch.
        broad_aux_cams (`torch.FloatTensor`): auxiliary layer of the broad branch.
        precise_aux_cams (`torch.FloatTensor`): auxiliary layer of the precise branch.
        fused_cams (`torch.FloatTensor`): mean of the two fused CAMs that teach the branches.
        confidence (`torch.FloatTensor` of shape `(B, 1, H, W)`): share of layers and branches that agree, in [0, 1].
    """

    broad_cams: torch.FloatTensor | None = None
    precise_cams: torch.FloatTensor | None = None
    broad_aux_cams: torch.FloatTensor | None = None
    precise_aux_cams: torch.FloatTensor | None = None
    fused_cams: torch.FloatTensor | None = None
    confidence: torch.FloatTensor | None = None


__all__ = ["SynerNetBranchOutput", "SynerNetCamOutput", "SynerNetModelOutput", "SynerNetSegmenterOutput"]
