"""The record that all data sources share, and the class lists of the public benchmarks."""

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any
from unicodedata import normalize

import datasets
import numpy as np
import torch
from PIL import Image


logger = logging.getLogger(__name__)

# class id of pixels that are not scored
IGNORE_INDEX = 255
SPLIT_NAMES = {
    "train": ("train", "training", "trn"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
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
        names (`Sequence[str]`): Class names, background first. `Background`, `_background_` and a background at another
            place become `"background"` at the first place, and the log says so.

    Returns:
        `dict[int, str]`: `{0: "background", 1: first foreground class, ...}`.

    Raises:
        ValueError: No name is the background, or a name occurs twice.
    """
    names = list(names)
    if any(map(is_background, names)):
        # at another place or in another spelling: moved, and said
        names = background_first(names, "The class list")
    if not names or names[0] != "background":
        raise ValueError(f"A class list starts with 'background', but this one starts with {names[:1]}: prepend it.")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"Class names must be unique, but {', '.join(repeated)} occurs more than once.")
    return dict(enumerate(names))


@lru_cache(2**16)
def clean_label(text: str) -> str:
    """A label in one Unicode form, without spaces and marks around it, so that two spellings of it are one class."""
    return re.sub(r"^[\s\ufeff\u200b]+|[\s\ufeff\u200b]+$", "", normalize("NFC", text))


@lru_cache(2**16)
def is_background(name: str) -> bool:
    """Whether a label is a usual spelling of the background: `Background`, `_background_`, `__background__`."""
    return re.sub(r"[\W_]+", "", name).lower() == "background"


def background_first(names: Sequence[str], source: object) -> list[str]:
    """
    A class list with `"background"` at its head: added, or moved there or renamed, which is logged. Names that differ
    in their Unicode form only become one. Raises `ValueError` if two names are the background.
    """
    names = list(dict.fromkeys(map(clean_label, names))) if len(set(names)) == len(names) else list(names)
    places = [index for index, name in enumerate(names) if is_background(name)]
    if len(places) > 1:
        twins = " and ".join(repr(names[index]) for index in places)
        raise ValueError(f"{source}: {twins} in the class list are both the background: keep one of them.")
    listed = ["background", *(name for name in names if not is_background(name))]
    if places and listed != names:
        logger.warning(
            "%s: %r at position %d of the class list is the background: it becomes id 0, and the other classes are "
            "numbered in their order from 1.",
            source,
            names[places[0]],
            places[0],
        )
    return listed


def renumber_masks(split: Any, names: Sequence[str]) -> Any:
    """
    Masks whose ids are positions in the class list of the split, from masks whose ids are positions in `names`, as the
    source lists its classes; 0 is the background where that list has none.
    """
    if "mask" not in (split.column_names or ()):
        return split
    listed = split.features["labels"].feature.names
    old = [*names] if any(map(is_background, names)) else ["background", *names]
    new = [0 if is_background(name) else listed.index(clean_label(name)) + 1 for name in old]
    if new == list(range(len(new))) or len(new) > IGNORE_INDEX:
        return split
    table = np.arange(256, dtype=np.uint8)
    table[: len(new)] = new

    def renumber(mask: Any) -> dict[str, Any]:
        ids = None if mask is None else np.asarray(mask)
        is_mask = ids is not None and ids.ndim == 2 and ids.dtype.kind in "bui" and 0 <= ids.min() <= ids.max() < 256
        return {"mask": Image.fromarray(table[ids.astype(np.uint8)]) if is_mask else mask}

    # in memory: a cache file would lie beside a data set that was saved
    options = {} if isinstance(split, datasets.IterableDataset) else {"keep_in_memory": True}
    return split.map(renumber, input_columns=["mask"], features=split.features, **options)


def likely_misspelt(counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """Classes of one or two images with nearly the name of a frequent one, and those that differ in case only."""
    found = []
    for name, count in counts.items():
        plain = _letters(name)
        for other, number in counts.items():
            letters = _letters(other)
            is_doubtful = plain == letters and (count, name) < (number, other)
            # no numbers: class_1 is not class_2
            if 1 <= count <= 2 and number >= 5 * count and not re.search(r"\d", name + other):
                # nearly the same letters, or two of them have changed places
                ratio = difflib.SequenceMatcher(None, plain, letters).ratio()
                is_doubtful |= ratio >= 0.8 or sorted(plain) == sorted(letters)
            if is_doubtful and other != name:
                found.append((name, other))
                break
    return found


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


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
    plain = re.sub(r"[ _-]?((19|20)\d\d|(set|split|data|dataset|images|imgs))$", "", name.strip().lower())
    return next((meaning for meaning, names in SPLIT_NAMES.items() if plain in names), None)


def choose_splits(found: Iterable[str], train: str | None, validation: str | None, source: object) -> dict[str, str]:
    """
    Decides which splits of a source are to train and to evaluate on, and logs which are not used.

    Where no name is given they are found by [`split_meaning`]; `test` is evaluated on where there is no `validation`.
    Returns the source's names by `"train"` and `"validation"`, for those that exist. Raises `ValueError` if a name
    that is given is not there, or two names have one meaning.
    """
    found = list(found)
    chosen = {}
    for split, given, meanings in (("train", train, ("train",)), ("validation", validation, ("validation", "test"))):
        free = [name for name in found if name not in (train, *chosen.values())]
        groups = [[name for name in free if split_meaning(name) == meaning] for meaning in meanings]
        if given:
            plain = given.strip().lower()
            groups = [[name for name in found if name == given], [n for n in found if n.strip().lower() == plain]]
        same = next(filter(None, groups), [])
        if given and not same:
            raise ValueError(f"{source} has no split {given!r}: it has {', '.join(found)}.")
        if len(same) > 1:
            raise ValueError(
                f"{source} has {' and '.join(map(repr, same))}, which are all names of the split {split!r}: name the one "
                f"to take with {split}_split (--{split}_split), or rename the others."
            )
        if same:
            chosen[split] = same[0]
    unused = [repr(name) for name in found if name not in chosen.values()]
    if chosen and unused:
        logger.warning("%s: %s of the splits %s not used.", source, ", ".join(unused), "are" if unused[1:] else "is")
    return chosen


def note_skipped(skipped: dict[str, list[str]] | None, split_name: str, phrases: Sequence[str]) -> None:
    """
    Logs what is left out of a split, a phrase for each record, and adds it to the caller's dictionary if there is one.
    """
    if not phrases:
        return
    logger.warning("%d records of the split %r are left out: %s.", len(phrases), split_name, name_some(phrases, 20))
    if skipped is not None:
        skipped.setdefault(split_name, []).extend(phrases)


def as_streams(dataset_dict: datasets.DatasetDict) -> datasets.IterableDatasetDict:
    """The same splits as streams."""
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
    "likely_misspelt",
    "multi_hot",
    "name_some",
    "note_skipped",
    "record_features",
    "renumber_masks",
    "split_meaning",
]
