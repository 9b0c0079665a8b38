"""Where images and masks lie on disk, and what they are called."""

import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff"}
MASK_FOLDER = "masks"


def image_name(path: str) -> str:
    """
    The identifier in a file name or path: `"2007_000032"` of `"/JPEGImages/2007_000032.jpg"` and of `"2007_000032"`.
    """
    name = path.strip().replace("\\", "/").rsplit("/", 1)[-1]
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGE_SUFFIXES else name


def unique_ids(paths: Sequence[str], root: str | Path) -> list[str]:
    """Names files: by file name without suffix, or where two share it, by their path below `root`, without slashes."""
    stems = [image_name(path) for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    relative = [os.path.relpath(path, root).replace(os.sep, "/") for path in paths]
    without = [path.rsplit(".", 1)[0] for path in relative]
    # names may hold underscores: more of them than any name has tell all paths apart
    longest = max(len(run) for path in relative for run in re.findall("_*", path))
    for number in range(2, max(longest + 2, 3)):
        for names in (without, relative):
            ids = [name.replace("/", "_" * number) for name in names]
            if len(set(ids)) == len(ids):
                return ids
    return ids


def first_file(candidates: Iterable[Path]) -> str | None:
    """The first of several places where a file is, `None` where there is none."""
    return next((str(path) for path in candidates if path.is_file()), None)


class ImageIndex:
    """
    The images below a folder, found by path, file name or name without suffix.

    Args:
        folder (`Path`): The folder; its subfolder `masks` and hidden files are not looked into.
        left_out (`Iterable[str]`, *optional*): Paths below the folder that are no images, such as masks.

    Attributes:
        paths (`list[str]`): below the folder, sorted.
        by_key (`dict[str, list[str]]`): paths by path, file name and name without suffix.
    """

    def __init__(self, folder: Path, left_out: Iterable[str] = ()) -> None:
        self.folder = folder
        self.paths: list[str] = []
        self.by_key: dict[str, list[str]] = {}
        left_out = {posixpath.normpath(path.replace("\\", "/")) for path in left_out}
        for parent, folders, files in os.walk(folder):
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != MASK_FOLDER)
            below = Path(parent).relative_to(folder).as_posix()
            for file in sorted(files):
                path = file if below == "." else f"{below}/{file}"
                is_image = not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES
                if is_image and path not in left_out:
                    self.paths.append(path)
                    for key in {path, file, image_name(file)}:
                        self.by_key.setdefault(key, []).append(path)
        masks = [f"{os.path.splitext(path)[0]}.png" for path in self.paths]
        self.mask_paths = Counter(masks)
        self.mask_names = Counter(posixpath.basename(mask) for mask in masks)

    def find(self, name: str) -> str | None:
        """
        The file of a path below the folder, an absolute path, a file name or a name without suffix; `None` where there
        is none.

        Raises `ValueError` if several images have that name. The message is a predicate: the caller says where.
        """
        name = posixpath.normpath(name.strip().replace("\\", "/"))
        if Path(name).is_absolute():
            inside = os.path.relpath(name, self.folder).replace(os.sep, "/")
            if inside not in self.by_key.get(inside, []):
                return first_file([Path(name)])
            name = inside
        found = self.by_key.get(name, [])
        if len(found) > 1 and name not in found:
            raise ValueError(f"names {name!r}, which may be {' or '.join(found[:3])}: write the path")
        chosen = name if name in found else next(iter(found), None)
        return None if chosen is None else str(self.folder / chosen)

    def mask_of(self, image: str) -> str | None:
        """
        The mask of an image in the subfolder `masks`, `None` where there is none.

        It is the PNG file under the path of the image or else under its bare name, unless it might just as well be
        that of another image.
        """
        path = Path(os.path.relpath(image, self.folder)).with_suffix(".png")
        masks = self.folder / MASK_FOLDER
        candidates = (
            (masks / path, self.mask_paths[path.as_posix()]),
            (masks / path.name, self.mask_names[path.name]),
        )
        return first_file(mask for mask, sharing in candidates if sharing <= 1)


__all__ = ["IMAGE_SUFFIXES", "MASK_FOLDER", "ImageIndex", "first_file", "image_name", "unique_ids"]
