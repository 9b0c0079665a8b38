"""Writes tiny data folders in the layouts of the public benchmarks, for tests."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image


VOC_NAMES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
DEVKIT_CLASSES = ("cat", "dog", "person")


@dataclass
class Devkit:
    """A devkit on disk: `root` is the VOCdevkit folder, `labels` the class names of each image."""

    root: Path
    labels: dict[str, list[str]]
    train_ids: list[str]
    validation_ids: list[str]

    @property
    def voc(self) -> Path:
        return self.root / "VOC2012"


def write_voc_devkit(
    folder: Path,
    num_train: int = 6,
    num_validation: int = 3,
    size: tuple[int, int] = (48, 40),
    train_list: str = "train_aug",
    seed: int = 0,
) -> Devkit:
    """
    Writes `VOCdevkit/VOC2012` below `folder`: noisy JPEGs with one coloured rectangle for each class, palette masks
    in SegmentationClassAug for every image, XML annotations, and the lists `train_list` and `val`.

    `size` is (width, height) in pixels; images hold one or two of the classes cat, dog and person.
    """
    rng = np.random.default_rng(seed)
    voc = folder / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "SegmentationClassAug", "Annotations", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    ids = [f"2007_{index:06d}" for index in range(num_train + num_validation)]
    labels = {}
    for index, image_id in enumerate(ids):
        first = DEVKIT_CLASSES[index % len(DEVKIT_CLASSES)]
        second = DEVKIT_CLASSES[(index + 1) % len(DEVKIT_CLASSES)]
        labels[image_id] = [first, second] if index % 2 else [first]
        image, mask = draw_image(labels[image_id], size, rng)
        Image.fromarray(image).save(voc / "JPEGImages" / f"{image_id}.jpg", quality=90)
        save_mask(mask, voc / "SegmentationClassAug" / f"{image_id}.png")
        write_annotation(voc / "Annotations" / f"{image_id}.xml", labels[image_id])
    lists = {train_list: ids[:num_train], "val": ids[num_train:]}
    for name, members in lists.items():
        (voc / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("".join(f"{member}\n" for member in members))
    return Devkit(voc.parent, labels, lists[train_list], lists["val"])


def draw_image(names: list[str], size: tuple[int, int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image `(H, W, 3)` uint8 and mask `(H, W)` uint8 (VOC ids, a rim of 255), classes side by side."""
    width, height = size
    image = rng.integers(60, 120, (height, width, 3), dtype=np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    share = width // len(names)
    for place, name in enumerate(names):
        rows, columns = slice(height // 4, -height // 4), slice(place * share + 3, (place + 1) * share - 3)
        mask[height // 4 - 1 : -height // 4 + 1, place * share + 2 : (place + 1) * share - 2] = 255
        mask[rows, columns] = VOC_NAMES.index(name)
        image[rows, columns] = 40
        image[rows, columns, DEVKIT_CLASSES.index(name)] = 220
    return image, mask


def save_images(root: Path, *paths: str) -> None:
    """Saves one plain image at each path below `root`."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 5), (200, 60, 40)).save(root / path)


def save_plain_mask(path: Path, value: int) -> None:
    """Saves a mask of one id, of the size of [`save_images`]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((5, 6), value, dtype=np.uint8)).save(path)


def save_mask(mask: np.ndarray, path: Path) -> None:
    """Saves ids as a palette PNG, as the benchmark does."""
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)


def write_annotation(path: Path, names: list[str]) -> None:
    """Writes the XML of one image: an object for each name, the first twice, each with a part."""
    root = ElementTree.Element("annotation")
    for name in [*names, *names[:1]]:
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = name
        part = ElementTree.SubElement(node, "part")
        ElementTree.SubElement(part, "name").text = "head"
    ElementTree.ElementTree(root).write(path)


def label_matrix(labels: dict[str, list[str]], class_names: list[str] = VOC_NAMES) -> np.ndarray:
    """Multi-hot `(N, C)` uint8 in the order of the dictionary."""
    return np.array([[name in names for name in class_names[1:]] for names in labels.values()], dtype=np.uint8)


def ids_of(vectors) -> list[list[int]]:
    """Label ids of multi-hot rows."""
    return [np.flatnonzero(vector).tolist() for vector in vectors]


def vectors_of(loaded, split: str = "train") -> list[list[int]]:
    """Labels of a split as multi-hot rows, which show what is there and what is not."""
    num_classes = len(loaded[split].features["labels"].feature.names)
    return [[int(label in ids) for label in range(num_classes)] for ids in loaded[split]["labels"][:]]


def write_labels_npz(path: Path, labels: dict[str, list[str]]) -> Path:
    """`ids` and `labels`, as in the public label files of the field."""
    np.savez(path, ids=np.array(list(labels)), labels=label_matrix(labels))
    return path


def write_labels_json(path: Path, labels: dict[str, list[str]], multi_hot: bool = False) -> Path:
    """Identifier to names, or to a multi-hot list."""
    vectors = dict(zip(labels, label_matrix(labels).tolist(), strict=True))
    path.write_text(json.dumps(vectors if multi_hot else labels))
    return path


def write_labels_csv(path: Path, labels: dict[str, list[str]], separator: str = " ") -> Path:
    """Two columns: identifier, and the names joined by `separator`."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", "labels"])
        writer.writerows([image_id, separator.join(names)] for image_id, names in labels.items())
    return path


def write_labels_csv_multi_hot(path: Path, labels: dict[str, list[str]], class_names: list[str] = VOC_NAMES) -> Path:
    """Identifier and one column for each foreground class, in the order of `class_names[1:]`, with a header."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image_id", *class_names[1:]])
        rows = zip(labels, label_matrix(labels, class_names).tolist(), strict=True)
        writer.writerows([f"{image_id}.jpg", *row] for image_id, row in rows)
    return path
