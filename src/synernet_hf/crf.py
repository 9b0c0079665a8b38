"""Fully connected CRF post-processing, behind the optional `crf` extra."""

from dataclasses import dataclass

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
            `np.ndarray` of dtype float32 and the same shape: the refined probabilities.

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
        field = _densecrf_class()(width, height, num_labels)
        unary = -np.log(np.clip(probabilities, 1e-5, 1.0)).reshape(num_labels, -1)  # (num_labels, height * width)
        field.setUnaryEnergy(np.ascontiguousarray(unary, dtype=np.float32))
        field.addPairwiseGaussian(sxy=self.gaussian_sxy, compat=self.gaussian_compat)
        # a copy, because the arrays of PIL images are read-only and the extension refuses those
        field.addPairwiseBilateral(
            sxy=self.bilateral_sxy,
            srgb=self.bilateral_srgb,
            rgbim=np.array(image, order="C"),
            compat=self.bilateral_compat,
        )
        refined = field.inference(self.num_iterations)
        return np.asarray(refined, dtype=np.float32).reshape(num_labels, height, width)


def _densecrf_class() -> type:
    try:
        from pydensecrf.densecrf import DenseCRF2D
    except ImportError as error:
        raise ImportError(
            "CRF post-processing needs the package pydensecrf2, which is not installed; install it with "
            '`pip install -e ".[crf]"` in a clone of the repository (it is built with a C++ compiler) or leave the CRF out.'
        ) from error
    return DenseCRF2D


__all__ = ["DenseCRF"]
