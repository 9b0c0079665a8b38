"""The model card of a run and the image grid that it shows."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from synernet_hf.data.schema import multi_hot
from synernet_hf.files import replace_file, write_text
from synernet_hf.model import (
    PreparedBatch,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    generate_image_cams,
    prepare_image,
    resize_maps,
    segment_images,
)
from synernet_hf.model_card import SynerNetModelCardData, generate_model_card
from synernet_hf.training.checkpoints import CARD_FILE, IMAGES_FILE
from synernet_hf.training.evaluation import inference_mode_of
from synernet_hf.visualization import colorize, figure_panels, heat_map, overlay, with_legend


NUM_IMAGES = 4
# more than the panels show: CAMs at the eight views of a million pixels take a minute
MAX_PIXELS = 2**18


def write_card(
    output_dir: Path,
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    splits: Mapping[str, datasets.Dataset],
    record: Mapping[str, Any],
    results: Mapping[str, Mapping[str, Any]],
    **facts: Any,
) -> None:
    """
    Writes `README.md` of a run from its record and results, with `facts` of [`SynerNetModelCardData`], and the first
    validation images where there are results.
    """
    num_images = 0
    if results:
        num_images = write_image_grid(output_dir / IMAGES_FILE, model, processor, splits["validation"])
    card = generate_model_card(
        SynerNetModelCardData(
            model_name=output_dir.resolve().name,
            settings=record["model_args"] | record["data_args"] | record["training_args"],
            class_names=record["class_names"],
            num_train=record["run"]["num_train"],
            versions=record["versions"],
            results=results,
            images=IMAGES_FILE if num_images else None,
            num_images=num_images,
            **facts,
        )
    )
    write_text(output_dir / CARD_FILE, str(card))


def write_image_grid(
    path: Path,
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    split: datasets.Dataset,
    num_images: int = NUM_IMAGES,
) -> int:
    """Draws the first images of a split with mask, segmentation at one scale and fused CAM; returns their number."""
    processor = copy.copy(processor)
    processor.max_pixels = min(processor.max_pixels or MAX_PIXELS, MAX_PIXELS)
    with inference_mode_of(model):
        rows = [_panels(model, processor, split[index]) for index in range(min(num_images, len(split)))]
    # masks of VOC have contours that are not scored
    names = model.config.id2label | {model.config.semantic_loss_ignore_index: "not scored"}
    grid = with_legend(figure_panels(rows, panel_size=(160, 160)), names)
    replace_file(path, lambda temporary: grid.save(temporary, format="PNG"))
    return len(rows)


def _panels(model, processor, record: dict) -> list[tuple[str, Image.Image]]:
    prepared = prepare_image(processor, record["image"])
    labels = multi_hot(record["labels"], model.config.num_labels - 1)
    batch = PreparedBatch([prepared])
    [segmented] = segment_images(model, processor, batch)
    [cams] = generate_image_cams(model, processor, batch, [labels])
    image = prepared.image
    cam = resize_maps(cams["fused_cams"].amax(dim=0, keepdim=True), (image.height, image.width))[0].cpu().numpy()
    # at the size of the whole image
    segmentation = Image.fromarray(segmented.label_map.cpu().numpy().astype(np.uint8)).resize(image.size, 0)
    return [
        ("image", image),
        ("ground truth", colorize(np.asarray(record["mask"]))),
        ("segmentation", overlay(image, np.asarray(segmentation))),
        ("fused CAM", heat_map(cam, image)),
    ]
