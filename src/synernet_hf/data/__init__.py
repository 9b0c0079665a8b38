"""Data sources with image-level labels, training transforms and checks."""

import inspect
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from synernet_hf.files import missing_extra


try:
    import datasets
except ModuleNotFoundError as error:
    raise missing_extra("train", error) from error

from synernet_hf.data.checks import DatasetReport, SplitReport, check_dataset, inspect_dataset, mask_ids
from synernet_hf.data.coco import PolygonMask, load_coco2014
from synernet_hf.data.hub import ColumnNames, check_source, load_image_labels, same_columns, write_parquet
from synernet_hf.data.labels import read_label_file
from synernet_hf.data.schema import (
    COCO_CLASSES,
    VOC_CLASSES,
    build_split,
    class_names,
    id2label_from,
    multi_hot,
)
from synernet_hf.data.shapes import SHAPES_CLASSES, load_shapes
from synernet_hf.data.transforms import (
    PhotometricAugmentation,
    StreamBatchSampler,
    SynerNetDataCollator,
    TrainDataset,
    TrainTransform,
)
from synernet_hf.data.voc import load_voc2012


LOADERS = {
    "voc2012": load_voc2012,
    "coco2014": load_coco2014,
    "image_folder": load_image_labels,
    "hub": load_image_labels,
    "shapes": load_shapes,
}
DATA_DIR_HINTS = {
    "voc2012": "give the VOCdevkit folder that holds VOC2012",
    "coco2014": "give the folder that holds annotations, train2014 and val2014",
    "image_folder": "give the folder of the images",
    "hub": "give a Hub id owner/name, or a folder of parquet files",
}


def load_wsss_dataset(
    name: str,
    data_dir: str | Path | None = None,
    image_labels: str | Path | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    dataset_options: dict[str, Any] | None = None,
    skipped: dict[str, list[str]] | None = None,
) -> datasets.DatasetDict:
    """
    Loads a data source by its name.

    Args:
        name (`str`): `"voc2012"` ([`load_voc2012`]), `"coco2014"` ([`load_coco2014`]), `"image_folder"` or `"hub"`
            ([`load_image_labels`]), `"shapes"` ([`load_shapes`]); or a folder, a table, or a Hub id `owner/name`,
            which is then the `data_dir` of [`load_image_labels`].
        data_dir, image_labels, train_split, validation_split (*optional*):
            Arguments of the loader, as far as it has them: folder or Hub id, source of the image-level labels (see
            [`load_voc2012`]), lists or splits to train and to evaluate on.
        dataset_options (`dict`, *optional*): Further arguments of the loader, for example `{"num_train": 500}` for
            `"shapes"` or `{"class_names": ["background", "cat", "dog"]}` for images of your own. `on_bad_image` may be
            given for every source.
        skipped (`dict[str, list[str]]`, *optional*): Receives, by split, a phrase for each record that
            `on_bad_image="skip"` leaves out.

    Returns:
        `datasets.DatasetDict`: the splits `train` and `validation`; images of your own may have only one of them;
        [`class_names`] reads their class list.

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
    loader = LOADERS.get(name)
    if loader is None:
        if "/" not in name and not Path(name).exists():
            close = get_close_matches(name, [*LOADERS, *(path.name for path in Path().iterdir())], n=1)
            hint = f"did you mean {close[0]}? Otherwise " if close else ""
            raise ValueError(
                f"Unknown data set {name!r}: {hint}give {', '.join(LOADERS)}, a folder, or a Hub id owner/name."
            )
        if data_dir is not None:
            raise ValueError(f"{name!r} says where the data is, and so does data_dir={str(data_dir)!r}: give one.")
        loader, arguments = load_image_labels, {"data_dir": name} | arguments
    elif loader is not load_shapes and data_dir is None:
        raise ValueError(f"The data set {name!r} needs data_dir: {DATA_DIR_HINTS[name]}.")
    elif name == "image_folder":
        check_source(data_dir, may_be_id=False)
    known = [
        key
        for key, value in inspect.signature(loader).parameters.items()
        if value.kind != value.VAR_KEYWORD and key != "skipped"
    ]
    known += ColumnNames.__annotations__ if loader is load_image_labels else ()
    if loader is load_shapes:
        # generated images are never bad
        arguments.pop("on_bad_image", None)
    unknown = [key for key in arguments if key not in known]
    if unknown:
        raise ValueError(f"The data set {name!r} does not take {', '.join(unknown)}: it takes {', '.join(known)}.")
    if loader is not load_shapes:
        arguments["skipped"] = skipped
    return loader(**arguments)


__all__ = [
    "COCO_CLASSES",
    "SHAPES_CLASSES",
    "VOC_CLASSES",
    "ColumnNames",
    "DatasetReport",
    "PhotometricAugmentation",
    "PolygonMask",
    "SplitReport",
    "StreamBatchSampler",
    "SynerNetDataCollator",
    "TrainDataset",
    "TrainTransform",
    "build_split",
    "check_dataset",
    "class_names",
    "id2label_from",
    "inspect_dataset",
    "load_coco2014",
    "load_image_labels",
    "load_shapes",
    "load_voc2012",
    "load_wsss_dataset",
    "mask_ids",
    "multi_hot",
    "read_label_file",
    "same_columns",
    "write_parquet",
]
