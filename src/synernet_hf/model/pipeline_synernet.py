"""The pipeline task `weakly-supervised-segmentation`: pictures in, one mask per class out."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, Pipeline, PreTrainedModel
from transformers.image_utils import load_image
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY


TASK = "weakly-supervised-segmentation"


class SynerNetSegmentationPipeline(Pipeline):
    """
    Semantic segmentation with the options of SynerNet, answering in the form of the stock `image-segmentation` task.

    Pictures of a batch may differ in size: those of equal size go through the model together.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> segmenter = pipeline("weakly-supervised-segmentation", model="runs/voc_animals")
    >>> segments = segmenter("picture.jpg", scales=(1.0, 1.25, 1.5), flip=True)
    >>> [segment["label"] for segment in segments]
    ['background', 'cat']
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False

    def _sanitize_parameters(
        self,
        scales: tuple[float, ...] | list[float] | None = None,
        flip: bool | None = None,
        image_labels: list[str] | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess_kwargs = {} if timeout is None else {"timeout": timeout}
        forward_kwargs = {}
        if scales is not None:
            if not scales or min(scales) <= 0:
                raise ValueError(f"`scales` is {scales}; at least one positive scale is expected, such as (1.0,).")
            forward_kwargs["scales"] = tuple(scales)
        if flip is not None:
            forward_kwargs["flip"] = flip
        postprocess_kwargs = {}
        if image_labels is not None:
            postprocess_kwargs["allowed_ids"] = self._allowed_ids(image_labels)
        return preprocess_kwargs, forward_kwargs, postprocess_kwargs

    def _allowed_ids(self, image_labels: list[str]) -> list[int]:
        if isinstance(image_labels, str):
            image_labels = [image_labels]
        unknown = [name for name in image_labels if name not in self.model.config.label2id]
        if unknown:
            raise ValueError(
                f"The image labels {unknown} are not classes of the model; choose from "
                f"{', '.join(self.model.config.label2id)}."
            )
        return sorted({0} | {int(self.model.config.label2id[name]) for name in image_labels})

    def __call__(self, inputs: Any, **kwargs: Any) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """
        Segment one picture or several.

        Args:
            inputs (`str`, `PIL.Image.Image`, a list of these, or a data set or generator of them):
                Pictures, paths or URLs. The EXIF orientation of files is applied.
            scales (`tuple[float, ...]`, *optional*, defaults to `(1.0,)`):
                Scales at which each picture is seen; the elementwise maximum of the logits decides. The authors'
                inference uses `model.config.inference_scales`.
            flip (`bool`, *optional*, defaults to `False`):
                Also see the mirror of every scale.
            image_labels (`list[str]`, *optional*):
                Names of the classes known to be in the pictures; no other class but background is predicted then.
            timeout (`float`, *optional*):
                Seconds to wait for a URL.

        Returns:
            `list[dict]`, or a list of these for several pictures: One dictionary per class found, in the order of the
            ids: `label` (`str`), `mask` (`PIL.Image.Image` of mode `"L"` and the size of the picture, 255 on the class
            and 0 elsewhere) and `score` (`float`, mean probability of the class over its mask).

        Raises:
            ValueError: If a scale is not positive or an image label is not a class of the model.
        """
        return super().__call__(inputs, **kwargs)

    def preprocess(self, image: "str | Image.Image", timeout: float | None = None) -> dict[str, list]:
        image = load_image(image, timeout=timeout)
        pixel_values = self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]
        # Lists are collated as they are, so that a batch may hold several sizes.
        return {"pixel_values": [pixel_values.to(self.dtype)], "target_size": [(image.height, image.width)]}

    def _forward(
        self, model_inputs: dict[str, list], scales: tuple[float, ...] = (1.0,), flip: bool = False
    ) -> dict[str, list]:
        pictures = _flattened(model_inputs["pixel_values"], torch.Tensor)
        logits = [None] * len(pictures)
        for size in sorted({tuple(picture.shape[-2:]) for picture in pictures}):
            members = [i for i, picture in enumerate(pictures) if tuple(picture.shape[-2:]) == size]
            batch = torch.stack([pictures[i] for i in members])  # (batch_size, 3, height, width)
            for i, values in zip(members, self.model.multi_scale_logits(batch, scales=scales, flip=flip), strict=True):
                logits[i] = values
        return {"logits": logits, "target_size": _flattened(model_inputs["target_size"], tuple)}

    def postprocess(self, model_outputs: dict[str, Any], allowed_ids: list[int] | None = None) -> list[dict[str, Any]]:
        logits, target_size = model_outputs["logits"], model_outputs["target_size"]
        logits = logits[0] if isinstance(logits, list) else logits.reshape(logits.shape[-3:])
        target_size = target_size[0] if isinstance(target_size, list) else target_size
        logits = F.interpolate(logits[None].float(), size=tuple(target_size), mode="bilinear", align_corners=False)[0]
        if allowed_ids is not None:
            absent = torch.ones(len(logits), dtype=torch.bool)
            absent[allowed_ids] = False
            logits = logits.masked_fill(absent[:, None, None], -torch.inf)
        probabilities = logits.softmax(dim=0)
        label_map = logits.argmax(dim=0)
        segments = []
        for class_id in label_map.unique().tolist():
            where = label_map == class_id
            mask = Image.fromarray(where.numpy().astype(np.uint8) * 255)
            score = float(probabilities[class_id][where].mean())
            segments.append({"label": self.model.config.id2label[class_id], "mask": mask, "score": score})
        return segments


def _flattened(items: list, leaf: type) -> list:
    flat = []
    for item in items:
        flat.extend([item] if isinstance(item, leaf) else item)
    return flat


def register_pipeline(model_class: type[PreTrainedModel]) -> None:
    """
    Make the task `weakly-supervised-segmentation` known to `transformers.pipeline`, and the model class to the stock
    `image-segmentation` task, which logs an error for classes missing from its list of names.

    Args:
        model_class (`type[PreTrainedModel]`):
            The task model. It is loaded through `AutoModelForSemanticSegmentation`, the only form that a pipeline
            saved with its code can name in a process without this package.
    """
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=SynerNetSegmentationPipeline,
            pt_model=AutoModelForSemanticSegmentation,
            type="image",
        )
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[model_class.config_class.model_type] = model_class.__name__


__all__ = ["SynerNetSegmentationPipeline", "register_pipeline"]
