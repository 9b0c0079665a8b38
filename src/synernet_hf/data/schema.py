"""The one record contract of every data source, and the class lists of the public benchmarks."""

import difflib
import json
import logging
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np


logger = logging.getLogger(__name__)

VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()

# The 80 official COCO categories in the order of their category ids, numbered 1 to 80 without gaps.
COCO_CLASSES = [
    "background",
    *"person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,"
    "suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,"
    "cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,"
    "toothbrush".split(","),
]


def id2label_from(names: Sequence[str]) -> dict[int, str]:
    """
    Numbers a class list for `SynerNetConfig(id2label=...)`.

    Args:
        names (`Sequence[str]`):
            Class names, background first.

    Returns:
        `dict[int, str]`: `{0: "background", 1: first foreground class, ...}`.

    Raises:
        ValueError: The first name is not `"background"`, or a name occurs twice.
    """
    names = list(names)
    if not names or names[0] != "background":
        raise ValueError(f"A class list starts with 'background', but this one starts with {names[:1]}: prepend it.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Class names must be unique, but {', '.join(repeated)} occurs more than once.")
    return dict(enumerate(names))


def class_index(name: str, class_names: Sequence[str]) -> int:
    """
    Finds a class by its name.

    Args:
        name (`str`):
            The name to look up, spelled as in `class_names`.
        class_names (`Sequence[str]`):
            Class names, background first.

    Returns:
        `int`: The id of the class, 0 for the background.

    Raises:
        ValueError: The name is not in the list; the sentence names close matches.
    """
    if name in class_names:
        return list(class_names).index(name)
    close = difflib.get_close_matches(name, class_names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the classes are {', '.join(class_names[1:])}."
    raise ValueError(f"Unknown class name {name!r}: {hint}")


def check_on_bad_image(on_bad_image: str) -> None:
    """
    Refuses another word than the two that there are.

    Args:
        on_bad_image (`str`):
            `"raise"` or `"skip"`.

    Raises:
        ValueError: It is neither.
    """
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}, but 'raise' or 'skip' is expected.")


def record_features(with_mask: bool, mask_feature: Any = None) -> datasets.Features:
    """
    The columns of a split.

    Args:
        with_mask (`bool`):
            Adds the `mask` column, which evaluation splits have where masks exist and training splits never have.
        mask_feature (`Any`, *optional*, defaults to `datasets.Image()`):
            Another feature that gives masks as images.

    Returns:
        `datasets.Features`: `image` (`datasets.Image`), `image_id` (`string`), `image_labels` (list of int64,
        multi-hot over the foreground classes) and optionally `mask` (`datasets.Image`: 0 = background, 1..C = class
        ids, 255 = ignore).
    """
    features = {
        "image": datasets.Image(),
        "image_id": datasets.Value("string"),
        "image_labels": datasets.List(datasets.Value("int64")),
    }
    if with_mask:
        features["mask"] = mask_feature or datasets.Image()
    return datasets.Features(features)


def build_split(
    images: Sequence,
    image_ids: Sequence[str],
    image_labels: np.ndarray,
    class_names: Sequence[str],
    masks: Sequence | None = None,
    mask_feature: Any = None,
    skipped: Sequence[str] = (),
) -> datasets.Dataset:
    """
    Builds one split from columns; no image is opened.

    Args:
        images (`Sequence`):
            N paths, PIL images or `{"bytes": ..., "path": ...}` dictionaries.
        image_ids (`Sequence[str]`):
            N identifiers.
        image_labels (`np.ndarray`):
            Multi-hot labels of shape `(N, C)` over the foreground classes.
        class_names (`Sequence[str]`):
            C + 1 class names, background first; they travel in the description of the split.
        masks (`Sequence`, *optional*):
            N masks in any form that `images` may have, or as `mask_feature` stores them.
        mask_feature (`Any`, *optional*, defaults to `datasets.Image()`):
            Feature of the `mask` column.
        skipped (`Sequence[str]`, *optional*):
            What was left out and why, one phrase per record; kept with the split and logged.

    Returns:
        `datasets.Dataset`: N records with the columns of [`record_features`].

    Raises:
        ValueError: The labels do not have one column for each foreground class.
    """
    image_labels = np.asarray(image_labels)
    if image_labels.ndim != 2 or image_labels.shape[1] != len(class_names) - 1:
        raise ValueError(
            f"Image labels of shape {image_labels.shape} were given, but {len(class_names) - 1} foreground classes "
            f"need (number of images, {len(class_names) - 1}): give one column for each foreground class."
        )
    columns = {"image": list(images), "image_id": list(image_ids), "image_labels": image_labels.astype(int).tolist()}
    if masks is not None:
        columns["mask"] = list(masks)
    features = record_features(with_mask=masks is not None, mask_feature=mask_feature)
    split = datasets.Dataset.from_dict(columns, features=features)
    return describe(split, class_names, skipped)


def describe(split: Any, class_names: Sequence[str], skipped: Sequence[str] = ()) -> Any:
    """
    Writes the class list, and what was left out, into the description of a split.

    Args:
        split (`datasets.Dataset` or `datasets.IterableDataset`):
            The split, changed in place.
        class_names (`Sequence[str]`):
            C + 1 class names, background first.
        skipped (`Sequence[str]`, *optional*):
            What was left out and why, one phrase per record; logged too.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the same split.
    """
    if skipped:
        shown = "; ".join(skipped[:20]) + (f"; and {len(skipped) - 20} more" if len(skipped) > 20 else "")
        logger.warning("%d records are left out: %s.", len(skipped), shown)
    description = {"class_names": list(class_names)} | ({"skipped": list(skipped)} if skipped else {})
    split.info.description = json.dumps(description)
    return split


def skipped_records(dataset_dict: datasets.DatasetDict) -> dict[str, list[str]]:
    """
    Reads what `on_bad_image="skip"` left out.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            What a loader or [`drop_bad_records`] returned.

    Returns:
        `dict[str, list[str]]`: one phrase per record, by split; splits from which nothing was left out are not in it.
    """
    found = {name: json.loads(split.info.description or "{}").get("skipped") for name, split in dataset_dict.items()}
    return {name: phrases for name, phrases in found.items() if phrases}


def as_streams(dataset_dict: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    """The same splits to be gone through one record after another; their description stays readable."""
    streams = datasets.IterableDatasetDict()
    for name, split in dataset_dict.items():
        streams[name] = split.to_iterable_dataset()
        # `datasets` does not take it along
        streams[name].info.description = split.info.description
    return streams


def class_names(dataset_dict: datasets.DatasetDict) -> list[str]:
    """
    Reads the class list that a loader of this package left in its splits.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            What a loader returned, possibly filtered, mapped or saved and loaded since.

    Returns:
        `list[str]`: K = C + 1 names, background first.

    Raises:
        ValueError: The splits carry no class list, or not the same one.
    """
    found = []
    for split_name, split in dataset_dict.items():
        try:
            names = json.loads(split.info.description)["class_names"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"The split {split_name!r} carries no class list: load it with a loader of synernet_hf.data, or build "
                "it with synernet_hf.data.build_split."
            ) from error
        found.append(names)
    if not found or any(names != found[0] for names in found):
        raise ValueError(f"The splits {', '.join(dataset_dict)} do not share one class list: load them together.")
    return found[0]


__all__ = [
    "COCO_CLASSES",
    "VOC_CLASSES",
    "as_streams",
    "build_split",
    "check_on_bad_image",
    "class_index",
    "class_names",
    "describe",
    "id2label_from",
    "record_features",
    "skipped_records",
]
