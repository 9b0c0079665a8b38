"""The image grid of a model card."""

import numpy as np
import pytest
import torch
from PIL import Image

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.data import class_names, id2label_from, load_shapes
from synernet_hf.model import generate_image_cams
from synernet_hf.training.reporting import _panels, write_image_grid
from synernet_hf.visualization import voc_palette


def test_the_grid_shows_the_first_images_and_leaves_the_model_as_it_was(tiny_config, tmp_path):
    splits = load_shapes(num_train=1, num_validation=3, image_size=48)
    config = type(tiny_config).from_dict(tiny_config.to_dict() | {"id2label": id2label_from(class_names(splits))})
    model = SynerNetForWeaklySupervisedSegmentation(config).train()
    path = tmp_path / "images.png"
    assert write_image_grid(path, model, SynerNetImageProcessor(do_pad=True), splits["validation"], 2) == 2
    assert model.training
    assert [item.name for item in tmp_path.iterdir()] == ["images.png"]
    two = Image.open(path)
    assert write_image_grid(path, model, SynerNetImageProcessor(), splits["validation"], 9) == 3
    three = Image.open(path)
    assert three.height > two.height
    row = three.height - two.height
    # the first rows are the same images, masks and segmentations
    assert np.array_equal(np.asarray(two)[: 2 * row], np.asarray(three)[: 2 * row])
    # below them is the legend, with the colour of every class
    legend = np.asarray(two)[2 * row :]
    assert np.array_equal(legend, np.asarray(three)[3 * row :])
    for color in voc_palette()[: config.num_labels]:
        assert (legend == color).all(axis=-1).sum() > 100
    assert torch.is_grad_enabled()


def test_16_bit_images_are_shown_with_their_shades(tiny_config):
    shades = np.linspace(0, 65535, 32 * 40).reshape(32, 40).astype(np.uint16)
    record = {"image": Image.fromarray(shades), "mask": Image.new("L", (40, 32))}
    record["labels"] = [0]
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config).eval()
    image = dict(_panels(model, SynerNetImageProcessor(), record))["image"]
    assert np.array_equal(np.asarray(image)[..., 0], shades // 256)


def test_training_mode_is_restored_when_a_image_fails(tiny_config, tmp_path):
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config).train()
    with pytest.raises(KeyError):
        write_image_grid(tmp_path / "images.png", model, SynerNetImageProcessor(), [{}], 1)
    assert model.training and not list(tmp_path.iterdir())


def test_large_images_are_shown_to_the_model_no_larger_than_the_grid_needs(tiny_config, tmp_path, monkeypatch):
    seen = []

    def record_size(model, processor, batch, *args, **options):
        seen.extend(item.pixel_values.shape[1] * item.pixel_values.shape[2] for item in batch)
        return generate_image_cams(model, processor, batch, *args, **options)

    monkeypatch.setattr("synernet_hf.training.reporting.generate_image_cams", record_size)
    monkeypatch.setattr("synernet_hf.training.reporting.MAX_PIXELS", 40 * 40)
    record = {"image": Image.new("RGB", (120, 90)), "mask": Image.new("L", (120, 90)), "labels": [0]}
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config).eval()
    for max_pixels in (2**20, None, 30 * 30):
        processor = SynerNetImageProcessor(max_pixels=max_pixels)
        write_image_grid(tmp_path / "images.png", model, processor, [record], 1)
        assert processor.max_pixels == max_pixels
    assert seen[0] == seen[1] and 1200 < seen[0] <= 40 * 40 and seen[2] <= 30 * 30
