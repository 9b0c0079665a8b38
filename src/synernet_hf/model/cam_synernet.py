"""Class activation maps: how they are made, compared over layers and branches, fused and turned into labels."""

from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.nn import functional as F

from .refinement_synernet import PresentClasses, ignore_outside, select_classes


T = TypeVar("T")
# a vote that is neither a class nor background; never a label, whatever the ignore index
UNDECIDED = -1


class BranchPair(NamedTuple, Generic[T]):
    """One value for each branch, for example its CAMs."""

    broad: T
    precise: T


def chosen_branches(inference_branches: str | None) -> tuple[str, ...]:
    """The branches that `"broad"`, `"precise"`, `"both"` or `None` (both) stands for."""
    if inference_branches in (None, "both"):
        return BranchPair._fields
    if inference_branches not in BranchPair._fields:
        raise ValueError(f"inference_branches must be 'broad', 'precise' or 'both', got {inference_branches!r}.")
    return (inference_branches,)


def propagate_cams(cam_logits: torch.Tensor, features: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Spreads CAMs over tokens that look alike, however far apart (paper: global attention; formula ours): each token of
    `cam_logits` `(B, C, h, w)` takes the mean of all tokens' CAMs, cut at 0, weighted by a softmax over the cosines of
    their `features` `(B, D, h, w)` divided by `temperature` (above 0). The dtype is that of `cam_logits`.
    """
    # a cosine divided by a small temperature needs float32, whatever the encoder counts in
    with torch.autocast(device_type=cam_logits.device.type, enabled=False):
        tokens = F.normalize(features.float().flatten(2), dim=1).transpose(1, 2)[:, None]
        values = cam_logits.float().relu().flatten(2).transpose(1, 2)[:, None]
        spread = F.scaled_dot_product_attention(tokens, tokens, values, scale=1 / temperature)
    return spread[:, 0].transpose(1, 2).reshape(cam_logits.shape).to(cam_logits.dtype)


def joint_features(*features: torch.Tensor) -> torch.Tensor:
    """
    One feature of several `(B, D, h, w)`, for example of both branches: `(B, n·D, h, w)`, float32, such that the cosine
    of two tokens is the mean of their cosines in each (ours).
    """
    return torch.cat([F.normalize(maps.float(), dim=1) for maps in features], dim=1)


def normalize_cams(cams: torch.Tensor) -> torch.Tensor:
    """
    Brings each image's and class's non-negative map `(B, C, H, W)` into [0, 1]: minus its minimum, divided by its
    then maximum + 1e-5 (authors' code).
    """
    cams = cams - cams.amin(dim=(-2, -1), keepdim=True)
    return cams / (cams.amax(dim=(-2, -1), keepdim=True) + 1e-5)


def mask_absent_classes(cams: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Zeroes the maps `(B, C, H, W)` of classes that multi-hot `labels` `(B, C)` do not name; `None` keeps all."""
    return cams if labels is None else cams * labels.to(cams.dtype)[:, :, None, None]


def crop_to_input(maps: torch.Tensor, size: tuple[int, int], patch_size: int) -> torch.Tensor:
    """
    Maps `(B, C, h, w)` of an image of `size`, which is padded right and bottom before the encoder where it is no
    multiple of the patch: they are then resized bilinearly to the padded size and cropped to `size`. Other maps stay
    on the token grid, which covers the image exactly.
    """
    padded = (maps.shape[-2] * patch_size, maps.shape[-1] * patch_size)
    if padded == tuple(size):
        return maps
    maps = F.interpolate(maps, size=padded, mode="bilinear", align_corners=False)
    return maps[..., : size[0], : size[1]]


def at_input_size(maps: torch.Tensor, size: tuple[int, int], patch_size: int) -> torch.Tensor:
    """Maps `(B, C, h, w)` of the token grid at the `size` = (H, W) of the input, `(B, C, H, W)` float32."""
    maps = crop_to_input(maps.float().contiguous(), size, patch_size)
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps.contiguous()
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


class BranchView:
    """
    What one branch sees in a view of images. A head runs when it is asked, the decoder once.

    Args:
        branch ([`SynerNetBranch`]): with the heads.
        class_token (`torch.Tensor` of shape `(B, D)`): after the final normalisation.
        features (`tuple[torch.Tensor, ...]`): of the layers that CAMs are read from, `(B, D, h, w)` each.
    """

    def __init__(self, branch, class_token: torch.Tensor, features: tuple[torch.Tensor, ...]):
        self.branch, self.class_token, self.features, self._logits = branch, class_token, features, None

    def split(self, parts: int) -> "list[BranchView]":
        """The views that were encoded in one batch."""
        features = zip(*(maps.chunk(parts) for maps in self.features), strict=True)
        return [
            BranchView(self.branch, token, own)
            for token, own in zip(self.class_token.chunk(parts), features, strict=True)
        ]

    @property
    def logits(self) -> torch.Tensor:
        """Segmentation logits `(B, K, h, w)`."""
        if self._logits is None:
            self._logits = self.branch.decode_head(self.features[0])
        return self._logits

    @property
    def class_token_logits(self) -> torch.Tensor:
        """Class scores `(B, C)` read from the class token."""
        return self.branch.class_token_head(self.class_token)

    @property
    def classification_logits(self) -> torch.Tensor:
        """Class scores `(B, C)` pooled from the last layer."""
        return self.branch.cam_head(self.features[0])[0]

    def cam_logits(self) -> list[torch.Tensor]:
        """CAM logits `(B, C, h, w)` of the same layers as the features."""
        last, *earlier = self.features
        return [self.branch.cam_head.cam_logits(last), *map(self.branch.auxiliary_cam_head.cam_logits, earlier)]


def read_views(
    encoder,
    pixel_values: torch.Tensor,
    scale: float = 1.0,
    flip: bool = False,
    cut: bool = False,
    branches: tuple[str, ...] = BranchPair._fields,
    seen: dict | None = None,
) -> tuple[tuple[int, int], list[BranchPair[BranchView | None]]]:
    """
    What the `branches` of `encoder` ([`SynerNetModel`]) see in images `(B, 3, H, W)` resized by `scale`, and in their
    mirror images too if `flip`: the size of these views, and each of them. Rows and columns that fill no patch are
    padded, or `cut` off. Views in `seen`, which belongs to these images alone, are not encoded again; the others are
    encoded in one batch and added to it.
    """
    size, patch_size = tuple(pixel_values.shape[-2:]), encoder.config.patch_size
    scaled = view_size = tuple(max(int(scale * side), 1) for side in size)
    if cut and min(scaled) >= patch_size:
        view_size = tuple(side // patch_size * patch_size for side in scaled)
    seen = {} if seen is None else seen
    views = [seen.setdefault((scaled, view_size, mirrored), {}) for mirrored in (False, True)[: 1 + flip]]
    missing = [(mirrored, view) for mirrored, view in enumerate(views) if not set(branches) <= set(view)]
    if missing:
        image = pixel_values
        if scaled != size:
            image = F.interpolate(image, size=scaled, mode="bilinear", align_corners=False)
        images = torch.cat([image.flip(-1) if mirrored else image for mirrored, _ in missing])
        padded = encoder.pad(images[..., : view_size[0], : view_size[1]].to(encoder.dtype))
        shared_states = encoder.shared_states(padded)
        for name, branch in zip(BranchPair._fields, encoder.pair, strict=True):
            if name in branches:
                parts = branch.view(padded, patch_size, shared_states).split(len(missing))
                for (_, view), part in zip(missing, parts, strict=True):
                    view[name] = part
    return view_size, [
        BranchPair(*(view[name] if name in branches else None for name in BranchPair._fields)) for view in views
    ]


@torch.no_grad()
def multi_scale_cams(
    model,
    pixel_values: torch.Tensor,
    present: PresentClasses | None = None,
    scales: tuple[float, ...] = (1.0, 0.5, 0.75, 1.5),
    flip: bool = True,
    plain: bool = False,
    seen: dict | None = None,
) -> BranchPair[tuple[torch.Tensor, ...]]:
    """
    CAMs of both branches summed over scales, without gradient (authors' code).

    Per scale the image and its mirror image are resized and encoded in one batch; the CAM logits of both are resized
    to the image, un-mirrored, and the larger value is kept and cut at 0. The sum over scales is normalised per image
    and class. With `config.precise_consensus` the last layer's CAM of the precise branch becomes the pixelwise minimum
    over its voting layers, so that it covers only what all of them see (paper: the objective; the minimum is ours).

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`] or [`SynerNetModel`]): whose branches see the images.
        pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images.
        present ([`PresentClasses`], *optional*): classes to keep, S per image; `None` keeps all C.
        scales (`tuple[float, ...]`, *optional*, defaults to `(1.0, 0.5, 0.75, 1.5)`): factors of height and width.
        flip (`bool`, *optional*, defaults to `True`): whether to use the mirrored image too.
        plain (`bool`, *optional*, defaults to `False`): leave out propagation and consensus.
        seen (`dict`, *optional*): views of these images that are not encoded again, see [`read_views`].

    Returns:
        `BranchPair[tuple[torch.Tensor, ...]]`: per branch the CAMs of the last layer, the auxiliary layer and
        `config.additional_cam_layers`, each `(B, S, H, W)` (`(B, C, H, W)` without `present`) in [0, 1]; 0 in slots of
        `present` that an image does not fill.
    """
    size, config, encoder = tuple(pixel_values.shape[-2:]), model.config, model.base_model
    totals = None
    for scale in scales:
        view_size, views = read_views(encoder, pixel_values, scale, flip, config.floor_scaled_views, seen=seen)

        def at_image(*logits, view_size=view_size):
            largest = None
            # the second one is of the mirrored view
            for mirrored, maps in enumerate(logits):
                # first the classes, on the token grid: at the size of the image all of them would be many times as large
                maps = maps if present is None else select_classes(maps, present.ids)
                maps = crop_to_input(maps.float(), view_size, config.patch_size)
                maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
                largest = torch.maximum(largest, maps.flip(-1)) if mirrored else maps
            return largest.relu_()

        seen_logits = [encoder.view_cam_logits(view, plain) for view in views]
        # per branch and layer
        maps = [list(map(at_image, *layers)) for layers in zip(*seen_logits, strict=True)]
        if totals is None:
            totals = maps
            continue
        for total, layers in zip(totals, maps, strict=True):
            for index, cam in enumerate(layers):
                total[index] += cam
    broad, precise = ([normalize_cams(total) for total in layers] for layers in totals)
    if config.precise_consensus and not plain:
        layers = map(config.cam_layers.index, config.voting_layers)
        precise[0] = torch.stack([precise[layer] for layer in layers]).amin(dim=0)
    if present is not None:
        filled = present.mask[:, :, None, None]
        broad, precise = ([maps * filled for maps in layers] for layers in (broad, precise))
    return BranchPair(tuple(broad), tuple(precise))


def cams_to_pseudo_labels(
    cams: torch.Tensor,
    labels: torch.Tensor,
    low: float,
    high: float,
    valid_boxes: torch.Tensor | None = None,
    ignore_index: int = 255,
) -> torch.Tensor:
    """
    Label map with an uncertain band: above `high` the strongest class, at or below `low` background, ignored between.
    With `low == high` there is no band (CAM evaluation).

    Args:
        cams (`torch.Tensor` of shape `(B, C, H, W)`): float, in [0, 1].
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot image-level labels; other classes are left out.
        low (`float`): background threshold. high (`float`): class threshold.
        valid_boxes (`torch.Tensor` of shape `(B, 4)`, *optional*):
            [top, bottom, left, right) of the real pixels; outside is ignored. `None` means everywhere.
        ignore_index (`int`, *optional*, defaults to 255): label of uncertain pixels.

    Returns:
        `torch.Tensor` of shape `(B, H, W)`, int64: 0 background, `c + 1` class `c`, or `ignore_index`.

    Raises:
        ValueError: if `low` is above `high`.
    """
    if low > high:
        raise ValueError(f"low must not be above high, got {low} and {high}; swap them.")
    strength, strongest = mask_absent_classes(cams, labels).max(dim=1)
    label_map = (strongest + 1).masked_fill(strength <= high, ignore_index).masked_fill(strength <= low, 0)
    return ignore_outside(label_map, valid_boxes, ignore_index)


def area_shares(cams: torch.Tensor, labels: torch.Tensor, coverage: float, low: float, high: float) -> torch.Tensor:
    """
    Share of the image each class should cover: its certain pixels plus `coverage` times the uncertain ones, split
    evenly among the classes that have certain pixels (authors' code). Shares count every pixel, padding included.

    Args:
        cams (`torch.Tensor` of shape `(B, C, H, W)`): float, in [0, 1].
        labels (`torch.Tensor` of shape `(B, C)`): multi-hot image-level labels.
        coverage (`float`): ρ, the share of the uncertain area that counts as foreground, at least 0.
        low (`float`): background threshold. high (`float`): class threshold.

    Returns:
        `torch.Tensor` of shape `(B, C)`, float32, in [0, 0.99]; 0 for a class without certain pixels.
    """
    states = cams_to_pseudo_labels(cams, labels, low, high, ignore_index=-1).flatten(1)
    num_labels = cams.shape[1] + 1
    counts = torch.zeros(states.shape[0], num_labels, device=cams.device)
    counts = counts.scatter_add_(1, states.clamp(min=0), torch.ones_like(states, dtype=counts.dtype))[:, 1:]
    uncertain = (states < 0).sum(dim=1, keepdim=True).float()
    has_area = counts > 0
    share = counts + max(coverage, 0.0) * uncertain / has_area.sum(dim=1, keepdim=True).clamp(min=1)
    return (share / states.shape[1]).clamp(max=0.99) * has_area


def layer_confidence(votes: torch.Tensor, ignore_index: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Agreement of several label maps of one image, for example of layers and branches (paper; counting is ours).

    Args:
        votes (`torch.Tensor` of shape `(V, B, H, W)`): int64 label maps; `ignore_index` is an uncertain vote.
        ignore_index (`int`, *optional*, defaults to 255): label of uncertain votes, which agree with none.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the share of votes equal to the majority vote, `(B, 1, H, W)` float in
        [0, 1], 0 where all are uncertain; and the majority vote, `(B, H, W)` int64, `ignore_index` there.
    """
    certain = votes != ignore_index
    equal = (votes[:, None] == votes[None]) & certain[None]
    support, winner = (equal.sum(dim=1) * certain).max(dim=0)
    return (support / votes.shape[0])[:, None], votes.gather(0, winner[None])[0]


def fusion_shares(
    broad_agreement: torch.Tensor, precise_agreement: torch.Tensor, share: float, reach: float
) -> torch.Tensor:
    """
    Share λ of the broad CAM per pixel `(B, 1, H, W)`, from each branch's agreement among its own layers `(B, 1, H, W)`
    in [0, 1] (paper; formula ours): broad / (broad + precise), kept within `reach` of `share` and in [0, 1]; `share`
    itself where neither branch agrees on anything.
    """
    total = broad_agreement + precise_agreement
    adaptive = torch.where(total > 0, broad_agreement / total.clamp(min=1e-6), share)
    return adaptive.clamp(max(share - reach, 0.0), min(share + reach, 1.0))


def fuse_cams(
    broad_cams: torch.Tensor,
    precise_cams: torch.Tensor,
    broad_share: float | torch.Tensor,
    agreed_labels: torch.Tensor | None = None,
    low: float = 0.25,
    high: float = 0.7,
    ignore_index: int = 255,
) -> torch.Tensor:
    """
    One CAM from both branches `(B, C, H, W)`: λ · broad + (1 − λ) · precise, λ a number or `(B, 1, H, W)` in [0, 1];
    and at confident pixels the agreed label (paper). `agreed_labels` `(B, H, W)` are `ignore_index` elsewhere. At an
    agreed class its value is raised to at least `high` + 1e-3 and the others lowered to at most `high`; at agreed
    background all are lowered to at most `low` − 1e-3.
    """
    fused = broad_share * broad_cams + (1 - broad_share) * precise_cams
    if agreed_labels is None:
        return fused
    agreed = agreed_labels[:, None]
    class_ids = torch.arange(1, fused.shape[1] + 1, device=fused.device)[None, :, None, None]
    certain_class = (agreed > 0) & (agreed != ignore_index)
    lowered = torch.where(certain_class, fused.clamp(max=high), fused)
    lowered = torch.where(agreed == 0, lowered.clamp(max=max(low - 1e-3, 0.0)), lowered)
    return torch.where(agreed == class_ids, fused.clamp(min=high + 1e-3), lowered)


def fuse_branches(
    config: Any, cams: BranchPair[tuple[torch.Tensor, ...]], labels: torch.Tensor
) -> tuple[BranchPair[torch.Tensor], torch.Tensor]:
    """
    The fused CAM that teaches each branch, and the confidence of every pixel (paper; the arithmetic is ours).

    Args:
        config ([`SynerNetConfig`]): thresholds, shares and the kind of fusion.
        cams (`BranchPair[tuple[torch.Tensor, ...]]`): of [`multi_scale_cams`], S classes.
        labels (`torch.Tensor` of shape `(B, S)`): multi-hot, the classes among these that each image has.

    Returns:
        `tuple[BranchPair[torch.Tensor], torch.Tensor]`: per taught branch `(B, S, H, W)` in [0, 1]; and the share of
        layer and branch votes equal to the majority, `(B, 1, H, W)` in [0, 1].
    """
    broad, precise = cams.broad[0], cams.precise[0]
    low, high = config.low_threshold, config.high_threshold
    voting = [config.cam_layers.index(layer) for layer in config.voting_layers]
    votes = [
        torch.stack([cams_to_pseudo_labels(maps[i], labels, low, high, ignore_index=UNDECIDED) for i in voting])
        for maps in cams
    ]
    confidence, agreed = layer_confidence(torch.cat(votes), UNDECIDED)
    if not config.cross_supervision:
        return BranchPair(broad, precise), confidence
    shares = (config.broad_share_in_broad_label, config.broad_share_in_precise_label)
    if config.fusion == "fixed":
        return BranchPair(*(fuse_cams(broad, precise, share) for share in shares)), confidence
    agreement = [layer_confidence(branch_votes, UNDECIDED)[0] for branch_votes in votes]
    agreed = agreed.masked_fill(confidence[:, 0] < config.confidence_threshold, UNDECIDED)
    fused = []
    for share in shares:
        adaptive = fusion_shares(*agreement, share, config.fusion_range)
        fused.append(fuse_cams(broad, precise, adaptive, agreed, low, high, UNDECIDED))
    return BranchPair(*fused), confidence


def lower_unlikely_classes(logits: torch.Tensor, log_probabilities: torch.Tensor, weight: float) -> torch.Tensor:
    """
    Segmentation logits `(B, K, h, w)`, each class but the background lowered by `weight` times the gap between its
    log-probability in `log_probabilities` `(B, C)` and that of the image's likeliest class (ours).
    """
    penalty = weight * (log_probabilities.amax(dim=1, keepdim=True) - log_probabilities)
    return logits - F.pad(penalty, (1, 0))[..., None, None]


__all__ = [
    "BranchPair",
    "area_shares",
    "cams_to_pseudo_labels",
    "fuse_branches",
    "fuse_cams",
    "layer_confidence",
    "mask_absent_classes",
    "multi_scale_cams",
    "normalize_cams",
]
