"""SynerNet for the Hugging Face ecosystem: semantic segmentation learnt from image-level labels only.

Importing the package registers the model with the auto classes and the pipeline with its task name, so that
`AutoModelForSemanticSegmentation`, `AutoImageProcessor` and `pipeline` find it. It imports neither torch nor transformers:
classes are imported when they are first asked for, and registered as soon as transformers loads its auto classes.
"""

from typing import TYPE_CHECKING

from .lazy import import_with_auto_classes, lazy_names


if TYPE_CHECKING:
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

__getattr__, __dir__ = lazy_names(__name__, {"model": [name for name in __all__ if name != "__version__"]})
import_with_auto_classes(f"{__name__}.model")
