import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from synernet_hf.data import (
    PhotometricAugmentation,
    StreamBatchSampler,
    SynerNetDataCollator,
    TrainDataset,
    TrainTransform,
    build_split,
    load_shapes,
    multi_hot,
)


MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def record(image, labels=(0,)):
    return {"image": image, "image_id": "one", "labels": list(labels)}


def smooth_image(width=60, height=44):
    rows, columns = np.mgrid[0:height, 0:width]
    channels = (40 + 3 * columns, 50 + 4 * rows, 128 + 60 * np.sin(columns / 9) * np.cos(rows / 7))
    return Image.fromarray(np.stack(channels, axis=-1).clip(1, 255).astype(np.uint8))


def encoded(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return {"bytes": stream.getvalue(), "path": None}


@pytest.mark.parametrize("scale_range", [(0.5, 2.0), (0.3, 0.6), (1.0, 1.0), (2.5, 3.0)])
def test_padding_is_black_and_the_box_holds_real_pixels(scale_range):
    transform = TrainTransform(48, scale_range)
    white = Image.new("RGB", (60, 44), (255, 255, 255))
    for position in range(60):
        sample = transform(record(white), position)
        top, bottom, left, right = sample["valid_box"].tolist()
        assert 0 <= top < bottom <= 48 and 0 <= left < right <= 48
        inside = torch.zeros(48, 48, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert (sample["image"][:, inside] == 255).all() and (sample["image"][:, ~inside] == 0).all()


def test_sample_has_the_promised_types_and_shapes():
    sample = TrainTransform(32)(record(smooth_image(), (1, 2)), 5)
    assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.uint8
    assert sample["valid_box"].shape == (4,) and sample["valid_box"].dtype == torch.int64
    assert sample["labels"] == [1, 2]
    assert sample["image_id"] == "one"
    assert 0 <= sample["draw"] < 2**63


def test_same_position_gives_the_same_crop_and_others_differ():
    image = smooth_image()
    one, same = TrainTransform(40, seed=3), TrainTransform(40, seed=3)
    crops = [one(record(image), position)["image"] for position in range(8)]
    for position in reversed(range(8)):
        assert (same(record(image), position)["image"] == crops[position]).all()
    assert sum((crops[0] == crop).all().item() for crop in crops) == 1
    assert not (TrainTransform(40, seed=4)(record(image), 0)["image"] == crops[0]).all()


def test_crop_is_a_window_of_the_whole_rescaled_image():
    image = smooth_image()
    transform = TrainTransform(50, (1.5, 1.5), flip=False)
    whole = np.asarray(image.resize((90, 66), Image.Resampling.BILINEAR)).astype(int)
    for position in range(10):
        crop = transform(record(image), position)["image"].permute(1, 2, 0).numpy().astype(int)
        differences = [
            np.abs(whole[y : y + 50, x : x + 50] - crop).max() for y in range(66 - 50 + 1) for x in range(90 - 50 + 1)
        ]
        assert min(differences) <= 2, "rounding of two passes at most"


def test_mirror_reverses_columns_half_of_the_time():
    image = smooth_image(48, 48)
    pixels = np.asarray(image).astype(int)
    transform = TrainTransform(48, (1.0, 1.0))
    mirrored = 0
    for position in range(200):
        crop = transform(record(image), position)["image"].permute(1, 2, 0).numpy().astype(int)
        same, flipped = np.abs(crop - pixels).max(), np.abs(crop - pixels[:, ::-1]).max()
        assert min(same, flipped) == 0
        mirrored += flipped == 0
    assert 70 <= mirrored <= 130


def test_mirrored_windows_show_every_part_of_a_wide_image():
    columns = np.broadcast_to(np.arange(1, 201, dtype=np.uint8), (20, 200))
    image = Image.fromarray(np.stack([columns] * 3, axis=-1))
    seen, directions = set(), set()
    for position in range(300):
        row = TrainTransform(20, (1.0, 1.0))(record(image), position)["image"][0, 0].int()
        steps = set((row[1:] - row[:-1]).tolist())
        assert steps in ({1}, {-1})
        directions |= steps
        seen |= set(row.tolist())
    assert directions == {1, -1} and min(seen) <= 5 and max(seen) >= 196


def test_small_images_land_anywhere_in_the_crop():
    tops = {
        TrainTransform(32, (0.5, 0.5))(record(smooth_image(16, 16)), position)["valid_box"][0].item()
        for position in range(200)
    }
    assert min(tops) == 0 and max(tops) == 24


def test_jpeg_decoded_small_looks_like_the_whole_one():
    image = smooth_image(60, 44).resize((480, 352), Image.Resampling.BICUBIC)
    transform = TrainTransform(64, (0.2, 0.4))
    for position in range(10):
        small = transform(record(encoded(image, format="JPEG", quality=95)), position)
        whole = transform(record(encoded(image, format="PNG")), position)
        assert (small["valid_box"] == whole["valid_box"]).all()
        assert (small["image"].int() - whole["image"].int()).abs().float().mean() < 4


def test_no_image_is_decoded_below_the_size_needed(monkeypatch):
    decoded = []
    resize = Image.Image.resize

    def watched(image, size, *arguments, **options):
        decoded.append((image.size, size))
        return resize(image, size, *arguments, **options)

    image = encoded(smooth_image(10, 10), format="JPEG")
    monkeypatch.setattr(Image.Image, "resize", watched)
    # 5.6 pixels are rounded to 6: half of the image would be 5
    TrainTransform(6, (0.56, 0.56))(record(image), 0)
    TrainTransform(5, (0.5, 0.5))(record(image), 0)
    assert decoded == [((10, 10), (6, 6)), ((5, 5), (5, 5))]


def test_paths_bytes_and_images_give_the_same_crop(tmp_path):
    image = smooth_image()
    image.save(tmp_path / "one.png")
    forms = [image, encoded(image, format="PNG"), str(tmp_path / "one.png"), tmp_path / "one.png"]
    crops = [TrainTransform(32)(record(form), 7)["image"] for form in forms]
    assert all((crop == crops[0]).all() for crop in crops)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    form = encoded(smooth_image().convert(mode), format="TIFF")
    assert TrainTransform(32)(record(form), 0)["image"].shape == (3, 32, 32)


def test_exif_rotation_is_undone():
    upright = smooth_image(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(
        upright.transpose(Image.Transpose.ROTATE_90), format="JPEG", quality=100, subsampling=0, exif=exif
    )
    transform = TrainTransform(32, (0.4, 0.9))
    for position in range(6):
        turned, plain = transform(record(stored), position), transform(record(upright), position)
        assert (turned["valid_box"] == plain["valid_box"]).all()
        assert (turned["image"].int() - plain["image"].int()).abs().float().mean() < 4


def test_broken_image_is_named():
    whole = encoded(smooth_image(), format="JPEG")["bytes"]
    for broken in (b"no image", whole[: len(whole) // 2]):
        with pytest.raises(ValueError, match="The image one does not decode"):
            TrainTransform(32)(record({"bytes": broken, "path": None}), 0)


def test_bad_settings_get_a_sentence():
    with pytest.raises(ValueError, match="crop_size is 0"):
        TrainTransform(0)
    with pytest.raises(ValueError, match="0 < smallest <= largest"):
        TrainTransform(32, (2.0, 0.5))
    with pytest.raises(ValueError, match="blur is 1.5"):
        PhotometricAugmentation(MEAN, STD, blur=1.5)
    with pytest.raises(ValueError, match="nothing to give"):
        StreamBatchSampler(0, 4, 2)
    with pytest.raises(ValueError, match="start_batch is 3"):
        StreamBatchSampler(10, 4, 2, start_batch=3)


def test_stream_covers_every_record_once_in_each_epoch():
    keys = [key for batch in StreamBatchSampler(10, 4, 10, seed=1) for key in batch]
    assert [position for _, position in keys] == list(range(40))
    epochs = [[index for index, _ in keys[start : start + 10]] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_stream_goes_on_where_it_stopped():
    whole = list(StreamBatchSampler(7, 3, 12, seed=2))
    rest = StreamBatchSampler(7, 3, 12, seed=2, start_batch=5)
    assert list(rest) == whole[5:] and len(rest) == 7
    assert list(StreamBatchSampler(7, 3, 12, seed=3)) != whole


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_the_same_batches_for_any_number_of_workers(num_workers):
    split = load_shapes(12, 1, image_size=32)["train"]
    dataset = TrainDataset(split, TrainTransform(24, seed=1))
    loader = DataLoader(
        dataset,
        batch_sampler=StreamBatchSampler(12, 5, 4, seed=1),
        collate_fn=SynerNetDataCollator(5),
        num_workers=num_workers,
    )
    batches = list(loader)
    assert len(batches) == 4 and set(batches[0]) == {"images", "labels", "valid_boxes", "max_labels", "draws"}
    for batch, keys in zip(batches, StreamBatchSampler(12, 5, 4, seed=1), strict=True):
        assert batch["images"].shape == (5, 3, 24, 24) and batch["images"].dtype == torch.uint8
        assert batch["labels"].shape == (5, 5) and batch["labels"].dtype == torch.float32
        assert batch["valid_boxes"].shape == (5, 4) and batch["valid_boxes"].dtype == torch.int64
        assert batch["max_labels"] == max(len(split[key[0]]["labels"]) for key in keys)
        for row, key in enumerate(keys):
            assert (batch["images"][row] == dataset[key]["image"]).all()
            assert batch["draws"][row] == dataset[key]["draw"]
            assert batch["labels"][row].nonzero()[:, 0].tolist() == split[key[0]]["labels"]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
@pytest.mark.parametrize("ids", [[], [1], [0, 2], [2, 0, 1]])
def test_labels_of_any_kind_become_vectors(kind, ids):
    labels = kind([torch.tensor(label) for label in ids] if kind is list else ids)
    assert multi_hot(labels, 3).tolist() == [float(label in ids) for label in range(3)]


def test_train_dataset_never_reads_a_mask():
    image = encoded(smooth_image(), format="PNG")
    broken = {"bytes": b"no mask", "path": None}
    split = build_split([image], ["one"], [[0]], ["background", "cat"], masks=[broken])
    dataset = TrainDataset(split, TrainTransform(32))
    assert "mask" not in dataset.dataset.column_names
    assert dataset[0, 0]["image"].shape == (3, 32, 32)


def test_without_augmentation_only_normalisation_is_left():
    images = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8)
    module = PhotometricAugmentation(MEAN, STD, color_jitter=0, grayscale=0, blur=0)
    expected = (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(module(images), expected)
    with pytest.raises(TypeError, match="float32 were given, but uint8"):
        module(images.float())


def test_each_photometric_step_does_its_own_thing():
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8)
    plain = {"image_mean": (0, 0, 0), "image_std": (1, 1, 1), "color_jitter": 0, "grayscale": 0, "blur": 0}
    torch.manual_seed(0)
    gray = PhotometricAugmentation(**plain | {"grayscale": 1.0})(images)
    assert (gray[:, 0] == gray[:, 1]).all() and (gray[:, 1] == gray[:, 2]).all()
    blurred = PhotometricAugmentation(**plain | {"blur": 1.0})(images)
    assert (blurred.std(dim=(1, 2, 3)) < (images / 255).std(dim=(1, 2, 3))).all()
    jittered = PhotometricAugmentation(**plain | {"color_jitter": 1.0})(images)
    changes = (jittered - images / 255).abs().mean(dim=(1, 2, 3))
    assert (changes > 0.005).all() and changes.unique().numel() == 4, "every image gets its own change"


def test_photometry_follows_the_global_generator_and_keeps_the_range():
    images = torch.randint(0, 256, (4, 3, 24, 24), dtype=torch.uint8)
    module = PhotometricAugmentation((0, 0, 0), (1, 1, 1))
    torch.manual_seed(5)
    one = module(images)
    torch.manual_seed(5)
    assert (module(images) == one).all()
    assert not (module(images) == one).all()
    assert one.shape == images.shape and one.dtype == torch.float32 and one.min() >= 0 and one.max() <= 1


def test_with_numbers_photometry_is_that_of_each_image_alone():
    images = torch.randint(0, 256, (6, 3, 24, 24), dtype=torch.uint8)
    module, draws = PhotometricAugmentation((0, 0, 0), (1, 1, 1)), [2**63 - 1, 0, 1, 2, 3, 4]
    before = torch.get_rng_state()
    whole = module(images, draws, step=3)
    assert torch.equal(torch.get_rng_state(), before)
    parts = [module(images[rows], draws[rows], step=3) for rows in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert not torch.equal(module(images, draws, step=4), whole), "the order of changes is that of the step"
    # independent of each other: one number for all changes would have colour jitter wherever there is grey
    drawn = module._drawn(images.shape, range(500), 0)
    jittered, gray = (parameters["batch_prob"] for parameters in drawn[:2])
    assert 0.7 < jittered[gray > 0].mean() < 0.9


# what brings the upright image into the form in which an orientation stores it
STORED_AS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", list(STORED_AS))
@pytest.mark.parametrize("scale", [0.25, 1.5])
def test_crops_are_those_of_the_upright_image(orientation, file_format, scale):
    upright = smooth_image(96, 64)
    exif = Image.Exif()
    exif[0x0112] = orientation
    operation = STORED_AS[orientation]
    stored = upright if operation is None else upright.transpose(operation)
    options = {"quality": 100, "subsampling": 0} if file_format == "JPEG" else {}
    cell = encoded(stored, format=file_format, exif=exif, **options)
    transform = TrainTransform(48, (scale, scale), seed=3)
    for position in range(4):
        expected = transform(record(upright), position)
        got = transform(record(cell), position)
        assert got["valid_box"].tolist() == expected["valid_box"].tolist()
        difference = (got["image"].int() - expected["image"].int()).abs()
        # a JPEG that is decoded smaller is smoothed in another way
        assert difference.max() <= (12 if file_format == "JPEG" else 1)
