"""Arguments of a training run: three dataclasses, read from the command line and from a recipe."""

import argparse
import dataclasses
import importlib.util
import json
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser


class InvalidArguments(ValueError):
    """Input that a run refuses before it does any work; the message has one sentence per problem."""


class RecipeLoader(yaml.SafeLoader):
    """Safe YAML that reads 6e-5 as a number, as JSON and YAML 1.2 do and PyYAML's YAML 1.1 does not."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_mapping(value: dict[str, Any] | str | None, name: str) -> dict[str, Any] | None:
    """Reads a mapping that came as text from the command line (JSON or YAML) and leaves a real one alone."""
    if not isinstance(value, str):
        return value
    try:
        mapping = yaml.load(value, Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise InvalidArguments(f"`{name}` must be a mapping such as '{{\"key\": 1}}', got {value!r}.") from error
    if not isinstance(mapping, dict):
        raise InvalidArguments(f"`{name}` must be a mapping such as '{{\"key\": 1}}', got {value!r}.")
    return mapping


@dataclass
class ModelArguments:
    """
    What is trained.

    Args:
        backbone (`str`, *optional*):
            Folder or hub id of a pretrained ViT-family encoder that both branches start from.
        backbone_config (`dict`, *optional*):
            Configuration (with its `model_type`) of an encoder that starts from random weights. Exactly one of
            `backbone` and `backbone_config` is given.
        backbone_overrides (`dict`, *optional*, defaults to `{}`):
            Fields of the pretrained encoder's configuration to change, such as `qkv_bias`; only with `backbone`.
        model_config (`dict`, *optional*, defaults to `{}`):
            Fields of [`SynerNetConfig`] that differ from their defaults.
    """

    backbone: str | None = field(
        default=None, metadata={"help": "Folder or hub id of the pretrained encoder that both branches start from."}
    )
    backbone_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Configuration of an encoder with random weights, as JSON with a model_type."}
    )
    backbone_overrides: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Fields of the pretrained encoder's configuration to change, as JSON."}
    )
    model_config: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Fields of SynerNetConfig that differ from their defaults, as JSON."}
    )

    def __post_init__(self):
        self.backbone_config = _read_mapping(self.backbone_config, "backbone_config")
        self.backbone_overrides = _read_mapping(self.backbone_overrides, "backbone_overrides") or {}
        self.model_config = _read_mapping(self.model_config, "model_config") or {}


DATASET_HELP = "voc2012, coco2014, image_folder, hub or shapes; or a folder, or a Hub id owner/name."


@dataclass
class DataArguments:
    """
    What it is trained and evaluated on.

    Args:
        dataset (`str`, *optional*, defaults to `"voc2012"`):
            Name known to [`~synernet_hf.data.load_wsss_dataset`], a folder or a Hub id.
        data_dir (`str`, *optional*):
            Folder of the data set, for `hub` also a Hub id; not needed by generated data.
        image_labels (`str`, *optional*):
            Where image-level labels come from; `None` is the data set's own source.
        train_split (`str`, *optional*):
            List of training images; `None` is the data set's default.
        validation_split (`str`, *optional*):
            List of images to evaluate on; `None` is the data set's default.
        metric_classes (`list[str]`, *optional*):
            Classes that the reported means run over; `None` means all.
        max_eval_samples (`int`, *optional*):
            Evaluate on the first so many images only; `None` means all.
        num_workers (`int`, *optional*, defaults to 2):
            Loader processes per training process; 0 loads in the training process.
        image_column (`str`, *optional*):
            Column of the images in a table or a Hub data set; `None` finds it by its name.
        label_column (`str`, *optional*):
            Column of the labels; `None` finds it by its name.
        mask_column (`str`, *optional*):
            Column of the masks to evaluate on; `None` is `mask`, where there is one.
        on_bad_image (`str`, *optional*, defaults to `"raise"`):
            `"raise"` refuses data with an image or mask that is missing or can not be used, `"skip"` leaves such
            records out, counts and lists them.
        dataset_options (`dict`, *optional*, defaults to `{}`):
            Further arguments of the loader, such as `num_train` of the generated shapes or `class_names` of images
            of your own.
    """

    dataset: str = field(default="voc2012", metadata={"help": DATASET_HELP})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set."})
    image_labels: str | None = field(
        default=None, metadata={"help": "Source of the image labels: a npz, json or csv file, annotations, or masks."}
    )
    train_split: str | None = field(default=None, metadata={"help": "List of training images, such as train_aug."})
    validation_split: str | None = field(default=None, metadata={"help": "List of images to evaluate on."})
    metric_classes: list[str] | None = field(
        default=None, metadata={"help": "Names of the classes that the reported means run over (default: all)."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on the first so many images only (default: all)."}
    )
    num_workers: int = field(default=2, metadata={"help": "Loader processes per training process."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the images (own tables, Hub)."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the labels (own tables, Hub)."})
    mask_column: str | None = field(default=None, metadata={"help": "Column of the masks (own tables, Hub)."})
    on_bad_image: Literal["raise", "skip"] = field(
        default="raise", metadata={"help": "Refuse data with unusable images or masks, or leave these out."}
    )
    dataset_options: dict[str, Any] | str | None = field(
        default_factory=dict, metadata={"help": "Further arguments of the data set's loader, as JSON."}
    )

    def __post_init__(self):
        self.dataset_options = _read_mapping(self.dataset_options, "dataset_options") or {}

    def loader_options(self) -> dict[str, Any]:
        """
        What the loader takes beside folder, labels and splits.

        Returns:
            `dict[str, Any]`: `dataset_options`, and the columns and `on_bad_image` where they are set.
        """
        columns = {name: getattr(self, name) for name in ("image_column", "label_column", "mask_column")}
        given = {name: value for name, value in columns.items() if value is not None}
        return self.dataset_options | given | ({} if self.on_bad_image == "raise" else {"on_bad_image": "skip"})


@dataclass
class SynerNetTrainingArguments:
    """
    How it is trained. Defaults are the authors' PASCAL VOC run (method.md, "Optimisation") unless said otherwise.

    Args:
        output_dir (`str`):
            Folder of the run; it must not hold another one.
        max_steps (`int`, *optional*, defaults to 8000):
            Optimizer steps, T. Gates and warm-up are fractions of it.
        crop_size (`int`, *optional*, defaults to 448):
            Side of the square training crop, in pixels.
        per_device_batch_size (`int`, *optional*, defaults to 12):
            Images per process and forward pass.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Forward passes per optimizer step.
        learning_rate (`float`, *optional*, defaults to 6e-5):
            Base rate of AdamW.
        encoder_lr_multiplier (`float`, *optional*, defaults to 2.0):
            Factor on the rate of the two encoders.
        head_lr_multiplier (`float`, *optional*, defaults to 10.0):
            Factor on the rate of everything else.
        weight_decay (`float`, *optional*, defaults to 0.01):
            AdamW's weight decay, on every parameter.
        warmup_ratio (`float`, *optional*, defaults to 1500 / 8000):
            Share of the steps with a rising rate.
        max_grad_norm (`float`, *optional*):
            Largest norm of the gradient; `None` does not clip.
        mixed_precision (`str`, *optional*):
            `"no"`, `"fp16"`, `"bf16"`, or `"auto"`: bf16 on a device that has arithmetic for it (a CPU without it is
            many times slower), full precision on others. `None` takes what `accelerate launch` says, else `"no"`.
            [ours]
        seed (`int`, *optional*, defaults to 0):
            Seed of weights, data order, augmentation and random classes. [ours]
        eval_steps (`int`, *optional*, defaults to 2000):
            Steps between two evaluations; one more follows the last step.
        save_steps (`int`, *optional*, defaults to 1000):
            Steps between two checkpoints; one more follows the last step. [ours]
        save_total_limit (`int`, *optional*, defaults to 2):
            Checkpoints kept, the newest ones; `None` keeps all. [ours]
        logging_steps (`int`, *optional*, defaults to 20):
            Steps over which logged losses are averaged. [ours]
        resume_from_checkpoint (`str`, *optional*):
            Checkpoint folder, or `"latest"` for the newest one of `output_dir`.
        report_to (`str`, *optional*, defaults to `"tensorboard"`):
            `"tensorboard"`, `"trackio"` or `"none"`. [ours]
        scale_range (`list[float]`, *optional*, defaults to `[0.5, 2.0]`):
            Smallest and largest random rescaling of a training image.
        flip (`bool`, *optional*, defaults to `True`):
            Mirror half of the training images.
        color_jitter (`float`, *optional*, defaults to 0.8):
            Probability of colour jitter.
        grayscale (`float`, *optional*, defaults to 0.2):
            Probability of a grey image.
        blur (`float`, *optional*, defaults to 1.0):
            Probability of Gaussian blur.
        inference_size (`int`, *optional*):
            Shortest edge, in pixels, to which the saved image processor resizes images at evaluation and inference;
            `None` keeps their size. [authors: native size]
    """

    output_dir: str | None = field(default=None, metadata={"help": "Folder of the run; must not hold another one."})
    max_steps: int = field(default=8000, metadata={"help": "Optimizer steps; gates and warm-up scale with it."})
    crop_size: int = field(default=448, metadata={"help": "Side of the square training crop in pixels."})
    per_device_batch_size: int = field(default=12, metadata={"help": "Images per process and forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes per optimizer step."})
    learning_rate: float = field(default=6e-5, metadata={"help": "Base learning rate of AdamW."})
    encoder_lr_multiplier: float = field(default=2.0, metadata={"help": "Factor on the rate of the encoders."})
    head_lr_multiplier: float = field(default=10.0, metadata={"help": "Factor on the rate of everything else."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay on every parameter."})
    warmup_ratio: float = field(default=1500 / 8000, metadata={"help": "Share of the steps with a rising rate."})
    max_grad_norm: float | None = field(default=None, metadata={"help": "Clip the gradient's norm (default: no)."})
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = field(
        default=None,
        metadata={"help": "no, fp16, bf16, or auto: bf16 where it is fast (default: what accelerate launch says)."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of weights, data order, augmentation, random classes."})
    eval_steps: int = field(default=2000, metadata={"help": "Steps between two evaluations."})
    save_steps: int = field(default=1000, metadata={"help": "Steps between two checkpoints."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Number of newest checkpoints to keep."})
    logging_steps: int = field(default=20, metadata={"help": "Steps over which logged losses are averaged."})
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "Checkpoint folder, or latest for the newest one of output_dir."}
    )
    report_to: Literal["tensorboard", "trackio", "none"] = field(
        default="tensorboard", metadata={"help": "Where curves go: tensorboard, trackio or none."}
    )
    scale_range: list[float] = field(
        default_factory=lambda: [0.5, 2.0], metadata={"help": "Smallest and largest random rescaling."}
    )
    flip: bool = field(default=True, metadata={"help": "Mirror half of the training images."})
    color_jitter: float = field(default=0.8, metadata={"help": "Probability of colour jitter."})
    grayscale: float = field(default=0.2, metadata={"help": "Probability of a grey image."})
    blur: float = field(default=1.0, metadata={"help": "Probability of Gaussian blur."})
    inference_size: int | None = field(
        default=None, metadata={"help": "Shortest edge at evaluation and inference (default: the image's own size)."}
    )

    def __post_init__(self):
        self.scale_range = [float(value) for value in self.scale_range]

    @property
    def warmup_steps(self) -> int:
        """`int`: optimizer steps with a rising rate."""
        return round(self.warmup_ratio * self.max_steps)

    def problems(self) -> list[str]:
        """
        Everything about these values that can be said without looking at data or model.

        Returns:
            `list[str]`: one sentence per problem; empty where there is none.
        """
        found = []
        if not self.output_dir:
            found.append("`output_dir` is missing: name a folder for the run.")
        for name in ("max_steps", "crop_size", "per_device_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                found.append(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("eval_steps", "save_steps", "logging_steps", "save_total_limit", "inference_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "encoder_lr_multiplier", "head_lr_multiplier", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                found.append(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.weight_decay < 0:
            found.append(f"`weight_decay` must not be negative, got {self.weight_decay}.")
        for name in ("warmup_ratio", "color_jitter", "grayscale", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"`{name}` must lie in [0, 1], got {getattr(self, name)}.")
        if len(self.scale_range) != 2 or not 0 < self.scale_range[0] <= self.scale_range[1]:
            found.append(f"`scale_range` must be two rising positive numbers, got {self.scale_range}.")
        if self.mixed_precision not in (None, "no", "fp16", "bf16", "auto"):
            found.append(f"`mixed_precision` must be no, fp16, bf16 or auto, got {self.mixed_precision!r}.")
        if self.report_to not in ("tensorboard", "trackio", "none"):
            found.append(f"`report_to` must be tensorboard, trackio or none, got {self.report_to!r}.")
        elif self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            found.append(f"`report_to={self.report_to}` needs the package {self.report_to}: install it or pass none.")
        return found


ARGUMENT_CLASSES = (ModelArguments, DataArguments, SynerNetTrainingArguments)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    Reads a recipe: a YAML file of flat keys, each a field of one of the three argument classes.

    Args:
        path (`str` or `Path`):
            The file.

    Returns:
        `dict[str, Any]`: the settings, unknown keys and wrong kinds refused.

    Raises:
        InvalidArguments: if the file is missing, is not a mapping, or has an unknown key or a value of a wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InvalidArguments(f"The recipe {path} does not exist: give `--config` the path of a YAML file.")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except yaml.YAMLError as error:
        raise InvalidArguments(f"The recipe {path} is not valid YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise InvalidArguments(f"The recipe {path} must be a mapping of settings, got {type(recipe).__name__}.")
    # not the fields' own types, which the argument parser rewrites
    hints = {name: hint for group in ARGUMENT_CLASSES for name, hint in typing.get_type_hints(group).items()}
    unknown = sorted(str(key) for key in recipe if key not in hints)
    if unknown:
        raise InvalidArguments(
            f"The recipe {path} has unknown settings {', '.join(unknown)}; known are {', '.join(sorted(hints))}."
        )
    problems = [
        f"`{key}` in the recipe {path} must be {wanted}, got {value!r}."
        for key, value in recipe.items()
        if (wanted := _wrong_kind(hints[key], value))
    ]
    if problems:
        raise InvalidArguments("\n".join(problems))
    return recipe


def _wrong_kind(hint: Any, value: Any) -> str | None:
    """Names the kind a recipe value should have by its type hint; `None` where it has it."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts]
    if value is None:
        return None if type(None) in kinds else "a value"
    if dict in kinds:
        return None if isinstance(value, dict) else "a mapping"
    if list in kinds:
        return None if isinstance(value, list) else "a list"
    if bool in kinds:
        return None if isinstance(value, bool) else "true or false"
    if int in kinds:
        return None if isinstance(value, int) and not isinstance(value, bool) else "a whole number"
    if float in kinds:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and math.isfinite(value) else "a number"
    return None if isinstance(value, str) else "text"


def parse_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, SynerNetTrainingArguments]:
    """
    Reads the three argument groups from the command line and, with `--config recipe.yaml`, from a recipe. A value
    given on the command line wins over the recipe, the recipe over the default.

    Args:
        argv (`list[str]`, *optional*):
            Command-line words; `None` takes those of the process.

    Returns:
        `tuple[ModelArguments, DataArguments, SynerNetTrainingArguments]`

    Raises:
        InvalidArguments: if the recipe cannot be used (see [`read_recipe`]) or a mapping cannot be read.
        SystemExit: if the command line has an unknown or unreadable option.

    Example:

    ```python
    >>> from synernet_hf.training import parse_arguments

    >>> _, data_args, training_args = parse_arguments(["--dataset", "shapes", "--max_steps", "10"])
    >>> data_args.dataset, training_args.max_steps
    ('shapes', 10)
    ```"""
    parser = HfArgumentParser(ARGUMENT_CLASSES, description="Train SynerNet from image labels.", allow_abbrev=False)
    parser.add_argument("--config", default=None, help="Recipe: a YAML file with any of the settings below.")
    # parsed alone first, because the recipe sets the defaults of the full parse
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config", default=None)
    config, _ = config_parser.parse_known_args(argv)
    if config.config is not None:
        parser.set_defaults(**{key: _as_default(value) for key, value in read_recipe(config.config).items()})
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unknown options {' '.join(unknown)}")
    values = vars(known)
    return tuple(
        group(**{item.name: values[item.name] for item in dataclasses.fields(group) if item.init})
        for group in ARGUMENT_CLASSES
    )


def _as_default(value: Any) -> Any:
    # argparse runs text defaults through the option's type and takes everything else as it is
    if isinstance(value, dict):
        return json.dumps(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if is_number else value


__all__ = [
    "ARGUMENT_CLASSES",
    "DataArguments",
    "InvalidArguments",
    "ModelArguments",
    "SynerNetTrainingArguments",
    "parse_arguments",
    "read_recipe",
]
