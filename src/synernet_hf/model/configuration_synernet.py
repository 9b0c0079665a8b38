"""Configuration of SynerNet."""

import functools
import math
from collections import Counter
from typing import Literal, NamedTuple

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging


logger = logging.get_logger(__name__)


_SHARES = (
    "broad_share_in_logits broad_share_in_broad_label broad_share_in_precise_label fusion_range confidence_threshold "
    "broad_coverage broad_coverage_late precise_coverage coverage_switch spatial_bce_share segmentation_start "
    "spatial_bce_start prototype_contrast_start prototype_momentum"
).split()
_POSITIVE = (
    "pooling_top_k decoder_hidden_size decoder_dilation projection_hidden_size projection_bottleneck_size "
    "prototype_size prototype_temperature"
).split()
_NOT_NEGATIVE = (
    "refinement_iterations shared_encoder_layers class_prior_weight cls_weight cls_aux_weight cls_token_weight "
    "patch_contrast_weight prototype_contrast_weight segmentation_weight"
).split()

# Fields that had another name in folders saved earlier: old name -> new name; `None` for fields that are gone.
OLD_NAMES = {
    "broad_inference_weight": "broad_share_in_logits",
    "broad_label_share": "broad_share_in_broad_label",
    "precise_label_share": "broad_share_in_precise_label",
    "spatial_bce_weight": "spatial_bce_share",
    "confidence_weighting": None,
}


class EncoderFamily(NamedTuple):
    """What SynerNet needs to know of a family of encoders."""

    # tokens before the patches; registers, which a configuration counts, come on top
    prefix_tokens: int
    # "own" is the first of them, "mean" that of the patches, "head" what the pooling head of the encoder makes of them
    class_token: str = "own"
    # the final normalisation, and whether the encoder's `last_hidden_state` went through it
    norm: str = "layernorm"
    norm_applied: bool = True


FAMILIES = {
    "vit": EncoderFamily(1),
    "vit_msn": EncoderFamily(1),
    # and a distillation token
    "deit": EncoderFamily(2),
    "dinov2": EncoderFamily(1),
    "dinov2_with_registers": EncoderFamily(1),
    "dinov3_vit": EncoderFamily(1, norm="norm"),
    # the encoder itself normalises the class token alone
    "clip_vision_model": EncoderFamily(1, norm="post_layernorm", norm_applied=False),
    "siglip_vision_model": EncoderFamily(0, "head", "post_layernorm"),
    # their class token is trained without `use_mean_pooling` only; with it, their pooled patches alone are normalised
    "beit": EncoderFamily(1, "mean", "pooler.layernorm", norm_applied=False),
    "data2vec-vision": EncoderFamily(1, "mean", "pooler.layernorm", norm_applied=False),
    "ijepa": EncoderFamily(0, "mean"),
}


def encoder_family(backbone_config: PreTrainedConfig) -> EncoderFamily:
    """
    The family of an encoder, with what its configuration changes of it.

    Raises:
        ValueError: if the family is not one of `FAMILIES`, or patches or the images of pretraining are not square.
    """
    family = FAMILIES.get(backbone_config.model_type)
    if family is None:
        raise ValueError(
            f"Encoders of the family {backbone_config.model_type} are not supported, for SynerNet takes images of any "
            f"size and needs one token per patch; use one of the families {', '.join(FAMILIES)}."
        )
    patch_size, image_size = backbone_config.patch_size, backbone_config.image_size
    sides = [image_size] if isinstance(image_size, int) else image_size
    if not isinstance(patch_size, int) or len(set(sides)) > 1:
        raise ValueError(
            "The encoder needs square patches and square images of pretraining, given as numbers, got patch_size "
            f"{patch_size} and image_size {image_size}."
        )
    if not getattr(backbone_config, "use_mean_pooling", True):
        family = FAMILIES["vit"]
    if not getattr(backbone_config, "vision_use_head", True):
        family = family._replace(class_token="mean")
    registers = getattr(backbone_config, "num_register_tokens", 0)
    return family._replace(prefix_tokens=family.prefix_tokens + registers)


class SynerNetCustomPipelines(dict):
    """
    The pipelines whose code a saved folder carries. `transformers.pipeline` infers the task from the keys; it demands
    `trust_remote_code` for a task that is `in` here, which none is that the installed package has registered.
    """

    def __contains__(self, task: str) -> bool:
        from transformers.pipelines import PIPELINE_REGISTRY

        return super().__contains__(task) and task not in PIPELINE_REGISTRY.get_supported_tasks()


def _with_checked_names(config_class):
    """
    Renames old arguments of `__init__`, and lets `id2label` decide where `label2id` contradicts it: `__post_init__`
    could not tell a given value from a default.
    """
    init = config_class.__init__

    @functools.wraps(init)
    def checked(self, *args, **fields):
        for old, new in OLD_NAMES.items():
            value = fields.pop(old, None)
            if value is None or new is None:
                continue
            if new in fields:
                raise ValueError(f"`{old}` is the old name of `{new}`, and both are given; give `{new}` alone.")
            fields[new] = value
        label2id = None if fields.get("id2label") is None else fields.pop("label2id", None)
        init(self, *args, **fields)
        # numbers may be texts
        if label2id is not None and {str(index): name for name, index in label2id.items()} != {
            str(index): name for index, name in self.id2label.items()
        }:
            logger.warning(f"`label2id` {label2id} contradicts `id2label` {self.id2label}, which is used.")

    config_class.__init__ = checked
    return config_class


def _checked_labels(pairs: list[tuple[int | str, str]]) -> dict[int, str]:
    """Numbers and names of labels as `id2label`, in order."""
    try:
        labels = {int(index): name for index, name in sorted(pairs, key=lambda pair: int(pair[0]))}
    except (TypeError, ValueError):
        raise ValueError(f"`id2label` gives numbers their names, got {dict(pairs)}.") from None
    if list(labels) != list(range(len(pairs))):
        raise ValueError(
            f"`id2label` must number its {len(pairs)} labels from 0 on, got {[index for index, _ in pairs]}."
        )
    name, times = Counter(map(str, labels.values())).most_common(1)[0] if labels else ("", 0)
    if times > 1:
        raise ValueError(f"`id2label` must give each label a name of its own, got {name!r} {times} times.")
    for index, name in labels.items():
        if index and str(name).strip("_ ").casefold() == "background":
            raise ValueError(f"Label 0 of `id2label` is the background, got {name!r} as label {index}; put it first.")
    return labels


@strict
@_with_checked_names
class SynerNetConfig(PreTrainedConfig):
    r"""
    Everything that fixes a SynerNet: its encoder, its heads, the thresholds that turn class activation maps (CAMs)
    into labels, and the weights of its losses. `id2label` counts the background as label 0; its keys may be texts, as
    in JSON. `label2id` is its inverse: setting either of the two sets both.

    Brackets name the source of a default: *authors* is the authors' public code (values for PASCAL VOC
    unless said otherwise), *paper* the publication, *ours* our own choice. Every field is optional.

    Args:
        backbone_config (`PreTrainedConfig` or `dict`, defaults to a ViT-B/16 `ViTConfig`):
            Configuration of the encoder, of one of the families `vit`, `vit_msn`, `deit`, `dinov2`,
            `dinov2_with_registers`, `dinov3_vit`, `clip_vision_model`, `siglip_vision_model`, `beit`, `data2vec-vision`
            and `ijepa`; each branch has one such encoder. [paper: ViT-B/16]
        pooling_top_k (`int`, defaults to 5):
            Tokens averaged per channel before the classifier; 1 is max pooling. [authors]
        broad_pooling_top_k (`int`): The same for the broad branch; more tokens widen its CAM. `None` means
            `pooling_top_k`. [ours; authors: the same number]
        logits_pooling_share (`float`):
            With it a class score is the mean of the largest CAM logits of the class, this share of the tokens, at least
            one; `pooling_top_k` is not used. `None` pools the tokens before the classifier. [ours; authors: `None`]
        auxiliary_layer_index (`int`, defaults to -3): Index of the hidden state that feeds the auxiliary
            classifier; embeddings come first, so -3 of 12 blocks is the output of the 10th. [authors]
        shared_encoder_layers (`int`, defaults to 0): Number of first blocks that both branches share,
            which saves memory and time but makes the branches more alike. [ours; authors: none]
        decoder_hidden_size (`int`, defaults to 512): Channels of the LargeFOV decoder. [authors]
        decoder_dilation (`int`, defaults to 5):
            Dilation and padding of the decoder's two 3×3 convolutions, in tokens. [authors]
        with_class_token_head (`bool`, defaults to `False`):
            Whether each branch also classifies its class token, which in a pretrained encoder separates classes
            better than pooled patches. Its scores become `classification_logits`, and act on the segmentation through
            `class_prior_weight`. [ours, measured in docs/experiment_log.md; authors and paper: none]
        class_prior_weight (`float`, defaults to 6.0):
            Strength of the class prior: segmentation logits are lowered by this times the log-probability gap to the
            likeliest class, read from the class tokens and mixed as the logits are. 0 switches the prior off, and so
            do given image labels. Only with `with_class_token_head`. [ours]
        with_projection_head (`bool`, defaults to `True`):
            Whether the projection heads and prototypes, used in training only, are part of the model. [ours]
        projection_hidden_size (`int`, defaults to 2048): Width of the projection head's two hidden layers. [authors]
        projection_bottleneck_size (`int`, defaults to 512): Width before the last, weight-normalised layer. [authors]
        prototype_size (`int`, defaults to 1024): Width of a projected class token and of a class prototype. [authors]
        prototype_momentum (`float`, defaults to 0.01): Largest step γ of a prototype towards a new image. [authors]
        prototype_temperature (`float`, defaults to 0.5): Temperature of the prototype contrast. [authors]
        prototype_branches (`list[str]`, defaults to `("broad", "precise")`):
            Branches with instance learning. [authors: both]
        image_mean (`list[float]`, defaults to ImageNet's):
            Mean of the normalisation of `pixel_values`, undone before the refinement. [authors]
        image_std (`list[float]`, defaults to ImageNet's): Standard deviation of that normalisation. [authors]
        low_threshold (`float`, defaults to 0.25):
            A CAM whose largest value is at or below this is background. [authors; COCO 0.25]
        background_threshold (`float`, defaults to 0.5): The single threshold of CAM evaluation. [authors; COCO 0.45]
        high_threshold (`float`, defaults to 0.7):
            A CAM whose largest value is above this is a class. [authors; COCO 0.65]
        cam_scales (`list[float]`, defaults to `(1.0, 0.5, 0.75, 1.5)`):
            Scales of the CAMs from which labels are made. [authors; COCO adds 1.25]
        cam_flip (`bool`, defaults to `True`): Whether each scale is computed on the mirrored image too. [authors]
        floor_scaled_views (`bool`, defaults to `False`): Whether scaled views are cut to a multiple of the
            patch and their CAMs stretched [authors], instead of padded and cropped back [ours, the default].
        broad_propagation_temperature (`float`): Temperature, at least 0.001, of the propagation of the
            broad branch's CAMs: each token takes the mean of all tokens, weighted by a softmax over their feature
            cosines (mean of both branches) divided by this. Lower values stay closer to the CAM; 0.14 did best in
            docs/experiment_log.md. `None` switches it off. Labels, areas and votes use the propagated CAM, the losses
            the CAM before. [paper: global attention widens the broad CAM; formula ours; authors: none]
        precise_propagation_temperature (`float`): The same for the precise branch. [ours; authors: none]
        precise_consensus (`bool`, defaults to `False`): Whether the precise branch's CAM is the pixelwise
            minimum over its voting layers (`confidence_layers`). [paper: the branch's coverage objective pushes
            unsupported pixels to the background; formula ours; authors: none]
        inference_scales (`list[float]`, defaults to `(1.0, 1.25, 1.5)`): Scales of multi-scale segmentation. [authors]
        refine_predictions (`bool`, defaults to `False`): Whether the package's inference (not `forward`) refines
            probabilities and CAMs by the image's colours, as training refines labels. [ours, measured in docs/method.md]
        broad_share_in_logits (`float`, defaults to 0.7):
            Share of the broad branch in the fused segmentation logits. [authors]
        fusion (`str`, defaults to `"confidence"`): `"confidence"` mixes the branches' CAMs per pixel by
            their agreement [paper], `"fixed"` by the constant shares below [authors].
        broad_share_in_broad_label (`float`, defaults to 0.3):
            Share of the broad CAM in the broad branch's label. [authors; COCO 0.5]
        broad_share_in_precise_label (`float`, defaults to 0.5):
            Share of the broad CAM in the precise branch's label. [authors]
        fusion_range (`float`, defaults to 0.2):
            Largest difference between the per-pixel share and the constant one. [ours]
        confidence_layers (`list[int]`):
            Hidden states whose CAMs vote on the confidence of a pixel; others than the last read the auxiliary
            classifier. `None` means the auxiliary and the last one. [paper: several layers; which are ours]
        confidence_threshold (`float`, defaults to 1.0):
            Smallest share of equal votes of a confident pixel; 1 means unanimous. [ours]
        cross_supervision (`bool`, defaults to `True`):
            Whether the segmentation of a branch trains on fused labels instead of labels from its own CAM. [paper]
        refinement_dilations (`list[int]`, defaults to `(1, 2, 4, 8, 12, 24)`):
            Neighbour distances of pixel-adaptive refinement, in pixels of the half-resolution image. [authors]
        refinement_iterations (`int`, defaults to 10): Steps of pixel-adaptive refinement. [authors]
        broad_coverage (`float`, defaults to 0.2): Share of the ambiguous area that the broad branch's
            spatial loss, if it has one, assigns to the foreground before `coverage_switch`. [authors]
        broad_coverage_late (`float`, defaults to 0.1):
            The same from `coverage_switch` on, decaying to 0 along a quarter cosine. [authors]
        precise_coverage (`float`, defaults to 0.0): The same for the precise branch, throughout. [ours]
        coverage_switch (`float`, defaults to 0.5): Fraction of training at which the area is read from the
            mean of both CAMs instead of the branch's own auxiliary CAM. [authors; COCO 0]
        spatial_bce_branches (`list[str]`, defaults to `("precise",)`): Branches with the spatial loss,
            which sharpens the CAM of its branch. [ours; authors: the broad branch, in our reading of their code]
        cls_weight (`float`, defaults to 1.0): Weight of the classification loss of each branch. [authors]
        cls_aux_weight (`float`, defaults to 1.0):
            Weight of the auxiliary classification loss of each branch. [authors]
        cls_token_weight (`float`, defaults to 1.0):
            Weight of the classification loss of each branch's class token, if the model has heads for it. [ours]
        spatial_bce_share (`float`, defaults to 0.4):
            Share w of the spatial loss in w · spatial + (1 − w) · classification. [authors; COCO 0.3]
        patch_contrast_weight (`float`, defaults to 0.2): Weight of the patch-token contrast of each branch. [authors]
        prototype_contrast_weight (`float`, defaults to 0.05):
            Weight of the prototype contrast of each branch. [authors]
        segmentation_weight (`float`, defaults to 0.17):
            Weight of the segmentation loss of each branch. [authors; COCO 0.15]
        segmentation_start (`float`, defaults to 0.25):
            Fraction of training after which the term counts. [authors: 2,000 of 8,000 steps]
        spatial_bce_start (`float`, defaults to 0.375):
            Fraction of training after which the term counts. [authors: 3,000 of 8,000]
        prototype_contrast_start (`float`, defaults to 0.375):
            Fraction of training after which the term counts. [authors: 3,000 of 8,000]
        semantic_loss_ignore_index (`int`, defaults to 255):
            Label of pixels left out of the segmentation loss. [authors]
        initializer_range (`float`, defaults to 0.02): Standard deviation of freshly drawn weights. [ours]

    Raises:
        StrictDataclassClassValidationError: if thresholds do not increase, a share is outside [0, 1], a size, scale or
            dilation is not positive, a weight is negative or not finite, the ignore index is one of the labels, or the
            encoder is of another family or its patches are not square.
        StrictDataclassFieldValidationError: if a field has a wrong type.
        ValueError: if a field is given under its old and its new name, or `id2label` has a gap, a name twice or the
            background elsewhere than at 0.

    Example:

    ```python
    >>> from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation

    >>> configuration = SynerNetConfig(id2label={0: "background", 1: "cat", 2: "sofa"})
    >>> model = SynerNetForWeaklySupervisedSegmentation(configuration)
    >>> configuration.num_foreground_labels
    2
    ```"""

    model_type = "synernet"
    # a stock Trainer then collects the segmentation logits alone
    keys_to_ignore_at_inference = (
        "loss_dict broad_logits precise_logits classification_logits broad_cams precise_cams confidence pseudo_labels "
        "hidden_states attentions"
    ).split()
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    backbone_config: dict | PreTrainedConfig | None = None
    pooling_top_k: int = 5
    broad_pooling_top_k: int | None = None
    logits_pooling_share: float | int | None = None
    auxiliary_layer_index: int = -3
    shared_encoder_layers: int = 0
    decoder_hidden_size: int = 512
    decoder_dilation: int = 5
    with_class_token_head: bool = False
    class_prior_weight: float | int = 6.0
    with_projection_head: bool = True
    projection_hidden_size: int = 2048
    projection_bottleneck_size: int = 512
    prototype_size: int = 1024
    prototype_momentum: float | int = 0.01
    prototype_temperature: float | int = 0.5
    prototype_branches: list[str] | tuple[str, ...] = ("broad", "precise")
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    low_threshold: float | int = 0.25
    background_threshold: float | int = 0.5
    high_threshold: float | int = 0.7
    cam_scales: list[float | int] | tuple[float | int, ...] = (1.0, 0.5, 0.75, 1.5)
    cam_flip: bool = True
    floor_scaled_views: bool = False
    broad_propagation_temperature: float | int | None = None
    precise_propagation_temperature: float | int | None = None
    precise_consensus: bool = False
    inference_scales: list[float | int] | tuple[float | int, ...] = (1.0, 1.25, 1.5)
    refine_predictions: bool = False
    broad_share_in_logits: float | int = 0.7
    fusion: Literal["confidence", "fixed"] = "confidence"
    broad_share_in_broad_label: float | int = 0.3
    broad_share_in_precise_label: float | int = 0.5
    fusion_range: float | int = 0.2
    confidence_layers: list[int] | tuple[int, ...] | None = None
    confidence_threshold: float | int = 1.0
    cross_supervision: bool = True
    refinement_dilations: list[int] | tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    refinement_iterations: int = 10
    broad_coverage: float | int = 0.2
    broad_coverage_late: float | int = 0.1
    precise_coverage: float | int = 0.0
    coverage_switch: float | int = 0.5
    spatial_bce_branches: list[str] | tuple[str, ...] = ("precise",)
    cls_weight: float | int = 1.0
    cls_aux_weight: float | int = 1.0
    cls_token_weight: float | int = 1.0
    spatial_bce_share: float | int = 0.4
    patch_contrast_weight: float | int = 0.2
    prototype_contrast_weight: float | int = 0.05
    segmentation_weight: float | int = 0.17
    segmentation_start: float | int = 0.25
    spatial_bce_start: float | int = 0.375
    prototype_contrast_start: float | int = 0.375
    semantic_loss_ignore_index: int = 255
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # what a saved folder tells the auto classes; saving a model marks only the class that is saved
        self.auto_map = {
            "AutoConfig": "configuration_synernet.SynerNetConfig",
            "AutoModel": "modeling_synernet.SynerNetModel",
            "AutoModelForSemanticSegmentation": "modeling_synernet.SynerNetForWeaklySupervisedSegmentation",
        }

    def __setattr__(self, name, value):
        if name in ("id2label", "label2id") and value is not None:
            if not isinstance(value, dict):
                raise ValueError(f"`{name}` is a dictionary, such as {{0: 'background', 1: 'cat'}}, got {value!r}.")
            pairs = list(value.items()) if name == "id2label" else [(index, label) for label, index in value.items()]
            labels = _checked_labels(pairs)
            super().__setattr__("id2label", labels)
            name, value = "label2id", {label: index for index, label in labels.items()}
        if name == "custom_pipelines":
            value = SynerNetCustomPipelines(value)
        super().__setattr__(name, value)

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Names of labels among `kwargs` replace both saved maps."""
        given = {name: kwargs.pop(name) for name in ("id2label", "label2id") if kwargs.get(name) is not None}
        if given:
            config_dict = {name: value for name, value in config_dict.items() if name not in ("id2label", "label2id")}
        return super().from_dict(config_dict | given, **kwargs)

    @property
    def num_foreground_labels(self) -> int:
        """`int`: number of classes without the background; the width of image-level `labels`."""
        return self.num_labels - 1

    @property
    def patch_size(self) -> int:
        """`int`: side of the encoder's square patch, in pixels."""
        return self.backbone_config.patch_size

    @property
    def voting_layers(self) -> tuple[int, ...]:
        """`tuple[int]`: the hidden states whose CAMs vote, counted from the embeddings."""
        count = self.backbone_config.num_hidden_layers + 1
        layers = (self.auxiliary_layer_index, -1) if self.confidence_layers is None else self.confidence_layers
        return tuple(layer % count for layer in layers)

    @property
    def cam_layers(self) -> tuple[int, ...]:
        """`tuple[int]`: the hidden states of which CAMs are made: the last, the auxiliary one, further voting ones."""
        count = self.backbone_config.num_hidden_layers + 1
        first = (count - 1, self.auxiliary_layer_index % count)
        return (*first, *(layer for layer in dict.fromkeys(self.voting_layers) if layer not in first))

    @property
    def additional_cam_layers(self) -> tuple[int, ...]:
        """`tuple[int]`: the voting hidden states beside the last and the auxiliary one."""
        return self.cam_layers[2:]

    @property
    def loss_weights(self) -> dict[str, float]:
        """`dict[str, float]`: the weight of each loss term, every term counted."""
        return {
            "cls": self.cls_weight,
            "cls_aux": self.cls_aux_weight,
            "cls_token": self.cls_token_weight,
            "spatial_bce": self.spatial_bce_share,
            "patch_contrast": self.patch_contrast_weight,
            "prototype_contrast": self.prototype_contrast_weight,
            "segmentation": self.segmentation_weight,
        }

    def validate_encoder(self):
        """Part of the strict checks: the encoder is of a family that works."""
        encoder_family(self.backbone_config)

    def validate_thresholds(self):
        """Part of the strict checks: thresholds rise."""
        if not 0 <= self.low_threshold <= self.background_threshold <= self.high_threshold <= 1:
            raise ValueError(
                f"low, background and high threshold must rise within [0, 1], got {self.low_threshold}, "
                f"{self.background_threshold} and {self.high_threshold}."
            )

    def validate_ranges(self):
        """Part of the strict checks: shares are shares, counts and sizes positive, weights not negative."""
        # nan compares false; a lower temperature would meet numbers that float32 cannot hold
        inside = {
            "must lie in [0, 1]": (_SHARES, lambda value: 0 <= value <= 1),
            "must be positive": (_POSITIVE, lambda value: value > 0),
            "must be finite and not negative": (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf),
            "must be positive or left out": (["broad_pooling_top_k"], lambda value: value is None or value > 0),
            "must lie in (0, 1] or be left out": (
                ["logits_pooling_share"],
                lambda value: value is None or 0 < value <= 1,
            ),
            "must be at least 0.001 or left out": (
                ["broad_propagation_temperature", "precise_propagation_temperature"],
                lambda value: value is None or 1e-3 <= value < math.inf,
            ),
        }
        for rule, (names, holds) in inside.items():
            for name in names:
                if not holds(getattr(self, name)):
                    raise ValueError(f"`{name}` {rule}, got {getattr(self, name)}.")

    def validate_lists(self):
        """Part of the strict checks: lists are of the right length and kind."""
        if self.confidence_layers is not None and not self.confidence_layers:
            raise ValueError(
                "`confidence_layers` must name at least one layer, got none; leave it out for the default."
            )
        for name in ("cam_scales", "inference_scales", "refinement_dilations"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"`{name}` must be a non-empty list of positive numbers, got {list(values)[:8]}.")
        for name in ("image_mean", "image_std"):
            if len(getattr(self, name)) != 3:
                raise ValueError(f"`{name}` needs one number per colour channel, got {list(getattr(self, name))}.")
        for name in ("spatial_bce_branches", "prototype_branches"):
            unknown = set(getattr(self, name)) - {"broad", "precise"}
            if unknown:
                raise ValueError(f"`{name}` names branches out of broad and precise, got {sorted(unknown)}.")

    def validate_ignore_index(self):
        """Part of the strict checks: no label has the number of ignored pixels."""
        if 0 <= self.semantic_loss_ignore_index < self.num_labels:
            raise ValueError(
                f"`semantic_loss_ignore_index` {self.semantic_loss_ignore_index} is one of the {self.num_labels} labels; "
                "choose a number that is none."
            )


__all__ = ["SynerNetConfig"]
