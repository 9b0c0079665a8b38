"""Samples → one batch of the training loop."""

from collections.abc import Sequence

import torch

from synernet_hf.data.schema import multi_hot


class SynerNetDataCollator:
    """
    Stacks the samples of [`TrainTransform`] into a batch.

    Args:
        num_classes (`int`):
            Number C of foreground classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, samples: Sequence[dict]) -> dict[str, torch.Tensor]:
        """
        Stacks samples of one crop size.

        Args:
            samples (`Sequence[dict]`):
                B dictionaries with `image` (`(3, S, S)` uint8), `labels` (class ids) and `valid_box` (`(4,)`
                int64); other entries are left out.

        Returns:
            `dict[str, torch.Tensor]`: `images` (`(B, 3, S, S)` uint8), `labels` (`(B, C)` float32 multi-hot) and
            `valid_boxes` (`(B, 4)` int64: top, bottom, left, right).
        """
        return {
            "images": torch.stack([sample["image"] for sample in samples]),
            "labels": torch.stack([multi_hot(sample["labels"], self.num_classes) for sample in samples]),
            "valid_boxes": torch.stack([sample["valid_box"] for sample in samples]),
        }


__all__ = ["SynerNetDataCollator"]
