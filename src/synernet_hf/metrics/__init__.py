"""Segmentation metrics that stream: one confusion matrix, whatever the number of pictures."""

from .confusion_matrix import MeanIoU


__all__ = ["MeanIoU"]
