"""Everything that would make a run fail later, looked for before it starts; data, model and record of the arguments."""

import dataclasses
import hashlib
import platform
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from synernet_hf.data import (
    check_dataset,
    class_names,
    id2label_from,
    load_wsss_dataset,
)
from synernet_hf.model import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation
from synernet_hf.training.arguments import (
    DataArguments,
    InvalidArguments,
    ModelArguments,
    SynerNetTrainingArguments,
)
from synernet_hf.training.checkpoints import find_resume_checkpoint


# what the validation of the arguments may meet in loaders and configs: missing files and values that do not fit
INPUT_ERRORS = (OSError, ValueError, TypeError)
MODEL_FIELDS = set(SynerNetConfig.__annotations__) - {"backbone_config"}


def validate_arguments(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: SynerNetTrainingArguments,
) -> tuple[datasets.DatasetDict, dict[str, list[str]]]:
    """
    Looks for everything that would make the run fail later, and raises once. Writes nothing.

    Args:
        model_args ([`ModelArguments`]):
            What is trained.
        data_args ([`DataArguments`]):
            On what.
        training_args ([`SynerNetTrainingArguments`]):
            How.

    Returns:
        `tuple[datasets.DatasetDict, dict[str, list[str]]]`: the data, which had to be loaded to be checked, and what
        `on_bad_image="skip"` left out of each split.

    Raises:
        InvalidArguments: with one sentence per problem, one per line.
    """
    problems = training_args.problems()
    if data_args.num_workers < 0:
        problems.append(f"`num_workers` must not be negative, got {data_args.num_workers}.")
    if data_args.max_eval_samples is not None and data_args.max_eval_samples < 1:
        problems.append(f"`max_eval_samples` must be at least 1, got {data_args.max_eval_samples}.")
    splits, names = None, None
    skipped: dict[str, list[str]] = {}
    try:
        splits = load_data(data_args, skipped)
        names = class_names(splits)
        splits = check_dataset(splits, data_args.on_bad_image, skipped=skipped)
        if "train" not in splits:
            problems.append(f"There is no split to train on, only {', '.join(splits)}: name one with `train_split`.")
    except INPUT_ERRORS as error:
        problems.append(_one_line(error))
    if names is not None:
        unknown = [name for name in data_args.metric_classes or () if name not in names]
        if unknown:
            problems.append(f"`metric_classes` has unknown names {', '.join(unknown)}; known are {', '.join(names)}.")
    problems += _model_problems(model_args, training_args.crop_size, names)
    if training_args.output_dir:
        try:
            find_resume_checkpoint(Path(training_args.output_dir), training_args.resume_from_checkpoint)
        except InvalidArguments as error:
            problems.append(str(error))
    if problems:
        raise InvalidArguments("\n".join(problems))
    return splits, skipped


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def load_data(data_args: DataArguments, skipped: dict[str, list[str]] | None = None) -> datasets.DatasetDict:
    """
    Loads the data that the arguments name.

    Args:
        data_args ([`DataArguments`]):
            Name, folder, splits, labels and options.
        skipped (`dict[str, list[str]]`, *optional*):
            Dictionary to which what is left out is added, a phrase for each record, by split.

    Returns:
        `datasets.DatasetDict`: splits `train` and `validation`.

    Raises:
        ValueError: if the name or an option is unknown, or the data does not hold together.
        FileNotFoundError: if a file is missing.
    """
    return load_wsss_dataset(
        data_args.dataset,
        data_dir=data_args.data_dir,
        image_labels=data_args.image_labels,
        train_split=data_args.train_split,
        validation_split=data_args.validation_split,
        dataset_options=data_args.loader_options(),
        skipped=skipped,
    )


def _model_problems(model_args: ModelArguments, crop_size: int, names: list[str] | None) -> list[str]:
    """Says what is wrong with the model arguments, without reading or drawing a weight."""
    if (model_args.backbone is None) == (model_args.backbone_config is None):
        got = "neither" if model_args.backbone is None else "both"
        return [f"Give either `backbone` (pretrained) or `backbone_config` (random weights), got {got}."]
    if model_args.backbone is None and model_args.backbone_overrides:
        return ["`backbone_overrides` goes with `backbone` only: write its fields into `backbone_config`."]
    problems = []
    named_labels = {"num_labels", "id2label", "label2id"} & set(model_args.model_config)
    unknown = sorted(set(model_args.model_config) - MODEL_FIELDS - named_labels)
    if unknown:
        problems.append(
            f"`model_config` has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(MODEL_FIELDS))}."
        )
    if named_labels:
        problems.append(
            f"`model_config` sets {', '.join(sorted(named_labels))}, but the labels come from the data set: leave it out."
        )
    try:
        config = model_config_from(model_args, names or ["background", "object"])
        patch_size = config.patch_size
        # shapes only: the model itself checks what spans encoder and heads
        with torch.device("meta"):
            SynerNetForWeaklySupervisedSegmentation(config)
    except (*INPUT_ERRORS, StrictDataclassError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        source = model_args.backbone or "`backbone_config`"
        # the strict checks wrap the sentence that says what is wrong
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        return [*problems, f"No model can be made of {source} and `model_config`: {_one_line(reason)}"]
    if crop_size < patch_size:
        problems.append(f"`crop_size` is {crop_size}, smaller than a patch of {patch_size} pixels: enlarge it.")
    return problems


def model_config_from(model_args: ModelArguments, names: list[str]) -> SynerNetConfig:
    """
    The configuration that the model of these arguments will have.

    Args:
        model_args ([`ModelArguments`]):
            Encoder and fields.
        names (`list[str]`):
            Class names, background first.

    Returns:
        [`SynerNetConfig`]

    Raises:
        OSError: if the pretrained encoder cannot be found.
        ValueError: if a field has a value it cannot have.
    """
    if model_args.backbone is not None:
        backbone_config = AutoConfig.from_pretrained(model_args.backbone, **model_args.backbone_overrides)
    else:
        backbone_config = AutoConfig.for_model(**model_args.backbone_config)
    fields = {name: value for name, value in model_args.model_config.items() if name in MODEL_FIELDS}
    return SynerNetConfig(backbone_config=backbone_config, id2label=id2label_from(names), **fields)


def build_model(model_args: ModelArguments, names: list[str]) -> SynerNetForWeaklySupervisedSegmentation:
    """
    Makes the model, from a pretrained encoder or from random weights.

    Args:
        model_args ([`ModelArguments`]):
            Encoder and fields.
        names (`list[str]`):
            Class names, background first.

    Returns:
        [`SynerNetForWeaklySupervisedSegmentation`]: in training mode, on the CPU.
    """
    if model_args.backbone is None:
        model = SynerNetForWeaklySupervisedSegmentation(model_config_from(model_args, names))
    else:
        model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
            model_args.backbone,
            id2label=id2label_from(names),
            backbone_overrides=model_args.backbone_overrides,
            **model_args.model_config,
        )
    return model.train()


def run_record(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: SynerNetTrainingArguments,
    accelerator: Accelerator,
    splits: datasets.DatasetDict,
    skipped: dict[str, list[str]],
) -> dict[str, Any]:
    """
    Content of `training_args.json`.

    Args:
        model_args ([`ModelArguments`]):
            As given.
        data_args ([`DataArguments`]):
            As given.
        training_args ([`SynerNetTrainingArguments`]):
            As given.
        accelerator (`Accelerator`):
            Number of processes and precision.
        splits (`datasets.DatasetDict`):
            The data.
        skipped (`dict[str, list[str]]`):
            What was left out of each split.

    Returns:
        `dict[str, Any]`: the three argument groups, `class_names`, `skipped` records, `versions`, and under `run` what
        else the weights depend on.
    """
    train_split = splits["train"]
    digest = hashlib.sha256()
    for image_id, labels in zip(train_split["image_id"], train_split["labels"], strict=True):
        digest.update(f"{image_id}:{','.join(map(str, labels))};".encode())
    return {
        "model_args": dataclasses.asdict(model_args),
        "data_args": dataclasses.asdict(data_args),
        "training_args": dataclasses.asdict(training_args),
        "class_names": class_names(splits),
        "skipped": skipped,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "datasets": datasets.__version__,
        },
        "run": {
            "backbone_name": Path(model_args.backbone).name if model_args.backbone else None,
            "data_fingerprint": digest.hexdigest()[:16],
            "num_train": len(train_split),
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
    }


__all__ = ["build_model", "load_data", "model_config_from", "run_record", "validate_arguments"]
