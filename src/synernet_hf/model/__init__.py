"""The files that are saved with a model and pushed to the Hub. Importing it registers SynerNet with the auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING

from .cam_synernet import (
    BranchPair,
    area_shares,
    cams_to_pseudo_labels,
    fuse_branches,
    layer_confidence,
    mask_absent_classes,
    multi_scale_cams,
    normalize_cams,
)
from .configuration_synernet import SynerNetConfig
from .encoder_synernet import pretrained_backbone_config
from .image_processing_synernet import SynerNetImageProcessor, open_image, to_rgb
from .inference_synernet import (
    PreparedBatch,
    PreparedImage,
    generate_image_cams,
    predict_labels,
    prepare_image,
    resize_maps,
    segment_images,
)
from .modeling_synernet import (
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetModel,
)
from .objective_synernet import (
    SynerNetTargets,
    coverage,
    cut_instances,
    label_tokens,
    pick_instance_classes,
    weighted_losses,
)
from .pipeline_synernet import SynerNetSegmentationPipeline, register_pipeline
from .refinement_synernet import (
    SynerNetPixelAdaptiveRefinement,
    denormalize,
    ignore_outside,
    refine_pseudo_labels,
)


AutoConfig.register("synernet", SynerNetConfig, exist_ok=True)
AutoModel.register(SynerNetConfig, SynerNetModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, exist_ok=True)
AutoImageProcessor.register(SynerNetConfig, image_processor_classes={"pil": SynerNetImageProcessor}, exist_ok=True)
register_pipeline(SynerNetForWeaklySupervisedSegmentation)

# Saved folders carry the code of this folder, for processes in which the package is not installed.
SynerNetConfig.register_for_auto_class("AutoConfig")
SynerNetModel.register_for_auto_class("AutoModel")
SynerNetForWeaklySupervisedSegmentation.register_for_auto_class("AutoModelForSemanticSegmentation")
SynerNetImageProcessor.register_for_auto_class("AutoImageProcessor")
# No video processor, but known: stock pipelines look for one, and would ask whether to run a saved folder's code.
VIDEO_PROCESSOR_MAPPING.register(SynerNetConfig, {}, exist_ok=True)

__all__ = [
    "BranchPair",
    "PreparedBatch",
    "PreparedImage",
    "SynerNetConfig",
    "SynerNetForWeaklySupervisedSegmentation",
    "SynerNetImageProcessor",
    "SynerNetModel",
    "SynerNetPixelAdaptiveRefinement",
    "SynerNetSegmentationPipeline",
    "SynerNetTargets",
    "area_shares",
    "cams_to_pseudo_labels",
    "coverage",
    "cut_instances",
    "denormalize",
    "fuse_branches",
    "generate_image_cams",
    "ignore_outside",
    "label_tokens",
    "layer_confidence",
    "mask_absent_classes",
    "multi_scale_cams",
    "normalize_cams",
    "open_image",
    "pick_instance_classes",
    "predict_labels",
    "prepare_image",
    "pretrained_backbone_config",
    "refine_pseudo_labels",
    "resize_maps",
    "segment_images",
    "to_rgb",
    "weighted_losses",
]
