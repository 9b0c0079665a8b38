"""Colours, overlays, captioned figures, and charts of scores (these need matplotlib, extra `train`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from unicodedata import normalize

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from synernet_hf.files import missing_extra
from synernet_hf.model import to_rgb


# fonts of systems, with more letters than Pillow's own
_FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arial.ttf", "msyh.ttc", "PingFang.ttc")
_NO_LETTER = "\U0010ffff"
# of an overlay that are mixed at once
_ROWS = 256
# colours of the heat map at evenly spaced values from 0 to 1, ever lighter
_HEAT_COLORS = ((8, 8, 32), (70, 20, 120), (190, 50, 90), (250, 140, 40), (255, 240, 170))


def voc_palette() -> np.ndarray:
    """
    Makes the colour map of PASCAL VOC: the bits of an id, three at a time, fill red, green and blue from the top bit on.

    Returns:
        `np.ndarray` of dtype uint8 and shape `(256, 3)`: RGB colours by id; 0 is black, 255 ("ignore") is pale.
    """
    ids = np.arange(256)
    palette = np.zeros((256, 3), dtype=np.uint8)
    for level in range(8):
        for channel in range(3):
            palette[:, channel] |= (((ids >> (3 * level + channel)) & 1) << (7 - level)).astype(np.uint8)
    return palette


def _checked_label_map(label_map: np.ndarray) -> np.ndarray:
    label_map = np.asarray(label_map)
    if label_map.ndim != 2 or not np.issubdtype(label_map.dtype, np.integer):
        raise ValueError(
            f"Got a label map of shape {label_map.shape} and dtype {label_map.dtype}; integers of shape (height, "
            "width) are expected."
        )
    if label_map.size and not (0 <= label_map.min() and label_map.max() <= 255):
        raise ValueError(
            f"Got label ids from {label_map.min()} to {label_map.max()}; a palette image holds ids from 0 to 255."
        )
    return label_map.astype(np.uint8)


def _as_rgb(image: "Image.Image | np.ndarray") -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ValueError(
            f"Got an image of shape {array.shape} and dtype {array.dtype}; uint8 of shape (height, width) or "
            "(height, width, 3) is expected."
        )
    return Image.fromarray(array).convert("RGB")


def _pixels_under(image: "Image.Image | np.ndarray", drawn: np.ndarray, name: str) -> np.ndarray:
    """The pixels of an image, uint8 `(height, width, 3)`, on which a map of the same size is drawn."""
    pixels = np.asarray(_as_rgb(image))
    if pixels.shape[:2] != drawn.shape:
        raise ValueError(
            f"The image is {pixels.shape[0]} x {pixels.shape[1]} (height x width), the {name} {drawn.shape[0]} x "
            f"{drawn.shape[1]}; equal sizes are expected: resize the map first."
        )
    return pixels


def palette_image(label_map: np.ndarray) -> Image.Image:
    """
    Makes a palette image of a label map, the format of PASCAL VOC masks: the stored values are the ids themselves.

    Args:
        label_map (`np.ndarray` of integers and shape `(height, width)`): Class ids, 0 to 255.

    Returns:
        `PIL.Image.Image`: Mode `"P"`, with the VOC palette.

    Raises:
        ValueError: If the map is not two-dimensional, not integer or holds ids outside 0 to 255.
    """
    image = Image.fromarray(_checked_label_map(label_map), mode="L")
    image.putpalette(voc_palette().reshape(-1).tolist())
    return image


def colorize(label_map: np.ndarray) -> Image.Image:
    """
    Paints every class id in its VOC colour: an RGB image, with the argument and the errors of [`palette_image`].
    """
    return Image.fromarray(voc_palette()[_checked_label_map(label_map)])


def overlay(
    image: "Image.Image | np.ndarray",
    label_map: np.ndarray,
    alpha: float = 0.5,
    class_names: Mapping[int, str] | None = None,
) -> Image.Image:
    """
    Draws the coloured classes over an image; background (id 0) stays as it is.

    Args:
        image (`PIL.Image.Image` or `np.ndarray` of dtype uint8 and shape `(height, width, 3)`): The image.
        label_map (`np.ndarray` of integers and shape `(height, width)`): Class ids, 0 to 255.
        alpha (`float`, *optional*, defaults to 0.5): Opacity of the colours in [0, 1].
        class_names (`Mapping[int, str]`, *optional*): Names by id, for a legend of the classes shown below the image.

    Returns:
        `PIL.Image.Image`: RGB image of the same size, with `class_names` higher by the legend and at least wide enough
        for it.

    Raises:
        ValueError: If the sizes differ or `alpha` is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"`alpha` is {alpha}; an opacity between 0 and 1 is expected.")
    label_map = _checked_label_map(label_map)
    pixels = _pixels_under(image, label_map, "label map")
    drawn, palette = np.empty_like(pixels), voc_palette().astype(np.float32)
    # a large image takes 90 bytes a pixel as a whole
    for rows in (slice(start, start + _ROWS) for start in range(0, len(pixels), _ROWS)):
        opacity = np.where(label_map[rows] == 0, 0.0, alpha)[..., None]  # (rows, width, 1)
        colored = palette[label_map[rows]]
        drawn[rows] = np.rint(pixels[rows].astype(np.float32) * (1 - opacity) + colored * opacity)
    drawn = Image.fromarray(drawn)
    if class_names is None:
        return drawn
    shown = np.unique(label_map[label_map > 0]).tolist()
    names = {255: "undecided", **class_names}
    return with_legend(drawn, {index: names.get(index, f"class {index}") for index in shown})


def heat_map(values: np.ndarray, image: "Image.Image | np.ndarray | None" = None, alpha: float = 0.6) -> Image.Image:
    """
    Colours a map of values, such as a CAM or a confidence map, from dark (0) to light (1).

    Args:
        values (`np.ndarray` of floats and shape `(height, width)`): Clipped to [0, 1].
        image (`PIL.Image.Image` or `np.ndarray` of dtype uint8 and shape `(height, width, 3)`, *optional*): Image of
            the same size to show through.
        alpha (`float`, *optional*, defaults to 0.6): Opacity of the heat map over `image` in [0, 1].

    Returns:
        `PIL.Image.Image`: RGB image of the same size.

    Raises:
        ValueError: If `values` is not two-dimensional or the sizes differ.
    """
    values = np.clip(np.asarray(values, dtype=np.float32), 0.0, 1.0)
    if values.ndim != 2:
        raise ValueError(f"Got values of shape {values.shape}; one map of shape (height, width) is expected.")
    stops = np.linspace(0.0, 1.0, len(_HEAT_COLORS))
    channels = np.asarray(_HEAT_COLORS, dtype=np.float32).T
    heat = np.stack([np.interp(values, stops, channel) for channel in channels], axis=-1)  # (height, width, 3)
    if image is not None:
        heat = (1 - alpha) * _pixels_under(image, values, "map of values").astype(np.float32) + alpha * heat
    return Image.fromarray(np.rint(heat).astype(np.uint8))


def _drawable(texts: Sequence[str]) -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, list[str]]:
    """A font for texts, and the texts: letters that no font here has lose their accents or become a question mark."""
    texts = [normalize("NFC", text) for text in texts]
    missing = {letter for letter in "".join(texts) if not letter.isascii() and not letter.isspace()}
    best = ImageFont.load_default(size=13)
    for name in (None, *_FONTS) if missing else ():
        try:
            font = best if name is None else ImageFont.truetype(name, 13)
            box = bytes(font.getmask(_NO_LETTER))
            lacking = {letter for letter in missing if bytes(font.getmask(letter)) == box}
        except (OSError, UnicodeError):
            continue
        if len(lacking) < len(missing):
            best, missing = font, lacking
    plain = {ord(letter): normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?" for letter in missing}
    return best, [text.translate(plain) for text in texts]


def with_legend(image: Image.Image, class_names: Mapping[int, str]) -> Image.Image:
    """
    Adds a legend below an image: the VOC colour and the name of each class, in as many lines as it takes.

    Args:
        image (`PIL.Image.Image`): The image.
        class_names (`Mapping[int, str]`): Names by id, in the order of the legend. Without any the image is returned.

    Returns:
        `PIL.Image.Image`: RGB image on white, as wide as the image and the longest name need.
    """
    if not class_names:
        return image
    font, names = _drawable(list(class_names.values()))
    class_names = dict(zip(class_names, names, strict=True))
    swatch, gap, line, margin = 14, 6, 20, 8
    widths = {index: swatch + gap + math.ceil(font.getlength(name)) for index, name in class_names.items()}
    width = max(image.width, 2 * margin + max(widths.values()))
    places, left, top = {}, margin, margin
    for index, taken in widths.items():
        if left > margin and left + taken > width - margin:
            left, top = margin, top + line
        places[index] = (left, top)
        left += taken + 2 * gap
    figure = Image.new("RGB", (width, image.height + top + line), "white")
    figure.paste(image, (0, 0))
    draw, palette = ImageDraw.Draw(figure), voc_palette()
    for index, (left, top) in places.items():
        top += image.height
        draw.rectangle(
            (left, top, left + swatch - 1, top + swatch - 1), fill=tuple(palette[index].tolist()), outline="grey"
        )
        draw.text((left + swatch + gap, top - 2), class_names[index], fill="black", font=font)
    return figure


def figure_panels(
    rows: "Sequence[Sequence[tuple[str, Image.Image | np.ndarray]]]", panel_size: tuple[int, int] = (224, 224)
) -> Image.Image:
    """
    Lays images out in a grid, each with its title above.

    Args:
        rows (`Sequence[Sequence[tuple[str, PIL.Image.Image or np.ndarray]]]`): One sequence of (title, image) per row;
            rows may differ in length. Arrays are uint8 of shape `(height, width)` or `(height, width, 3)`.
        panel_size (`tuple[int, int]`, *optional*, defaults to `(224, 224)`): Width and height in pixels into which
            every image fits, its proportions kept.

    Returns:
        `PIL.Image.Image`: RGB figure on white.

    Raises:
        ValueError: If there is no panel.
    """
    if not any(len(row) for row in rows):
        raise ValueError("Got no panel; at least one (title, image) pair is expected.")
    width, height = panel_size
    margin = 8
    font, titles = _drawable([title for row in rows for title, _ in row])
    titles = iter(titles)
    caption = 20
    columns = max(len(row) for row in rows)
    fitted = [[(title, _fitted(_as_rgb(image), width, height)) for title, image in row] for row in rows]
    row_heights = [max((image.height for _, image in row), default=0) for row in fitted]
    figure_height = margin + sum(caption + row_height + margin for row_height in row_heights)
    figure = Image.new("RGB", (margin + columns * (width + margin), figure_height), "white")
    draw = ImageDraw.Draw(figure)
    top = margin
    for row, row_height in zip(fitted, row_heights, strict=True):
        for j, (_, image) in enumerate(row):
            left = margin + j * (width + margin)
            draw.text((left, top), _shortened(next(titles), font, width), fill="black", font=font)
            figure.paste(image, (left, top + caption))
        top += caption + row_height + margin
    return figure


def score_bars(scores: Mapping[str, Mapping[str, float | None]], title: str = "IoU") -> Image.Image:
    """
    Draws a bar for each class and kind of prediction.

    Args:
        scores (`Mapping[str, Mapping[str, float or None]]`): For each kind of prediction, in the order of the legend, its
            scores in [0, 1] by class, such as `per_class_iou` of [`evaluate_model`]. None leaves a gap.
        title (`str`, *optional*, defaults to `"IoU"`): Name of the axis.

    Returns:
        `PIL.Image.Image`: RGB chart on white, wider for more classes.

    Raises:
        ValueError: If there is no score.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    classes = list(dict.fromkeys(name for by_class in scores.values() for name in by_class))
    if not classes:
        raise ValueError("Got no score; at least one kind of prediction with one class is expected.")
    width = 0.8 / len(scores)

    def draw(axes) -> None:
        for number, (kind, by_class) in enumerate(scores.items()):
            drawn = [(place, by_class[name]) for place, name in enumerate(classes) if by_class.get(name) is not None]
            places = [place + (number + 0.5) * width - 0.4 for place, _ in drawn]
            axes.bar(places, [100 * value for _, value in drawn], width, label=kind)
        axes.set_xticks(range(len(classes)), classes, rotation=45 if len(classes) > 8 else 0)
        axes.set(ylabel=f"{title}, percent", ylim=(0, 100))
        axes.grid(axis="y", alpha=0.3)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(scores), frameon=False)

    return _chart(draw, (2 + 0.7 * len(classes), 3.6))


def confusion_chart(confusion: Mapping[str, Mapping[str, float]], classes: Sequence[str] | None = None) -> Image.Image:
    """
    Draws what the pixels of each class are taken for, in percent.

    Args:
        confusion (`Mapping[str, Mapping[str, float]]`): Shares in [0, 1] by true and predicted class, such as
            `confusion` of [`evaluate_model`] with `parts`; shares that are missing are 0.
        classes (`Sequence[str]`, *optional*): Predicted classes to show; the shares of all others become one column,
            "others". All by default.

    Returns:
        `PIL.Image.Image`: RGB chart on white: a row for each true class.

    Raises:
        ValueError: If there is no class.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not confusion:
        raise ValueError("Got no confusion matrix; at least one class is expected.")
    rows = {name: dict(row) for name, row in confusion.items()}
    if classes is not None:
        for row in rows.values():
            others = sum(row.pop(name) for name in list(row) if name not in classes)
            row |= {"others": others} if others else {}
    columns = list(dict.fromkeys([*rows, *(other for row in rows.values() for other in row)]))
    columns.sort(key=lambda name: name == "others")
    shares = np.array([[100 * row.get(other, 0.0) for other in columns] for row in rows.values()])

    def draw(axes) -> None:
        axes.imshow(shares, cmap="viridis", vmin=0, vmax=100)
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(xlabel="taken for", ylabel="pixels of")
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                color = "black" if share > 60 else "white"
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=color, fontsize=8)

    return _chart(draw, (2 + 0.4 * len(columns), 1.6 + 0.4 * len(rows)))


def curves(series: Mapping[str, Sequence[tuple[float, float]]], xlabel: str = "step", ylabel: str = "") -> Image.Image:
    """
    Draws curves, such as losses or scores over the steps of a training.

    Args:
        series (`Mapping[str, Sequence[tuple[float, float]]]`): Points `(x, y)` of each curve by its name.
        xlabel, ylabel (`str`, *optional*, default to `"step"` and none): Names of the axes.

    Returns:
        `PIL.Image.Image`: RGB chart on white.

    Raises:
        ValueError: If there is no point.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    if not any(series.values()):
        raise ValueError("Got no point; at least one curve with one point is expected.")

    def draw(axes) -> None:
        for name, points in series.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()

    return _chart(draw, (8, 4))


def _chart(draw: Callable[..., None], size: tuple[float, float]) -> Image.Image:
    """A chart of one pair of axes, of a size in inches of 100 pixels; no window, no global state of matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing_extra("train", error) from error
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)


def _shortened(text: str, font: "ImageFont.FreeTypeFont | ImageFont.ImageFont", width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


__all__ = [
    "colorize",
    "confusion_chart",
    "curves",
    "figure_panels",
    "heat_map",
    "overlay",
    "palette_image",
    "score_bars",
    "voc_palette",
    "with_legend",
]
