"""SynerNet's losses, each a pure function that counts in float32 whatever its inputs are."""

import math

import torch
from torch.nn import functional as F


def classification_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """
    Multi-label soft-margin loss of pooled class logits, for the last and the auxiliary classifier (authors' code).

    Args:
        logits (`torch.Tensor` of shape `(B, C)`): unnormalised. labels (`torch.Tensor` of shape `(B, C)`): multi-hot.

    Returns:
        `torch.Tensor`: scalar, mean over images and classes.
    """
    return F.multilabel_soft_margin_loss(logits.float(), labels.float())


def _area_targets(cam_logits: torch.Tensor, labels: torch.Tensor, area_shares: torch.Tensor) -> torch.Tensor:
    """`(B, C, N)` bool: per present class the entries at or above the value whose rank its area share names."""
    num_tokens = cam_logits.shape[-1]
    ranks = (num_tokens * area_shares).round().long().clamp(max=num_tokens - 1)
    values = cam_logits.sort(dim=-1, descending=True).values.gather(-1, ranks[..., None])
    return (cam_logits >= values) & labels.bool()[..., None]


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
    targets = _area_targets(logits.detach(), labels, area_shares)
    losses = F.binary_cross_entropy_with_logits(logits, targets.float(), reduction="none").mean(dim=1)
    positive = targets.any(dim=1)
    foreground = (losses * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    background = (losses * ~positive).sum(dim=1) / (~positive).sum(dim=1).clamp(min=1)
    return (0.9 * foreground + 0.1 * background).mean()


def patch_token_contrast_loss(
    features: torch.Tensor, token_labels: torch.Tensor, ignore_index: int = 255
) -> torch.Tensor:
    """
    Patch-token contrast (ToCo): tokens of one label should look alike, tokens of different labels should not.

    ½ · (1 − Σ|cos| of equal pairs / (their number + 1)) + ½ · Σ|cos| of unequal pairs / (their number + 1), over all
    ordered pairs of different tokens of one image, neither ignored; sums run over the batch.

    Args:
        features (`torch.Tensor` of shape `(B, D, h, w)`): patch features.
        token_labels (`torch.Tensor` of shape `(B, h, w)`): int64 label of each token.
        ignore_index (`int`, *optional*, defaults to 255): label of tokens that are left out.

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
    attract = 1 - (similarity * same).sum() / (same.sum() + 1)
    repel = (similarity * different).sum() / (different.sum() + 1)
    return 0.5 * (attract + repel)


def cross_supervised_segmentation_loss(
    logits: torch.Tensor, pseudo_labels: torch.Tensor, ignore_index: int = 255
) -> torch.Tensor:
    """
    Cross-entropy of one branch's segmentation against a pseudo-label made with the other's help.

    Half the mean over background pixels plus half the mean over foreground pixels. A group without pixels adds 0
    (the authors' mean over nothing is NaN).

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): resized bilinearly to the label map.
        pseudo_labels (`torch.Tensor` of shape `(B, H, W)`): int64, 0 background, 1..K−1 classes.
        ignore_index (`int`, *optional*, defaults to 255): label of pixels left out.

    Returns:
        `torch.Tensor`: scalar.
    """
    logits = logits.float()
    if logits.shape[-2:] != pseudo_labels.shape[-2:]:
        logits = F.interpolate(logits, size=pseudo_labels.shape[-2:], mode="bilinear", align_corners=False)
    losses = F.cross_entropy(logits, pseudo_labels, ignore_index=ignore_index, reduction="none")
    background = pseudo_labels == 0
    foreground = ~background & (pseudo_labels != ignore_index)
    return 0.5 * sum((losses * group).sum() / group.sum().clamp(min=1) for group in (background, foreground))


def prototype_contrast_terms(
    embeddings: torch.Tensor,
    class_ids: torch.Tensor,
    prototypes: torch.Tensor,
    momentum: float = 0.01,
    temperature: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The terms of [`prototype_contrast_loss`], one per image `(B,)` (0 where the class id is negative), and the
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


def prototype_contrast_loss(
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
        `tuple[torch.Tensor, torch.Tensor]`: scalar mean over images that count (0 if none), and the new prototypes.
    """
    terms, new_prototypes = prototype_contrast_terms(embeddings, class_ids, prototypes, momentum, temperature)
    return terms.sum() / (class_ids >= 0).sum().clamp(min=1), new_prototypes


__all__ = [
    "classification_loss",
    "cross_supervised_segmentation_loss",
    "patch_token_contrast_loss",
    "prototype_contrast_loss",
    "prototype_contrast_terms",
    "spatial_bce_loss",
]
