"""Arguments of a training run: three dataclasses, read from the command line and from a recipe."""

import argparse
import copy
import dataclasses
import difflib
import importlib.util
import inspect
import math
import re
import types
import typing
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from synernet_hf.cli import CommandParser, InvalidArguments, did_you_mean
from synernet_hf.files import one_line, read_json


# the record of a run's settings, in its folder and in each checkpoint
ARGUMENTS_FILE = "training_args.json"
# those that the package brings, for `--config NAME`
RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MAX_RECIPE_BYTES = 1_000_000
MAX_DEPTH = 32


class RecipeLoader(yaml.SafeLoader):
    """
    Safe YAML that reads 6e-5 as a number, as JSON and YAML 1.2 do and PyYAML's YAML 1.1 does not, and refuses what a
    recipe does not need: equal keys, aliases and deep nesting.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Reads a value and those in it."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not read", problem_mark=self.peek_event().start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Makes a `dict`."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} stands twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_mapping(value: dict[str, Any] | str | None, name: str) -> dict[str, Any] | None:
    """Reads a mapping that came as text from the command line (JSON or YAML) and leaves a real one alone."""
    if not isinstance(value, str):
        return value
    try:
        mapping = yaml.load(value, Loader=RecipeLoader)
    except (yaml.YAMLError, ValueError):
        mapping = None
    if not isinstance(mapping, dict):
        raise InvalidArguments(f"`{name}` must be a mapping such as '{{\"key\": 1}}', got {_shown(value)}.")
    return mapping


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def documented(group: type) -> type:
    """Appends an `Args` section, made of the help texts of the fields, to a dataclass's docstring."""
    lines = []
    for item in dataclasses.fields(group):
        hint = str(item.type.__name__ if isinstance(item.type, type) else item.type).replace("typing.", "")
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        lines.append(f"    {item.name} (`{hint}`, defaults to `{default!r}`):\n        {item.metadata['help']}")
    group.__doc__ = inspect.cleandoc(group.__doc__) + "\n\nArgs:\n" + "\n".join(lines) + "\n"
    return group


def setting(default: Any, text: str) -> Any:
    """A dataclass field with a default (mutable ones are copied) and its one description, shown by `--help`."""
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: copy.copy(default), metadata={"help": text})
    return field(default=default, metadata={"help": text})


@documented
@dataclass
class ModelArguments:
    """What is trained. Give exactly one of `backbone` and `backbone_config`."""

    backbone: str | None = setting(None, "Folder or Hub id of the pretrained encoder that both branches start from.")
    backbone_config: dict[str, Any] | str | None = setting(
        None, "Configuration of an encoder with random weights, as JSON with a model_type."
    )
    backbone_overrides: dict[str, Any] | str | None = setting(
        {}, "Fields of the pretrained encoder's configuration to change, as JSON, such as qkv_bias; needs backbone."
    )
    model_config: dict[str, Any] | str | None = setting(
        {}, "Fields of SynerNetConfig that differ from their defaults, as JSON."
    )

    def __post_init__(self):
        self.backbone_config = _read_mapping(self.backbone_config, "backbone_config")
        self.backbone_overrides = _read_mapping(self.backbone_overrides, "backbone_overrides") or {}
        self.model_config = _read_mapping(self.model_config, "model_config") or {}


@documented
@dataclass
class DataSourceArguments:
    """Where the data is and how it is read. Scripts that do not train take these options too."""

    dataset: str = setting(
        "voc2012", "voc2012, coco2014, image_folder, hub or shapes; or a folder, or a Hub id owner/name."
    )
    data_dir: str | None = setting(None, "Folder of the data set, for hub also a Hub id; shapes needs none.")
    image_labels: str | None = setting(
        None, "Source of the image labels: a npz, json or csv file, annotations, or masks (default: the data set's)."
    )
    train_split: str | None = setting(None, "List of training images, such as train_aug (default: the data set's).")
    validation_split: str | None = setting(None, "List of images to evaluate on (default: the data set's).")
    image_column: str | None = setting(None, "Column of the images (own tables, Hub; default: found by its name).")
    label_column: str | None = setting(None, "Column of the labels (own tables, Hub; default: found by its name).")
    mask_column: str | None = setting(None, "Column of the masks (own tables, Hub; default: mask, where present).")
    on_bad_image: Literal["raise", "skip"] = setting(
        "raise",
        "raise: stop at missing or unusable images and masks; skip: leave these records out, count and list them.",
    )
    dataset_options: dict[str, Any] | str | None = setting(
        {}, "Further arguments of the data set's loader, as JSON, such as num_train of shapes or class_names."
    )

    def __post_init__(self):
        self.dataset_options = _read_mapping(self.dataset_options, "dataset_options") or {}

    def loader_options(self) -> dict[str, Any]:
        """Returns the loader's arguments beyond folder, labels and splits, as far as they are set."""
        names = ("image_column", "label_column", "mask_column", "on_bad_image")
        given = {name: getattr(self, name) for name in names if getattr(self, name) not in (None, "raise")}
        return self.dataset_options | given


@documented
@dataclass
class DataArguments(DataSourceArguments):
    """Where the data is, how it is read, and how a run uses it."""

    metric_classes: list[str] | None = setting(
        None, "Names of the classes that the reported means run over (default: all)."
    )
    max_eval_samples: int | None = setting(None, "Evaluate on the first so many images only (default: all).")
    check_data: bool = setting(
        True, "Decode every image and validation mask before the run starts; false: only check names and labels."
    )
    num_workers: int = setting(2, "Loader processes per training process; 0 loads in the training process.")


@documented
@dataclass
class SynerNetTrainingArguments:
    """
    How it is trained. Defaults are the authors' PASCAL VOC run (method.md, "Optimisation") unless marked [ours].
    """

    output_dir: str | None = setting(None, "Folder of the run; must not hold another one.")
    max_steps: int = setting(8000, "Optimizer steps; gates and warm-up are fractions of it.")
    crop_size: int = setting(448, "Side of the square training crop in pixels.")
    per_device_batch_size: int = setting(12, "Images per process and forward pass.")
    gradient_accumulation_steps: int = setting(1, "Forward passes per optimizer step.")
    learning_rate: float = setting(6e-5, "Base learning rate of AdamW.")
    encoder_lr_multiplier: float = setting(2.0, "Factor on the learning rate of the encoders.")
    head_lr_multiplier: float = setting(10.0, "Factor on the learning rate of everything else.")
    weight_decay: float = setting(0.01, "Weight decay of AdamW, on every parameter.")
    warmup_ratio: float = setting(1500 / 8000, "Fraction of the steps with a rising learning rate.")
    max_grad_norm: float | None = setting(None, "Largest norm of the gradient (default: no clipping).")
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = setting(
        None, "no, fp16, bf16, or auto: bf16 where it is fast (default: what accelerate launch says, else no). [ours]"
    )
    seed: int = setting(0, "Seed of weights, data order, augmentation and random classes. [ours]")
    eval_steps: int = setting(2000, "Steps between two evaluations; one more follows the last step.")
    save_steps: int = setting(1000, "Steps between two checkpoints; one more follows the last step. [ours]")
    save_total_limit: int | None = setting(2, "Number of newest checkpoints to keep; none keeps all. [ours]")
    logging_steps: int = setting(20, "Steps over which logged losses are averaged. [ours]")
    resume_from_checkpoint: str | None = setting(
        None, "Checkpoint folder, or latest for the newest one of output_dir."
    )
    dry_run: bool = setting(
        False, "Check everything, time three steps, print the plan of the run, and write nothing. [ours]"
    )
    # the names that accelerate knows, each that of its package too
    report_to: Literal[
        "tensorboard", "trackio", "wandb", "mlflow", "comet_ml", "aim", "clearml", "dvclive", "swanlab", "none"
    ] = setting("tensorboard", "Where curves and images go: tensorboard, trackio, another tracker or none. [ours]")
    scale_range: list[float] = setting([0.5, 2.0], "Smallest and largest random rescaling of a training image.")
    flip: bool = setting(True, "Mirror half of the training images.")
    color_jitter: float = setting(0.8, "Probability of colour jitter.")
    grayscale: float = setting(0.2, "Probability of a grey image.")
    blur: float = setting(1.0, "Probability of Gaussian blur.")
    inference_size: int | None = setting(
        None, "Shortest edge, in pixels, at evaluation and inference (default: the image's own size)."
    )

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps with a rising rate, an `int`."""
        return round(self.warmup_ratio * self.max_steps)

    def problems(self) -> list[str]:
        """Returns a `list[str]` with one sentence per problem that shows without looking at data or model."""
        found = [] if self.output_dir else ["`output_dir` is missing: name a folder for the run."]
        found += value_problems(self)
        is_range = "`scale_range`" in " ".join(found) or len(self.scale_range) == 2
        if not is_range or self.scale_range[0] > self.scale_range[-1]:
            found.append(f"`scale_range` must be two rising numbers, got {_shown(self.scale_range)}.")
        is_known = self.report_to != "none" and "`report_to`" not in " ".join(found)
        if is_known and importlib.util.find_spec(self.report_to) is None:
            found.append(f"`report_to={self.report_to}` needs the package {self.report_to}: install it or pass none.")
        return found


ARGUMENT_CLASSES = (ModelArguments, DataArguments, SynerNetTrainingArguments)
# smallest and largest value of every setting that is a number or a list of them
POSITIVE = math.ulp(0.0)
RANGES = (
    (1, 10**9, "max_steps eval_steps save_steps logging_steps save_total_limit max_eval_samples"),
    (1, 2**16, "per_device_batch_size gradient_accumulation_steps"),
    (1, 2**14, "crop_size inference_size"),
    (0, 512, "num_workers"),
    # a process adds its number
    (0, 2**31, "seed"),
    (POSITIVE, 10, "learning_rate"),
    (POSITIVE, 1000, "scale_range"),
    (POSITIVE, 10**6, "encoder_lr_multiplier head_lr_multiplier max_grad_norm"),
    (0, 1000, "weight_decay"),
    (0, 1, "warmup_ratio color_jitter grayscale blur"),
)
KINDS = ((dict, "a mapping"), (list, "a list"), (bool, "true or false"), (int, "a whole number"), (float, "a number"))


def value_problems(group: DataArguments | SynerNetTrainingArguments) -> list[str]:
    """One sentence per value of a wrong kind, outside of its range or not one of its choices."""
    found, values = [], vars(group)
    ranges = {name: (low, high) for low, high, names in RANGES for name in names.split()}
    for name, hint in typing.get_type_hints(type(group)).items():
        value, wanted = values[name], _wrong_kind(hint, values[name])
        if wanted is None and name in ranges and value is not None:
            low, high = ranges[name]
            if not all(low <= item <= high for item in (value if isinstance(value, list) else [value])):
                wanted = f"above 0 and at most {high:,}" if low == POSITIVE else f"from {low:,} to {high:,}"
        for choices in [part for part in (hint, *typing.get_args(hint)) if typing.get_origin(part) is Literal]:
            *others, last = typing.get_args(choices)
            if value not in (None, *others, last):
                wanted = f"{', '.join(others)} or {last}"
        if wanted is not None:
            found.append(f"`{name}` must be {wanted}, got {_shown(value)}.")
    return found


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    Reads a recipe: a YAML file of flat keys, each a field of one of the three argument classes.

    Args:
        path (`str` or `Path`): The file, or the name of a recipe of the package, such as `"tiny_cpu"`.

    Returns:
        `dict[str, Any]`: the settings, unknown keys and wrong kinds refused.

    Raises:
        InvalidArguments: if the file is missing, is not a mapping, or has an unknown key or a value of a wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        names = sorted(recipe.stem for recipe in RECIPES.glob("*.yaml"))
        if str(path) not in names:
            close = difflib.get_close_matches(path.stem, names, n=1)
            hint = f"did you mean {close[0]}? Otherwise " if close else ""
            raise InvalidArguments(
                f"The recipe {path} does not exist: {hint}give `--config` the path of a YAML file or one of "
                f"{', '.join(names)}."
            )
        path = RECIPES / f"{path}.yaml"
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise InvalidArguments(f"{path} has {path.stat().st_size:,} bytes, too many for a recipe: give a YAML file.")
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), Loader=RecipeLoader)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        fault = one_line(error) if mark is None else f"line {mark.line + 1}, {error.problem}"
        raise InvalidArguments(f"The recipe {path} is not valid YAML: {fault}.") from error
    if not isinstance(recipe, dict):
        raise InvalidArguments(f"The recipe {path} must be a mapping of settings, got {type(recipe).__name__}.")
    hints = {name: hint for group in ARGUMENT_CLASSES for name, hint in typing.get_type_hints(group).items()}
    problems = [
        f"The recipe {path} has the unknown setting {key}{did_you_mean(str(key), hints)}"
        if key not in hints
        else f"`{key}` in the recipe {path} must be {wanted}, got {_shown(value)}."
        for key, value in recipe.items()
        if (wanted := key not in hints or _wrong_kind(hints[key], value))
    ]
    if problems:
        raise InvalidArguments("\n".join(problems))
    return {key: float(value) if hints[key] is float else value for key, value in recipe.items()}


def _wrong_kind(hint: Any, value: Any) -> str | None:
    """Names the kind a recipe value should have by its type hint; `None` where it has it."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts]
    if value is None:
        return None if type(None) in kinds else "a value"
    kind, wanted = next((pair for pair in KINDS if pair[0] in kinds), (str, "text"))
    accepted = {float: (int, float), list: (list, tuple), str: (str, Path)}.get(kind, kind)
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    if kind is list and fits:
        [inner] = typing.get_args(next(part for part in parts if typing.get_origin(part) is list))
        fits = not any(_wrong_kind(inner, item) for item in value)
        wanted = "a list of numbers" if inner is float else "a list of texts"
    return None if fits and (kind is not float or math.isfinite(value)) else wanted


def training_parser() -> CommandParser:
    """
    Makes the parser of `synernet train`.

    Returns:
        [`~synernet_hf.cli.CommandParser`]: with the fields of the three argument groups, of which only those that are
        on the command line are in its result, and `--config`.
    """
    # only what is on the command line, so that the recipe decides on the rest
    parser = CommandParser(
        *ARGUMENT_CLASSES, prog="synernet train", description="Train a model from image labels.", only_given=True
    )
    parser.add_argument(
        "--config",
        metavar="RECIPE",
        help="YAML file with any of the settings below, or the name of a recipe, such as voc_animals.",
    )
    return parser


def parse_arguments(
    argv: list[str] | None = None, further_options: Collection[str] = ()
) -> tuple[ModelArguments, DataArguments, SynerNetTrainingArguments]:
    """
    Reads the three argument groups from the command line and, with `--config recipe.yaml`, from a recipe. A value
    given on the command line wins over the recipe, the recipe over the default.

    Args:
        argv (`list[str]`, *optional*): Command-line words; `None` takes those of the process.
        further_options (`Collection[str]`, *optional*): Options of the calling command, which a misspelt one may mean.

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
    parser = training_parser()
    parser.further_options = further_options
    given = vars(parser.parse_args(argv))
    recipe = given.pop("config")
    settings = ({} if recipe is None else read_recipe(recipe)) | given
    return tuple(
        group(**{item.name: settings[item.name] for item in dataclasses.fields(group) if item.name in settings})
        for group in ARGUMENT_CLASSES
    )


def data_parser(*groups: type, description: str | None = None, prog: str | None = None) -> CommandParser:
    """
    Makes the parser of a script that reads data without training on it. Data options that are not on the command
    line are `None`, for [`read_data_arguments`] to fill in.

    Args:
        groups (`type`): Further dataclasses of options.
        description, prog (`str`, *optional*): Shown by `--help` as they are.

    Returns:
        [`~synernet_hf.cli.CommandParser`]: with the fields of [`DataSourceArguments`] and of `groups`.
    """
    parser = CommandParser(DataSourceArguments, *groups, description=description, prog=prog)
    parser.set_defaults(**dict.fromkeys(item.name for item in dataclasses.fields(DataSourceArguments)))
    return parser


def read_data_arguments(
    given: argparse.Namespace | DataSourceArguments, run: str | Path | None = None
) -> DataArguments:
    """
    Reads the data source that a command line names, on top of the one a run was trained on. A data set that is not the
    run's starts from the defaults, because folder and labels of the run belong to another one.

    Args:
        given (`argparse.Namespace` or [`DataSourceArguments`]): What a [`data_parser`] read; only fields of
            [`DataArguments`] that are not `None` count.
        run (`str` or `Path`, *optional*): Folder of a run. Its `training_args.json`, if present, says what is not on
            the command line.

    Returns:
        [`DataArguments`]: for [`load_data`].

    Raises:
        InvalidArguments: if the run's record cannot be read, or neither it nor the command line names a data set.
    """
    names = {item.name for item in dataclasses.fields(DataArguments)}
    given_settings = {name: value for name, value in vars(given).items() if name in names and value is not None}
    if run is None:
        return DataArguments(**given_settings)
    path = Path(run) / ARGUMENTS_FILE
    settings = {}
    if path.is_file():
        try:
            settings = dict(read_json(path)["data_args"])
            DataArguments(**settings)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArguments(
                f"{path} is not a record of a run's data ({type(error).__name__}: {error}); remove it and name the data "
                "set with --dataset."
            ) from error
    if given_settings.get("dataset") not in (None, settings.get("dataset")):
        settings = {}
    settings |= given_settings
    if settings.get("dataset") is None:
        raise InvalidArguments(f"{run} does not say which data set it was trained on; name one with --dataset.")
    return DataArguments(**settings)
