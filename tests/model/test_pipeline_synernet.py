import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from synernet_hf import (
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    SynerNetSegmentationPipeline,
)


SIZES = [(40, 32), (29, 51), (40, 32), (17, 16)]


@pytest.fixture(scope="module")
def segmenter(tiny_config):
    torch.manual_seed(0)
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config)
    # random weights give nearly equal logits; spread them so that several classes are found
    for branch in (model.synernet.broad_branch, model.synernet.precise_branch):
        for parameter in branch.decode_head.parameters():
            parameter.data.normal_()
    return pipeline(
        "weakly-supervised-segmentation", model=model, image_processor=SynerNetImageProcessor(), device="cpu"
    )


@pytest.fixture(scope="module")
def pictures():
    return [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))
        for i, (height, width) in enumerate(SIZES)
    ]


def as_label_map(segments, config):
    label_map = np.full(segments[0]["mask"].size[::-1], -1)
    for segment in segments:
        where = np.asarray(segment["mask"]) == 255
        assert (label_map[where] == -1).all()
        label_map[where] = config.label2id[segment["label"]]
    return label_map


def test_masks_partition_the_picture_and_agree_with_the_model(segmenter, pictures):
    segments = segmenter(pictures[1])
    assert isinstance(segmenter, SynerNetSegmentationPipeline)
    assert all(set(segment) == {"label", "mask", "score"} for segment in segments)
    assert all(segment["mask"].size == (51, 29) and segment["mask"].mode == "L" for segment in segments)
    assert all(1 / 3 <= segment["score"] <= 1 for segment in segments)
    pixel_values = SynerNetImageProcessor()(pictures[1], return_tensors="pt")["pixel_values"]
    expected = segmenter.model.multi_scale_logits(pixel_values, scales=(1.0,))[0].argmax(dim=0)
    assert np.array_equal(as_label_map(segments, segmenter.model.config), expected.numpy())
    assert len(segments) > 1


def test_batches_of_several_sizes_equal_single_pictures(segmenter, pictures):
    single = [as_label_map(segmenter(picture), segmenter.model.config) for picture in pictures]
    for batch_size in (2, 4):
        batched = segmenter(pictures, batch_size=batch_size)
        for expected, segments in zip(single, batched, strict=True):
            assert (as_label_map(segments, segmenter.model.config) == expected).mean() > 0.999


def test_scales_and_flip_reach_the_model(segmenter, pictures):
    pixel_values = SynerNetImageProcessor()(pictures[0], return_tensors="pt")["pixel_values"]
    segments = segmenter(pictures[0], scales=[0.5, 1.5], flip=True)
    expected = segmenter.model.multi_scale_logits(pixel_values, scales=(0.5, 1.5), flip=True)[0].argmax(dim=0).numpy()
    assert np.array_equal(as_label_map(segments, segmenter.model.config), expected)
    plain = as_label_map(segmenter(pictures[0]), segmenter.model.config)
    assert not np.array_equal(plain, expected)


def test_known_image_labels_exclude_the_other_classes(segmenter, pictures):
    assert {segment["label"] for segment in segmenter(pictures[0], image_labels=["dog"])} <= {"background", "dog"}
    only_background = segmenter(pictures[0], image_labels=[])
    assert [(segment["label"], segment["score"]) for segment in only_background] == [("background", 1.0)]


def test_wrong_options_are_refused_in_a_sentence(segmenter, pictures):
    with pytest.raises(ValueError, match="'wolf'.*not classes of the model"):
        segmenter(pictures[0], image_labels=["wolf"])
    with pytest.raises(ValueError, match="positive scale"):
        segmenter(pictures[0], scales=[0.0])


def test_a_folder_serves_our_task_and_the_stock_one(tiny_run_folder):
    picture = str(tiny_run_folder / "picture.png")
    ours = pipeline("weakly-supervised-segmentation", model=str(tiny_run_folder), device="cpu")
    stock = pipeline("image-segmentation", model=str(tiny_run_folder), trust_remote_code=False, device="cpu")
    assert isinstance(ours, SynerNetSegmentationPipeline)
    config = ours.model.config
    assert np.array_equal(as_label_map(ours(picture), config), as_label_map(stock(picture), config))


def test_the_pipelines_code_travels_with_its_folder(segmenter, tmp_path):
    config = segmenter.model.config
    try:
        segmenter.save_pretrained(tmp_path)
        assert "weakly-supervised-segmentation" in config.custom_pipelines
    finally:
        if "custom_pipelines" in vars(config):
            del config.custom_pipelines
    assert (tmp_path / "pipeline_synernet.py").is_file()
    loaded = pipeline(model=str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(loaded).__name__ == "SynerNetSegmentationPipeline"
