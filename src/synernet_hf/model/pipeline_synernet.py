"""The pipeline task `weakly-supervised-segmentation`: images in, one mask per class out."""

import os
from collections.abc import Callable, Iterable
from types import GeneratorType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset
from transformers import AutoModelForSemanticSegmentation, Pipeline, PreTrainedModel
from transformers.image_utils import load_image
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .image_processing_synernet import eight_bit_rgb


TASK = "weakly-supervised-segmentation"
# where the image labels of an image come from, unless they are named: from its record, or from the classifiers
LABEL_SOURCES = ("known", "predicted")


class SynerNetSegmentationPipeline(Pipeline):
    """
    Semantic segmentation with the options of SynerNet, answering in the form of the stock `image-segmentation` task.

    Images of a batch may differ in size: those of equal size go through the model together.

    Example:

    ```python
    >>> from transformers import pipeline

    >>> segmenter = pipeline("weakly-supervised-segmentation", model="runs/voc_animals")
    >>> segments = segmenter("image.jpg", scales=(1.0, 1.25, 1.5), flip=True)
    >>> [segment["label"] for segment in segments]
    ['background', 'cat']
    ```
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    # looked for by default, which asks whether to run a saved folder's code even where this package is installed
    _load_video_processor = False

    def _sanitize_parameters(
        self,
        scales: tuple[float, ...] | list[float] | None = None,
        flip: bool | None = None,
        image_labels: list[str] | str | None = None,
        crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        return_cams: bool | None = None,
        return_confidence: bool | None = None,
        return_scores: bool | None = None,
        timeout: float | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if scales is not None and (not scales or min(scales) <= 0):
            raise ValueError(f"`scales` is {scales}; at least one positive scale is expected, such as (1.0,).")
        if crf is not None and not callable(crf):
            raise ValueError(
                f"`crf` is {crf!r}; a function of an image and its class probabilities is expected, such as "
                "`synernet_hf.crf.DenseCRF()`."
            )
        if isinstance(image_labels, str) and image_labels not in LABEL_SOURCES:
            image_labels = [image_labels]
        if isinstance(image_labels, list | tuple):
            self._multi_hot(image_labels)
        given = {
            "preprocess": {"image_labels": image_labels, "timeout": timeout},
            "forward": {
                "scales": scales if scales is None else tuple(scales),
                "flip": flip,
                "predict_labels": None if image_labels is None else image_labels == "predicted",
                "return_cams": return_cams,
                "return_confidence": return_confidence,
            },
            "postprocess": {
                "crf": crf,
                "return_cams": return_cams,
                "return_confidence": return_confidence,
                "return_scores": return_scores,
            },
        }
        return tuple({name: value for name, value in act.items() if value is not None} for act in given.values())

    def _multi_hot(self, image_labels: Any) -> torch.Tensor:
        """Class names, or ids of foreground classes from 0, as a multi-hot tensor of shape `(num_labels - 1,)`."""
        config = self.model.config
        values = image_labels.tolist() if isinstance(image_labels, np.ndarray | torch.Tensor) else list(image_labels)
        if all(isinstance(value, str) for value in values):
            unknown = [name for name in values if name not in config.label2id]
            if unknown:
                raise ValueError(
                    f"The image labels {unknown} are not classes of the model; choose from "
                    f"{', '.join(config.label2id)}."
                )
            # the background is no label: it is always possible
            values = [int(config.label2id[name]) - 1 for name in values if name != config.id2label[0]]
        if any(value not in range(config.num_labels - 1) for value in values):
            raise ValueError(
                f"Got the image labels {values}; class names are expected, or ids from 0 to {config.num_labels - 2} of "
                "the classes without background."
            )
        vector = torch.zeros(config.num_labels - 1)
        vector[values] = 1
        return vector

    def __call__(self, inputs: Any, **kwargs: Any) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """
        Segment one image or several.

        Args:
            inputs (`str`, `PIL.Image.Image`, `dict`, a list of these, or a data set or generator of them):
                Images, paths or URLs, or records that hold one of these as `image`. The EXIF orientation of files
                is applied. A data set or generator is read as the answers are, one batch after another.
            scales (`tuple[float, ...]`, *optional*, defaults to `(1.0,)`):
                Scales at which each image is seen; the elementwise maximum of the logits decides. The authors'
                inference uses `model.config.inference_scales`.
            flip (`bool`, *optional*, defaults to `False`):
                Also see the mirror of every scale.
            image_labels (`list[str]` or `str`, *optional*):
                Classes that are in the images; no other class but background is predicted then. A list of names;
                `"known"`, to take `labels` of each record (names, or ids of foreground classes from 0); or
                `"predicted"`, for the classes that the model's classifiers see, at the cost of one more pass.
            crf (`Callable[[np.ndarray, np.ndarray], np.ndarray]`, *optional*):
                Refines the probabilities, such as `synernet_hf.crf.DenseCRF()`: takes the image, uint8 of shape
                `(height, width, 3)`, and class probabilities, float32 of shape `(num_labels, height, width)`, and
                returns such probabilities.
            return_cams (`bool`, *optional*, defaults to `False`):
                Return the fused class activation maps too, of the given image labels or else of every class. They
                are seen at `model.config.cam_scales`.
            return_confidence (`bool`, *optional*, defaults to `False`):
                Return the confidence too: the share of layers and branches whose CAMs agree on a pixel.
            return_scores (`bool`, *optional*, defaults to `False`):
                Return the class probabilities too.
            timeout (`float`, *optional*):
                Seconds to wait for a URL.

        Returns:
            `list[dict]`, or a list of these for several images: One dictionary per class found, in the order of the
            ids: `label` (`str`), `mask` (`PIL.Image.Image` of mode `"L"` and the size of the image, 255 on the class
            and 0 elsewhere) and `score` (`float`, mean probability of the class over its mask). With one of the
            `return_…` options a `dict` stands for this list, which is its entry `segments`; the others are those
            asked for: `cams` (by class name) and `confidence`, float32 of shape `(height, width)` in [0, 1], and
            `scores` (by class name), float32 of shape `(height, width)`, summing to 1.

        Raises:
            ValueError: If a scale is not positive, an image label is not a class of the model, a record lacks the
                image labels to be used, or `crf` is no function.
        """
        single = (str, dict, list, tuple, Image.Image, GeneratorType, Dataset)
        if isinstance(inputs, Iterable) and not isinstance(inputs, single):
            inputs = (item for item in inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(
        self, image: Any, image_labels: list[str] | str | None = None, timeout: float | None = None
    ) -> dict[str, list]:
        record = image if isinstance(image, dict) else {"image": image}
        opened = _opened(record["image"], timeout)
        # the model pads by itself; padding here would be stretched over the image
        inputs = self.image_processor(images=opened, do_center_crop=False, do_pad=False, return_tensors="pt")
        labels = None
        if image_labels == "known":
            if record.get("labels") is None:
                raise ValueError(
                    'An image has no `labels`, but `image_labels="known"`; pass records with `image` and `labels`, or '
                    "name the classes."
                )
            labels = self._multi_hot(record["labels"])
        elif image_labels is not None and image_labels != "predicted":
            labels = self._multi_hot(image_labels)
        # Lists are collated as they are, so that a batch may hold several sizes.
        return {
            "pixel_values": [inputs["pixel_values"][0].to(self.dtype)],
            "labels": [labels],
            "image": [opened],
        }

    def _forward(
        self,
        model_inputs: dict[str, list],
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        predict_labels: bool = False,
        return_cams: bool = False,
        return_confidence: bool = False,
    ) -> dict[str, list]:
        images = _flattened(model_inputs["pixel_values"])
        labels = _flattened(model_inputs["labels"])
        outputs = {"logits": [None] * len(images), "image": _flattened(model_inputs["image"])}
        cams, confidence = [None] * len(images), [None] * len(images)
        for size in sorted({tuple(image.shape[-2:]) for image in images}):
            members = [i for i, image in enumerate(images) if tuple(image.shape[-2:]) == size]
            batch = torch.stack([images[i] for i in members])  # (batch_size, 3, height, width)
            if predict_labels:
                present = (self.model(batch).classification_logits > 0).float()
                for i, row in zip(members, present, strict=True):
                    labels[i] = row
            # which classes are there is known already where labels are given
            prior = 0.0 if labels[members[0]] is not None and not predict_labels else None
            logits = self.model.multi_scale_logits(batch, scales=scales, flip=flip, class_prior_weight=prior)
            for i, values in zip(members, logits, strict=True):
                outputs["logits"][i] = values
            if return_cams or return_confidence:
                given = None if labels[members[0]] is None else torch.stack([labels[i] for i in members])
                maps = self.model.generate_cams(batch, labels=given)
                for row, i in enumerate(members):
                    cams[i], confidence[i] = maps.fused_cams[row], maps.confidence[row]
        return outputs | {"labels": labels, "cams": cams, "confidence": confidence}

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        return_cams: bool = False,
        return_confidence: bool = False,
        return_scores: bool = False,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        # one image of a batch comes with a leading dimension, a single one in a list
        item = {
            name: value[0] if isinstance(value, list | torch.Tensor) else value
            for name, value in model_outputs.items()
        }
        image, labels, id2label = item["image"], item["labels"], self.model.config.id2label
        logits = _resized(item["logits"], image)
        if labels is not None:
            absent = torch.cat([torch.zeros(1, dtype=torch.bool), labels.cpu() == 0])
            logits = logits.masked_fill(absent[:, None, None], -torch.inf)
        probabilities = logits.softmax(dim=0)
        if crf is not None:
            probabilities = torch.from_numpy(crf(np.asarray(image), probabilities.numpy()))
            if labels is not None:
                probabilities = probabilities.masked_fill(absent[:, None, None], 0.0)
        label_map = (logits if crf is None else probabilities).argmax(dim=0)
        segments = []
        for class_id in label_map.unique().tolist():
            where = label_map == class_id
            mask = Image.fromarray(where.numpy().astype(np.uint8) * 255)
            score = float(probabilities[class_id][where].mean())
            segments.append({"label": id2label[class_id], "mask": mask, "score": score})
        answer = {"segments": segments}
        if return_cams:
            maps = _resized(item["cams"], image).numpy()
            shown = range(len(maps)) if labels is None else labels.nonzero()[:, 0].tolist()
            answer["cams"] = {id2label[index + 1]: maps[index] for index in shown}
        if return_confidence:
            answer["confidence"] = _resized(item["confidence"], image)[0].numpy()
        if return_scores:
            answer["scores"] = {id2label[index]: values.numpy() for index, values in enumerate(probabilities)}
        return answer if len(answer) > 1 else segments


def _flattened(items: list) -> list:
    return [leaf for item in items for leaf in (item if isinstance(item, list) else [item])]


def _opened(image: Any, timeout: float | None) -> Image.Image:
    """A path, URL or image as an RGB image; 16-bit greyscale, which the library turns white, keeps its shades."""
    if isinstance(image, str) and os.path.isfile(image):
        with Image.open(image) as opened:
            return eight_bit_rgb(ImageOps.exif_transpose(opened))
    if isinstance(image, Image.Image):
        return eight_bit_rgb(ImageOps.exif_transpose(image))
    return load_image(image, timeout=timeout)


def _resized(maps: torch.Tensor, image: Image.Image) -> torch.Tensor:
    """Maps of one image, `(channels, h, w)`, at its size in float32."""
    maps = maps[None].float()
    return F.interpolate(maps, size=(image.height, image.width), mode="bilinear", align_corners=False)[0]


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
