import base64
import functools
import http.server
import io
import threading
from pathlib import PureWindowsPath

import numpy as np
import pytest
import torch
from PIL import Image

from synernet_hf import SynerNetImageProcessor
from synernet_hf.model.image_processing_synernet import bounded_size, open_image
from synernet_hf.model.modeling_synernet import SynerNetSegmenterOutput


def random_image(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_mask(height, width, seed=0):
    mask = Image.fromarray(np.random.default_rng(seed).choice([0, 1, 2, 255], (height, width)).astype(np.uint8))
    mask.putpalette(list(range(256)) * 3)
    return mask


def test_an_image_keeps_its_size_and_is_normalised():
    image = random_image(37, 45)
    inputs = SynerNetImageProcessor()(image, return_tensors="pt")
    assert list(inputs) == ["pixel_values"]
    values = inputs["pixel_values"]
    assert values.shape == (1, 3, 37, 45) and values.dtype == torch.float32
    expected = (np.asarray(image) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(values[0].permute(1, 2, 0).numpy() - expected).max() < 1e-5


def test_all_kinds_of_input_give_the_same_values(tmp_path):
    image = random_image(20, 30)
    image.save(tmp_path / "image.png")
    array = np.asarray(image)
    processor = SynerNetImageProcessor()
    expected = processor(image, return_tensors="pt")["pixel_values"]
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    path = tmp_path / "image.png"
    kinds = [array, array.transpose(2, 0, 1), tensor, str(path), path, [image], (path,)]
    for kind in kinds:
        assert torch.equal(processor(kind, return_tensors="pt")["pixel_values"], expected)
    batches = [np.stack([array, array]), torch.stack([tensor, tensor]), [image, str(path)], [array, tensor]]
    batches += [[image, array], [tensor, path], [path.read_bytes(), array / 255]]
    for batch in batches:
        assert torch.equal(processor(batch, return_tensors="pt")["pixel_values"], expected.expand(2, -1, -1, -1))
    numpy_values = processor(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(numpy_values, expected.numpy())


@pytest.fixture
def served(tmp_path):
    """A folder and the address at which its files can be had."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_images_come_from_addresses_too(served):
    folder, address = served
    image = random_image(20, 30)
    image.save(folder / "image.png")
    processor = SynerNetImageProcessor()
    expected = processor(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(f"{address}/image.png", return_tensors="pt")["pixel_values"], expected)
    image.save(folder / "ein Bär.png")
    for name in ("ein Bär.png", "ein%20B%C3%A4r.png"):
        assert torch.equal(processor(f"{address}/{name}", return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="cannot be read; expected is the path or URL"):
        processor([f"{address}/image.png", f"{address}/none.png"])
    with pytest.raises(ValueError, match="none.png' cannot be read"):
        processor(str(folder / "none.png"))


def test_files_are_turned_upright(tmp_path):
    image = random_image(20, 30)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "image.png", exif=exif)
    assert SynerNetImageProcessor()(tmp_path / "image.png", return_tensors="pt")["pixel_values"].shape[-2:] == (
        30,
        20,
    )


def test_greyscale_arrays_become_rgb():
    array = np.asarray(random_image(20, 30))[..., 0]
    processor = SynerNetImageProcessor()
    expected = processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    for kind in (array, torch.from_numpy(array.copy()), [array]):
        assert torch.equal(processor(kind, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_images_of_other_modes_become_rgb(mode):
    image = random_image(9, 7).convert(mode)
    values = SynerNetImageProcessor()(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(values, SynerNetImageProcessor()(image.convert("RGB"), return_tensors="pt")["pixel_values"])


def test_masks_keep_their_ids_and_are_not_called_labels():
    mask = random_mask(21, 33)
    inputs = SynerNetImageProcessor()(random_image(21, 33), mask, return_tensors="pt")
    assert set(inputs) == {"pixel_values", "mask"}  # the model's `labels` are those of whole images
    assert inputs["mask"].dtype == torch.int64
    assert np.array_equal(inputs["mask"][0].numpy(), np.asarray(mask))


def test_masks_of_every_kind_are_equal(tmp_path):
    mask = random_mask(21, 33)
    mask.save(tmp_path / "mask.png")
    ids = np.array(mask)
    for kind in (mask, ids, ids.astype(np.int64), torch.from_numpy(ids), tmp_path / "mask.png", [mask]):
        found = SynerNetImageProcessor()(random_image(21, 33), kind, return_tensors="pt")["mask"]
        assert np.array_equal(found[0].numpy(), ids)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (random_image(21, 33), "expected are ids of shape"),
        (random_mask(21, 32), "its image \\(21, 33\\); the two must agree"),
        ("none.png", "segmentation map 'none.png' cannot be read"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        SynerNetImageProcessor()(random_image(21, 33), mask, return_tensors="pt")


def test_a_crop_larger_than_the_image_is_filled_with_what_is_ignored():
    processor = SynerNetImageProcessor(do_center_crop=True, crop_size={"height": 10, "width": 12})
    inputs = processor(random_image(6, 8), random_mask(6, 8), return_tensors="pt")
    assert inputs["mask"].shape == (1, 10, 12) and inputs["pixel_values"].shape == (1, 3, 10, 12)
    inner = inputs["mask"][0, 2:8, 2:10]
    assert np.array_equal(inner.numpy(), np.asarray(random_mask(6, 8)))
    assert int((inputs["mask"] == 255).sum()) == 10 * 12 - 6 * 8 + int((inner == 255).sum())


def test_resizing_invents_no_mask_id():
    inputs = SynerNetImageProcessor(do_resize=True, size={"height": 32, "width": 24})(
        random_image(21, 33), random_mask(21, 33), return_tensors="pt"
    )
    assert inputs["pixel_values"].shape == (1, 3, 32, 24) and inputs["mask"].shape == (1, 32, 24)
    assert set(inputs["mask"].unique().tolist()) <= {0, 1, 2, 255}


@pytest.mark.parametrize("size", [40, {"shortest_edge": 40}])
def test_shortest_edge_keeps_proportions(size):
    values = SynerNetImageProcessor()(random_image(20, 30), do_resize=True, size=size, return_tensors="pt")
    assert values["pixel_values"].shape == (1, 3, 40, 60)


def test_padding_reaches_the_patch_multiple_and_is_told_apart():
    images, masks = [random_image(20, 33), random_image(10, 12)], [random_mask(20, 33), random_mask(10, 12)]
    processor = SynerNetImageProcessor()
    inputs = processor(images, masks, do_pad=True, size_divisor=8, return_tensors="pt")
    assert inputs["pixel_values"].shape == (2, 3, 24, 40)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        real = torch.zeros(24, 40, dtype=torch.int64)
        real[: image.height, : image.width] = 1
        assert torch.equal(inputs["pixel_mask"][i], real)
        assert (inputs["pixel_values"][i][:, real == 0] == 0).all()
        assert (inputs["mask"][i][real == 0] == 255).all()
        assert np.array_equal(inputs["mask"][i][: mask.height, : mask.width].numpy(), np.asarray(mask))
        alone = processor(image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(inputs["pixel_values"][i][:, : image.height, : image.width], alone)


def test_padding_to_no_multiple_is_refused():
    with pytest.raises(ValueError, match="`size_divisor` must be positive"):
        SynerNetImageProcessor()(random_image(8, 8), do_pad=True, size_divisor=0, return_tensors="pt")


def test_images_of_several_sizes_are_a_list_or_a_clear_error():
    images = [random_image(20, 33), random_image(10, 12)]
    assert [values.shape for values in SynerNetImageProcessor()(images)["pixel_values"]] == [
        (3, 20, 33),
        (3, 10, 12),
    ]
    with pytest.raises(ValueError, match="one tensor needs one size"):
        SynerNetImageProcessor()(images, return_tensors="pt")


def test_one_mask_per_image_is_demanded():
    with pytest.raises(ValueError, match="2 images and 1 segmentation maps"):
        SynerNetImageProcessor()([random_image(8, 8)] * 2, [random_mask(8, 8)], return_tensors="pt")


def test_saved_and_loaded_processor_is_the_same(tmp_path):
    processor = SynerNetImageProcessor(do_resize=True, size={"shortest_edge": 24}, image_mean=[0.5, 0.4, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = SynerNetImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = random_image(31, 50)
    assert torch.equal(
        processor(image, return_tensors="pt")["pixel_values"], loaded(image, return_tensors="pt")["pixel_values"]
    )


def test_segmentation_takes_the_best_class_at_the_target_size():
    logits = torch.zeros(2, 3, 4, 5)
    logits[0, 2, :, :2] = 1
    logits[1, 1] = 1
    outputs = SynerNetSegmenterOutput(logits=logits)
    processor = SynerNetImageProcessor()
    small = processor.post_process_semantic_segmentation(outputs)
    assert [tuple(item.shape) for item in small] == [(4, 5), (4, 5)] and small[0].dtype == torch.int64
    assert torch.equal(small[0], torch.tensor([2, 2, 0, 0, 0]).expand(4, 5))
    for target_sizes in ([(8, 10), (3, 3)], torch.tensor([[8, 10], [3, 3]])):
        resized = processor.post_process_semantic_segmentation(outputs, target_sizes=target_sizes)
        assert [tuple(item.shape) for item in resized] == [(8, 10), (3, 3)]
        assert (resized[1] == 1).all()
    scored = processor.post_process_semantic_segmentation(outputs, [(8, 10), (3, 3)], return_segmentation_scores=True)
    assert scored[0].segmentation_scores.shape == (3, 8, 10)
    assert torch.equal(scored[0].segmentation, scored[0].segmentation_scores.argmax(dim=0))
    with pytest.raises(ValueError, match="1 target sizes for a batch of 2"):
        processor.post_process_semantic_segmentation(outputs, target_sizes=[(8, 10)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_of_half_precision_are_post_processed(dtype):
    logits = torch.randn(1, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    processor = SynerNetImageProcessor()
    (found,) = processor.post_process_semantic_segmentation(SynerNetSegmenterOutput(logits=logits), [(9, 11)])
    (expected,) = processor.post_process_semantic_segmentation(
        SynerNetSegmenterOutput(logits=logits.float()), [(9, 11)]
    )
    assert torch.equal(found, expected)
    (cam_map,) = processor.post_process_class_activation_maps(logits.sigmoid(), target_sizes=[(9, 11)])
    assert cam_map.shape == (9, 11) and cam_map.dtype == torch.int64


def test_cams_at_or_below_the_threshold_are_background():
    cams = torch.tensor([[0.5, 0.51, 0.2], [0.1, 0.0, 0.9]]).reshape(1, 2, 1, 3)
    processor = SynerNetImageProcessor()
    assert processor.post_process_class_activation_maps(cams, threshold=0.5)[0].tolist() == [[0, 1, 2]]
    assert processor.post_process_class_activation_maps(cams, threshold=0.51)[0].tolist() == [[0, 0, 2]]
    assert processor.post_process_class_activation_maps(cams, target_sizes=[(2, 6)])[0].shape == (2, 6)


def test_16_bit_greyscale_keeps_its_shades(tmp_path):
    shades = np.linspace(0, 65535, 20 * 30).reshape(20, 30).astype(np.uint16)
    image = Image.fromarray(shades)
    assert image.mode == "I;16"
    image.save(tmp_path / "grey.png")
    processor = SynerNetImageProcessor(do_normalize=False)
    expected = np.repeat((shades // 256)[None] / 255, 3, axis=0)
    for given in (image, [image], str(tmp_path / "grey.png"), tmp_path / "grey.png"):
        (values,) = processor(given, return_tensors="np")["pixel_values"]
        assert np.abs(values - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("size", "max_pixels", "expected"),
    [
        ((1, 10_000_000), 2**20, (1, 2**20)),
        ((10_000_000, 1), 2**20, (2**20, 1)),
        ((3, 10_000_000), 2**20, (1, 2**20)),
        ((2, 5), 1, (1, 1)),
        ((30, 40), 1200, (30, 40)),
        ((30, 40), 300, (15, 20)),
        ((30, 10_000_000), None, (30, 10_000_000)),
    ],
)
def test_the_bound_holds_for_every_shape(size, max_pixels, expected):
    assert bounded_size(size, max_pixels) == expected


def test_no_size_exceeds_the_bound():
    generator = np.random.default_rng(0)
    for _ in range(2000):
        height, width, bound = (int(10 ** generator.uniform(0, limit)) for limit in (5, 5, 8))
        found = bounded_size((height, width), bound)
        assert min(found) >= 1 and found[0] * found[1] <= max(bound, 1)
        assert all(type(side) is int for side in found)


def test_resizing_keeps_the_bound():
    image, mask = random_image(37, 20_000), random_mask(37, 20_000)
    processor = SynerNetImageProcessor(do_resize=True)
    inputs = processor(image, segmentation_maps=mask, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 44, 23807)
    assert inputs["mask"].shape == (1, 44, 23807) and set(inputs["mask"].unique().tolist()) <= {0, 1, 2, 255}
    # a small bound, which the image itself keeps
    small = random_image(20, 30)
    bounded = SynerNetImageProcessor(do_resize=True, max_pixels=600)
    assert bounded(small, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 30)
    size = {"height": 60, "width": 40}
    assert bounded(small, size=size, return_tensors="pt")["pixel_values"].shape == (1, 3, 30, 20)
    assert bounded(small, size=size, max_pixels=None, return_tensors="pt")["pixel_values"].shape == (1, 3, 60, 40)
    assert bounded(small, size=size, do_resize=False, return_tensors="pt")["pixel_values"].shape == (1, 3, 20, 30)


@pytest.mark.parametrize(
    "size",
    [
        {"shortest_edge": 24},
        {"shortest_edge": 24, "longest_edge": 30},
        {"max_height": 50, "max_width": 25},
        {"height": 33, "width": 21},
    ],
    ids=str,
)
def test_the_bound_leaves_smaller_sizes_alone(size):
    image = random_image(20, 37)
    values = [
        SynerNetImageProcessor(do_resize=True, size=size, max_pixels=bound)(image, return_tensors="np")["pixel_values"]
        for bound in (None, 24 * 45)
    ]
    assert np.array_equal(*values)
    _, _, height, width = values[0].shape
    halved = SynerNetImageProcessor(do_resize=True, size=size, max_pixels=height * width // 2)
    found = halved(np.asarray(image)[:10, :15], return_tensors="np")["pixel_values"]
    assert found.shape[2] * found.shape[3] <= height * width // 2


# depth of pixels: 4096 shades from black to white, of which 8 bits keep 256

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
DEEP = {
    "float32": RAMP.astype(np.float32),
    "float64": RAMP,
    "float16": RAMP.astype(np.float16),
    "float, 0 to 255": (RAMP * 255).astype(np.float32),
    "float, 16 bits": (RAMP * 65535).astype(np.float32),
    "int32, 8 bits": (RAMP * 255).astype(np.int32),
    "int32, 16 bits": (RAMP * 65535).astype(np.int32),
    "int64, 16 bits": (RAMP * 65535).astype(np.int64),
    "uint16": (RAMP * 65535).astype(np.uint16),
    "uint16, other byte order": (RAMP * 65535).astype(">u2"),
}


def assert_ramp(values):
    values = np.asarray(values)
    assert values.shape == (64, 64, 3) and values.dtype == np.uint8
    assert len(np.unique(values)) == 256
    assert np.abs(values[..., 0] / 255 - RAMP).max() < 1.01 / 255


@pytest.mark.parametrize("kind", DEEP)
def test_deep_arrays_and_tensors_keep_256_shades(kind):
    pixels = DEEP[kind]
    assert_ramp(open_image(pixels))
    processor = SynerNetImageProcessor(do_normalize=False)
    expected = np.moveaxis(np.asarray(open_image(pixels)), -1, 0) / 255
    kinds = [pixels, [pixels], pixels[None], np.repeat(pixels[..., None], 3, axis=2), np.stack([pixels] * 3)[None]]
    if "byte order" not in kind:
        kinds.append(torch.from_numpy(pixels.copy()))
    for given in kinds:
        (found,) = processor(given, return_tensors="np")["pixel_values"]
        assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("uint16", "png")]
    + [(kind, "tif") for kind in ("float32", "int32, 8 bits", "int32, 16 bits", "uint16", "float, 0 to 255")],
)
def test_deep_files_keep_256_shades(kind, suffix, served):
    folder, address = served
    image = Image.fromarray(DEEP[kind])
    path = folder / f"deep.{suffix}"
    image.save(path)
    for source in (
        image,
        path,
        str(path),
        path.read_bytes(),
        {"bytes": None, "path": str(path)},
        f"{address}/{path.name}",
    ):
        assert_ramp(open_image(source))


def test_all_levels_of_an_8_bit_image_survive_every_kind():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    kinds = [
        levels,
        levels / 255,
        (levels / 255).astype(np.float32),
        levels.astype(np.float64),
        levels.astype(np.int64),
    ]
    kinds += [levels.astype(np.uint16) * 256, levels.astype(np.uint16) * 257, levels.astype(np.int32) * 257]
    for pixels in kinds:
        assert np.array_equal(np.asarray(open_image(pixels))[..., 0], levels), pixels.dtype
    assert np.array_equal(np.asarray(open_image(levels > 127))[..., 0], np.where(levels > 127, 255, 0))


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (
            RAMP - 0.5,
            r"Pixel values range from -0.5 to 0.5; known ranges are 0 to 1 \(floats\), 0 to 255 and 0 to 65535",
        ),
        (RAMP * 1e6, r"Pixel values range from 0 to 1e\+06; known ranges"),
        ((RAMP * 1e6).astype(np.int32) - 7, r"Pixel values range from -7 to 999993; known ranges"),
        (np.where(RAMP > 0.5, np.nan, RAMP), "Pixel values range from nan to nan; known ranges"),
        (np.array([["black", "white"]]), "numbers are expected"),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(pixels, sentence, tmp_path):
    for read in (open_image, SynerNetImageProcessor()):
        with pytest.raises(ValueError, match=sentence):
            read(pixels)
    if pixels.dtype.kind in "fi":
        Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "odd.tif")
        with pytest.raises(ValueError, match=rf"odd.tif' cannot be used. {sentence.split(' from')[0]}"):
            open_image(tmp_path / "odd.tif")


def test_arrays_are_left_alone_without_rescaling():
    pixels = np.asarray(random_image(20, 30))
    expected = SynerNetImageProcessor()(pixels, return_tensors="pt")["pixel_values"]
    unit = (pixels / 255).astype(np.float32)
    for given in (unit, unit.transpose(2, 0, 1), torch.from_numpy(unit)):
        found = SynerNetImageProcessor()(given, do_rescale=False, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(SynerNetImageProcessor()(given, return_tensors="pt")["pixel_values"], expected)
    # values of no known range are the caller's business then
    SynerNetImageProcessor()(unit - 3, do_rescale=False, do_normalize=False, return_tensors="pt")


def test_dark_values_of_12_bits_are_named_once(monkeypatch):
    said = []
    monkeypatch.setattr("synernet_hf.model.image_processing_synernet.logger.warning_once", said.append)
    open_image((RAMP * 4095).astype(np.int32))
    assert len(said) == 1 and "read as 16 bits" in said[0]
    open_image((RAMP * 65535).astype(np.int32))
    assert len(said) == 1


def test_paths_with_backslashes_are_found(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    random_image(5, 6).save(tmp_path / "folder" / "image.png")
    monkeypatch.chdir(tmp_path)
    assert open_image("folder\\image.png").size == open_image(PureWindowsPath("folder/image.png")).size == (6, 5)
    with pytest.raises(ValueError, match="none.png' cannot be read"):
        open_image("folder\\none.png")


def test_images_come_as_base64_text():
    stream = io.BytesIO()
    random_image(5, 6).save(stream, "PNG")
    text = base64.b64encode(stream.getvalue()).decode()
    for source in (text, f"data:image/png;base64,{text}"):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(random_image(5, 6)))


def test_the_alpha_channel_of_arrays_is_dropped_as_that_of_files():
    rgba = np.dstack([np.asarray(random_image(20, 30)), np.full((20, 30), 7, np.uint8)])
    expected = SynerNetImageProcessor()(random_image(20, 30), return_tensors="pt")["pixel_values"]
    for given in (rgba, rgba.transpose(2, 0, 1), Image.fromarray(rgba)):
        assert torch.equal(SynerNetImageProcessor()(given, return_tensors="pt")["pixel_values"], expected)


def test_floats_a_little_beyond_0_and_1_are_clipped():
    levels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16, 1).repeat(3, axis=2)
    beyond = levels * 1.012 - 0.004
    image = np.asarray(open_image(beyond))
    assert image.min() == 0 and image.max() == 255
    assert np.array_equal(image, np.asarray(open_image(beyond.clip(0, 1))))


@pytest.mark.parametrize("kind", ["path", "bytes", "record"])
def test_more_pixels_than_pillow_decodes_are_refused_with_their_number(tmp_path, monkeypatch, kind):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    source = {"path": tmp_path / "a.png", "bytes": content, "record": {"bytes": content, "path": None}}[kind]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"^The image .* cannot be read \(Image size \(2400 pixels\) exceeds limit"):
        open_image(source)
