import logging
import shutil

import numpy as np
import pytest
from devkit_utils import (
    VOC_NAMES,
    label_matrix,
    vectors_of,
    write_annotation,
    write_labels_csv,
    write_labels_csv_multi_hot,
    write_labels_json,
    write_labels_npz,
    write_voc_devkit,
)
from PIL import Image

from synernet_hf.data import TrainDataset, TrainTransform, class_names, load_voc2012, load_wsss_dataset


def labels_of(dataset_dict):
    return {
        image_id: vector
        for name, split in dataset_dict.items()
        for image_id, vector in zip(split["image_id"][:], vectors_of(dataset_dict, name), strict=True)
    }


@pytest.fixture
def expected(devkit):
    return dict(zip(devkit.labels, label_matrix(devkit.labels).tolist(), strict=True))


def test_splits_follow_the_lists_and_only_validation_has_masks(devkit):
    loaded = load_voc2012(devkit.root)
    assert loaded["train"]["image_id"][:] == devkit.train_ids
    assert loaded["validation"]["image_id"][:] == devkit.validation_ids
    assert loaded["train"].column_names == ["image", "image_id", "labels"]
    assert loaded["validation"].column_names == ["image", "image_id", "labels", "mask"]
    assert class_names(loaded) == VOC_NAMES
    record = loaded["validation"][0]
    assert record["image"].size == (48, 40)
    ids = set(np.unique(np.asarray(record["mask"])))
    assert ids == {0, 255} | {VOC_NAMES.index(name) for name in devkit.labels[record["image_id"]]}


def test_streams_give_the_same_records(devkit):
    loaded, streamed = load_voc2012(devkit.root), load_voc2012(devkit.root, streaming=True)
    assert class_names(streamed) == VOC_NAMES
    for split, records in streamed.items():
        for record, expected in zip(records, loaded[split], strict=True):
            assert list(record["labels"]) == expected["labels"]
            assert record["image"].tobytes() == expected["image"].tobytes()
            assert ("mask" in record) == (split == "validation")


def test_devkit_and_voc2012_folder_are_the_same(devkit):
    assert labels_of(load_voc2012(devkit.root)) == labels_of(load_voc2012(str(devkit.voc)))


def test_all_label_sources_agree(devkit, expected, tmp_path):
    shuffled = ["background", *reversed(VOC_NAMES[1:])]
    sources = [
        None,
        "annotations",
        "masks",
        write_labels_npz(tmp_path / "labels.npz", devkit.labels),
        write_labels_json(tmp_path / "names.json", devkit.labels),
        write_labels_json(tmp_path / "vectors.json", devkit.labels, multi_hot=True),
        *(
            write_labels_csv(tmp_path / f"{index}.csv", devkit.labels, separator)
            for index, separator in enumerate((" ", ";", "|", "; "))
        ),
        write_labels_csv_multi_hot(tmp_path / "columns.csv", devkit.labels),
        write_labels_csv_multi_hot(tmp_path / "shuffled.csv", devkit.labels, shuffled),
    ]
    for source in sources:
        assert labels_of(load_voc2012(devkit.root, source)) == expected, f"labels from {source}"


def test_csv_without_a_header_has_the_order_of_the_class_list(devkit, expected, tmp_path):
    path = write_labels_csv_multi_hot(tmp_path / "labels.csv", devkit.labels)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert labels_of(load_voc2012(devkit.root, path)) == expected
    path = write_labels_csv(tmp_path / "names.csv", devkit.labels)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert labels_of(load_voc2012(devkit.root, path)) == expected


def test_training_needs_no_mask(devkit, tmp_path):
    labels = write_labels_npz(tmp_path / "labels.npz", devkit.labels)
    transform = TrainTransform(32)
    before = [TrainDataset(load_voc2012(devkit.root, labels)["train"], transform)[index, index] for index in range(6)]
    shutil.rmtree(devkit.voc / "SegmentationClassAug")
    loaded = load_voc2012(devkit.root, labels)
    after = [TrainDataset(loaded["train"], transform)[index, index] for index in range(6)]
    assert all(
        (one["image"] == other["image"]).all() and one["labels"] == other["labels"]
        for one, other in zip(before, after, strict=True)
    )
    assert "mask" not in loaded["validation"].column_names


def test_loading_opens_no_image(devkit):
    for path in [*(devkit.voc / "JPEGImages").iterdir(), *(devkit.voc / "SegmentationClassAug").iterdir()]:
        path.write_bytes(b"not an image")
    assert len(load_voc2012(devkit.root)["train"]) == 6


def test_segmentation_class_is_the_second_choice(devkit):
    (devkit.voc / "SegmentationClassAug").rename(devkit.voc / "SegmentationClass")
    assert np.asarray(load_voc2012(devkit.root)["validation"][0]["mask"]).max() == 255


def test_train_is_taken_where_train_aug_is_missing_unless_asked_by_name(tmp_path, caplog):
    devkit = write_voc_devkit(tmp_path, train_list="train")
    with caplog.at_level(logging.WARNING):
        assert len(load_voc2012(devkit.root)["train"]) == 6
    assert "training on the list train.txt instead" in caplog.text
    with pytest.raises(FileNotFoundError, match="for the split 'train_aug': the folder has train, val"):
        load_voc2012(devkit.root, train_split="train_aug")


def test_lists_with_paths_are_read(devkit):
    path = devkit.voc / "ImageSets" / "Segmentation" / "train_aug.txt"
    lines = (f"/JPEGImages/{name}.jpg /SegmentationClassAug/{name}.png\n" for name in devkit.train_ids)
    path.write_text("".join(lines))
    assert load_voc2012(devkit.root)["train"]["image_id"][:] == devkit.train_ids


def test_missing_folder_and_foreign_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder .*nowhere"):
        load_voc2012(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no JPEGImages: give the VOCdevkit folder"):
        load_voc2012(tmp_path)


def test_missing_and_empty_list(devkit):
    with pytest.raises(FileNotFoundError, match="for the split 'test': the folder has train_aug, val"):
        load_voc2012(devkit.root, validation_split="test")
    (devkit.voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n")
    with pytest.raises(ValueError, match="the split 'val' is empty"):
        load_voc2012(devkit.root)


def test_id_without_image_or_mask_or_annotation(devkit):
    first, second = devkit.validation_ids[:2]
    (devkit.voc / "Annotations" / f"{first}.xml").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 3 images have no annotation in .* \({first}\)"):
        load_voc2012(devkit.root)
    (devkit.voc / "SegmentationClassAug" / f"{second}.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of the 3 images of the split 'val' have no mask.*\({second}\)"):
        load_voc2012(devkit.root, "masks")
    for image_id in devkit.train_ids[:5]:
        (devkit.voc / "JPEGImages" / f"{image_id}.jpg").unlink()
    named = ", ".join(devkit.train_ids[:3])
    with pytest.raises(FileNotFoundError, match=rf"'train_aug' names 5 images .*\({named} and 2 more\)"):
        load_voc2012(devkit.root)


def test_no_annotations_folder_names_the_alternatives(devkit):
    shutil.rmtree(devkit.voc / "Annotations")
    with pytest.raises(FileNotFoundError, match="has no Annotations: give image_labels"):
        load_voc2012(devkit.root)


def test_unknown_class_in_an_annotation(devkit):
    path = devkit.voc / "Annotations" / f"{devkit.train_ids[0]}.xml"
    write_annotation(path, ["dogg"])
    with pytest.raises(ValueError, match="Unknown class name 'dogg': did you mean dog"):
        load_voc2012(devkit.root)


def test_label_file_without_ids_of_the_split(devkit, tmp_path):
    kept = {image_id: devkit.labels[image_id] for image_id in [devkit.train_ids[0], *devkit.validation_ids]}
    path = write_labels_json(tmp_path / "labels.json", kept)
    named = ", ".join(devkit.train_ids[1:4])
    with pytest.raises(ValueError, match=rf"lacks 5 of the 6 images of the split 'train_aug' \({named} and 2 more\)"):
        load_voc2012(devkit.root, path)


def test_label_vectors_of_wrong_length_in_each_format(devkit, tmp_path):
    image_id = devkit.train_ids[0]
    np.savez(tmp_path / "labels.npz", ids=np.array([image_id]), labels=np.zeros((1, 21), dtype=np.uint8))
    (tmp_path / "labels.json").write_text(f'{{"{image_id}": [0, 1]}}')
    (tmp_path / "labels.csv").write_text(f"{image_id},0,1\n")
    for suffix, length in (("npz", 21), ("json", 2), ("csv", 2)):
        sentence = rf"labels.{suffix}, .*{image_id}.*the label vector .* each of the 20 foreground classes: it has the length {length}"
        with pytest.raises(ValueError, match=sentence):
            load_voc2012(devkit.root, tmp_path / f"labels.{suffix}")


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("labels.json", '{"2007_000000": ["catt"]}', "labels.json, 2007_000000: .*'catt': did you mean cat"),
        ("labels.json", '{"2007_000000": ["background", "catt"]}', "labels.json, 2007_000000: .*'catt': did you mean"),
        ("labels.json", '["2007_000000"]', "one object from identifier to a list"),
        ("labels.json", "{", "is not valid JSON"),
        ("labels.csv", "2007_000000,cat zebra\n", "Unknown class name 'zebra'"),
        ("labels.csv", "\n", "is empty"),
        ("labels.csv", "id,cat,dog\n2007_000000,1,0\n", "names 2 classes, but each of the 20"),
        ("labels.csv", "2007_000000" + ",2" * 20, r"labels.csv, row 1 \(2007_000000\): .*values other than 0 and 1"),
        ("labels.csv", "2007_000000" + ",yes" * 20, r"row 1 \(2007_000000\): .*values other than 0 and 1"),
        ("labels.txt", "2007_000000 cat\n", "suffix '.txt', but .npz, .json or .csv"),
    ],
)
def test_bad_label_files_get_a_sentence(devkit, tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        load_voc2012(devkit.root, tmp_path / name)


def test_missing_label_file_and_npz_without_its_arrays(devkit, tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no label file .*nothing.npz"):
        load_voc2012(devkit.root, tmp_path / "nothing.npz")
    np.savez(tmp_path / "labels.npz", names=np.zeros(3))
    with pytest.raises(ValueError, match="as an .npz archive of 'ids' and 'labels' .it holds the arrays names"):
        load_voc2012(devkit.root, tmp_path / "labels.npz")


@pytest.mark.parametrize("broken", ["empty", "half", "hole", "text", "array", "objects", "scalar"])
def test_unreadable_npz_gets_a_sentence(devkit, tmp_path, broken):
    path = tmp_path / "labels.npz"
    np.savez_compressed(path, ids=np.array(["2007_000000"]), labels=np.ones((1, 20), dtype=np.uint8))
    content = path.read_bytes()
    if broken == "array":
        with path.open("wb") as stream:
            np.save(stream, np.ones((1, 20)))
    elif broken == "objects":
        np.savez(path, ids=np.array(["2007_000000"], dtype=object), labels=np.ones((1, 20)))
    elif broken == "scalar":
        np.savez(path, ids=np.array("2007_000000"), labels=np.ones((1, 20)))
    else:
        hole = content[:60] + bytes(20) + content[80:]
        path.write_bytes({"empty": b"", "half": content[: len(content) // 2], "hole": hole, "text": b"ids"}[broken])
    with pytest.raises(ValueError, match="The label file .*labels.npz ") as caught:
        load_voc2012(devkit.root, path)
    assert "allow_pickle=True" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffix", "sentence"), [("json", "line 1, is not UTF-8 text"), ("csv", "line 1, is not UTF-8 text")]
)
def test_label_file_that_is_no_text_gets_a_sentence(devkit, tmp_path, suffix, sentence):
    path = tmp_path / f"labels.{suffix}"
    path.write_bytes(b"\xff\xfe\x80")
    with pytest.raises(ValueError, match=f"labels.{suffix},? {sentence}"):
        load_voc2012(devkit.root, path)


def test_load_by_name(devkit):
    assert labels_of(load_wsss_dataset("voc2012", devkit.root)) == labels_of(load_voc2012(devkit.root))
    with pytest.raises(ValueError, match="Unknown data set 'voc2013'"):
        load_wsss_dataset("voc2013", devkit.root)
    with pytest.raises(ValueError, match="'voc2012' needs data_dir"):
        load_wsss_dataset("voc2012")
    with pytest.raises(ValueError, match="'shapes' does not take data_dir"):
        load_wsss_dataset("shapes", devkit.root)


def test_real_devkit_and_real_label_file(root):
    shared = root.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("the real images are not beside the checkout")
    loaded = load_voc2012(shared / "VOCdevkit", shared / "voc2012_image_labels.npz")
    assert (len(loaded["train"]), len(loaded["validation"])) == (3131, 300)
    from_masks = load_voc2012(shared / "VOCdevkit", "masks", train_split="train")
    assert loaded["validation"]["labels"][:] == from_masks["validation"]["labels"][:]


def rename_image(devkit, old, new, suffix=".jpg"):
    """Renames an image with its mask and annotation."""
    for folder, kind, ending in (
        ("JPEGImages", ".jpg", suffix),
        ("SegmentationClassAug", ".png", ".PNG"),
        ("Annotations", ".xml", ".xml"),
    ):
        path = devkit.voc / folder / f"{old}{kind}"
        if path.exists():
            path.rename(path.with_name(new + ending))


def write_list(devkit, name, lines, encoding="utf-8", newline="\n"):
    path = devkit.voc / "ImageSets" / "Segmentation" / f"{name}.txt"
    path.write_bytes(newline.join([*lines, ""]).encode(encoding))
    return path


def test_an_image_listed_twice_is_used_once_and_that_is_said(devkit, caplog):
    first, *others = devkit.validation_ids
    write_list(devkit, "val", [first, *others, f"/JPEGImages/{first}.jpg /SegmentationClassAug/{first}.png"])
    assert load_voc2012(devkit.root)["validation"]["image_id"][:] == devkit.validation_ids
    assert f"names 1 images more than once ({first}): each is used once" in caplog.text


@pytest.mark.parametrize("encoding, newline", [("utf-8-sig", "\n"), ("utf-16", "\r\n"), ("utf-8", "\r\n")])
def test_lists_of_other_systems_and_names_with_spaces(devkit, encoding, newline):
    first, second, third = devkit.validation_ids
    rename_image(devkit, first, "a photo 1", ".JPEG")
    rename_image(devkit, second, "cafe\u0301")
    lines = ["a photo 1", r"JPEGImages\caf" + "\u00e9" + r".jpg SegmentationClassAug\caf" + "\u00e9.png", third]
    write_list(devkit, "val", lines, encoding, newline)
    loaded = load_voc2012(devkit.root, "masks")
    assert loaded["validation"]["image_id"][:] == ["a photo 1", "caf\u00e9", third]
    assert all(record["mask"].size == record["image"].size for record in loaded["validation"])
    assert load_voc2012(devkit.root)["validation"]["labels"][:] == loaded["validation"]["labels"][:]
    for root in ("/", "", "\\", "VOC2012/"):
        write_list(devkit, "val", [f"{root}JPEGImages/a photo 1.JPEG {root}SegmentationClassAug/a photo 1.PNG"])
        assert load_voc2012(devkit.root)["validation"]["image_id"][:] == ["a photo 1"]


def test_a_list_that_is_no_text(devkit):
    write_list(devkit, "val", [devkit.validation_ids[0], "caf\u00e9"], "latin-1")
    with pytest.raises(ValueError, match="val.txt, line 2, is not UTF-8 text"):
        load_voc2012(devkit.root)


def test_two_files_of_one_name_are_two_images(devkit):
    first = devkit.validation_ids[0]
    shutil.copy(devkit.voc / "JPEGImages" / f"{first}.jpg", devkit.voc / "JPEGImages" / f"{first}.png")
    write_list(devkit, "val", [f"{first}.jpg", f"{first}.png"])
    assert load_voc2012(devkit.root)["validation"]["image_id"][:] == [f"{first}.jpg", f"{first}.png"]


def test_the_validation_split_alone(devkit):
    (devkit.voc / "ImageSets" / "Segmentation" / "train_aug.txt").unlink()
    assert list(load_voc2012(devkit.root, splits=["validation"])) == ["validation"]


def test_masks_of_colours_give_no_labels(devkit):
    path = devkit.voc / "SegmentationClassAug" / f"{devkit.train_ids[0]}.png"
    with Image.open(path) as mask:
        colours = mask.convert("RGB")
    colours.save(path)
    with pytest.raises(ValueError, match=rf"The mask .*{path.name} has mode RGB; a palette or greyscale image"):
        load_voc2012(devkit.root, "masks")
