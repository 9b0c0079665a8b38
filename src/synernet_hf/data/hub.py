"""Images of your own: reads folders, data sets of the Hub and parquet files with named columns; writes parquet."""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import datasets
from datasets.exceptions import DatasetsError
from datasets.table import embed_table_storage
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from synernet_hf.data.annotations import find_annotations, load_annotations
from synernet_hf.data.coco import PolygonMask
from synernet_hf.data.folders import (
    LABEL_HEADERS,
    MASK_HEADERS,
    TABLE_SUFFIXES,
    build_splits,
    find_tables,
    read_folder,
)
from synernet_hf.data.labels import (
    CATEGORY_KEYS,
    IMAGE_HEADERS,
    LabelReader,
    choose_class_names,
    read_labels,
    usual_name,
)
from synernet_hf.data.schema import (
    as_streams,
    check_on_bad_image,
    choose_splits,
    is_background,
    record_features,
    renumber_masks,
)
from synernet_hf.files import is_hub_id, one_line, replace_file


logger = logging.getLogger(__name__)

# the last one is that of WebDataset
ID_COLUMNS = ("image_id", "id", "file_name", "filename", "__key__")


class ColumnNames(TypedDict, total=False):
    """
    Which columns of a table or data set to take, where they do not have a usual name, and which of its files.

    Attributes:
        image_column (`str`, *optional*): Images, or in a table their files (`image`, `file_name`).
        label_column (`str`, *optional*): Labels (`labels`, `label`, `class`).
        mask_column (`str`, *optional*): Masks of the images to evaluate on, or in a table their files (`mask`).
        allow_outside (`bool`, *optional*, defaults to `False`): Whether paths in a table may lead out of its folder.
    """

    image_column: str | None
    label_column: str | None
    mask_column: str | None
    allow_outside: bool


def load_image_labels(
    data_dir: str | Path,
    class_names: Sequence[str] | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    on_bad_image: str = "raise",
    streaming: bool = False,
    skipped: dict[str, list[str]] | None = None,
    splits: Sequence[str] = ("train", "validation"),
    **columns: Unpack[ColumnNames],
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """
    Loads images with image-level labels from a folder, a table, the Hub or parquet files, without decoding one.

    - **A folder with a table** (`labels.csv`, `metadata.csv` or `metadata.jsonl`, or the table itself): a row for each
      image, with its file (or its name without suffix) and its labels; several labels are separated by `;`, `|` or
      `,`, or stand in rows or in 0/1 columns of their own. The column `split` says what is `train` and `validation`.
    - **A folder with annotation files**: COCO (`annotations/instances_*.json`, or `_annotations.coco.json` in a folder
      for each split), Label Studio (tasks as JSON; `label_column` is the tag), labelme (a file for each image) or
      FiftyOne (`data` and `labels.json`); or the path of such a file. Outlines are the masks to evaluate on.
    - **A folder with a subfolder for each class**, or with `train` and `validation` of one of these kinds.
    - **A Hub data set, a folder of parquet files, or what `save_to_disk` wrote**: the label column is a `ClassLabel`,
      a name, a class id, a list of these or of one 0 or 1 for each class, or detection metadata.

    Masks for evaluation come from the mask column, or from `masks/NAME.png` beside the images of a folder
    (`masks/FOLDER/NAME.png` where images share a name). Masks of the training split are not read.

    Args:
        data_dir (`str` or `Path`): The folder, table or Hub id.
        class_names (`Sequence[str]`, *optional*): The class list, background first. Without it, it is the one that the
            source has (`ClassLabel`, names of 0/1 columns), or else the names that occur in the training split, in
            alphabetical order (numbers by size). Ids in masks are positions in this list.
        train_split (`str`, *optional*): Name of the training split.
        validation_split (`str`, *optional*): Name of the split to evaluate on. Splits that are not named are found by
            usual names, such as `val` and `test`.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): What to do about images that a table or list names but
            that do not exist: `"raise"`, or `"skip"` to leave them out, log them and list them in `skipped`.
        streaming (`bool`, *optional*, defaults to `False`): Returns an `IterableDatasetDict`; a Hub or parquet data
            set is read during the iteration.
        skipped (`dict[str, list[str]]`, *optional*): Receives, by split, a phrase for each record that is left
            out.
        splits (`Sequence[str]`, *optional*, defaults to `("train", "validation")`): The splits that are needed. With a
            class list, files that only the others need may be missing.
        columns ([`ColumnNames`]): `image_column`, `label_column`, `mask_column` and `allow_outside`.

    Returns:
        `datasets.DatasetDict` or `datasets.IterableDatasetDict`: `train` (`image`, `image_id`, `labels`) and
        `validation` (the same and, where there are masks, `mask`), or the one that exists.

    Raises:
        FileNotFoundError: The source, an image or a mask is missing; of a table, the row is named.
        ValueError: A table that cannot be read, an ambiguous image, a column that is not there, a label that is not
            in the class list.

    Example:

    ```python
    >>> from synernet_hf.data import load_image_labels

    >>> pets = load_image_labels("path/to/pets", label_column="species")  # doctest: +SKIP
    >>> hub = load_image_labels("user/pets", validation_split="test")  # doctest: +SKIP
    ```"""
    check_on_bad_image(on_bad_image)
    known = ColumnNames.__annotations__
    unknown = [name for name in columns if name not in known]
    if unknown:
        raise TypeError(f"load_image_labels does not take {', '.join(unknown)}: columns are {', '.join(known)}.")
    path = Path(data_dir).expanduser()
    wanted = (train_split, validation_split)
    check_source(data_dir)
    if path.is_file() and path.suffix.lower() not in (*TABLE_SUFFIXES, ".json", ".parquet"):
        raise ValueError(
            f"{path} is not a table ({', '.join(TABLE_SUFFIXES)}), annotation file (.json) or .parquet file: save it as one "
            "of these, or give a folder."
        )
    is_listed = path.is_file() and path.suffix.lower() in (*TABLE_SUFFIXES, ".json")
    if is_listed or (path.is_dir() and not _holds_columns(path)):
        found = None if path.is_dir() and find_tables(path) else find_annotations(path)
        if found is not None:
            label_column = columns.get("label_column")
            built = load_annotations(path, found, label_column, class_names, wanted, splits, on_bad_image, skipped)
        elif path.suffix.lower() == ".json":
            raise ValueError(
                f"{path} is not an annotation file of COCO, Label Studio or labelme: export one of these."
            )
        else:
            images = read_folder(path, dict(columns), wanted)
            if class_names is not None:
                # without a class list, the labels of the training split are needed too
                images = {name: images[name] for name in splits if name in images} or images
            built = build_splits(images, path, class_names, on_bad_image, skipped)
        return as_streams(built) if streaming else built
    columns.pop("allow_outside", None)
    loaded = load_columns(data_dir, dict(columns), class_names, wanted, streaming)
    return datasets.IterableDatasetDict(loaded) if streaming else datasets.DatasetDict(loaded)


def check_source(source: str | Path, may_be_id: bool = True) -> None:
    """Raises `FileNotFoundError` where nothing is, unless the path may be the id of a data set of the Hub."""
    path = Path(source).expanduser()
    is_id = is_hub_id(str(source)) and not path.parent.is_dir()
    if path.exists() or (is_id and may_be_id):
        return
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    hint = ", and it is not a Hub id of the form owner/name." if may_be_id else "; a Hub id is the data set 'hub'."
    raise FileNotFoundError(
        f"There is no folder {source}{f': did you mean {path.parent / close[0]}?' if close else hint}"
    )


def _holds_columns(folder: Path) -> bool:
    saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
    shards = (path for path in folder.rglob("*") if path.suffix in (".parquet", ".tar"))
    return saved or (next(shards, None) is not None and not find_tables(folder))


def open_dataset(source: str | Path, streaming: bool = False) -> dict[str, Any]:
    """
    Opens a Hub id, a `.parquet` file, a folder that `datasets.load_dataset` reads or one that `save_to_disk` wrote.

    Returns splits by name. Raises `FileNotFoundError` if there is no such data set, `ValueError` if it cannot be read.
    """
    path = Path(source).expanduser()
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            loaded = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
            # a format is saved with the data
            loaded = {name: split.with_format(None) for name, split in loaded.items()}
            return {name: split.to_iterable_dataset() for name, split in loaded.items()} if streaming else loaded
        if path.is_file():
            return dict(datasets.load_dataset("parquet", data_files={"train": str(path)}, streaming=streaming))
        if not path.exists():
            _check_hub(str(source))
        # the full path, for a folder called "parquet" would be taken for the format of that name
        name = str(path.resolve()) if path.is_dir() else str(source)
        return dict(datasets.load_dataset(name, streaming=streaming))
    except (OSError, ValueError, DatasetsError) as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        # a failed conversion is told in general words, with what went wrong as its cause
        reason = " ".join(f"{error} {error.__cause__ or ''}".split())
        raise kind(
            f"The data set {source} cannot be opened ({reason}): give a Hub id, a folder of "
            "parquet files, or a folder of images."
        ) from error


def _check_hub(source: str) -> None:
    """Raises `OSError` at once where `datasets` would try for half a minute, unless a copy is in its cache."""
    if (
        datasets.config.HF_HUB_OFFLINE
        or (Path(datasets.config.HF_DATASETS_CACHE) / source.replace("/", "___")).is_dir()
    ):
        return
    try:
        HfApi().dataset_info(source, timeout=10)
    except RepositoryNotFoundError:
        raise FileNotFoundError("no such folder, and no such data set on the Hub, or a private one") from None
    except Exception as error:
        # those of the HTTP library share no other class
        raise ConnectionError(f"no such folder, and the Hub cannot be reached: {one_line(error)[:200]}") from None


def load_columns(
    source: str | Path,
    columns: dict[str, str | None],
    class_names: Sequence[str] | None,
    wanted: tuple[str | None, str | None],
    streaming: bool,
) -> dict[str, Any]:
    """
    Loads a data set with named columns; no image is opened. See [`load_image_labels`].

    Raises `ValueError` if a split or column is missing or of a kind that holds no images or labels, or a label is not in
    the class list.
    """
    splits = open_dataset(source, streaming)
    chosen = choose_splits(splits, *wanted, f"The data set {source}")
    if not chosen:
        raise ValueError(
            f"The data set {source} has neither a split 'train' nor one to evaluate on: name one of "
            f"{', '.join(splits)} with train_split or validation_split."
        )
    splits = {split: splits[name] for split, name in chosen.items()}
    first = next(iter(splits.values()))
    if first.features is None:
        first = first._resolve_features()
    image, label, mask = _choose_columns(first.features, source, columns)
    feature = first.features[label]
    own = _class_list(feature, label)
    names = choose_class_names(class_names, own, str(source))
    if streaming and names is None:
        raise ValueError(
            f"The labels of {source} come without a class list, which cannot be inferred while streaming: give "
            "class_names."
        )
    if not streaming:
        cells = {
            name: [
                ([_with_names(value, feature)], f"{source}, split {name!r}, record {index}")
                for index, value in enumerate(split[label][:])
            ]
            for name, split in splits.items()
        }
        labels, names = read_labels(cells, None, names, str(source))
    loaded = {}
    for split_name, split in splits.items():
        features = split.features or first.features
        with_mask = split_name != "train" and mask is not None and mask in features
        renamed = {image: "image"} | ({mask: "mask"} if with_mask else {})
        id_column = next((name for name in ID_COLUMNS if isinstance(features.get(name), datasets.Value)), None)
        if streaming:
            made = _stream(split, split_name, renamed, (label, feature), names, id_column)
        else:
            made = _with_labels(split, split_name, renamed, labels[split_name], names, id_column)
        loaded[split_name] = renumber_masks(made, own or class_names or ())
    return loaded


def _class_list(feature: Any, column: str) -> list[str] | None:
    """The class list of a column of labels. Raises `ValueError` if it holds no labels."""
    inner = feature
    while not isinstance(inner, datasets.ClassLabel | datasets.Value):
        if isinstance(inner, datasets.List | datasets.LargeList):
            inner = inner.feature
        elif isinstance(inner, dict) and set(inner) & set(CATEGORY_KEYS):
            inner = next(inner[key] for key in CATEGORY_KEYS if key in inner)
        elif isinstance(inner, dict) and all(isinstance(item, datasets.Value) for item in inner.values()):
            # a 0 or 1 for each name
            inner = next(iter(inner.values()), None)
        else:
            break
    if isinstance(inner, datasets.ClassLabel):
        return list(inner.names)
    dtype = getattr(inner, "dtype", "")
    if not isinstance(inner, datasets.Value) or not re.match("(large_)?string|u?int|float|bool|null", dtype):
        raise ValueError(
            f"The column {column!r} holds {feature}, which is not a label: a ClassLabel, a name or a number is "
            "expected, or a list of them (one 0 or 1 for each class is a list too), or objects with a category."
        )
    return None


def _with_names(value: Any, feature: Any) -> Any:
    """A value with the names of its ClassLabel ids, in lists, which are never taken apart."""
    if isinstance(feature, datasets.ClassLabel):
        # -1 stands for a label that is not known
        names = [] if value is None or value < 0 else [feature.names[value]]
        return [name for name in names if not is_background(name)]
    if isinstance(feature, datasets.List | datasets.LargeList) and value is not None:
        found = [_with_names(item, feature.feature) for item in value]
        is_named = isinstance(feature.feature, datasets.ClassLabel)
        return [name for names in found for name in names] if is_named else found
    if isinstance(feature, dict) and isinstance(value, Mapping):
        return {key: _with_names(item, feature[key]) for key, item in value.items()}
    return value


def _choose_columns(
    features: datasets.Features, source: str | Path, columns: dict[str, str | None]
) -> tuple[str, str, str | None]:
    """Names of the image, label and mask column."""
    for argument, name in columns.items():
        if name is not None and name not in features:
            raise ValueError(
                f"The data set {source} has no column {name!r} ({argument}): it has {', '.join(features)}."
            )
    mask = columns.get("mask_column") or usual_name(features, MASK_HEADERS)
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image) and name != mask]
    image = columns.get("image_column") or usual_name(images, IMAGE_HEADERS)
    image = image or (images[0] if len(images) == 1 else None)
    label = columns.get("label_column") or usual_name(features, LABEL_HEADERS)
    for argument, name in (("image_column", image), ("label_column", label)):
        if name is None:
            raise ValueError(
                f"The data set {source} has the columns {', '.join(features)}, none of them clearly the one to take: "
                f"name it with {argument}."
            )
    for argument, name in (("image_column", image), ("mask_column", mask)):
        if name is not None and not _holds_images(features[name]):
            raise ValueError(
                f"The column {name!r} holds {features[name]}, which is not an image: an Image, or the path or bytes of "
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
    split: datasets.Dataset,
    split_name: str,
    renamed: dict[str, str],
    labels: Sequence[list[int]],
    names: Sequence[str],
    id_column: str | None,
) -> datasets.Dataset:
    ids = [str(value) for value in split[id_column][:]] if id_column else []
    if len(set(ids)) < len(split):
        if ids:
            logger.warning("The column %r of the split %r repeats: records are numbered.", id_column, split_name)
        ids = [f"{split_name}_{index:06d}" for index in range(len(split))]
    split = split.select_columns(list(renamed)).rename_columns(renamed)
    split = split.add_column("image_id", ids, feature=datasets.Value("string"))
    features = record_features(names, with_mask="mask" in renamed.values())
    split = split.add_column("labels", list(labels), feature=features["labels"])
    split = split.select_columns(list(features))
    # a cast writes a copy of the images beside a data set that was saved
    return split if split.features == features else split.cast(features)


def _stream(
    split: datasets.IterableDataset,
    split_name: str,
    renamed: dict[str, str],
    labels: tuple[str, Any],
    names: list[str],
    id_column: str | None,
) -> datasets.IterableDataset:
    label, feature = labels
    reader = LabelReader(class_names=names, streamed=True)

    def record(row: dict, index: int) -> dict:
        place = f"split {split_name!r}, record {index}"
        ids = reader.ids([reader.plain(_with_names(row[label], feature), place)], place, names)
        image_id = None if id_column is None else row[id_column]
        image_id = f"{split_name}_{index:06d}" if image_id is None else str(image_id)
        return {new: row[old] for old, new in renamed.items()} | {"image_id": image_id, "labels": ids}

    image = next(iter(renamed))
    if isinstance(split.features[image], datasets.Image):
        # passes as it is stored
        split = split.cast_column(image, datasets.Image(decode=False))
    features = record_features(names, with_mask="mask" in renamed.values())
    return split.map(record, with_indices=True, remove_columns=split.column_names, features=features)


def same_columns(dataset_dict: datasets.DatasetDict) -> datasets.DatasetDict:
    """
    Gives all splits the same columns, as `push_to_hub` and the files of one data set need.

    Args:
        dataset_dict (`datasets.DatasetDict`): What a loader of this package returned.

    Returns:
        `datasets.DatasetDict`: the same records. Where one split has a `mask` column all have it, empty in the
        others. Masks kept as annotations are drawn and stored as PNG bytes.
    """
    if not any("mask" in split.column_names for split in dataset_dict.values()):
        return dataset_dict
    aligned = datasets.DatasetDict()
    for name, split in dataset_dict.items():
        split = split.with_format(None)
        masks = [None] * len(split)
        if isinstance(split.features.get("mask"), PolygonMask):
            masks = split["mask"][:]
            split = split.remove_columns("mask")
        if "mask" not in split.column_names:
            cells = [mask and datasets.Image().encode_example(mask) for mask in masks]
            split = split.add_column("mask", cells, feature=datasets.Image())
        aligned[name] = split
    return aligned


def write_parquet(dataset_dict: datasets.DatasetDict, folder: str | Path, images_per_file: int = 1000) -> list[Path]:
    """
    Writes a data set as parquet files with the images in them, in the layout that `datasets.load_dataset(folder)`
    and the Hub read. `Dataset.to_parquet` alone would write the paths of images that lie in files.

    Args:
        dataset_dict (`datasets.DatasetDict`): What a loader of this package returned; [`same_columns`] is applied.
        folder (`str` or `Path`): Files are named `data/SPLIT-00000-of-00003.parquet` in it, each written under a
            temporary name first.
        images_per_file (`int`, *optional*, defaults to 1000): The largest number of records of a file, all of which
            are in memory while it is written.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: `images_per_file` is not positive, a split is empty, or the folder holds parquet files of another number.
    """
    if images_per_file < 1:
        raise ValueError(f"images_per_file is {images_per_file}; a positive number is expected.")
    empty = [name for name, split in dataset_dict.items() if len(split) == 0]
    if empty:
        raise ValueError(f"The split {empty[0]!r} is empty: leave it out, or give at least one image.")
    data = Path(folder) / "data"
    counts = {name: -(-len(split) // images_per_file) for name, split in dataset_dict.items()}
    paths = {
        name: [data / f"{name}-{index:05d}-of-{count:05d}.parquet" for index in range(count)]
        for name, count in counts.items()
    }
    others = sorted(set(data.glob("*.parquet")) - {path for group in paths.values() for path in group})
    if others:
        raise ValueError(f"{data} holds other parquet files, such as {others[0].name}; give a new folder.")
    data.mkdir(parents=True, exist_ok=True)
    for name, split in same_columns(dataset_dict).items():
        for index, path in enumerate(paths[name]):
            shard = split.shard(counts[name], index, contiguous=True)
            _write_embedded(shard, path)
    return [path for group in paths.values() for path in group]


def _write_embedded(shard: datasets.Dataset, path: Path) -> None:
    embedded = shard.with_format("arrow").map(
        embed_table_storage, batched=True, batch_size=100, keep_in_memory=True, load_from_cache_file=False
    )
    replace_file(path, embedded.with_format(None).to_parquet)


__all__ = ["ColumnNames", "load_image_labels", "same_columns", "write_parquet"]
