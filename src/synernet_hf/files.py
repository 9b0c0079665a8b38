"""Writes files completely or not at all, names them safely on every system, and tells paths from Hub ids."""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import tempfile
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


try:
    import fcntl
except ModuleNotFoundError:
    # Windows
    fcntl = None


IMAGE_SUFFIXES = set(".jpg .jpeg .jfif .jpe .jp2 .png .gif .bmp .webp .tif .tiff .pgm .ppm".split())
# what operating systems, archives and network drives leave beside the data; names with a dot are hidden as well
SYSTEM_NAMES = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
SYSTEM_NAMES |= {"__pycache__", "thumbs.db", "desktop.ini"}
# file systems allow 255; names of temporary files are longer
MAX_NAME_BYTES = 200
TEMPORARY_NAME = re.compile(r"\.(?P<name>.+)\.\d+\.tmp")
# names the process that writes into a folder
LOCK_FILE = ".lock"
# a process touches its lock so often, and is taken for ended by other machines after so long without
BEAT_SECONDS = 30.0
SILENCE_SECONDS = 600.0


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """
    Writes a file under a temporary name and renames it once it is on the disk, so that neither a reader nor a power cut
    leaves half a file.

    Args:
        path (`Path`): The file; its folder is created if needed.
        write (`Callable[[Path], Any]`): Called with the temporary path, `.NAME.PID.tmp` in the same folder. That file
            is removed if `write` fails.

    Raises:
        OSError: if the file cannot be written.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        # a full disk, of which only the number is told
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Gives a written folder its name once everything in it is on the disk; an older one of that name goes afterwards."""
    sync_files(temporary)
    old = folder.with_name(f"{folder.name}.old.tmp")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder that never looks like a whole one on the way."""
    old = folder.with_name(f"{folder.name}.old.tmp")
    os.replace(folder, old)
    shutil.rmtree(old)


def sync_files(folder: Path) -> None:
    """Waits until the folder and its files are on the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        _sync(path)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, on the disk too."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # network file systems that cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def digest_file(path: Path) -> str:
    """Returns the SHA-256 of a file's content, a `str` of 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def try_writing(folder: Path) -> None:
    """Writes a megabyte into a folder, or where it would be made, and removes it; `OSError` with the path if that fails."""
    folder = folder.absolute()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


class FolderInUse(ValueError):
    """Another process writes into a folder; the message says which, and what to do."""


@contextmanager
def hold_folder(
    folder: Path,
    is_main: bool = True,
    share: Callable[[str | None], str | None] | None = None,
    part: tuple[int, int] | None = None,
) -> Iterator[None]:
    """
    Makes a folder that no other process writes into meanwhile: the file `.lock` names this process by host, number and
    start. The lock of a process that ended without removing it, or ran before the machine started, does not count, nor
    does that of another machine which was not touched for ten minutes, as this process touches its own. Of processes that
    work together the main one holds the folder, and `share` hands them its text. With `part` (number, of how many) the
    holders of the other parts may write too. A folder that is still empty at the end is removed. `FolderInUse`, in all of
    them, if another process holds it.
    """
    lock, ended = folder / _lock_name(part), threading.Event()
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    problem = failure = None
    try:
        problem = _take(folder, part) if is_main else None
    except OSError as error:
        # told after the others, which wait for a word
        failure, problem = error, str(error)
    if share is not None:
        problem = share(problem)
    if failure is not None:
        raise failure
    if problem is not None:
        raise FolderInUse(problem)
    if is_main:
        threading.Thread(target=_beat, args=(lock, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        if is_main:
            lock.unlink(missing_ok=True)
            for parent in made:
                if parent.is_dir() and not any(parent.iterdir()):
                    parent.rmdir()


def _beat(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        with suppress(OSError):
            os.utime(lock)


def _lock_name(part: tuple[int, int] | None) -> str:
    return LOCK_FILE if part is None else f"{LOCK_FILE}-{part[0]}-of-{part[1]}"


def _locks(folder: Path, part: tuple[int, int] | None) -> list[Path]:
    """The locks in a folder that keep others from it, or from this part of it."""
    paths = sorted(folder.glob(f"{LOCK_FILE}*"))
    if part is None:
        return paths
    return [path for path in paths if path.name == _lock_name(part) or not path.name.endswith(f"-of-{part[1]}")]


def _take(folder: Path, part: tuple[int, int] | None) -> str | None:
    """Writes the lock of a folder, or returns what [`folder_in_use`] says."""
    make_folder(folder)
    path, pid = folder / _lock_name(part), os.getpid()
    own = {
        "host": _machine(),
        "pid": pid,
        "process": _process(pid),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with _one_at_a_time(folder):
        while True:
            problem = folder_in_use(folder, part)
            if problem is not None:
                return problem
            # of processes that have ended
            for ended in _locks(folder, part):
                ended.unlink(missing_ok=True)
            # a process of another machine may be faster
            with suppress(FileExistsError):
                file = path.open("x", encoding="utf-8")
                try:
                    with file:
                        file.write(json.dumps(own))
                    # an empty one, after a power cut or on a full disk, could not be judged
                    _sync(path)
                except OSError:
                    path.unlink(missing_ok=True)
                    raise
                return None


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """
    Lets the processes of this machine in one after another, where the system can: of two that find the lock of an ended
    process, the second one would remove that of the first.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # some file systems refuse
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def folder_in_use(folder: Path, part: tuple[int, int] | None = None) -> str | None:
    """Says which other process writes into a folder, or into this part of it, or returns `None`."""
    return next((problem for path in _locks(folder, part) if (problem := _holder(path)) is not None), None)


def _holder(path: Path) -> str | None:
    folder, holder = path.parent, None
    for _ in range(20):
        try:
            holder = json.loads(path.read_text(encoding="utf-8"))
            break
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError):
            # being written, unless it stays like that
            time.sleep(0.05)
    advice = f"wait until it ends, or remove {path} if it does not run any more."
    try:
        is_here = holder["host"] == _machine()
        if _process(holder["pid"]) != holder["process"] if is_here else _silence(path) > SILENCE_SECONDS:
            return None
        advice += "" if is_here else " Ten minutes after the last sign of another machine its lock does not count."
        return f"Process {holder['pid']} on {holder['host']} has been writing into {folder} since {holder['started']}: {advice}"
    except (KeyError, TypeError):
        return f"Another process is writing into {folder}: {advice}"


def _machine() -> str:
    """Name of the machine, and of the container where numbers of processes mean something else."""
    name = platform.node()
    with suppress(OSError):
        own = os.readlink("/proc/self/ns/pid")
        # the kernel's number of the namespace that a machine starts with
        name += "" if own == "pid:[4026531836]" else f" ({own})"
    return name


def _silence(path: Path) -> float:
    """Seconds since a lock was touched, by the clock of its file system."""
    try:
        with tempfile.TemporaryFile(dir=path.parent) as file:
            return os.fstat(file.fileno()).st_mtime - path.stat().st_mtime
    except OSError:
        return 0.0


def _process(pid: int) -> str | None:
    """Tells a process from later ones of its number, where the system does; `None` if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if state in "ZX" else f"{boot} {fields[18]}"
    if os.name != "nt":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
    return ""


def safe_file_names(names: Sequence[str], suffix: str) -> list[str]:
    """
    Turns names into relative paths that stay different on every file system.

    Args:
        names (`Sequence[str]`): Different names; a slash makes a folder.
        suffix (`str`): Ends every path, such as `".png"`.

    Returns:
        `list[str]`: a path for each name: the name itself where it is harmless. Characters and words that a system
        reserves, `.` and `..` are percent-encoded; long parts are cut; names that differ in case or in Unicode
        composition only end in a digest of the name.
    """
    paths = ["/".join(map(_safe_part, name.split("/"))) for name in names]
    # a folder is never called like a file
    paths = [re.sub(f"(?i)[.]({suffix[1:]})/", r"%2E\1/", path) for path in paths]
    keys = [unicodedata.normalize("NFC", path).casefold() for path in paths]
    counts = Counter(keys)
    digests = [f"~{_digest(name)}" if counts[key] > 1 else "" for name, key in zip(names, keys, strict=True)]
    return [f"{path}{digest}{suffix}" for path, digest in zip(paths, digests, strict=True)]


def _safe_part(part: str) -> str:
    """A name of a file or folder that Windows, macOS and Linux take; the same for no two parts."""
    encoded = [
        character if character.isprintable() and character not in '<>:"\\|?*%' else _percent(character)
        for character in part
    ]
    if re.match(r"(?i)([.]|(con|prn|aux|nul|com\d|lpt\d)([.]|$))", part):
        encoded[0] = _percent(part[0])
    if part[-1:] in (".", " "):
        encoded[-1] = _percent(part[-1])
    # an empty part is one too
    safe = "".join(encoded) or "%"
    if len(safe.encode()) <= MAX_NAME_BYTES:
        return safe
    return f"{safe.encode()[: MAX_NAME_BYTES - 9].decode(errors='ignore')}~{_digest(part)}"


def _percent(character: str) -> str:
    return "".join(f"%{value:02X}" for value in character.encode("utf-8", "surrogatepass"))


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file as [`replace_file`] does."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """
    Writes mappings, lists, text and numbers to a JSON file as [`replace_file`] does. NaN and infinities, which JSON
    lacks, become `null`.
    """
    write_text(path, json.dumps(finite(data), indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Reads the content of a JSON file; `ValueError` if the file is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}).") from error


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system, not to the data."""
    return name.startswith(".") or name.lower() in SYSTEM_NAMES


def is_hub_id(name: Any) -> bool:
    """
    Tells a Hub id from a path.

    Args:
        name (`Any`): Text or anything else.

    Returns:
        `bool`: whether it reads `owner/name` and nothing of that name is on disk.
    """
    return isinstance(name, str) and bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not Path(name).exists()


def missing_extra(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Returns the error to raise where a package of an optional extra is not installed: it says what to install."""
    sentence = (
        f"The package {error.name} is not installed: install the extra `{extra}` of synernet_hf, in a clone of its "
        f'repository with `pip install -e ".[{extra}]"`.'
    )
    return ModuleNotFoundError(sentence, name=error.name)


def one_line(error: BaseException | str) -> str:
    """Returns a `str`: the message of an error, or a text, without line breaks."""
    return " ".join(str(error).split())


def finite(data: Any) -> Any:
    """Returns data as JSON gives it back: keys are text, tuples lists, and NaN and infinities `None`."""
    if isinstance(data, Mapping):
        return {str(key): finite(item) for key, item in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(item) for item in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


__all__ = [
    "IMAGE_SUFFIXES",
    "LOCK_FILE",
    "TEMPORARY_NAME",
    "FolderInUse",
    "digest_file",
    "finite",
    "folder_in_use",
    "hold_folder",
    "is_hidden",
    "is_hub_id",
    "make_folder",
    "missing_extra",
    "one_line",
    "read_json",
    "remove_folder",
    "replace_file",
    "replace_folder",
    "safe_file_names",
    "sync_files",
    "try_writing",
    "write_json",
    "write_text",
]
