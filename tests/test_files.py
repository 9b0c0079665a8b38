"""Files are written whole or not at all."""

import json
import math

import pytest

from synernet_hf.files import TEMPORARY_NAME, read_json, replace_file, write_json, write_text


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
