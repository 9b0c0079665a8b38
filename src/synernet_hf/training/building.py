"""Checks the arguments of a run, and makes its data, its model and its record from them."""

import dataclasses
import hashlib
import logging
import platform
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import datasets
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError, StrictDataclassError
from torch.utils.data import DataLoader
from transformers import AutoConfig

from synernet_hf.data import (
    StreamBatchSampler,
    SynerNetDataCollator,
    TrainDataset,
    TrainTransform,
    check_dataset,
    class_names,
    id2label_from,
    load_wsss_dataset,
)
from synernet_hf.data.streams import ENDLESS, NUM_SAMPLED, StreamedBatchSampler, first_records, is_stream
from synernet_hf.files import is_hub_id, one_line, try_writing
from synernet_hf.model import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.model.encoder_synernet import closest_name, pretrained_backbone_config
from synernet_hf.training.arguments import (
    DataArguments,
    DataSourceArguments,
    InvalidArguments,
    ModelArguments,
    SynerNetTrainingArguments,
    value_problems,
)
from synernet_hf.training.checkpoints import find_resume_checkpoint
from synernet_hf.training.stopping import outlive_sigterm


# what loaders and configurations raise: missing files and values that do not fit
INPUT_ERRORS = (OSError, ValueError, TypeError)
MODEL_FIELDS = set(SynerNetConfig.__annotations__) - {"backbone_config"}


def load_data(
    data_args: DataSourceArguments,
    skipped: dict[str, list[str]] | None = None,
    id2label: Mapping[int, str] | None = None,
    splits: Sequence[str] = ("train", "validation"),
) -> datasets.DatasetDict:
    """
    Loads the data that the arguments name.

    Args:
        data_args ([`DataSourceArguments`]): Name, folder, splits, labels and options.
        skipped (`dict[str, list[str]]`, *optional*): Receives, by split, a phrase for each record that is left out.
        id2label (`Mapping[int, str]`, *optional*): Class names of a model by id, background first. They are the class
            list of images of the user's own that come without one, so that labels are read by name.
        splits (`Sequence[str]`, *optional*, defaults to `("train", "validation")`): The splits that are needed; files
            that only the others need may be missing.

    Returns:
        `datasets.DatasetDict`: splits `train` and `validation`, as far as they exist. With the option `streaming` the
        first is a stream and the second in memory, of `max_eval_samples` images.

    Raises:
        ValueError: if the name or an option is unknown, or the data is inconsistent.
        FileNotFoundError: if a file is missing.
    """
    options = data_args.loader_options() | ({} if data_args.dataset == "shapes" else {"splits": tuple(splits)})
    if id2label is not None and data_args.dataset not in ("voc2012", "coco2014", "shapes"):
        options = {"class_names": [id2label[label] for label in sorted(id2label)]} | options
    loaded = load_wsss_dataset(
        data_args.dataset,
        data_dir=data_args.data_dir,
        image_labels=data_args.image_labels,
        train_split=data_args.train_split,
        validation_split=data_args.validation_split,
        dataset_options=options,
        skipped=skipped,
    )
    if isinstance(loaded, datasets.IterableDatasetDict):
        loaded = datasets.DatasetDict({name: loaded[name] for name in splits if name in loaded})
        if "validation" in loaded:
            limit = getattr(data_args, "max_eval_samples", None)
            loaded["validation"] = first_records(loaded["validation"], limit)
    return loaded


class RunData(NamedTuple):
    """
    The `splits` to use; by split, a phrase for each record that was left out; and what was checked: the `fingerprint`
    of the data as loaded with the `left_out` positions by split, or `None` if no image was opened.
    """

    splits: datasets.DatasetDict
    skipped: dict[str, list[str]]
    checked: dict[str, Any] | None


def prepare_data(
    data_args: DataArguments, accelerator: Accelerator, record: Mapping[str, Any] | None = None
) -> RunData:
    """
    Loads the data in every process and checks its images in the main one, unless `record`, the `training_args.json` of
    the checkpoint to continue, says that the same data was checked before. A problem in any process ends all of them
    with the same `InvalidArguments`, one sentence per problem.
    """
    problems, splits = [], None
    skipped: dict[str, list[str]] = {}
    with accelerator.main_process_first():
        try:
            splits = load_data(data_args, skipped)
            problems += data_problems(splits, data_args)
        except INPUT_ERRORS as error:
            problems.append(one_line(error))
    problems = list(dict.fromkeys(gather_object(problems)))
    if problems:
        raise InvalidArguments("\n".join(problems))
    fingerprint = _fingerprint(splits, f"{data_args.dataset} {data_args.data_dir} {data_args.on_bad_image}")
    if len(set(gather_object([fingerprint]))) > 1:
        raise InvalidArguments(
            "The processes find different images or labels in the data set: give the machines the same files."
        )
    earlier = (record or {}).get("checked")
    if earlier is not None and earlier["fingerprint"] == fingerprint:
        return RunData(_without(splits, earlier["left_out"]), record["skipped"], earlier)
    if not data_args.check_data:
        return RunData(splits, skipped, None)
    left_out: dict[str, list[int]] = {}
    splits = check_on_main_process(splits, data_args, accelerator, skipped, left_out)
    return RunData(splits, skipped, {"fingerprint": fingerprint, "left_out": left_out})


def check_on_main_process(
    splits: datasets.DatasetDict,
    data_args: DataArguments,
    accelerator: Accelerator | PartialState,
    skipped: dict[str, list[str]] | None = None,
    left_out: dict[str, list[int]] | None = None,
) -> datasets.DatasetDict:
    """
    Checks data as [`~synernet_hf.data.check_dataset`] does, in the main process alone, so that images are decoded
    once. Every process calls this.

    Args:
        splits (`datasets.DatasetDict`): What [`load_data`] returned.
        data_args ([`DataArguments`]): Whether to decode images, and what to do about bad ones.
        accelerator (`accelerate.Accelerator` or `accelerate.PartialState`): The processes.
        skipped (`dict[str, list[str]]`, *optional*): Receives in the main process, by split, a phrase for each record
            that is left out.
        left_out (`dict[str, list[int]]`, *optional*): Receives in every process, by split, the positions of these
            records.

    Returns:
        `datasets.DatasetDict`: the records to use, the same ones in every process.

    Raises:
        InvalidArguments: in every process, with what `check_dataset` says in the main one.
    """
    problem, bad = None, {}
    if accelerator.is_main_process:
        counted = [NUM_SAMPLED if is_stream(split) else len(split) for split in splits.values()]
        number, started = f"{sum(counted):,}", time.perf_counter()
        if any(map(is_stream, splits.values())):
            number = f"at most {number}"
        if data_args.check_data:
            print(f"Checking {number} images (--no_check_data skips this).", flush=True)
        try:
            check_dataset(splits, data_args.on_bad_image, data_args.check_data, skipped=skipped, left_out=bad)
        except INPUT_ERRORS as error:
            problem = one_line(error)
        else:
            if data_args.check_data:
                print(f"Checked {number} images in {time.perf_counter() - started:.1f} s.", flush=True)
    problem, bad = broadcast_object_list([problem, bad])
    if problem is not None:
        # a process that ends early would abort the others before they say why
        accelerator.wait_for_everyone()
        raise InvalidArguments(problem)
    if left_out is not None:
        left_out.update(bad)
    return _without(splits, bad)


def _without(splits: datasets.DatasetDict, left_out: Mapping[str, list[int]]) -> datasets.DatasetDict:
    """The splits without the records at these positions; identifiers may repeat."""
    kept = datasets.DatasetDict(splits)
    for name, positions in left_out.items():
        bad = set(positions)
        kept[name] = splits[name].select([index for index in range(len(splits[name])) if index not in bad])
    return kept


def _fingerprint(splits: Mapping[str, datasets.Dataset], source: str = "") -> str:
    """A digest of source, identifiers and labels."""
    digest = hashlib.sha256(source.encode())
    for name, split in splits.items():
        if is_stream(split):
            split = first_records(split.select_columns(["image_id", "labels"]), NUM_SAMPLED)
        digest.update(f"{name} {sorted(split.column_names)};".encode())
        # as whole columns: a column that is not cut is read row by row
        for image_id, labels in zip(split["image_id"][:], split["labels"][:], strict=True):
            digest.update(f"{image_id}:{','.join(map(str, labels))};".encode())
    return digest.hexdigest()[:16]


def data_problems(splits: datasets.DatasetDict, data_args: DataArguments) -> list[str]:
    """Checks labels and names of loaded data without opening an image; one sentence per problem."""
    check_dataset(splits, decode_images=False)
    names, problems = class_names(splits), []
    if "train" not in splits:
        problems.append(f"There is no split to train on, only {', '.join(splits)}: name one with `train_split`.")
    unknown = [name for name in data_args.metric_classes or () if name not in names]
    if unknown:
        hint = closest_name(unknown[0], names) or f"known are {', '.join(names)}."
        problems.append(f"`metric_classes` has unknown names {', '.join(unknown)}; {hint}")
    return problems


def model_config_from(model_args: ModelArguments, names: list[str]) -> SynerNetConfig:
    """
    Makes the configuration of the model, with `names` as classes (background first). `OSError` if the pretrained
    encoder cannot be found, `ValueError` if a field has a value it cannot have.
    """
    if model_args.backbone is not None:
        backbone_config = pretrained_backbone_config(model_args.backbone, model_args.backbone_overrides)
    else:
        backbone_config = AutoConfig.for_model(**model_args.backbone_config)
    fields = {name: value for name, value in model_args.model_config.items() if name in MODEL_FIELDS}
    return SynerNetConfig(backbone_config=backbone_config, id2label=id2label_from(names), **fields)


def build_model(model_args: ModelArguments, names: list[str]) -> SynerNetForWeaklySupervisedSegmentation:
    """Makes the model in training mode on the CPU, from a pretrained encoder or from random weights."""
    if model_args.backbone is None:
        return SynerNetForWeaklySupervisedSegmentation(model_config_from(model_args, names)).train()
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_shorten_report)
    try:
        model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
            model_args.backbone,
            id2label=id2label_from(names),
            backbone_overrides=model_args.backbone_overrides,
            **model_args.model_config,
        )
    finally:
        logger.removeFilter(_shorten_report)
    return model.train()


def _shorten_report(record: logging.LogRecord) -> bool:
    """Makes one line of the report on an encoder's weights where it only lists heads of another task."""
    report = record.getMessage()
    if "LOAD REPORT" in report and not re.search("MISSING|MISMATCH|CONVERSION", report):
        unused = sorted(re.findall(r"^(\S+)\s*\| .*UNEXPECTED", report, re.MULTILINE))
        record.msg, record.args = f"The encoder has no place for these weights of its file: {', '.join(unused)}.", ()
    return True


def _backbone_problem(name: str) -> str | None:
    """Says why a pretrained encoder cannot be loaded, without the minute of retries that loading it would take."""
    if Path(name).is_dir():
        return None
    hint = "give the folder of a downloaded encoder with --backbone FOLDER"
    if not is_hub_id(name):
        return f"The encoder {name}: no such folder; {hint}, or a Hub id owner/name."
    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return None
    try:
        HfApi().model_info(name, timeout=10)
    except RepositoryNotFoundError:
        return f"The encoder {name}: no such model on the Hub, or a private one; {hint}, or log in (hf auth login)."
    except Exception as error:
        # those of the HTTP library share no other class
        reason = one_line(error.__cause__ or error)[:200]
        return f"The encoder {name} is not on this machine and the Hub cannot be reached ({reason}): {hint}."
    return None


def make_processor(config: SynerNetConfig, inference_size: int | None) -> SynerNetImageProcessor:
    """Makes the processor saved with the model; without `inference_size`, images keep their size."""
    resizing = {} if inference_size is None else {"do_resize": True, "size": {"shortest_edge": inference_size}}
    return SynerNetImageProcessor(
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        size_divisor=config.patch_size,
        **resizing,
    )


def validate_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: SynerNetTrainingArguments
) -> Path | None:
    """
    Checks everything that can be known without opening an image, writes nothing, and returns the checkpoint to
    continue from, if any. Raises one `InvalidArguments` with a sentence per problem. [`prepare_data`] loads and checks
    the data; here it is loaded only to report its problems together with others.
    """
    problems, checkpoint = training_args.problems() + value_problems(data_args), None
    problems += _model_problems(model_args, training_args.crop_size)
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        problems.append(
            "DeepSpeed takes over step, clipping and checkpoints, which are this loop's own: give accelerate "
            "examples/accelerate/fsdp2.yaml instead, which puts weights, gradients and optimizer into shards as well."
        )
    if training_args.output_dir:
        try:
            checkpoint = find_resume_checkpoint(Path(training_args.output_dir), training_args.resume_from_checkpoint)
            try_writing(Path(training_args.output_dir))
        except InvalidArguments as error:
            problems.append(str(error))
        except OSError as error:
            problems.append(
                f"The output folder {training_args.output_dir} cannot be written ({error.strerror}: {error.filename}): "
                "choose another `output_dir`, or make room."
            )
    if not problems:
        return checkpoint
    try:
        problems += data_problems(load_data(data_args), data_args)
    except INPUT_ERRORS as error:
        problems.append(one_line(error))
    raise InvalidArguments("\n".join(problems))


def _model_problems(model_args: ModelArguments, crop_size: int) -> list[str]:
    """Says what is wrong with the model arguments, without reading or drawing a weight."""
    if (model_args.backbone is None) == (model_args.backbone_config is None):
        got = "neither" if model_args.backbone is None else "both"
        return [f"Give either `backbone` (pretrained) or `backbone_config` (random weights), got {got}."]
    if model_args.backbone is None and model_args.backbone_overrides:
        return ["`backbone_overrides` goes with `backbone` only: write its fields into `backbone_config`."]
    problem = model_args.backbone and _backbone_problem(model_args.backbone)
    if problem:
        return [problem]
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
        config = model_config_from(model_args, ["background", "object"])
        patch_size = config.patch_size
        # shapes only: the model itself checks what spans encoder and heads
        with torch.device("meta"):
            SynerNetForWeaklySupervisedSegmentation(config)
    except (*INPUT_ERRORS, StrictDataclassError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        source = model_args.backbone or "`backbone_config`"
        # the strict checks wrap the sentence that says what is wrong
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        return [*problems, f"No model can be made of {source} and `model_config`: {one_line(reason)}"]
    if crop_size < patch_size:
        problems.append(f"`crop_size` is {crop_size}, smaller than a patch of {patch_size} pixels: enlarge it.")
    return problems


def train_loader(
    data_args: DataArguments,
    training_args: SynerNetTrainingArguments,
    accelerator: Accelerator,
    split: datasets.Dataset | datasets.IterableDataset,
    step: int,
    places: Sequence[Sequence[int]] | None = None,
) -> DataLoader:
    """
    Makes the stream of training batches from `step` on, in data that is streamed from the places of all processes. It has
    no end, because steps that a gradient scaler skips use up batches too. Order, crops and mirrors depend on the position
    alone, so a resumed run repeats nothing.
    """
    passes, batch_size = step * training_args.gradient_accumulation_steps, training_args.per_device_batch_size
    transform = TrainTransform(
        training_args.crop_size, tuple(training_args.scale_range), flip=training_args.flip, seed=training_args.seed
    )
    dataset = TrainDataset(split, transform)
    if is_stream(split):
        rank, count = accelerator.process_index, accelerator.num_processes
        place = None if places is None else places[rank]
        sampler = StreamedBatchSampler(dataset.dataset, batch_size, training_args.seed, rank, count, passes, place)
    else:
        start = passes * accelerator.num_processes
        sampler = StreamBatchSampler(len(split), batch_size, ENDLESS, training_args.seed, start)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=SynerNetDataCollator(len(class_names({"train": split})) - 1),
        num_workers=data_args.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # the loader draws a seed when it starts; from the global generator that would shift a resumed run's numbers
        generator=torch.Generator(),
        worker_init_fn=outlive_sigterm,
    )


def run_record(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: SynerNetTrainingArguments,
    accelerator: Accelerator,
    data: RunData,
) -> dict[str, Any]:
    """
    Collects the content of `training_args.json`: the three argument groups, `class_names`, `skipped` records, what was
    `checked`, `versions`, under `run` the rest of what the weights depend on, and under `scored_on` what scores do.
    """
    train_split, names, scored = data.splits["train"], class_names(data.splits), None
    if "validation" in data.splits:
        scored = data.splits["validation"]
        scored = scored.select(range(min(data_args.max_eval_samples or len(scored), len(scored))))
    return {
        "model_args": dataclasses.asdict(model_args),
        "data_args": dataclasses.asdict(data_args),
        "training_args": dataclasses.asdict(training_args),
        "class_names": names,
        "skipped": data.skipped,
        "checked": data.checked,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
            "datasets": datasets.__version__,
        },
        "run": {
            "backbone_name": Path(model_args.backbone).name if model_args.backbone else None,
            "data_fingerprint": _fingerprint({"train": train_split.select_columns(["image_id", "labels"])}),
            "num_train": None if is_stream(train_split) else len(train_split),
            "num_processes": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision,
        },
        "scored_on": None
        if scored is None
        else {
            "num_images": len(scored),
            "fingerprint": _fingerprint({"validation": scored.select_columns(["image_id", "labels"])}),
            "classes": data_args.metric_classes or names,
        },
    }
