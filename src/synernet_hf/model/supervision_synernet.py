"""What one batch's CAMs teach the two branches: token labels, area shares, fused labels. Nothing here has gradient."""

import math
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from .cam_synernet import (
    area_shares,
    cams_to_pseudo_labels,
    fuse_cams,
    fusion_shares,
    layer_confidence,
    select_classes,
)
from .configuration_synernet import SynerNetConfig
from .refinement_synernet import SynerNetPixelAdaptiveRefinement, own_classes, refine_pseudo_labels


BRANCHES = ("broad", "precise")
# a vote that is neither a class nor background; never a label, whatever the ignore index
_UNDECIDED = -1


@dataclass
class SynerNetSupervision:
    """
    Targets of one batch; what no active loss needs stays empty.

    Attributes:
        token_labels (`dict[str, torch.Tensor]`): per branch `(B, h, w)` int64, for the patch-token contrast.
        area_shares (`dict[str, torch.Tensor]`): per branch `(B, C)` float, for the spatial loss.
        pseudo_labels (`dict[str, torch.Tensor]`): per branch `(B, H, W)` int64, the label that teaches it.
        confidence (`torch.Tensor` of shape `(B, 1, H, W)`, *optional*): share of layers and branches that agree.
    """

    token_labels: dict[str, torch.Tensor] = field(default_factory=dict)
    area_shares: dict[str, torch.Tensor] = field(default_factory=dict)
    pseudo_labels: dict[str, torch.Tensor] = field(default_factory=dict)
    confidence: torch.Tensor | None = None


def chosen_branches(inference_branches: str | None) -> tuple[str, ...]:
    """The branches that `"broad"`, `"precise"`, `"both"` or `None` (both) stands for."""
    if inference_branches in (None, "both"):
        return BRANCHES
    if inference_branches not in BRANCHES:
        raise ValueError(f"inference_branches must be 'broad', 'precise' or 'both', got {inference_branches!r}.")
    return (inference_branches,)


def coverage(config: SynerNetConfig, branch: str, progress: float) -> float:
    """
    ρ of one branch's spatial loss at `progress` = t/T in [0, 1]: constant until `config.coverage_switch`, then a
    quarter cosine down to 0, never negative (schedule: authors' code; a ρ for each branch: paper, values ours).
    """
    if branch == "precise":
        return config.precise_coverage
    if progress < config.coverage_switch or config.coverage_switch >= 1:
        return config.broad_coverage
    late = (progress - config.coverage_switch) / (1 - config.coverage_switch)
    return max(config.broad_coverage_late * math.cos(math.pi / 2 * late), 0.0)


def fuse_branches(
    config: SynerNetConfig, cams: dict[str, tuple[torch.Tensor, ...]], labels: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """
    The fused CAM that teaches each branch, and the confidence of every pixel (paper; the arithmetic is ours).

    Args:
        config ([`SynerNetConfig`]): thresholds, shares and the kind of fusion.
        cams (`dict[str, tuple[torch.Tensor, ...]]`): of [`multi_scale_cams`], masked by `labels`.
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot.

    Returns:
        `tuple[dict[str, torch.Tensor], torch.Tensor]`: per taught branch `(B, C, H, W)` in [0, 1]; and the share of
        layer and branch votes equal to the majority, `(B, 1, H, W)` in [0, 1].
    """
    broad, precise = cams["broad"][0], cams["precise"][0]
    low, high = config.low_threshold, config.high_threshold
    votes = {
        branch: torch.stack(
            [
                cams_to_pseudo_labels(cams[branch][place], labels, low, high, ignore_index=_UNDECIDED)
                for place in map(config.cam_layers.index, config.voting_layers)
            ]
        )
        for branch in BRANCHES
    }
    confidence, agreed = layer_confidence(torch.cat([votes["broad"], votes["precise"]]), _UNDECIDED)
    shares = {"broad": config.broad_label_share, "precise": config.precise_label_share}
    if not config.cross_supervision:
        return {"broad": broad, "precise": precise}, confidence
    if config.fusion == "fixed":
        return {branch: fuse_cams(broad, precise, share) for branch, share in shares.items()}, confidence
    agreement = {branch: layer_confidence(votes[branch], _UNDECIDED)[0] for branch in BRANCHES}
    agreed = agreed.masked_fill(confidence[:, 0] < config.confidence_threshold, _UNDECIDED)
    fused = {}
    for branch, share in shares.items():
        adaptive = fusion_shares(agreement["broad"], agreement["precise"], share, config.fusion_range)
        fused[branch] = fuse_cams(broad, precise, adaptive, agreed, low, high, _UNDECIDED)
    return fused, confidence


def label_tokens(
    config: SynerNetConfig, cams: torch.Tensor, labels: torch.Tensor, valid_boxes: torch.Tensor | None
) -> torch.Tensor:
    """
    Label of every token from CAMs `(B, C, H, W)`: resized bilinearly to the token grid, then thresholded with an
    uncertain band; tokens outside the valid box divided by the patch, rounded down, are ignored (authors' code).

    Returns:
        `torch.Tensor` of shape `(B, h, w)`, int64: 0 background, `c + 1` class `c`, or -1 where ignored.
    """
    patch_size = config.patch_size
    height, width = cams.shape[-2:]
    grid = (-(-height // patch_size), -(-width // patch_size))
    if (grid[0] * patch_size, grid[1] * patch_size) != (height, width):
        cams = F.pad(cams, (0, grid[1] * patch_size - width, 0, grid[0] * patch_size - height))
        if valid_boxes is None:
            valid_boxes = torch.tensor([[0, height, 0, width]], device=cams.device).expand(cams.shape[0], -1)
    cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)
    boxes = None if valid_boxes is None else valid_boxes // patch_size
    return cams_to_pseudo_labels(cams, labels, config.low_threshold, config.high_threshold, boxes, _UNDECIDED)


def _data_set_ids(label_map: torch.Tensor, order: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Labels counted over the classes `order` `(B, S)` names → labels of the data set; undecided → `ignore_index`."""
    names = F.pad(order + 1, (1, 0))
    ids = names.gather(1, label_map.clamp(min=0).flatten(1)).view_as(label_map)
    return ids.masked_fill(label_map == _UNDECIDED, ignore_index)


@torch.no_grad()
def make_supervision(
    config: SynerNetConfig,
    cams: dict[str, tuple[torch.Tensor, ...]],
    images: torch.Tensor,
    labels: torch.Tensor,
    valid_boxes: torch.Tensor | None,
    loss_weights: dict[str, float],
    progress: float,
) -> SynerNetSupervision:
    """
    Targets for the loss terms whose weight is not 0.

    Args:
        config ([`SynerNetConfig`]): thresholds, shares and schedules.
        cams (`dict[str, tuple[torch.Tensor, ...]]`): of [`multi_scale_cams`], masked by `labels`.
        images (`torch.Tensor` of shape `(B, 3, H, W)`): float, in [0, 1].
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot.
        valid_boxes (`torch.Tensor` of shape `(B, 4)`, *optional*): [top, bottom, left, right) of real pixels.
        loss_weights (`dict[str, float]`): weight of each term.
        progress (`float`): t/T in [0, 1].
    """
    supervision = SynerNetSupervision()
    low, high = config.low_threshold, config.high_threshold
    ignore_index = config.semantic_loss_ignore_index
    # an image has few of the data set's classes: everything is counted on those alone
    order, present = own_classes(labels)
    own = present.to(labels.dtype)
    cams = {branch: tuple(select_classes(maps, order) for maps in layers) for branch, layers in cams.items()}
    if loss_weights["patch_contrast"]:
        for branch in BRANCHES:
            tokens = label_tokens(config, cams[branch][1], own, valid_boxes)
            supervision.token_labels[branch] = _data_set_ids(tokens, order, ignore_index)
    if loss_weights["spatial_bce"]:
        mean_cams = 0.5 * (cams["broad"][0] + cams["precise"][0])
        for branch in config.spatial_bce_branches:
            source = cams[branch][1] if progress < config.coverage_switch else mean_cams
            shares = area_shares(source, own, coverage(config, branch, progress), low, high)
            spread = shares.new_zeros(labels.shape)
            supervision.area_shares[branch] = spread.scatter_(1, order, shares)
    if loss_weights["segmentation"] or loss_weights["prototype_contrast"]:
        fused, supervision.confidence = fuse_branches(config, cams, own)
        refinement = SynerNetPixelAdaptiveRefinement(config.refinement_dilations, config.refinement_iterations)
        fused_maps = torch.stack([fused[branch] for branch in BRANCHES])
        label_maps = refine_pseudo_labels(images, fused_maps, own, low, high, valid_boxes, _UNDECIDED, refinement)
        for branch, label_map in zip(BRANCHES, label_maps, strict=True):
            supervision.pseudo_labels[branch] = _data_set_ids(label_map, order, ignore_index)
    return supervision


__all__ = [
    "BRANCHES",
    "SynerNetSupervision",
    "chosen_branches",
    "coverage",
    "fuse_branches",
    "label_tokens",
    "make_supervision",
]
