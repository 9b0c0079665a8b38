"""The one way from images to label maps and CAMs, which the pipeline, the scripts, evaluation and the card share."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from .image_processing_synernet import (
    SynerNetImageProcessor,
    bounded_size,
    open_image,
    resize_maps,
    resized_chunks,
    resized_maximum,
)
from .refinement_synernet import PresentClasses, present_classes, refine_maps


@dataclass
class PreparedImage:
    """
    An image as the network sees it.

    Attributes:
        pixel_values (`torch.Tensor` of shape `(3, h, w)`): float32, normalised and resized if the processor resizes.
        image (`PIL.Image.Image`): the upright RGB image, shrunk to `processor.max_pixels`.
        size (`tuple[int, int]`): height and width of the whole image, the size of all results.
    """

    pixel_values: torch.Tensor
    image: Image.Image
    size: tuple[int, int]


class PreparedBatch(list):
    """
    Prepared images ([`PreparedImage`]) of which several things are asked: what the encoders give for them is kept, so
    that each view is encoded once. Made for one model and for as long as its weights stay.
    """

    def __init__(self, images: Iterable[PreparedImage]):
        super().__init__(images)
        self.seen: dict[tuple[int, ...], dict] = {}


@dataclass
class SegmentedImage:
    """
    Segmentation of one image.

    Attributes:
        label_map (`torch.Tensor` of shape `(height, width)`): int64 class ids at the size of the image.
        labels (`torch.Tensor` of shape `(num_labels - 1,)`, *optional*): Multi-hot classes that the label map was
            limited to; `None` without such a limit.
        maps (`torch.Tensor` of shape `(n, h, w)`): Logits of the classes `class_ids`, at the size of `pixel_values`;
            probabilities if `refined`.
        class_ids (`torch.Tensor` of shape `(n,)`): int64 ids of the classes that the label map may show.
        largest (`torch.Tensor` of shape `(height, width)`): float32, the value of the chosen class in the resized `maps`.
        refined (`bool`): whether `maps` are probabilities.
    """

    label_map: torch.Tensor
    labels: torch.Tensor | None
    maps: torch.Tensor
    class_ids: torch.Tensor
    largest: torch.Tensor
    refined: bool = False

    def probabilities(self) -> torch.Tensor:
        """Probability of the chosen class of each pixel, `(height, width)` float32."""
        if self.refined:
            return self.largest
        total = torch.zeros_like(self.largest)
        for _, chunk in resized_chunks(self.maps, tuple(self.label_map.shape)):
            total += (chunk - self.largest).exp_().sum(dim=0)
        return 1 / total

    def scores(self, num_labels: int, size: tuple[int, int] | None = None) -> torch.Tensor:
        """
        Probabilities of all classes, `(num_labels, height, width)` float32: as large as that says. `size` is that of the
        label map, unless another height and width are given.
        """
        maps = resize_maps(self.maps, tuple(self.label_map.shape) if size is None else size)
        scores = maps.new_zeros(num_labels, *maps.shape[1:])
        scores[self.class_ids] = maps if self.refined else maps.softmax(dim=0)
        return scores


def prepare_image(processor: SynerNetImageProcessor, source: Any, timeout: float | None = None) -> PreparedImage:
    """
    Open an image and process it for the network; arguments and errors as for `open_image`. The processor neither pads
    nor crops here: the model pads by itself, and the whole image is asked for.
    """
    image = open_image(source, timeout)
    size = (image.height, image.width)
    bounded = bounded_size(size, processor.max_pixels)
    if bounded != size:
        image = image.resize(bounded[::-1], Image.Resampling.BOX)
    inputs = processor(images=image, do_center_crop=False, do_pad=False, return_tensors="pt")
    return PreparedImage(inputs["pixel_values"][0], image, size)


@torch.no_grad()
def segment_images(
    model: PreTrainedModel,
    processor: SynerNetImageProcessor,
    images: Sequence[Any],
    labels: str | Sequence[torch.Tensor | None] | None = None,
    scales: tuple[float, ...] | None = (1.0,),
    flip: bool = False,
    inference_branches: str | None = None,
    crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> list[SegmentedImage]:
    """
    Segment images; those of equal processed size go through the model together.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): In evaluation mode, of any dtype and on any device.
        processor ([`SynerNetImageProcessor`]): Saved with the model.
        images (`Sequence`): [`PreparedImage`] or anything that `open_image` reads; or a [`PreparedBatch`].
        labels (`str` or `Sequence[torch.Tensor]`, *optional*): Classes that the label maps may show beside the
            background: `"predicted"`, those that the classifiers see (a logit above 0); or multi-hot
            rows `(num_labels - 1,)`, `None` for an image without limit. Given labels switch the class prior off.
        scales (`tuple[float, ...]`, *optional*, defaults to `(1.0,)`): Scales at which each image is seen; `None`
            stands for `config.inference_scales`.
        flip (`bool`, *optional*, defaults to `False`): Also see the mirror of every scale.
        inference_branches (`str`, *optional*): `"broad"`, `"precise"` or `"both"` (default).
        crf (`Callable`, *optional*): Refines the probabilities: takes the image that [`PreparedImage`] holds, uint8
            `(h, w, 3)`, and class probabilities, float32 `(num_labels, h, w)`, and returns such probabilities.

    Returns:
        `list[SegmentedImage]`: On the device of the model, in the order of `images`.
    """
    prepared = _prepared(processor, images)
    predicted = isinstance(labels, str)
    limits = [None] * len(prepared) if labels is None or predicted else labels

    def run(pixel_values, members, seen):
        own, prior = [limits[index] for index in members], None
        if predicted:
            seen = {} if seen is None else seen
            own = (model.class_scores(pixel_values, seen) > 0).float()
        elif own[0] is not None:
            prior = 0.0
        logits = model.multi_scale_logits(pixel_values, scales, flip, inference_branches, prior, seen)
        images = [prepared[index] for index in members]
        segmented = [_segmented(model.config, *item) for item in zip(logits, own, images, strict=True)]
        if crf is None:
            return segmented
        num_labels = model.config.num_labels
        return [_with_crf(*item, num_labels, crf) for item in zip(segmented, images, strict=True)]

    return _in_equal_batches(model, prepared, run, [limit is None for limit in limits])


def _segmented(config, maps, labels, prepared: PreparedImage) -> SegmentedImage:
    if labels is None:
        class_ids = torch.arange(len(maps), device=maps.device)
    else:
        labels = labels.to(maps.device)
        class_ids = torch.cat([labels.new_zeros(1, dtype=torch.int64), labels.nonzero()[:, 0] + 1])
        maps = maps[class_ids]
    if config.refine_predictions:
        maps = maps.softmax(dim=0)
        # a class below its even share everywhere wins nowhere, and a map of zeros takes no time
        maps = maps * (maps.amax(dim=(1, 2), keepdim=True) >= 1 / len(maps))
        maps = refine_maps(config, prepared.pixel_values.to(maps.device), maps)
    return _decided(maps, class_ids, labels, prepared.size, config.refine_predictions)


def _with_crf(segmented: SegmentedImage, prepared: PreparedImage, num_labels: int, crf) -> SegmentedImage:
    image, class_ids = np.asarray(prepared.image), segmented.class_ids
    refined = crf(image, segmented.scores(num_labels, image.shape[:2]).cpu().numpy())
    maps = torch.from_numpy(np.asarray(refined, dtype=np.float32)).to(class_ids.device)[class_ids]
    return _decided(maps, class_ids, segmented.labels, prepared.size, True)


def _decided(maps, class_ids, labels, size: tuple[int, int], refined: bool) -> SegmentedImage:
    largest, positions = resized_maximum(maps, size)
    label_map = positions if labels is None else class_ids[positions]
    return SegmentedImage(label_map, labels, maps, class_ids, largest, refined)


@torch.no_grad()
def score_classes(model: PreTrainedModel, processor: SynerNetImageProcessor, images: Sequence[Any]) -> list:
    """Class scores `(num_labels - 1,)` of each image, unnormalised, as `model.class_scores` gives them."""
    prepared = _prepared(processor, images)
    return _in_equal_batches(model, prepared, lambda values, _, seen: model.class_scores(values, seen))


def predict_labels(model: PreTrainedModel, processor: SynerNetImageProcessor, images: Sequence[Any]) -> list:
    """Multi-hot labels `(num_labels - 1,)`, float32, that the classifiers see in each image: a logit above 0."""
    return [(scores > 0).float() for scores in score_classes(model, processor, images)]


@torch.no_grad()
def generate_image_cams(
    model: PreTrainedModel,
    processor: SynerNetImageProcessor,
    images: Sequence[Any],
    labels: Sequence[torch.Tensor] | None = None,
    refine: bool = True,
    **options: Any,
) -> list[dict[str, Any]]:
    """
    Generate the class activation maps of images; those of equal processed size go through the model together.

    Args:
        model, processor, images: As in [`segment_images`].
        labels (`Sequence[torch.Tensor]`, *optional*): Multi-hot rows `(num_labels - 1,)`; the maps of other classes
            are zero. `None` gives the maps of all.
        refine (`bool`, *optional*, defaults to `True`): Refine the maps by the image's colours where
            `config.refine_predictions` says so; plain ones never are.
        options: `scales`, `flip`, `plain` and `all_classes` of `model.generate_cams`.

    Returns:
        `list[dict]`: Per image the fields of [`SynerNetCamOutput`], without the batch dimension: maps
        `(num_labels - 1, h, w)` and `confidence` `(1, h, w)` at the size of `pixel_values`, to be resized by
        `processor.post_process_class_activation_maps` or [`resize_maps`]. With `all_classes=False` the maps are those
        of the entry `present`, the [`PresentClasses`] of the image.
    """
    prepared = _prepared(processor, images)
    refine = refine and model.config.refine_predictions and not options.get("plain")

    def run(pixel_values, members, seen):
        given = None
        if labels is not None:
            given = torch.stack([torch.as_tensor(labels[index], dtype=torch.float32) for index in members])
            given = given.to(pixel_values.device)
        cams = model.generate_cams(pixel_values, given, seen=seen, **options)
        results = [{name: maps[row] for name, maps in cams.items()} for row in range(len(members))]
        if given is not None and not options.get("all_classes", True):
            present = present_classes(given)
            for row, result in enumerate(results):
                result["present"] = PresentClasses(present.ids[row, None], present.mask[row, None])
        for row, result in enumerate(results if refine else ()):
            names = [name for name in result if name.endswith("_cams")]
            pixels = prepared[members[row]].pixel_values.to(pixel_values.device)
            refined = refine_maps(model.config, pixels, torch.cat([result[name] for name in names]))
            result |= zip(names, refined.chunk(len(names)), strict=True)
        return results

    return _in_equal_batches(model, prepared, run)


def _prepared(processor: SynerNetImageProcessor, images: Sequence[Any]) -> list[PreparedImage]:
    if isinstance(images, PreparedBatch):
        return images
    return [image if isinstance(image, PreparedImage) else prepare_image(processor, image) for image in images]


def _in_equal_batches(
    model: PreTrainedModel, prepared: list[PreparedImage], run: Callable, kinds: Sequence | None = None
) -> list:
    """
    What `run` answers for every image, in their order. It is given the pixel values `(n, 3, h, w)` of the images of one
    size (and kind) as the model takes them, their positions, and the views of a [`PreparedBatch`] seen so far.
    """
    results = [None] * len(prepared)
    kinds = results if kinds is None else kinds
    keys = [(tuple(item.pixel_values.shape[-2:]), kind) for item, kind in zip(prepared, kinds, strict=True)]
    for key in dict.fromkeys(keys):
        members = [index for index, other in enumerate(keys) if other == key]
        batch = torch.stack([prepared[index].pixel_values for index in members]).to(model.device, model.dtype)
        seen = prepared.seen.setdefault(tuple(members), {}) if isinstance(prepared, PreparedBatch) else None
        for index, answer in zip(members, run(batch, members, seen), strict=True):
            results[index] = answer
    return results


__all__ = [
    "PreparedBatch",
    "PreparedImage",
    "SegmentedImage",
    "generate_image_cams",
    "predict_labels",
    "prepare_image",
    "resize_maps",
    "score_classes",
    "segment_images",
]
