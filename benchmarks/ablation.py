"""
What each part of the method is worth: the same recipe trained once per row and seed, one part more from row to row.

    python benchmarks/ablation.py --data shapes --output runs/ablation_shapes

    python benchmarks/ablation.py --data voc_animals --data_dir path/to/VOCdevkit \
        --backbone facebook/deit-tiny-patch16-224 --max_steps 600 --crop_size 160 --output runs/ablation_voc_animals

The table goes to OUTPUT/ablation.md, everything behind it to OUTPUT/ablation.json, after every finished row and seed.
The same command continues after an interruption: it keeps finished results and restarts unfinished trainings. Options
that are not listed go to the recipe as in `examples/train.py`, for example `--num_workers 0`.
"""

import argparse
import copy
import dataclasses
import json
import math
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

from synernet_hf.cli import CommandParser, answer_early, needs_extra, run_command
from synernet_hf.files import write_json, write_text


with needs_extra("train"):
    from synernet_hf.training import InvalidArguments, parse_arguments, read_recipe


RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes"
DATA = {"shapes": "tiny_cpu.yaml", "voc_animals": "voc_animals.yaml"}
# set by the ablation itself, row by row
OWN_SETTINGS = ("output_dir", "seed", "resume_from_checkpoint")
# settings that a result does not depend on
FREE_SETTINGS = (*OWN_SETTINGS, "data_dir", "image_labels", "num_workers", "eval_steps", "save_steps", "logging_steps")
FREE_SETTINGS += ("save_total_limit", "report_to", "max_eval_samples", "check_data")
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
# half of the authors' weight, and the area read from the branch's own auxiliary CAM throughout, not from the final CAMs
# that the loss itself shrinks: both to the loss's advantage at small sizes
SPATIAL = {"spatial_bce_share": 0.2, "coverage_switch": 1.0}
COLUMNS = {
    "segmentation mIoU": ("segmentation", "mean_iou"),
    "fused CAM mIoU": ("fused_cam", "mean_iou"),
    "B-CAM mIoU": ("broad_cam", "mean_iou"),
    "P-CAM mIoU": ("precise_cam", "mean_iou"),
    "B-CAM recall": ("broad_cam", "foreground_recall"),
    "P-CAM recall": ("precise_cam", "foreground_recall"),
    "B-CAM precision": ("broad_cam", "foreground_precision"),
    "P-CAM precision": ("precise_cam", "foreground_precision"),
    "minutes": ("training", "minutes"),
}


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
    """

    title: str
    model_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    backbone_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
    trained_as: str | None = None
    single_branch: bool = False
    scored_with: dict[str, Any] = dataclasses.field(default_factory=dict)


def _authors_row() -> Row:
    recipe = read_recipe(RECIPES / "voc12_authors.yaml")
    # thresholds, reach of the refinement, scales and gates belong to a size of image and stay those of our recipe,
    # which favours this row: at small sizes the published ones leave next to no labels
    title = "the authors' code (recipe voc12_authors), thresholds and gates of our recipe"
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
    # one setting other than the recipe's
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
}


def parse_options(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Reads the ablation's own options; what remains is for the recipe."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--data", choices=DATA, required=True, help="data set with its recipe")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables and of all runs")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="rows to do (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds of each row (default: 0 1 2)")
    parser.add_argument("--max_eval_samples", type=int, help="score the first so many images only (default: all)")
    recipe = parser.add_argument_group("in place of the recipe's")
    recipe.add_argument("--data_dir", help="folder of the data set")
    recipe.add_argument("--image_labels", help="source of the image labels: a npz, json or csv file, annotations")
    recipe.add_argument("--backbone", help="folder or hub id of the pretrained encoder")
    for name in ("max_steps", "crop_size", "per_device_batch_size"):
        recipe.add_argument(f"--{name}", type=int, help=f"{name} of training")
    return parser.parse_known_args(argv)


def base_arguments(options: argparse.Namespace, extra: list[str]) -> list:
    """
    The three argument groups that all rows start from.

    Args:
        options (`argparse.Namespace`):
            Of [`parse_options`].
        extra (`list[str]`):
            Further words for the recipe.

    Returns:
        `list`: [`ModelArguments`], [`DataArguments`] and [`SynerNetTrainingArguments`].

    Raises:
        InvalidArguments: if the recipe cannot be used or a word sets what the ablation sets itself.
    """
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
    from synernet_hf.training import evaluate_model, load_data, resolve_precision, train


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
    training_args.eval_steps = training_args.save_steps = training_args.max_steps
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
    return json.loads(json.dumps(dict(sorted(settings.items()))))


def scoring_settings(arguments: list, row: Row, options: argparse.Namespace) -> dict[str, Any]:
    """As [`settings_of`], of a row's scores: with what differs in scoring only."""
    return json.loads(json.dumps(settings_of(arguments, options.max_eval_samples) | row.scored_with))


def read_finished(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """
    Reads what an earlier call has finished.

    Args:
        path (`Path`):
            JSON file with `settings`.
        settings (`dict`):
            What they should be.

    Returns:
        `dict` or `None`: its content, `None` where there is no such file.

    Raises:
        InvalidArguments: if it was made with other settings.
    """
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    # a field that the package has gained since is at its default, which changes nothing
    new_fields = {name: getattr(SynerNetConfig, name) for name in MODEL_FIELDS - set(content["settings"])}
    saved = json.loads(json.dumps(new_fields)) | content["settings"]
    names = sorted(name for name in saved | settings if saved.get(name) != settings.get(name))
    if names:
        changes = ", ".join(f"{name} ({saved.get(name)} → {settings.get(name)})" for name in names)
        raise InvalidArguments(
            f"{path} was made with other settings: {changes}. Give another --output, or remove the file."
        )
    return content


def trained_run(base: list, name: str, seed: int, output: Path) -> tuple[Path, dict[str, Any]]:
    """
    The finished run of a row that trains; trains it if it is not there.

    Args:
        base (`list`):
            Of [`base_arguments`].
        name (`str`):
            The row.
        seed (`int`):
            The seed.
        output (`Path`):
            Folder of the ablation.

    Returns:
        `tuple[Path, dict]`: folder of the model, and what `train` says under `"training"`.
    """
    folder = output / "runs" / f"{name}-seed{seed}"
    arguments = row_arguments(base, ROWS[name], seed, folder)
    settings = settings_of(arguments, None)
    # written last, so that its presence says that the run is whole
    marker = folder / "ablation_run.json"
    finished = read_finished(marker, settings)
    if finished is not None:
        return folder, finished["training"]
    if folder.exists():
        print(f"{folder} was not finished and starts over.", flush=True)
        shutil.rmtree(folder)
    training = train(*arguments)["training"]
    # the model in the folder is that of the last step; checkpoints with optimizer states are several times as large
    for path in (folder / "best", *folder.glob("checkpoint-*")):
        shutil.rmtree(path, ignore_errors=True)
    write_json(marker, {"settings": settings, "training": training})
    return folder, training


def score(folder: Path, data_args, row: Row, max_samples: int | None) -> dict[str, dict[str, Any]]:
    """
    Scores a run on the validation split, in float32.

    Args:
        folder (`Path`):
            Model folder.
        data_args ([`DataArguments`]):
            The data.
        row ([`Row`]):
            Says whether both branches count.
        max_samples (`int`, *optional*):
            Number of images; None for all.

    Returns:
        `dict[str, dict]`: see [`evaluate_model`]; for a single branch its CAM is the fused CAM too, and there is no
        other.
    """
    splits = load_data(data_args)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    fields = row.scored_with | ({"broad_share_in_logits": 0.0} if row.single_branch else {})
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder, **fields).to(device)
    results = evaluate_model(
        model,
        SynerNetImageProcessor.from_pretrained(folder),
        splits["validation"],
        class_names=class_names(splits),
        metric_classes=data_args.metric_classes,
        max_samples=max_samples,
        progress=True,
    )
    if row.single_branch:
        results = {kind: scores for kind, scores in results.items() if not kind.startswith("broad")}
        results["fused_cam"] = results["precise_cam"]
    return results


def result_of(base: list, name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The scores of one row and seed under `"results"`: from its JSON file, or made and written there."""
    row = ROWS[name]
    path = options.output / "results" / f"{name}-seed{seed}.json"
    arguments = row_arguments(base, row, seed, Path())
    settings = scoring_settings(arguments, row, options)
    finished = read_finished(path, settings)
    if finished is not None:
        print(f"{name}, seed {seed}: finished before.", flush=True)
        return finished
    print(f"{name}, seed {seed}: {row.title}", flush=True)
    folder, training = trained_run(base, row.trained_as or name, seed, options.output)
    results = score(folder, arguments[1], row, options.max_eval_samples) | {"training": training}
    write_json(path, {"row": name, "seed": seed, "settings": settings, "results": results})
    return json.loads(path.read_text(encoding="utf-8"))


def summarise(finished: dict[str, dict[int, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """
    Means over seeds.

    Args:
        finished (`dict[str, dict[int, dict]]`):
            Row → seed → what [`result_of`] returned.

    Returns:
        `dict`: row → column → `mean`, `std` (of a sample; null for one seed) and the `values` in the order of the
        seeds; columns a row does not have are left out.
    """
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for name, by_seed in finished.items():
        summary[name] = {}
        for column, (kind, score_name) in COLUMNS.items():
            values = [content["results"].get(kind, {}).get(score_name) for content in by_seed.values()]
            if any(value is None or math.isnan(value) for value in values):
                continue
            std = statistics.stdev(values) if len(values) > 1 else None
            summary[name][column] = {"mean": statistics.mean(values), "std": std, "values": values}
    return summary


def table(summary: dict[str, dict[str, dict[str, Any]]], seeds: dict[str, list[int]]) -> str:
    """
    The summary as a Markdown table; scores in percent, mean ± standard deviation over seeds.

    Args:
        summary (`dict`):
            Of [`summarise`].
        seeds (`dict[str, list[int]]`):
            Row → its seeds.

    Returns:
        `str`: the table, and a line on what its columns are.
    """
    lines = [["row", "what", *COLUMNS, "seeds"], ["---", "---", *(["---:"] * (len(COLUMNS) + 1))]]
    for name, columns in summary.items():
        cells = []
        for column in COLUMNS:
            value, scale = columns.get(column), 1 if column == "minutes" else 100
            cell = "-" if value is None else f"{scale * value['mean']:.1f}"
            cells.append(cell if value is None or value["std"] is None else f"{cell} ± {scale * value['std']:.1f}")
        lines.append([name, ROWS[name].title, *cells, str(len(seeds[name]))])
    note = (
        "Percent, mean ± sample standard deviation over seeds; recall and precision are means over the foreground "
        "classes; minutes are of training. Rows of one branch show it as P-CAM; their minutes are those of two such "
        "branches trained side by side."
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{note}\n"


def write_report(output: Path, finished: dict[str, dict[int, dict[str, Any]]]) -> str:
    """Writes `ablation.md` and `ablation.json` of everything finished so far; returns the table."""
    summary = summarise(finished)
    rows = {
        name: {
            "title": ROWS[name].title,
            "summary": summary[name],
            "settings": next(iter(by_seed.values()))["settings"],
            "seeds": {str(seed): content["results"] for seed, content in by_seed.items()},
        }
        for name, by_seed in finished.items()
    }
    text = table(summary, {name: list(by_seed) for name, by_seed in finished.items()})
    write_json(output / "ablation.json", {"rows": rows})
    write_text(output / "ablation.md", text)
    return text


def read_all(base: list, options: argparse.Namespace) -> dict[str, dict[int, dict[str, Any]]]:
    """Everything finished in the output folder, by row in their order and by seed, whichever call has made it."""
    finished: dict[str, dict[int, dict[str, Any]]] = {}
    for name, row in ROWS.items():
        settings = scoring_settings(row_arguments(base, row, 0, Path()), row, options)
        by_seed = {}
        for path in (options.output / "results").glob(f"{name}-seed*.json"):
            by_seed[int(path.stem.removeprefix(f"{name}-seed"))] = read_finished(path, settings)
        if by_seed:
            finished[name] = dict(sorted(by_seed.items()))
    return finished


def run_ablation(options: argparse.Namespace, extra: list[str]) -> None:
    """Does what is missing, seed by seed, so that the table of the first seed is complete early; prints the table."""
    base = base_arguments(options, extra)
    # what is there must fit before hours are spent
    finished = read_all(base, options)
    for seed in dict.fromkeys(options.seeds):
        for name in dict.fromkeys(options.rows):
            result_of(base, name, seed, options)
            finished = read_all(base, options)
            write_report(options.output, finished)
    print(f"\n{write_report(options.output, finished)}\nWrote {options.output / 'ablation.md'} and ablation.json.")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    status = run_command(run_ablation, *parse_options(argv))
    if status in (130, 143):
        print("The same command goes on with the row and seed that were not finished.", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
