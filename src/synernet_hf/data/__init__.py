"""Data sources with image-level labels, training transforms and checks."""

import inspect
from pathlib import Path
from typing import Any

import datasets

from synernet_hf.data.checks import check_dataset
from synernet_hf.data.collator import SynerNetDataCollator
from synernet_hf.data.label_files import read_label_file
from synernet_hf.data.report import inspect_dataset
from synernet_hf.data.schema import COCO_CLASSES, VOC_CLASSES, build_split, class_names, id2label_from
from synernet_hf.data.shapes import SHAPES_CLASSES, load_shapes
from synernet_hf.data.sharing import self_describing, write_parquet
from synernet_hf.data.transforms import PhotometricAugmentation, StreamBatchSampler, TrainDataset, TrainTransform
from synernet_hf.data.voc import load_voc2012


def load_wsss_dataset(
    name: str,
    data_dir: str | Path | None = None,
    image_labels: str | Path | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    dataset_options: dict[str, Any] | None = None,
) -> datasets.DatasetDict:
    """
    Loads a data source by its name.

    Args:
        name (`str`):
            `"voc2012"` ([`load_voc2012`]) or `"shapes"` ([`load_shapes`]).
        data_dir (`str` or `Path`, *optional*):
            Folder of the data; not for `"shapes"`, which is generated.
        image_labels (`str` or `Path`, *optional*):
            Source of the image-level labels, see the loader; not for `"shapes"`.
        train_split (`str`, *optional*):
            List of training pictures, the loader's default where it is not given; not for `"shapes"`.
        validation_split (`str`, *optional*):
            List of evaluation pictures, the loader's default where it is not given; not for `"shapes"`.
        dataset_options (`dict`, *optional*):
            Further arguments of the loader, for example `{"num_train": 500}` for `"shapes"`.

    Returns:
        `datasets.DatasetDict`: the splits `train` and `validation`; [`class_names`] reads their class list.

    Raises:
        ValueError: Unknown name, a missing `data_dir`, or an argument that the loader does not take.
        FileNotFoundError: See the loader.
    """
    given = {
        "data_dir": data_dir,
        "image_labels": image_labels,
        "train_split": train_split,
        "validation_split": validation_split,
    }
    arguments = {key: value for key, value in given.items() if value is not None} | (dataset_options or {})
    if name == "voc2012":
        if data_dir is None:
            raise ValueError("The data set 'voc2012' needs data_dir: give the VOCdevkit folder that holds VOC2012.")
        loader = load_voc2012
    elif name == "shapes":
        loader = load_shapes
    else:
        raise ValueError(f"Unknown data set {name!r}: voc2012 and shapes are there.")
    known = inspect.signature(loader).parameters
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise ValueError(f"The data set {name!r} does not take {', '.join(unknown)}: it takes {', '.join(known)}.")
    return loader(**arguments)


__all__ = [
    "COCO_CLASSES",
    "SHAPES_CLASSES",
    "VOC_CLASSES",
    "PhotometricAugmentation",
    "StreamBatchSampler",
    "SynerNetDataCollator",
    "TrainDataset",
    "TrainTransform",
    "build_split",
    "check_dataset",
    "class_names",
    "id2label_from",
    "inspect_dataset",
    "load_shapes",
    "load_voc2012",
    "load_wsss_dataset",
    "read_label_file",
    "self_describing",
    "write_parquet",
]
