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
)
from .configuration_synernet import SynerNetConfig
from .refinement_synernet import (
    SynerNetPixelAdaptiveRefinement,
    box_mask,
    denormalize,
    on_device,
    present_classes,
    refine_present,
    spread_classes,
)


# The losses: pure functions that count in float32 whatever their inputs are.


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Multi-label soft-margin loss of class logits `(B, C)` and multi-hot labels `(B, C)`, a scalar (authors' code)."""
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())


def spatial_bce_loss(cam_logits: torch.Tensor, labels: torch.Tensor, area_shares: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy over space with an adaptive area (SynerNet's complementary objectives; authors' code).

    Per present class the entries from the maximum down to 0-based rank `min(round(N · r), N − 1)` are positive, all
    others and all of absent classes negative. Positions that are positive for some class weigh 0.9, the others 0.1,
    each group by its own mean; an empty group adds 0.

    Args:
        cam_logits (`torch.Tensor` of shape `(B, C, h, w)`): unnormalised CAMs.
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot image-level labels.
        area_shares (`torch.Tensor` of shape `(B, C)`): float, in [0, 1], the share r each class should cover.

    Returns:
        `torch.Tensor`: scalar, mean over images.
    """
    logits = cam_logits.float().flatten(2)
    values, num_tokens = logits.detach(), logits.shape[-1]
    ranks = (num_tokens * area_shares).round().long().clamp(max=num_tokens - 1)
    smallest = values.sort(dim=-1, descending=True).values.gather(-1, ranks[..., None])
    targets = (values >= smallest) & labels.bool()[..., None]
    losses = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(dim=1)
    positive = targets.any(dim=1)
    foreground = (losses * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    background = (losses * ~positive).sum(dim=1) / (~positive).sum(dim=1).clamp(min=1)
    return (0.9 * foreground + 0.1 * background).mean()


def shared_counts(counts: torch.Tensor, sum_counts: Callable | None, extra: int = 0) -> torch.Tensor:
    """
    What sums over the own batch are divided by, so that the mean of these ratios over processes is the ratio of a batch
    of all images: `counts` of all processes and `extra`, at least 1, divided by the number of processes.
    """
    total, processes = (counts, 1) if sum_counts is None else sum_counts(counts)
    return (total + extra).clamp(min=1) / processes


def patch_token_contrast_loss(
    features: torch.Tensor,
    token_labels: torch.Tensor,
    ignore_index: int = 255,
    sum_counts: Callable | None = None,
) -> torch.Tensor:
    """
    Patch-token contrast (ToCo): tokens of one label should look alike, tokens of different labels should not.

    ½ · (1 − Σ|cos| of equal pairs / (their number + 1)) + ½ · Σ|cos| of unequal pairs / (their number + 1), over all
    ordered pairs of different tokens of one image, neither ignored; sums run over the batch.

    Args:
        features (`torch.Tensor` of shape `(B, D, h, w)`): patch features.
        token_labels (`torch.Tensor` of shape `(B, h, w)`): int64 label of each token.
        ignore_index (`int`, *optional*, defaults to 255): label of tokens that are left out.
        sum_counts (`Callable`, *optional*): as for the forward of the task model.

    Returns:
        `torch.Tensor`: scalar.
    """
    tokens = F.normalize(features.float().flatten(2), dim=1, eps=1e-8)
    similarity = (tokens.transpose(1, 2) @ tokens).abs()
    labels = token_labels.flatten(1)
    counted = labels != ignore_index
    pairs = counted[:, :, None] & counted[:, None, :]
    pairs &= ~torch.eye(labels.shape[1], dtype=torch.bool, device=labels.device)
    equal = labels[:, :, None] == labels[:, None, :]
    same, different = pairs & equal, pairs & ~equal
    numbers = shared_counts(torch.stack([same.sum(), different.sum()]), sum_counts, extra=1)
    attract = 1 - (similarity * same).sum() / numbers[0]
    repel = (similarity * different).sum() / numbers[1]
    return 0.5 * (attract + repel)


def cross_supervised_segmentation_loss(
    logits: torch.Tensor, pseudo_labels: torch.Tensor, ignore_index: int = 255, sum_counts: Callable | None = None
) -> torch.Tensor:
    """
    Cross-entropy of one branch's segmentation against a pseudo-label made with the other's help.

    Half the mean over background pixels plus half the mean over foreground pixels. A group without pixels adds 0
    (the authors' mean over nothing is NaN).

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): resized bilinearly to the label map.
        pseudo_labels (`torch.Tensor` of shape `(B, H, W)`): int64, 0 background, 1..K−1 classes.
        ignore_index (`int`, *optional*, defaults to 255): label of pixels left out.
        sum_counts (`Callable`, *optional*): as for the forward of the task model.

    Returns:
        `torch.Tensor`: scalar.
    """
    logits = logits.float()
    if logits.shape[-2:] != pseudo_labels.shape[-2:]:
        logits = F.interpolate(logits, size=pseudo_labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, pseudo_labels, ignore_index=ignore_index, reduction="none")
    background = pseudo_labels == 0
    groups = (background, ~background & (pseudo_labels != ignore_index))
    numbers = shared_counts(torch.stack([group.sum() for group in groups]), sum_counts)
    return 0.5 * sum((losses * group).sum() / number for group, number in zip(groups, numbers, strict=True))


def prototype_contrast_terms(
    embeddings: torch.Tensor,
    class_ids: torch.Tensor,
    prototypes: torch.Tensor,
    momentum: float = 0.01,
    temperature: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Instance learning: an image's embedding should match the prototype of its class (authors' code).

    Images are taken one after another: the prototype of the image's class moves first, by γ·|cos| of the way to
    the embedding (at first sight it becomes the normalised embedding), then the loss −log(e^{z·m/τ} / (Σ e^{z·m_j/τ}
    + 1e-4)) is read with the prototypes as they then stand. Unseen classes are zero rows and count.

    Args:
        embeddings (`torch.Tensor` of shape `(B, P)`): projected class tokens z, not normalised here.
        class_ids (`torch.Tensor` of shape `(B,)`): int64, 0-based foreground class; a negative id leaves an image out.
        prototypes (`torch.Tensor` of shape `(C, P)`): normalised rows, or zeros for classes not seen yet; not edited.
        momentum (`float`, *optional*, defaults to 0.01): γ. temperature (`float`, *optional*, defaults to 0.5): τ.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the loss of each image `(B,)`, 0 for one that is left out, and the
        prototypes after the last image.
    """
    prototypes, embeddings = prototypes.float(), embeddings.float()
    terms = []
    for embedding, class_id in zip(embeddings, class_ids, strict=True):
        counts = class_id >= 0
        row = class_id.clamp(min=0)[None]
        current, target = prototypes[row][0], embedding.detach()
        direction = F.normalize(target, dim=0)
        # a non-finite embedding must not enter the memory, which later batches read
        moves = counts & target.isfinite().all()
        step = momentum * (current @ direction).abs()
        moved = F.normalize((1 - step) * current + step * target, dim=0)
        updated = torch.where(moves, torch.where(current.any(), moved, direction), current)
        prototypes = prototypes.index_copy(0, row, updated[None])
        scores = prototypes @ embedding / temperature
        # log(sum of exponentials + 1e-4)
        total = F.pad(scores, (0, 1), value=math.log(1e-4)).logsumexp(dim=0)
        terms.append(torch.where(counts, total - scores[row][0], 0.0))
    return torch.stack(terms) if terms else embeddings.sum(dim=1), prototypes


# The targets, all without gradient.


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


@torch.no_grad()
def make_targets(
    model,
    pixel_values: torch.Tensor,
    outputs,
    labels: torch.Tensor,
    valid_boxes: torch.Tensor | None,
    weights: dict[str, float],
    progress: float,
    max_labels: int | None = None,
) -> tuple[BranchPair[SynerNetTargets], torch.Tensor | None]:
    """
    Targets of both branches for the loss terms whose weight is not 0, and the confidence where pseudo-labels are made;
    arguments as for [`batch_objective`]. Everything is counted on the classes that the images have.
    """
    labels_needed = bool(weights["segmentation"] or weights["prototype_contrast"])
    if not (labels_needed or weights["spatial_bce"] or weights["patch_contrast"]):
        return BranchPair(SynerNetTargets(), SynerNetTargets()), None
    config, size = model.config, tuple(pixel_values.shape[-2:])
    low, high = config.low_threshold, config.high_threshold
    present = present_classes(labels, max_labels)
    own = present.mask.to(labels.dtype)
    seen = model.seen_in(outputs, size)
    cams = multi_scale_cams(model, pixel_values, present, config.cam_scales, config.cam_flip, seen=seen)

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
            valid_boxes = on_device([[0, height, 0, width]], cams.device).expand(cams.shape[0], -1)
    cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)
    boxes = None if valid_boxes is None else valid_boxes // patch_size
    return cams_to_pseudo_labels(cams, labels, config.low_threshold, config.high_threshold, boxes, UNDECIDED)


def pick_instance_classes(pseudo_labels: torch.Tensor, labels: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """
    One class per image for instance learning, `(B,)` int64 from 0, -1 for an image without any: of the n in its label map
    `(B, H, W)`, or in its multi-hot labels `(B, C)` if the map holds none (authors' code, which mixes up class ids here),
    number `draws % n`, where `draws` `(B,)` are whole numbers from 0.
    """
    num_classes = labels.shape[1]
    flat = pseudo_labels.flatten(1)
    flat = flat.masked_fill((flat < 0) | (flat > num_classes), 0)
    seen = torch.zeros(labels.shape[0], num_classes + 1, device=labels.device).scatter_(1, flat, 1.0)[:, 1:]
    candidates = torch.where(seen.any(dim=1, keepdim=True), seen, labels.to(seen.dtype))
    counts = candidates.count_nonzero(dim=1)
    wanted = draws.remainder(counts.clamp(min=1))
    # the first class with more than the wanted number up to it
    drawn = ((candidates > 0).cumsum(dim=1) > wanted[:, None]).to(torch.uint8).argmax(dim=1)
    return drawn.masked_fill(counts == 0, -1)


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


# The weighted sum.


class SynerNetObjective(NamedTuple):
    """Result of [`batch_objective`]: fields of `SynerNetSegmenterOutput`, `None` without labels or where not needed."""

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
    max_labels: int | None = None,
    draws: Sequence[int] | None = None,
    sum_counts: Callable | None = None,
) -> SynerNetObjective:
    """
    The loss of a batch. Terms of weight 0 are not computed, nor are the targets that only they need.

    Args:
        model ([`SynerNetModel`]): both branches.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
        outputs ([`SynerNetModelOutput`]): of `model` for `pixel_values`.
        logits (`BranchPair[torch.Tensor]`): segmentation logits of the branches, `(B, K, H, W)`; `None` without their loss.
        progress (`float`): t/T in [0, 1].
        labels, valid_boxes, loss_weights and what follows `progress`: as for the forward of the task model.

    Raises:
        ValueError: if a name in `loss_weights` is unknown.
    """
    known = model.config.loss_weights
    unknown = sorted(set(loss_weights) - set(known))
    if unknown:
        raise ValueError(f"loss_weights knows {', '.join(known)}, got {', '.join(unknown)}.")
    weights = dict.fromkeys(known, 0.0) | loss_weights
    seen = (model, pixel_values, outputs, labels, valid_boxes, weights, progress)
    targets, confidence = make_targets(*seen, max_labels)
    instances = [None, None]
    if weights["prototype_contrast"] and model.config.with_projection_head:
        instances = _embed_instances(model, pixel_values, labels, valid_boxes, targets, draws)
    processes = (gather_embeddings, sum_counts)
    losses = weighted_losses(model, outputs.pair, logits, labels, targets, instances, weights, *processes)
    return SynerNetObjective(*losses, confidence, targets.precise.pseudo_labels)


def weighted_losses(
    model,
    outputs: BranchPair,
    logits: BranchPair[torch.Tensor],
    labels: torch.Tensor,
    targets: BranchPair[SynerNetTargets],
    instances: Sequence[tuple[torch.Tensor, torch.Tensor] | None],
    weights: dict[str, float],
    gather_embeddings: Callable | None = None,
    sum_counts: Callable | None = None,
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
            losses = _branch_losses(model.config, output, branch_logits, labels, target, weights, sum_counts)
            if instance is not None:
                processes = (gather_embeddings, sum_counts)
                contrast = _prototype_contrast(model.config, branch.projection_head, *instance, *processes)
                losses["prototype_contrast"] = weights["prototype_contrast"] * contrast
            for name, loss in losses.items():
                terms.setdefault(f"loss_{name}", []).append(loss)
        total = sum((loss for losses in terms.values() for loss in losses), labels.new_zeros((), dtype=torch.float32))
    return total, {name: torch.stack(losses).sum().detach() for name, losses in terms.items()}


def _branch_losses(
    config: SynerNetConfig,
    output,
    logits: torch.Tensor,
    labels: torch.Tensor,
    target: SynerNetTargets,
    weights: dict[str, float],
    sum_counts: Callable | None,
) -> dict[str, torch.Tensor]:
    """The weighted active terms of one branch, but for the prototype contrast."""
    losses = {}
    spatial_share = weights["spatial_bce"] if target.area_shares is not None else 0.0
    if weights["cls"]:
        losses["cls"] = (
            weights["cls"] * (1 - spatial_share) * classification_loss(output.classification_logits, labels)
        )
    if spatial_share:
        losses["spatial_bce"] = spatial_share * spatial_bce_loss(output.cam_logits, labels, target.area_shares)
    if weights["cls_aux"]:
        losses["cls_aux"] = weights["cls_aux"] * classification_loss(output.auxiliary_classification_logits, labels)
    if weights["cls_token"] and config.with_class_token_head:
        losses["cls_token"] = weights["cls_token"] * classification_loss(output.class_token_logits, labels)
    if weights["patch_contrast"]:
        contrast = patch_token_contrast_loss(output.features, target.token_labels, UNDECIDED, sum_counts)
        losses["patch_contrast"] = weights["patch_contrast"] * contrast
    if weights["segmentation"]:
        ignore_index = config.semantic_loss_ignore_index
        segmentation = cross_supervised_segmentation_loss(logits, target.pseudo_labels, ignore_index, sum_counts)
        losses["segmentation"] = weights["segmentation"] * segmentation
    return losses


def _embed_instances(
    model, pixel_values, labels, valid_boxes, targets: BranchPair[SynerNetTargets], draws: Sequence[int] | None
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Per branch with instance learning the embeddings `(B, P)` of the cut images and their class ids `(B,)`."""
    config, made, instances = model.config, {}, []
    if draws is not None:
        numbers = on_device(list(draws), labels.device)
    else:
        # in evaluation mode the first class, so that the loss is the same every time (ours)
        numbers = torch.randint(2**31 if model.training else 1, labels.shape[:1], device=labels.device)
    for name, branch in model.pair._asdict().items():
        if name not in config.prototype_branches:
            instances.append(None)
            continue
        # the precise branch's label is the even mix of both CAMs; without cross-supervision each has only its own
        source = "precise" if config.cross_supervision else name
        if source not in made:
            label_map = getattr(targets, source).pseudo_labels
            class_ids = pick_instance_classes(label_map, labels, numbers)
            images = cut_instances(pixel_values, label_map, class_ids, valid_boxes, config.semantic_loss_ignore_index)
            images = model.pad(images.to(model.dtype))
            made[source] = images, model.shared_states(images), class_ids
        images, shared_states, class_ids = made[source]
        tokens = branch.encode(images, shared_states)[0]
        instances.append((branch.projection_head(branch.class_token(tokens)), class_ids))
    return instances


def _prototype_contrast(
    config: SynerNetConfig, head, embeddings: torch.Tensor, class_ids: torch.Tensor, gather_embeddings, sum_counts
) -> torch.Tensor:
    """The prototype contrast of one branch, mean over images that count; in training mode it moves the prototypes."""
    gathered, gathered_ids, own = embeddings, class_ids, slice(None)
    if head.training and gather_embeddings is not None:
        gathered, gathered_ids, own = gather_embeddings(embeddings, class_ids)
    terms, prototypes = prototype_contrast_terms(
        gathered, gathered_ids, head.prototypes, config.prototype_momentum, config.prototype_temperature
    )
    if head.training:
        head.prototypes.copy_(prototypes)
    return terms[own].sum() / shared_counts((class_ids >= 0).sum(), sum_counts)


__all__ = [
    "SynerNetTargets",
    "batch_objective",
    "coverage",
    "cut_instances",
    "label_tokens",
    "pick_instance_classes",
    "weighted_losses",
]
