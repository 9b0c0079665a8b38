"""Instance learning: images with one class left in them, and their embeddings gathered from every process."""

import torch
from torch.nn import functional as F

from .refinement_synernet import box_mask


def pick_instance_classes(pseudo_labels: torch.Tensor, labels: torch.Tensor, draw: bool = True) -> torch.Tensor:
    """
    One class per image for instance learning, drawn at random from those in its label map, or from its image-level
    labels if the map holds none (authors' code, which mixes up class ids here).

    Args:
        pseudo_labels (`torch.Tensor` of shape `(B, H, W)`): int64 label maps.
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot.
        draw (`bool`, *optional*, defaults to `True`): whether to draw; otherwise the first of the classes is taken, so
            that a loss in evaluation mode is the same every time (ours).

    Returns:
        `torch.Tensor` of shape `(B,)`: int64, 0-based foreground class, −1 for an image without any.
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
    Images in which only one class and the undecided pixels inside the valid box are left (authors' code).

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
        pseudo_labels (`torch.Tensor` of shape `(B, H, W)`): int64 label maps.
        class_ids (`torch.Tensor` of shape `(B,)`): int64, 0-based foreground class to keep.
        valid_boxes (`torch.Tensor` of shape `(B, 4)`, *optional*): [top, bottom, left, right) of real pixels.
        ignore_index (`int`, *optional*, defaults to 255): label of undecided pixels.

    Returns:
        `torch.Tensor` of shape `(B, 3, H, W)`: 0 wherever something else was.
    """
    keep = (pseudo_labels == (class_ids + 1)[:, None, None]) | (pseudo_labels == ignore_index)
    if valid_boxes is not None:
        keep &= box_mask(valid_boxes, pseudo_labels.shape[-2:])
    return pixel_values * keep[:, None]


def gather_in_rank_order(
    embeddings: torch.Tensor, class_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """
    Every process's embeddings in rank order: prototypes must see all images, in one order, to stay equal everywhere.
    With several processes all of them must call this together; their batches may differ in size.

    Args:
        embeddings (`torch.Tensor` of shape `(n, P)`): of the own images.
        class_ids (`torch.Tensor` of shape `(n,)`): int64, of the own images.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, slice]`: embeddings `(N, P)`, with gradient for the own ones only; class ids
        `(N,)`, −1 where a process has fewer images than another; and where the own ones lie.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return embeddings, class_ids, slice(None)
    ranks, rank, count = distributed.get_world_size(), distributed.get_rank(), class_ids.shape[0]
    counts = [torch.zeros(1, dtype=torch.long, device=class_ids.device) for _ in range(ranks)]
    distributed.all_gather(counts, torch.full_like(counts[0], count))
    longest = int(torch.cat(counts).max())
    embeddings = F.pad(embeddings, (0, 0, 0, longest - count))
    class_ids = F.pad(class_ids, (0, longest - count), value=-1)
    all_embeddings = [torch.empty_like(embeddings) for _ in range(ranks)]
    all_ids = [torch.empty_like(class_ids) for _ in range(ranks)]
    distributed.all_gather(all_embeddings, embeddings.detach().contiguous())
    distributed.all_gather(all_ids, class_ids)
    all_embeddings[rank] = embeddings
    return torch.cat(all_embeddings), torch.cat(all_ids), slice(rank * longest, rank * longest + count)


__all__ = ["cut_instances", "gather_in_rank_order", "pick_instance_classes"]
