"""Data sets that stand on their own: images inside the parquet files, class names in their schema."""

import io
from pathlib import Path

import datasets
from datasets.table import embed_table_storage
from PIL import Image

from synernet_hf.data.polygon_mask import PolygonMask
from synernet_hf.files import replace_file


LABEL_COLUMN = "labels"


def self_describing(dataset_dict: datasets.DatasetDict) -> datasets.DatasetDict:
    """
    Gives all splits the same columns, as files of one data set need.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            What a loader of this package returned.

    Returns:
        `datasets.DatasetDict`: the same records. Where one split has a `mask` column all have it, empty in the
        others, because files are read with one schema. Masks that are kept as annotations are drawn and become PNG
        files in memory.
    """
    with_masks = any("mask" in split.column_names for split in dataset_dict.values())
    described = {}
    for name, split in dataset_dict.items():
        if with_masks and "mask" not in split.column_names:
            split = split.add_column("mask", [None] * len(split), feature=datasets.Image())
        elif with_masks and isinstance(split.features["mask"], PolygonMask):
            drawn = [_as_png(mask) for mask in split["mask"]]
            split = split.remove_columns("mask").add_column("mask", drawn, feature=datasets.Image())
        columns = ["image", "image_id", LABEL_COLUMN] + ["mask"] * with_masks
        described[name] = split.select_columns(columns)
    return datasets.DatasetDict(described)


def write_parquet(dataset_dict: datasets.DatasetDict, folder: str | Path, images_per_file: int = 1000) -> list[Path]:
    """
    Writes a data set as parquet files with the images in them, in the layout that `datasets.load_dataset(folder)`
    and the Hub read. `Dataset.to_parquet` alone would write the paths of images that lie in files.

    Args:
        dataset_dict (`datasets.DatasetDict`):
            Any splits, for example of [`self_describing`].
        folder (`str` or `Path`):
            Files are named `data/SPLIT-00000-of-00003.parquet` in it, each written under a temporary name first.
        images_per_file (`int`, *optional*, defaults to 1000):
            The largest number of records of a file, all of which are in memory while it is written.

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
    for name, split in dataset_dict.items():
        for index, path in enumerate(paths[name]):
            shard = split.shard(counts[name], index, contiguous=True)
            _write_embedded(shard, path)
    return [path for group in paths.values() for path in group]


def _as_png(mask: Image.Image) -> dict:
    stream = io.BytesIO()
    mask.save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def _write_embedded(shard: datasets.Dataset, path: Path) -> None:
    embedded = shard.with_format("arrow").map(
        embed_table_storage, batched=True, batch_size=100, keep_in_memory=True, load_from_cache_file=False
    )
    replace_file(path, embedded.with_format(None).to_parquet)


__all__ = ["self_describing", "write_parquet"]
