"""Pixel-adaptive refinement: class maps spread to neighbouring pixels of like colour. No parameters."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


# floats of a working set that stays in a processor's cache
_CACHED_FLOATS = 2**20
# rows and columns of the eight directions, in units of a dilation
_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))


class SynerNetPixelAdaptiveRefinement(nn.Module):
    """
    Pixel-adaptive refinement (PAR) of AFA and ToCo: each step replaces a map by a weighted mean over 8 neighbours at
    each of several dilations; the weights come from colour and distance and depend on the image alone.

    Args:
        dilations (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 4, 8, 12, 24)`): Neighbour distances in pixels.
            Source: authors' code.
        num_iterations (`int`, *optional*, defaults to 10): Number of steps. Source: authors' code.
    """

    colour_temperature = 0.3
    position_weight = 0.01

    def __init__(self, dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24), num_iterations: int = 10):
        super().__init__()
        if not dilations or min(dilations) < 1:
            raise ValueError(f"dilations must be positive integers, got {tuple(dilations)}.")
        self.dilations = tuple(dilations)
        self.num_iterations = num_iterations

    def _neighbours(self, maps: torch.Tensor):
        """Yields the 8 · len(dilations) shifted views of `maps` `(B, C, H, W)`, borders replicated."""
        height, width = maps.shape[-2:]
        reach = max(self.dilations)
        padded = F.pad(maps, [reach] * 4, mode="replicate")
        for dilation in self.dilations:
            for row, column in _DIRECTIONS:
                top, left = reach + row * dilation, reach + column * dilation
                yield padded[..., top : top + height, left : left + width]

    @torch.no_grad()
    def affinity(self, images: torch.Tensor) -> torch.Tensor:
        """
        Weights `(B, 8 * len(dilations), H, W)` of every pixel's neighbours in `images` `(B, 3, H, W)` in [0, 1]; over
        the neighbours they sum to 1.01. No gradient.
        """
        colour = []
        for part in images.split(_part_size(images, 8 * len(self.dilations))):
            neighbours = torch.stack(list(self._neighbours(part)), dim=1)
            # the formula written out: `std` over a dimension that is not the last is slow on a CPU
            centred = neighbours - neighbours.mean(dim=1, keepdim=True)
            deviation = centred.square_().sum(dim=1, keepdim=True).div_(len(centred[0]) - 1).sqrt_().add_(1e-8)
            difference = neighbours.sub_(part[:, None]).abs_().div_(deviation).div_(self.colour_temperature)
            colour.append(difference.square_().mean(dim=2).neg_().softmax(dim=1))

        lengths = [math.hypot(row, column) * dilation for dilation in self.dilations for row, column in _DIRECTIONS]
        distances = on_device(lengths, images.device).to(images.dtype)
        position = -(distances / (distances.std() + 1e-8) / self.colour_temperature).square()
        return torch.cat(colour).add_(self.position_weight * position.softmax(dim=0)[None, :, None, None])

    def propagate(self, affinity: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """Runs the steps on `maps` `(B, C, H, W)` with the weights of [`~SynerNetPixelAdaptiveRefinement.affinity`]."""
        size, propagated = _part_size(maps), torch.zeros_like(maps)
        for weights, part, result in zip(*(x.split(size) for x in (affinity, maps, propagated)), strict=True):
            # maps of zeros stay zero, and asking for them costs a GPU more than running them
            filled = part.flatten(2).any(dim=2).any(dim=0) if maps.device.type == "cpu" else slice(None)
            part = part[:, filled]
            if part.numel() == 0:
                continue
            for _ in range(self.num_iterations):
                refined = torch.zeros_like(part)
                for index, neighbour in enumerate(self._neighbours(part)):
                    refined.addcmul_(weights[:, index : index + 1], neighbour)
                part = refined
            result[:, filled] = part
        return propagated

    def forward(self, images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        """
        Args:
            images (`torch.Tensor` of shape `(B, 3, H, W)`): float, in [0, 1].
            maps (`torch.Tensor` of shape `(B, C, h, w)`): float maps, resized bilinearly to the images if needed.

        Returns:
            `torch.Tensor` of shape `(B, C, H, W)`: the refined maps, of the maps' dtype.
        """
        if maps.shape[-2:] != images.shape[-2:]:
            maps = F.interpolate(maps, size=images.shape[-2:], mode="bilinear", align_corners=False)
        return self.propagate(self.affinity(images), maps)


def _part_size(maps: torch.Tensor, copies: int = 1) -> int:
    """How many images of a batch to work on at once: on a CPU as many as its cache holds, else all."""
    if maps.device.type != "cpu":
        return max(len(maps), 1)
    return max(_CACHED_FLOATS // max(maps[:1].numel() * copies, 1), 1)


class PresentClasses(NamedTuple):
    """
    The classes that each image of a batch has, packed to the front: `ids` `(B, S)`, int64, from 0 without background,
    and `mask` `(B, S)`, bool, true in filled slots. S is the largest number of classes of an image, at least 1. Slots
    that an image does not fill hold ids of classes it lacks.
    """

    ids: torch.Tensor
    mask: torch.Tensor


def on_device(values: list, device: torch.device) -> torch.Tensor:
    """`torch.tensor(values)` on a device, without waiting for it."""
    return torch.tensor(values).to(device, non_blocking=True)


def present_classes(labels: torch.Tensor, max_labels: int | None = None) -> PresentClasses:
    """
    The [`PresentClasses`] of multi-hot `labels` `(B, C)`; `max_labels`, the largest number of classes of an image, is
    read off them unless given.
    """
    present = labels > 0
    if max_labels is None:
        max_labels = int(present.sum(dim=1).max()) if len(labels) else 0
    slots = max(max_labels, 1)
    ids = present.int().argsort(dim=1, descending=True, stable=True)[:, :slots]
    return PresentClasses(ids, present.gather(1, ids))


def select_classes(maps: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`(n·B, C, h, w)` maps of n views → `(n·B, S, h, w)`: the classes `ids` `(B, S)`."""
    ids = ids.repeat(maps.shape[0] // ids.shape[0], 1)
    return maps.gather(1, ids[:, :, None, None].expand(-1, -1, *maps.shape[-2:]))


def spread_classes(maps: torch.Tensor, present: PresentClasses, num_classes: int) -> torch.Tensor:
    """Maps `(B, S, ...)` of the present classes → `(B, C, ...)`; 0 for absent classes."""
    spread = maps.new_zeros(maps.shape[0], num_classes, *maps.shape[2:])
    ids = present.ids.reshape(*present.ids.shape, *[1] * (maps.ndim - 2)).expand_as(maps)
    mask = present.mask.reshape(*present.mask.shape, *[1] * (maps.ndim - 2))
    return spread.scatter_(1, ids, maps * mask)


@torch.no_grad()
def refine_pseudo_labels(
    images: torch.Tensor,
    cams: torch.Tensor,
    labels: torch.Tensor,
    low: float,
    high: float,
    valid_boxes: torch.Tensor | None = None,
    ignore_index: int = 255,
    refinement: SynerNetPixelAdaptiveRefinement | None = None,
) -> torch.Tensor:
    """
    Label maps from CAMs under two background hypotheses, refined by the colours of the image (authors' code, AFA).

    For each of the constant background planes `high` and `low`, the plane and the CAMs of the image's own classes
    go through a softmax at half resolution, refinement, and an argmax at full resolution. A pixel is a class where
    the `high` hypothesis says so, background where both say background, and ignored elsewhere.

    Args:
        images (`torch.Tensor` of shape `(B, 3, H, W)`): float, in [0, 1], full resolution.
        cams (`torch.Tensor` of shape `(B, C, h, w)` or `(M, B, C, h, w)`): Float, in [0, 1], resized bilinearly to the
            images where their size is another; NaN counts as 0. M sets of CAMs of the same images share one affinity.
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot image-level labels.
        low (`float`): lower background plane. high (`float`): upper background plane.
        valid_boxes (`torch.Tensor` of shape `(B, 4)`, *optional*): see [`ignore_outside`].
        ignore_index (`int`, *optional*, defaults to 255): label of undecided pixels.
        refinement (`SynerNetPixelAdaptiveRefinement`, *optional*): the refinement; the authors' by default.

    Returns:
        `torch.Tensor` of shape `(B, H, W)` or `(M, B, H, W)`, int64: 0 background, `c + 1` class `c`, or
        `ignore_index`.
    """
    present = present_classes(labels)
    sets = cams if cams.ndim == 5 else (cams,)
    own = [select_classes(maps, present.ids) for maps in sets]
    label_maps = refine_present(images, own, present, low, high, valid_boxes, ignore_index, refinement)
    return torch.stack(label_maps) if cams.ndim == 5 else label_maps[0]


@torch.no_grad()
def refine_present(
    images: torch.Tensor,
    cams: Sequence[torch.Tensor],
    present: PresentClasses,
    low: float,
    high: float,
    valid_boxes: torch.Tensor | None = None,
    ignore_index: int = 255,
    refinement: SynerNetPixelAdaptiveRefinement | None = None,
) -> list[torch.Tensor]:
    """[`refine_pseudo_labels`] of M sets of CAMs `(B, S, h, w)` of the `present` classes: M label maps `(B, H, W)`."""
    refinement = refinement or SynerNetPixelAdaptiveRefinement()
    size = images.shape[-2:]
    half = [max(side // 2, 1) for side in size]
    small_images = F.interpolate(images.float(), size=half, mode="bilinear", align_corners=False)

    scores = []
    for maps in cams:
        maps = maps.float().nan_to_num(0.0)
        if maps.shape[-2:] != size:
            maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
        own = F.interpolate(maps, size=half, mode="bilinear", align_corners=False)
        own = own.masked_fill(~present.mask[:, :, None, None], float("-inf"))
        for background in (high, low):
            scores.append(torch.cat([torch.full_like(own[:, :1], background), own], dim=1).softmax(dim=1))
    refined = refinement(small_images, torch.cat(scores, dim=1))
    refined = F.interpolate(refined, size=size, mode="bilinear", align_corners=False)
    # the indices of `max` are those of `argmax`, several times as fast on a CPU
    winners = [part.max(dim=1).indices for part in refined.chunk(len(scores), dim=1)]

    class_ids = F.pad(present.ids + 1, (1, 0))
    label_maps = []
    for high_winner, low_winner in zip(winners[::2], winners[1::2], strict=True):
        decided = class_ids.gather(1, high_winner.flatten(1)).view_as(high_winner)
        decided = decided.masked_fill((high_winner == 0) & (low_winner != 0), ignore_index)
        label_maps.append(ignore_outside(decided, valid_boxes, ignore_index))
    return label_maps


@torch.no_grad()
def refine_maps(config: Any, pixel_values: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """
    Maps `(n, h, w)` of one image, at least 0, refined by its colours at half their size, as labels are in training, and
    resized back (ours). A constant map stays as it is.

    Args:
        config ([`SynerNetConfig`]): dilations and steps of the refinement, mean and deviation of the colours.
        pixel_values (`torch.Tensor` of shape `(3, h, w)`): the normalised image, on the device of the maps.
        maps (`torch.Tensor` of shape `(n, h, w)`): CAMs or probabilities.

    Returns:
        `torch.Tensor` of shape `(n, h, w)`: float32.
    """
    image = denormalize(pixel_values, config.image_mean, config.image_std)
    half = [max(side // 2, 1) for side in maps.shape[1:]]
    image, small = (
        F.interpolate(values[None].float(), size=half, mode="bilinear", align_corners=False)
        for values in (image, maps)
    )
    refinement = SynerNetPixelAdaptiveRefinement(config.refinement_dilations, config.refinement_iterations)
    # a pixel's weights sum to 1 + `position_weight`
    refined = refinement(image, small) / (1 + refinement.position_weight) ** refinement.num_iterations
    return F.interpolate(refined, size=maps.shape[1:], mode="bilinear", align_corners=False)[0]


def ignore_outside(label_map: torch.Tensor, valid_boxes: torch.Tensor | None, ignore_index: int = 255) -> torch.Tensor:
    """
    Label maps `(B, H, W)` with `ignore_index` outside the `valid_boxes` `(B, 4)`, [top, bottom, left, right) of the
    real pixels; `None` means everywhere. The given label maps stay as they are.
    """
    if valid_boxes is None:
        return label_map
    return label_map.masked_fill(~box_mask(valid_boxes, label_map.shape[-2:]), ignore_index)


def box_mask(valid_boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`(B, H, W)` bool mask, true inside the [top, bottom) × [left, right) of `valid_boxes` `(B, 4)`."""
    top, bottom, left, right = valid_boxes[:, :, None, None].unbind(dim=1)
    rows = torch.arange(size[0], device=valid_boxes.device)[None, :, None]
    columns = torch.arange(size[1], device=valid_boxes.device)[None, None, :]
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def denormalize(pixel_values: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """
    Normalised images `(B, 3, H, W)` back to [0, 1], float32, in steps of 1/255. All 256 levels of an 8-bit image come
    back exactly (ours; the authors' code truncates and loses some to rounding).
    """
    mean, std = (on_device(values, pixel_values.device)[:, None, None] for values in (mean, std))
    return ((pixel_values.float() * std + mean) * 255).round().clamp(0, 255) / 255


def masks_to_boxes(pixel_mask: torch.Tensor) -> torch.Tensor:
    """[top, bottom, left, right) `(B, 4)` int64 around the ones of each mask in `pixel_mask` `(B, H, W)`."""
    boxes = []
    for axis in (2, 1):
        filled = (pixel_mask > 0).any(dim=axis).int()
        first, last = filled.argmax(dim=1), filled.shape[1] - filled.flip(1).argmax(dim=1)
        boxes += [first, torch.where(filled.any(dim=1), last, first)]
    return torch.stack(boxes, dim=1)


__all__ = [
    "PresentClasses",
    "SynerNetPixelAdaptiveRefinement",
    "denormalize",
    "ignore_outside",
    "present_classes",
    "refine_present",
    "refine_pseudo_labels",
]
