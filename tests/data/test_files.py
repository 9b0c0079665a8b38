"""Text in usual encodings; images and masks by any spelling of their names; names of splits and of the background."""

import unicodedata

import pytest
from devkit_utils import save_images

from synernet_hf.data.files import ImageIndex, parse_json, read_text, unique_ids
from synernet_hf.data.schema import background_first, choose_splits, split_meaning


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_of_every_usual_encoding_reads_the_same(tmp_path, encoding, end):
    (tmp_path / "list.txt").write_bytes(f"été{end}b\u2028c{end}".encode(encoding))
    assert read_text(tmp_path / "list.txt") == "été\nb\u2028c\n"
    (tmp_path / "big.txt").write_bytes(b"\xfe\xff" + "été".encode("utf-16-be"))
    assert read_text(tmp_path / "big.txt") == "été"


@pytest.mark.parametrize(
    ("content", "line", "fault"),
    [
        ("a\r\nb\r\nbébé".encode("latin-1"), 3, "byte 0xe9"),
        ("a\rb\n".encode("utf-16-le"), 1, "a NUL character"),
        ("a\nb\n".encode("utf-32"), 1, "a NUL character"),
        (b"\xff\xfea\x00\n\x00b", 2, "byte 0x62"),
    ],
    ids=["latin1", "utf16_without_mark", "utf32", "cut"],
)
def test_other_text_is_refused_with_file_and_line(tmp_path, content, line, fault):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list.txt, line {line}, is not UTF-8 text \({fault}\): save the file as"):
        read_text(tmp_path / "list.txt")


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("more/a b.JPEG", ["more/a b.JPEG", "more\\a b.jpeg", "a b.jpeg", "a b", "./more//a b", "A B.jpeg", " a b "]),
        ("b.PNG", ["b.png", "b", ".\\b.PNG", "../pets/b.png", "C:\\home\\pets\\b.png", "/elsewhere/pets/b"]),
        (unicodedata.normalize("NFD", "été.jpg"), ["été.jpg", unicodedata.normalize("NFD", "été"), "ÉTÉ.JPG"]),
        (unicodedata.normalize("NFC", "über/é.jpg"), [unicodedata.normalize("NFD", "über/é")]),
        ("c.jpg", ["images/c.jpg", "images\\C"]),
    ],
)
def test_an_image_is_found_by_every_spelling_of_its_name(tmp_path, file, names):
    root = tmp_path / "pets"
    save_images(root, file)
    for name in [*names, str(root / file)]:
        assert ImageIndex(root).find(name) == str(root / file), name
    assert ImageIndex(root).find("other.jpg") is None


def test_an_image_is_never_taken_for_another(tmp_path):
    save_images(tmp_path, "cat/1.jpg", "dog/1.jpg", "dog/2.jpg", "A.jpg", "a.jpg", "a.png")
    index = ImageIndex(tmp_path)
    assert index.find("cow/1.jpg") is index.find("cat/2.jpg") is index.find("x/A.jpg") is None
    assert [index.find(name) for name in ("A", "a.jpg", "A.jpg")] == [
        str(tmp_path / name) for name in ("A.jpg", "a.jpg", "A.jpg")
    ]
    with pytest.raises(ValueError, match="names '1.jpg', which may be cat/1.jpg or dog/1.jpg: write the path"):
        index.find("1.jpg")
    with pytest.raises(ValueError, match="names 'a', which may be"):
        index.find("a")
    # a flat folder: the folder in a name is ignored, but two names are not one image
    save_images(tmp_path / "flat", "1.jpg")
    flat = ImageIndex(tmp_path / "flat")
    assert flat.find("cat/1.jpg") == flat.find("cat/1.jpg") == str(tmp_path / "flat" / "1.jpg")
    assert flat.find("/home/flat/1.jpg") == flat.find("D:\\flat\\1.jpg") == str(tmp_path / "flat" / "1.jpg")
    with pytest.raises(ValueError, match="names 'dog/1.jpg', and so does 'cat/1.jpg', but there is one image 1.jpg"):
        flat.find("dog/1.jpg")


def test_hidden_and_system_files_are_no_images(tmp_path):
    save_images(tmp_path, "a.jpg", "__MACOSX/b.jpg", ".git/c.jpg", "@eaDir/d.jpg", "._a.jpg", "Masks/a.png")
    assert ImageIndex(tmp_path).paths == ["a.jpg"]
    assert ImageIndex(tmp_path, with_masks=True).paths == ["a.jpg", "Masks/a.png"]
    # a file that is named by its path is taken where it lies, if it may lie there
    assert ImageIndex(tmp_path / "Masks", allow_outside=True).find("../a.jpg")
    with pytest.raises(ValueError, match="names '../a.jpg', which lies outside of .*Masks: move it there, or have"):
        ImageIndex(tmp_path / "Masks").find("../a.jpg")


@pytest.mark.parametrize("mask", ["masks/more/a.PNG", "masks/a.png", "Masks/A.png", "masks/more/a.tif"])
def test_a_mask_is_found_as_an_image_is(tmp_path, mask):
    save_images(tmp_path, "more/a.JPG", "b.jpg", mask)
    index = ImageIndex(tmp_path)
    assert index.mask_of(index.find("a")) == str(tmp_path / mask)
    assert index.mask_of(index.find("b")) is None


def test_identifiers_are_unique_and_of_one_form(tmp_path):
    paths = [tmp_path / name for name in ("a.jpg", "a.png", "b.jpg")]
    assert unique_ids([str(path) for path in paths], tmp_path) == ["a.jpg", "a.png", "b.jpg"]
    assert unique_ids([unicodedata.normalize("NFD", "x/é.jpg")], "x") == ["é"]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        *((name, "train") for name in ("train", "Training", "TRN")),
        *((name, "validation") for name in ("valid", "Val", "dev", "VALIDATION", "eval")),
        *((name, "test") for name in ("test", "Testing")),
        *((name, None) for name in ("cat", "trains", "images")),
    ],
)
def test_names_of_splits(name, meaning):
    assert split_meaning(name) == meaning


def test_splits_are_chosen_by_meaning_and_two_of_one_meaning_are_refused():
    assert choose_splits(["Train", "valid", "test"], None, None, "x") == {"train": "Train", "validation": "valid"}
    assert choose_splits(["training", "Testing"], None, None, "x") == {"train": "training", "validation": "Testing"}
    assert choose_splits(["train", "test"], "test", None, "x") == {"train": "test"}
    assert choose_splits(["a", "B"], "a", "b", "x") == {"train": "a", "validation": "B"}
    with pytest.raises(ValueError, match="x has 'val' and 'valid', .* split 'validation': name .*--validation_split"):
        choose_splits(["train", "val", "valid"], None, None, "x")


@pytest.mark.parametrize(
    "names",
    [["cat", "dog", "background"], ["_background_", "cat", "dog"], ["cat", "Background", "dog"], ["cat", "dog"]],
)
def test_the_background_is_recognised_under_other_names_and_places(names, caplog):
    assert background_first(names, "pets") == ["background", "cat", "dog"]
    assert caplog.text.count("the background: it becomes id 0") == (names != ["cat", "dog"])
    caplog.clear()
    assert background_first(["background", "cat"], "pets") == ["background", "cat"] and not caplog.text


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        # comparing every key with every other one would take minutes
        (
            "{" + ", ".join(f'"{number}": 0' for number in [*range(100_000), 99_999]) + "}",
            "the key '99999' stands twice",
        ),
        ("[" * 100_000, "it is nested too deeply"),
        ("9" * 5000, "Exceeds the limit"),
    ],
    ids=["keys", "depth", "digits"],
)
def test_json_bombs_are_refused_in_a_sentence(text, fault):
    with pytest.raises(ValueError, match=f"^{fault}"):
        parse_json(text)
