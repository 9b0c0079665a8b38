"""SynerNet for the Hugging Face ecosystem: semantic segmentation learnt from image-level labels only.

Importing the package registers the model with the auto classes and the pipeline with its task name, so that
`AutoModelForSemanticSegmentation`, `AutoImageProcessor` and `pipeline` find it.
"""

from .model import (
    SynerNetConfig,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    SynerNetModel,
    SynerNetSegmentationPipeline,
)


__version__ = "0.1.0.dev0"

__all__ = [
    "SynerNetConfig",
    "SynerNetForWeaklySupervisedSegmentation",
    "SynerNetImageProcessor",
    "SynerNetModel",
    "SynerNetSegmentationPipeline",
    "__version__",
]
