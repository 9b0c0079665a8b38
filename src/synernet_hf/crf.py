"""Fully connected CRF post-processing, behind the optional `crf` extra."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler

import numpy as np


@dataclass(frozen=True)
class DenseCRF:
    """
    Fully connected conditional random field (Krähenbühl and Koltun, 2011): moves the borders of class probabilities to
    the contours of an image. The defaults are the authors' values for PASCAL VOC.

    Args:
        num_iterations (`int`, *optional*, defaults to 10): Mean-field iterations.
        gaussian_sxy, gaussian_compat (`float`, *optional*, defaults to 1 and 1): Smoothness kernel: its standard
            deviation in pixels and its weight.
        bilateral_sxy, bilateral_srgb, bilateral_compat (`float`, *optional*, defaults to 121, 5 and 4): Appearance
            kernel: its standard deviations in pixels and in grey levels of 0 to 255, and its weight.
        min_probability (`float`, *optional*, defaults to 0.01): Classes that are below it at every pixel are left out
            (ours): the time grows with the classes, of which an image shows a few. 0 takes all.

    Raises:
        ImportError: If the package `pydensecrf2` (imported as `pydensecrf`) is not installed.

    Example:

    ```python
    >>> label_map = DenseCRF()(image, probabilities).argmax(axis=0)
    ```
    """

    num_iterations: int = 10
    gaussian_sxy: float = 1.0
    gaussian_compat: float = 1.0
    bilateral_sxy: float = 121.0
    bilateral_srgb: float = 5.0
    bilateral_compat: float = 4.0
    min_probability: float = 0.01

    def __post_init__(self):
        _densecrf_class()

    def __call__(self, image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """
        Refines the class probabilities of one image.

        Args:
            image (`np.ndarray` of dtype uint8 and shape `(height, width, 3)`): The RGB image.
            probabilities (`np.ndarray` of dtype float32 and shape `(num_labels, height, width)`): In [0, 1], summing
                to 1 over the classes.

        Returns:
            `np.ndarray` of dtype float32 and the same shape: the refined probabilities, 0 for a class left out.

        Raises:
            ValueError: If the image is not uint8 RGB or the sizes differ.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"Got an image of shape {image.shape} and dtype {image.dtype}; uint8 (height, width, 3) is expected."
            )
        if probabilities.ndim != 3 or probabilities.shape[1:] != image.shape[:2]:
            raise ValueError(
                f"Got probabilities of shape {probabilities.shape} for an image of shape {image.shape}; "
                "(num_labels, height, width) with the height and width of the image is expected."
            )
        num_labels, height, width = probabilities.shape
        peaks = probabilities.max(axis=(1, 2))
        # the likeliest class stays, whatever the threshold
        chosen = peaks >= min(self.min_probability, peaks.max())
        field = _densecrf_class()(width, height, int(chosen.sum()))
        unary = -np.log(np.clip(probabilities[chosen], 1e-5, 1.0)).reshape(-1, height * width)
        field.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
        field.addPairwiseGaussian(sxy=self.gaussian_sxy, compat=self.gaussian_compat)
        # a copy, because the arrays of PIL images are read-only and the extension refuses those
        field.addPairwiseBilateral(
            sxy=self.bilateral_sxy,
            srgb=self.bilateral_srgb,
            rgbim=np.array(image, order="C"),
            compat=self.bilateral_compat,
        )
        refined = np.zeros((num_labels, height, width), dtype=np.float32)
        refined[chosen] = np.reshape(field.inference(self.num_iterations), (-1, height, width))
        return refined


@contextmanager
def crf_workers(crf: Callable[[np.ndarray, np.ndarray], np.ndarray], num_workers: int) -> Iterator[Executor]:
    """
    Lets a CRF work on images while its caller goes on: `submit(crf, image, probabilities)` returns a future. At the end
    of the context, or an error in it, what has not begun is dropped, and the processes end.

    Args:
        crf (`Callable`): Such as [`DenseCRF`]: what processes import by name, no function within a function.
        num_workers (`int`): Processes; 0 stands for a thread of this process.

    Raises:
        ValueError: If `crf` cannot be sent to a process.
        ChildProcessError: If a process was ended from outside.
    """
    if num_workers < 1:
        pool = ThreadPoolExecutor(1)
    else:
        try:
            ForkingPickler.dumps(crf)
        except Exception as error:
            raise ValueError(
                f"{crf!r} cannot be sent to worker processes ({error}); give a function of a module, or num_workers=0."
            ) from error
        pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _follow_parent)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A process of the CRF ended by itself, perhaps for want of memory; use fewer workers (num_workers)."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """An interruption is the parent's to handle; a process ends with it, however it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _densecrf_class() -> type:
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ImportError(
            "CRF post-processing needs the package pydensecrf2, which is not installed; install it with "
            '`pip install -e ".[crf]"` in a clone of the repository (it is built with a C++ compiler) or leave the CRF out.'
        ) from error
    return DenseCRF2D


__all__ = ["DenseCRF", "crf_workers"]
