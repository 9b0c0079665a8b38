import json
import logging as std_logging

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ImageSegmentationPipeline, SegformerConfig, SegformerForSemanticSegmentation, pipeline

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
def images():
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


def test_masks_partition_the_image_and_agree_with_the_model(segmenter, images):
    segments = segmenter(images[1])
    assert isinstance(segmenter, SynerNetSegmentationPipeline)
    assert all(set(segment) == {"label", "mask", "score"} for segment in segments)
    assert all(segment["mask"].size == (51, 29) and segment["mask"].mode == "L" for segment in segments)
    assert all(1 / 3 <= segment["score"] <= 1 for segment in segments)
    pixel_values = SynerNetImageProcessor()(images[1], return_tensors="pt")["pixel_values"]
    expected = segmenter.model.multi_scale_logits(pixel_values, scales=(1.0,))[0].argmax(dim=0)
    assert np.array_equal(as_label_map(segments, segmenter.model.config), expected.numpy())
    assert len(segments) > 1


def test_batches_of_several_sizes_equal_single_images(segmenter, images):
    single = [as_label_map(segmenter(image), segmenter.model.config) for image in images]
    for batch_size in (2, 4):
        batched = segmenter(images, batch_size=batch_size)
        for expected, segments in zip(single, batched, strict=True):
            assert (as_label_map(segments, segmenter.model.config) == expected).mean() > 0.999


def test_scales_and_flip_reach_the_model(segmenter, images):
    pixel_values = SynerNetImageProcessor()(images[0], return_tensors="pt")["pixel_values"]
    segments = segmenter(images[0], scales=[0.5, 1.5], flip=True)
    expected = segmenter.model.multi_scale_logits(pixel_values, scales=(0.5, 1.5), flip=True)[0].argmax(dim=0).numpy()
    assert np.array_equal(as_label_map(segments, segmenter.model.config), expected)
    plain = as_label_map(segmenter(images[0]), segmenter.model.config)
    assert not np.array_equal(plain, expected)


def test_known_image_labels_exclude_the_other_classes(segmenter, images):
    assert {segment["label"] for segment in segmenter(images[0], image_labels=["dog"])} <= {"background", "dog"}
    only_background = segmenter(images[0], image_labels=[])
    assert [(segment["label"], segment["score"]) for segment in only_background] == [("background", 1.0)]


def test_image_labels_of_records_and_of_the_classifiers(segmenter, images):
    records = [{"image": images[0], "labels": [1]}, {"image": images[1], "labels": ["cat"]}]
    by_name = [segmenter(images[0], image_labels=["dog"]), segmenter(images[1], image_labels=["cat"])]
    for batch_size in (1, 2):
        for expected, segments in zip(
            by_name, segmenter(records, image_labels="known", batch_size=batch_size), strict=True
        ):
            config = segmenter.model.config
            assert (as_label_map(segments, config) == as_label_map(expected, config)).mean() > 0.999
    # a record's labels are used on request only
    config = segmenter.model.config
    assert np.array_equal(as_label_map(segmenter(records[0]), config), as_label_map(segmenter(images[0]), config))

    pixel_values = SynerNetImageProcessor()(images[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        seen = (segmenter.model(pixel_values).classification_logits[0] > 0).tolist()
    names = [config.id2label[index + 1] for index, is_seen in enumerate(seen) if is_seen]
    answer = segmenter(images[0], image_labels="predicted", return_cams=True)
    assert list(answer["cams"]) == names
    expected = segmenter(images[0], image_labels=names)
    assert np.array_equal(as_label_map(answer["segments"], config), as_label_map(expected, config))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_cams_confidence_and_scores_are_those_of_the_model(segmenter, images, batch_size):
    options = {"return_cams": True, "return_confidence": True, "return_scores": True}
    answer = segmenter(images, image_labels=["dog"], batch_size=batch_size, **options)[1]
    assert set(answer) == {"segments", "cams", "confidence", "scores"}
    pixel_values = SynerNetImageProcessor()(images[1], return_tensors="pt")["pixel_values"]
    expected = segmenter.model.generate_cams(pixel_values, labels=torch.tensor([[0.0, 1.0]]))
    assert list(answer["cams"]) == ["dog"]
    np.testing.assert_allclose(answer["cams"]["dog"], expected.fused_cams[0, 1].numpy(), atol=1e-5)
    np.testing.assert_allclose(answer["confidence"], expected.confidence[0, 0].numpy(), atol=1e-5)
    assert answer["confidence"].shape == images[1].size[::-1]
    total = sum(answer["scores"].values())
    np.testing.assert_allclose(total, np.ones_like(total), atol=1e-5)
    assert (answer["scores"]["cat"] == 0).all()
    for segment in answer["segments"]:
        where = np.asarray(segment["mask"]) == 255
        assert segment["score"] == pytest.approx(answer["scores"][segment["label"]][where].mean(), abs=1e-5)


def test_one_option_alone_gives_its_entry_alone(segmenter, images):
    assert set(segmenter(images[0], return_confidence=True)) == {"segments", "confidence"}
    assert set(segmenter(images[0], return_cams=True)["cams"]) == {"cat", "dog"}
    assert set(segmenter(images[0], return_scores=True)["scores"]) == {"background", "cat", "dog"}


def test_a_crf_gets_image_and_probabilities_and_decides(segmenter, images):
    seen = []

    def everything_is_cat(image, probabilities):
        seen.append((image.dtype, image.shape, probabilities.dtype, probabilities.shape))
        assert np.array_equal(image, np.asarray(images[1]))
        np.testing.assert_allclose(probabilities.sum(axis=0), 1.0, atol=1e-5)
        refined = np.full_like(probabilities, 0.1)
        refined[1] = 0.8
        return refined

    segments = segmenter(images[1], crf=everything_is_cat)
    assert seen == [(np.uint8, (29, 51, 3), np.float32, (3, 29, 51))]
    assert [(segment["label"], round(segment["score"], 3)) for segment in segments] == [("cat", 0.8)]
    # what is known not to be there stays out
    assert {segment["label"] for segment in segmenter(images[1], crf=everything_is_cat, image_labels=["dog"])} <= {
        "background",
        "dog",
    }


def test_the_dense_crf_serves_as_crf(segmenter, images):
    pytest.importorskip("pydensecrf", reason="the crf extra is not installed")
    from synernet_hf.crf import DenseCRF

    crf = DenseCRF(num_iterations=2)
    scores = segmenter(images[1], return_scores=True)["scores"]
    expected = crf(np.asarray(images[1]), np.stack(list(scores.values()))).argmax(axis=0)
    assert np.array_equal(as_label_map(segmenter(images[1], crf=crf), segmenter.model.config), expected)


def test_data_sets_and_generators_are_read_as_they_are_answered(segmenter, images):
    datasets = pytest.importorskip("datasets")
    from transformers.pipelines.pt_utils import KeyDataset

    config = segmenter.model.config
    expected = [as_label_map(segmenter(image), config) for image in images[:3]]
    table = datasets.Dataset.from_dict({"image": images[:3]}, features=datasets.Features({"image": datasets.Image()}))
    for inputs in (table, KeyDataset(table, "image"), table.to_iterable_dataset()):
        answers = [as_label_map(segments, config) for segments in segmenter(inputs, batch_size=2)]
        assert len(answers) == 3
        assert all((answer == label_map).mean() > 0.999 for answer, label_map in zip(answers, expected, strict=True))

    drawn = []

    def endless():
        while True:
            drawn.append(1)
            yield images[0]

    answers = segmenter(endless())
    assert as_label_map(next(iter(answers)), config).shape == images[0].size[::-1]
    assert len(drawn) < 5


def test_a_processor_that_resizes_or_pads_gives_masks_of_the_image(segmenter, images):
    for processor in (
        SynerNetImageProcessor(do_pad=True, size_divisor=32),
        SynerNetImageProcessor(do_resize=True, size={"shortest_edge": 24}),
    ):
        changed = SynerNetSegmentationPipeline(model=segmenter.model, image_processor=processor)
        answer = changed(images[1], return_cams=True, return_confidence=True)
        assert answer["segments"][0]["mask"].size == images[1].size
        assert answer["cams"]["cat"].shape == answer["confidence"].shape == (29, 51)
    padded = SynerNetSegmentationPipeline(
        model=segmenter.model, image_processor=SynerNetImageProcessor(do_pad=True, size_divisor=32)
    )
    config = segmenter.model.config
    assert np.array_equal(as_label_map(padded(images[1]), config), as_label_map(segmenter(images[1]), config))


def test_wrong_options_are_refused_in_a_sentence(segmenter, images):
    with pytest.raises(ValueError, match="'wolf'.*not classes of the model"):
        segmenter(images[0], image_labels=["wolf"])
    with pytest.raises(ValueError, match="'wolf'.*not classes of the model"):
        segmenter(images[0], image_labels="wolf")
    with pytest.raises(ValueError, match="positive scale"):
        segmenter(images[0], scales=[0.0])
    with pytest.raises(ValueError, match="An image has no `labels`"):
        segmenter(images[0], image_labels="known")
    with pytest.raises(ValueError, match=r"Got the image labels \[1, 2\].*ids from 0 to 1"):
        segmenter({"image": images[0], "labels": [1, 2]}, image_labels="known")
    with pytest.raises(ValueError, match="`crf` is True; a function"):
        segmenter(images[0], crf=True)
    for value in ("a", ["a"], None, [[1.0, 2.0]], [[1], [2, 3]], {}, [None], [float("nan")], [float("inf")], []):
        if value is not None:
            with pytest.raises(ValueError, match="^`scales` is .*positive scale is expected"):
                segmenter(images[0], scales=value)
    for name in ("flip", "return_cams", "return_confidence", "return_scores"):
        for value in ("yes", 2, [True], np.ones(2)):
            with pytest.raises(ValueError, match=f"^`{name}` is .*; True or False is expected"):
                segmenter(images[0], **{name: value})
    for value in (7, 1.5, [["cat"]], [None], [{}], [0.5]):
        with pytest.raises(ValueError, match="^(Got the image labels|The image labels)"):
            segmenter(images[0], image_labels=value)
    with pytest.raises(
        TypeError, match="^weakly-supervised-segmentation has no option threshold; it has scales, flip"
    ):
        segmenter(images[0], threshold=0.5)


@pytest.mark.parametrize("task", ["weakly-supervised-segmentation", "image-segmentation"])
@pytest.mark.parametrize("absolute", [False, True], ids=["dots", "absolute"])
def test_a_folder_whose_index_names_weights_elsewhere_is_refused(segmenter, tmp_path, task, absolute):
    folder = tmp_path / "model"
    segmenter.model.save_pretrained(folder, max_shard_size="20KB")
    segmenter.image_processor.save_pretrained(folder)
    pipeline(task, model=str(folder))
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"].values()))
    (folder / first).rename(tmp_path / "secret.safetensors")
    elsewhere = str(tmp_path / "secret.safetensors") if absolute else "../secret.safetensors"
    index["weight_map"] = {key: elsewhere if name == first else name for key, name in index["weight_map"].items()}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"index.json is refused: it names '.*secret.safetensors', which is not a"):
        pipeline(task, model=str(folder))


@pytest.mark.parametrize("with_pipeline_code", [False, True])
def test_a_folder_serves_our_task_and_the_stock_one(
    segmenter, tiny_run_folder, tmp_path, monkeypatch, with_pipeline_code
):
    from transformers.utils import logging

    def ask(question=""):
        raise AssertionError(f"the user was asked: {question}")

    monkeypatch.setattr("builtins.input", ask)
    messages = []
    handler = std_logging.Handler(level=std_logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.add_handler(handler)
    folder = tiny_run_folder
    try:
        ours = pipeline("weakly-supervised-segmentation", model=str(folder), device="cpu")
        if with_pipeline_code:
            folder = tmp_path / "with_code"
            ours.save_pretrained(folder)
            # the installed pipeline, although the folder has another one: without the task, and with leave to run code
            ours = pipeline("weakly-supervised-segmentation", model=str(folder), device="cpu")
            for options in ({}, {"trust_remote_code": True}):
                assert type(pipeline(model=str(folder), device="cpu", **options)) is SynerNetSegmentationPipeline
        stock = pipeline("image-segmentation", model=str(folder), device="cpu")
    finally:
        logging.remove_handler(handler)
    assert messages == []
    image = str(tiny_run_folder / "image.png")
    assert type(ours) is SynerNetSegmentationPipeline
    assert type(ours.model) is type(stock.model) is SynerNetForWeaklySupervisedSegmentation
    config = ours.model.config
    assert np.array_equal(as_label_map(ours(image), config), as_label_map(stock(image), config))


def test_the_pipelines_code_travels_with_its_folder(segmenter, tmp_path):
    config = segmenter.model.config
    try:
        segmenter.save_pretrained(tmp_path)
        assert list(config.custom_pipelines) == ["weakly-supervised-segmentation"]
    finally:
        if "custom_pipelines" in vars(config):
            del config.custom_pipelines
    assert (tmp_path / "pipeline_synernet.py").is_file()
    saved = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]
    assert saved["weakly-supervised-segmentation"]["impl"] == "pipeline_synernet.SynerNetSegmentationPipeline"


PROCESSORS = {
    "native": {},
    "resizing": {"do_resize": True, "size": {"shortest_edge": 24}},
    "square": {"do_resize": True, "size": {"height": 24, "width": 32}},
    "padding": {"do_pad": True, "size_divisor": 32},
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_stock_pipeline_takes_batches_of_several_sizes(segmenter, images, kind):
    options = {
        "model": segmenter.model,
        "image_processor": SynerNetImageProcessor(**PROCESSORS[kind]),
        "device": "cpu",
    }
    stock, ours = pipeline("image-segmentation", **options), pipeline("weakly-supervised-segmentation", **options)
    assert isinstance(stock, ImageSegmentationPipeline)
    config = segmenter.model.config
    single = [stock(image) for image in images]
    for segments, image in zip(single, images, strict=True):
        assert {(segment["score"], segment["mask"].size) for segment in segments} == {(None, image.size)}
        assert np.array_equal(as_label_map(segments, config), as_label_map(ours(image), config))
    assert len({image.size for image in images[:-1]}) < len({image.size for image in images}) == 3
    for inputs in (images, (image for image in images)):
        for found, expected in zip(stock(inputs, batch_size=3), single, strict=True):
            assert (as_label_map(found, config) == as_label_map(expected, config)).mean() > 0.999
    assert len(stock(images[0], subtask="semantic", threshold=0.5, timeout=3)) == len(single[0])


def test_other_models_keep_the_stock_pipeline():
    sizes = {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4, "decoder_hidden_size": 8}
    other = SegformerForSemanticSegmentation(SegformerConfig(**sizes))
    stock = pipeline("image-segmentation", model=other, image_processor=SynerNetImageProcessor(), device="cpu")
    assert type(stock) is ImageSegmentationPipeline and stock.model is other


def test_16_bit_greyscale_keeps_its_shades(segmenter, tmp_path):
    shades = np.linspace(0, 65535, 32 * 40).reshape(32, 40).astype(np.uint16)
    image = Image.fromarray(shades)
    image.save(tmp_path / "grey.png")
    expected = np.repeat((shades // 256)[..., None], 3, axis=2)
    given = segmenter.preprocess(Image.fromarray(expected.astype(np.uint8)))
    for source in (image, str(tmp_path / "grey.png")):
        found = segmenter.preprocess(source)
        assert np.array_equal(np.asarray(found["prepared"][0].image), expected)
        assert torch.equal(found["prepared"][0].pixel_values, given["prepared"][0].pixel_values)


# what people hand in


def test_every_kind_of_input_gives_the_same_answer(segmenter, images, tmp_path):
    image, config = images[1], segmenter.model.config
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy())
    expected = as_label_map(segmenter(image), config)
    singles = [
        array,
        array.transpose(2, 0, 1),
        (array / 255).astype(np.float32),
        array.astype(np.uint16) * 257,
        tensor,
        tensor.permute(2, 0, 1),
        tensor.float() / 255,
        str(tmp_path / "image.png"),
        tmp_path / "image.png",
        (tmp_path / "image.png").read_bytes(),
        {"image": array},
        {"image": tensor},
        {"image": {"bytes": None, "path": str(tmp_path / "image.png")}},
    ]
    for given in singles:
        assert np.array_equal(as_label_map(segmenter(given), config), expected), type(given)
    several = [
        singles,
        tuple(singles),
        np.stack([array, array]),
        torch.stack([tensor, tensor]).permute(0, 3, 1, 2),
        (given for given in singles),
        iter(singles[:2]),
    ]
    for given in several:
        answers = list(segmenter(given, batch_size=2))
        assert len(answers) in (2, len(singles))
        for segments in answers:
            assert (as_label_map(segments, config) == expected).mean() > 0.999


@pytest.mark.parametrize("kind", ["torch", "numpy", None])
def test_splits_of_every_format_are_segmented(segmenter, images, kind):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(datasets.Value("int64"))})
    table = datasets.Dataset.from_dict({"image": images[:2], "labels": [[0], [1]]}, features=features)
    config = segmenter.model.config
    for record, image in zip(segmenter(table.with_format(kind), image_labels="known"), images[:2], strict=True):
        labels = ["cat"] if image is images[0] else ["dog"]
        assert np.array_equal(
            as_label_map(record, config), as_label_map(segmenter(image, image_labels=labels), config)
        )


def test_one_scale_may_be_a_number(segmenter, images):
    config = segmenter.model.config
    for number, scales in (
        (1.0, (1.0,)),
        (1, (1.0,)),
        (0.5, [0.5]),
        (np.float32(1.5), (1.5,)),
        ((1.0, 0.5), [1.0, 0.5]),
    ):
        found, expected = (as_label_map(segmenter(images[0], scales=given), config) for given in (number, scales))
        assert np.array_equal(found, expected)
    for wrong in (0.0, -1, (), float("nan")):
        with pytest.raises(ValueError, match="at least one positive scale"):
            segmenter(images[0], scales=wrong)


@pytest.mark.parametrize("text", ["dog", "cat, dog", "dog;cat", "cat|dog", "background, dog"])
def test_image_labels_may_be_a_text(segmenter, images, text):
    config, names = segmenter.model.config, [name for name in ("background", "cat", "dog") if name in text]
    expected = as_label_map(segmenter(images[0], image_labels=names), config)
    assert np.array_equal(as_label_map(segmenter(images[0], image_labels=text), config), expected)
    mapping = {name: int(name in names) for name in ("cat", "dog")}
    for labels in (text, mapping, names):
        record = {"image": images[0], "labels": labels}
        assert np.array_equal(as_label_map(segmenter(record, image_labels="known"), config), expected)
    with pytest.raises(ValueError, match=r"\['wolf'\] are not classes of the model; choose from background, cat, dog"):
        segmenter(images[0], image_labels=f"wolf, {text}")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([True, False], ["cat"]),
        ([False, False], []),
        (torch.tensor([1.0, 1.0]), ["cat", "dog"]),
        (np.array([False, True]), ["dog"]),
        ([1], ["dog"]),
        ([0, 1], ["cat", "dog"]),
    ],
)
def test_image_labels_may_be_ids_or_a_vector_that_is_no_list_of_ids(segmenter, images, labels, names):
    maps = [
        as_label_map(segmenter(images[0], image_labels=given), segmenter.model.config) for given in (labels, names)
    ]
    assert np.array_equal(*maps)


def test_image_labels_in_another_unicode_form(segmenter, images, tmp_path):
    segmenter.model.save_pretrained(tmp_path)
    labels = {0: "background", 1: "caf\u00e9", 2: "dog"}
    relabelled = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path, id2label=labels)
    renamed = SynerNetSegmentationPipeline(model=relabelled, image_processor=SynerNetImageProcessor())
    found = renamed(images[0], image_labels=["cafe\u0301"])
    assert {segment["label"] for segment in found} <= {"background", "caf\u00e9"}


@pytest.mark.parametrize(
    "id2label", [{0: "background", 1: "dog", 2: "cat"}, {"2": "cat", "1": "dog", "0": "background"}]
)
def test_a_relabelled_model_answers_by_its_new_names(segmenter, images, tmp_path, id2label):
    segmenter.model.save_pretrained(tmp_path)
    relabelled = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path, id2label=id2label)
    renamed = SynerNetSegmentationPipeline(model=relabelled, image_processor=SynerNetImageProcessor())
    for new, old in (("cat", "dog"), ("dog", "cat")):
        found = renamed(images[0], image_labels=[new], return_cams=True)
        expected = segmenter(images[0], image_labels=[old], return_cams=True)
        assert new in {segment["label"] for segment in found["segments"]} <= {"background", new}
        assert np.array_equal(found["cams"][new], expected["cams"][old])
        masks = [{s["label"]: np.asarray(s["mask"]) for s in answer["segments"]} for answer in (found, expected)]
        assert np.array_equal(masks[0][new], masks[1][old])
