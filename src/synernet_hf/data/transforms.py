"""Training batches: geometry in the loader's workers (PIL), photometry on the training device (kornia)."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import kornia.augmentation
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import Dataset, Sampler

from synernet_hf.data.schema import multi_hot
from synernet_hf.model import to_rgb


# Orientations of the EXIF standard that swap the axes.
TRANSPOSED_ORIENTATIONS = (5, 6, 7, 8)
ORIENTATION_TAG = 0x0112


def open_stored(image: dict | str | Path | Image.Image) -> Image.Image:
    """Opens an undecoded `datasets.Image`, a path or an image as it is stored, without decoding a pixel."""
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]
    if not isinstance(image, str | Path | io.BytesIO):
        raise TypeError(f"An image, a path or a dictionary of bytes and path is expected, not {type(image).__name__}.")
    return Image.open(image)


class TrainTransform:
    """
    Random rescale, mirror and crop of one image, as in the authors' family of code (AFA, ToCo, SynerNet).

    The rescaled image of h×w pixels is put at a random place of a black canvas of max(h, S) × max(w, S) pixels, and a
    random window of S×S pixels of the canvas is the crop. Only the pixels inside the window are resampled. A JPEG that
    is shrunk to half or less is decoded at half, a quarter or an eighth of its size, never below the size needed.

    Args:
        crop_size (`int`): Side S of the crop in pixels.
        scale_range (`tuple[float, float]`, *optional*, defaults to `(0.5, 2.0)`): Range of the uniformly drawn rescale
            factor. The default belongs to crops of 448 pixels; half of it suits VOC images and crops of 224.
        flip (`bool`, *optional*, defaults to `True`): Mirrors left and right with probability 0.5.
        seed (`int`, *optional*, defaults to 0): The random numbers of a sample depend on `(seed, position)` alone.

    Raises:
        ValueError: The crop size or the range is not positive, or the range is reversed.
    """

    def __init__(
        self, crop_size: int, scale_range: tuple[float, float] = (0.5, 2.0), flip: bool = True, seed: int = 0
    ) -> None:
        if crop_size < 1:
            raise ValueError(f"crop_size is {crop_size}, but a crop needs at least one pixel.")
        low, high = scale_range
        if not 0 < low <= high:
            raise ValueError(f"scale_range is ({low}, {high}), but 0 < smallest <= largest is expected.")
        self.crop_size = crop_size
        self.scale_range = (low, high)
        self.flip = flip
        self.seed = seed

    def __call__(self, record: dict, position: int) -> dict[str, Any]:
        """
        Makes the training sample at `position` of the stream.

        `record` holds `image` (undecoded, a path or an image), `image_id` and `labels`. Returns `image` (`(3, S, S)`
        uint8, 0 outside the box), `valid_box` (`(4,)` int64: top, bottom, left, right of the rectangle
        `[top, bottom) × [left, right)` of real pixels), `labels` (list of class ids), `image_id` and `draw` (a random
        `int` from 0 for what is drawn later). Raises `ValueError` that names an image which does not decode, `OSError` for
        one that the disk does not give.
        """
        rng = np.random.default_rng((self.seed, position))
        try:
            crop, valid_box = self._crop(open_stored(record["image"]), rng)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # of the system, not of the image
                fault = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
                raise OSError(f"The image {record['image_id']} cannot be read ({fault})") from error
            raise ValueError(f"The image {record['image_id']} does not decode: {error}") from error
        return {
            "image": torch.from_numpy(crop),
            "valid_box": torch.tensor(valid_box, dtype=torch.int64),
            "labels": record["labels"],
            "image_id": record["image_id"],
            "draw": int(rng.integers(2**63)),
        }

    def _crop(self, image: Image.Image, rng: np.random.Generator) -> tuple[np.ndarray, tuple[int, int, int, int]]:
        size = self.crop_size
        factor, mirror = rng.uniform(*self.scale_range), self.flip and rng.random() < 0.5
        width, height = (max(1, round(side * factor)) for side in image.size)
        # a JPEG is decoded smaller, never below width x height
        image.draft("RGB", (width, height))
        image.load()
        # asked after loading: a TIFF has been turned by loading, and a PNG may have its EXIF after the pixels
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        if orientation in TRANSPOSED_ORIENTATIONS:
            width, height = height, width
        image = to_rgb(image)

        top, bottom, row_start = _place(height, size, rng)
        left, right, column_start = _place(width, size, rng)
        x_ratio, y_ratio = image.width / width, image.height / height
        if mirror:
            # columns [column_start, column_start + right - left) of the mirrored image
            column_start = width - column_start - (right - left)
        box = (
            column_start * x_ratio,
            row_start * y_ratio,
            min((column_start + right - left) * x_ratio, image.width),
            min((row_start + bottom - top) * y_ratio, image.height),
        )
        window = image.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
        if mirror:
            window = window.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop = np.zeros((3, size, size), dtype=np.uint8)
        # channel by channel is far faster than moving the channels of an array
        for plane, band in zip(crop, window.split(), strict=True):
            plane[top:bottom, left:right] = np.asarray(band)
        return crop, (top, bottom, left, right)


def _place(length: int, size: int, rng: np.random.Generator) -> tuple[int, int, int]:
    """Along one axis: first and last + 1 pixel of the image in the window, first pixel of the image shown."""
    canvas = max(length, size)
    offset = int(rng.integers(canvas - length + 1))
    start = int(rng.integers(canvas - size + 1))
    first, last = max(offset - start, 0), min(offset + length - start, size)
    return first, last, max(start - offset, 0)


class TrainDataset(Dataset):
    """
    The training stream: `dataset[(index, position)]` is the sample at `position`, made of the record at `index`.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): A training split. A `mask` column is dropped unread.
            Of a stream, keys hold the record instead of its index.
        transform ([`TrainTransform`]): Called as `transform(record, position)`.
    """

    def __init__(self, dataset: datasets.Dataset, transform: TrainTransform) -> None:
        dataset = dataset.with_format(None).select_columns(["image", "image_id", "labels"])
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int | dict, int]) -> dict[str, Any]:
        index, position = key
        return self.transform(index if isinstance(index, dict) else self.dataset[int(index)], int(position))


class StreamBatchSampler(Sampler[list[tuple[int, int]]]):
    """
    Batches of (index, position) keys for [`TrainDataset`], the same whether or not the run was interrupted.

    Each epoch is a permutation of the records that depends on `(seed, epoch)`. Batches are full and may straddle two
    epochs.

    Args:
        num_records (`int`): Number of records.
        batch_size (`int`): Number of samples in a batch.
        num_batches (`int`): Number of batches of a run that is not interrupted.
        seed (`int`, *optional*, defaults to 0): Seed of the permutations.
        start_batch (`int`, *optional*, defaults to 0): Number of batches that an earlier run has seen.

    Raises:
        ValueError: There are no records, or the numbers are out of range.
    """

    drop_last = False

    def __init__(
        self, num_records: int, batch_size: int, num_batches: int, seed: int = 0, start_batch: int = 0
    ) -> None:
        if num_records < 1 or batch_size < 1:
            raise ValueError(f"A stream of {num_records} records in batches of {batch_size} has nothing to give.")
        if not 0 <= start_batch <= num_batches:
            raise ValueError(f"start_batch is {start_batch}, but 0 to num_batches = {num_batches} is expected.")
        self.num_records = num_records
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.start_batch = start_batch

    def __len__(self) -> int:
        return self.num_batches - self.start_batch

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, permutation = -1, None
        for batch in range(self.start_batch, self.num_batches):
            keys = []
            for position in range(batch * self.batch_size, (batch + 1) * self.batch_size):
                if position // self.num_records != epoch:
                    epoch = position // self.num_records
                    permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_records)
                keys.append((int(permutation[position % self.num_records]), position))
            yield keys


class SynerNetDataCollator:
    """
    Stacks B samples of [`TrainTransform`] of one crop size into a batch.

    The batch is a `dict`: `images` (`(B, 3, S, S)` uint8), `labels` (`(B, C)` float32 multi-hot), `valid_boxes`
    (`(B, 4)` int64: top, bottom, left, right), `max_labels` (`int`: classes of the image that has most) and `draws`
    (`list[int]`: a random number of each image).

    Args:
        num_classes (`int`): Number C of foreground classes.
    """

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def __call__(self, samples: Sequence[dict]) -> dict[str, Any]:
        labels = torch.stack([multi_hot(sample["labels"], self.num_classes) for sample in samples])
        return {
            "images": torch.stack([sample["image"] for sample in samples]),
            "labels": labels,
            "valid_boxes": torch.stack([sample["valid_box"] for sample in samples]),
            # known here, so that the model need not ask the device
            "max_labels": int(labels.sum(dim=1).max()),
            # numbers, since colours are drawn on the CPU
            "draws": [sample["draw"] for sample in samples],
        }


class PhotometricAugmentation(nn.Module):
    """
    Colour jitter, greyscale and blur of a batch on its device, then the normalisation that the encoder expects.

    The default probabilities are the authors'.

    Args:
        image_mean (`Sequence[float]`): Mean of each channel, for pixels in [0, 1].
        image_std (`Sequence[float]`): Standard deviation of each channel, for pixels in [0, 1].
        color_jitter (`float`, *optional*, defaults to 0.8): Probability of changing brightness, contrast (±0.4 each),
            saturation (±0.2) and hue (±0.1).
        grayscale (`float`, *optional*, defaults to 0.2): Probability of removing the colours.
        blur (`float`, *optional*, defaults to 1.0): Probability of a Gaussian blur with a standard deviation of 0.1 to
            2 pixels.

    Raises:
        ValueError: A probability is outside [0, 1].
    """

    def __init__(
        self,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        color_jitter: float = 0.8,
        grayscale: float = 0.2,
        blur: float = 1.0,
    ) -> None:
        super().__init__()
        for name, probability in (("color_jitter", color_jitter), ("grayscale", grayscale), ("blur", blur)):
            if not 0 <= probability <= 1:
                raise ValueError(f"{name} is {probability}, but a probability from 0 to 1 is expected.")
        steps = []
        if color_jitter > 0:
            steps.append(kornia.augmentation.ColorJitter(0.4, 0.4, 0.2, 0.1, p=color_jitter))
        if grayscale > 0:
            steps.append(kornia.augmentation.RandomGrayscale(p=grayscale))
        if blur > 0:
            # 13 taps reach three standard deviations of the widest blur
            steps.append(kornia.augmentation.RandomGaussianBlur((13, 13), (0.1, 2.0), p=blur))
        self.steps = nn.ModuleList(steps)
        self.register_buffer("mean", torch.tensor(image_mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(image_std, dtype=torch.float32).view(1, -1, 1, 1))

    @torch.no_grad()
    def forward(self, images: torch.Tensor, draws: Sequence[int] | None = None, step: int = 0) -> torch.Tensor:
        """
        Augments `images` (`(B, 3, H, W)` uint8, H and W at least 7) and normalises them: `(pixel / 255 - mean) / std`,
        `(B, 3, H, W)` float32. `draws`, a random number per image, decide on its changes, `step` on the order in which
        all images have theirs; without them torch's global generator does. Raises `TypeError` for another dtype.
        """
        if images.dtype != torch.uint8:
            raise TypeError(f"Images of dtype {images.dtype} were given, but uint8 in 0..255 is expected.")
        pixels = images.float() / 255
        drawn = [None] * len(self.steps) if draws is None else self._drawn(pixels.shape, draws, step)
        for change, parameters in zip(self.steps, drawn, strict=True):
            pixels = change(pixels, params=parameters)
        return (pixels.clamp(0, 1) - self.mean) / self.std

    def _drawn(self, shape: torch.Size, draws: Sequence[int], step: int) -> list[dict[str, torch.Tensor]]:
        """The parameters of each change, as kornia draws them for a batch, but each image's with its own number."""
        drawn = []
        with torch.random.fork_rng(devices=[]):
            for number in (step, *draws):
                # the generator of the CPU alone, which kornia draws from
                torch.default_generator.manual_seed(number)
                drawn.append([change.forward_parameters(torch.Size((1, *shape[1:]))) for change in self.steps])
        merged = []
        for of_step, *of_images in zip(*drawn, strict=True):
            parameters = {name: torch.cat([own[name] for own in of_images]) for name in of_step}
            parameters["forward_input_shape"] = torch.tensor(shape)
            if "order" in parameters:
                # kornia changes the colours of a batch in one order
                parameters["order"] = of_step["order"]
            merged.append(parameters)
        return merged


__all__ = [
    "PhotometricAugmentation",
    "StreamBatchSampler",
    "SynerNetDataCollator",
    "TrainDataset",
    "TrainTransform",
]
