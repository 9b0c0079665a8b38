"""Anybody's images: folders with a table, class folders, parquet files; columns, separators and class lists."""

import io
import json

import datasets
import numpy as np
import pytest
from PIL import Image

from synernet_hf.data import check_dataset, class_names, load_image_labels, load_wsss_dataset, read_label_file
from synernet_hf.data.labels import LabelReader


def save_image(path, size=(10, 8), color=(200, 60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def save_ids(path, ids, size=(10, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size[::-1], dtype=np.uint8)
    mask[:, : len(ids)] = ids
    Image.fromarray(mask).save(path)


@pytest.fixture
def folder(tmp_path):
    """Four images, the last in a subfolder, without a table yet."""
    root = tmp_path / "pets"
    for name in ("a.jpg", "b.jpg", "c.png", "more/d.jpg"):
        save_image(root / name)
    return root


def labels_of(loaded, split="train"):
    names = class_names(loaded)[1:]
    pairs = zip(loaded[split]["image_id"][:], loaded[split]["labels"][:], strict=True)
    return {image_id: [names[label] for label in labels] for image_id, labels in pairs}


EXPECTED = {"a": ["cat"], "b": ["cat", "dog"], "c": [], "d": ["dog"]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "file_name,labels\na.jpg,cat\nb.jpg,cat;dog\nc.png,\nmore/d.jpg,dog\n"),
        ("labels.csv", "id;label\na;cat\nb;cat|dog\nc;\nd;dog\n"),
        ("labels.csv", "Image\tLabels\na.jpg\tcat\nb.jpg\tdog, cat\nc.png\t\nd.jpg\tdog\n"),
        ("labels.csv", 'file_name,labels\na,cat\nb,"cat,dog"\nc,""\nd,dog\n'),
        ("labels.csv", "file_name,labels\na,cat\nb,cat dog\nc,\nd,dog\n"),
        ("labels.csv", "a.jpg,cat\nb.jpg,cat;dog\nc.png,\nmore/d.jpg,dog\n"),
        ("labels.csv", "\ufefffile,species\r\na,cat\r\nb,cat\r\nb,dog\r\nc,\r\nd,dog\r\n"),
        ("metadata.csv", "file_name,cat,dog\na.jpg,1,0\nb.jpg,1,1\nc.png,0,0\nmore/d.jpg,0,1\n"),
        (
            "metadata.jsonl",
            '{"file_name": "a.jpg", "labels": "cat"}\n{"file_name": "b.jpg", "labels": ["dog", "cat"]}\n\n'
            '{"file_name": "c.png", "labels": []}\n{"file_name": "more/d.jpg", "labels": ["dog"]}\n',
        ),
    ],
    ids=["semicolon", "ids", "tabs", "quoted", "spaces", "no_header", "long", "columns", "jsonl"],
)
def test_tables_of_every_kind_say_the_same(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8", newline="")
    loaded = load_image_labels(folder)
    assert class_names(loaded) == ["background", "cat", "dog"]
    assert labels_of(loaded) == EXPECTED
    assert loaded["train"].column_names == ["image", "image_id", "labels"]
    check_dataset(loaded)
    # the table itself may be named, too
    assert labels_of(load_image_labels(folder / name)) == EXPECTED


def test_columns_are_named_when_their_names_are_not_usual(folder):
    (folder / "labels.csv").write_text("nr,which,what,labels\n1,a,cat,x\n2,b,cat;dog,x\n3,c,,x\n4,d,dog,y\n")
    loaded = load_image_labels(folder, image_column="which", label_column="what")
    assert labels_of(loaded) == EXPECTED
    with pytest.raises(ValueError, match=r"labels.csv has no column 'wat' \(label_column\): it has nr, which, what"):
        load_image_labels(folder, label_column="wat")
    (folder / "labels.csv").write_text("which,what,why\na,cat,x\n")
    with pytest.raises(ValueError, match="no column of labels among which, what, why: name it with label_column"):
        load_image_labels(folder)


@pytest.mark.parametrize(
    ("cells", "column", "expected"),
    [
        (["traffic light", "car"], "label", [["traffic light"], ["car"]]),
        (["traffic light;car", "hot dog"], "labels", [["traffic light", "car"], ["hot dog"]]),
        ([["traffic light", "car"]], "labels", [["traffic light", "car"]]),
        (["cat dog cat", 3.0], "labels", [["cat", "dog"], ["3"]]),
    ],
)
def test_names_with_spaces_stay_whole_where_spaces_do_not_separate(cells, column, expected):
    reader = LabelReader(column)
    reader.settle(cells)
    assert [reader.names(cell, "here") for cell in cells] == expected


def test_numbers_are_names_or_with_a_class_list_ids(folder):
    (folder / "labels.csv").write_text("file_name,labels\na,2\nb,10;2\nc,\nd,10\n")
    assert class_names(load_image_labels(folder)) == ["background", "2", "10"]
    (folder / "labels.csv").write_text("file_name,labels\na,1\nb,1;2\nc,\nd,2\n")
    listed = ["background", "cat", "dog"]
    assert labels_of(load_image_labels(folder, class_names=listed)) == EXPECTED
    (folder / "labels.csv").write_text("file_name,labels\na,0\nb,1;2\n")
    with pytest.raises(ValueError, match=r"labels.csv, row 2: The class id 0 is not one of 1 to 2 \(0 is the back"):
        load_image_labels(folder, class_names=listed)


def test_label_vectors_in_json_lines(folder):
    (folder / "metadata.jsonl").write_text(
        '{"file_name": "a", "labels": [1, 0]}\n{"file_name": "d", "labels": [0, 1]}\n'
    )
    assert class_names(load_image_labels(folder)) == ["background", "class_1", "class_2"]
    assert labels_of(load_image_labels(folder, class_names=["background", "cat", "dog"])) == {
        "a": ["cat"],
        "d": ["dog"],
    }
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 1: the label vector \[1, 0\] does not hold .* 1 foreg"):
        load_image_labels(folder, class_names=["background", "cat"])


def test_splits_by_column_with_masks(folder):
    text = "file_name,labels,split,mask\na,cat,train,\nb,cat;dog,train,\nd,dog,val,masks_of_mine/d.png\n"
    (folder / "labels.csv").write_text(text)
    save_ids(folder / "masks_of_mine" / "d.png", [2, 255])
    loaded = load_image_labels(folder)
    assert {name: split.column_names[-1] for name, split in loaded.items()} == {
        "train": "labels",
        "validation": "mask",
    }
    assert np.asarray(loaded["validation"][0]["mask"])[0, :3].tolist() == [2, 255, 0]
    check_dataset(loaded)
    with pytest.raises(ValueError, match="labels.csv has no split 'test': it has train, val"):
        load_image_labels(folder, validation_split="test")
    (folder / "masks_of_mine" / "d.png").unlink()
    with pytest.raises(FileNotFoundError, match="labels.csv, row 4, names the mask masks_of_mine/d.png"):
        load_image_labels(folder)


def test_class_folders_with_splits_and_masks_beside(tmp_path):
    root = tmp_path / "scenes"
    for path in ("train/cat/1.jpg", "train/dog/1.jpg", "train/background/7.jpg", "val/dog/9.jpg"):
        save_image(root / path)
    save_ids(root / "val" / "masks" / "dog" / "9.png", [2])
    loaded = load_image_labels(root)
    assert class_names(loaded) == ["background", "cat", "dog"]
    # two images share the name 1.jpg, so their ids hold the folder
    assert labels_of(loaded) == {"background__7": [], "cat__1": ["cat"], "dog__1": ["dog"]}
    assert labels_of(loaded, "validation") == {"9": ["dog"]}
    check_dataset(loaded)
    save_image(root / "val" / "cow" / "3.jpg")
    with pytest.raises(ValueError, match="the folder .*val/cow: Unknown class name 'cow'"):
        load_image_labels(root)


def test_class_folders_without_splits_and_a_class_called_train(tmp_path):
    for name in ("bus", "train"):
        save_image(tmp_path / "vehicles" / name / f"{name}_1.png")
    loaded = load_image_labels(tmp_path / "vehicles")
    assert class_names(loaded) == ["background", "bus", "train"]
    assert list(loaded) == ["train"] and len(loaded["train"]) == 2
    save_image(tmp_path / "vehicles" / "loose.jpg")
    with pytest.raises(ValueError, match="1 images lie in .*vehicles itself .loose.jpg"):
        load_image_labels(tmp_path / "vehicles")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a table .* nor images in subfolders"):
        load_image_labels(tmp_path / "empty")


def test_the_class_list_is_that_of_the_training_split_or_the_given_one(folder):
    (folder / "labels.csv").write_text("file_name,labels,split\na,dog,train\nb,ant;dog,train\nd,dog,validation\n")
    assert class_names(load_image_labels(folder)) == ["background", "ant", "dog"]
    listed = ["background", "dog", "zebra", "ant"]
    loaded = load_image_labels(folder, class_names=listed)
    assert class_names(loaded) == listed
    assert loaded["train"]["labels"][:] == [[0], [0, 2]]
    with pytest.raises(ValueError, match="starts with 'background'"):
        load_image_labels(folder, class_names=["dog", "ant"])


def embedded(image):
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return {"bytes": stream.getvalue(), "path": None}


def write_parquet(root, values, feature, column="label"):
    """A folder as `push_to_hub` makes it: four training records, and the first again with a mask to evaluate on."""
    (root / "data").mkdir(parents=True)
    features = {"image": datasets.Image(), column: feature, "segmentation": datasets.Image()}
    image = embedded(Image.new("RGB", (6, 5), (10, 200, 30)))
    mask = embedded(Image.fromarray(np.array([[1, 0] * 3] * 5, dtype=np.uint8)))
    for split, part in (("train", values), ("validation", values[:1])):
        masks = {"segmentation": mask if split == "validation" else None}
        rows = [{"image": image, column: value} | masks for value in part]
        made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        made.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


LABEL = datasets.ClassLabel(names=["cat", "dog"])


@pytest.mark.parametrize(
    ("values", "feature", "given"),
    [
        ([[0], [0, 1], [], [1]], datasets.List(LABEL), None),
        ([[1], [1, 2], [0], [2]], datasets.List(datasets.ClassLabel(names=["background", "cat", "dog"])), None),
        ([["cat"], ["dog", "cat"], [], ["dog"]], datasets.List(datasets.Value("string")), None),
        (["cat", "cat;dog", "", "dog"], datasets.Value("string"), None),
        ([[1, 0], [1, 1], [0, 0], [0, 1]], datasets.List(datasets.Value("int64")), ["background", "cat", "dog"]),
        ([[True, False], [True, True], [False] * 2, [False, True]], datasets.List(datasets.Value("bool")), ["background", "cat", "dog"]),
        ([[1], [1, 2], [], [2]], datasets.List(datasets.Value("int32")), ["background", "cat", "dog"]),
    ],
    ids=["class_labels", "with_background", "names", "text", "multi_hot", "bools", "ids"],
)  # fmt: skip
def test_columns_of_every_kind_say_the_same(tmp_path, monkeypatch, values, feature, given):
    write_parquet(tmp_path / "parquet", values, feature)
    # a folder called as a format of the library is still a folder
    monkeypatch.chdir(tmp_path)
    loaded = load_image_labels("parquet", class_names=given, mask_column="segmentation")
    assert class_names(loaded) == ["background", "cat", "dog"]
    assert loaded["train"]["labels"][:] == [[0], [0, 1], [], [1]]
    assert loaded["train"].column_names == ["image", "image_id", "labels"]
    record = loaded["validation"][0]
    assert record["image"].size == record["mask"].size == (6, 5)
    assert np.asarray(record["mask"])[0].tolist() == [1, 0] * 3
    check_dataset(loaded)
    names = class_names(loaded)
    streamed = load_image_labels("parquet", class_names=names, mask_column="segmentation", streaming=True)
    assert isinstance(streamed, datasets.IterableDatasetDict) and class_names(streamed) == names
    assert [record["labels"] for record in streamed["train"]] == loaded["train"]["labels"][:]
    assert set(next(iter(streamed["validation"]))) == {"image", "image_id", "labels", "mask"}


def test_a_single_class_label_and_numbers_without_names(tmp_path):
    write_parquet(tmp_path / "one", [0, 1, 1, 0], LABEL)
    loaded = load_image_labels(tmp_path / "one", mask_column="segmentation")
    assert loaded["train"]["labels"][:] == [[0], [1], [1], [0]]
    write_parquet(tmp_path / "hot", [[1, 0, 1], [0, 0, 0]], datasets.List(datasets.Value("int64")))
    assert class_names(load_image_labels(tmp_path / "hot")) == ["background", "class_1", "class_2", "class_3"]
    with pytest.raises(ValueError, match="cannot be inferred while streaming: give class_names"):
        load_image_labels(tmp_path / "hot", streaming=True)
    # without a mask column there is nothing to score on
    assert "mask" not in load_image_labels(tmp_path / "hot")["validation"].column_names


def test_a_source_that_numbers_its_classes_keeps_its_order(tmp_path):
    write_parquet(tmp_path / "data", [[0], [1]], datasets.List(LABEL))
    loaded = load_image_labels(tmp_path / "data", class_names=["background", "dog", "emu", "cat"])
    assert class_names(loaded) == ["background", "cat", "dog"]
    with pytest.raises(ValueError, match="has the classes dog, which are not in the class list"):
        load_image_labels(tmp_path / "data", class_names=["background", "cat"])


def test_columns_and_splits_that_are_not_there(tmp_path):
    root = write_parquet(tmp_path / "data", [[0], [1]], datasets.List(LABEL), column="things")
    with pytest.raises(ValueError, match="columns image, things, segmentation, none .*: name it with label_column"):
        load_image_labels(root)
    with pytest.raises(ValueError, match=r"no column 'label' \(label_column\): it has image, things"):
        load_image_labels(root, label_column="label")
    with pytest.raises(ValueError, match="no split 'test': it has train, validation"):
        load_image_labels(root, label_column="things", mask_column="segmentation", validation_split="test")
    with pytest.raises(ValueError, match="The column 'segmentation' holds .*, which is not a label"):
        load_image_labels(root, image_column="image", label_column="segmentation")
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere/at/all"):
        load_image_labels(tmp_path / "nowhere/at/all")
    with pytest.raises((FileNotFoundError, ValueError), match="someone/pets cannot be opened"):
        load_image_labels("someone/pets")
    with pytest.raises(TypeError, match="does not take lable_column"):
        load_image_labels(root, lable_column="things")


def test_what_a_loader_saved_is_loaded_again_with_its_class_list(folder, tmp_path):
    (folder / "labels.csv").write_text("file_name,labels\na,dog\nb,cat\n")
    load_image_labels(folder, class_names=["background", "dog", "cat"]).save_to_disk(tmp_path / "saved")
    again = load_image_labels(tmp_path / "saved")
    assert class_names(again) == ["background", "dog", "cat"]
    assert labels_of(again) == {"a": ["dog"], "b": ["cat"]}


def test_by_name_and_by_path(folder):
    (folder / "labels.csv").write_text("file_name,labels\na,dog\nb,cat\n")
    options = {"label_column": "labels", "on_bad_image": "skip"}
    expected = labels_of(load_wsss_dataset("image_folder", folder, dataset_options=options))
    assert expected == labels_of(load_wsss_dataset(str(folder))) == {"a": ["dog"], "b": ["cat"]}
    with pytest.raises(ValueError, match="'image_folder' needs data_dir"):
        load_wsss_dataset("image_folder")
    with pytest.raises(ValueError, match="says where the data is, and so does data_dir"):
        load_wsss_dataset(str(folder), folder)
    with pytest.raises(ValueError, match="'image_folder' does not take num_train: it takes data_dir, class_names"):
        load_wsss_dataset("image_folder", folder, dataset_options={"num_train": 3})
    streamed = load_image_labels(folder, streaming=True, on_bad_image="skip")
    assert class_names(streamed) == ["background", "cat", "dog"]
    assert [record["image_id"] for record in streamed["train"]] == ["a", "b"]
    assert list(
        load_wsss_dataset("shapes", dataset_options={"num_train": 1, "num_validation": 1, "on_bad_image": "skip"})
    )


def test_masks_that_do_not_follow_the_class_list_are_suspected(folder, caplog):
    (folder / "metadata.jsonl").write_text(
        "".join(
            json.dumps({"file_name": name, "labels": label, "split": split, "mask": mask}) + "\n"
            for name, label, split, mask in (("a", "ant", "train", ""), ("b", "dog", "train", ""), ("d", "dog", "val", "m.png"))
        )
    )  # fmt: skip
    save_ids(folder / "m.png", [1, 1])
    check_dataset(load_image_labels(folder))
    assert "the mask shows classes that the image labels do not name" in caplog.text
    caplog.clear()
    save_ids(folder / "m.png", [2, 2])
    check_dataset(load_image_labels(folder))
    assert "the mask shows" not in caplog.text


def test_the_first_row_of_a_table_without_header_is_not_split_at_its_labels(folder):
    (folder / "labels.csv").write_text("a.jpg,cat;dog;emu\nb.jpg,dog\n")
    assert labels_of(load_image_labels(folder)) == {"a": ["cat", "dog", "emu"], "b": ["dog"]}


def test_a_folder_with_parquet_metadata_goes_through_the_reader_of_the_library(tmp_path):
    rows = {"file_name": ["a.jpg", "more/b.png"], "labels": [["dog", "cat"], []], "image_id": ["one", "two"]}
    for name in rows["file_name"]:
        save_image(tmp_path / "pets" / name)
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "pets" / "metadata.parquet")
    loaded = load_image_labels(tmp_path / "pets")
    assert labels_of(loaded) == {"one": ["cat", "dog"], "two": []}
    assert loaded["train"][1]["image"].size == (10, 8)
    check_dataset(loaded)


def test_spaces_and_commas_separate_names_in_a_label_file_as_in_a_table(tmp_path):
    listed = ["background", "cat", "dog", "traffic light"]
    for text in ("a,cat dog\nb,\n", "id,labels\na,cat;dog\nb,\n", "a;cat,dog\nb;\n", 'a,"dog, cat"\nb,""\n'):
        (tmp_path / "labels.csv").write_text(text)
        assert read_label_file(tmp_path / "labels.csv", listed) == {"a": [0, 1], "b": []}, text
    (tmp_path / "labels.csv").write_text("a.jpg,traffic light;dog\n")
    assert read_label_file(tmp_path / "labels.csv", listed) == {"a": [1, 2]}
