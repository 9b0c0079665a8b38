"""The exported room: what travels to the Hub with a model. Importing it registers SynerNet with the auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from .configuration_synernet import SynerNetConfig
from .image_processing_synernet import SynerNetImageProcessor
from .modeling_synernet import (
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetModel,
    SynerNetPreTrainedModel,
)
from .pipeline_synernet import SynerNetSegmentationPipeline, register_pipeline


AutoConfig.register("synernet", SynerNetConfig, exist_ok=True)
AutoModel.register(SynerNetConfig, SynerNetModel, exist_ok=True)
AutoModelForSemanticSegmentation.register(SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, exist_ok=True)
AutoImageProcessor.register(SynerNetConfig, image_processor_classes={"pil": SynerNetImageProcessor}, exist_ok=True)
register_pipeline(SynerNetForWeaklySupervisedSegmentation)

__all__ = [
    "SynerNetConfig",
    "SynerNetForWeaklySupervisedSegmentation",
    "SynerNetImageProcessor",
    "SynerNetModel",
    "SynerNetPreTrainedModel",
    "SynerNetSegmentationPipeline",
]
