"""Generated multi-label images with known masks, without download."""

import colorsys
import io

import datasets
import numpy as np
from PIL import Image, ImageDraw

from synernet_hf.data.schema import build_split


SHAPES_CLASSES = ["background", "stripes", "checks", "dots", "rings", "zigzag"]

CLUTTER_WITH_CLASS, CLUTTER_WITHOUT_CLASS = 0.65, 0.1
DISTRACTOR_PROBABILITY = 0.4
TOUCH_PROBABILITY = 0.6
MIN_VISIBLE_SHARE = 0.6


def load_shapes(
    num_train: int = 2000,
    num_validation: int = 200,
    image_size: int = 64,
    seed: int = 0,
    with_train_masks: bool = False,
) -> datasets.DatasetDict:
    """
    Generates the embedded data set (our choice).

    An image shows one to three objects on a cluttered background. Each has a small head with the texture and the strong
    colour of its class, which a classifier finds, and a larger plain body in a pale colour. Objects touch or cover one
    another, bodies without a head are background, and each class has clutter of its own, in 65 % of its images and in
    10 % of the others. A plain class activation map is therefore partial (heads only) and leaky (clutter).

    Image i of a split depends on `seed`, the split, `image_size` and i alone: a larger data set starts with the images
    of a smaller one.

    Args:
        num_train (`int`, *optional*, defaults to 2000): Number of training images.
        num_validation (`int`, *optional*, defaults to 200): Number of validation images.
        image_size (`int`, *optional*, defaults to 64): Height and width of an image in pixels.
        seed (`int`, *optional*, defaults to 0): Seed of all random choices.
        with_train_masks (`bool`, *optional*, defaults to `False`): Adds the `mask` column to the training split, for
            analysis.

    Returns:
        `datasets.DatasetDict`: `train` (`image`, `image_id`, `labels`) and `validation` (the same and `mask`),
        images and masks embedded as PNG.

    Raises:
        ValueError: A split would be empty, or the images are too small for the textures.
    """
    if num_train < 1 or num_validation < 1:
        raise ValueError(f"{num_train} training and {num_validation} validation images: give at least one of each.")
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}, but the textures need at least 32 pixels.")
    grid = np.mgrid[0:image_size, 0:image_size].astype(np.float32)
    splits = datasets.DatasetDict()
    for split_index, (split, number) in enumerate((("train", num_train), ("validation", num_validation))):
        images, labels, masks = [], [], []
        for index in range(number):
            image, mask = _draw_image(grid, np.random.default_rng((seed, split_index, image_size, index)))
            images.append(_encode_png(image))
            labels.append([class_id - 1 for class_id in np.unique(mask).tolist() if class_id > 0])
            masks.append(_encode_png(mask))
        ids = [f"{split}_{index:06d}" for index in range(number)]
        keep_masks = split == "validation" or with_train_masks
        splits[split] = build_split(images, ids, labels, SHAPES_CLASSES, masks if keep_masks else None)
    return splits


def _draw_image(grid: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    size = grid.shape[-1]
    number = rng.choice([1, 2, 3], p=[0.3, 0.45, 0.25])
    classes = 1 + rng.choice(len(SHAPES_CLASSES) - 1, size=number, replace=rng.random() < 0.2)
    image = _draw_background(size, classes, rng)
    if rng.random() < DISTRACTOR_PROBABILITY:
        pose = _random_pose(size, rng)
        body, _ = _object_coverage(grid, pose)
        _paint(image, body, _color(rng.random(), rng.uniform(0.15, 0.45), rng.uniform(0.5, 0.9)))

    mask = np.zeros((size, size), dtype=np.uint8)
    # visible pixels and full area of what must stay in sight: the head and the whole of each object
    in_sight: list[tuple[np.ndarray, float]] = []
    anchor = None
    for class_id in classes:
        placed = _place_object(grid, in_sight, anchor, rng)
        if placed is None:
            continue
        anchor, body, head = placed
        _draw_object(image, grid, anchor, (body, head), int(class_id), rng)
        inside = np.maximum(body, head) > 0.5
        mask[inside] = class_id
        in_sight = [(visible & ~inside, area) for visible, area in in_sight]
        in_sight += [(inside, inside.sum()), (head > 0.5, (head > 0.5).sum())]
    image += rng.normal(0, 0.02, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), mask


def _random_pose(size: int, rng: np.random.Generator, anchor: dict | None = None) -> dict[str, float]:
    """Centre, half axes, exponent and angle of a body in pixels; beside `anchor` where one is given."""
    half_length = size * np.exp(rng.uniform(np.log(0.11), np.log(0.27)))
    half_width = half_length * rng.uniform(0.55, 0.9)
    x, y = rng.uniform(0.15, 0.85, size=2) * size
    if anchor is not None:
        direction = rng.uniform(0, 2 * np.pi)
        distance = 0.8 * (anchor["half_length"] + half_length)
        x = np.clip(anchor["x"] + distance * np.cos(direction), 0.1 * size, 0.9 * size)
        y = np.clip(anchor["y"] + distance * np.sin(direction), 0.1 * size, 0.9 * size)
    return {
        "x": float(x),
        "y": float(y),
        "half_length": float(half_length),
        "half_width": float(half_width),
        "exponent": float(rng.choice([2.0, 3.0, 6.0])),
        "angle": float(rng.uniform(0, 2 * np.pi)),
    }


def _local_coordinates(grid: np.ndarray, pose: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    dy, dx = grid[0] - pose["y"], grid[1] - pose["x"]
    cos, sin = np.cos(pose["angle"]), np.sin(pose["angle"])
    return dx * cos + dy * sin, dy * cos - dx * sin


def _object_coverage(grid: np.ndarray, pose: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """Soft coverage in [0, 1] of the body, a superellipse, and of the head, a disc at its end."""
    along, across = _local_coordinates(grid, pose)
    length, width, exponent = pose["half_length"], pose["half_width"], pose["exponent"]
    radius = (np.abs(along / length) ** exponent + np.abs(across / width) ** exponent) ** (1 / exponent)
    body = ((1 - radius) * width + 0.5).clip(0, 1)
    head_radius = 0.8 * width
    head = (head_radius - np.hypot(along - length, across) + 0.5).clip(0, 1)
    return body, head


def _place_object(grid, in_sight, anchor, rng):
    """A pose that leaves enough of its head and of earlier objects visible, or None after twelve tries."""
    for _ in range(12):
        touch = anchor is not None and rng.random() < TOUCH_PROBABILITY
        pose = _random_pose(grid.shape[-1], rng, anchor if touch else None)
        body, head = _object_coverage(grid, pose)
        inside = np.maximum(body, head) > 0.5
        full_head = np.pi * (0.8 * pose["half_width"]) ** 2
        shares = [(visible & ~inside).sum() / area for visible, area in in_sight]
        if min([(head > 0.5).sum() / full_head, *shares]) >= MIN_VISIBLE_SHARE:
            return pose, body, head
    return None


def _draw_object(image, grid, pose, parts, class_id, rng) -> None:
    body, head = parts
    hue = (class_id - 1) / (len(SHAPES_CLASSES) - 1)
    body_color = _color(hue + rng.uniform(-0.05, 0.05), rng.uniform(0.35, 0.55), rng.uniform(0.55, 0.9))
    _paint(image, body, body_color)
    along, across = _local_coordinates(grid, pose)
    period = max(4.0, grid.shape[-1] / 14) * rng.uniform(0.9, 1.15)
    texture = _texture(SHAPES_CLASSES[class_id], along - pose["half_length"], across, period)[..., None]
    head_hue = hue + rng.uniform(-0.03, 0.03)
    bright, dark = _color(head_hue, rng.uniform(0.8, 1.0), rng.uniform(0.85, 1.0)), _color(head_hue, 0.9, 0.2)
    _paint(image, head, texture * bright + (1 - texture) * dark)


def _texture(name: str, along: np.ndarray, across: np.ndarray, period: float) -> np.ndarray:
    """A pattern in [0, 1] of the given period in pixels."""
    turn = 2 * np.pi / period
    if name == "stripes":
        wave = np.sin(turn * along)
    elif name == "checks":
        wave = np.sin(turn * along) * np.sin(turn * across) * 2
    elif name == "dots":
        wave = np.cos(turn * along) + np.cos(turn * across) - 0.6
    elif name == "rings":
        wave = np.cos(turn * np.hypot(along, across))
    else:
        wave = np.sin(turn * (along + np.abs((across / period) % 2 - 1) * period))
    return (0.5 + 1.5 * wave).clip(0, 1)


def _draw_background(size: int, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    base = _color(rng.random(), rng.uniform(0.05, 0.25), rng.uniform(0.4, 0.85))
    coarse = Image.fromarray((rng.random((4, 4)) * 255).astype(np.uint8))
    shade = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    canvas = Image.fromarray(((base * (0.75 + 0.5 * shade)).clip(0, 1) * 255).astype(np.uint8))
    pen = ImageDraw.Draw(canvas)
    for class_id in range(1, len(SHAPES_CLASSES)):
        if rng.random() < (CLUTTER_WITH_CLASS if class_id in classes else CLUTTER_WITHOUT_CLASS):
            _draw_clutter(pen, size, class_id, rng)
    return np.asarray(canvas, dtype=np.float32) / 255


def _draw_clutter(pen: ImageDraw.ImageDraw, size: int, class_id: int, rng: np.random.Generator) -> None:
    """About twenty small marks of the kind and colour that go with a class, in one region of the image."""
    hue = (class_id - 0.5) / (len(SHAPES_CLASSES) - 1)
    centre = rng.uniform(0.1, 0.9, size=2) * size
    for x, y in rng.normal(centre, 0.22 * size, size=(20, 2)):
        value = _color(hue + rng.uniform(-0.04, 0.04), rng.uniform(0.3, 0.6), rng.uniform(0.35, 0.9))
        color = tuple(int(channel * 255) for channel in value)
        reach = size * rng.uniform(0.03, 0.06)
        if class_id == 1:
            pen.line((x, y + 2 * reach, x + rng.normal(0, reach), y - 2 * reach), fill=color, width=max(1, size // 64))
        elif class_id == 2:
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), outline=color, width=max(1, size // 64))
        elif class_id == 3:
            pen.rectangle((x - 2 * reach, y - reach / 2, x + 2 * reach, y + reach / 2), fill=color)
        elif class_id == 4:
            pen.polygon(((x, y - reach), (x - reach, y + reach), (x + reach, y + reach)), fill=color)
        else:
            pen.line((x - reach, y, x + reach, y), fill=color, width=max(1, size // 64))
            pen.line((x, y - reach, x, y + reach), fill=color, width=max(1, size // 64))


def _paint(image: np.ndarray, coverage: np.ndarray, color: np.ndarray) -> None:
    image += coverage[..., None] * (color - image)


def _color(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), dtype=np.float32)


def _encode_png(array: np.ndarray) -> dict[str, bytes | None]:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, format="PNG", compress_level=1)
    return {"bytes": stream.getvalue(), "path": None}


__all__ = ["SHAPES_CLASSES", "load_shapes"]
