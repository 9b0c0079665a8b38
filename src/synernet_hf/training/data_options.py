"""The options that name a data source, for scripts that read one without training on it."""

import argparse
import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

from synernet_hf.training.arguments import DataArguments, InvalidArguments
from synernet_hf.training.checkpoints import ARGUMENTS_FILE


# fields of DataArguments that say how a run uses its data, not where the data is
RUN_FIELDS = {"metric_classes", "max_eval_samples", "num_workers"}


def _source_fields() -> list[tuple[str, Any, dataclasses.Field]]:
    # not the fields' own types, which the argument parser rewrites
    hints = typing.get_type_hints(DataArguments)
    return [
        (
            field.name,
            hints[field.name],
            dataclasses.field(
                default=field.default, default_factory=field.default_factory, metadata=dict(field.metadata)
            ),
        )
        for field in dataclasses.fields(DataArguments)
        if field.init and field.name not in RUN_FIELDS
    ]


SourceArguments = dataclasses.make_dataclass("SourceArguments", _source_fields())
SourceArguments.__doc__ = "The fields of [`DataArguments`] that say where the data is; for `HfArgumentParser`."


def unset_data_options(parser: argparse.ArgumentParser) -> None:
    """
    Makes `None` of every data option that is not on the command line, so that it can be told from one that is.

    Args:
        parser (`argparse.ArgumentParser`):
            A `HfArgumentParser` made with `SourceArguments`.
    """
    names = [field.name for field in dataclasses.fields(SourceArguments)]
    parser.set_defaults(**dict.fromkeys(names))


def read_data_arguments(given: argparse.Namespace, run: str | Path | None = None) -> DataArguments:
    """
    The data source that a command line names, on top of the one a run was trained on.

    A data set named on the command line that is not the run's starts from nothing, for the run's folder and labels
    belong to another one.

    Args:
        given (`argparse.Namespace`):
            Parsed options; only those that are fields of `SourceArguments` and not `None` are read.
        run (`str` or `Path`, *optional*):
            Folder of a run; where it has a `training_args.json`, that says what is not on the command line.

    Returns:
        [`DataArguments`]: for [`~synernet_hf.training.validation.load_data`].

    Raises:
        ValueError: if the run's record cannot be read, or a run is given that does not say its data set and neither
            does the command line.
    """
    names = {field.name for field in dataclasses.fields(SourceArguments)}
    given_settings = {name: value for name, value in vars(given).items() if name in names and value is not None}
    if run is None:
        return DataArguments(**given_settings)
    path = Path(run) / ARGUMENTS_FILE
    settings = {}
    if path.is_file():
        try:
            settings = dict(json.loads(path.read_text(encoding="utf-8"))["data_args"])
            DataArguments(**settings)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArguments(
                f"{path} is no record of a run's data ({type(error).__name__}: {error}); remove it and name the data "
                "set with --dataset."
            ) from error
    if given_settings.get("dataset") not in (None, settings.get("dataset")):
        settings = {}
    settings |= given_settings
    if settings.get("dataset") is None:
        raise InvalidArguments(f"{run} does not say which data set it was trained on; name one with --dataset.")
    return DataArguments(**settings)


def name_own_classes(data_args: DataArguments, id2label: dict[int, str]) -> None:
    """
    Gives images of one's own that come without a class list that of a model, so that labels are read by name.

    Args:
        data_args ([`DataArguments`]):
            Changed in place; the public benchmarks and generated images have lists of their own.
        id2label (`dict[int, str]`):
            Class names by id, background first.
    """
    if data_args.dataset not in ("voc2012", "coco2014", "shapes"):
        names = [id2label[label] for label in sorted(id2label)]
        data_args.dataset_options = {"class_names": names} | data_args.dataset_options


__all__ = ["SourceArguments", "name_own_classes", "read_data_arguments", "unset_data_options"]
