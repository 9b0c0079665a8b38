"""The plan of a run, and the image grid of a model card."""

import numpy as np
import pytest
import torch
from PIL import Image
from training_utils import run

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.data import class_names, id2label_from, load_shapes
from synernet_hf.files import hold_folder
from synernet_hf.model import generate_image_cams
from synernet_hf.training import InvalidArguments, engine
from synernet_hf.training.reporting import _panels, write_image_grid
from synernet_hf.visualization import voc_palette


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    original, seen = engine.train_step, []

    def step(*args):
        loss, terms = original(*args)
        seen.append(set(terms))
        return loss, terms

    monkeypatch.setattr(engine, "train_step", step)
    settings = {"max_steps": 90, "eval_steps": 40, "save_steps": 30, "save_total_limit": 2, "dry_run": True}
    settings |= {"gradient_accumulation_steps": 3, "report_to": "tensorboard"}
    assert run(tmp_path / "new" / "run", data={"max_eval_samples": 1}, **settings) == {}
    assert list(tmp_path.iterdir()) == []
    # one step and three that count, of three passes each, with the losses whose gates open late
    assert len(seen) == 12
    assert all({"loss_segmentation", "loss_spatial_bce", "loss_prototype_contrast"} <= terms for terms in seen)
    plan = capsys.readouterr().out
    for words in (
        "images       6 to train on, 1 to evaluate on, 0 left out",
        "steps        90 of 6 images (processes 1, passes 3, 2 in a pass): 90.0 epochs",
        "evaluations  every 40 steps and after the last: 3",
        "checkpoints  every 30 steps and after the last: 3, of which 2 are kept",
        "s a step with all losses",
    ):
        assert words in plan, plan
    splits = load_shapes(6, 2, image_size=32)
    stripes = sum(0 in labels for labels in splits["train"]["labels"])
    assert f"classes      stripes {stripes}, checks" in plan
    with hold_folder(tmp_path / "held"), pytest.raises(InvalidArguments, match="writing into"):
        run(tmp_path / "held", **settings)
    assert list(tmp_path.iterdir()) == []


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
