"""The model card of a run and the image grid that it shows."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from PIL import Image

from synernet_hf.data.schema import multi_hot
from synernet_hf.data.transforms import to_rgb
from synernet_hf.files import replace_file, write_text
from synernet_hf.model import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.model_card import SynerNetModelCardData, generate_model_card
from synernet_hf.training.checkpoints import CARD_FILE, IMAGES_FILE
from synernet_hf.training.monitoring import hardware
from synernet_hf.visualization import colorize, figure_panels, heat_map, overlay


if TYPE_CHECKING:
    from synernet_hf.training.engine import TrainingRun

NUM_IMAGES = 4


def write_card(run: "TrainingRun", results: Mapping[str, Mapping[str, Any]]) -> None:
    """
    Writes `README.md` of a run and, where the validation split has masks, the images it shows.

    Args:
        run ([`TrainingRun`]):
            After the last step; the main process calls this.
        results (`Mapping[str, Mapping]`):
            What [`evaluate_model`] returned of the final weights.
    """
    record = run.record
    num_images = 0
    if results:
        num_images = write_image_grid(
            run.output_dir / IMAGES_FILE, run.bare_model, run.processor, run.splits["validation"]
        )
    card = generate_model_card(
        SynerNetModelCardData(
            model_name=run.output_dir.resolve().name,
            settings=record["model_args"] | record["data_args"] | record["training_args"],
            class_names=record["class_names"],
            num_train=record["run"]["num_train"],
            steps=run.state.step,
            minutes=run.state.elapsed_seconds / 60,
            num_processes=run.accelerator.num_processes,
            precision=run.accelerator.mixed_precision,
            hardware=hardware(run.accelerator),
            versions=record["versions"],
            results=results,
            images=IMAGES_FILE if num_images else None,
            num_images=num_images,
        )
    )
    write_text(run.output_dir / CARD_FILE, str(card))


def write_image_grid(
    path: Path,
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    split: datasets.Dataset,
    num_images: int = NUM_IMAGES,
) -> int:
    """
    Draws the first images of a split with their masks, their segmentation at one scale and their fused CAM.

    Args:
        path (`Path`):
            The PNG file to write.
        model ([`SynerNetForWeaklySupervisedSegmentation`]):
            The model; its training mode is restored.
        processor ([`SynerNetImageProcessor`]):
            Its image processor.
        split (`datasets.Dataset`):
            Records with `image`, `mask` and `labels`.
        num_images (`int`, *optional*, defaults to 4):
            Rows, at most.

    Returns:
        `int`: rows drawn.
    """
    was_training = model.training
    model.eval()
    try:
        rows = [_panels(model, processor, split[index]) for index in range(min(num_images, len(split)))]
    finally:
        model.train(was_training)
    grid = figure_panels(rows, panel_size=(160, 160))
    replace_file(path, lambda temporary: grid.save(temporary, format="PNG"))
    return len(rows)


@torch.no_grad()
def _panels(model, processor, record: dict) -> list[tuple[str, Image.Image]]:
    image = to_rgb(record["image"])
    inputs = processor(images=image, do_center_crop=False, do_pad=False, return_tensors="pt")
    pixel_values = inputs["pixel_values"].to(model.device)
    labels = multi_hot(record["labels"], model.config.num_labels - 1)[None].to(model.device)

    def at_size(maps: torch.Tensor) -> torch.Tensor:
        size = (image.height, image.width)
        return torch.nn.functional.interpolate(maps.float().cpu(), size=size, mode="bilinear", align_corners=False)[0]

    segmentation = at_size(model.multi_scale_logits(pixel_values, scales=(1.0,))).argmax(dim=0).numpy()
    cam = at_size(model.generate_cams(pixel_values, labels=labels).fused_cams).amax(dim=0).numpy()
    return [
        ("image", image),
        ("ground truth", colorize(np.asarray(record["mask"]))),
        ("segmentation", overlay(image, segmentation)),
        ("fused CAM", heat_map(cam, image)),
    ]


__all__ = ["write_card", "write_image_grid"]
