"""Folders, tables and data sets as people and their tools write them, one test for each kind of habit."""

import json
import math
import unicodedata

import datasets
import numpy as np
import pytest
from devkit_utils import ids_of, save_images, save_plain_mask
from PIL import Image

from synernet_hf.data import check_dataset, class_names, load_image_labels, load_wsss_dataset, read_label_file
from synernet_hf.data.labels import LabelReader
from synernet_hf.data.schema import likely_misspelt


TEXT = datasets.Value("string")


def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))


def names_of(loaded, split="train"):
    names = class_names(loaded)[1:]
    table = loaded[split].select_columns(["image_id", "labels"])[:]
    pairs = zip(table["image_id"], table["labels"], strict=True)
    return {image_id: [names[label] for label in labels] for image_id, labels in pairs}


def save_columns(root, rows, features, column="labels", **more):
    """What `save_to_disk` writes: images with the values of one column of labels."""
    columns = {"image": [Image.new("RGB", (6, 5))] * len(rows), column: rows} | more
    features = {"image": datasets.Image(), column: features} | {name: datasets.Image() for name in more}
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    datasets.DatasetDict(train=made, validation=made).save_to_disk(root)
    return root


# splits


@pytest.mark.parametrize(
    ("train", "other"),
    [("train", "valid"), ("Training", "Val"), ("TRAIN", "testing"), ("trn", "dev"), ("training_set", "test-images")],
)
def test_folders_of_splits_in_other_words(tmp_path, train, other):
    save_images(tmp_path, f"{train}/cat/1.jpg", f"{train}/dog/2.jpg", f"{other}/dog/3.jpg")
    save_images(tmp_path, "__MACOSX/train/cat/._1.jpg", "__MACOSX/x.jpg", ".git/y.jpg", "@eaDir/z.jpg")
    write(tmp_path / ".ipynb_checkpoints" / "labels.csv", "file_name,label\n")
    write(tmp_path / "README.txt", "pets")
    loaded = load_image_labels(tmp_path)
    assert class_names(loaded) == ["background", "cat", "dog"]
    assert names_of(loaded) == {"1": ["cat"], "2": ["dog"]} and names_of(loaded, "validation") == {"3": ["dog"]}


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["train/cat/1.jpg", "holdout/cat/2.jpg"], "has train, .* beside holdout"),
        (["train/1.jpg", "val/2.jpg", "cat/3.jpg"], "has train, val, .* beside cat"),
        (["train/cat/1.jpg", "val/cat/2.jpg", "Valid/cat/3.jpg"], "has 'Valid' and 'val', which are all names"),
        (["train/1.jpg", "valid/2.jpg"], "1 images lie in .*train itself"),
    ],
)
def test_folders_that_cannot_be_told_apart_are_refused_by_name(tmp_path, paths, named):
    save_images(tmp_path, *paths)
    with pytest.raises(ValueError, match=named):
        load_image_labels(tmp_path)


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        (["x/cat/1.jpg", "x/dog/1.jpg"], "has x, with the folders cat, dog"),
        (["x/y/train/cat/1.jpg", "x/y/valid/cat/1.jpg"], "has x, with the folders y"),
        (["cat/train/1.jpg", "cat/val/2.jpg", "dog/train/1.jpg"], "has cat, dog, with the folders train, val"),
    ],
)
def test_folders_within_folders_are_refused_by_name(tmp_path, paths, named):
    save_images(tmp_path, *paths)
    with pytest.raises(ValueError, match=named):
        load_image_labels(tmp_path)


def test_a_table_without_splits_of_images_in_folders_of_splits_is_refused(tmp_path):
    save_images(tmp_path, "train/a.jpg", "val/b.jpg")
    write(tmp_path / "labels.csv", "file_name,label\ntrain/a.jpg,cat\nval/b.jpg,cat\n")
    with pytest.raises(ValueError, match="no column 'split', but names images in train, val"):
        load_image_labels(tmp_path)
    write(tmp_path / "labels.csv", "file_name,label,set\ntrain/a.jpg,cat,train\nval/b.jpg,cat,test\n")
    assert set(load_image_labels(tmp_path)) == {"train", "validation"}


def test_an_index_of_pandas_may_name_the_images(tmp_path):
    save_images(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "labels.csv", ",labels\na.jpg,cat\nb.jpg,dog\n")
    assert names_of(load_image_labels(tmp_path)) == {"a": ["cat"], "b": ["dog"]}


def test_rows_of_two_folders_in_a_label_file_are_two_images(tmp_path):
    write(tmp_path / "labels.csv", "images/x.jpg,cat\nother/x.jpg,dog\n")
    with pytest.raises(ValueError, match="both give labels of x"):
        read_label_file(tmp_path / "labels.csv", ["background", "cat", "dog"])


def test_files_of_rarer_suffixes_and_tables_without_headers(tmp_path):
    save_images(tmp_path, "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "a.jfif")
    save_images(tmp_path, "b.jpg")
    write(tmp_path / "labels.csv", "a.jfif,traffic light\nb.jpg,-\n")
    assert names_of(load_image_labels(tmp_path)) == {"a": ["traffic light"], "b": []}


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, bool])
def test_masks_of_every_depth_follow_the_class_list(tmp_path, dtype):
    for split in ("train", "validation"):
        save_images(tmp_path, f"{split}/a.jpg")
        write(tmp_path / split / "labels.csv", "file_name,label\na.jpg,cat\n")
    (tmp_path / "validation" / "masks").mkdir()
    Image.fromarray(np.zeros((5, 6), dtype)).save(tmp_path / "validation" / "masks" / "a.png")
    loaded = load_image_labels(tmp_path, class_names=["cat", "dog", "background"])
    assert np.unique(np.asarray(loaded["validation"][0]["mask"])).tolist() == [1]


def test_a_folder_of_all_images_is_no_class(tmp_path, caplog):
    save_images(tmp_path, "images/1.jpg", "images/2.jpg")
    write(tmp_path / "answers.csv", "picture,what\n1.jpg,cat\n")
    with pytest.raises(ValueError, match=r"'images', which is not the name of a class: .*answers.csv is none"):
        load_image_labels(tmp_path)
    save_images(tmp_path, "cat/3.jpg")
    assert class_names(load_image_labels(tmp_path))[1:] == ["cat", "images"]
    assert "answers.csv is not read" in caplog.text


@pytest.mark.parametrize("name", ["metadata.jsonl", "labels.json", "_annotations.coco.json"])
def test_keys_that_stand_twice_in_an_object_are_refused(tmp_path, name):
    save_images(tmp_path, "data/1.jpg", "1.jpg")
    text = {
        "metadata.jsonl": '{"file_name": "1.jpg", "labels": "cat", "labels": "dog"}',
        "labels.json": '{"classes": ["cat", "dog"], "labels": {"1": 0, "1": 1}}',
        "_annotations.coco.json": '{"images": [{"id": 1, "id": 2, "file_name": "1.jpg"}], "annotations": []}',
    }[name]
    write(tmp_path / name, text)
    with pytest.raises(ValueError, match=r"the key '(labels|1|id)' stands twice"):
        load_image_labels(tmp_path)


def test_named_splits_say_what_the_other_folders_are(tmp_path, caplog):
    save_images(tmp_path, "train/cat/1.jpg", "holdout/cat/2.jpg", "rest/cat/3.jpg")
    loaded = load_image_labels(tmp_path, validation_split="Holdout")
    assert names_of(loaded, "validation") == {"2": ["cat"]} and "'rest' of the splits is not used" in caplog.text
    # a class may be called "train", and the log says so
    save_images(tmp_path / "vehicles", "bus/1.jpg", "train/2.jpg")
    assert class_names(load_image_labels(tmp_path / "vehicles")) == ["background", "bus", "train"]
    assert "the folder 'train' is read as a class, like bus" in caplog.text


def test_a_folder_around_the_data_is_no_class(tmp_path):
    save_images(tmp_path, "pets/train/cat/1.jpg", "pets/valid/cat/2.jpg", "__MACOSX/pets/3.jpg")
    assert list(load_image_labels(tmp_path)) == ["train", "validation"]
    save_images(tmp_path / "one", "inner/a.jpg", "inner/b.jpg")
    write(tmp_path / "one" / "inner" / "labels.csv", "file_name,label,split\na,cat,train\nb,cat,dev\n")
    assert names_of(load_image_labels(tmp_path / "one"), "validation") == {"b": ["cat"]}


def test_a_column_and_a_data_set_with_splits_in_other_words(tmp_path, caplog):
    save_images(tmp_path / "a", "a.jpg", "b.jpg", "c.jpg")
    save_images(tmp_path / "a", "d.jpg")
    rows = "a,cat,Training\nb,cat, training\nc,cat,Dev\nd,cat,\n"
    write(tmp_path / "a" / "labels.csv", f"file_name,label,Split\n{rows}")
    assert {name: len(split) for name, split in load_image_labels(tmp_path / "a").items()} == {
        "train": 2,
        "validation": 1,
    }
    assert "1 images without a split are not used" in caplog.text
    made = save_columns(tmp_path / "b", [["cat"]], datasets.List(TEXT))
    renamed = dict(zip(("Training", "dev"), datasets.load_from_disk(made).values(), strict=True))
    datasets.DatasetDict(renamed).save_to_disk(tmp_path / "c")
    assert list(load_image_labels(tmp_path / "c")) == ["train", "validation"]


def test_tables_are_found_under_any_name_and_one_for_each_split(tmp_path):
    save_images(tmp_path, "images/a.jpg", "images/b.jpg")
    write(tmp_path / "train.csv", "filename,label\nimages/a.jpg,cat\n")
    assert names_of(load_image_labels(tmp_path)) == {"a": ["cat"]}
    write(tmp_path / "valid.csv", "filename,label\nb,cat\n")
    write(tmp_path / "notes.csv", "date,what\n1,2\n")
    loaded = load_image_labels(tmp_path)
    assert (names_of(loaded), names_of(loaded, "validation")) == ({"a": ["cat"]}, {"b": ["cat"]})
    (tmp_path / "train.csv").rename(tmp_path / "mine.csv")
    (tmp_path / "valid.csv").rename(tmp_path / "yours.csv")
    with pytest.raises(ValueError, match="has the tables mine.csv, yours.csv: give the path of the one"):
        load_image_labels(tmp_path)


# tables


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    "text",
    [
        "sep=;\r\nfile_name;label\r\na.jpg;cat\r\nb.jpg;dog\r\n",
        ",file_name,label\n0,a.jpg,cat\n1,b.jpg,dog\n",
        "Unnamed: 0\tid\tcat\tdog\n0\ta\t1.0\t0.0\n1\tb\tFALSE\tTRUE\n",
        "file_name,label,,\na.jpg,cat,,\nb.jpg,dog,,,,\n",
    ],
    ids=["excel", "pandas", "flags", "cells"],
)
def test_tables_of_spreadsheets_and_pandas(tmp_path, text, encoding):
    save_images(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "labels.csv", text, encoding)
    assert names_of(load_image_labels(tmp_path)) == {"a": ["cat"], "b": ["dog"]}


def test_files_are_found_as_they_are_written_elsewhere(tmp_path):
    save_images(tmp_path, "sub/é 1.JPG", "b.JPEG")
    save_images(tmp_path, unicodedata.normalize("NFD", "ü.jpg"))
    save_plain_mask(tmp_path / "Masks" / "B.PNG", 1)
    rows = "sub\\é 1.jpg,cat,train,\nü,cat,train,\nB.jpeg,cat,val,masks\\b.png\n"
    write(tmp_path / "labels.csv", f"file_name,label,split,mask\n{rows}")
    loaded = load_image_labels(tmp_path)
    assert list(names_of(loaded)) == ["é 1", "ü"]
    assert np.asarray(loaded["validation"][0]["mask"]).max() == 1
    # beside the images, without a column
    write(tmp_path / "labels.csv", "file_name,label,split\nü,cat,train\nb,cat,val\n")
    assert np.asarray(load_image_labels(tmp_path)["validation"][0]["mask"]).max() == 1


def test_two_forms_of_a_label_are_one_class(tmp_path):
    save_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    form = unicodedata.normalize
    write(tmp_path / "labels.csv", f"file_name,label\na,{form('NFC', 'é')}\nb,\ufeff{form('NFD', 'é')} \n")
    assert class_names(load_image_labels(tmp_path)) == ["background", "é"]
    given = ["background", form("NFD", "é")]
    assert class_names(load_image_labels(tmp_path, class_names=given)) == ["background", "é"]
    save_images(tmp_path / "folders", form("NFC", "é/1.jpg"), form("NFD", "é/2.jpg"))
    assert class_names(load_image_labels(tmp_path / "folders")) == ["background", "é"]


def test_files_are_missed_before_labels_and_all_at_once(tmp_path):
    save_images(tmp_path, "a.jpg")
    write(tmp_path / "labels.csv", "file_name,label,split\nx,,train\ny,,val\na,,val\n")
    with pytest.raises(FileNotFoundError, match=r"2 of 3 images are missing \(.*row 2: .* no image x .*row 3: .* y "):
        load_image_labels(tmp_path)
    write(tmp_path / "labels.csv", "file_name,label\nx,cat\ny,cat\n")
    with pytest.raises(FileNotFoundError, match="2 of 2 images are missing"):
        load_image_labels(tmp_path, on_bad_image="skip")
    write(tmp_path / "labels.csv", "file_name,label,split,mask\na,cat,val,m1.png\na.jpg,cat,val,\n")
    save_images(tmp_path, "b.jpg", "c.jpg")
    write(tmp_path / "labels.csv", "file_name,label,split,mask\na,cat,train,t.png\nb,cat,val,1.png\nc,cat,val,2.png\n")
    with pytest.raises(
        FileNotFoundError, match=r"2 masks .* cannot be used \(.*row 3, .* 1.png.*row 4, .* 2.png, which is"
    ):
        load_image_labels(tmp_path)


def test_two_masks_of_one_image_are_refused_with_both_rows(tmp_path):
    save_images(tmp_path, "a.jpg", "b.jpg")
    for name in ("1", "2"):
        save_plain_mask(tmp_path / "masks" / f"{name}.png", 1)
    rows = "a,cat,train,\nb,cat,val,masks/1.png\nb,dog,val,{}\n"
    write(tmp_path / "labels.csv", f"file_name,label,split,mask\n{rows.format('masks/1.png')}")
    assert len(load_image_labels(tmp_path, class_names=["background", "cat", "dog"])["validation"]) == 1
    write(tmp_path / "labels.csv", f"file_name,label,split,mask\n{rows.format('2')}")
    with pytest.raises(FileNotFoundError, match="row 4, names the mask 2, but .*row 3 and further rows, another one"):
        load_image_labels(tmp_path, class_names=["background", "cat", "dog"])
    with pytest.raises(ValueError, match="row 3 and further rows: Unknown class name 'dog'"):
        load_image_labels(tmp_path, class_names=["background", "cat"])
    write(tmp_path / "labels.xlsx", "x")
    with pytest.raises(ValueError, match="labels.xlsx is not a table"):
        load_image_labels(tmp_path / "labels.xlsx")


def test_cells_without_a_value_and_numbers_as_names(tmp_path):
    save_images(tmp_path, "1.jpg", "2.jpg")
    rows = [
        {"Image ID": 1.0, "Class Name": "cat", "split": "train", "mask": math.nan, "id": 7},
        {"Image ID": 2, "Class Name": "cat", "split": "Val", "mask": "nan", "id": 8},
    ]
    write(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_image_labels(tmp_path)
    assert (names_of(loaded), names_of(loaded, "validation")) == ({"1": ["cat"]}, {"2": ["cat"]})
    rows = [{"file_name": "1", "cat": 1.0, "dog": math.nan}, {"file_name": "2", "cat": 0, "dog": 1}]
    write(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert names_of(load_image_labels(tmp_path)) == {"1": ["cat"], "2": ["dog"]}


def test_folders_behind_links_and_images_beside_splits(tmp_path, caplog):
    save_images(tmp_path, "far/1.jpg", "pets/dog/2.jpg", "pets/loose.jpg")
    (tmp_path / "pets" / "cat").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "pets" / "dog" / "circle").symlink_to(tmp_path / "pets", target_is_directory=True)
    (tmp_path / "pets" / "loose.jpg").unlink()
    loaded = load_image_labels(tmp_path / "pets")
    assert names_of(loaded) == {"1": ["cat"], "2": ["dog"]}
    save_images(tmp_path / "split", "train/cat/1.jpg", "x.jpg")
    load_image_labels(tmp_path / "split")
    assert "1 images beside the folders of splits are not used (x.jpg)" in caplog.text


# labels


@pytest.mark.parametrize(
    "nothing", [None, math.nan, "", " ", "NaN", "None", "null", "N/A", "<NA>", [None], ["nan", None]]
)
def test_no_label_in_every_spelling(tmp_path, nothing, caplog):
    save_images(tmp_path, "a.jpg", "b.jpg")
    rows = [{"file_name": "a", "labels": ["cat"]}, {"file_name": "b", "labels": nothing}]
    write(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert names_of(load_image_labels(tmp_path)) == {"a": ["cat"], "b": []}
    words = [item for item in (nothing if isinstance(nothing, list) else [nothing]) if isinstance(item, str)]
    assert caplog.text.count("in the labels means no class") == bool("".join(words).strip())
    if nothing is None or isinstance(nothing, str):
        saved = save_columns(tmp_path / "text", ["cat", nothing], TEXT)
        assert names_of(load_image_labels(saved)) == {"train_000000": ["cat"], "train_000001": []}
        write(tmp_path / "labels.csv", f"file_name,labels\na,cat\nb,{nothing or ''}\n")
        assert names_of(load_image_labels(tmp_path)) == {"a": ["cat"], "b": []}


def test_no_number_among_numbers_and_none_that_is_a_class(tmp_path):
    saved = save_columns(tmp_path / "floats", [1.0, math.nan, 2.0], datasets.Value("float64"))
    assert list(names_of(load_image_labels(saved)).values()) == [["1"], [], ["2"]]
    save_images(tmp_path, "a.jpg", "b.jpg")
    write(tmp_path / "labels.csv", "file_name,labels\na,1.0\nb,2.0\n")
    assert class_names(load_image_labels(tmp_path)) == ["background", "1", "2"]
    write(tmp_path / "labels.csv", "file_name,labels\na,none\nb,cat;none\n")
    given = ["background", "cat", "none"]
    assert names_of(load_image_labels(tmp_path, class_names=given)) == {"a": ["none"], "b": ["cat", "none"]}
    assert names_of(load_image_labels(tmp_path)) == {"a": [], "b": ["cat"]}
    saved = save_columns(tmp_path / "own", [[1], [0]], datasets.List(datasets.ClassLabel(names=["cat", "none"])))
    assert list(names_of(load_image_labels(saved)).values()) == [["none"], ["cat"]]


OBJECTS = [
    {"bbox": [[0, 0, 1, 1], [1, 1, 2, 2]], "categories": ["dog", "cat"]},
    [{"bbox": [0, 0, 1, 1], "category": "cat"}, {"bbox": [0, 0, 1, 1], "category": "dog"}, {"category": "dog"}],
    {"cat": 1, "dog": True, "cow": 0},
    {"choices": ["cat", "dog"]},
    '{"cat": 1, "dog": 1}',
    "['cat', 'dog']",
    '["cat", "dog"]',
]


@pytest.mark.parametrize("cell", OBJECTS)
def test_objects_with_labels(tmp_path, cell):
    save_images(tmp_path, "a.jpg")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": "a.jpg", "objects": cell}))
    assert names_of(load_image_labels(tmp_path)) == {"a": ["cat", "dog"]}
    text = cell if isinstance(cell, str) else json.dumps(cell)
    doubled = text.replace('"', '""')
    write(tmp_path / "labels.csv", f'file_name,objects\na.jpg,"{doubled}"\n')
    assert names_of(load_image_labels(tmp_path)) == {"a": ["cat", "dog"]}


@pytest.mark.parametrize(
    "cell",
    [{"cat": "yes"}, {"bbox": [1, 2]}, {"cat": 0.7, "dog": 1}, [["cat"]], "['cat' 'dog']", "{cat}", [{"x": 1}, 2]],
)
def test_all_other_objects_are_refused_with_their_row(tmp_path, cell):
    save_images(tmp_path, "a.jpg", "b.jpg")
    rows = [{"file_name": "a", "labels": "cat"}, {"file_name": "b", "labels": cell}]
    write(tmp_path / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    if cell == [{"x": 1}, 2]:
        # a mapping of 0 and 1 in a list gives its names
        assert names_of(load_image_labels(tmp_path))["b"] == ["2", "x"]
        return
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 2: the labels .* cannot be read: a name, a number"):
        load_image_labels(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_objects_in_a_column(tmp_path, streaming):
    label = datasets.ClassLabel(names=["cat", "dog"])
    boxes = datasets.List(datasets.List(datasets.Value("int64")))
    cells = [{"bbox": [[0, 0, 1, 1]] * 3, "category": [1, 0, 1]}, {"bbox": [], "category": []}]
    saved = save_columns(tmp_path / "a", cells, {"bbox": boxes, "category": datasets.List(label)}, "objects")
    loaded = load_image_labels(saved, streaming=streaming)
    assert [record["labels"] for record in loaded["train"]] == [[0, 1], []] and class_names(loaded)[1:] == label.names
    cells = [[{"id": 5, "label": 1}], [{"id": 6, "label": 0}, {"id": 7, "label": 1}]]
    saved = save_columns(
        tmp_path / "b", cells, datasets.List({"id": datasets.Value("int64"), "label": label}), "objects"
    )
    loaded = load_image_labels(saved, streaming=streaming)
    assert [record["labels"] for record in loaded["train"]] == [[1], [0, 1]]
    flags = {"cat": datasets.Value("int64"), "dog": datasets.Value("bool")}
    saved = save_columns(tmp_path / "c", [{"cat": 1, "dog": 0}, {"cat": 1, "dog": 1}], flags)
    given = ["background", "cat", "dog"] if streaming else None
    loaded = load_image_labels(saved, class_names=given, streaming=streaming)
    assert [record["labels"] for record in loaded["train"]] == [[0], [0, 1]]
    saved = save_columns(tmp_path / "d", [{"box": [1]}], {"box": datasets.List(datasets.Value("int64"))})
    with pytest.raises(ValueError, match="The column 'labels' holds .*, which is not a label"):
        load_image_labels(saved)


def test_rows_of_one_image_in_a_label_file_are_joined(tmp_path):
    listed = ["background", "cat", "dog"]
    write(tmp_path / "a.csv", "id,label\n1,cat\n2,dog\n1.jpg,dog\n")
    assert read_label_file(tmp_path / "a.csv", listed) == {"1": [0, 1], "2": [1]}
    write(tmp_path / "a.csv", ",id,cat,dog\n0,1,1,0\n1,1,0,1\n")
    assert read_label_file(tmp_path / "a.csv", listed) == {"1": [0, 1]}
    write(tmp_path / "a.csv", "id,label\n1.jpg,cat\n1.png,dog\n")
    with pytest.raises(ValueError, match=r"a.csv, row 2 \(1.jpg\) and .*a.csv, row 3 \(1.png\) both give labels of 1"):
        read_label_file(tmp_path / "a.csv", listed)
    write(tmp_path / "a.json", '{"1": ["cat"], "1": ["dog"]}')
    with pytest.raises(ValueError, match="a.json .*the key '1' stands twice"):
        read_label_file(tmp_path / "a.json", listed)
    np.savez(tmp_path / "a.npz", ids=["1", "1"], labels=[[1, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"row 0 \(1\) and .*row 1 \(1\) both give labels of 1: keep one"):
        read_label_file(tmp_path / "a.npz", listed)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_label_files_in_other_encodings(tmp_path, encoding):
    listed = ["background", "é"]
    write(tmp_path / "a.json", json.dumps({"1": ["é"]}, ensure_ascii=False), encoding)
    write(tmp_path / "a.csv", "id,label\r\n1,é\r\n", encoding)
    assert read_label_file(tmp_path / "a.json", listed) == read_label_file(tmp_path / "a.csv", listed) == {"1": [0]}


# the background


@pytest.mark.parametrize("name", ["background", "Background", "_background_", "__background__"])
def test_the_background_is_never_a_class(tmp_path, name, caplog):
    save_images(tmp_path, "table/a.jpg", "table/b.jpg", f"folders/{name}/1.jpg", "folders/cat/2.jpg")
    write(tmp_path / "table" / "labels.csv", f"file_name,labels\na,cat;{name}\nb,{name}\n")
    assert names_of(load_image_labels(tmp_path / "table")) == {"a": ["cat"], "b": []}
    assert caplog.text.count("in the labels means no class") == 1
    write(tmp_path / "table" / "labels.csv", f"file_name,cat,{name}\na,1,1\nb,0,1\n")
    assert names_of(load_image_labels(tmp_path / "table")) == {"a": ["cat"], "b": []}
    assert class_names(load_image_labels(tmp_path / "folders")) == ["background", "cat"]
    for names in ([name, "cat", "dog"], ["cat", "dog", name], ["cat", name, "dog"]):
        caplog.clear()
        loaded = load_image_labels(tmp_path / "folders", class_names=names)
        assert class_names(loaded) == ["background", "cat", "dog"]
        assert caplog.text.count("is the background: it becomes id 0") == (names[0] != "background")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("place", "mask_id"), [(0, 1), (1, 0), (2, 0)])
def test_a_class_label_with_the_background_elsewhere_renumbers_labels_and_masks(tmp_path, place, mask_id, streaming):
    names = ["cat", "dog"]
    names.insert(place, "Background")
    feature = datasets.List(datasets.ClassLabel(names=names))
    # the mask of each image shows its own class, 255 and nothing else, by the numbers of the source
    masks = [
        Image.fromarray(np.array([[names.index(name), 255, place]] * 5, dtype=np.uint8)) for name in ("cat", "dog")
    ]
    saved = save_columns(tmp_path / "data", [[names.index("cat")], [names.index("dog"), place]], feature, mask=masks)
    loaded = load_image_labels(saved, streaming=streaming)
    assert class_names(loaded) == ["background", "cat", "dog"]
    records = list(loaded["validation"])
    assert [record["labels"] for record in records] == [[0], [1]]
    assert [np.asarray(record["mask"])[0].tolist() for record in records] == [[1, 255, 0], [2, 255, 0]]
    assert mask_id == (names.index("cat") if place else 1)


def test_two_backgrounds_are_refused_and_two_forms_of_a_name_are_one(tmp_path):
    feature = datasets.ClassLabel(names=["background", "_background_", "dog"])
    with pytest.raises(ValueError, match="'background' and '_background_' in the class list are both the background"):
        load_image_labels(save_columns(tmp_path / "two", [[0], [2]], datasets.List(feature)))
    forms = [unicodedata.normalize(form, "é") for form in ("NFC", "NFD")]
    feature = datasets.List(datasets.ClassLabel(names=[*forms, "dog"]))
    masks = [Image.fromarray(np.array([[1, 2, 3, 255, 0]] * 5, dtype=np.uint8))] * 3
    loaded = load_image_labels(save_columns(tmp_path / "forms", [[0], [1], [2]], feature, mask=masks))
    assert list(names_of(loaded).values()) == [["é"], ["é"], ["dog"]]
    assert np.asarray(loaded["validation"][0]["mask"])[0].tolist() == [1, 1, 2, 255, 0]


def test_a_given_list_with_the_background_last_renumbers_the_masks_of_a_folder(tmp_path):
    save_images(tmp_path, "train/cat/1.jpg", "train/dog/3.jpg", "val/dog/2.jpg")
    save_plain_mask(tmp_path / "val" / "masks" / "2.png", 1)
    loaded = load_image_labels(tmp_path, class_names=["cat", "dog", "background"])
    assert np.asarray(loaded["validation"][0]["mask"]).max() == 2
    check_dataset(loaded)


# names that are nearly others


def test_misspelt_classes_are_pointed_out_when_loaded(tmp_path, caplog):
    save_images(tmp_path, *(f"{index}.jpg" for index in range(8)))
    rows = "".join(f"{index},{'dgo' if index == 3 else 'dog'}\n" for index in range(7)) + "7,Dog\n"
    write(tmp_path / "labels.csv", f"file_name,label\n{rows}")
    load_image_labels(tmp_path)
    assert "the class 'dgo' has 1 images and 'dog' has 6: did you mean 'dog'?" in caplog.text
    assert "the class 'Dog' has 1 images and 'dog' has 6: did you mean 'dog'?" in caplog.text
    assert likely_misspelt({"class_1": 1, "class_2": 50, "cat": 40, "car": 30}) == []
    assert likely_misspelt({"person": 50, "persn": 2, "personn": 3}) == [("persn", "person")]


def test_names_of_data_sets_and_folders_that_are_nearly_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path, "data/pets/cat/1.jpg")
    with pytest.raises(ValueError, match="Unknown data set 'image_foldr': did you mean image_folder?"):
        load_wsss_dataset("image_foldr")
    for wrong in ("data/pest", "./data/pest", str(tmp_path / "data" / "pest")):
        with pytest.raises(FileNotFoundError, match=r"There is no folder .*data/pest: did you mean .*data/pets\?"):
            load_wsss_dataset(wrong)
    for source in ("/nowhere/at/all", "./nowhere", "nowhere/", "a b/c"):
        with pytest.raises(FileNotFoundError, match="There is no folder .*, and it is not a Hub id"):
            load_image_labels(source)
    # the Hub is asked once, not for half a minute
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    asked = []
    monkeypatch.setattr(
        "synernet_hf.data.hub.HfApi.dataset_info", lambda _, name, timeout: asked.append(name) or 1 / 0
    )
    with pytest.raises(ValueError, match="owner/name cannot be opened .no such folder, and the Hub cannot be reached"):
        load_wsss_dataset("owner/name")
    assert asked == ["owner/name"]
    with pytest.raises(FileNotFoundError, match="There is no folder owner/name; a Hub id is the data set 'hub'"):
        load_wsss_dataset("image_folder", "owner/name")


# layouts of annotation tools


def test_roboflow_columns_of_classes_beside_the_images(tmp_path):
    for split in ("train", "valid", "test"):
        save_images(tmp_path / split, "a_jpg.rf.1.jpg", "b_jpg.rf.2.jpg")
        write(tmp_path / split / "_classes.csv", "filename, cat, dog\na_jpg.rf.1.jpg, 1, 0\nb_jpg.rf.2.jpg, 1, 1\n")
    write(tmp_path / "README.roboflow.txt", "exported")
    loaded = load_image_labels(tmp_path)
    assert names_of(loaded) == {"a_jpg.rf.1": ["cat"], "b_jpg.rf.2": ["cat", "dog"]}
    assert list(loaded) == ["train", "validation"] and class_names(loaded) == ["background", "cat", "dog"]


@pytest.mark.parametrize("classes", [["cat", "dog"], None])
def test_fiftyone_folders(tmp_path, classes):
    for split, label in (("train", 1), ("validation", 0)):
        save_images(tmp_path / split / "data", "sub/a.jpg", "b.png", "c.jpg")
        labels = {"sub/a": label, "b": {"label": 0, "confidence": 0.5}, "c": None}
        if classes is None:
            labels = {"sub/a": ["dog", "cat"][1 - label], "b": "cat", "c": None}
        write(tmp_path / split / "labels.json", json.dumps({"classes": classes, "labels": labels}))
    loaded = load_image_labels(tmp_path)
    assert set(names_of(loaded)) == {"a", "b", "c"} and names_of(loaded)["c"] == []
    assert class_names(loaded) == ["background", "cat", "dog"] if classes else ["background", "cat"]
    if classes:
        assert names_of(loaded) == {"a": ["dog"], "b": ["cat"], "c": []}
        assert names_of(loaded, "validation")["a"] == ["cat"]
        write(tmp_path / "train" / "labels.json", json.dumps({"classes": classes, "labels": {"b": 2}}))
        with pytest.raises(ValueError, match="labels.json, b: the label 2 is not a position in the 2 classes"):
            load_image_labels(tmp_path)
    write(tmp_path / "train" / "labels.json", json.dumps({"classes": ["cat"], "labels": {"x": 0, "y": 0}}))
    with pytest.raises(FileNotFoundError, match="2 of .* images are missing"):
        load_image_labels(tmp_path)


def test_cvat_folders_of_imagenet_and_tables_of_open_images(tmp_path, caplog):
    save_images(tmp_path / "imagenet", "cat/cat_1.jpg", "dog/dog_2.jpg", "no_label/3.jpg")
    assert names_of(load_image_labels(tmp_path / "imagenet")) == {"cat_1": ["cat"], "dog_2": ["dog"], "3": []}
    root = tmp_path / "open"
    save_images(root / "images", "train/a.jpg", "train/b.jpg", "val/c.jpg")
    header = "ImageID,Source,LabelName,Confidence\n"
    table = "-annotations-human-imagelabels.csv"
    write(root / "annotations" / f"train{table}", f"{header}a,,/m/0,1\na,,/m/1,0\nb,,/m/1,1\nb,,/m/0,1.0\n")
    write(root / "annotations" / f"val{table}", f"{header}c,,/m/1,1\n")
    write(root / "annotations" / "class-descriptions.csv", "/m/0,cat\n/m/1,dog\n")
    loaded = load_image_labels(root)
    assert names_of(loaded) == {"a": ["cat"], "b": ["cat", "dog"]}
    assert names_of(loaded, "validation") == {"c": ["dog"]}


def test_label_studio_tables(tmp_path):
    save_images(tmp_path, "images/a.jpg", "images/b 1.jpg")
    rows = (
        '/data/upload/3/1a2b3c4d-a.jpg,1,"{""choices"": [""cat"", ""dog""]}",1,7,2024-01-01,2024-01-01,3.5\n'
        "/data/local-files/?d=images/b%201.jpg,2,cat,1,8,2024-01-01,2024-01-01,3.5\n"
    )
    columns = "id,{},annotator,annotation_id,created_at,updated_at,lead_time\n"
    for name in ("choice", "animal"):
        write(tmp_path / "labels.csv", f"image,{columns.format(name)}{rows}")
        assert names_of(load_image_labels(tmp_path)) == {"a": ["cat", "dog"], "b 1": ["cat"]}


def test_streams_read_the_same_habits(tmp_path, caplog):
    saved = save_columns(tmp_path / "text", ["cat;Background", "NaN", "['cat', 'dog']"], TEXT)
    given = ["background", "cat", "dog"]
    streamed = load_image_labels(saved, class_names=given, streaming=True)
    assert [record["labels"] for record in streamed["train"]] == [[0], [], [0, 1]]
    assert caplog.text.count("in the labels means no class") == 2
    assert load_image_labels(saved, class_names=given)["train"]["labels"][:] == [[0], [], [0, 1]]
    save_images(tmp_path / "folders", "Train/cat/1.jpg", "valid/cat/2.jpg")
    assert [
        record["image_id"] for record in load_image_labels(tmp_path / "folders", streaming=True)["validation"]
    ] == ["2"]


def test_plain_cells_are_read_again_as_they_are():
    reader = LabelReader("labels")
    for cell in ("cat;dog", ["cat"], [1, 0], 3.0, None, [], True):
        assert reader.plain(reader.plain(cell, "here"), "here") == cell
    assert ids_of([[1, 0]]) == [[0]]
