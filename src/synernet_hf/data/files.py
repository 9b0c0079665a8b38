"""Text files, and images and masks on disk: how they are read, found and named."""

import json
import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import unquote

from synernet_hf.files import IMAGE_SUFFIXES, is_hidden


MASK_FOLDER = "masks"
WEB_NAME = re.compile(r"(https?|s3|gs):/|/data/(upload|local-files)/")


def read_text(path: Path) -> str:
    """
    Reads UTF-8 with or without a byte order mark, or UTF-16 by its mark. Line ends become `\\n`.

    Raises `ValueError` that names the line where the file is neither.
    """
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
        fault = "a NUL character" if "\0" in text else None
        before = text[: text.index("\0")] if fault else ""
    except UnicodeDecodeError as error:
        fault = f"byte 0x{content[error.start]:02x}"
        before = content[: error.start].decode(encoding, errors="replace")
    if fault:
        line = len(re.findall(r"\r\n?|\n", before)) + 1
        raise ValueError(
            f"{path}, line {line}, is not UTF-8 text ({fault}): save the file as UTF-8, or as UTF-16 with a byte "
            "order mark."
        )
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def parse_json(text: str, reduce: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """
    Reads JSON; `reduce` says what is kept of each object. Raises `ValueError` that says what is wrong, also where an
    object has a key twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        found = dict(pairs)
        if len(found) < len(pairs):
            [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"the key {repeated[:80]!r} stands twice in one object")
        return found if reduce is None else reduce(found)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def image_name(path: str) -> str:
    """
    The identifier in a file name or path: `"2007_000032"` of `"/JPEGImages/2007_000032.jpg"` and of `"2007_000032"`.
    """
    name = normalize("NFC", path).strip().replace("\\", "/").rsplit("/", 1)[-1]
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


class ImageIndex:
    """
    The files with an image's suffix below a folder, found by any spelling of their names: with or without folder and
    suffix, with either separator, in any case and any Unicode form.

    Args:
        folder (`Path`): The folder; hidden and system files are left out.
        left_out (`Iterable[str]`, *optional*): Paths below the folder that are not images, such as masks.
        with_masks (`bool`, *optional*, defaults to `False`): Includes the subfolders `masks`.
        allow_outside (`bool`, *optional*, defaults to `False`): Also finds files whose paths lead out of the folder.

    Attributes:
        paths (`list[str]`): below the folder, file names in alphabetical order.
        links (`list[str]`): what to tell about folders that are links: those that lead out of the folder, and those
            left out because the folder was entered before.

    Raises:
        ValueError: An image is a named pipe, a device or a socket.
    """

    def __init__(
        self, folder: Path, left_out: Iterable[str] = (), with_masks: bool = False, allow_outside: bool = False
    ) -> None:
        self.folder = folder
        # quicker than a Path for each file
        self._start = str(folder / "_")[:-1]
        self.allow_outside = allow_outside
        self.paths: list[str] = []
        self.links: list[str] = []
        self._by_key: dict[str, list[str]] = {}
        self._claimed: dict[str, str] = {}
        left_out = {_clean(path).casefold() for path in left_out}
        entered: dict[str, str] = {}
        for parent, folders, files in os.walk(folder, followlinks=True):
            # links are followed, but not in circles
            real, below = os.path.realpath(parent), Path(parent).relative_to(folder).as_posix()
            is_new = real not in entered
            if not is_new:
                self.links.append(f"{below} is left out, the same folder as {entered[real]}")
            elif os.path.islink(parent) and entered and not self._holds(real):
                self.links.append(f"{below} leads to {real}")
            entered.setdefault(real, below)
            folders[:] = sorted(
                name
                for name in folders
                if is_new and not is_hidden(name) and (with_masks or name.lower() != MASK_FOLDER)
            )
            for file in sorted(files) if is_new else ():
                path = file if below == "." else f"{below}/{file}"
                if is_hidden(file) or os.path.splitext(file)[1].lower() not in IMAGE_SUFFIXES:
                    continue
                names = [name.casefold() for name in _spellings(path)]
                if names[0] not in left_out:
                    _check_kind(os.path.join(parent, file))
                    self.paths.append(path)
                    for key in set(names):
                        self._by_key.setdefault(key, []).append(path)

    def find(self, name: str) -> str | None:
        """
        The file of a path below the folder, an absolute path, a file name or a name without suffix; `None` where there
        is none. Folders before the folder's own name are left out, as in paths of another computer, and so is all but
        the name in a URL, with the prefix that Label Studio gives to what is uploaded.

        Raises `ValueError` if several images have that name, or if it leads out of the folder. The message is a
        predicate: the caller says where.
        """
        name = _clean(name)
        if os.path.isabs(name):
            inside = _clean(os.path.relpath(name, self.folder))
            name = name if inside.startswith("../") else inside
        found = self._lookup(name)
        if found is not None:
            return self._start + found.replace("/", os.sep)
        file = os.path.join(self.folder, name)
        # false for a name that is too long for one
        if os.path.isfile(file):
            is_outside = (name.startswith("../") or os.path.isabs(name)) and not self._holds(file)
            if is_outside and not self.allow_outside:
                raise ValueError(
                    f"names {name!r}, which lies outside of {self.folder}: move it there, or have a table's files taken "
                    "from anywhere with dataset_options '{\"allow_outside\": true}'"
                )
            return file
        parts = name.split("/")
        for cut in range(1, len(parts)):
            # a bare name in a folder without subfolders may come from any folder, but from one only
            is_own = parts[cut - 1].casefold() in (self.folder.name.casefold(), "..")
            is_bare = cut == len(parts) - 1 and not self._has_folders
            if found is None and (is_own or is_bare):
                at = self._at("/".join(parts[cut:]))
                found = at[0] if len(at) == 1 else None
                if found and not is_own and self._claimed.setdefault(found, name) != name:
                    raise ValueError(
                        f"names {name!r}, and so does {self._claimed[found]!r}, but there is one image {found} only: "
                        "write the paths as they are"
                    )
        if found is None and WEB_NAME.match(name):
            local = unquote(name.rpartition("?d=")[2].split("?")[0])
            last = posixpath.basename(local)
            spellings = dict.fromkeys((local, last, re.sub("^[0-9a-f]{8}-", "", last)))
            found = next(filter(None, map(self._lookup, spellings)), None)
        return None if found is None else str(self.folder / found)

    def find_first(self, names: Iterable[str], place: str) -> str | None:
        """The first of several names that is an image; `place` begins the sentence of an error."""
        try:
            return next(filter(None, map(self.find, names)), None)
        except ValueError as error:
            raise ValueError(f"{place}, {error}.") from error

    def mask_of(self, image: str) -> str | None:
        """
        The mask of an image in the subfolder `masks`, `None` where there is none.

        It has the path of the image or else its bare name, with any suffix, unless it could also belong to
        another image.
        """
        if self._masks is None:
            return None
        path = os.path.splitext(_clean(os.path.relpath(image, self.folder)))[0]
        name = posixpath.basename(path)
        for spelling, sharing in ((path, self._at(path)), (name, self._at(name, of_path=False))):
            masks = self._masks._at(spelling) if len(sharing) <= 1 else []
            # of several, one that is stored without loss
            masks.sort(key=lambda mask: not mask.lower().endswith(".png"))
            if masks:
                return str(self._masks.folder / masks[0])
        return None

    def _holds(self, path: str) -> bool:
        """Whether a file or folder lies below the folder, where links lead."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder))

    @cached_property
    def _masks(self) -> "ImageIndex | None":
        folder = find_folder(self.folder, MASK_FOLDER)
        return None if folder is None else ImageIndex(folder, with_masks=True)

    @cached_property
    def _has_folders(self) -> bool:
        return any("/" in path for path in self.paths)

    def _lookup(self, name: str) -> str | None:
        found = self._by_key.get(name.casefold(), [])
        if len(found) == 1:
            return found[0]
        # the same path comes before a name in other folders, the same case before another one
        for kept in (
            [path for path in found if _clean(path) == name],
            [path for path in found if name in _spellings(path)],
            found,
        ):
            if len(kept) == 1:
                return kept[0]
        if found:
            raise ValueError(f"names {name!r}, which may be {' or '.join(found[:3])}: write the path")
        return None

    def _at(self, name: str, of_path: bool = True) -> list[str]:
        """Images with this path (else this file name), with any suffix where `name` has none; in the same case where possible."""
        spelled = [
            (path, _spellings(path)[:2] if of_path else _spellings(path)[2:])
            for path in self._by_key.get(name.casefold(), [])
        ]
        same = [path for path, names in spelled if name in names]
        return same or [path for path, names in spelled if name.casefold() in [other.casefold() for other in names]]


def _check_kind(path: str) -> None:
    """Refuses what never ends or blocks when it is read; a broken link is told as a missing file later."""
    if not os.path.isfile(path) and os.path.exists(path):
        raise ValueError(f"{path} is a named pipe, a device, a socket or a folder, no image: take it out.")


def find_folder(parent: Path, name: str) -> Path | None:
    """The subfolder of a name in any case, `None` where there is none."""
    if (parent / name).is_dir():
        return parent / name
    found = [path for path in parent.iterdir() if path.name.lower() == name.lower() and path.is_dir()]
    return found[0] if found else None


def _clean(path: str) -> str:
    return posixpath.normpath(normalize("NFC", path).strip().replace("\\", "/"))


def _spellings(path: str) -> tuple[str, str, str, str]:
    """A path below the folder with and without suffix, and its last part with and without suffix."""
    path = _clean(path)
    without = os.path.splitext(path)[0]
    return path, without, posixpath.basename(path), posixpath.basename(without)


__all__ = [
    "IMAGE_SUFFIXES",
    "MASK_FOLDER",
    "ImageIndex",
    "find_folder",
    "image_name",
    "is_hidden",
    "parse_json",
    "read_text",
    "unique_ids",
]
