"""A column of polygon annotations that is read as a column of masks: each mask is drawn when its record is opened."""

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import numpy as np
from datasets.features.features import register_feature
from datasets.table import array_cast
from PIL import Image
from pycocotools import mask as mask_utils


IGNORE_INDEX = 255


@dataclass
class PolygonMask:
    """
    Feature of a `mask` column whose images are kept as annotations and drawn on access.

    A cell holds `height`, `width` and `objects`, JSON text of pairs `[class id, segmentation]`; the class id of a crowd
    is 255 (ignore), and a segmentation is what COCO allows: a list of polygons, or a run-length encoding. Crowds are
    drawn first, then objects from the largest to the smallest, so that a small object in front of a large one stays
    visible (our choice; annotations say nothing about depth).

    Args:
        decode (`bool`, *optional*, defaults to `True`):
            Gives images (`PIL.Image.Image`, mode `L`); `False` gives the cell.

    Raises:
        ValueError: On access, if a segmentation can not be drawn.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "PIL.Image.Image"
    pa_type: ClassVar[Any] = datasets.Features(
        {"height": datasets.Value("int32"), "width": datasets.Value("int32"), "objects": datasets.Value("string")}
    ).type
    _type: str = field(default="SynerNetPolygonMask", init=False, repr=False)

    def __call__(self) -> Any:
        """The type of the column in Arrow."""
        return self.pa_type

    def encode_example(self, value: dict) -> dict:
        """A cell as it is stored."""
        return value

    def cast_storage(self, storage: Any) -> Any:
        """The stored column, with the numbers in the type they are stored in."""
        return array_cast(storage, self.pa_type)

    def decode_example(self, value: dict, token_per_repo_id: dict | None = None) -> Image.Image:
        """
        Draws one mask.

        Args:
            value (`dict`):
                A cell.
            token_per_repo_id (`dict`, *optional*):
                Part of the interface of features; not used.

        Returns:
            `PIL.Image.Image`: mode `L`, 0 = background, 1..C = classes, 255 = ignore.
        """
        return Image.fromarray(draw_objects(json.loads(value["objects"]), value["height"], value["width"]))


def draw_objects(objects: list[tuple[int, Any]], height: int, width: int) -> np.ndarray:
    """
    Draws objects over one another, crowds first, then the largest to the smallest.

    Args:
        objects (`list[tuple[int, Any]]`):
            Class id (255 for a crowd) and COCO segmentation of each object.
        height (`int`):
            Height of the image.
        width (`int`):
            Width of the image.

    Returns:
        `np.ndarray`: `(height, width)` uint8.

    Raises:
        ValueError: A class id is not between 1 and 255, or a segmentation is none of COCO's kinds or belongs to an
            image of another size.
    """
    wrong = [class_id for class_id, _ in objects if not 1 <= class_id <= IGNORE_INDEX]
    if wrong:
        raise ValueError(
            f"An object has the class id {wrong[0]}, expected are 1 to {IGNORE_INDEX - 1}, or {IGNORE_INDEX} for a "
            "crowd: masks have 8 bits."
        )
    encoded = [(class_id, _run_lengths(segmentation, height, width)) for class_id, segmentation in objects]
    encoded = [(class_id, runs) for class_id, runs in encoded if runs is not None]
    encoded.sort(key=lambda item: (item[0] != IGNORE_INDEX, -int(mask_utils.area(item[1]))))
    ids = np.zeros((height, width), dtype=np.uint8)
    for class_id, runs in encoded:
        ids[mask_utils.decode(runs).astype(bool)] = class_id
    return ids


def _run_lengths(segmentation: Any, height: int, width: int) -> dict | None:
    if isinstance(segmentation, list):
        # fewer than three corners enclose nothing, and pycocotools takes four numbers for a box
        polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
        return mask_utils.merge(mask_utils.frPyObjects(polygons, height, width)) if polygons else None
    if not isinstance(segmentation, dict) or list(segmentation.get("size", ())) != [height, width]:
        raise ValueError(
            f"A segmentation is a list of polygons or a run-length encoding of {height} x {width} pixels (height x "
            f"width), not {str(segmentation)[:60]}: repair the annotation."
        )
    if isinstance(segmentation["counts"], list):
        return mask_utils.frPyObjects(segmentation, height, width)
    return segmentation


with warnings.catch_warnings():
    # datasets marks the registration of features as experimental, on every call
    warnings.simplefilter("ignore")
    register_feature(PolygonMask, "SynerNetPolygonMask")


__all__ = ["PolygonMask", "draw_objects"]
