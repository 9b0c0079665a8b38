"""The pipeline task `weakly-supervised-segmentation`: images in, one mask per class out."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import GeneratorType
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForSemanticSegmentation, ImageSegmentationPipeline, Pipeline, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .encoder_synernet import closest_name
from .inference_synernet import PreparedBatch, generate_image_cams, prepare_image, resize_maps, segment_images


TASK = "weakly-supervised-segmentation"
# where the image labels of an image come from, unless they are named: from its record, or from the classifiers
LABEL_SOURCES = ("known", "predicted")
OPTIONS = "scales flip image_labels crf return_cams return_confidence return_scores timeout".split()
INDEX = "model.safetensors.index.json"


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

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        _refuse_foreign_weights(model)
        super().__init__(model, *args, **kwargs)

    def _sanitize_parameters(
        self,
        scales: float | tuple[float, ...] | list[float] | None = None,
        flip: bool | None = None,
        image_labels: list[str] | str | None = None,
        crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        return_cams: bool | None = None,
        return_confidence: bool | None = None,
        return_scores: bool | None = None,
        timeout: float | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(f"{TASK} has no option {', '.join(unknown)}; it has {', '.join(OPTIONS)}.")
        if scales is not None:
            given = scales
            try:
                values = np.atleast_1d(np.asarray(scales, dtype=np.float64))
            except (TypeError, ValueError):
                values = np.zeros(0)
            scales = tuple(values.tolist()) if values.ndim == 1 else ()
            if not scales or not all(0 < scale < float("inf") for scale in scales):
                raise ValueError(f"`scales` is {given}; at least one positive scale is expected, such as (1.0,).")
        if crf is not None and not callable(crf):
            raise ValueError(
                f"`crf` is {crf!r}; a function of an image and its class probabilities is expected, such as "
                "`synernet_hf.crf.DenseCRF()`."
            )
        is_name = not isinstance(image_labels, str) or image_labels not in LABEL_SOURCES
        if image_labels is not None and is_name:
            image_labels = self._multi_hot(image_labels)
        maps = {"return_cams": return_cams, "return_confidence": return_confidence}
        for name, value in (maps | {"flip": flip, "return_scores": return_scores}).items():
            if not isinstance(value, bool | np.bool_ | None):
                raise ValueError(f"`{name}` is {value!r}; True or False is expected.")
        acts = (
            {"image_labels": image_labels, "timeout": timeout},
            {"scales": scales, "flip": flip, "crf": crf, **maps},
            {"return_scores": return_scores, **maps},
        )
        return tuple({name: value for name, value in act.items() if value is not None} for act in acts)

    def _multi_hot(self, image_labels: Any) -> torch.Tensor:
        """
        Names, a 0/1 mapping of names, ids of foreground classes from 0, or a 0 or 1 for each of these that ids could
        not be (repeats, bools), as a multi-hot `(num_labels - 1,)`.
        """
        config = self.model.config
        names = {normalize("NFC", name): class_id for name, class_id in config.label2id.items()}
        if isinstance(image_labels, str):
            # a text of several names, unless it is one
            image_labels = (
                [image_labels]
                if normalize("NFC", image_labels) in names
                else re.split(r"\s*[,;|]\s*", image_labels.strip())
            )
        if isinstance(image_labels, dict):
            image_labels = [name for name, is_present in image_labels.items() if is_present]
        values = image_labels.tolist() if isinstance(image_labels, np.ndarray | torch.Tensor) else image_labels
        # other kinds of several values are lists too, and all else is refused below
        values = list(values) if isinstance(values, Iterable) else [values]
        values = [value if isinstance(value, str | int | float) else repr(value) for value in values]
        is_vector = len(values) == config.num_labels - 1 and set(values) <= {0, 1}
        if is_vector and (len(set(values)) < len(values) or all(isinstance(value, bool) for value in values)):
            values = [index for index, is_present in enumerate(values) if is_present]
        if all(isinstance(value, str) for value in values):
            values = [normalize("NFC", name) for name in values]
            unknown = [name for name in values if name not in names]
            if unknown:
                hint = closest_name(unknown[0], list(names)) or f"choose from {', '.join(names)}."
                raise ValueError(f"The image labels {unknown} are not classes of the model; {hint}")
            # the background is no label: it is always possible
            values = [names[name] - 1 for name in values if names[name] != 0]
        if any(value not in range(config.num_labels - 1) for value in values):
            raise ValueError(
                f"Got the image labels {values}; class names are expected, or ids from 0 to {config.num_labels - 2} of "
                "the classes without background."
            )
        vector = torch.zeros(config.num_labels - 1)
        vector[[int(value) for value in values]] = 1
        return vector

    def __call__(self, inputs: Any, **kwargs: Any) -> list[dict[str, Any]] | list[list[dict[str, Any]]]:
        """
        Segment one image or several.

        Args:
            inputs (`str`, `Path`, `PIL.Image.Image`, `np.ndarray`, `torch.Tensor`, `dict`, or several of these):
                Images as `open_image` reads them, or records that hold one as `image`. Several come as a list, as an
                array or tensor of four dimensions, or as a data set or generator, which is read as the answers are,
                one batch after another.
            scales (`float` or `tuple[float, ...]`, *optional*, defaults to `(1.0,)`): Scales at which each image is
                seen; the elementwise maximum of the logits decides. The authors' inference uses
                `model.config.inference_scales`.
            flip (`bool`, *optional*, defaults to `False`): Also see the mirror of every scale.
            image_labels (`list[str]` or `str`, *optional*): Classes that are in the images; no other class but
                background is predicted then. A list of names, or a text of names between commas; `"known"`, to take
                `labels` of each record (names, or ids of foreground classes from 0); or `"predicted"`, for the classes
                that the model's classifiers see.
            crf (`Callable[[np.ndarray, np.ndarray], np.ndarray]`, *optional*): Refines the probabilities, such as
                `synernet_hf.crf.DenseCRF()`: takes the image (shrunk to the processor's `max_pixels`), uint8 of shape
                `(height, width, 3)`, and class probabilities, float32 of shape `(num_labels, height, width)`, and
                returns such probabilities.
            return_cams (`bool`, *optional*, defaults to `False`): Return the fused class activation maps too, of the
                given image labels or else of every class. They are seen at `model.config.cam_scales`.
            return_confidence (`bool`, *optional*, defaults to `False`): Return the confidence too: the share of layers
                and branches whose CAMs agree on a pixel.
            return_scores (`bool`, *optional*, defaults to `False`): Return the class probabilities too.
            timeout (`float`, *optional*): Seconds to wait for a URL.

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
        if isinstance(inputs, tuple) or (isinstance(inputs, np.ndarray | torch.Tensor) and inputs.ndim == 4):
            inputs = list(inputs)
        known = (str, bytes, dict, list, np.ndarray, torch.Tensor, Image.Image, GeneratorType, Dataset)
        if isinstance(inputs, Iterable) and not isinstance(inputs, known):
            inputs = (item for item in inputs)
        return super().__call__(inputs, **kwargs)

    def preprocess(
        self, image: Any, image_labels: torch.Tensor | str | None = None, timeout: float | None = None
    ) -> dict[str, list]:
        # what an undecoded `datasets.Image` column holds is an image
        is_record = isinstance(image, dict) and "image" in image
        record = image if is_record else {"image": image}
        labels = image_labels
        if isinstance(labels, str) and labels == "known":
            if record.get("labels") is None:
                raise ValueError(
                    'An image has no `labels`, but `image_labels="known"`; pass records with `image` and `labels`, or '
                    "name the classes."
                )
            labels = self._multi_hot(record["labels"])
        # lists are collated as they are, so that a batch may hold several sizes
        return {"prepared": [prepare_image(self.image_processor, record["image"], timeout)], "labels": [labels]}

    def _forward(
        self,
        model_inputs: dict[str, list],
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
        return_cams: bool = False,
        return_confidence: bool = False,
    ) -> dict[str, list]:
        prepared = PreparedBatch(_flattened(model_inputs["prepared"]))
        labels = _flattened(model_inputs["labels"])
        if isinstance(labels[0], str):
            # "predicted", for all images
            labels = labels[0]
        segmented = segment_images(
            self.model, self.image_processor, prepared, labels=labels, scales=scales, flip=flip, crf=crf
        )
        outputs = {"segmented": segmented, "cams": [None] * len(prepared)}
        if return_cams or return_confidence:
            given = [item.labels for item in segmented]
            given = None if given[0] is None else given
            outputs["cams"] = generate_image_cams(self.model, self.image_processor, prepared, labels=given)
        return outputs

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        return_cams: bool = False,
        return_confidence: bool = False,
        return_scores: bool = False,
    ) -> list[dict[str, Any]] | dict[str, Any]:
        # a single image comes in a list, one of a batch by itself
        segmented, cams = (
            value[0] if isinstance(value, list) else value
            for value in (model_outputs["segmented"], model_outputs["cams"])
        )
        id2label, size = self.model.config.id2label, tuple(segmented.label_map.shape)
        probabilities = segmented.probabilities()
        masks = _class_masks(segmented.label_map)
        segments = _segments(masks, id2label)
        for segment, mask in zip(segments, masks.values(), strict=True):
            segment["score"] = float(probabilities[mask].mean())
        answer = {"segments": segments}
        if return_cams:
            maps = cams["fused_cams"]
            shown = range(len(maps)) if segmented.labels is None else segmented.labels.nonzero()[:, 0].tolist()
            answer["cams"] = {
                id2label[index + 1]: resize_maps(maps[index : index + 1], size)[0].cpu().numpy() for index in shown
            }
        if return_confidence:
            answer["confidence"] = resize_maps(cams["confidence"], size)[0].cpu().numpy()
        if return_scores:
            scores = segmented.scores(len(id2label)).cpu().numpy()
            answer["scores"] = {id2label[index]: values for index, values in enumerate(scores)}
        return answer if len(answer) > 1 else segments


class SynerNetImageSegmentationPipeline(ImageSegmentationPipeline):
    """
    The stock task `image-segmentation` for a SynerNet: images of a batch may differ in size, and are read as everywhere
    in this package. A model of another kind gets the stock pipeline.
    """

    def __new__(cls, model: PreTrainedModel, *args: Any, **kwargs: Any):
        if model.config.model_type != "synernet":
            return ImageSegmentationPipeline(model, *args, **kwargs)
        return super().__new__(cls)

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        _refuse_foreign_weights(model)
        super().__init__(model, *args, **kwargs)

    def preprocess(self, image: Any, subtask: str | None = None, timeout: float | None = None) -> dict[str, list]:
        return {"prepared": [prepare_image(self.image_processor, image, timeout)]}

    def _forward(self, model_inputs: dict[str, list]) -> dict[str, list]:
        return {"segmented": segment_images(self.model, self.image_processor, _flattened(model_inputs["prepared"]))}

    def postprocess(self, model_outputs: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        segmented = model_outputs["segmented"]
        segmented = segmented[0] if isinstance(segmented, list) else segmented
        masks = _class_masks(segmented.label_map)
        return [{"score": None} | segment for segment in _segments(masks, self.model.config.id2label)]


def _refuse_foreign_weights(model: PreTrainedModel) -> None:
    """`ValueError` if the index in the model's folder names weights elsewhere, which `from_pretrained` follows."""
    index = Path(str(model.name_or_path)) / INDEX
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        foreign = sorted(
            name for name in names if name != PurePosixPath(name).name or name != PureWindowsPath(name).name
        )
        if foreign:
            raise ValueError(f"{index} is refused: it names {foreign[0][:200]!r}, which is not a file of the folder.")


def _class_masks(label_map: torch.Tensor) -> dict[int, torch.Tensor]:
    """Bool mask of every class of a label map, in the order of the ids."""
    class_ids = label_map.flatten().bincount().nonzero()[:, 0].tolist()
    return {class_id: label_map == class_id for class_id in class_ids}


def _segments(masks: dict[int, torch.Tensor], id2label: dict[int, str]) -> list[dict[str, Any]]:
    """Name and image of every mask."""
    return [
        {"label": id2label[class_id], "mask": Image.fromarray(mask.cpu().numpy().astype(np.uint8) * 255)}
        for class_id, mask in masks.items()
    ]


def _flattened(items: list) -> list:
    return [leaf for item in items for leaf in (item if isinstance(item, list) else [item])]


def register_pipeline(model_class: type[PreTrainedModel]) -> None:
    """
    Make the task `weakly-supervised-segmentation` known to `transformers.pipeline`, and the model class to the stock
    `image-segmentation` task, which logs an error for classes missing from its list of names.

    Args:
        model_class (`type[PreTrainedModel]`): The task model. It is loaded through `AutoModelForSemanticSegmentation`,
            the only form that a pipeline saved with its code can name in a process without this package.
    """
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            TASK,
            pipeline_class=SynerNetSegmentationPipeline,
            pt_model=AutoModelForSemanticSegmentation,
            type="image",
        )
    PIPELINE_REGISTRY.check_task("image-segmentation")[1]["impl"] = SynerNetImageSegmentationPipeline
    MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES[model_class.config_class.model_type] = model_class.__name__


__all__ = ["SynerNetSegmentationPipeline", "register_pipeline"]
