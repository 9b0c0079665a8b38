"""Mean intersection over union from one streaming confusion matrix that can be summed over processes."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch


def _as_integer_array(values: "np.ndarray | torch.Tensor", name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`{name}` holds {array.dtype} values; integer class ids are expected: cast or argmax first.")
    return array


def _largest(ids: np.ndarray) -> int:
    """The largest id; negative ones count as very large."""
    return int(ids.view(ids.dtype.str.replace("i", "u")).max(initial=0))


def _mean_of_defined(values: np.ndarray, where: np.ndarray) -> float:
    selected = values[where & ~np.isnan(values)]
    return float(selected.mean()) if selected.size else math.nan


class MeanIoU:
    """
    Streaming intersection over union, recall and precision of label maps.

    Only a `(num_labels, num_labels)` matrix is kept, so the memory does not grow with the number of images. Rows are
    references, columns are predictions. Reference pixels equal to `ignore_index` are left out, whatever was predicted
    there (the rule of PASCAL VOC, and of the paper's evaluation on one confusion matrix of the whole split).

    Args:
        num_labels (`int`): Number `K` of classes, background included. Valid ids are 0 to `K - 1`.
        ignore_index (`int`, *optional*, defaults to 255): Reference id that is not scored.

    Raises:
        ValueError: If `num_labels` is not positive or `ignore_index` is one of the class ids.

    Example:

    ```python
    >>> import numpy as np
    >>> from synernet_hf.metrics import MeanIoU

    >>> metric = MeanIoU(num_labels=2)
    >>> metric.update(np.array([[0, 1], [1, 1]]), np.array([[0, 1], [0, 255]]))
    >>> metric.compute()["mean_iou"]
    0.5
    ```
    """

    def __init__(self, num_labels: int, ignore_index: int = 255):
        if num_labels < 1:
            raise ValueError(f"`num_labels` is {num_labels}; a positive number of classes is expected.")
        if 0 <= ignore_index < num_labels:
            raise ValueError(
                f"`ignore_index` {ignore_index} is also a class id (0 to {num_labels - 1}); choose one outside."
            )
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.confusion = np.zeros((num_labels, num_labels), dtype=np.int64)

    def update(self, predictions: "np.ndarray | torch.Tensor", references: "np.ndarray | torch.Tensor") -> "MeanIoU":
        """
        Count the pixels of one image or of a batch of equal size.

        Args:
            predictions (`np.ndarray` or `torch.Tensor` of integers and shape `([batch_size,] height, width)`):
                Predicted class ids, 0 to `num_labels - 1` wherever the reference is not `ignore_index`.
            references (`np.ndarray` or `torch.Tensor` of integers and the shape of `predictions`): True class ids, 0
                to `num_labels - 1`, or `ignore_index`.

        Returns:
            `MeanIoU`: The metric itself.

        Raises:
            ValueError: If the shapes differ, or an id is neither a class nor, in the references, `ignore_index`.
        """
        predictions = _as_integer_array(predictions, "predictions")
        references = _as_integer_array(references, "references")
        if predictions.shape != references.shape:
            raise ValueError(
                f"Predictions have shape {predictions.shape}, references {references.shape}; equal shapes are "
                "expected: resize the prediction to the size of its mask."
            )
        # predictions of classes alone, and masks with a small ignore id, which has the last row: nothing to sort out
        is_small = self.num_labels <= self.ignore_index < max(256, self.num_labels + 1)
        rows = self.ignore_index + 1 if is_small else self.num_labels
        if _largest(predictions) >= self.num_labels or _largest(references) >= rows:
            predictions, references = self._scored(predictions, references)
        # copied first: arithmetic of mixed types is slower
        places = references.astype(np.int64).ravel()
        places *= self.num_labels
        places += predictions.astype(np.int64, copy=False).ravel()
        counts = np.bincount(places, minlength=rows * self.num_labels).reshape(rows, self.num_labels)
        if counts[self.num_labels : -1].any():
            # it says which ids are neither
            self._scored(predictions, references)
        self.confusion += counts[: self.num_labels]
        return self

    def _scored(self, predictions: np.ndarray, references: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ids of the pixels that are scored, checked."""
        scored = references != self.ignore_index
        predictions, references = predictions[scored], references[scored]
        for name, ids in (("predictions", predictions), ("references", references)):
            if _largest(ids) >= self.num_labels:
                outside = [int(i) for i in np.unique(ids) if not 0 <= i < self.num_labels]
                raise ValueError(
                    f"The {name} hold the ids {outside}; 0 to {self.num_labels - 1} are expected, and "
                    f"{self.ignore_index} in references only: check the class list."
                )
        return predictions, references

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.confusion[:] = 0

    def reduce(self, reducer: "Callable[[torch.Tensor], torch.Tensor] | object") -> "MeanIoU":
        """
        Replace the counts by their sum over all processes. Call it once, on every process, after the last `update`.

        Args:
            reducer (`accelerate.Accelerator` or `Callable[[torch.Tensor], torch.Tensor]`): An accelerator, or a
                function that sums an int64 tensor of shape `(num_labels, num_labels)` over the processes.

        Returns:
            `MeanIoU`: The metric itself.
        """
        counts = torch.from_numpy(self.confusion.copy())
        total = reducer(counts) if callable(reducer) else reducer.reduce(counts.to(reducer.device), reduction="sum")
        self.confusion = total.cpu().numpy().astype(np.int64)
        return self

    def compute(self, class_ids: Sequence[int] | None = None) -> dict[str, float | list[float]]:
        """
        Scores of everything counted so far, in [0, 1].

        A class with neither a reference nor a predicted pixel has no score (`nan`) and is left out of the means; a
        class that is predicted but has no reference pixel has IoU 0, as in `evaluate`'s `mean_iou`.

        Args:
            class_ids (`Sequence[int]`, *optional*): Classes over which the means are taken. All of them when not
                given.

        Returns:
            `dict`: `"mean_iou"`, `"mean_iou_present"` (over the classes with reference pixels), `"recall"` and
            `"precision"` (means over the classes with reference pixels; a class that is never predicted has precision
            0 there), `"pixel_accuracy"` (over all classes) as `float`; `"per_class_iou"`, `"per_class_recall"` and
            `"per_class_precision"` as lists of `num_labels` floats, in the order of the ids.
        """
        chosen = np.zeros(self.num_labels, dtype=bool)
        chosen[list(range(self.num_labels)) if class_ids is None else list(class_ids)] = True
        hits = np.diag(self.confusion).astype(np.float64)
        reference_area = self.confusion.sum(axis=1)
        predicted_area = self.confusion.sum(axis=0)
        present = chosen & (reference_area > 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            iou = hits / (reference_area + predicted_area - hits)
            recall = hits / reference_area
            precision = hits / predicted_area
            pixel_accuracy = float(hits.sum() / reference_area.sum()) if reference_area.sum() else math.nan
        precision[(reference_area > 0) & (predicted_area == 0)] = 0.0
        return {
            "mean_iou": _mean_of_defined(iou, chosen),
            "mean_iou_present": _mean_of_defined(iou, present),
            "recall": _mean_of_defined(recall, present),
            "precision": _mean_of_defined(precision, present),
            "pixel_accuracy": pixel_accuracy,
            "per_class_iou": iou.tolist(),
            "per_class_recall": recall.tolist(),
            "per_class_precision": precision.tolist(),
        }


__all__ = ["MeanIoU"]
