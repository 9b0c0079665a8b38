"""One way from an image to its label map: pipeline, scripts, evaluation, card and ONNX graph answer alike."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from testing_utils import SynerNetModelTester
from transformers import pipeline

from synernet_hf import SynerNetImageProcessor
from synernet_hf.commands import main
from synernet_hf.data import build_split
from synernet_hf.model import (
    SynerNetPixelAdaptiveRefinement,
    denormalize,
    generate_image_cams,
    open_image,
    prepare_image,
    segment_images,
)
from synernet_hf.pseudo_labels import PseudoLabeler, PseudoLabelOptions
from synernet_hf.training import evaluate_model
from synernet_hf.training.reporting import _panels
from synernet_hf.visualization import overlay


ORIENTATION = 0x0112
# the width and height that everybody is to see
SIZES = {
    "turned.jpg": (60, 41),
    "turned.tif": (52, 33),
    "deep.png": (47, 35),
    "cmyk.jpg": (45, 39),
    "palette.png": (40, 34),
    "large.jpg": (4000, 3000),
    "strip.png": (512, 37),
}
PROCESSORS = {
    "native": {},
    "resizing": {"do_resize": True, "size": {"shortest_edge": 44}},
    "padding": {"do_pad": True, "size_divisor": 32},
}


def drawn(width, height, seed=0):
    """Soft blobs of colour, of which a JPEG changes little."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for orientation, name, method in ((6, "turned.jpg", Image.Transpose.ROTATE_90), (5, "turned.tif", None)):
        upright, exif = drawn(*SIZES[name], orientation), Image.Exif()
        exif[ORIENTATION] = orientation
        stored = upright.transpose(method or Image.Transpose.TRANSPOSE)
        stored.save(folder / name, exif=exif, **({"quality": 95} if method else {}))
    width, height = SIZES["deep.png"]
    Image.fromarray(np.linspace(0, 65535, width * height).reshape(height, width).astype(np.uint16)).save(
        folder / "deep.png"
    )
    drawn(*SIZES["cmyk.jpg"], 2).convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    drawn(*SIZES["palette.png"], 3).quantize(16).save(folder / "palette.png", transparency=0)
    drawn(*SIZES["large.jpg"], 4).save(folder / "large.jpg")
    drawn(*SIZES["strip.png"], 5).save(folder / "strip.png")
    return folder


@pytest.fixture(scope="module")
def model():
    model = SynerNetModelTester().model()
    # spread the logits, so that every image shows several classes
    for branch in (model.synernet.broad_branch, model.synernet.precise_branch):
        for parameter in branch.decode_head.parameters():
            parameter.data.normal_()
    return model


def processor_of(kind):
    # the bound keeps the test quick; the photograph is far above it, the strip just so
    return SynerNetImageProcessor(max_pixels=2**14, **PROCESSORS[kind])


def names_of(kind, photograph=False):
    """The photograph takes seconds wherever it is answered at its size: in one test, with one processor only."""
    return [name for name in SIZES if (photograph and kind == "native") or name != "large.jpg"]


def label_map_of(segments, config):
    label_map = np.full(segments[0]["mask"].size[::-1], -1)
    for segment in segments:
        label_map[np.asarray(segment["mask"]) == 255] = config.label2id[segment["label"]]
    return label_map


def answers_of_pipeline(model, processor, folder, names, **options):
    segmenter = pipeline(
        "weakly-supervised-segmentation", model=copy.deepcopy(model), image_processor=processor, device="cpu"
    )
    answers = segmenter([str(folder / name) for name in names], **options)
    return {name: label_map_of(segments, model.config) for name, segments in zip(names, answers, strict=True)}


def split_of(folder, expected, config):
    names = [config.id2label[index] for index in range(config.num_labels)]
    masks = [Image.fromarray(label_map.astype(np.uint8)) for label_map in expected.values()]
    labels = [list(range(len(names) - 1))] * len(masks)
    return build_split([str(folder / name) for name in expected], list(expected), labels, names, masks), names


@pytest.mark.parametrize("name", SIZES)
def test_an_image_is_seen_upright_in_eight_bits(folder, name):
    image = open_image(folder / name)
    assert (image.mode, image.size) == ("RGB", SIZES[name])
    for source in (str(folder / name), (folder / name).read_bytes(), {"bytes": None, "path": str(folder / name)}):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
    with Image.open(folder / name) as opened:
        assert np.array_equal(np.asarray(open_image(opened)), np.asarray(image))
    expected = {
        "turned.jpg": (drawn(*SIZES[name], 6), 12),
        "turned.tif": (drawn(*SIZES[name], 5), 0),
        "cmyk.jpg": (drawn(*SIZES[name], 2), 12),
    }
    if name in expected:
        truth, tolerance = expected[name]
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(truth))
        assert difference.max() <= tolerance if tolerance == 0 else difference.mean() < tolerance
    if name == "palette.png":
        # a transparent pixel shows the colour that the palette holds for it
        assert len(image.getcolors()) == 16
    if name == "deep.png":
        assert np.asarray(image)[0, 0].tolist() == [0, 0, 0] and np.asarray(image)[-1, -1].tolist() == [255] * 3


def test_of_an_animation_the_first_frame_counts(tmp_path):
    first, second = (Image.new("RGB", (20, 10), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "moving.gif", save_all=True, append_images=[second])
    red, _, blue = open_image(tmp_path / "moving.gif").getpixel((0, 0))
    assert red > 200 and blue == 0


@pytest.mark.parametrize(
    ("kind", "dtype", "refine"),
    [
        *((kind, dtype, False) for kind in PROCESSORS for dtype in (torch.float32, torch.bfloat16)),
        ("resizing", torch.bfloat16, True),
    ],
)
def test_everybody_gives_the_same_label_map(model, folder, kind, dtype, refine):
    model, processor, names = (
        copy.deepcopy(model).to(dtype),
        processor_of(kind),
        names_of(kind, dtype == torch.float32),
    )
    model.config.refine_predictions = refine
    expected = answers_of_pipeline(model, processor, folder, names)
    assert [label_map.shape[::-1] for label_map in expected.values()] == [SIZES[name] for name in names]
    assert all(len(np.unique(label_map)) > 1 for label_map in expected.values())

    batched = answers_of_pipeline(model, processor, folder, names, batch_size=len(names))
    for segmented, (name, label_map) in zip(
        segment_images(model, processor, [folder / name for name in names]), expected.items(), strict=True
    ):
        assert np.array_equal(segmented.label_map.numpy(), label_map), name
        assert np.array_equal(batched[name], label_map), name

    # masks that are the pipeline's answers are hit pixel by pixel
    split, class_names = split_of(folder, expected, model.config)
    for options in ({"batch_size": 1}, {"num_workers": 1}):
        scores = evaluate_model(model, processor, split, class_names=class_names, cams=False, **options)
        assert scores["segmentation"]["pixel_accuracy"] == 1.0

    every_class = list(range(model.config.num_labels - 1))
    labeler = PseudoLabeler(model, processor, PseudoLabelOptions("segmentation", "known", (1.0,)))
    for record in split:
        label_map = expected[record["image_id"]]
        assert np.array_equal(labeler(record["image"], every_class)[0], label_map), record["image_id"]
        panels = dict(_panels(model, processor, record))
        small = Image.fromarray(label_map.astype(np.uint8)).resize(panels["image"].size, Image.Resampling.NEAREST)
        shown = overlay(panels["image"], np.asarray(small))
        assert np.array_equal(np.asarray(panels["segmentation"]), np.asarray(shown)), record["image_id"]


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_script_writes_the_pipelines_label_maps(root, model, folder, kind, tmp_path):
    processor = processor_of(kind)
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    for directory, scales, options in (
        ("single", (1.0,), ()),
        ("several", (1.0, 1.5), ("--flip",)),
    ):
        words = [
            "predict",
            str(tmp_path / "run"),
            "--output_dir",
            str(tmp_path / directory),
            "--scales",
            *map(str, scales),
        ]
        names = [name for name in names_of(kind) if name != "turned.tif"]
        for images in (names, ["turned.tif"]):  # two files of one stem are not written together
            assert main([*words[:2], *(str(folder / name) for name in images), *words[2:], *options]) == 0
            expected = answers_of_pipeline(model, processor, folder, images, scales=scales, flip=bool(options))
            for name, label_map in expected.items():
                written = Image.open(tmp_path / directory / f"{name.split('.')[0]}_mask.png")
                assert np.array_equal(np.asarray(written), label_map), name


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "native" else []) for kind in PROCESSORS]
)
def test_the_onnx_graph_gives_the_pipelines_label_maps(model, folder, kind, tmp_path):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="the onnx extra is not installed")
    import onnxruntime

    from synernet_hf.export import export_onnx

    # the spread logits are hundreds
    export_onnx(model, tmp_path / "model.onnx", tolerance=1e-2)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    processor = processor_of(kind)
    expected = answers_of_pipeline(model, processor, folder, names_of(kind))
    for name, label_map in expected.items():
        pixel_values = processor(folder / name, do_pad=False, return_tensors="np")["pixel_values"]
        [logits] = session.run(None, {session.get_inputs()[0].name: pixel_values})
        outputs = SimpleNamespace(logits=torch.from_numpy(logits))
        [found] = processor.post_process_semantic_segmentation(outputs, target_sizes=[label_map.shape])
        # onnxruntime sums in another order
        assert (found.numpy() == label_map).mean() > 0.999, name


@pytest.mark.parametrize("channels", [1, 3, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_back_in_chunks_is_the_whole_computation(monkeypatch, channels, dtype):
    torch.manual_seed(0)
    logits = torch.randn(2, channels, 9, 14).to(dtype)
    # without a resize many values are equal: the first class wins
    logits[1] = logits[1].round()
    sizes = [(210, 190), (9, 14)]
    whole = [
        torch.nn.functional.interpolate(maps[None].float(), size=size, mode="bilinear", align_corners=False)[0]
        for maps, size in zip(logits, sizes, strict=True)
    ]
    for values in (1, 210 * 190 * 4, 9 * 14 * 2, 2**24):
        monkeypatch.setattr("synernet_hf.model.image_processing_synernet.CHUNK_VALUES", values)
        processor = SynerNetImageProcessor()
        outputs = SimpleNamespace(logits=logits)
        for found, maps in zip(
            processor.post_process_semantic_segmentation(outputs, target_sizes=sizes), whole, strict=True
        ):
            assert torch.equal(found, maps.argmax(dim=0))
        for found, maps in zip(
            processor.post_process_class_activation_maps(logits, 0.5, target_sizes=sizes), whole, strict=True
        ):
            values_of, ids = maps.max(dim=0)
            assert torch.equal(found, torch.where(values_of > 0.5, ids + 1, 0))


def test_probabilities_are_those_of_the_softmax(model, folder):
    processor = processor_of("native")
    for labels in (None, "predicted", [torch.tensor([1.0, 0.0, 1.0])]):
        [segmented] = segment_images(model, processor, [folder / "turned.jpg"], labels=labels)
        scores = segmented.scores(model.config.num_labels)
        assert scores.shape == (4, 41, 60)
        torch.testing.assert_close(scores.sum(dim=0), torch.ones(41, 60))
        torch.testing.assert_close(segmented.probabilities(), scores.amax(dim=0))
        assert torch.equal(scores.argmax(dim=0), segmented.label_map)


@pytest.fixture
def refining(model):
    model = copy.deepcopy(model)
    model.config.refine_predictions = True
    model.config.refinement_dilations, model.config.refinement_iterations = (1, 2), 3
    return model


def refined_by_hand(model, prepared, maps):
    """The method's refinement of maps `(n, h, w)`, whose weights sum to 1.01 in each step."""
    image = denormalize(prepared.pixel_values[None], model.config.image_mean, model.config.image_std)
    image, small = (F.interpolate(x, size=(20, 30), mode="bilinear") for x in (image, maps[None]))
    refined = SynerNetPixelAdaptiveRefinement((1, 2), 3)(image, small) / 1.01**3
    return F.interpolate(refined, size=maps.shape[-2:], mode="bilinear")[0]


def test_refined_probabilities_are_those_of_the_image_colours(model, refining, folder):
    processor = processor_of("native")
    prepared = prepare_image(processor, folder / "turned.jpg")
    for labels in (None, [torch.tensor([1.0, 0.0, 1.0])]):
        [plain] = segment_images(model, processor, [prepared], labels=labels)
        [segmented] = segment_images(refining, processor, [prepared], labels=labels)
        expected = refined_by_hand(refining, prepared, plain.scores(model.config.num_labels))
        assert segmented.refined and not torch.equal(segmented.label_map, plain.label_map)
        assert torch.equal(segmented.label_map, expected.argmax(dim=0))
        torch.testing.assert_close(segmented.probabilities(), expected.amax(dim=0))
        # a class that is nowhere as likely as an even share cannot win and is left out
        shares = (
            expected * (plain.scores(model.config.num_labels).amax(dim=(1, 2)) >= 1 / len(plain.maps))[:, None, None]
        )
        torch.testing.assert_close(segmented.scores(model.config.num_labels), shares)


def test_a_crf_starts_from_the_refined_probabilities(refining, folder):
    processor, given = processor_of("native"), []
    [segmented] = segment_images(refining, processor, [folder / "turned.jpg"])
    segment_images(
        refining, processor, [folder / "turned.jpg"], crf=lambda image, scores: given.append(scores) or scores
    )
    # in an evaluation too
    split, class_names = split_of(folder, {"turned.jpg": segmented.label_map.numpy()}, refining.config)
    options = {"class_names": class_names, "cams": False, "multi_scale": False}
    evaluate_model(
        refining, processor, split, crf=lambda image, scores: given.append(scores) or scores, num_workers=0, **options
    )
    assert len(given) == 2
    for scores in given:
        torch.testing.assert_close(torch.from_numpy(scores), segmented.scores(refining.config.num_labels))


def test_refined_cams_are_those_of_the_image_colours(model, refining, folder):
    processor = processor_of("native")
    prepared, labels = prepare_image(processor, folder / "turned.jpg"), torch.tensor([1.0, 0.0, 1.0])
    for all_classes in (True, False):
        [plain] = generate_image_cams(model, processor, [prepared], [labels], all_classes=all_classes)
        [cams] = generate_image_cams(refining, processor, [prepared], [labels], all_classes=all_classes)
        for name in ("broad_cams", "precise_cams", "broad_aux_cams", "precise_aux_cams", "fused_cams"):
            torch.testing.assert_close(cams[name], refined_by_hand(refining, prepared, plain[name]))
            assert not torch.allclose(cams[name], plain[name], atol=1e-3)
        assert torch.equal(cams["confidence"], plain["confidence"])
    for options in ({"refine": False}, {"plain": True}):
        [before], [after] = (
            generate_image_cams(asked, processor, [prepared], [labels], **options) for asked in (model, refining)
        )
        assert torch.equal(before["fused_cams"], after["fused_cams"])


def test_a_pseudo_label_is_refined_once(model, refining, folder):
    model = copy.deepcopy(model)
    model.config.refinement_dilations, model.config.refinement_iterations = (1, 2), 3
    options = PseudoLabelOptions("pseudo_label", "known", (1.0,))
    once, again = (
        PseudoLabeler(asked, processor_of("native"), options)(open_image(folder / "turned.jpg"), [0, 2])[0]
        for asked in (model, refining)
    )
    assert np.array_equal(once, again)


def test_the_bound_is_saved_and_can_be_lifted(folder, tmp_path):
    SynerNetImageProcessor(max_pixels=5000).save_pretrained(tmp_path)
    loaded = SynerNetImageProcessor.from_pretrained(tmp_path)
    assert loaded.max_pixels == 5000
    image = drawn(100, 80)
    assert loaded(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 63, 79)
    expected = image.resize((79, 63), Image.Resampling.BOX)
    unbounded = SynerNetImageProcessor(max_pixels=None)
    for source in (image, np.asarray(image)):
        assert np.array_equal(
            loaded(source, return_tensors="np")["pixel_values"],
            unbounded(expected, return_tensors="np")["pixel_values"],
        )
    assert unbounded(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 80, 100)
    mask = Image.fromarray(np.random.default_rng(0).integers(0, 3, (80, 100), dtype=np.uint8))
    found = loaded(image, segmentation_maps=mask, return_tensors="np")["mask"]
    assert found.shape == (1, 63, 79) and set(np.unique(found)) == {0, 1, 2}
    with pytest.raises(ValueError, match="`max_pixels` is 0"):
        loaded(image, max_pixels=0)
