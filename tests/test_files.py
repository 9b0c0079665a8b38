"""Files are written whole or not at all."""

import errno
import json
import math
import unicodedata
from pathlib import PureWindowsPath

import pytest

from synernet_hf.files import TEMPORARY_NAME, read_json, replace_file, safe_file_names, write_json, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "scores.json"
    write_json(path, {1: (0.5, math.nan, -math.inf), "name": "ä"})
    assert read_json(path) == {"1": [0.5, None, None], "name": "ä"}
    write_text(path, "{}")
    assert read_json(path) == {}
    assert [entry.name for entry in path.parent.iterdir()] == ["scores.json"]


def test_a_failing_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "scores.json"
    write_json(path, [1])
    seen = []

    def fails(temporary):
        temporary.write_text("half")
        seen.append(temporary)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fails)
    assert json.loads(path.read_text()) == [1]
    assert [entry.name for entry in tmp_path.iterdir()] == ["scores.json"]
    assert seen[0].parent == tmp_path
    assert TEMPORARY_NAME.fullmatch(seen[0].name)["name"] == "scores.json"


@pytest.mark.parametrize("content", [None, "{", b"\xff"])
def test_an_unreadable_file_is_named(tmp_path, content):
    path = tmp_path / "scores.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"scores\.json cannot be read"):
        read_json(path)


NAMES = """a ./a A cats/1 a//b . .. ../x /x CON con.txt nul/x com1.a COMET .hidden a.png/b a:b a\\b a%5Cb a~b a?b x. x""".split()
NAMES += [
    "",
    " ",
    "x ",
    "two words",
    "tab\there",
    "été",
    "e\u0301te\u0301",
    "é" * 300,
    "é" * 299 + "x",
    "犬",
    "\udcff",
]


def test_names_get_files_of_their_own_on_every_system(tmp_path):
    paths = safe_file_names(NAMES, ".png")
    assert dict(zip(NAMES, paths, strict=True)) | {
        "cats/1": "cats/1.png",
        "犬": "犬.png",
        "COMET": "COMET.png",
    } == dict(zip(NAMES, paths, strict=True))
    # alike on file systems that know no case and one form of Unicode
    assert len({unicodedata.normalize("NFC", path).casefold() for path in paths}) == len(NAMES)
    parts = [part for path in paths for part in path.split("/")]
    for part in parts:
        assert part and part.isprintable() and not set(part) & set('<>:"\\|?*')
        assert not part.startswith(".") and part[-1] not in " ." and len(part.encode()) <= 220
        assert PureWindowsPath(part).stem.split(".")[0].upper() not in {"CON", "NUL", "COM1"}
    folders = {part.casefold() for path in paths for part in path.split("/")[:-1]}
    assert not folders & {path.split("/")[-1].casefold() for path in paths}
    for number, path in enumerate(paths):
        write_text(tmp_path / path, str(number))
    assert [(tmp_path / path).read_text() for path in paths] == [str(number) for number in range(len(paths))]
    assert all(tmp_path in (tmp_path / path).resolve().parents for path in paths)
    # a name that nothing collides with keeps its path whatever the others are
    assert safe_file_names(["cats/1"], ".png") == ["cats/1.png"]


def test_what_a_disk_refuses_without_a_name_gets_that_of_the_file(tmp_path):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as error:
        replace_file(tmp_path / "mask.png", full)
    assert error.value.filename == str(tmp_path / "mask.png") and error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())
