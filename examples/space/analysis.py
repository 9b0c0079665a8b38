"""What the page of app.py computes, without Gradio: one image looked into, or masks of many."""

import base64
import csv
import io
import tempfile
import threading
import zipfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from synernet_hf.mask_formats import EXPORTS, MaskRecord, write_masks
from synernet_hf.model import generate_image_cams, open_image, predict_labels, resize_maps, segment_images
from synernet_hf.model_folder import load_model_folder
from synernet_hf.pseudo_labels import PseudoLabeler, PseudoLabelOptions
from synernet_hf.visualization import colorize, heat_map, palette_image, voc_palette


MAX_MEGAPIXELS = 50
MAX_IMAGES = 200
# width and height that the maps of the page fit into
SHOWN = 512
UNDECIDED = 255
MAPS = ("segmentation", "pseudo-label")
# the settings of a model are changed for one image at a time
BUSY = threading.Lock()


@dataclass(frozen=True)
class Settings:
    """
    How an image is looked at.

    Args:
        scales (`tuple[float, ...]`): Scales at which it is seen.
        flip (`bool`): Also see the mirror of every scale.
        low_threshold, high_threshold (`float`): A fused CAM below the first is background, above the second its class.
        class_prior_weight (`float`): How much unlikely classes lose in the segmentation.
        fusion (`str`): `"confidence"` or `"fixed"`.

    Raises:
        ValueError: There is no scale, or the thresholds are not in this order.
    """

    scales: tuple[float, ...]
    flip: bool
    low_threshold: float
    high_threshold: float
    class_prior_weight: float
    fusion: str

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("No scale is chosen: tick at least one.")
        if not self.low_threshold < self.high_threshold:
            raise ValueError(
                f"The background threshold ({self.low_threshold:g}) must be below the class threshold "
                f"({self.high_threshold:g}): move one of them."
            )


@lru_cache(maxsize=4)
def load(name: str) -> tuple[Any, Any]:
    """The model and the processor of a folder or Hub id; `ValueError` says in one sentence why not."""
    try:
        model, processor = load_model_folder(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"The checkpoint {name} cannot be loaded: {error}") from error
    return model.eval(), processor


def open_upload(path: str | Path) -> Image.Image:
    """A file that somebody gave as an upright RGB image; `ValueError` says in one sentence why not."""
    name = Path(path).name
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(_too_large(name, f"more than {Image.MAX_IMAGE_PIXELS} pixels")) from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"{name} is no image that can be read: give a JPEG, PNG or WebP file.") from None
    if width * height > MAX_MEGAPIXELS * 10**6:
        raise ValueError(_too_large(name, f"{width}x{height} pixels"))
    try:
        return open_image(str(path))
    except ValueError:
        raise ValueError(f"{name} is damaged: save it again, or give another file.") from None


def _too_large(name: str, pixels: str) -> str:
    return f"{name} has {pixels}, too many for this page, which takes {MAX_MEGAPIXELS} megapixels: make it smaller."


@contextmanager
def _set(config: Any, settings: Settings):
    """The model's configuration with these settings, for a while."""
    names = ("low_threshold", "high_threshold", "class_prior_weight", "fusion")
    with BUSY:
        before = {name: getattr(config, name) for name in names}
        try:
            for name in names:
                setattr(config, name, getattr(settings, name))
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)


def label_ids(model: Any, ticked: Sequence[str]) -> list[int]:
    """0-based ids of the ticked classes that the model knows."""
    return [model.config.label2id[name] - 1 for name in ticked if name in model.config.label2id]


def segment(name: str, image: Image.Image, ticked: Sequence[str], settings: Settings, kind: str) -> tuple[Any, float]:
    """The label map `(height, width)` uint8 of an image and its confidence; `kind` is one of `MAPS`."""
    model, processor = load(name)
    ids = label_ids(model, ticked)
    # with classes ticked the map is limited to them
    source = "known" if ids else "predicted"
    options = PseudoLabelOptions(
        map="segmentation" if kind == "segmentation" else "pseudo_label",
        label_source=source,
        scales=settings.scales,
        flip=settings.flip,
    )
    with _set(model.config, settings):
        label_map, content = PseudoLabeler(model, processor, options)(image, ids)
    return label_map, content["confidence"]


@dataclass
class Analysis:
    """
    One image seen by one model.

    Args:
        name (`str`): Of the model.
        image (`PIL.Image.Image`): As it is shown.
        panels (`list[tuple[str, PIL.Image.Image]]`): Titles and maps, of the size of `image`; a label map is
            transparent where there is background.
        shares (`dict[str, tuple[float, float]]`): Share of the pixels of each class in the pseudo-label and in the
            segmentation.
        colours (`dict[str, str]`): Of the classes, as in the maps.
        note (`str`): What to tell about the result.
    """

    name: str
    image: Image.Image
    panels: list[tuple[str, Image.Image]]
    shares: dict[str, tuple[float, float]]
    colours: dict[str, str]
    note: str


@torch.no_grad()
def analyse(name: str, image: Image.Image, ticked: Sequence[str], settings: Settings) -> Analysis:
    """Looks into a model: the CAMs of its branches, where they agree, and what it makes of them."""
    model, processor = load(name)
    ids = label_ids(model, ticked)
    if not ids:
        [present] = predict_labels(model, processor, [image])
    else:
        present = torch.zeros(model.config.num_labels - 1)
        present[ids] = 1
    with _set(model.config, settings):
        views = {"scales": settings.scales, "flip": settings.flip}
        [cams] = generate_image_cams(model, processor, [image], [present], refine=False, **views)
        known = [present] if ids else None
        [segmented] = segment_images(model, processor, [image], known, settings.scales, settings.flip)
    pseudo_label, _ = segment(
        name, image, [model.config.id2label[int(i) + 1] for i in present.nonzero()[:, 0]], settings, "pseudo-label"
    )
    if not present.any():
        pseudo_label = np.zeros_like(pseudo_label)
    segmentation = segmented.label_map.cpu().numpy().astype(np.uint8)
    small = image.copy()
    small.thumbnail((SHOWN, SHOWN))
    size = (small.height, small.width)
    maps = {key: resize_maps(cams[key].float(), size).cpu() for key in ("broad_cams", "precise_cams", "confidence")}
    hard = [_hard(maps[key], model.config.background_threshold) for key in ("broad_cams", "precise_cams")]
    panels = [
        ("B-CAM (broad branch)", heat_map(maps["broad_cams"].amax(dim=0).numpy())),
        ("P-CAM (precise branch)", heat_map(maps["precise_cams"].amax(dim=0).numpy())),
        ("Agreement of both", _painted(np.where(hard[0] == hard[1], hard[0], UNDECIDED), small.size)),
        ("Confidence", heat_map(maps["confidence"][0].numpy())),
        ("Fused pseudo-label", _painted(pseudo_label, small.size)),
        ("Segmentation", _painted(segmentation, small.size)),
    ]
    found = [int(class_id) for class_id in np.union1d(pseudo_label, segmentation) if 0 < class_id]
    names = {**model.config.id2label, UNDECIDED: "undecided"}
    shares = {names[i]: (float((pseudo_label == i).mean()), float((segmentation == i).mean())) for i in found}
    colours = {names[i]: "#{:02x}{:02x}{:02x}".format(*voc_palette()[i].tolist()) for i in found}
    return Analysis(name, small, panels, shares, colours, _note(model, present, bool(ids), segmentation))


def _hard(cams: torch.Tensor, threshold: float) -> np.ndarray:
    """The class of each pixel whose CAM is above the threshold, else 0."""
    largest, place = cams.max(dim=0)
    return torch.where(largest > threshold, place + 1, 0).numpy().astype(np.uint8)


def _painted(label_map: np.ndarray, size: tuple[int, int]) -> Image.Image:
    small = np.asarray(Image.fromarray(label_map).resize(size, Image.Resampling.NEAREST))
    painted = colorize(small)
    painted.putalpha(Image.fromarray(np.where(small == 0, 0, 255).astype(np.uint8)))
    return painted


def _note(model: Any, present: torch.Tensor, is_given: bool, segmentation: np.ndarray) -> str:
    names = [model.config.id2label[int(index) + 1] for index in present.nonzero()[:, 0]]
    if is_given:
        return f"Classes as ticked: {', '.join(names)}."
    if not names:
        return "Nothing found: the model sees none of its classes in this image. Tick a class to look for it."
    return f"Classes that the model found: {', '.join(names)}."


def page(analyses: Sequence[Analysis]) -> str:
    """The result as HTML, one section for each model; names are escaped."""
    return "".join(_section(analysis, len(analyses) > 1) for analysis in analyses)


def _section(analysis: Analysis, is_named: bool) -> str:
    image = _data_uri(analysis.image, "WEBP", quality=80)
    figures = [f'<figure><img src="{image}" alt="The image"><figcaption>Image</figcaption></figure>']
    for title, map_ in analysis.panels:
        layers = (
            f'<img src="{image}" class="base" alt=""><img src="{_data_uri(map_, "PNG")}" class="map" alt="{title}">'
        )
        figures.append(f'<figure><div class="layers">{layers}</div><figcaption>{title}</figcaption></figure>')
    rows = [
        f'<tr><th scope="row"><i style="background:{analysis.colours[name]}"></i>{escape(name)}</th>'
        f"<td>{100 * label:.1f} %</td><td>{100 * segmented:.1f} %</td></tr>"
        for name, (label, segmented) in analysis.shares.items()
    ]
    head = f"<h3>{escape(analysis.name)}</h3>" if is_named else ""
    table = (
        "<table><thead><tr><th scope='col'>Class</th><th scope='col'>Pseudo-label</th><th scope='col'>Segmentation</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
    scale = '<p class="scale">Heat maps: 0 <span></span> 1. Pale: undecided, or no agreement.</p>'
    note = f'<p role="status">{escape(analysis.note)}</p>'
    return f'<section>{head}{note}<div class="panels">{"".join(figures)}</div>{table if rows else ""}{scale}</section>'


def problem(error: Exception) -> str:
    """An error as HTML."""
    return f'<p role="alert">{escape(str(error))}</p>'


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def make_masks(
    name: str, paths: Sequence[str], ticked: Sequence[str], settings: Settings, kind: str
) -> tuple[str, str, str]:
    """
    Masks of many images.

    Returns:
        `tuple[str, str, str]`: a zip archive (PNG masks, `coco.json`, `yolo/`), a CSV file with a row for each image, and
        what to tell, with the files that are no images.

    Raises:
        ValueError: No file is an image, or there are too many.
    """
    if len(paths) > MAX_IMAGES:
        raise ValueError(f"{len(paths)} images are too many for this page, which takes {MAX_IMAGES}: give fewer.")
    model, _ = load(name)
    names = list(model.config.id2label.values())
    records, rows, faults = [], [], []
    for path in paths:
        try:
            image = open_upload(path)
        except ValueError as error:
            faults.append(str(error))
            continue
        label_map, confidence = segment(name, image, ticked, settings, kind)
        taken = {record.file_name for record in records}
        file_name = next(n for n in (f"{'_' * k}{Path(path).name}" for k in range(len(paths))) if n not in taken)
        records.append(MaskRecord(file_name, label_map, confidence))
        shares = [round(float((label_map == class_id).mean()), 4) for class_id in (*range(len(names)), UNDECIDED)]
        rows.append([file_name, image.width, image.height, round(confidence, 4), *shares])
    if not records:
        raise ValueError(" ".join(faults) or "There is no image: drop some, or take an example.")
    folder = Path(tempfile.mkdtemp(prefix="synernet_masks_"))
    table = folder / "masks.csv"
    with table.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["image", "width", "height", "confidence", *names, "undecided"], *rows])
    archive = folder / "masks.zip"
    _write_archive(archive, records, names, table)
    return str(archive), str(table), " ".join([f"{len(records)} masks are in the archive.", *faults])


def _write_archive(archive: Path, records: Sequence[MaskRecord], names: list[str], table: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary, zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for record in records:
            content = io.BytesIO()
            palette_image(record.label_map).save(content, format="PNG")
            file.writestr(f"masks/{record.file_name}.png", content.getvalue())
        for kind in ("coco", "yolo"):
            write_masks(kind, Path(temporary), _without_twins(records), names)
            written = Path(temporary) / EXPORTS[kind]
            for path in [written] if written.is_file() else sorted(written.rglob("*")):
                if path.is_file():
                    file.write(path, path.relative_to(temporary).as_posix())
        file.write(table, table.name)


def _without_twins(records: Sequence[MaskRecord]) -> list[MaskRecord]:
    """YOLO names labels without the suffix of the image: of a.jpg and a.png, only the first has room."""
    first: dict[str, MaskRecord] = {}
    for record in records:
        first.setdefault(Path(record.file_name).stem, record)
    return list(first.values())
