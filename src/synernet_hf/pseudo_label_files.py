"""The folder of pseudo-labels: palette PNGs that carry their row of the manifest, the manifest, and what made them."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from synernet_hf.files import missing_extra, one_line, read_json, replace_file
from synernet_hf.visualization import palette_image


try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ModuleNotFoundError as error:
    raise missing_extra("train", error) from error


SETTINGS_FILE = "pseudo_labels.json"
MANIFEST_FILE = "manifest.parquet"
# rows that are dictionaries at once, which need more memory than a table
MANIFEST_CHUNK = 1000
MASK_FOLDER = "masks"
# further files for those who correct masks
REVIEW_FILES = ("report.html", "coco.json", "yolo", "label_studio.json", "label_studio.xml", "cvat.zip")
# text chunk of a mask that holds its row of the manifest, so that both appear on disk in one step
RECORD_KEY = "synernet_hf"
MANIFEST_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("mask", pa.string()),
        ("file_name", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("classes", pa.list_(pa.string())),
        ("missing_classes", pa.list_(pa.string())),
        ("label_source", pa.string()),
        ("confidence", pa.float64()),
        ("coverage", pa.float64()),
        ("foreground", pa.float64()),
        ("pixels", pa.string()),
    ]
)


def mask_record(path: Path) -> dict[str, Any] | None:
    """The manifest row of a finished mask; `None` where there is none, or another one than was written."""
    try:
        with Image.open(path) as mask:
            content = json.loads(mask.info[RECORD_KEY])
            return content if content["pixels"] == _pixel_digest(np.asarray(mask)) else None
    except (OSError, KeyError, TypeError, ValueError, SyntaxError):
        # damaged PNG files are a SyntaxError
        return None


def _pixel_digest(label_map: np.ndarray) -> str:
    return hashlib.sha256(label_map.tobytes()).hexdigest()


def write_mask(path: Path, label_map: np.ndarray, content: dict[str, Any]) -> None:
    """Writes a mask and its row, in one step."""
    text = PngImagePlugin.PngInfo()
    text.add_text(RECORD_KEY, json.dumps(content | {"pixels": _pixel_digest(label_map)}, sort_keys=True))
    replace_file(path, lambda temporary: palette_image(label_map).save(temporary, format="PNG", pnginfo=text))


def build_manifest(output_dir: Path, records: list[dict], id2label: dict[int, str]) -> pa.Table:
    """The manifest of the masks that are there, least confident first."""
    return pa.concat_tables(
        pa.Table.from_pylist(
            list(_manifest_rows(output_dir, records[start : start + MANIFEST_CHUNK], id2label)), MANIFEST_SCHEMA
        )
        for start in range(0, max(len(records), 1), MANIFEST_CHUNK)
    ).sort_by([("confidence", "ascending"), ("image_id", "ascending")])


def _manifest_rows(output_dir: Path, records: list[dict], id2label: dict[int, str]) -> Iterator[dict[str, Any]]:
    for record in records:
        content = mask_record(output_dir / record["mask"])
        if content is None:
            continue
        row = {name: content[name] for name in MANIFEST_SCHEMA.names if name in content}
        row |= {name: record.get(name) for name in ("image_id", "mask", "file_name")}
        row["classes"] = [id2label[class_id] for class_id in content["labels"]]
        row["missing_classes"] = [id2label[label] for label in content["labels"] if label not in content["found"]]
        yield row


def write_manifest(folder: Path, manifest: pa.Table) -> None:
    """Writes the manifest, whole or not at all."""
    replace_file(folder / MANIFEST_FILE, lambda path: pq.write_table(manifest, path))


def read_manifest(folder: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """
    The class list of a finished folder, background first, and the rows of its manifest, least confident first.

    Raises `FileNotFoundError` where the folder is not finished, and `ValueError` where a file cannot be read.
    """
    for name in (MANIFEST_FILE, SETTINGS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"There is no {folder / name}: give a folder that `synernet pseudo-labels` has finished."
            )
    try:
        id2label = read_json(folder / SETTINGS_FILE)["id2label"]
        names = [id2label[str(class_id)] for class_id in range(len(id2label))]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / SETTINGS_FILE} does not say what the ids in the masks mean: make them anew."
        ) from error
    try:
        rows = pq.read_table(folder / MANIFEST_FILE).to_pylist()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / MANIFEST_FILE} cannot be read ({one_line(error)}): `synernet pseudo-labels` makes it anew."
        ) from error
    for row in rows:
        # not told by folders of earlier versions
        row["file_name"] = row.get("file_name") or row["mask"].removeprefix(f"{MASK_FOLDER}/")
    return names, rows


def file_names(images: Iterable[tuple[str, str | None]]) -> list[str]:
    """
    What annotation tools call images: the path of each below the folder that all are in, and the identifier with `.png`
    for those without a file. Takes (mask, path of the image) and gives names that differ, without `..`.
    """
    images = list(images)
    parts = [
        [part for part in (path or "").replace("\\", "/").split("/") if part not in ("", ".", "..")]
        for _, path in images
    ]
    common = len(os.path.commonprefix([names[:-1] for names in parts if names]))
    found = ["/".join(names[common:]) for names in parts]
    own = [mask.removeprefix(f"{MASK_FOLDER}/") for mask, _ in images]
    return [name or mask for name, mask in zip(found, own, strict=True)] if len(set(found)) == len(found) else own


__all__ = [
    "MANIFEST_FILE",
    "MASK_FOLDER",
    "REVIEW_FILES",
    "SETTINGS_FILE",
    "build_manifest",
    "file_names",
    "mask_record",
    "read_manifest",
    "write_manifest",
    "write_mask",
]
