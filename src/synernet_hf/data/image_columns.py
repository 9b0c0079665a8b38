"""A data set of the Hub, or a folder of parquet files, with named columns → splits of records."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from synernet_hf.data.class_lists import (
    LabelReader,
    checked_class_names,
    ids_from_names,
    ids_from_vector,
    vector_length,
)
from synernet_hf.data.image_folder import IMAGE_HEADERS, LABEL_HEADERS, VALIDATION_NAMES
from synernet_hf.data.schema import record_features


ID_COLUMNS = ("image_id", "id", "file_name", "filename")


class ImageLabelColumn:
    """
    The column of labels of a data set: a `ClassLabel`, a name or a number, or a list of these.

    Args:
        feature (`Any`):
            Its feature.
        name (`str`):
            Its name.

    Raises:
        ValueError: The feature is no label.
    """

    def __init__(self, feature: Any, name: str) -> None:
        self.name = name
        self.is_list = isinstance(feature, datasets.List | datasets.LargeList)
        inner = feature.feature if self.is_list else feature
        self.class_names: list[str] | None = None
        self.reader = LabelReader()
        dtype = getattr(inner, "dtype", "")
        if isinstance(inner, datasets.ClassLabel):
            self.kind, listed = "class_label", list(inner.names)
            self.first_id = 0 if listed[0] == "background" else 1
            self.class_names = listed if self.first_id == 0 else ["background", *listed]
        elif isinstance(inner, datasets.Value) and "string" in dtype:
            self.kind = "name"
        elif isinstance(inner, datasets.Value) and dtype.startswith(("int", "uint", "float", "bool")):
            self.kind = "number"
        else:
            raise ValueError(
                f"The column {name!r} holds {feature}, which is no label: a ClassLabel, a name or a number is "
                "expected, or a list of them (one 0 or 1 for each class is a list too)."
            )

    def decide(self, values: Iterable[Any], class_names: Sequence[str] | None) -> None:
        """Settles how the column is read, from its values in all splits."""
        self.reader = LabelReader(values, class_names=class_names)

    def ids(self, value: Any, names: Sequence[str], place: str) -> list[int]:
        """The label ids of one value."""
        if self.kind == "class_label":
            items = value if isinstance(value, list) else [] if value is None else [value]
            # -1 stands for a label that is not known
            listed = [self.class_names[item + self.first_id] for item in items if item >= 0]
            return ids_from_names([name for name in listed if name != "background"], names, place)
        return self.reader.ids([value], names, place)

    def streamed_ids(self, value: Any, names: Sequence[str], place: str) -> list[int]:
        """The same where the other values are not known: lists of C numbers 0 and 1 are label vectors."""
        if self.kind == "number" and value and self.is_list and vector_length([value]) == len(names) - 1:
            return ids_from_vector(value, len(names) - 1, place)
        return self.ids(value, names, place)


def open_dataset(source: str | Path, streaming: bool = False) -> dict[str, Any]:
    """
    Opens a data set as it is.

    Args:
        source (`str` or `Path`):
            Hub id, `.parquet` file, folder of such files, or folder that `save_to_disk` wrote.
        streaming (`bool`, *optional*, defaults to `False`):
            Opens it without downloading or converting it.

    Returns:
        `dict[str, Any]`: splits by name.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: It can not be read.
    """
    path = Path(source).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
            return {name: split.to_iterable_dataset() for name, split in loaded.items()} if streaming else loaded
        if path.is_file():
            return dict(datasets.load_dataset("parquet", data_files={"train": str(path)}, streaming=streaming))
        # the full path, for a folder called "parquet" would be taken for the format of that name
        name = str(path.resolve()) if path.is_dir() else str(source)
        return dict(datasets.load_dataset(name, streaming=streaming))
    except (OSError, ValueError, DatasetsError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        # a failed conversion is told in general words, with what went wrong as its cause
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise kind(
            f"The data set {source} can not be opened ({reason}): give a Hub id, a folder of "
            "parquet files, or a folder of images."
        ) from error


def load_columns(
    source: str | Path,
    columns: dict[str, str | None],
    class_names: Sequence[str] | None,
    wanted: tuple[str | None, str | None],
    streaming: bool,
) -> dict[str, Any]:
    """
    Loads a data set with named columns; no image is opened.

    Args:
        source (`str` or `Path`):
            See [`open_dataset`].
        columns (`dict[str, str | None]`):
            `image_column`, `label_column` and `mask_column`, as far as they are given.
        class_names (`Sequence[str]`, *optional*):
            Class names, background first.
        wanted (`tuple[str | None, str | None]`):
            Names of the training split and of the one to evaluate on, as far as they are given.
        streaming (`bool`):
            Gives `datasets.IterableDataset`.

    Returns:
        `dict[str, datasets.Dataset]` or `dict[str, datasets.IterableDataset]`: `train` and `validation`, as far as
        they are there.

    Raises:
        FileNotFoundError: There is no such data set.
        ValueError: A split or column is missing or of a kind that holds no images or labels, or a label is not in
            the class list.
    """
    splits = _choose_splits(open_dataset(source, streaming), source, wanted)
    first = next(iter(splits.values()))
    if first.features is None:
        first = first._resolve_features()
    image, label, mask = _choose_columns(first.features, source, columns)
    column = ImageLabelColumn(first.features[label], label)
    names = checked_class_names(class_names, column.class_names, str(source))
    if streaming and names is None:
        raise ValueError(
            f"The labels of {source} come without a class list, which can not be inferred while streaming: give "
            "class_names."
        )
    if streaming:
        column.decide((), names)
    else:
        values = {split_name: split[label][:] for split_name, split in splits.items()}
        column.decide((value for part in values.values() for value in part), names)
    loaded = {}
    for split_name, split in splits.items():
        with_mask = split_name != "train" and mask is not None and mask in (split.features or first.features)
        chosen = {image: "image"} | ({mask: "mask"} if with_mask else {})
        if streaming:
            id_column = _id_column(split.features or first.features)
            loaded[split_name] = _stream(split, split_name, chosen, column, names, id_column)
            continue
        places = [f"{source}, split {split_name!r}, record {index}" for index in range(len(split))]
        if names is None:
            names = column.reader.infer_class_names(
                ([value], place) for value, place in zip(values[split_name], places, strict=True)
            )
        labels = [column.ids(value, names, place) for value, place in zip(values[split_name], places, strict=True)]
        loaded[split_name] = _with_labels(split, split_name, chosen, labels, names)
    return loaded


def _choose_splits(
    splits: dict[str, Any], source: str | Path, wanted: tuple[str | None, str | None]
) -> dict[str, Any]:
    missing = [name for name in wanted if name and name not in splits]
    if missing:
        raise ValueError(f"The data set {source} has no split {missing[0]!r}: it has {', '.join(splits)}.")
    train, validation = wanted[0] or "train", wanted[1]
    validation = validation or next((name for name in VALIDATION_NAMES if name in splits and name != train), None)
    found = {"train": train, "validation": validation}
    found = {split: splits[name] for split, name in found.items() if name in splits}
    if not found:
        raise ValueError(
            f"The data set {source} has neither a split 'train' nor one to evaluate on: name one of "
            f"{', '.join(splits)} with train_split or validation_split."
        )
    return found


def _choose_columns(
    features: datasets.Features, source: str | Path, columns: dict[str, str | None]
) -> tuple[str, str, str | None]:
    """Names of the image, label and mask column."""
    for argument, name in columns.items():
        if name is not None and name not in features:
            raise ValueError(
                f"The data set {source} has no column {name!r} ({argument}): it has {', '.join(features)}."
            )
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    mask = columns.get("mask_column") or ("mask" if "mask" in features else None)
    images = [name for name in images if name != mask]
    image = columns.get("image_column") or next((name for name in IMAGE_HEADERS if name in images), None)
    image = image or (images[0] if len(images) == 1 else None)
    label = columns.get("label_column") or next((name for name in LABEL_HEADERS if name in features), None)
    for argument, name in (("image_column", image), ("label_column", label)):
        if name is None:
            raise ValueError(
                f"The data set {source} has the columns {', '.join(features)}, none of them clearly the one to take: "
                f"name it with {argument}."
            )
    for argument, name in (("image_column", image), ("mask_column", mask)):
        if name is not None and not _holds_images(features[name]):
            raise ValueError(
                f"The column {name!r} holds {features[name]}, which is no image: an Image, or the path or bytes of "
                f"one, is expected; name another column with {argument}."
            )
    return image, label, mask


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, datasets.Value):
        return "string" in feature.dtype or "binary" in feature.dtype
    if isinstance(feature, datasets.List | datasets.LargeList):
        # arrays of rows of pixels
        return isinstance(feature.feature, datasets.List | datasets.LargeList)
    return hasattr(feature, "decode_example") or (isinstance(feature, dict) and bool({"bytes", "path"} & set(feature)))


def _with_labels(
    split: datasets.Dataset, split_name: str, chosen: dict[str, str], labels: Sequence[list[int]], names: Sequence[str]
) -> datasets.Dataset:
    id_column = _id_column(split.features)
    ids = [str(value) for value in split[id_column][:]] if id_column else []
    if len(set(ids)) < len(split):
        ids = [f"{split_name}_{index:06d}" for index in range(len(split))]
    split = split.select_columns(list(chosen)).rename_columns(chosen)
    split = split.add_column("image_id", ids, feature=datasets.Value("string"))
    features = record_features(names, with_mask="mask" in chosen.values())
    split = split.add_column("labels", list(labels), feature=features["labels"])
    split = split.select_columns(list(features))
    # a cast writes a copy of the images beside a data set that was saved
    return split if split.features == features else split.cast(features)


def _id_column(features: datasets.Features) -> str | None:
    return next((n for n in ID_COLUMNS if isinstance(features.get(n), datasets.Value)), None)


def _stream(
    split: datasets.IterableDataset,
    split_name: str,
    chosen: dict[str, str],
    column: ImageLabelColumn,
    names: list[str],
    id_column: str | None,
) -> datasets.IterableDataset:
    def record(row: dict, index: int) -> dict:
        place = f"split {split_name!r}, record {index}"
        labels = column.streamed_ids(row[column.name], names, place)
        image_id = None if id_column is None else row[id_column]
        image_id = f"{split_name}_{index:06d}" if image_id is None else str(image_id)
        made = {new: row[old] for old, new in chosen.items()}
        return made | {"image_id": image_id, "labels": labels}

    features = record_features(names, with_mask="mask" in chosen.values())
    return split.map(record, with_indices=True, remove_columns=split.column_names, features=features)


__all__ = ["ImageLabelColumn", "load_columns", "open_dataset"]
