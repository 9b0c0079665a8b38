"""SynerNet: two ViT branches, a broad and a precise one, that teach each other segmentation from image labels."""

import inspect

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .branch_synernet import (
    SynerNetBranch,
    SynerNetProjectionHead,
    SynerNetSharedEncoder,
    copy_encoder,
    lower_unlikely_classes,
    pooling_arguments,
    select_states,
)
from .cam_synernet import crop_to_input, joint_features, multi_scale_cams, normalize_cams, propagate_cams
from .configuration_synernet import SynerNetConfig
from .instance_synernet import cut_instances, gather_in_rank_order, pick_instance_classes
from .loss_synernet import (
    classification_loss,
    cross_supervised_segmentation_loss,
    patch_token_contrast_loss,
    prototype_contrast_terms,
    spatial_bce_loss,
)
from .outputs_synernet import SynerNetBranchOutput, SynerNetCamOutput, SynerNetModelOutput, SynerNetSegmenterOutput
from .refinement_synernet import boxes_of, unit_images
from .supervision_synernet import (
    BRANCHES,
    SynerNetSupervision,
    chosen_branches,
    fuse_branches,
    make_supervision,
)


class SynerNetPreTrainedModel(PreTrainedModel):
    """Weight initialisation and loading for every SynerNet model."""

    config: SynerNetConfig
    base_model_prefix = "synernet"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["SynerNetBranch", "SynerNetSharedEncoder"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SynerNetProjectionHead):
            init.zeros_(module.prototypes)


class SynerNetModel(SynerNetPreTrainedModel):
    """The broad and the precise branch, without losses."""

    def __init__(self, config: SynerNetConfig):
        super().__init__(config)
        depth = config.backbone_config.num_hidden_layers
        for name in ("auxiliary_layer_index", "confidence_layers"):
            given = getattr(config, name)
            for index in given if isinstance(given, (list, tuple)) else (given,):
                if index is not None and not -depth - 1 <= index <= depth:
                    raise ValueError(
                        f"`{name}` must pick out of the encoder's {depth + 1} hidden states, got {index}."
                    )
        if config.shared_encoder_layers >= depth:
            raise ValueError(
                f"`shared_encoder_layers` must leave each branch one of the encoder's {depth} blocks, got "
                f"{config.shared_encoder_layers}."
            )
        self.shared_encoder = SynerNetSharedEncoder(config) if config.shared_encoder_layers else None
        self.broad_branch = SynerNetBranch(config, config.broad_pooling_top_k or config.pooling_top_k)
        self.precise_branch = SynerNetBranch(config, config.pooling_top_k)
        self.post_init()

    def branch(self, name: str) -> SynerNetBranch:
        """The branch called `name`, `"broad"` or `"precise"`."""
        return {"broad": self.broad_branch, "precise": self.precise_branch}[name]

    def get_input_embeddings(self) -> nn.Module:
        """The patch embedding of the shared blocks, or else of the broad branch; the precise one has its own."""
        return (self.shared_encoder or self.broad_branch).backbone.get_input_embeddings()

    def pad(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pads `(B, 3, H, W)` right and bottom with 0, the mean colour, to multiples of the patch."""
        patch_size = self.config.patch_size
        missing = [-side % patch_size for side in pixel_values.shape[-2:]]
        return F.pad(pixel_values, (0, missing[1], 0, missing[0])) if any(missing) else pixel_values

    def load_encoder(self, backbone: nn.Module):
        """Copies the weights of `backbone`, a whole encoder, into the shared blocks and both branches."""
        if self.shared_encoder is not None:
            copy_encoder(backbone, self.shared_encoder.backbone)
        for name in BRANCHES:
            copy_encoder(backbone, self.branch(name).backbone, self.config.shared_encoder_layers)

    def shared_states(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
        """States of the shared blocks for padded images `(B, 3, H, W)`, or `None` where none are shared."""
        return None if self.shared_encoder is None else self.shared_encoder(pixel_values)

    def cam_logits(self, pixel_values: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        """
        CAM logits of both branches that labels, areas and votes are read from, decoder left out. A branch with a
        propagation temperature has them spread over tokens that look alike to both branches, and then none is negative;
        the outputs of `forward`, which the losses act on, are always as the classifier gives them.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): normalised images of any size.

        Returns:
            `dict[str, tuple[torch.Tensor, ...]]`: for `"broad"` and `"precise"` the last, the auxiliary and the
            `config.additional_cam_layers` layers' CAM logits, `(B, C, h, w)`, or `(B, C, H, W)` where the image
            had to be padded.
        """
        padded = self.pad(pixel_values)
        shared_states = self.shared_states(padded)
        read = {name: self.branch(name).cam_logits(padded, self.config.patch_size, shared_states) for name in BRANCHES}
        return self._spread(read, tuple(pixel_values.shape[-2:]))

    @torch.no_grad()
    def cam_logits_of(
        self, outputs: SynerNetModelOutput, size: tuple[int, int]
    ) -> dict[str, tuple[torch.Tensor, ...]] | None:
        """
        What [`~SynerNetModel.cam_logits`] gives for images of `size` = (H, W) that `forward` has seen, out of its
        `outputs` of both branches; `None` where the two see an image differently, one cutting what the other pads.
        """
        if self.config.floor_scaled_views and any(side % self.config.patch_size for side in size):
            return None
        read = {name: self.branch(name).cam_logits_of(outputs[name]) for name in BRANCHES}
        return self._spread(read, size)

    def _spread(
        self, read: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]], size: tuple[int, int]
    ) -> dict[str, tuple[torch.Tensor, ...]]:
        """
        The CAM logits and features that the branches have `read`, layer by layer, as CAM logits for images of `size`:
        propagated where a branch has a temperature, tokens being alike as far as both branches see them so.
        """
        logits, alike = {}, None
        for name in BRANCHES:
            maps, temperature = read[name][0], self.config.propagation_temperature(name)
            if temperature is not None:
                alike = alike or list(map(joint_features, *(features for _, features in read.values())))
                maps = [propagate_cams(cam, features, temperature) for cam, features in zip(maps, alike, strict=True)]
            logits[name] = tuple(crop_to_input(cam, size, self.config.patch_size) for cam in maps)
        return logits

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        branches: tuple[str, ...] = BRANCHES,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs,
    ) -> SynerNetModelOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): normalised images of any size; padded right
                and bottom with 0 to multiples of the patch, so that maps have `ceil(H / p)` × `ceil(W / p)` tokens.
            branches (`tuple[str, ...]`, *optional*, defaults to both): which branches to run.
            output_hidden_states (`bool` or `list[int]`, *optional*): whether to return hidden states, or which of them;
                `None` stands in the place of the others.
            output_attentions (`bool`, *optional*): whether to return attention maps.

        Returns:
            [`SynerNetModelOutput`]

        Raises:
            ValueError: if attention maps are asked of a model whose branches share blocks.
        """
        keep_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if keep_attentions and self.shared_encoder is not None:
            raise ValueError("Attention maps need `shared_encoder_layers` = 0; leave out output_attentions.")
        pixel_values = self.pad(pixel_values)
        shared_states = self.shared_states(pixel_values)
        outputs = {
            name: self.branch(name)(pixel_values, self.config.patch_size, shared_states, bool(keep_attentions))
            for name in branches
        }
        states = tuple(state for output in outputs.values() for state in output.hidden_states)
        attentions = tuple(item for output in outputs.values() for item in output.attentions or ())
        return SynerNetModelOutput(
            **outputs,
            last_hidden_state=torch.cat([output.tokens for output in outputs.values()], dim=-1),
            hidden_states=select_states(states, keep_states),
            attentions=attentions if keep_attentions else None,
        )


class SynerNetForWeaklySupervisedSegmentation(SynerNetPreTrainedModel):
    """SynerNet with its losses: trained from image-level labels, gives segmentation and CAMs."""

    def __init__(self, config: SynerNetConfig):
        super().__init__(config)
        if config.num_foreground_labels < 1:
            raise ValueError(
                f"SynerNet needs background and at least one class, got {config.num_labels} labels; set `id2label`."
            )
        self.synernet = SynerNetModel(config)
        self.post_init()

    @classmethod
    def from_backbone_pretrained(
        cls,
        name_or_path: str,
        num_labels: int | None = None,
        id2label: dict[int, str] | None = None,
        backbone_overrides: dict | None = None,
        **config_fields,
    ) -> "SynerNetForWeaklySupervisedSegmentation":
        r"""
        Starts a SynerNet whose two encoders hold the weights of a pretrained ViT; heads are drawn at random.

        Args:
            name_or_path (`str`): Hub id or folder of a ViT-family model, for example `google/vit-base-patch16-224`.
            num_labels (`int`, *optional*): labels with background, needed unless `id2label` is given.
            id2label (`dict[int, str]`, *optional*): label names, 0 the background.
            backbone_overrides (`dict`, *optional*): encoder config fields to change, for example `qkv_bias`; weights
                that then have no place are dropped, as they are by the authors' code.
            config_fields: further fields of [`SynerNetConfig`].

        Returns:
            [`SynerNetForWeaklySupervisedSegmentation`]

        Raises:
            ValueError: if neither `num_labels` nor `id2label` is given, or a field is not one of the config's.
            OSError: if the encoder cannot be found.
        """
        if id2label is None and num_labels is None:
            raise ValueError("Got neither num_labels nor id2label; pass one, counting background as label 0.")
        if id2label is not None and num_labels not in (None, len(id2label)):
            raise ValueError(
                f"Got num_labels={num_labels} and an id2label with {len(id2label)} labels; pass one of them."
            )
        unknown = sorted(set(config_fields) - set(inspect.signature(SynerNetConfig).parameters))
        if unknown:
            raise ValueError(f"SynerNetConfig has no field {', '.join(unknown)}; see its documentation for the names.")
        backbone_config = AutoConfig.from_pretrained(name_or_path, **(backbone_overrides or {}))
        backbone = AutoModel.from_pretrained(
            name_or_path, config=backbone_config, **pooling_arguments(backbone_config)
        )
        # the encoder's own labels are of another task
        fields = {
            key: value for key, value in backbone.config.to_dict().items() if key not in ("id2label", "label2id")
        }
        labels = {"id2label": id2label} if id2label is not None else {"num_labels": num_labels}
        config = SynerNetConfig(backbone_config=type(backbone.config)(**fields), **labels, **config_fields)
        model = cls(config)
        model.synernet.load_encoder(backbone)
        return model

    def cam_logits(self, pixel_values: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
        """See [`SynerNetModel.cam_logits`]."""
        return self.synernet.cam_logits(pixel_values)

    @torch.no_grad()
    def generate_cams(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        scales: tuple[float, ...] | None = None,
        flip: bool | None = None,
    ) -> SynerNetCamOutput:
        r"""
        Multi-scale CAMs of both branches and their fusion, without gradient.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): normalised images of any size.
            labels (`torch.Tensor` of shape `(B, C)`, *optional*): multi-hot; absent classes are zeroed.
            scales (`tuple[float, ...]`, *optional*, defaults to `config.cam_scales`): factors of height and width.
            flip (`bool`, *optional*, defaults to `config.cam_flip`): whether to use the mirrored image too.

        Returns:
            [`SynerNetCamOutput`]
        """
        if labels is not None:
            self._check_labels(labels, pixel_values)
        scales = self.config.cam_scales if scales is None else scales
        flip = self.config.cam_flip if flip is None else flip
        cams = multi_scale_cams(self, pixel_values, labels, scales, flip)
        present = torch.ones_like(cams["broad"][0][..., 0, 0]) if labels is None else labels
        fused, confidence = fuse_branches(self.config, cams, present)
        return SynerNetCamOutput(
            broad_cams=cams["broad"][0],
            precise_cams=cams["precise"][0],
            broad_aux_cams=cams["broad"][1],
            precise_aux_cams=cams["precise"][1],
            fused_cams=0.5 * (fused["broad"] + fused["precise"]),
            confidence=confidence,
        )

    @torch.no_grad()
    def multi_scale_logits(
        self,
        pixel_values: torch.FloatTensor,
        scales: tuple[float, ...] | None = None,
        flip: bool = False,
        inference_branches: str | None = None,
        class_prior_weight: float | None = None,
    ) -> torch.Tensor:
        r"""
        Segmentation logits at the image's size, the larger value over scales kept (authors' code).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`): normalised images of any size.
            scales (`tuple[float, ...]`, *optional*, defaults to `config.inference_scales`): factors of the sides.
            flip (`bool`, *optional*, defaults to `False`): whether to use the mirrored image too.
            inference_branches (`str`, *optional*): as in `forward`.
            class_prior_weight (`float`, *optional*, defaults to `config.class_prior_weight`):
                How much of its logits a class loses for being unlikely in the image; 0 where its classes are known.

        Returns:
            `torch.Tensor` of shape `(B, K, H, W)`: float.
        """
        size, branches = tuple(pixel_values.shape[-2:]), chosen_branches(inference_branches)
        best = None
        for scale in self.config.inference_scales if scales is None else scales:
            scaled_size = (max(int(scale * size[0]), 1), max(int(scale * size[1]), 1))
            scaled = pixel_values
            if scaled_size != size:
                scaled = F.interpolate(pixel_values, size=scaled_size, mode="bilinear", align_corners=False)
            for mirrored in (False, True) if flip else (False,):
                view = scaled.flip(-1) if mirrored else scaled
                outputs = self.synernet(view, branches=branches)
                logits = self._segment(outputs, branches, tuple(view.shape[-2:]), class_prior_weight)["logits"]
                logits = logits.flip(-1) if mirrored else logits
                logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
                best = logits if best is None else torch.maximum(best, logits)
        return best

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.FloatTensor,
        labels: torch.Tensor | None = None,
        valid_boxes: torch.Tensor | None = None,
        loss_weights: dict[str, float] | None = None,
        training_progress: float | None = None,
        inference_branches: str | None = None,
        output_hidden_states: bool | list[int] | None = None,
        output_attentions: bool | None = None,
        pixel_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> SynerNetSegmenterOutput:
        r"""
        Args:
            pixel_values (`torch.FloatTensor` of shape `(B, 3, H, W)`):
                Images normalised with `config.image_mean` and `config.image_std`, of any size.
            labels (`torch.Tensor` of shape `(B, num_labels - 1)`, *optional*):
                Image-level labels, multi-hot over the foreground classes. With them the loss is computed.
            valid_boxes (`torch.LongTensor` of shape `(B, 4)`, *optional*):
                [top, bottom, left, right) of the real pixels of each image; the padding around teaches nothing.
            loss_weights (`dict[str, float]`, *optional*, defaults to `config.loss_weights`):
                Weight of each term: `cls`, `cls_aux`, `cls_token`, `spatial_bce`, `patch_contrast`,
                `prototype_contrast`, `segmentation`. What weighs 0, or is not named, is not computed.
            training_progress (`float`, *optional*, defaults to 0): t/T in [0, 1], for the coverage schedule.
            inference_branches (`str`, *optional*, defaults to `"both"`):
                `"broad"`, `"precise"` or `"both"`: which branches to run; training needs both.
            output_hidden_states (`bool` or `list[int]`, *optional*): whether to return hidden states, or which of them.
            output_attentions (`bool`, *optional*): whether to return attention maps; they need eager attention.
            pixel_mask (`torch.Tensor` of shape `(B, H, W)`, *optional*):
                1 on real pixels, 0 on padding, as the image processor gives it; stands for `valid_boxes`.

        Returns:
            [`SynerNetSegmenterOutput`]

        Raises:
            ValueError: if `labels` do not have one row per image and `config.num_foreground_labels` columns, a name
                in `loss_weights` or `inference_branches` is not known, or `labels` come with a single branch.
            TypeError: if an argument is not known.
        """
        branches = chosen_branches(inference_branches)
        if kwargs:
            raise TypeError(f"forward does not know {', '.join(kwargs)}; see its documentation for the names.")
        if labels is not None:
            if len(branches) == 1:
                raise ValueError(f"Training needs both branches, got inference_branches={branches[0]!r} with labels.")
            self._check_labels(labels, pixel_values)
            if valid_boxes is None and pixel_mask is not None:
                valid_boxes = boxes_of(pixel_mask)
        size, patch_size = tuple(pixel_values.shape[-2:]), self.config.patch_size
        outputs = self.synernet(
            pixel_values,
            branches,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        result = self._segment(outputs, branches, size)
        result |= {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        if labels is not None:
            weights = self._weights(loss_weights)
            progress = float(training_progress or 0.0)
            cams, supervision = self._supervise(outputs, pixel_values, labels, valid_boxes, weights, progress)
            embeddings = {}
            if weights["prototype_contrast"] and self.config.with_projection_head:
                embeddings = self._embed_instances(pixel_values, labels, valid_boxes, supervision.pseudo_labels)
            # half precision ends here: ranks and sums of the losses need float32
            with torch.autocast(device_type=pixel_values.device.type, enabled=False):
                logits = {name: result[f"{name}_logits"] for name in branches}
                losses = self._losses(outputs, logits, labels, weights, supervision, embeddings)
            result["loss"], result["loss_dict"] = losses
            result["confidence"] = supervision.confidence
            result["pseudo_labels"] = supervision.pseudo_labels.get("precise")
        if labels is None or not cams:
            cams = {
                name: [normalize_cams(crop_to_input(outputs[name].cam_logits.detach(), size, patch_size).relu())]
                for name in branches
            }
        for name in cams:
            result[f"{name}_cams"] = cams[name][0]
        # built at the end, so that the fields of the tuple form stand in their order, the loss first
        return SynerNetSegmenterOutput(**result)

    def _segment(self, outputs, branches: tuple[str, ...], size: tuple[int, int], prior_weight: float | None = None):
        """Logits and class scores of images of `size` by the name of their field, out of `outputs` of `branches`."""
        logits = {name: crop_to_input(outputs[name].logits, size, self.config.patch_size) for name in branches}
        share = self.config.broad_inference_weight
        shares = {"broad": share, "precise": 1 - share} if len(branches) == 2 else {branches[0]: 1.0}
        mixed = sum(shares[name] * logits[name] for name in branches)
        scores = {name: outputs[name].classification_logits for name in branches}
        if self.config.with_class_token_head:
            scores = {name: outputs[name].class_token_logits for name in branches}
            likely = sum(shares[name] * F.logsigmoid(scores[name]) for name in branches)
            weight = self.config.class_prior_weight if prior_weight is None else prior_weight
            mixed = lower_unlikely_classes(mixed, likely, weight)
        result = {"logits": mixed, "classification_logits": sum(scores.values()) / len(branches)}
        return result | {f"{name}_logits": logits[name] for name in branches}

    def _supervise(self, outputs, pixel_values, labels, valid_boxes, weights, progress):
        """Multi-scale CAMs and the targets made of them; nothing where only classification counts."""
        if not any(weights[term] for term in ("spatial_bce", "patch_contrast", "prototype_contrast", "segmentation")):
            return {}, SynerNetSupervision()
        scales, flip = self.config.cam_scales, self.config.cam_flip
        known_logits = None
        if 1 in scales:
            known_logits = self.synernet.cam_logits_of(outputs, tuple(pixel_values.shape[-2:]))
        cams = multi_scale_cams(self, pixel_values, labels, scales, flip, known_logits)
        images = unit_images(pixel_values, self.config.image_mean, self.config.image_std)
        return cams, make_supervision(self.config, cams, images, labels, valid_boxes, weights, progress)

    def _check_labels(self, labels: torch.Tensor, pixel_values: torch.Tensor):
        expected = (pixel_values.shape[0], self.config.num_foreground_labels)
        if tuple(labels.shape) != expected:
            raise ValueError(
                f"labels must be multi-hot, one row per image and one column per class without background: {expected}, "
                f"got {tuple(labels.shape)}."
            )

    def _weights(self, loss_weights: dict[str, float] | None) -> dict[str, float]:
        given = self.config.loss_weights if loss_weights is None else loss_weights
        unknown = sorted(set(given) - set(self.config.loss_weights))
        if unknown:
            raise ValueError(f"loss_weights knows {', '.join(self.config.loss_weights)}, got {', '.join(unknown)}.")
        return dict.fromkeys(self.config.loss_weights, 0.0) | given

    def _losses(self, outputs, logits, labels, weights, supervision: SynerNetSupervision, embeddings):
        """The weighted sum of the active terms and, without gradient, each term's mean over the branches."""
        terms: dict[str, list[torch.Tensor]] = {}
        total = labels.new_zeros((), dtype=torch.float32)

        def add(name: str, weight: float, value: torch.Tensor):
            nonlocal total
            terms.setdefault(f"loss_{name}", []).append(value.detach())
            total = total + weight * value

        ignore_index = self.config.semantic_loss_ignore_index
        power = self.config.confidence_weighting
        for name in BRANCHES:
            output = outputs[name]
            spatial_share = weights["spatial_bce"] if name in supervision.area_shares else 0.0
            if weights["cls"]:
                classification = classification_loss(output.classification_logits, labels)
                add("cls", weights["cls"] * (1 - spatial_share), classification)
            if spatial_share:
                spatial = spatial_bce_loss(output.cam_logits, labels, supervision.area_shares[name])
                add("spatial_bce", spatial_share, spatial)
            if weights["cls_aux"]:
                auxiliary = classification_loss(output.auxiliary_classification_logits, labels)
                add("cls_aux", weights["cls_aux"], auxiliary)
            if weights["cls_token"] and self.config.with_class_token_head:
                add("cls_token", weights["cls_token"], classification_loss(output.class_token_logits, labels))
            if weights["patch_contrast"]:
                contrast = patch_token_contrast_loss(output.features, supervision.token_labels[name], ignore_index)
                add("patch_contrast", weights["patch_contrast"], contrast)
            if weights["segmentation"]:
                target = supervision.pseudo_labels[name]
                pixel_weights = supervision.confidence[:, 0] ** power if power else None
                segmentation = cross_supervised_segmentation_loss(logits[name], target, ignore_index, pixel_weights)
                add("segmentation", weights["segmentation"], segmentation)
            if name in embeddings:
                add("prototype_contrast", weights["prototype_contrast"], self._contrast(name, *embeddings[name]))
        return total, {name: torch.stack(values).mean() for name, values in terms.items()}

    def _embed_instances(self, pixel_values, labels, valid_boxes, pseudo_labels: dict[str, torch.Tensor]):
        """Per branch with instance learning: embeddings `(B, P)` of the cut images, and their class ids `(B,)`."""
        cut: dict[str, tuple] = {}
        embeddings = {}
        for name in self.config.prototype_branches:
            # the precise branch's label is the even mix of both CAMs; without cross-supervision each has only its own
            source = "precise" if self.config.cross_supervision else name
            if source not in cut:
                class_ids = pick_instance_classes(pseudo_labels[source], labels, draw=self.training)
                ignore_index = self.config.semantic_loss_ignore_index
                images = cut_instances(pixel_values, pseudo_labels[source], class_ids, valid_boxes, ignore_index)
                images = self.synernet.pad(images)
                cut[source] = images, self.synernet.shared_states(images), class_ids
            images, shared_states, class_ids = cut[source]
            branch = self.synernet.branch(name)
            tokens = branch.encode(images, shared_states)[0]
            embeddings[name] = branch.projection_head(tokens[:, 0]), class_ids
        return embeddings

    def _contrast(self, name: str, embeddings: torch.Tensor, class_ids: torch.Tensor) -> torch.Tensor:
        """The prototype contrast of one branch; moves its prototypes while training, with all processes' images."""
        head = self.synernet.branch(name).projection_head
        gathered, gathered_ids, own = embeddings, class_ids, slice(None)
        if self.training:
            gathered, gathered_ids, own = gather_in_rank_order(embeddings, class_ids)
        terms, prototypes = prototype_contrast_terms(
            gathered, gathered_ids, head.prototypes, self.config.prototype_momentum, self.config.prototype_temperature
        )
        if self.training:
            head.prototypes.copy_(prototypes)
        return terms[own].sum() / (class_ids >= 0).sum().clamp(min=1)


__all__ = [
    "SynerNetBranchOutput",
    "SynerNetCamOutput",
    "SynerNetForWeaklySupervisedSegmentation",
    "SynerNetModel",
    "SynerNetModelOutput",
    "SynerNetPreTrainedModel",
    "SynerNetSegmenterOutput",
]
