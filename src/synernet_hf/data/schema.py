"""The one record contract of every data source, and the class lists of the public benchmarks."""

import difflib
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any
from unicodedata import normalize

import datasets
import torch


logger = logging.getLogger(__name__)

# class id of pixels that are not scored
IGNORE_INDEX = 255
SPLIT_NAMES = {
    "train": ("train", "training", "trn", "train_set", "trainset"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation", "val_set", "valset"),
    "test": ("test", "testing", "tst", "test_set", "testset"),
}

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
        names (`Sequence[str]`): Class names, background first.

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


def clean_label(text: str) -> str:
    """A label without spaces around it and in one Unicode form, so that two spellings of it are one class."""
    return normalize("NFC", text).strip()


def is_background(name: str) -> bool:
    """Whether a label is a usual spelling of the background: `Background`, `_background_`, `__background__`."""
    return re.sub(r"[\W_]+", "", name).lower() == "background"


def background_first(names: Sequence[str], source: object) -> list[str]:
    """
    The class list of a source with `"background"` at its head: moved there, renamed or added.

    A move or new name is logged once. Labels are in one Unicode form afterwards.
    """
    names = [clean_label(str(name)) for name in names]
    spelled = [name for name in names if is_background(name)]
    listed = ["background", *(name for name in names if name not in spelled[:1])]
    if spelled and listed != names:
        logger.warning(
            "%s: %r at position %d of the class list is the background: it becomes id 0, and the other classes are "
            "numbered in their order from 1.",
            source,
            spelled[0],
            names.index(spelled[0]),
        )
    return listed


def class_index(name: str, class_names: Sequence[str]) -> int:
    """
    Position of a name in a class list, background first. Raises `ValueError` with close matches where it is not there.
    """
    if name in class_names:
        return list(class_names).index(name)
    close = difflib.get_close_matches(name, class_names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}?" if close else f"the classes are {', '.join(class_names[1:])}."
    raise ValueError(f"Unknown class name {name!r}: {hint}")


def name_some(items: Sequence[str], limit: int = 3) -> str:
    """Names the first few of many things, as in `"a, b, c and 7 more"`."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"


def check_on_bad_image(on_bad_image: str) -> None:
    """Raises `ValueError` unless the choice is `"raise"` or `"skip"`."""
    if on_bad_image not in ("raise", "skip"):
        raise ValueError(f"on_bad_image is {on_bad_image!r}, but 'raise' or 'skip' is expected.")


def multi_hot(label_ids: Sequence[int], num_classes: int) -> torch.Tensor:
    """
    Turns the labels of one image into a vector.

    Args:
        label_ids (`Sequence[int]`): Foreground class ids, 0-based, in any order.
        num_classes (`int`): Number C of foreground classes.

    Returns:
        `torch.Tensor`: `(C,)` float32, 1 for each class of the image and 0 elsewhere.

    Raises:
        IndexError: An id is not one of 0 to C - 1.
    """
    vector = torch.zeros(num_classes)
    vector[[int(label) for label in label_ids]] = 1
    return vector


def record_features(
    class_names: Sequence[str], with_mask: bool = False, mask_feature: Any = None
) -> datasets.Features:
    """
    The columns of a split: `image` (`datasets.Image`), `image_id` (`string`), `labels` (list of `datasets.ClassLabel`
    over the foreground classes) and, `with_mask`, `mask` (`datasets.Image` or another feature that gives masks as
    images: 0 = background, 1..C = class ids, 255 = ignore).
    """
    features = {
        "image": datasets.Image(),
        "image_id": datasets.Value("string"),
        "labels": datasets.List(datasets.ClassLabel(names=list(class_names[1:]))),
    }
    if with_mask:
        features["mask"] = mask_feature or datasets.Image()
    return datasets.Features(features)


def build_split(
    images: Sequence,
    image_ids: Sequence[str],
    labels: Sequence[Sequence[int]],
    class_names: Sequence[str],
    masks: Sequence | None = None,
    mask_feature: Any = None,
) -> datasets.Dataset:
    """
    Builds one split from columns; no image is opened.

    Args:
        images (`Sequence`): N paths, PIL images or `{"bytes": ..., "path": ...}` dictionaries.
        image_ids (`Sequence[str]`): N identifiers.
        labels (`Sequence[Sequence[int]]`): For each image, the ids of its classes: 0 to C - 1 over the foreground
            classes. They are sorted, repeats are dropped; no id means an image of background alone.
        class_names (`Sequence[str]`): C + 1 class names, background first.
        masks (`Sequence`, *optional*): N masks in any form that `images` may have, or as `mask_feature` stores them.
        mask_feature (`Any`, *optional*, defaults to `datasets.Image()`): Feature of the `mask` column.

    Returns:
        `datasets.Dataset`: N records with the columns of [`record_features`].

    Raises:
        ValueError: A label id is not one of 0 to C - 1.
    """
    num_classes = len(class_names) - 1
    for image_id, ids in zip(image_ids, labels, strict=True):
        wrong = [label for label in ids if not 0 <= label < num_classes]
        if wrong:
            raise ValueError(
                f"The labels of {image_id} hold {wrong[0]}, but 0 to {num_classes - 1} are expected: ids count the "
                "foreground classes."
            )
    columns = {
        "image": list(images),
        "image_id": list(image_ids),
        "labels": [sorted({int(label) for label in ids}) for ids in labels],
    }
    if masks is not None:
        columns["mask"] = list(masks)
    return datasets.Dataset.from_dict(columns, features=record_features(class_names, masks is not None, mask_feature))


def split_meaning(name: str) -> str | None:
    """
    `"train"`, `"validation"` or `"test"` of the names that people give to splits, in any case and with a year at the
    end (`val2017`); else `None`.
    """
    plain = re.sub(r"_?(19|20)\d\d$", "", name.strip().lower().replace("-", "_"))
    return next((meaning for meaning, names in SPLIT_NAMES.items() if plain in names), None)


def choose_splits(found: Iterable[str], train: str | None, validation: str | None, source: object) -> dict[str, str]:
    """
    Decides which splits of a source are to train and to evaluate on.

    Where no name is given they are found by [`split_meaning`]; `test` is evaluated on where there is no `validation`.
    Returns the source's names by `"train"` and `"validation"`, as far as they are there. Raises `ValueError` if two
    have one meaning.
    """
    found = list(found)
    chosen = {}
    for split, given, meanings in (
        ("train", train, ("train",)),
        ("validation", validation, ("validation", "test")),
    ):
        if given:
            same = [name for name in found if name == given]
            same = same or [name for name in found if name.strip().lower() == given.strip().lower()]
        else:
            free = [name for name in found if name not in (train, *chosen.values())]
            groups = ([name for name in free if split_meaning(name) == meaning] for meaning in meanings)
            same = next((group for group in groups if group), [])
        if len(same) > 1:
            raise ValueError(
                f"{source} has {' and '.join(map(repr, same))}, which are all names of the split {split!r}: name the one "
                f"to take with {split}_split (--{split}_split), or rename the others."
            )
        if same:
            chosen[split] = same[0]
    return chosen


def note_skipped(skipped: dict[str, list[str]] | None, split_name: str, phrases: Sequence[str]) -> None:
    """
    Logs what is left out of a split, a phrase for each record, and adds it to the caller's dictionary if there is one.
    """
    if not phrases:
        return
    shown = "; ".join(phrases[:20]) + (f"; and {len(phrases) - 20} more" if len(phrases) > 20 else "")
    logger.warning("%d records of the split %r are left out: %s.", len(phrases), split_name, shown)
    if skipped is not None:
        skipped.setdefault(split_name, []).extend(phrases)


def as_streams(dataset_dict: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    """The same splits to be gone through one record after another."""
    return datasets.IterableDatasetDict({name: split.to_iterable_dataset() for name, split in dataset_dict.items()})


def class_names(dataset_dict: datasets.DatasetDict) -> list[str]:
    """
    Reads the class list from the feature of the column `labels`.

    Args:
        dataset_dict (`datasets.DatasetDict`): What a loader returned, possibly filtered, mapped, saved or pushed, and
            loaded since.

    Returns:
        `list[str]`: K = C + 1 names, background first.

    Raises:
        ValueError: The splits carry no class list, or not the same one.
    """
    found = []
    for split_name, split in dataset_dict.items():
        feature = getattr((split.features or {}).get("labels"), "feature", None)
        if not isinstance(feature, datasets.ClassLabel):
            raise ValueError(
                f"The split {split_name!r} carries no class list, a column 'labels' of lists of ClassLabel: load it "
                "with a loader of synernet_hf.data, or build it with synernet_hf.data.build_split."
            )
        found.append(["background", *feature.names])
    if not found or any(names != found[0] for names in found):
        raise ValueError(f"The splits {', '.join(dataset_dict)} do not share one class list: load them together.")
    return found[0]


__all__ = [
    "COCO_CLASSES",
    "IGNORE_INDEX",
    "VOC_CLASSES",
    "as_streams",
    "background_first",
    "build_split",
    "check_on_bad_image",
    "choose_splits",
    "class_index",
    "class_names",
    "clean_label",
    "id2label_from",
    "is_background",
    "multi_hot",
    "name_some",
    "note_skipped",
    "record_features",
    "split_meaning",
]
