"""Scores of a model's segmentation and class activation maps on a split with masks, streaming and sharded."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, TypedDict, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset

from synernet_hf.crf import crf_workers
from synernet_hf.data.checks import DECODING_ERRORS, mask_ids
from synernet_hf.data.schema import multi_hot
from synernet_hf.metrics import MeanIoU
from synernet_hf.model import (
    PreparedBatch,
    PreparedImage,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    generate_image_cams,
    predict_labels,
    prepare_image,
    segment_images,
)
from synernet_hf.model.encoder_synernet import closest_name
from synernet_hf.model.image_processing_synernet import resized_maximum
from synernet_hf.model.inference_synernet import score_classes
from synernet_hf.progress import progress_bar
from synernet_hf.training.stopping import StopRequest, outlive_sigterm


CAM_KINDS = ("broad_cam", "precise_cam", "fused_cam", "broad_aux_cam", "precise_aux_cam")
# images of one batch have no more pixels together, unless it is a single one: this bounds the memory
MAX_BATCH_PIXELS = 2**20
PART_KINDS = ("broad_segmentation", "precise_segmentation", "segmentation_given_labels")
BASELINE_KINDS = ("single_scale_cam", "single_scale_cam_predicted", "background_only")


class PredictionKinds(TypedDict, total=False):
    """
    Which predictions [`evaluate_model`] scores beside the plain segmentation, and how.

    Attributes:
        multi_scale (`bool`, defaults to `False`): Also score the segmentation at `config.inference_scales`,
            elementwise maximum over the scales.
        flip (`bool`, defaults to `False`): Also score that segmentation with the mirror of every scale.
        cams (`bool`, defaults to `True`): Also score the class activation maps, given the true image labels.
        parts (`bool`, defaults to `False`): Also score the segmentation of each branch alone, the segmentation given the
            true image labels, and the class scores.
        baselines (`bool`, defaults to `False`): Also score a plain single-scale CAM, once with the true image labels
            and once with those that the classifier predicts, and a prediction of nothing but background.
        crf (`Callable`, *optional*): Post-processing of the last segmentation listed, such as
            [`~synernet_hf.crf.DenseCRF`]: takes the image (uint8, `(height, width, 3)`) and class probabilities
            (float32, `(num_labels, height, width)`), returns refined probabilities of the same shape. Adds a kind
            whose name ends in `_crf`. With workers it runs in as many other processes while the model goes on.
        progress (`bool`, defaults to `False`): Show a progress bar on the first process.
        batch_size (`int`, defaults to 4): Largest number of images, of equal processed size and with a million pixels
            together, that go through the model at once. The scores do not depend on it.
        num_workers (`int`, defaults to 0): Worker processes that decode and process images; 0 uses this process.
        stop (`StopRequest`, *optional*): Of a training. Where it says so, nothing is returned and scoring ends early.
    """

    multi_scale: bool
    flip: bool
    cams: bool
    parts: bool
    baselines: bool
    crf: Callable[[np.ndarray, np.ndarray], np.ndarray] | None
    progress: bool
    batch_size: int
    num_workers: int
    stop: StopRequest | None


@contextmanager
def inference_mode_of(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _metric_class_ids(class_names: Sequence[str], metric_classes: Sequence[str] | None) -> list[int]:
    if metric_classes is None:
        return list(range(len(class_names)))
    unknown = [name for name in metric_classes if name not in class_names]
    if unknown or not metric_classes:
        fault = f"hold {unknown}, which the data set does not name" if unknown else "are an empty list"
        meant = closest_name(unknown[0], class_names) if unknown else None
        hint = meant or f"choose from {', '.join(class_names)}."
        raise ValueError(f"The metric classes {fault}; {hint}")
    return [class_names.index(name) for name in metric_classes]


class _ClassOrder:
    """Brings ids and labels of a data set into the order of the model's classes, which may be more, by name."""

    def __init__(self, class_names: Sequence[str], config) -> None:
        self.names = [config.id2label[label] for label in range(config.num_labels)]
        self.num_given = len(class_names)
        unknown = [name for name in class_names if name not in self.names]
        if unknown:
            raise ValueError(
                f"The model does not know the data set's classes {', '.join(unknown)}: it was trained on "
                f"{', '.join(self.names)}. Rename them, or evaluate on data with these classes."
            )
        self.positions = np.array([self.names.index(name) for name in class_names])
        self.ignore_index = config.semantic_loss_ignore_index

    def mask(self, record: dict) -> np.ndarray:
        """The record's class ids `(height, width)`, checked, in the model's order."""
        image, mask = record["image"], record["mask"]
        name = record.get("image_id", "without id")
        if mask is None:
            raise ValueError(f"Image {name} has no mask; every image to evaluate on needs one: leave it out.")
        try:
            ids = mask_ids(mask, image.size, self.num_given, self.ignore_index)
        except ValueError as error:
            raise ValueError(f"The mask of image {name} {error}.") from error
        scored = ids != self.ignore_index
        ids[scored] = self.positions[ids[scored]]
        return ids

    def labels(self, record: dict) -> list[int]:
        """The record's label ids in the model's order."""
        return [int(self.positions[label + 1]) - 1 for label in record["labels"]]


def _check_inputs(dataset: Dataset, needs_labels: bool) -> None:
    if len(dataset) == 0:
        raise ValueError("The split to evaluate on is empty; choose another split.")
    needed = ["image", "mask", "labels"] if needs_labels else ["image", "mask"]
    missing = [name for name in needed if name not in dataset.column_names]
    if missing:
        raise ValueError(
            f"The split to evaluate on lacks the columns {missing} (it has {list(dataset.column_names)}); scores need "
            "masks, see docs/data.md."
        )


def single_scale_cams(model, processor, images: Sequence[PreparedImage], labels: Sequence[torch.Tensor]) -> list[dict]:
    """
    The baseline CAMs of images given multi-hot `labels` `(num_labels - 1,)`: `cams` `(n, h, w)` in [0, 1], mean of both
    branches' final-layer CAMs at scale 1 without mirror, propagation and consensus, and the classes that are `present`.
    Each map is divided by its maximum, as every CAM of the method is (our choice for the mean of two).
    """
    found = generate_image_cams(
        model, processor, images, labels, scales=(1.0,), flip=False, plain=True, all_classes=False
    )
    means = [(maps["broad_cams"] + maps["precise_cams"]) / 2 for maps in found]
    return [
        {"cams": mean / (mean.amax(dim=(1, 2), keepdim=True) + 1e-5), "present": maps["present"]}
        for mean, maps in zip(means, found, strict=True)
    ]


class _EvaluationImage(NamedTuple):
    """An image ready for the model, its mask `(height, width)` and its multi-hot labels `(num_labels - 1,)`."""

    prepared: PreparedImage
    mask: torch.Tensor
    labels: torch.Tensor | None


class _EvaluationImages(torch.utils.data.Dataset):
    """Decodes and processes images. Returns the error of an unusable record: raised in a worker, it gets a traceback."""

    def __init__(self, dataset, processor, order: _ClassOrder, positions: range, scorer: "_KindScorer") -> None:
        self.dataset, self.processor, self.order, self.positions = dataset, processor, order, positions
        self.needs_labels, self.needs_image = scorer.needs_labels, scorer.crf is not None

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> _EvaluationImage | Exception:
        try:
            record = self.dataset[self.positions[index]]
        except DECODING_ERRORS as error:
            kind = OSError if isinstance(error, OSError) and error.errno is not None else ValueError
            return kind(f"Record {self.positions[index]} of the split to evaluate on cannot be read ({error})")
        try:
            mask = torch.from_numpy(self.order.mask(record))
            prepared = prepare_image(self.processor, record["image"])
        except ValueError as error:
            return error
        if not self.needs_image:
            prepared = dataclasses.replace(prepared, image=None)
        labels = multi_hot(self.order.labels(record), len(self.order.names) - 1) if self.needs_labels else None
        return _EvaluationImage(prepared, mask, labels)


def _equal_batches(items: Iterator[_EvaluationImage], batch_size: int) -> Iterator[list[_EvaluationImage]]:
    """Groups images by their processed size; what waits is bounded by `MAX_BATCH_PIXELS` and 8 batches."""
    waiting: dict[tuple[int, int], list[_EvaluationImage]] = {}
    for item in items:
        size = tuple(item.prepared.pixel_values.shape[-2:])
        group = waiting.setdefault(size, [])
        group.append(item)
        pixels = max(size[0] * size[1], item.prepared.size[0] * item.prepared.size[1])
        if len(group) >= min(batch_size, MAX_BATCH_PIXELS // pixels):
            yield waiting.pop(size)
        elif sum(map(len, waiting.values())) >= 8 * batch_size:
            yield waiting.pop(max(waiting, key=lambda key: len(waiting[key])))
    yield from waiting.values()


class _KindScorer:
    """Label maps of a batch of images of equal size, one kind of prediction after another."""

    def __init__(self, model, processor, kinds: PredictionKinds):
        self.model = model
        self.processor = processor
        self.cams = kinds.get("cams", True)
        self.parts = kinds.get("parts", False)
        self.baselines = kinds.get("baselines", False)
        self.crf = kinds.get("crf")
        scales = tuple(model.config.inference_scales)
        self.segmentations = {"segmentation": {"scales": (1.0,), "flip": False}}
        if kinds.get("multi_scale", False):
            self.segmentations["segmentation_multi_scale"] = {"scales": scales, "flip": False}
        if kinds.get("flip", False):
            self.segmentations["segmentation_multi_scale_flip"] = {"scales": scales, "flip": True}
        refined = [f"{list(self.segmentations)[-1]}_crf"] * (self.crf is not None)
        self.names = [*self.segmentations, *refined, *PART_KINDS * self.parts, *CAM_KINDS * self.cams]
        self.names += BASELINE_KINDS * self.baselines
        self.needs_labels = self.cams or self.parts or self.baselines
        # scores and true labels of each image, `(num_labels - 1,)` each
        self.class_scores: list[tuple[np.ndarray, np.ndarray]] = []

    def __call__(
        self, batch: list[_EvaluationImage], crf_pool: Executor | None
    ) -> Iterator[tuple[str, list[torch.Tensor | Future]]]:
        """Yields `(kind, label maps at the size of each image)`; of a CRF, futures of its probabilities."""
        prepared = PreparedBatch(item.prepared for item in batch)
        for name, options in self.segmentations.items():
            segmented = segment_images(self.model, self.processor, prepared, **options)
            yield name, [item.label_map for item in segmented]
        if crf_pool is not None:
            images = [np.asarray(item.image) for item in prepared]
            maps = [
                item.scores(self.model.config.num_labels, image.shape[:2]).cpu().numpy()
                for item, image in zip(segmented, images, strict=True)
            ]
            yield f"{name}_crf", [crf_pool.submit(self.crf, *pair) for pair in zip(images, maps, strict=True)]
        if not self.needs_labels:
            return
        labels = [item.labels for item in batch]
        if self.parts:
            for kind, branch, given in zip(
                PART_KINDS, ("broad", "precise", "both"), (None, None, labels), strict=True
            ):
                segmented = segment_images(self.model, self.processor, prepared, given, inference_branches=branch)
                yield kind, [item.label_map for item in segmented]
            scores = score_classes(self.model, self.processor, prepared)
            self.class_scores += [
                (own.float().cpu().numpy(), given.numpy() > 0) for own, given in zip(scores, labels, strict=True)
            ]
        if self.cams:
            cams = generate_image_cams(self.model, self.processor, prepared, labels, all_classes=False)
            for kind in CAM_KINDS:
                yield kind, self._label_maps(cams, f"{kind}s", prepared)
        if self.baselines:
            # like the segmentation, without the true image labels
            predicted = predict_labels(self.model, self.processor, prepared)
            for kind, given in zip(BASELINE_KINDS, (labels, predicted), strict=False):
                cams = single_scale_cams(self.model, self.processor, prepared, given)
                yield kind, self._label_maps(cams, "cams", prepared)
            yield "background_only", [torch.zeros(item.size, dtype=torch.int64) for item in prepared]

    def _label_maps(self, cams: list[dict], name: str, prepared: list[PreparedImage]) -> list[torch.Tensor]:
        threshold, sizes = self.model.config.background_threshold, [item.size for item in prepared]
        maps = [item[name] for item in cams]
        slots = self.processor.post_process_class_activation_maps(maps, threshold, target_sizes=sizes)
        # slot of the present classes → id
        ids = [F.pad(item["present"].ids[0] + 1, (1, 0)) for item in cams]
        return [own[label_map] for own, label_map in zip(ids, slots, strict=True)]


def evaluate_model(
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    dataset: Dataset,
    *,
    class_names: Sequence[str],
    metric_classes: Sequence[str] | None = None,
    max_samples: int | None = None,
    accelerator: Accelerator | None = None,
    **kinds: Unpack[PredictionKinds],
) -> dict[str, dict]:
    """
    Scores the segmentation and the class activation maps of a model on images with masks.

    Predictions are those of the pipeline: [`segment_images`] at the size of the image. Only one confusion matrix per
    kind of prediction is kept, so memory does not grow with the split. With an accelerator each process takes every
    n-th image, and the matrices are summed at the end: all processes must call this function and all get the same
    result. CAMs are scored as in the paper's tables: the true image labels, and the single threshold
    `config.background_threshold` (at or below it, background).

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model, unwrapped, on its device. Its training mode is
            restored afterwards.
        processor ([`SynerNetImageProcessor`]): Its image processor.
        dataset (`datasets.Dataset`): Decoded records with `image` and `mask` (positions in `class_names`,
            `config.semantic_loss_ignore_index` = ignore) and, for CAMs, `labels` (ids over the foreground classes of
            `class_names`).
        class_names (`Sequence[str]`): The data set's class names in the order of its ids, background first. Classes
            are matched with the model's by name; the model may know more. Results are in the model's order.
        metric_classes (`Sequence[str]`, *optional*): Names of the classes that the means are taken over (default:
            all).
        max_samples (`int`, *optional*): Score the first so many images only.
        accelerator (`accelerate.Accelerator`, *optional*): Shares the images over its processes.
        kinds ([`PredictionKinds`]): What to score beside the plain segmentation, and how.

    Returns:
        `dict[str, dict]`: By kind (`"segmentation"`, `"segmentation_multi_scale"`, `"segmentation_multi_scale_flip"`,
        the last of these + `"_crf"`, `"broad_segmentation"`, `"precise_segmentation"`, `"segmentation_given_labels"`,
        `"broad_cam"`, `"precise_cam"`, `"fused_cam"`, `"broad_aux_cam"`,
        `"precise_aux_cam"`, `"single_scale_cam"`, `"single_scale_cam_predicted"`, `"background_only"`, as asked for)
        a dictionary of scores in [0, 1]: `"mean_iou"`, `"recall"` and `"precision"` (means over the metric classes),
        `"foreground_recall"` and `"foreground_precision"` (the same without background), `"mean_iou_present"` (over
        all classes that occur in the masks), `"pixel_accuracy"`, `"per_class_iou"` (by name, `None` for a class that
        does not occur) and `"num_images"`. With `parts` also `"classification"`: `"mean_average_precision"` of the class
        scores over those metric classes that occur, `"average_precision"` (by name, `None` for a class that does not)
        and `"num_images"`; and the segmentation's scores have `"confusion"`, for each class that occurs the share of
        its pixels that is taken for each class.

    Raises:
        ValueError: If the split is empty or lacks a column, a mask does not fit its image or the class list, the
            model does not know a class of the list, or a metric class is unknown.
    """
    scorer = _KindScorer(model, processor, kinds)
    order = _ClassOrder(class_names, model.config)
    _check_inputs(dataset, needs_labels=scorer.needs_labels)
    dataset = dataset.with_format(None)
    class_ids = _metric_class_ids(order.names, metric_classes)
    num_images = len(dataset) if max_samples is None else min(max_samples, len(dataset))
    if num_images < 1:
        raise ValueError(f"`max_samples` is {max_samples}; a positive number of images is expected.")
    first, step = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    ignore_index = model.config.semantic_loss_ignore_index
    metrics = {name: MeanIoU(model.config.num_labels, ignore_index) for name in scorer.names}
    images = _EvaluationImages(dataset, processor, order, range(first, num_images, step), scorer)
    # a loader draws a seed when it starts; from the global generator that would shift the numbers of a resumed run
    loader = torch.utils.data.DataLoader(
        images,
        batch_size=None,
        num_workers=kinds.get("num_workers", 0),
        generator=torch.Generator(),
        worker_init_fn=outlive_sigterm,
    )
    # inside a training the bar goes when it is full, so that the training's own stays
    bar = progress_bar(loader, desc="evaluate", leave=None, disable=not kinds.get("progress", False) or first > 0)
    workers, stop = kinds.get("num_workers", 0), kinds.get("stop")
    waiting: deque[tuple[str, Future, _EvaluationImage]] = deque()

    def finish(number: int) -> None:
        """Scores refined images until so many are left."""
        while len(waiting) > number:
            name, future, item = waiting.popleft()
            refined = torch.from_numpy(np.asarray(future.result(), dtype=np.float32))
            metrics[name].update(resized_maximum(refined, item.prepared.size)[1], item.mask)

    with (
        inference_mode_of(model),
        nullcontext() if scorer.crf is None else crf_workers(scorer.crf, workers) as crf_pool,
    ):
        for batch in _equal_batches(map(_checked, bar), kinds.get("batch_size", 4)):
            for name, label_maps in scorer(batch, crf_pool):
                for label_map, item in zip(label_maps, batch, strict=True):
                    if isinstance(label_map, Future):
                        waiting.append((name, label_map, item))
                    else:
                        metrics[name].update(label_map, item.mask)
            # what a CRF has not come to yet keeps its probabilities
            finish(2 * workers)
            if stop is not None and stop.signalled_at is not None:
                break
        finish(0)
    if stop is not None and stop.agreed(now=True):
        return {}
    if accelerator is not None:
        for metric in metrics.values():
            metric.reduce(accelerator)
    results = {name: _summary(metric, order.names, class_ids, num_images) for name, metric in metrics.items()}
    if scorer.parts:
        results["segmentation"]["confusion"] = _confusion(metrics["segmentation"], order.names)
        scored = scorer.class_scores if accelerator is None else gather_object(scorer.class_scores)
        results["classification"] = _class_summary(scored, order.names, class_ids)
    return results


def _checked(item: _EvaluationImage | Exception) -> _EvaluationImage:
    if isinstance(item, Exception):
        raise item
    return item


def _summary(metric: MeanIoU, class_names: Sequence[str], class_ids: list[int], num_images: int) -> dict:
    chosen = metric.compute(class_ids)
    foreground = metric.compute([class_id for class_id in class_ids if class_id > 0])
    overall = metric.compute()
    named_ious = zip(class_names, overall["per_class_iou"], strict=True)
    return {
        "mean_iou": chosen["mean_iou"],
        "mean_iou_present": overall["mean_iou_present"],
        "recall": chosen["recall"],
        "precision": chosen["precision"],
        "foreground_recall": foreground["recall"],
        "foreground_precision": foreground["precision"],
        "pixel_accuracy": overall["pixel_accuracy"],
        "per_class_iou": {name: None if math.isnan(iou) else iou for name, iou in named_ious},
        "num_images": num_images,
    }


def _confusion(metric: MeanIoU, class_names: Sequence[str]) -> dict[str, dict[str, float]]:
    areas = metric.confusion.sum(axis=1)
    return {
        name: {other: float(count / area) for other, count in zip(class_names, counts, strict=True) if count}
        for name, counts, area in zip(class_names, metric.confusion, areas, strict=True)
        if area
    }


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """
    Mean over the positive images of the share of positives among the images that score at least as high; NaN without
    positives. `scores` `(n,)` float, `labels` `(n,)` bool.
    """
    reached = scores[labels]
    if not len(reached):
        return math.nan
    at_least = len(scores) - np.searchsorted(np.sort(scores), reached)
    return float(((len(reached) - np.searchsorted(np.sort(reached), reached)) / at_least).mean())


def _class_summary(
    scored: list[tuple[np.ndarray, np.ndarray]], class_names: Sequence[str], class_ids: list[int]
) -> dict:
    scores, labels = map(np.stack, zip(*scored, strict=True))
    precisions = [average_precision(*columns) for columns in zip(scores.T, labels.T, strict=True)]
    chosen = [precisions[i - 1] for i in class_ids if i > 0 and not math.isnan(precisions[i - 1])]
    named = zip(class_names[1:], precisions, strict=True)
    return {
        "mean_average_precision": float(np.mean(chosen)) if chosen else math.nan,
        "average_precision": {name: None if math.isnan(value) else value for name, value in named},
        "num_images": len(scored),
    }


def results_table(results: dict[str, dict], metric_classes: Sequence[str]) -> str:
    """
    Writes scores as Markdown tables: the means of every kind of prediction, the IoU of every metric class, and, where
    they are known, the average precision of each class's scores and what the pixels of each class are taken for.

    Args:
        results (`dict[str, dict]`): What [`evaluate_model`] returned.
        metric_classes (`Sequence[str]`): Names of the classes that its means were taken over.

    Returns:
        `str`: The tables; scores in percent, `-` where a score is not defined.
    """
    classification = results.get("classification")
    results = {kind: values for kind, values in results.items() if kind != "classification"}
    scores = ("mean_iou", "mean_iou_present", "recall", "precision", "foreground_recall", "foreground_precision")
    titles = (f"mIoU ({len(metric_classes)} classes)", "mIoU (all present)", "recall", "precision")
    titles += ("foreground recall", "foreground precision")
    means = {kind: [values[name] for name in scores] for kind, values in results.items()}
    classes = {kind: [values["per_class_iou"][name] for name in metric_classes] for kind, values in results.items()}
    tables = [_markdown("prediction", titles, means), _markdown("IoU", metric_classes, classes)]
    if classification is not None:
        precisions = {name: classification["average_precision"].get(name) for name in metric_classes}
        precisions = {"mean": classification["mean_average_precision"]} | {
            name: value for name, value in precisions.items() if value is not None
        }
        tables.append(_markdown("average precision", list(precisions), {"class scores": list(precisions.values())}))
    confusion = results.get("segmentation", {}).get("confusion")
    if confusion is not None:
        rows = {name: [row.get(other, 0.0) for other in metric_classes] for name, row in confusion.items()}
        rows = {name: row for name, row in rows.items() if name in metric_classes}
        others = ["others"] if any(set(confusion[name]) - set(metric_classes) for name in rows) else []
        for row in rows.values() if others else ():
            row.append(max(1 - sum(row), 0.0))
        tables.append(_markdown("pixels of, taken for", [*metric_classes, *others], rows))
    return "\n\n".join(tables)


def _markdown(corner: str, titles: Sequence[str], rows: dict[str, list[float | None]]) -> str:
    cells = [[corner, *titles]] + [[kind, *map(_percent, values)] for kind, values in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]])
    # names to the left, numbers to the right
    lines = [[f"{cell:{'>' if column else '<'}{widths[column]}}" for column, cell in enumerate(row)] for row in cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"
