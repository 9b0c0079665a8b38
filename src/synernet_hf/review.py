"""Pseudo-labels for people: exports to annotation tools, corrected masks read back, a page of the least confident images."""

import base64
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import datasets
import numpy as np
from PIL import Image

from synernet_hf.data.schema import name_some
from synernet_hf.files import FolderInUse, folder_in_use, read_json, replace_folder, write_json, write_text
from synernet_hf.mask_formats import MaskRecord, read_masks, write_masks
from synernet_hf.model import open_image
from synernet_hf.pseudo_label_files import (
    MASK_FOLDER,
    SETTINGS_FILE,
    build_manifest,
    mask_record,
    read_manifest,
    write_manifest,
    write_mask,
)
from synernet_hf.pseudo_labels import with_pseudo_labels
from synernet_hf.visualization import palette_image, voc_palette


REPORT_FILE = "report.html"
TEMPLATE = Path(__file__).with_name("review_template.html")
# width and height that the images of the report fit into
THUMBNAIL = 320
CORRECTED = "corrected"


def export_masks(folder: str | Path, formats: Sequence[str]) -> list[Path]:
    """
    Writes finished pseudo-labels in the formats of annotation tools and trainers, beside the PNG files.

    Args:
        folder (`str` or `Path`): What [`~synernet_hf.pseudo_labels.write_pseudo_labels`] wrote.
        formats (`Sequence[str]`): Some of `"coco"`, `"yolo"`, `"labelstudio"`, `"cvat"`; see
            [`~synernet_hf.mask_formats.write_masks`].

    Returns:
        `list[Path]`: what was written.

    Raises:
        ValueError: There is no such format, or the folder is not finished.
    """
    folder = Path(folder)
    names, rows = read_manifest(folder)

    def masks() -> Iterator[MaskRecord]:
        for row in rows:
            yield MaskRecord(row["file_name"], _pixels(folder / row["mask"]), row["confidence"])

    return [write_masks(kind, folder, masks(), names) for kind in formats]


def import_masks(source: str | Path, folder: str | Path, output_dir: str | Path) -> tuple[int, int]:
    """
    Makes a new folder of pseudo-labels with the masks that were corrected, for training or scoring.

    The folder is one as [`~synernet_hf.pseudo_labels.write_pseudo_labels`] leaves it. All masks of the source count as seen
    by a person, with the confidence 1 and the `label_source` `"corrected"`; all others stay as they are. Where the format has no
    undecided pixels, what no mask covers is background, or undecided where it was.

    Args:
        source (`str` or `Path`): The corrected export; see [`~synernet_hf.mask_formats.read_masks`].
        folder (`str` or `Path`): The pseudo-labels that were exported.
        output_dir (`str` or `Path`): New folder.

    Returns:
        `tuple[int, int]`: how many masks the source has, and how many of them differ.

    Raises:
        FileNotFoundError: There is no such source, or the folder is not finished.
        ValueError: The source cannot be read, names an image or a class that the folder does not have, or holds a mask
            of another size; or the output folder exists.
    """
    source, folder, output_dir = Path(source), Path(folder), Path(output_dir)
    names, rows = read_manifest(folder)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists already: give a new folder for the corrected masks.")
    problem = folder_in_use(folder)
    if problem:
        raise FolderInUse(problem)
    temporary = output_dir.absolute().with_name(f".{output_dir.name}.{os.getpid()}.tmp")
    seen: set[str] = set()
    changed = 0
    try:
        shutil.copytree(folder / MASK_FOLDER, temporary / MASK_FOLDER, ignore=shutil.ignore_patterns(".*.tmp"))
        for row, label_map, tells_undecided in read_masks(source, names, _finder(rows, folder)):
            if row["image_id"] in seen:
                raise ValueError(f"{source} has two masks of the image {row['image_id']}: keep one of them.")
            seen.add(row["image_id"])
            path = temporary / row["mask"]
            before = _pixels(path)
            if not tells_undecided:
                label_map = np.where((label_map == 0) & (before == 255), before, label_map)
            write_mask(path, label_map, _corrected(mask_record(path) or {}, label_map))
            changed += bool((label_map != before).any())
        settings = read_json(folder / SETTINGS_FILE)
        # a run with the model's settings will not make them anew
        write_json(temporary / SETTINGS_FILE, settings | {"map": CORRECTED})
        id2label = dict(enumerate(names))
        write_manifest(temporary, build_manifest(temporary, rows, id2label))
        if not seen:
            raise ValueError(f"{source} has no finished mask: correct some, or export those that are corrected.")
        replace_folder(temporary, output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(seen), changed


def with_corrected_masks(splits: datasets.DatasetDict, folder: str | Path) -> datasets.Dataset:
    """
    The images whose masks were corrected, with these in the column `mask`, for scoring.

    Args:
        splits (`datasets.DatasetDict`): The data that the pseudo-labels were made of; one split of it has the images.
        folder (`str` or `Path`): What [`import_masks`] made.

    Returns:
        `datasets.Dataset`: these records of the first split that has some.

    Raises:
        FileNotFoundError: The folder is not finished.
        ValueError: No image of the data has a corrected mask there, or the data has other classes than the masks.
    """
    corrected = {row["image_id"] for row in read_manifest(Path(folder))[1] if row["label_source"] == CORRECTED}
    for split in splits.values():
        chosen = [index for index, image_id in enumerate(split["image_id"]) if str(image_id) in corrected]
        if chosen:
            return with_pseudo_labels(split.select(chosen), folder)
    raise ValueError(
        f"None of the {len(corrected)} corrected masks in {folder} is of an image of the splits {', '.join(splits)}: give "
        "what `synernet pseudo-labels --from` made, and the data of these images."
    )


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as mask:
            return np.array(mask)
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"The mask {path} cannot be read ({error}): `synernet pseudo-labels` makes it anew."
        ) from error


def _corrected(content: dict[str, Any], label_map: np.ndarray) -> dict[str, Any]:
    found = [class_id for class_id in np.unique(label_map).tolist() if 0 < class_id < 255]
    return content | {
        "height": label_map.shape[0],
        "width": label_map.shape[1],
        "labels": found,
        "found": found,
        "label_source": CORRECTED,
        "confidence": 1.0,
        "coverage": round(float((label_map != 255).mean()), 6),
        "foreground": round(float(((label_map != 0) & (label_map != 255)).mean()), 6),
    }


def _finder(rows: list[dict[str, Any]], folder: Path) -> Callable[[str, str], dict[str, Any]]:
    """Finds the row of an image by any spelling of its name that tools use."""
    whole: dict[str, list[dict[str, Any]]] = {}
    short: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        mask = row["mask"].removeprefix(f"{MASK_FOLDER}/")
        for name in {row["file_name"], os.path.splitext(row["file_name"])[0], mask, os.path.splitext(mask)[0]}:
            whole.setdefault(name, []).append(row)
            if "/" in name:
                short.setdefault(name.rpartition("/")[2], []).append(row)

    def find(reference: str, place: str) -> dict[str, Any]:
        # Label Studio's local files and uploads, and folders of another computer
        name = unquote(reference.rpartition("?d=")[2]).replace("\\", "/").strip("/")
        parts = name.split("/")
        tails = ["/".join(parts[cut:]) for cut in range(len(parts))]
        tails += [re.sub("^[0-9a-f]{8}-", "", parts[-1])]
        tails += [os.path.splitext(tail)[0] for tail in tails]
        found = next((known[tail] for known in (whole, short) for tail in tails if tail in known), [])
        if len(found) == 1:
            return found[0]
        fault = (
            f"may be {name_some([row['file_name'] for row in found])}" if found else f"is not among the {len(rows)}"
        )
        raise ValueError(
            f"{place}: the image {reference!r} {fault} of {folder}: give the pseudo-labels that were exported, and their "
            "names of images."
        )

    return find


def write_report(folder: str | Path, dataset: datasets.Dataset, limit: int = 100) -> Path:
    """
    Writes `report.html`, one page without any other file: the least confident images with their pseudo-labels, to be
    sorted by confidence, coverage and class.

    Args:
        folder (`str` or `Path`): What [`~synernet_hf.pseudo_labels.write_pseudo_labels`] wrote.
        dataset (`datasets.Dataset`): The images it was made of.
        limit (`int`, *optional*, defaults to 100): How many images to show.

    Returns:
        `Path`: The page.

    Raises:
        ValueError: The folder is not finished, or a mask or image cannot be read.
    """
    folder = Path(folder)
    names, rows = read_manifest(folder)
    places = {str(image_id): index for index, image_id in enumerate(dataset["image_id"])}
    images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    shown = [row for row in rows if row["image_id"] in places][:limit]
    cards = [_card(folder, row, images[places[row["image_id"]]]["image"], names) for row in shown]
    classes = {name for row in shown for name in row["classes"]}
    options = "".join(f'<option value="{escape(name)}">{escape(name)}</option>' for name in names if name in classes)
    filled = {"total": str(len(rows)), "shown": str(len(shown)), "options": options, "cards": "\n".join(cards)}
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    write_text(folder / REPORT_FILE, text)
    return folder / REPORT_FILE


def _card(folder: Path, row: dict[str, Any], image: Any, names: list[str]) -> str:
    label_map = _pixels(folder / row["mask"])
    thumbnail = open_image(image)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    ids, counts = np.unique(label_map, return_counts=True)
    shares = {names[i]: count / label_map.size for i, count in zip(ids, counts, strict=True) if 0 < i < len(names)}
    small = palette_image(np.asarray(Image.fromarray(label_map).resize(thumbnail.size, Image.Resampling.NEAREST)))
    chips = [
        f'<li><i style="background:rgb{tuple(voc_palette()[names.index(name)].tolist())}"></i>{escape(name)} '
        f"{100 * share:.1f}&nbsp;%</li>"
        for name, share in shares.items()
    ]
    chips += [f'<li class="missing">{escape(name)}: not found</li>' for name in row["missing_classes"]]
    name = escape(row["image_id"])
    return (
        f'<article data-confidence="{row["confidence"]}" data-coverage="{row["coverage"]}" '
        f'data-classes="{escape(json.dumps(row["classes"]))}" data-name="{name}">'
        f'<button type="button" aria-pressed="true" aria-label="Mask of {name}" title="Show or hide the mask">'
        f'<img src="{_data_uri(thumbnail, "WEBP", quality=70)}" width="{thumbnail.width}" height="{thumbnail.height}" '
        f'alt="">'
        f'<img class="mask" src="{_data_uri(small, "PNG", transparency=0, optimize=True)}" alt=""></button>'
        f"<h2>{name}</h2>"
        f"<p>confidence <b>{row['confidence']:.3f}</b>, decided <b>{100 * row['coverage']:.1f}&nbsp;%</b></p>"
        f"<ul>{''.join(chips) or '<li>background alone</li>'}</ul></article>"
    )


def _data_uri(image: Image.Image, kind: str, **options: Any) -> str:
    content = io.BytesIO()
    image.save(content, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


__all__ = ["export_masks", "import_masks", "with_corrected_masks", "write_report"]
