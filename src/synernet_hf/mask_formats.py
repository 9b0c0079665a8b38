"""Label maps in the formats of annotation tools and trainers (COCO, YOLO, Label Studio, CVAT), and back."""

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from synernet_hf.files import missing_extra, one_line, replace_file, replace_folder
from synernet_hf.mask_encodings import outlines, pack_runs, unpack_runs


try:
    from pycocotools import mask as mask_utils
except ModuleNotFoundError as error:
    raise missing_extra("train", error) from error

from synernet_hf.data.coco import draw_objects
from synernet_hf.data.files import is_hidden, parse_json, read_text
from synernet_hf.data.schema import IGNORE_INDEX, class_index, clean_label
from synernet_hf.visualization import voc_palette


# what each format is written to, beside the PNG files
EXPORTS = {"coco": "coco.json", "yolo": "yolo", "labelstudio": "label_studio.json", "cvat": "cvat.zip"}
LABEL_STUDIO_CONFIG = "label_studio.xml"
# label of undecided pixels in the formats that people edit
UNDECIDED = "undecided"
# of an archive, so that equal masks make equal files
ARCHIVE_TIME = (2020, 1, 1, 0, 0, 0)


class MaskRecord(NamedTuple):
    """
    A mask with what the formats say of its image.

    Args:
        file_name (`str`): Of the image, below the folder of images, with slashes.
        label_map (`np.ndarray` of dtype uint8 and shape `(height, width)`): 0 background, class ids, 255 undecided.
        confidence (`float`, *optional*): In [0, 1]; Label Studio sorts by it.
    """

    file_name: str
    label_map: np.ndarray
    confidence: float | None = None


def write_masks(kind: str, folder: Path, masks: Iterable[MaskRecord], class_names: Sequence[str]) -> Path:
    """
    Writes masks in one format, whole or not at all.

    COCO, Label Studio and CVAT get one run-length mask per image and class, for a label map knows no objects; YOLO gets
    one polygon per connected part, with holes joined to their outline ([`~synernet_hf.mask_encodings.outlines`]). Undecided pixels are
    left out of COCO and YOLO, and have a label of their own in Label Studio and CVAT.

    Args:
        kind (`str`): `"coco"` (`coco.json`), `"yolo"` (`yolo/data.yaml`, `yolo/labels/`), `"labelstudio"`
            (`label_studio.json`, tasks with predictions, and the labelling setup `label_studio.xml`) or `"cvat"`
            (`cvat.zip`, "CVAT for images 1.1").
        folder (`Path`): Where to.
        masks (`Iterable[MaskRecord]`): Read once.
        class_names (`Sequence[str]`): K names, background first.

    Returns:
        `Path`: What was written.

    Raises:
        ValueError: There is no such format.
    """
    if kind not in EXPORTS:
        raise ValueError(f"There is no mask format {kind!r}; one of {', '.join(EXPORTS)} is expected.")
    path, names = folder / EXPORTS[kind], list(class_names)
    if kind == "yolo":
        temporary = folder / ".yolo.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            _write_yolo(temporary, masks, names)
            replace_folder(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return path
    if kind == "cvat":
        replace_file(path, lambda file: _write_archive(file, _cvat_lines(masks, names)))
        return path
    lines = _coco_lines if kind == "coco" else _label_studio_lines
    replace_file(path, lambda file: _write_lines(file, lines(masks, names)))
    if kind == "labelstudio":
        replace_file(folder / LABEL_STUDIO_CONFIG, lambda file: _write_lines(file, _label_studio_config(names)))
    return path


def read_masks(
    source: Path, class_names: Sequence[str], find: Callable[[str, str], dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], np.ndarray, bool]]:
    """
    Reads masks back: a file or folder in one of the formats, also as an archive (`.zip`), or a folder of PNG files.

    Beside run-length masks, polygons are drawn. Of Label Studio, tasks with a finished annotation count.

    Args:
        source (`Path`): The file or folder.
        class_names (`Sequence[str]`): K names, background first.
        find (`Callable[[str, str], dict]`): Takes the name of an image in the source and where it stands; gives what is
            known of the image, `width` and `height` at least, or raises.

    Returns:
        `Iterator[tuple[dict, np.ndarray, bool]]`: what `find` gave, the label map, and whether the source can tell
        undecided pixels from the background.

    Raises:
        ValueError: The source is in none of the formats, names a class that is not in the list, or holds a mask of
            another size than its image.
    """
    names = list(class_names)
    with _unpacked(source) as inner:
        kind, file = _kind_of(inner)
        read = {"coco": _read_coco, "yolo": _read_yolo, "labelstudio": _read_label_studio, "cvat": _read_cvat}
        try:
            yield from read.get(kind, _read_png)(file, source, names, find)
        except (AttributeError, ElementTree.ParseError, IndexError, KeyError, TypeError) as error:
            fault = f"{type(error).__name__}: {one_line(error)}"
            raise ValueError(
                f"{source} is not in the format {kind} that it looks like ({fault}): export it anew."
            ) from error


def _undecided(names: list[str]) -> str:
    """The label of undecided pixels, which no class has."""
    label = UNDECIDED
    while label in names:
        label += "_"
    return label


def _ids_in(label_map: np.ndarray, with_undecided: bool) -> list[int]:
    return [class_id for class_id in np.unique(label_map).tolist() if 0 < class_id < 255 + with_undecided]


def _class_id(label: str, names: list[str], place: str) -> int:
    if label == _undecided(names):
        return IGNORE_INDEX
    try:
        return class_index(clean_label(label), names)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_size(size: tuple[Any, Any], image: dict[str, Any], place: str) -> None:
    """Compares (width, height) with those of the image."""
    if tuple(map(int, size)) != (image["width"], image["height"]):
        raise ValueError(
            f"{place}: the mask is {size[0]}x{size[1]}, but the image is {image['width']}x{image['height']} (width x "
            "height): export it at the size of the image."
        )


def _drawn(parts: list[tuple[int, Any]], image: dict[str, Any], place: str) -> np.ndarray:
    """Draws (class id, COCO segmentation or array) in their order: `(height, width)` uint8."""
    label_map = np.zeros((image["height"], image["width"]), dtype=np.uint8)
    for class_id, part in parts:
        if not isinstance(part, np.ndarray):
            part = draw_objects([(1, part, place)], *label_map.shape)
        label_map[part > 0] = class_id
    return label_map


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def _write_archive(path: Path, lines: Iterable[str]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        entry = zipfile.ZipInfo("annotations.xml", ARCHIVE_TIME)
        entry.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(entry, "w", force_zip64=True) as file:
            file.writelines(f"{line}\n".encode() for line in lines)


@contextmanager
def _unpacked(source: Path) -> Iterator[Path]:
    if source.suffix.lower() != ".zip" or not source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(source) as archive:
                # absolute paths and `..` are left out
                archive.extractall(folder)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{source} is no archive ({error}): export it anew.") from error
        yield Path(folder)


def _kind_of(source: Path) -> tuple[str, Path]:
    """The format of a file or folder, and the file that holds the annotations."""
    if not source.exists():
        raise FileNotFoundError(f"There is no {source}: give the file or folder of the corrected masks.")
    files = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if not is_hidden(path.name)]
    found: dict[str, list[Path]] = {}
    for path in files:
        if path.name.lower() in ("data.yaml", "data.yml"):
            found.setdefault("yolo", []).append(path)
        elif path.suffix.lower() == ".xml":
            with path.open("rb") as file:
                if b"<annotations" in file.read(2000):
                    found.setdefault("cvat", []).append(path)
        elif path.suffix.lower() == ".json":
            with path.open("rb") as file:
                start = file.read(4000).lstrip(b"\xef\xbb\xbf \t\r\n")
            if start.startswith(b"[") or (b'"annotations"' in start or b'"images"' in start):
                found.setdefault("labelstudio" if start.startswith(b"[") else "coco", []).append(path)
    if not found and any(path.suffix.lower() == ".png" for path in files):
        return "png", source
    kinds = {kind: paths for kind, paths in found.items() if paths}
    if len(kinds) != 1 or len(next(iter(kinds.values()))) != 1:
        several = ", ".join(str(path.name) for paths in kinds.values() for path in paths)
        raise ValueError(
            f"{source} holds {'several annotation files (' + several + ')' if several else 'no masks'}: give one file of "
            "COCO, Label Studio or CVAT, a folder with data.yaml (YOLO) or a folder of PNG masks."
        )
    [(kind, [file])] = kinds.items()
    return kind, file


# COCO


def _coco_lines(masks: Iterable[MaskRecord], names: list[str]) -> Iterator[str]:
    categories = [
        {"id": class_id, "name": name, "supercategory": ""} for class_id, name in enumerate(names) if class_id
    ]
    yield f'{{"categories": {json.dumps(categories)},\n"annotations": ['
    images, number = [], 0
    for image_id, mask in enumerate(masks, start=1):
        height, width = mask.label_map.shape
        images.append({"id": image_id, "file_name": mask.file_name, "width": width, "height": height})
        for class_id in _ids_in(mask.label_map, with_undecided=False):
            runs = mask_utils.encode(np.asfortranarray(mask.label_map == class_id, dtype=np.uint8))
            annotation = {
                "id": (number := number + 1),
                "image_id": image_id,
                "category_id": class_id,
                "segmentation": {"size": [height, width], "counts": runs["counts"].decode("ascii")},
                "area": int(mask_utils.area(runs)),
                "bbox": mask_utils.toBbox(runs).tolist(),
                "iscrowd": 0,
            }
            yield f"{',' if number > 1 else ''}{json.dumps(annotation)}"
    yield f'],\n"images": {json.dumps(images)}}}'


def _read_coco(file: Path, source: Path, names: list[str], find: Callable) -> Iterator[tuple[dict, np.ndarray, bool]]:
    content = _json(file, source)
    ids = {
        entry["id"]: _class_id(entry["name"], names, f"{source}, category {entry['id']}")
        for entry in content["categories"]
    }
    parts: dict[Any, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        parts.setdefault(annotation["image_id"], []).append(annotation)
    for entry in content["images"]:
        place = f"{source}, image {entry['file_name']}"
        image = find(entry["file_name"], place)
        _check_size((entry["width"], entry["height"]), image, place)
        # tools mark masks as crowds; the largest lies below, as annotations say nothing about depth
        own = sorted(parts.get(entry["id"], ()), key=lambda annotation: -annotation.get("area", 0))
        drawn = [(ids[annotation["category_id"]], annotation["segmentation"]) for annotation in own]
        yield image, _drawn(drawn, image, place), IGNORE_INDEX in ids.values()


def _json(file: Path, source: Path) -> Any:
    try:
        return parse_json(read_text(file))
    except ValueError as error:
        raise ValueError(f"{source} is not valid JSON ({error}): export it anew.") from error


# YOLO


def _write_yolo(folder: Path, masks: Iterable[MaskRecord], names: list[str]) -> None:
    (folder / "labels").mkdir(parents=True)
    classes = "".join(f"  {class_id - 1}: {json.dumps(name)}\n" for class_id, name in enumerate(names) if class_id)
    text = f"# put the images into the folder images beside this file\ntrain: images\nval: images\nnames:\n{classes}"
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    for mask in masks:
        height, width = mask.label_map.shape
        lines = [
            " ".join([str(class_id - 1), *(f"{value:.6f}" for value in (outline / (width, height)).ravel())])
            for class_id in _ids_in(mask.label_map, with_undecided=False)
            for outline in outlines(mask.label_map == class_id)
        ]
        path = (folder / "labels" / mask.file_name).with_suffix(".txt")
        if path.exists():
            raise ValueError(
                f"Two images are called {Path(mask.file_name).with_suffix('')}: YOLO names labels after images without "
                "their suffix, so rename one of them."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_lines(path, lines)


def _read_yolo(file: Path, source: Path, names: list[str], find: Callable) -> Iterator[tuple[dict, np.ndarray, bool]]:
    import yaml

    try:
        listed = yaml.safe_load(read_text(file))["names"]
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: data.yaml is not YAML ({one_line(error)}).") from error
    listed = dict(enumerate(listed)) if isinstance(listed, list) else listed
    ids = {str(key): _class_id(str(name), names, f"{source}, data.yaml") for key, name in listed.items()}
    folder = file.parent / "labels"
    for path in sorted(folder.rglob("*.txt")):
        place = f"{source}, {path.name}"
        image = find(path.relative_to(folder).with_suffix("").as_posix(), place)
        parts = []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            class_id, *values = line.split()
            try:
                points = np.array(values, dtype=float).reshape(-1, 2) * (image["width"], image["height"])
            except ValueError:
                points = np.zeros((0, 2))
            if class_id not in ids or len(points) < 3:
                raise ValueError(
                    f"{place}, line {number}, is no class of data.yaml and three points or more: `0 x y x y x y …`."
                )
            parts.append((ids[class_id], [points.ravel().tolist()]))
        yield image, _drawn(parts, image, place), IGNORE_INDEX in ids.values()


# Label Studio


def _label_studio_lines(masks: Iterable[MaskRecord], names: list[str]) -> Iterator[str]:
    labels, separator = {**dict(enumerate(names)), IGNORE_INDEX: _undecided(names)}, "["
    for mask in masks:
        height, width = mask.label_map.shape
        results = [
            {
                "id": f"class-{class_id}",
                "type": "brushlabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "rle": pack_runs(mask.label_map == class_id),
                    "brushlabels": [labels[class_id]],
                },
            }
            for class_id in _ids_in(mask.label_map, with_undecided=True)
        ]
        prediction = {"model_version": "synernet_hf", "result": results}
        if mask.confidence is not None:
            prediction["score"] = mask.confidence
        image = f"/data/local-files/?d={quote(mask.file_name)}"
        yield separator + json.dumps({"data": {"image": image}, "predictions": [prediction]})
        separator = ","
    yield "]" if separator == "," else "[]"


def _label_studio_config(names: list[str]) -> Iterator[str]:
    yield '<View>\n  <Image name="image" value="$image" zoom="true"/>\n  <BrushLabels name="label" toName="image">'
    for class_id, name in [*list(enumerate(names))[1:], (IGNORE_INDEX, _undecided(names))]:
        yield f'    <Label value="{escape(name)}" background="{_colour(class_id)}"/>'
    yield "  </BrushLabels>\n</View>"


def _colour(class_id: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*voc_palette()[class_id].tolist())


def _read_label_studio(
    file: Path, source: Path, names: list[str], find: Callable
) -> Iterator[tuple[dict, np.ndarray, bool]]:
    for number, task in enumerate(_json(file, source), start=1):
        finished = [item for item in task.get("annotations") or () if not item.get("was_cancelled")]
        if not finished:
            continue
        place = f"{source}, task {task.get('id', number)}"
        data = task["data"]
        image = find(data.get("image") or next(value for value in data.values() if isinstance(value, str)), place)
        parts = []
        for result in finished[-1]["result"]:
            value, kind = result["value"], result["type"]
            if kind not in ("brushlabels", "polygonlabels"):
                continue
            _check_size((result["original_width"], result["original_height"]), image, place)
            if kind == "brushlabels":
                part = unpack_runs(value["rle"], image["height"], image["width"])
            else:
                scale = np.array([image["width"], image["height"]]) / 100
                part = [(np.array(value["points"], dtype=float) * scale).ravel().tolist()]
            parts += [(_class_id(label, names, place), part) for label in value[kind]]
        yield image, _drawn(parts, image, place), True


# CVAT for images 1.1


def _cvat_lines(masks: Iterable[MaskRecord], names: list[str]) -> Iterator[str]:
    labels = {**dict(enumerate(names)), IGNORE_INDEX: _undecided(names)}
    yield '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n<meta><task><labels>'
    for class_id, name in list(labels.items())[1:]:
        colour = _colour(class_id)
        yield f"<label><name>{escape(name)}</name><color>{colour}</color><type>any</type><attributes/></label>"
    yield "</labels></task></meta>"
    for number, mask in enumerate(masks):
        height, width = mask.label_map.shape
        yield f'<image id="{number}" name="{escape(mask.file_name)}" width="{width}" height="{height}">'
        for class_id in _ids_in(mask.label_map, with_undecided=True):
            part = mask.label_map == class_id
            rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
            box = part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            flat = np.r_[False, box.ravel()]
            changes = np.flatnonzero(flat[1:] != flat[:-1])
            runs = ", ".join(map(str, np.diff(changes, prepend=0, append=box.size).tolist()))
            yield (
                f'<mask label="{escape(labels[class_id])}" source="auto" occluded="0" rle="{runs}" left="{columns[0]}" '
                f'top="{rows[0]}" width="{box.shape[1]}" height="{box.shape[0]}" z_order="0"></mask>'
            )
        yield "</image>"
    yield "</annotations>"


def _read_cvat(file: Path, source: Path, names: list[str], find: Callable) -> Iterator[tuple[dict, np.ndarray, bool]]:
    for entry in ElementTree.parse(file).getroot().iter("image"):
        place = f"{source}, image {entry.get('name')}"
        image = find(entry.attrib["name"], place)
        _check_size((entry.attrib["width"], entry.attrib["height"]), image, place)
        parts = []
        for shape in sorted(entry, key=lambda shape: int(shape.get("z_order", 0))):
            if shape.tag == "polygon":
                points = [float(value) for point in shape.attrib["points"].split(";") for value in point.split(",")]
                parts.append((_class_id(shape.attrib["label"], names, place), [points]))
            elif shape.tag == "mask":
                part = _cvat_mask(shape.attrib, (image["height"], image["width"]), place)
                parts.append((_class_id(shape.attrib["label"], names, place), part))
        yield image, _drawn(parts, image, place), True


def _cvat_mask(shape: dict[str, str], size: tuple[int, int], place: str) -> np.ndarray:
    left, top, width, height = (int(float(shape[name])) for name in ("left", "top", "width", "height"))
    counts = [int(count) for count in shape["rle"].split(",")]
    fits = 0 <= left <= left + width <= size[1] and 0 <= top <= top + height <= size[0]
    if not fits or sum(counts) != width * height or min(counts) < 0:
        raise ValueError(f"{place}: a mask does not fill its box, or leaves the image: export it anew.")
    part = np.zeros(size, dtype=bool)
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    part[top : top + height, left : left + width] = values.reshape(height, width)
    return part


# PNG


def _read_png(folder: Path, source: Path, names: list[str], find: Callable) -> Iterator[tuple[dict, np.ndarray, bool]]:
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.[pP][nN][gG]"))
    for path in files:
        place = f"{source}, {path.name}"
        image = find(path.name if folder.is_file() else path.relative_to(folder).as_posix(), place)
        try:
            with Image.open(io.BytesIO(path.read_bytes())) as file:
                label_map = np.asarray(file)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{place} does not decode ({error}).") from error
        wrong = label_map.ndim != 2 or set(np.unique(label_map).tolist()) - {*range(len(names)), IGNORE_INDEX}
        if wrong:
            raise ValueError(
                f"{place} is no mask: a palette or grey image of the ids 0 to {len(names) - 1} and {IGNORE_INDEX} is "
                "expected, not of colours."
            )
        _check_size(label_map.shape[::-1], image, place)
        yield image, label_map.astype(np.uint8), True


__all__ = ["EXPORTS", "MaskRecord", "read_masks", "write_masks"]
