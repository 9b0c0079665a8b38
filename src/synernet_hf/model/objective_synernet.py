"""What one batch teaches: targets made of its CAMs, and the weighted sum of the losses. One entry, `batch_objective`."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cam_synernet import (
    UNDECIDED,
    BranchPair,
    area_shares,
    cams_to_pseudo_labels,
    fuse_branches,
    multi_scale_cams,
    spread_classes,
)
from .configuration_synernet import SynerNetConfig
from .loss_synernet import (
    classification_loss,
    cross_supervised_segmentation_loss,
    patch_token_contrast_loss,
    prototype_contrast_terms,
    spatial_bce_loss,
)
from .refinement_synernet import (
    SynerNetPixelAdaptiveRefinement,
    box_mask,
    denormalize,
    present_classes,
    refine_present,
)


class SynerNetTargets(NamedTuple):
    """
    Targets of one branch; `None` where no active loss needs them.

    Attributes:
        token_labels (`torch.Tensor` of shape `(B, h, w)`): int64, for the patch-token contrast: 0 background, `s + 1`
            the s-th present class of the image, -1 undecided.
        area_shares (`torch.Tensor` of shape `(B, C)`): float, for the spatial loss.
        pseudo_labels (`torch.Tensor` of shape `(B, H, W)`): int64, the refined label that teaches the branch.
    """

    token_labels: torch.Tensor | None = None
    area_shares: torch.Tensor | None = None
    pseudo_labels: torch.Tensor | None = None


class SynerNetObjective(NamedTuple):
    """
    Result of [`batch_objective`].

    Attributes:
        loss (`torch.Tensor`, *optional*): scalar.
        loss_dict (`dict[str, torch.Tensor]`, *optional*): the active terms, weighted, without gradient; they sum to `loss`.
        confidence (`torch.Tensor` of shape `(B, 1, H, W)`, *optional*): share of layers and branches that agree.
        pseudo_labels (`torch.Tensor` of shape `(B, H, W)`, *optional*): the label that teaches the precise branch.
    """

    loss: torch.Tensor | None = None
    loss_dict: dict[str, torch.Tensor] | None = None
    confidence: torch.Tensor | None = None
    pseudo_labels: torch.Tensor | None = None


def batch_objective(
    model,
    pixel_values: torch.Tensor,
    outputs,
    logits: BranchPair[torch.Tensor],
    labels: torch.Tensor,
    valid_boxes: torch.Tensor | None,
    loss_weights: dict[str, float],
    progress: float,
    gather_embeddings: Callable | None = None,
) -> SynerNetObjective:
    """
    The loss of a batch. Terms of weight 0 are not computed, nor are the targets that only they need.

    Args:
        model ([`SynerNetModel`]): both branches.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
        outputs ([`SynerNetModelOutput`]): of `model` for `pixel_values`.
        logits (`BranchPair[torch.Tensor]`): segmentation logits of the branches, `(B, K, H, W)`.
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot.
        valid_boxes (`torch.Tensor` of shape `(B, 4)`, *optional*): [top, bottom, left, right) of real pixels.
        loss_weights (`dict[str, float]`): weight of each term; terms that are not named weigh 0.
        progress (`float`): t/T in [0, 1].
        gather_embeddings (`Callable`, *optional*): see [`SynerNetForWeaklySupervisedSegmentation.forward`].

    Returns:
        [`SynerNetObjective`]

    Raises:
        ValueError: if a name in `loss_weights` is unknown.
    """
    known = model.config.loss_weights
    unknown = sorted(set(loss_weights) - set(known))
    if unknown:
        raise ValueError(f"loss_weights knows {', '.join(known)}, got {', '.join(unknown)}.")
    weights = dict.fromkeys(known, 0.0) | loss_weights
    targets, confidence = make_targets(model, pixel_values, outputs, labels, valid_boxes, weights, progress)
    instances = [None, None]
    if weights["prototype_contrast"] and model.config.with_projection_head:
        instances = _embed_instances(model, pixel_values, labels, valid_boxes, targets)
    loss, loss_dict = weighted_losses(
        model, outputs.pair, logits, labels, targets, instances, weights, gather_embeddings
    )
    return SynerNetObjective(loss, loss_dict, confidence, targets.precise.pseudo_labels)


def weighted_losses(
    model,
    outputs: BranchPair,
    logits: BranchPair[torch.Tensor],
    labels: torch.Tensor,
    targets: BranchPair[SynerNetTargets],
    instances: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    weights: dict[str, float],
    gather_embeddings: Callable | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    The loss and the `loss_dict` of a batch whose `targets` are known; `outputs` of both branches, `instances` per
    branch the embeddings `(B, P)` and class ids `(B,)` of cut images or `None`, the rest as for [`batch_objective`].
    """
    terms: dict[str, list[torch.Tensor]] = {}
    # half precision ends here: ranks and sums of the losses need float32
    with torch.autocast(device_type=labels.device.type, enabled=False):
        branches = zip(model.pair, outputs, logits, targets, instances, strict=True)
        for branch, output, branch_logits, target, instance in branches:
            losses = _branch_losses(model.config, output, branch_logits, labels, target, weights)
            if instance is not None:
                contrast = _prototype_contrast(model.config, branch.projection_head, *instance, gather_embeddings)
                losses["prototype_contrast"] = weights["prototype_contrast"] * contrast
            for name, loss in losses.items():
                terms.setdefault(f"loss_{name}", []).append(loss)
        total = sum((loss for losses in terms.values() for loss in losses), labels.new_zeros((), dtype=torch.float32))
    return total, {name: torch.stack(losses).sum().detach() for name, losses in terms.items()}


def _branch_losses(
    config: SynerNetConfig, output, logits: torch.Tensor, labels: torch.Tensor, target: SynerNetTargets, weights
) -> dict[str, torch.Tensor]:
    """The weighted active terms of one branch, but for the prototype contrast."""
    losses = {}
    spatial_share = weights["spatial_bce"] if target.area_shares is not None else 0.0
    if weights["cls"]:
        classification = classification_loss(output.classification_logits, labels)
        losses["cls"] = weights["cls"] * (1 - spatial_share) * classification
    if spatial_share:
        losses["spatial_bce"] = spatial_share * spatial_bce_loss(output.cam_logits, labels, target.area_shares)
    if weights["cls_aux"]:
        losses["cls_aux"] = weights["cls_aux"] * classification_loss(output.auxiliary_classification_logits, labels)
    if weights["cls_token"] and config.with_class_token_head:
        losses["cls_token"] = weights["cls_token"] * classification_loss(output.class_token_logits, labels)
    if weights["patch_contrast"]:
        contrast = patch_token_contrast_loss(output.features, target.token_labels, UNDECIDED)
        losses["patch_contrast"] = weights["patch_contrast"] * contrast
    if weights["segmentation"]:
        segmentation = cross_supervised_segmentation_loss(
            logits, target.pseudo_labels, config.semantic_loss_ignore_index
        )
        losses["segmentation"] = weights["segmentation"] * segmentation
    return losses


@torch.no_grad()
def make_targets(
    model,
    pixel_values: torch.Tensor,
    outputs,
    labels: torch.Tensor,
    valid_boxes: torch.Tensor | None,
    weights: dict[str, float],
    progress: float,
) -> tuple[BranchPair[SynerNetTargets], torch.Tensor | None]:
    """
    Targets of both branches for the loss terms whose weight is not 0, and the confidence where pseudo-labels are made;
    arguments as for [`batch_objective`]. Everything is counted on the classes that the images have.
    """
    empty = BranchPair(SynerNetTargets(), SynerNetTargets())
    labels_needed = bool(weights["segmentation"] or weights["prototype_contrast"])
    if not (labels_needed or weights["spatial_bce"] or weights["patch_contrast"]):
        return empty, None
    config, size = model.config, tuple(pixel_values.shape[-2:])
    low, high = config.low_threshold, config.high_threshold
    present = present_classes(labels)
    own = present.mask.to(labels.dtype)
    known_logits = model.cam_logits_of(outputs, size) if 1 in config.cam_scales else None
    cams = multi_scale_cams(model, pixel_values, present, config.cam_scales, config.cam_flip, known_logits)

    token_labels, areas, pseudo_labels, confidence = [None, None], [None, None], [None, None], None
    if weights["patch_contrast"]:
        token_labels = [label_tokens(config, layers[1], own, valid_boxes) for layers in cams]
    if weights["spatial_bce"]:
        mean_cams = 0.5 * (cams.broad[0] + cams.precise[0])
        for index, branch in enumerate(BranchPair._fields):
            if branch in config.spatial_bce_branches:
                source = cams[index][1] if progress < config.coverage_switch else mean_cams
                shares = area_shares(source, own, coverage(config, branch, progress), low, high)
                areas[index] = spread_classes(shares, present, labels.shape[1])
    if labels_needed:
        fused, confidence = fuse_branches(config, cams, own)
        images = denormalize(pixel_values, config.image_mean, config.image_std)
        refinement = SynerNetPixelAdaptiveRefinement(config.refinement_dilations, config.refinement_iterations)
        pseudo_labels = refine_present(
            images, fused, present, low, high, valid_boxes, config.semantic_loss_ignore_index, refinement
        )
    return BranchPair(*map(SynerNetTargets, token_labels, areas, pseudo_labels)), confidence


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


def label_tokens(
    config: SynerNetConfig, cams: torch.Tensor, labels: torch.Tensor, valid_boxes: torch.Tensor | None
) -> torch.Tensor:
    """
    Label of every token from CAMs `(B, S, H, W)`: resized bilinearly to the token grid, then thresholded with an
    uncertain band; tokens outside the valid box divided by the patch, rounded down, are ignored (authors' code).

    Returns:
        `torch.Tensor` of shape `(B, h, w)`, int64: 0 background, `s + 1` class `s` of the CAMs, or -1 where ignored.
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
    return cams_to_pseudo_labels(cams, labels, config.low_threshold, config.high_threshold, boxes, UNDECIDED)


def pick_instance_classes(pseudo_labels: torch.Tensor, labels: torch.Tensor, draw: bool = True) -> torch.Tensor:
    """
    One class per image for instance learning, `(B,)` int64 from 0, -1 for an image without any: drawn from those in its
    label map `(B, H, W)`, or from its multi-hot labels `(B, C)` if the map holds none (authors' code, which mixes up
    class ids here). Without `draw` the first one, so that a loss in evaluation mode is the same every time (ours).
    """
    num_classes = labels.shape[1]
    flat = pseudo_labels.flatten(1)
    flat = flat.masked_fill((flat < 0) | (flat > num_classes), 0)
    seen = torch.zeros(labels.shape[0], num_classes + 1, device=labels.device).scatter_(1, flat, 1.0)[:, 1:]
    candidates = torch.where(seen.any(dim=1, keepdim=True), seen, labels.to(seen.dtype))
    without = ~candidates.any(dim=1)
    drawn = torch.multinomial(candidates + without[:, None], 1)[:, 0] if draw else candidates.argmax(dim=1)
    return drawn.masked_fill(without, -1)


def cut_instances(
    pixel_values: torch.Tensor,
    pseudo_labels: torch.Tensor,
    class_ids: torch.Tensor,
    valid_boxes: torch.Tensor | None = None,
    ignore_index: int = 255,
) -> torch.Tensor:
    """
    Images `(B, 3, H, W)` with 0 at all pixels but those of one class, `class_ids` `(B,)` from 0, and the undecided ones
    of the label maps `(B, H, W)`, inside the valid boxes `(B, 4)` (authors' code).
    """
    keep = (pseudo_labels == (class_ids + 1)[:, None, None]) | (pseudo_labels == ignore_index)
    if valid_boxes is not None:
        keep &= box_mask(valid_boxes, pseudo_labels.shape[-2:])
    return pixel_values * keep[:, None]


def _embed_instances(
    model, pixel_values, labels, valid_boxes, targets: BranchPair[SynerNetTargets]
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Per branch with instance learning the embeddings `(B, P)` of the cut images and their class ids `(B,)`."""
    config = model.config
    made = {}
    instances = []
    for name, branch, target in zip(BranchPair._fields, model.pair, targets, strict=True):
        if name not in config.prototype_branches:
            instances.append(None)
            continue
        # the precise branch's label is the even mix of both CAMs; without cross-supervision each has only its own
        source = targets.precise.pseudo_labels if config.cross_supervision else target.pseudo_labels
        key = "precise" if config.cross_supervision else name
        if key not in made:
            class_ids = pick_instance_classes(source, labels, draw=model.training)
            images = cut_instances(pixel_values, source, class_ids, valid_boxes, config.semantic_loss_ignore_index)
            images = model.pad(images.to(model.dtype))
            made[key] = images, model.shared_states(images), class_ids
        images, shared_states, class_ids = made[key]
        tokens = branch.encode(images, shared_states)[0]
        instances.append((branch.projection_head(tokens[:, 0]), class_ids))
    return instances


def _prototype_contrast(
    config: SynerNetConfig, head, embeddings: torch.Tensor, class_ids: torch.Tensor, gather_embeddings
) -> torch.Tensor:
    """The prototype contrast of one branch; in training mode it also moves the prototypes."""
    gathered, gathered_ids, own = embeddings, class_ids, slice(None)
    if head.training and gather_embeddings is not None:
        gathered, gathered_ids, own = gather_embeddings(embeddings, class_ids)
    terms, prototypes = prototype_contrast_terms(
        gathered, gathered_ids, head.prototypes, config.prototype_momentum, config.prototype_temperature
    )
    if head.training:
        head.prototypes.copy_(prototypes)
    return terms[own].sum() / (class_ids >= 0).sum().clamp(min=1)


__all__ = [
    "SynerNetObjective",
    "SynerNetTargets",
    "batch_objective",
    "coverage",
    "cut_instances",
    "label_tokens",
    "make_targets",
    "pick_instance_classes",
    "weighted_losses",
]
