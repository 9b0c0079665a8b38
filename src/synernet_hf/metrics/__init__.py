"""Segmentation metrics that stream: one confusion matrix, whatever the number of images."""

from .confusion_matrix import MeanIoU


__all__ = ["MeanIoU"]
