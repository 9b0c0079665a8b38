"""
What each part of the method is worth: the same recipe trained once per row and seed, one part more from row to row.

    python benchmarks/ablation.py --data shapes --output runs/ablation_shapes

    python benchmarks/ablation.py --data voc_animals --data_dir path/to/VOCdevkit \
        --backbone facebook/deit-tiny-patch16-224 --output runs/ablation_voc_animals

    python benchmarks/ablation.py --tables

Each finished row and seed is a JSON file in benchmarks/results/ablation/TABLE, from which `--tables` makes the tables of
docs/method.md. A call does what is missing: it keeps what is there, continues an interrupted training from its last
checkpoint, and passes over what another process is at, so that the same command, started twice, keeps two cores busy.
Options that are not listed go to the recipe as in `synernet train`, for example `--num_workers 0`.
"""

import argparse
import copy
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synernet_hf.cli import CommandParser, answer_early, needs_extra, run_command
from synernet_hf.files import FolderInUse, finite, hold_folder, write_json


with needs_extra("train"):
    from synernet_hf.training import InvalidArguments, parse_arguments, read_recipe


ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "src" / "synernet_hf" / "recipes"
RESULTS = ROOT / "benchmarks" / "results" / "ablation"
DOCUMENT = ROOT / "docs" / "method.md"
DATA = {"shapes": "tiny_cpu.yaml", "voc_animals": "voc_animals.yaml"}
# set by the ablation itself, row by row
OWN_SETTINGS = ("output_dir", "seed", "resume_from_checkpoint")
# settings that a result does not depend on
FREE_SETTINGS = (*OWN_SETTINGS, "data_dir", "image_labels", "num_workers", "eval_steps", "save_steps", "logging_steps")
FREE_SETTINGS += ("save_total_limit", "report_to", "max_eval_samples", "check_data")
# one scale is scored
FREE_SETTINGS += ("inference_scales",)
ALONE = {
    "cross_supervision": False,
    "fusion": "fixed",
    "spatial_bce_share": 0.0,
    "prototype_contrast_weight": 0.0,
    "broad_pooling_top_k": None,
    "broad_propagation_temperature": None,
    "precise_propagation_temperature": None,
    "precise_consensus": False,
    "with_class_token_head": False,
}
CROSS = ALONE | {"cross_supervision": True, "fusion": "confidence"}
# without what stands on later steps of the ladder
BEFORE_CONFIDENCE = {"fusion": "fixed", "with_class_token_head": False}
INSTANCE = {"prototype_contrast_weight": 0.05}
# what acts on predictions alone: runs that were trained with other values are scored with those of the recipe
PREDICTION_FIELDS = ("class_prior_weight",)
# half of the authors' weight, and the area read from the branch's own auxiliary CAM throughout, not from the final CAMs
# that the loss itself shrinks: both to the loss's advantage at small sizes
SPATIAL = {"spatial_bce_share": 0.2, "coverage_switch": 1.0}


@dataclasses.dataclass(frozen=True)
class Row:
    """
    One row of the table.

    Args:
        title (`str`):
            What is trained, in words.
        model_config (`dict`, *optional*, defaults to `{}`):
            Fields of `SynerNetConfig` that differ from the recipe.
        backbone_overrides (`dict`, *optional*, defaults to `{}`):
            Fields of the encoder's configuration that differ.
        trained_as (`str`, *optional*):
            Row whose runs are scored; None for runs of its own.
        single_branch (`bool`, *optional*, defaults to `False`):
            Score the precise branch alone. Only for branches that are trained independently.
        scored_with (`dict`, *optional*, defaults to `{}`):
            Fields of `SynerNetConfig` that differ in scoring only.
        true_masks (`bool`, *optional*, defaults to `False`):
            Teach the decoders the masks of the training images, not pseudo-labels.
    """

    title: str
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    backbone_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    trained_as: str | None = None
    single_branch: bool = False
    scored_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    true_masks: bool = False


def _authors_row() -> Row:
    recipe = read_recipe(RECIPES / "voc12_authors.yaml")
    # thresholds, reach of the refinement, scales and gates belong to a size of image and stay those of our recipe,
    # which favours this row: at small sizes the published ones leave next to no labels
    title = "the authors' code (recipe voc12_authors), thresholds, gates and refined predictions of our recipe"
    return Row(title, recipe["model_config"], recipe["backbone_overrides"])


# In the order of the paper's ablation: each row of the ladder adds one part to the row above; rivals stand below.
ROWS = {
    # two branches that never meet are two single-branch models: one of them is scored
    "single": Row("one branch, its own CAM as teacher", ALONE, trained_as="two_branches", single_branch=True),
    "two_branches": Row("two branches, each its own teacher", ALONE),
    "cross_supervision": Row("+ cross-supervision", ALONE | {"cross_supervision": True}),
    "complementary": Row("+ the recipe's complementary objectives", BEFORE_CONFIDENCE),
    "confidence": Row("+ confidence fusion", {"with_class_token_head": False}),
    # the prior is read off class tokens at inference: the two rows are two readings of the same runs
    "class_token": Row(
        "+ classification of the class tokens", trained_as="class_prior", scored_with={"class_prior_weight": 0.0}
    ),
    "class_prior": Row("+ their prior on the segmentation (the recipe as it stands)"),
    "authors": _authors_row(),
    # other complementary objectives on top of cross-supervision and confidence fusion
    "no_complement": Row("cross-supervision and confidence fusion only", CROSS),
    "instance": Row("no_complement + instance learning", CROSS | INSTANCE),
    "spatial_precise": Row(
        "no_complement + instance learning + spatial loss on the precise branch",
        CROSS | INSTANCE | SPATIAL | {"spatial_bce_branches": ("precise",)},
    ),
    "spatial_both": Row(
        "no_complement + spatial loss on both branches, half of the ambiguous area to the broad one",
        CROSS | SPATIAL | {"spatial_bce_branches": ("broad", "precise"), "broad_coverage": 0.5},
    ),
    "precise_area": Row(
        "spatial_precise, a fifth of the ambiguous area to the precise branch",
        CROSS | INSTANCE | SPATIAL | {"spatial_bce_branches": ("precise",), "precise_coverage": 0.2},
    ),
    # the labels of an ensemble of two models that share nothing else
    "mean_cam": Row(
        "two single branches, labels of their mean CAM",
        ALONE | {"cross_supervision": True, "broad_share_in_broad_label": 0.5, "broad_share_in_precise_label": 0.5},
    ),
    # one setting other than the recipe's
    "swapped": Row(
        "the recipe, each branch learns from the other's CAM",
        {"broad_share_in_broad_label": 0.0, "broad_share_in_precise_label": 1.0},
    ),
    "logits_pooling": Row(
        "the recipe with class scores pooled from the CAM, 40 % of the tokens", {"logits_pooling_share": 0.4}
    ),
    # cheaper or dearer steps: docs/performance.md
    "narrow_decoder": Row(
        "logits_pooling, decoders as wide as the encoder", {"logits_pooling_share": 0.4, "decoder_hidden_size": 192}
    ),
    "several_scales": Row(
        "logits_pooling, CAMs at the authors' four scales with mirrored views",
        {"logits_pooling_share": 0.4, "cam_scales": [1.0, 0.5, 0.75, 1.5], "cam_flip": True},
    ),
    "majority": Row("class_prior, three of four votes make a pixel confident", {"confidence_threshold": 0.75}),
    "more_layers": Row("class_prior, three layers of each branch vote", {"confidence_layers": [-1, -2, -3]}),
    "free_fusion": Row("class_prior, confidence may move the fusion further", {"fusion_range": 0.5}),
    "shared_encoder": Row("class_prior, both branches share half of the encoder", {"shared_encoder_layers": 6}),
    # ToCo's pooling and segmentation weight; its class-token contrast and boundary term are not part of the package
    "toco": Row(
        "one branch with ToCo's pooling and weight",
        ALONE | {"pooling_top_k": 1, "segmentation_weight": 0.1},
        single_branch=True,
    ),
    # what the same model could learn from perfect labels
    "ceiling": Row("the recipe as it stands, decoders taught by the true masks", true_masks=True),
}


def parse_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Reads the ablation's own options; what remains is for the recipe."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--data", choices=DATA, help="data set with its recipe")
    parser.add_argument("--output", type=Path, help="folder of all runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the finished results")
    parser.add_argument("--tables", action="store_true", help="only make the tables of docs/method.md anew")
    parser.add_argument(
        "--tuning", action="store_true", help="train without 300 images of the training list and score these (VOC)"
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to do (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each row (default: 0 1 2)")
    parser.add_argument("--max_eval_samples", type=int, help="score the first so many images only (default: all)")
    recipe = parser.add_argument_group("in place of the recipe's")
    recipe.add_argument("--data_dir", help="folder of the data set")
    recipe.add_argument("--image_labels", help="source of the image labels: a npz, json or csv file, annotations")
    recipe.add_argument("--backbone", help="folder or hub id of the pretrained encoder")
    for name in ("max_steps", "crop_size", "per_device_batch_size"):
        recipe.add_argument(f"--{name}", type=int, help=f"{name} of training")
    options, extra = parser.parse_known_args(argv)
    if options.tables:
        parser.refuse(extra)
    elif options.data is None or options.output is None:
        parser.error("Give --data and --output, or --tables alone.")
    return options, extra


def base_arguments(options: argparse.Namespace, extra: list[str]) -> list:
    """
    The three argument groups that all rows start from.

    Args:
        options (`argparse.Namespace`):
            Of [`parse_options`].
        extra (`list[str]`):
            Further words for the recipe.

    Returns:
        `list`: [`ModelArguments`], [`DataArguments`] and [`SynerNetTrainingArguments`]; empty with `--tables`.

    Raises:
        InvalidArguments: if the recipe cannot be used or a word sets what the ablation sets itself.
    """
    if options.tables:
        return []
    taken = [name for name in OWN_SETTINGS if any(word.split("=")[0] == f"--{name}" for word in extra)]
    if taken:
        raise InvalidArguments(
            f"The ablation sets {', '.join(taken)} itself, row by row: leave it out (seeds: --seeds, folder: --output)."
        )
    if options.max_eval_samples is not None and options.max_eval_samples < 1:
        raise InvalidArguments(f"--max_eval_samples is {options.max_eval_samples}; give at least 1.")
    words = ["--config", str(RECIPES / DATA[options.data]), "--report_to", "none"]
    for name in ("data_dir", "image_labels", "backbone", "max_steps", "crop_size", "per_device_batch_size"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name}", str(value)]
    return list(parse_arguments([*words, *extra], further_options=[f"--{name}" for name in vars(options)]))


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(lambda: base_arguments(*parse_options()))

import torch

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor


with needs_extra("train"):
    from synernet_hf.data import class_names
    from synernet_hf.training import (
        DataArguments,
        ModelArguments,
        SynerNetTrainingArguments,
        evaluate_model,
        load_data,
        resolve_precision,
        train,
    )

from ablation_data import cut_tuning_split, label_quality, labels_against_masks
from ablation_tables import read_results, tables, write_tables
from side_by_side import machine


MODEL_FIELDS = set(SynerNetConfig.__annotations__) - {"backbone_config"}


def row_arguments(base: list, row: Row, seed: int, output_dir: Path) -> list:
    """
    The arguments of one run: those of the base, with the row's fields.

    Args:
        base (`list`):
            Of [`base_arguments`]; left as it is.
        row ([`Row`]):
            What differs.
        seed (`int`):
            Seed of the run.
        output_dir (`Path`):
            Folder of the run.

    Returns:
        `list`: as [`base_arguments`]. The run is evaluated once, at its end, on one image, because the ablation
        scores it afterwards.
    """
    model_args, data_args, training_args = copy.deepcopy(base)
    model_args.model_config |= row.model_config
    if "shared_encoder_layers" in row.model_config and model_args.backbone_config is not None:
        # rows are written for encoders of 12 blocks; a shallower one shares half of its own
        half = model_args.backbone_config["num_hidden_layers"] // 2
        model_args.model_config["shared_encoder_layers"] = min(row.model_config["shared_encoder_layers"], half)
    if model_args.backbone_config is None:
        model_args.backbone_overrides |= row.backbone_overrides
    else:
        model_args.backbone_config |= row.backbone_overrides
    data_args.max_eval_samples = 1
    training_args.output_dir, training_args.seed = str(output_dir), seed
    training_args.eval_steps = training_args.max_steps
    return [model_args, data_args, training_args]


def settings_of(arguments: list, max_eval_samples: int | None) -> dict[str, Any]:
    """
    Everything that a row's scores depend on, except its seed: settings, every field of the model's configuration,
    defaults of the package included, and the name of the encoder's folder.
    """
    merged = {name: value for group in arguments for name, value in dataclasses.asdict(group).items()}
    settings = {name: value for name, value in merged.items() if name not in (*FREE_SETTINGS, "model_config")}
    settings["backbone"] = settings["backbone"] and Path(settings["backbone"]).name
    settings["max_eval_samples"] = max_eval_samples
    # what it stands for here: numbers of another format do not go into the same table
    settings["mixed_precision"] = resolve_precision(settings["mixed_precision"])
    settings |= {name: getattr(SynerNetConfig, name) for name in MODEL_FIELDS} | merged["model_config"]
    # as JSON gives them back
    settings = {
        name: settings[name] for name in sorted(settings) if name not in FREE_SETTINGS or name == "max_eval_samples"
    }
    return json.loads(json.dumps(settings))


def defaults() -> dict[str, Any]:
    """The package's own values of all settings that have one."""
    groups = (ModelArguments, DataArguments, SynerNetTrainingArguments)
    fields = [field for group in groups for field in dataclasses.fields(group)]
    found = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    found |= {
        field.name: field.default_factory() for field in fields if field.default_factory is not dataclasses.MISSING
    }
    return found | {name: getattr(SynerNetConfig, name) for name in MODEL_FIELDS}


def scoring_settings(arguments: list, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """As [`settings_of`], of a row's scores: with what differs in scoring only."""
    return json.loads(json.dumps(settings_of(arguments, options.max_eval_samples) | row.scored_with))


def read_finished(path: Path, settings: dict[str, Any], apart_from: Sequence[str] = ()) -> dict[str, Any] | None:
    """
    Reads what an earlier call has finished.

    Args:
        path (`Path`):
            JSON file with `settings`.
        settings (`dict`):
            What they should be.
        apart_from (`Sequence[str]`, *optional*):
            Names of settings that may differ.

    Returns:
        `dict` or `None`: its content, `None` where there is no such file.

    Raises:
        InvalidArguments: if it was made with other settings.
    """
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    # a setting that the package has gained since is at its default, which changes nothing
    given = {name: value for name, value in defaults().items() if name in settings}
    saved = json.loads(json.dumps(given)) | content["settings"]
    names = sorted(name for name in saved | settings if saved.get(name) != settings.get(name))
    names = [name for name in names if name not in (*apart_from, "inference_scales")]
    if names:
        changes = ", ".join(f"{name} ({saved.get(name)} → {settings.get(name)})" for name in names)
        raise InvalidArguments(
            f"{path} was made with other settings: {changes}. Give another --output or --results, or remove the file."
        )
    return content


def trained_run(base: list, name: str, seed: int, output: Path, revision: str) -> tuple[Path, dict[str, Any]]:
    """
    The finished run of a row that trains; trains it if it is not there, from its last checkpoint on if there is one.

    Args:
        base (`list`):
            Of [`base_arguments`].
        name (`str`):
            The row.
        seed (`int`):
            The seed.
        output (`Path`):
            Folder of the table's runs.
        revision (`str`):
            Of the code.

    Returns:
        `tuple[Path, dict]`: folder of the model, and `settings`, `revision`, `labels` (see [`label_quality`]), `minutes`
        and `machine` of its training.
    """
    folder = output / f"{name}-seed{seed}"
    model_args, data_args, training_args = arguments = row_arguments(base, ROWS[name], seed, folder)
    settings = settings_of(arguments, None)
    # written last, so that its presence says that the run is whole
    marker = folder / "ablation_run.json"
    finished = read_finished(marker, settings, PREDICTION_FIELDS)
    if finished is not None:
        return folder, finished
    if folder.is_dir() and any(folder.iterdir()):
        training_args.resume_from_checkpoint = "latest"
    record = folder / "labels.jsonl"
    with labels_against_masks(data_args, training_args, record, teach=ROWS[name].true_masks):
        training = train(model_args, data_args, training_args)["training"]
    # the model in the folder is that of the last step; checkpoints with optimizer states are several times as large
    for path in (folder / "best", *folder.glob("checkpoint-*")):
        shutil.rmtree(path, ignore_errors=True)
    used = machine()
    if torch.accelerator.is_available():
        used["device"] = torch.get_device_module().get_device_name()
    precision = {"no": "float32"}.get(settings["mixed_precision"] or "no", settings["mixed_precision"])
    used = {"device": used["device"], "precision": precision, "torch": used["torch"]}
    labels = None
    if record.is_file():
        names = list(SynerNetConfig.from_pretrained(folder).id2label.values())
        counted = [names.index(name) for name in data_args.metric_classes or names if name != names[0]]
        labels = label_quality(record, training_args.max_steps, counted, names)
    finished = {"settings": settings, "revision": revision, "labels": labels}
    finished |= {"minutes": training["minutes"], "machine": used}
    write_json(marker, finished)
    return folder, finished


def score(
    folder: Path, data_args, row: Row, fields: dict[str, Any], max_samples: int | None
) -> dict[str, dict[str, Any]]:
    """
    Scores a run on the validation split, in float32.

    Args:
        folder (`Path`):
            Model folder.
        data_args ([`DataArguments`]):
            The data.
        row ([`Row`]):
            Says whether both branches count.
        fields (`dict`):
            Fields of the configuration that act on predictions alone.
        max_samples (`int`, *optional*):
            Number of images; None for all.

    Returns:
        `dict[str, dict]`: see [`evaluate_model`], rounded to five digits. For a single branch its CAM is the fused CAM
        too, and there is no other; class scores, which are means of both branches, are left out.
    """
    splits = load_data(data_args)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    fields = fields | ({"broad_share_in_logits": 0.0} if row.single_branch else {})
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder, **fields).to(device)
    results = evaluate_model(
        model,
        SynerNetImageProcessor.from_pretrained(folder),
        splits["validation"],
        class_names=class_names(splits),
        metric_classes=data_args.metric_classes,
        max_samples=max_samples,
        parts=True,
        progress=True,
    )
    if row.single_branch:
        other = ("broad", "classification")
        results = {kind: scores for kind, scores in results.items() if not kind.startswith(other)}
        results["fused_cam"] = results["precise_cam"]
    return rounded(finite(results))


def rounded(data: Any) -> Any:
    """JSON data with floats of five digits."""
    return json.loads(json.dumps(data), parse_float=lambda digits: round(float(digits), 5))


def code_revision() -> str:
    """The commit, with `-dirty` where the package differs from it; `unknown` without git."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "src").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table_of(base: list, options: argparse.Namespace) -> str:
    """Name of the table, and of its folder, such as `voc_animals-160px-2000steps-tuning`."""
    training_args = base[2]
    name = f"{options.data}-{training_args.crop_size}px-{training_args.max_steps}steps"
    return name + "-tuning" * options.tuning


def result_path(base: list, name: str, seed: int, options: argparse.Namespace) -> Path:
    """File of a row and seed."""
    return options.results / table_of(base, options) / f"{name}-seed{seed}.json"


def is_finished(base: list, name: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether the file of a row and seed is there; refuses one of other settings."""
    settings = scoring_settings(row_arguments(base, ROWS[name], seed, Path()), ROWS[name], options)
    return read_finished(result_path(base, name, seed, options), settings) is not None


def do_result(base: list, name: str, seed: int, options: argparse.Namespace, revision: str) -> bool:
    """Trains and scores one row and seed and writes its file; false if another process is at it."""
    row, output = ROWS[name], options.output / table_of(base, options)
    run = row.trained_as or name
    try:
        with hold_folder(output / "claims" / f"{run}-seed{seed}"):
            if is_finished(base, name, seed, options):
                return True
            print(f"{name}, seed {seed}: {row.title}", flush=True)
            folder, trained = trained_run(base, run, seed, output, revision)
            arguments = row_arguments(base, row, seed, Path())
            content = {"data": options.data, "row": name, "seed": seed}
            content |= {"settings": scoring_settings(arguments, row, options), "revision": trained["revision"]}
            fields = {name: content["settings"][name] for name in PREDICTION_FIELDS}
            content["scores"] = score(folder, arguments[1], row, fields, options.max_eval_samples)
            labels = trained["labels"]
            if row.single_branch and labels is not None:
                labels = [{name: tenth[name] for name in ("until", "precise")} for tenth in labels]
            content |= {
                "labels": rounded(labels),
                "minutes": round(trained["minutes"], 3),
                "machine": trained["machine"],
            }
            path = result_path(base, name, seed, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
            return True
    except FolderInUse:
        print(f"{name}, seed {seed} is passed over: another process is at it.", flush=True)
        return False


def run_ablation(options: argparse.Namespace, extra: list[str]) -> None:
    """Does what is missing, seed by seed, so that the table of the first seed is complete early; prints the tables."""
    if options.tables:
        number = write_tables(DOCUMENT, options.results, list(ROWS))
        print(f"{DOCUMENT.name} has {number} tables of the ablation.")
        return
    base, revision = base_arguments(options, extra), code_revision()
    if options.tuning:
        base[1] = cut_tuning_split(base[1], options.output / "tuning_devkit")
    wanted = [(name, seed) for seed in dict.fromkeys(options.seeds) for name in dict.fromkeys(options.rows)]
    # what is there must fit before hours are spent, rows of the same table included
    folder = options.results / table_of(base, options)
    for name, by_seed in read_results(folder, list(ROWS)).items():
        for seed in by_seed:
            is_finished(base, name, seed, options)
    missing = [item for item in wanted if not is_finished(base, *item, options)]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} rows and seeds were finished before.", flush=True)
    # again for those that another process was at: it may have been stopped since
    while any(do_result(base, *item, options, revision) for item in missing):
        missing = [item for item in wanted if not is_finished(base, *item, options)]
    found = read_results(folder, list(ROWS))
    if found:
        print(f"\n{tables(found)}\n")
    print(f"Results are in {folder}, models in {options.output}.")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    status = run_command(run_ablation, *parse_options(argv))
    if status in (130, 143):
        print("The same command goes on with the row and seed that were not finished.", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
