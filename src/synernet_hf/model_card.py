"""Model card of a training run, made of nothing but the run's own values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData


TEMPLATE_PATH = Path(__file__).with_name("model_card_template.md")

# kinds of prediction in the order of the table; see `synernet_hf.training.evaluate_model`
RESULT_NAMES = {
    "segmentation": "segmentation",
    "segmentation_multi_scale": "segmentation, multi-scale",
    "segmentation_multi_scale_flip": "segmentation, multi-scale and mirrored",
    "broad_cam": "B-CAM",
    "precise_cam": "P-CAM",
    "fused_cam": "fused CAM",
    "broad_aux_cam": "B-CAM, auxiliary layer",
    "precise_aux_cam": "P-CAM, auxiliary layer",
    "single_scale_cam": "single-scale CAM (baseline)",
    "single_scale_cam_predicted": "single-scale CAM of predicted classes (baseline)",
    "background_only": "background only (baseline)",
}

# settings that say where files lie on one machine, or how often something was written
LOCAL_SETTINGS = {"output_dir", "data_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "report_to"}
PATH_SETTINGS = {"backbone", "image_labels"}


@dataclass
class SynerNetModelCardData:
    """
    The values of a run that its card shows.

    Args:
        model_name (`str`):
            Title of the card.
        settings (`Mapping[str, Any]`):
            All arguments of the run as one flat mapping, as in a recipe.
        class_names (`Sequence[str]`):
            Class names, background first.
        num_train (`int`):
            Number of training pictures.
        steps (`int`):
            Optimizer steps done.
        minutes (`float`):
            Time of the training loop in minutes.
        num_processes (`int`):
            Training processes.
        precision (`str`):
            `"no"`, `"fp16"` or `"bf16"`: mixed precision as it was used.
        hardware (`str`):
            What it ran on.
        versions (`Mapping[str, str]`):
            Package names and versions.
        results (`Mapping[str, Mapping[str, Any]]`, *optional*, defaults to `{}`):
            What [`~synernet_hf.training.evaluate_model`] returned; scores in [0, 1].
    """

    model_name: str
    settings: Mapping[str, Any]
    class_names: Sequence[str]
    num_train: int
    steps: int
    minutes: float
    num_processes: int
    precision: str
    hardware: str
    versions: Mapping[str, str]
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def recipe(self) -> dict[str, Any]:
        """`dict[str, Any]`: the settings without folders, file paths cut to the file's name."""
        kept = {}
        for name, value in self.settings.items():
            if name in LOCAL_SETTINGS or value is None or value == {}:
                continue
            # a hub id (owner/name) is kept whole, a path is not
            if name in PATH_SETTINGS and not _is_hub_id(value):
                value = Path(value).name
            kept[name] = value
        return kept

    def metadata(self) -> ModelCardData:
        """[`~huggingface_hub.ModelCardData`]: the card's YAML header, with the results as a model index."""
        backbone = self.settings.get("backbone")
        evaluations = [
            EvalResult(
                task_type="image-segmentation",
                task_name="Weakly supervised semantic segmentation",
                dataset_type=self.settings["dataset"],
                dataset_name=self.settings["dataset"],
                dataset_split=self.settings.get("validation_split") or "validation",
                metric_type="mean_iou",
                metric_name=f"mean IoU, {RESULT_NAMES.get(kind, kind)}",
                metric_value=round(float(scores["mean_iou"]), 4),
            )
            for kind, scores in self.results.items()
            if scores["mean_iou"] is not None
        ]
        return ModelCardData(
            model_name=self.model_name,
            library_name="transformers",
            pipeline_tag="image-segmentation",
            tags=["synernet", "semantic-segmentation", "weakly-supervised"],
            base_model=backbone if _is_hub_id(backbone) else None,
            metrics=["mean_iou"] if evaluations else None,
            eval_results=evaluations or None,
        )


def _is_hub_id(name: Any) -> bool:
    # a path that merely looks like owner/name is told by its being on disk
    is_pair = isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return is_pair and not Path(name).exists()


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _results_table(data: SynerNetModelCardData) -> str:
    lines = [
        "| prediction | mean IoU | recall | precision | mean IoU, classes present |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, scores in data.results.items():
        values = [_percent(scores[name]) for name in ("mean_iou", "recall", "precision", "mean_iou_present")]
        lines.append(f"| {RESULT_NAMES.get(kind, kind)} | {' | '.join(values)} |")
    return "\n".join(lines)


def _results_intro(data: SynerNetModelCardData) -> str:
    num_images = next(iter(data.results.values()))["num_images"]
    chosen = data.settings.get("metric_classes")
    classes = f"the {len(chosen)} classes {', '.join(chosen)}" if chosen else f"all {len(data.class_names)} classes"
    return (
        f"On {num_images} pictures of the validation split, in percent; mean IoU, recall and precision are means over "
        f"{classes}. CAMs are given the true image labels. The scores are those of the weights in this folder."
    )


def generate_model_card(data: SynerNetModelCardData) -> ModelCard:
    """
    Fills the template `model_card_template.md`.

    Args:
        data ([`SynerNetModelCardData`]):
            The run's values.

    Returns:
        [`~huggingface_hub.ModelCard`]: its text is `str(card)`.
    """
    settings = data.settings
    backbone = settings.get("backbone")
    if backbone is None:
        encoder = f"random weights, {settings['backbone_config'].get('model_type')}"
    else:
        encoder = f"{backbone if _is_hub_id(backbone) else Path(backbone).name}, pretrained"
    per_step = settings["per_device_batch_size"] * settings["gradient_accumulation_steps"] * data.num_processes
    return ModelCard.from_template(
        data.metadata(),
        template_path=str(TEMPLATE_PATH),
        model_name=data.model_name,
        dataset=settings["dataset"],
        num_train=data.num_train,
        backbone=encoder,
        steps=data.steps,
        batch=per_step,
        crop_size=settings["crop_size"],
        seed=settings["seed"],
        precision="float32" if data.precision == "no" else f"mixed, {data.precision}",
        minutes=f"{data.minutes:.1f}",
        hardware=data.hardware,
        software=", ".join(f"{name} {version}" for name, version in data.versions.items()),
        recipe=yaml.safe_dump(data.recipe(), sort_keys=False, allow_unicode=True).rstrip(),
        results=bool(data.results),
        results_intro=_results_intro(data) if data.results else "",
        results_table=_results_table(data) if data.results else "",
        classes=", ".join(f"{index} {name}" for index, name in enumerate(data.class_names)),
    )


__all__ = ["SynerNetModelCardData", "generate_model_card"]
