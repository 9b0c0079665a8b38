"""Labels and names that are easily mistaken for others: numbers, label vectors, headers, separators, repeated names."""

import json
import os

import datasets
import numpy as np
import pytest
from devkit_utils import ids_of, save_images, save_plain_mask
from devkit_utils import vectors_of as vectors
from PIL import Image

from synernet_hf.data import class_names, load_image_labels
from synernet_hf.data.files import unique_ids
from synernet_hf.data.labels import LabelReader, read_labels


INTEGERS = datasets.List(datasets.Value("int64"))
TEXT = datasets.Value("string")


@pytest.fixture
def folder(tmp_path):
    """Images a to d, without a table yet."""
    root = tmp_path / "pets"
    save_images(root, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    return root


def json_lines(folder, *labels, **more):
    rows = [{"file_name": name, "labels": label} for name, label in zip("abcd", labels, strict=False)]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metadata.jsonl"
    path.write_text("".join(json.dumps(row | more, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def save_columns(root, feature, column="labels", **splits):
    """What `save_to_disk` writes: images with the values of one column of labels."""
    made = {}
    for name, values in splits.items():
        rows = [{"image": Image.new("RGB", (6, 5)), column: value} for value in values]
        features = datasets.Features({"image": datasets.Image(), column: feature})
        made[name] = datasets.Dataset.from_list(rows, features=features)
    datasets.DatasetDict(made).save_to_disk(root)
    return root


def test_a_number_that_is_no_class_is_not_taken_for_an_id_where_classes_are_called_by_numbers(folder):
    (folder / "labels.csv").write_text("file_name,labels,split\na,1,train\nb,3,train\nc,2,validation\n")
    with pytest.raises(ValueError, match="labels.csv, row 4: Unknown class name '2'"):
        load_image_labels(folder)


@pytest.mark.parametrize("empty", [[], None, ""])
def test_an_empty_row_among_label_vectors_is_a_image_without_classes(folder, tmp_path, empty):
    json_lines(folder, empty, [0, 1, 1], [1, 0, 0])
    loaded = load_image_labels(folder)
    assert class_names(loaded) == ["background", "class_1", "class_2", "class_3"]
    assert vectors(loaded) == [[0, 0, 0], [0, 1, 1], [1, 0, 0]]
    if empty != "":
        saved = save_columns(tmp_path / "saved", INTEGERS, train=[empty, [0, 1, 1]], validation=[empty])
        loaded = load_image_labels(saved)
        assert vectors(loaded) == [[0, 0, 0], [0, 1, 1]]
        assert vectors(loaded, "validation") == [[0, 0, 0]]


def test_vectors_of_one_class(folder, tmp_path):
    json_lines(folder, [1], [0])
    assert vectors(load_image_labels(folder)) == [[1], [0]]
    assert class_names(load_image_labels(folder)) == ["background", "class_1"]
    saved = save_columns(tmp_path / "saved", INTEGERS, train=[[1], [0]], validation=[[1]])
    loaded = load_image_labels(saved)
    assert (vectors(loaded), vectors(loaded, "validation")) == ([[1], [0]], [[1]])
    # without a 0 it is a list of ids
    json_lines(folder, [1], [1])
    assert vectors(load_image_labels(folder, class_names=["background", "cat", "dog"])) == [[1, 0], [1, 0]]


def test_vectors_in_several_rows_of_one_image_are_joined(folder):
    rows = [("a", [1, 0, 0]), ("a", [0, 0, 1]), ("b", [0, 1, 0])]
    text = "".join(json.dumps({"file_name": name, "labels": label}) + "\n" for name, label in rows)
    (folder / "metadata.jsonl").write_text(text)
    assert vectors(load_image_labels(folder)) == [[1, 0, 1], [0, 1, 0]]
    # single numbers in several rows are names, whatever they are
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a", "label": 0}\n{"file_name": "a", "label": 1}\n{"file_name": "b", "label": 1}\n'
    )
    loaded = load_image_labels(folder)
    assert class_names(loaded) == ["background", "0", "1"] and vectors(loaded) == [[1, 1], [0, 1]]


@pytest.mark.parametrize("values", [[[0, 1, 1], [1, 0]], [[0, 2], [1]], [[1, 1], [2]]])
@pytest.mark.parametrize("listed", [None, ["background", "cat", "dog", "emu"]])
def test_lists_of_numbers_that_are_neither_vectors_nor_ids(folder, tmp_path, values, listed):
    json_lines(folder, *values)
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 1: the labels \[.*\] are neither .* nor .*: "):
        load_image_labels(folder, class_names=listed)
    saved = save_columns(tmp_path / "saved", INTEGERS, train=values)
    with pytest.raises(ValueError, match=r"split 'train', record 0: the labels \[.*\] are neither"):
        load_image_labels(saved, class_names=listed)


@pytest.mark.parametrize("first", ["a.jpg,1,0,0", "a.jpg,1,0", "a,1,0,0", "a,1,0", "a,1"])
def test_a_table_of_vectors_without_header_is_refused(folder, first):
    rest = first.split(",", 1)[1]
    (folder / "labels.csv").write_text(f"{first}\nb.jpg,{rest}\n")
    with pytest.raises(ValueError, match="labels.csv, row 1, .*: give the first row"):
        load_image_labels(folder)


def test_repeated_headers_are_refused_and_classes_may_be_called_by_numbers(folder):
    (folder / "labels.csv").write_text("file_name,cat,cat\na.jpg,1,0\n")
    with pytest.raises(ValueError, match="labels.csv, row 1, .*cat.* more than once"):
        load_image_labels(folder)
    (folder / "labels.csv").write_text("file_name,1,0\na.jpg,1,0\nb.jpg,0,1\n")
    assert class_names(load_image_labels(folder)) == ["background", "1", "0"]
    # cells without a header at the end of every row, as spreadsheets leave them
    (folder / "labels.csv").write_text("file_name,labels,,\na.jpg,cat,,\n")
    assert class_names(load_image_labels(folder)) == ["background", "cat"]


def test_items_of_lists_are_never_taken_apart(folder, tmp_path):
    json_lines(folder, ["tench, Tinca tinca"], ["traffic light"])
    names = ["background", "tench, Tinca tinca", "traffic light"]
    assert class_names(load_image_labels(folder)) == names
    saved = save_columns(tmp_path / "saved", datasets.List(TEXT), train=[["tench, Tinca tinca"], ["traffic light"]])
    assert class_names(load_image_labels(saved)) == names


def test_texts_of_a_column_are_never_taken_apart_at_spaces(tmp_path):
    saved = save_columns(tmp_path / "saved", TEXT, train=["traffic light; car", None], validation=["traffic light"])
    loaded = load_image_labels(saved)
    assert class_names(loaded) == ["background", "car", "traffic light"]
    assert vectors(loaded, "validation") == [[0, 1]]
    streamed = load_image_labels(saved, class_names=class_names(loaded), streaming=True)
    assert [record["labels"] for record in streamed["train"]] == loaded["train"]["labels"][:]
    assert [record["labels"] for record in streamed["validation"]] == [[1]]


def test_whether_spaces_separate_is_decided_once_for_all_splits(tmp_path):
    root = tmp_path / "streets"
    for split, rows in (("train", "a,traffic light; car\nb,car"), ("validation", "c,traffic light")):
        save_images(root / split, "a.jpg", "b.jpg", "c.jpg")
        (root / split / "labels.csv").write_text(f"file_name,labels\n{rows}\n")
    loaded = load_image_labels(root)
    assert class_names(loaded) == ["background", "car", "traffic light"]
    assert vectors(loaded, "validation") == [[0, 1]]
    (tmp_path / "one").mkdir()
    save_images(tmp_path / "one", "a.jpg", "b.jpg")
    (tmp_path / "one" / "labels.csv").write_text(
        "file_name,labels,split\na,traffic light; car,train\nb,traffic light,val\n"
    )
    assert vectors(load_image_labels(tmp_path / "one"), "validation") == [[0, 1]]


def test_names_of_a_given_class_list_are_found_before_anything_is_taken_apart(folder, tmp_path):
    listed = ["background", "tench, Tinca tinca", "traffic light", "car"]
    (folder / "labels.csv").write_text(
        'file_name;labels\na;traffic light\nb;tench, Tinca tinca\nc;"tench, Tinca tinca; car"\nd;car\n'
    )
    expected = [[0, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]]
    assert vectors(load_image_labels(folder, class_names=listed)) == expected
    texts = ["traffic light", "tench, Tinca tinca", "tench, Tinca tinca; car", "car"]
    saved = save_columns(tmp_path / "saved", TEXT, train=texts)
    assert vectors(load_image_labels(saved, class_names=listed)) == expected
    streamed = load_image_labels(saved, class_names=listed, streaming=True)
    assert [record["labels"] for record in streamed["train"]] == ids_of(expected)


def test_a_class_called_masks_is_not_lost(tmp_path):
    root = tmp_path / "safety"
    save_images(root, "gloves/1.jpg", "helmets/2.jpg", "masks/3.jpg")
    with pytest.raises(ValueError, match="safety/masks .* is named after an image .*: "):
        load_image_labels(root)


def test_one_mask_is_never_that_of_two_images(tmp_path):
    root = tmp_path / "pets"
    save_images(root / "train", "cat/1.jpg", "dog/2.jpg")
    save_images(root / "val", "cat/1.jpg", "dog/1.jpg", "dog/2.jpg")
    save_plain_mask(root / "val" / "masks" / "1.png", 1)
    save_plain_mask(root / "val" / "masks" / "2.png", 2)
    with pytest.raises(FileNotFoundError, match="2 of 3 images of the split 'validation' have no mask .*masks/cat/"):
        load_image_labels(root)
    for name, value in (("cat", 1), ("dog", 2)):
        save_plain_mask(root / "val" / "masks" / name / "1.png", value)
    loaded = load_image_labels(root)["validation"]
    # the bare name still does where it is that of one image
    assert [np.asarray(mask).max() for mask in loaded["mask"]] == [1, 2, 2]
    # two suffixes, one mask
    save_images(root / "val", "dog/2.png")
    with pytest.raises(FileNotFoundError, match="2 of 4 images"):
        load_image_labels(root)


def test_a_mask_under_the_path_of_a_image_is_its_own_whatever_others_are_called(folder):
    save_images(folder, "more/a.jpg")
    save_plain_mask(folder / "masks" / "a.png", 1)
    save_plain_mask(folder / "masks" / "more" / "a.png", 2)
    (folder / "labels.csv").write_text("file_name,labels,split\nb,cat;dog,train\na.jpg,cat,val\nmore/a.jpg,dog,val\n")
    masks = load_image_labels(folder)["validation"]["mask"]
    assert [np.asarray(mask).max() for mask in masks] == [1, 2]
    (folder / "masks" / "more" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 images"):
        load_image_labels(folder)


def test_the_header_split_may_be_capitalised(folder):
    (folder / "labels.csv").write_text("File_Name,Labels,Split\na,cat,train\nb,cat,validation\n")
    loaded = load_image_labels(folder)
    assert (loaded["train"]["image_id"][:], loaded["validation"]["image_id"][:]) == (["a"], ["b"])
    (folder / "labels.csv").write_text("file_name,cat,Split\na,1,train\nb,1,validation\n")
    assert class_names(load_image_labels(folder)) == ["background", "cat"]
    (folder / "labels.csv").write_text("file_name,labels,split\na,cat,learn\n")
    with pytest.raises(ValueError, match="neither .*'train' .*: it has learn"):
        load_image_labels(folder)


def test_identifiers_are_unique_whatever_the_paths(tmp_path):
    for paths in (["a/b.jpg", "a__b.jpg", "b.jpg"], ["a/b.jpg", "a__b.jpg", "b.jpg", "a___b.png", "b.png"]):
        ids = unique_ids([str(tmp_path / path) for path in paths], tmp_path)
        assert len(set(ids)) == len(paths) and not any("/" in name for name in ids)
    assert unique_ids(["x/a/1.jpg", "x/b/1.jpg"], "x") == ["a__1", "b__1"]


def test_one_image_by_two_kinds_of_path_is_one_image(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "labels.csv").write_text(f"file_name,label\na.jpg,cat\n{folder / 'a.jpg'},dog\n")
    assert vectors(load_image_labels("pets")) == [[1, 1]]


def test_nothing_is_written_into_a_saved_data_set(folder, tmp_path):
    (folder / "labels.csv").write_text("file_name,labels\na,dog\nb,cat\n")
    load_image_labels(folder).save_to_disk(tmp_path / "own")
    save_columns(tmp_path / "theirs", datasets.List(datasets.ClassLabel(names=["cat", "dog"])), train=[[0], [1]])
    for name in ("own", "theirs"):
        before = sorted(path for path in (tmp_path / name).rglob("*"))
        loaded = load_image_labels(tmp_path / name)
        assert loaded["train"][0]["image"].size == (6, 5)
        assert sorted(path for path in (tmp_path / name).rglob("*")) == before


def test_a_column_that_holds_no_images(tmp_path):
    rows = {"image": [1, 2], "labels": [["cat"], ["dog"]], "path": ["a.jpg", "b.jpg"]}
    root = tmp_path / "numbers"
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(root)
    for name in ("image", "labels"):
        with pytest.raises(ValueError, match=f"The column '{name}' holds .*, which is not an image: .*image_column"):
            load_image_labels(root, image_column=name, label_column="labels")
    # the path of an image is one
    save_images(tmp_path, "a.jpg", "b.jpg")
    rows["path"] = [str(tmp_path / name) for name in rows["path"]]
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows)).save_to_disk(tmp_path / "paths")
    loaded = load_image_labels(tmp_path / "paths", image_column="path")
    assert loaded["train"][1]["image"].size == (6, 5)


@pytest.mark.parametrize("separator", ["\u2028", "\x0b", "\x85"])
def test_only_line_ends_end_lines(folder, separator):
    name = f"traffic{separator}light"
    json_lines(folder, [name], [name])
    if separator != "\x0b":  # JSON writes control characters as \\u000b
        assert separator in (folder / "metadata.jsonl").read_text(encoding="utf-8")
    assert class_names(load_image_labels(folder)) == ["background", name]
    os.remove(folder / "metadata.jsonl")
    (folder / "labels.csv").write_text(f"file_name,label\na,{name}\nb,{name}\n", encoding="utf-8")
    assert class_names(load_image_labels(folder)) == ["background", name]


def test_streamed_records_keep_their_identifiers(tmp_path):
    rows = {"image": [Image.new("RGB", (6, 5))] * 3, "labels": [["cat"]] * 3, "image_id": ["x", "y", None]}
    features = datasets.Features({"image": datasets.Image(), "labels": datasets.List(TEXT), "image_id": TEXT})
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows, features=features)).save_to_disk(tmp_path / "saved")
    streamed = load_image_labels(tmp_path / "saved", class_names=["background", "cat"], streaming=True)
    assert [record["image_id"] for record in streamed["train"]] == ["x", "y", "train_000002"]


def test_equal_cells_are_read_once_and_the_first_one_is_named(monkeypatch):
    read, ids = [], LabelReader.ids
    monkeypatch.setattr(
        LabelReader, "ids", lambda reader, cells, place, names: read.append(place) or ids(reader, cells, place, names)
    )
    splits = {
        name: [([cell], f"{name}, row {row}") for row, cell in enumerate(["cat", ["cat"], "dog;cat", "cat"] * 3, 2)]
        for name in ("train", "validation")
    }
    labels, names = read_labels(splits, "labels", None, "the table")
    assert names == ["background", "cat", "dog"]
    assert labels == dict.fromkeys(splits, [[0], [0], [0, 1], [0]] * 3)
    assert read == ["train, row 2", "train, row 3", "train, row 4"]
    splits["validation"][5:7] = [(["cow"], "validation, row 7"), (["cow"], "validation, row 8")]
    with pytest.raises(ValueError, match="^validation, row 7: .*'cow'"):
        read_labels(splits, "labels", None, "the table")
