"""Annotation files in the layouts that tools write: labels for training, masks of the validation split to score."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from synernet_hf.data import check_dataset, class_names, load_image_labels, load_wsss_dataset


SIZE = (20, 16)  # width, height


def save_image(path, shade=90):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE, (shade, 120, 40)).save(path)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def square(left, top, side):
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def coco_file(files, objects, categories=((1, "cat"), (2, "dog"))):
    """`objects`: (position of the file, category id, segmentation)."""
    images = [{"id": n, "file_name": name, "width": 20, "height": 16} for n, name in enumerate(files)]
    annotations = [
        {
            "id": n,
            "image_id": image,
            "category_id": category,
            "segmentation": outline,
            "bbox": [1, 1, 4, 4],
            "area": 16,
        }
        for n, (image, category, outline) in enumerate(objects)
    ]
    rows = [{"id": row[0], "name": row[1], "supercategory": row[2] if row[2:] else ""} for row in categories]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": rows}


def labels_of(splits):
    names = class_names(splits)[1:]
    return {
        split: {record["image_id"]: [names[label] for label in record["labels"]] for record in records}
        for split, records in splits.items()
    }


def mask_of(splits, index=0):
    return np.asarray(splits["validation"][index]["mask"])


@pytest.fixture
def coco_2017(tmp_path):
    for name in ("train2017/1.jpg", "train2017/2.jpg", "val2017/1.jpg"):
        save_image(tmp_path / name)
    folder = tmp_path / "annotations"
    write_json(
        folder / "instances_train2017.json", coco_file(["1.jpg", "2.jpg"], [(0, 1, square(1, 1, 4)), (1, 2, [])])
    )
    write_json(folder / "instances_val2017.json", coco_file(["1.jpg"], [(0, 2, square(2, 2, 4))]))
    return tmp_path


def test_coco_with_several_files(coco_2017, caplog):
    captions = {"images": [], "annotations": [{"image_id": 1, "id": 1, "caption": "a cat"}]}
    write_json(coco_2017 / "annotations" / "captions_val2017.json", captions)
    splits = check_dataset(load_wsss_dataset(str(coco_2017)))
    assert labels_of(splits) == {"train": {"1": ["cat"], "2": ["dog"]}, "validation": {"1": ["dog"]}}
    assert (mask_of(splits)[2:6, 2:6] == 2).all() and (mask_of(splits) > 0).sum() == 16
    assert "not read, as no files of objects: captions_val2017.json" in caplog.text


def test_coco_files_of_other_kinds_are_refused(coco_2017):
    folder = coco_2017 / "annotations"
    for path in folder.iterdir():
        path.unlink()
    content = coco_file(["1.jpg"], [])
    content["annotations"] = [{"image_id": 0, "file_name": "1.png", "segments_info": [{"id": 3, "category_id": 1}]}]
    write_json(folder / "panoptic_train2017.json", content)
    with pytest.raises(ValueError, match="panoptic_train2017.json holds panoptic segments: give a file of objects"):
        load_image_labels(coco_2017)
    content = {"images": content["images"], "annotations": [{"image_id": 0, "id": 1, "caption": "a cat"}]}
    (folder / "panoptic_train2017.json").unlink()
    write_json(folder / "captions_train2017.json", content)
    with pytest.raises(ValueError, match="captions_train2017.json holds captions: give a file of objects"):
        load_image_labels(coco_2017)


def test_coco_splits_that_cannot_be_told_apart(coco_2017, caplog):
    folder = coco_2017 / "annotations"
    (folder / "instances_val2017.json").rename(folder / "instances_late.json")
    (coco_2017 / "val2017").rename(coco_2017 / "late")
    assert set(load_image_labels(coco_2017)) == {"train"}
    assert "'late' of the splits is not used" in caplog.text
    assert set(load_image_labels(coco_2017, validation_split="late")) == {"train", "validation"}
    with pytest.raises(ValueError, match="has no split 'early': it has late, train2017"):
        load_image_labels(coco_2017, train_split="early")


def test_one_coco_file_beside_a_folder_of_images(tmp_path):
    """Label Studio and CVAT write COCO so; the file itself may be named."""
    save_image(tmp_path / "images" / "a b.jpg")
    content = coco_file(["images/a b.jpg"], [(0, 1, square(1, 1, 4))])
    write_json(tmp_path / "result.json", content)
    expected = {"train": {"a b": ["cat"]}}
    assert labels_of(load_image_labels(tmp_path)) == labels_of(load_image_labels(tmp_path / "result.json")) == expected
    (tmp_path / "result.json").unlink()
    content["images"][0]["file_name"] = "a b.jpg"
    write_json(tmp_path / "annotations" / "instances_default.json", content)
    assert labels_of(load_image_labels(tmp_path)) == expected


@pytest.fixture
def roboflow(tmp_path):
    categories = [(0, "pets", "none"), (1, "cat", "pets"), (2, "dog", "pets")]
    for number, split in enumerate(("train", "valid", "test")):
        save_image(tmp_path / split / "a_jpg.rf.0a1b.jpg")
        objects = [(0, 1 + number % 2, square(3, 3, 5)), (0, 1, square(4, 4, 2))]
        write_json(tmp_path / split / "_annotations.coco.json", coco_file(["a_jpg.rf.0a1b.jpg"], objects, categories))
    (tmp_path / "README.roboflow.txt").write_text("an export")
    return tmp_path


def test_roboflow(roboflow, caplog):
    splits = check_dataset(load_wsss_dataset(str(roboflow)))
    assert class_names(splits) == ["background", "cat", "dog"]
    assert labels_of(splits) == {
        "train": {"a_jpg.rf.0a1b": ["cat"]},
        "validation": {"a_jpg.rf.0a1b": ["cat", "dog"]},
    }
    assert (mask_of(splits) == 1).sum() == 4 and (mask_of(splits) == 2).sum() == 21
    assert caplog.text.count("the category 'pets' stands for all classes and is left out") == 1
    assert "'test' of the splits is not used" in caplog.text


def test_the_row_of_all_classes_is_a_class_where_it_is_used(roboflow):
    path = roboflow / "train" / "_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0
    write_json(path, content)
    assert class_names(load_image_labels(roboflow)) == ["background", "pets", "cat", "dog"]


def task(number, image, *results, **fields):
    annotations = [
        {
            "id": 10 * number + n,
            "was_cancelled": False,
            "result": [
                {"from_name": tag, "to_name": "image", "type": "choices", "value": {"choices": list(choices)}}
                for tag, choices in result.items()
            ],
        }
        for n, result in enumerate(results)
    ]
    return {"id": number, "data": {"image": image}, "annotations": annotations, "predictions": []} | fields


@pytest.fixture
def label_studio(tmp_path):
    for name in ("0a1b2c3d-tom.jpg", "sub/rex 1.jpg", "felix.jpg", "none.jpg", "open.jpg", "skipped.jpg"):
        save_image(tmp_path / name)
    tasks = [
        task(1, "/data/upload/3/0a1b2c3d-tom.jpg", {"animal": ["cat"]}),
        task(2, "/data/local-files/?d=pets/sub/rex%201.jpg", {"animal": ["dog"]}, {"animal": ["cat"]}),
        task(3, "https://example.org/bucket/9f8e7d6c-felix.jpg?sig=1.2", {"animal": ["cat, tabby"]}),
        task(4, "/data/upload/3/none.jpg", {}),
        task(5, "/data/upload/3/open.jpg"),
        task(6, "/data/upload/3/skipped.jpg", {"animal": ["dog"]}),
    ]
    tasks[5]["annotations"][0]["was_cancelled"] = True
    write_json(tmp_path / "project-3-at-2026.json", tasks)
    return tmp_path


LABEL_STUDIO = {"0a1b2c3d-tom": ["cat"], "rex 1": ["cat", "dog"], "felix": ["cat, tabby"], "none": []}


def test_label_studio(label_studio, caplog):
    splits = check_dataset(load_wsss_dataset(str(label_studio)))
    assert labels_of(splits) == {"train": LABEL_STUDIO}
    assert "2 tasks without a finished annotation are left out" in caplog.text
    assert "1 tasks have several annotations, whose labels are joined" in caplog.text
    assert "1 images of the split 'train' have no label (none)" in caplog.text
    path = label_studio / "project-3-at-2026.json"
    assert labels_of(load_image_labels(path)) == {"train": LABEL_STUDIO}
    path.write_text(path.read_text(), encoding="utf-16")
    assert labels_of(load_image_labels(label_studio)) == {"train": LABEL_STUDIO}


def test_label_studio_in_short_form_and_with_boxes(label_studio):
    short = [
        {"image": "/data/upload/3/0a1b2c3d-tom.jpg", "id": 1, "choice": "cat", "annotator": 1, "lead_time": 2.5},
        {"image": "/data/upload/3/felix.jpg", "id": 2, "choice": {"choices": ["cat", "dog"]}, "annotator": 1},
        {
            "image": "/data/upload/3/none.jpg",
            "id": 3,
            "choice": [{"rectanglelabels": ["dog"], "x": 1}],
            "annotator": 1,
        },
    ]
    write_json(label_studio / "project-3-at-2026.json", short)
    expected = {"0a1b2c3d-tom": ["cat"], "felix": ["cat", "dog"], "none": ["dog"]}
    assert labels_of(load_image_labels(label_studio)) == {"train": expected}


def test_label_studio_with_several_tags(label_studio):
    path = label_studio / "project-3-at-2026.json"
    tasks = json.loads(path.read_text())
    tasks[0] = task(1, "felix.jpg", {"animal": ["cat"], "quality": ["good"]})
    write_json(path, tasks)
    with pytest.raises(ValueError, match="labels of the tags animal, quality: name the one to take with label_column"):
        load_image_labels(label_studio)
    with pytest.raises(ValueError, match="no labels of the tag 'size' .*: it has animal, quality"):
        load_image_labels(label_studio, label_column="size")
    assert class_names(load_image_labels(label_studio, label_column="quality"))[1:] == ["good"]


def test_label_studio_faults(label_studio):
    (label_studio / "felix.jpg").unlink()
    with pytest.raises(
        FileNotFoundError, match="task 3: there is no image https://example.org/bucket/9f8e7d6c-felix.jpg.* below"
    ):
        load_image_labels(label_studio)
    skipped = {}
    assert "felix" not in load_image_labels(label_studio, on_bad_image="skip", skipped=skipped)["train"]["image_id"]
    assert "task 3" in skipped["train"][0]
    path = label_studio / "project-3-at-2026.json"
    write_json(path, [{"data": {"text": "no image"}, "annotations": []}])
    with pytest.raises(ValueError, match="is not an export of Label Studio"):
        load_image_labels(label_studio)
    path.write_text('[{"data": ')
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_image_labels(label_studio)


def shape(label, points, kind="polygon", **fields):
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}} | fields


def labelme_file(path, shapes, image=None, flags=None):
    save_image(path.with_suffix(".jpg"))
    content = {"version": "5.4.1", "flags": flags or {}, "shapes": shapes, "imagePath": image or f"{path.stem}.jpg"}
    write_json(path, content | {"imageData": None, "imageHeight": 16, "imageWidth": 20})


BOX = [[2, 3], [6, 9]]


@pytest.fixture
def labelme(tmp_path):
    labelme_file(tmp_path / "train" / "a.json", [shape("cat", BOX, "rectangle"), shape("_background_", BOX, "line")])
    labelme_file(tmp_path / "train" / "b.json", [], flags={"dog": True, "cat": False})
    labelme_file(tmp_path / "train" / "c.json", [])
    save_image(tmp_path / "train" / "open.jpg")
    pixels = io.BytesIO()
    Image.fromarray(np.array([[0, 255], [255, 255]], dtype=np.uint8)).save(pixels, format="PNG")
    stored = base64.b64encode(pixels.getvalue()).decode("ascii")
    shapes = [
        shape("cat", [[8, 2], [12, 2], [12, 6], [8, 6]]),
        shape("dog", BOX, "rectangle"),
        shape("__ignore__", [[18, 14], [19, 14]], "circle"),
        shape("dog", [[14, 1], [16, 3]], "mask", mask=stored),
    ]
    labelme_file(tmp_path / "val" / "d.json", shapes, image="..\\images\\d.jpg")
    return tmp_path


def test_labelme(labelme, caplog):
    splits = check_dataset(load_wsss_dataset(str(labelme)))
    assert labels_of(splits) == {"train": {"a": ["cat"], "b": ["dog"], "c": []}, "validation": {"d": ["cat", "dog"]}}
    mask = mask_of(splits)
    assert (mask[2:6, 8:12] == 1).all() and (mask == 1).sum() == 16
    assert (mask[3:9, 2:6] == 2).all() and mask[1:3, 14:16].tolist() == [[0, 2], [2, 2]] and (mask == 2).sum() == 27
    assert mask[14, 18] == 255
    assert "1 images without an annotation file are left out" in caplog.text


def test_labelme_in_folders_that_are_no_classes(tmp_path):
    for name, label in (("monday", "cat"), ("tuesday", "dog")):
        labelme_file(tmp_path / name / "1.json", [shape(label, BOX, "rectangle")])
    loaded = load_image_labels(tmp_path)
    assert labels_of(loaded) == {"train": {"monday__1": ["cat"], "tuesday__1": ["dog"]}}
    for name in ("monday", "tuesday"):
        (tmp_path / "annotations").mkdir(exist_ok=True)
        content = json.loads((tmp_path / name / "1.json").read_text()) | {"imagePath": f"../{name}/1.jpg"}
        write_json(tmp_path / "annotations" / f"{name}.json", content)
        (tmp_path / name / "1.json").unlink()
    assert labels_of(load_image_labels(tmp_path)) == labels_of(loaded)


def test_several_kinds_of_files(labelme, caplog):
    content = coco_file(["train/a.jpg"], [(0, 1, [])])
    write_json(labelme / "converted.json", content)
    assert labels_of(load_image_labels(labelme)) == {"train": {"a": ["cat"]}}
    assert "has annotation files of COCO and labelme: those of COCO are read" in caplog.text


def test_labelme_boxes_alone_are_no_masks(labelme, caplog):
    labelme_file(labelme / "val" / "d.json", [shape("cat", BOX, "rectangle"), shape("dog", [[1, 1]], "point")])
    splits = load_image_labels(labelme)
    assert "mask" not in splits["validation"].column_names
    assert "the split 'validation' has no masks: it cannot be scored" in caplog.text
    # among outlines a point has no extent that could be scored
    labelme_file(
        labelme / "val" / "e.json", [shape("cat", [[8, 2], [12, 2], [12, 6]]), shape("dog", [[1, 1]], "point")]
    )
    labelme_file(labelme / "val" / "d.json", [shape("cat", BOX, "rectangle")])
    with pytest.raises(ValueError, match=r"1 of 2 records .* mask of e .* .shape 2: the segmentation null encloses"):
        check_dataset(load_image_labels(labelme))


@pytest.mark.parametrize(
    "broken",
    [
        shape("cat", [[1, 2]], "circle"),
        shape("cat", 7),
        shape("cat", BOX, "mask", mask="no base64"),
        shape("cat", BOX, "mask", mask=None),
    ],
)
def test_labelme_shapes_that_cannot_be_read(labelme, broken):
    labelme_file(labelme / "val" / "d.json", [broken])
    with pytest.raises(ValueError, match="d.json is not a labelme file"):
        load_image_labels(labelme)


def test_labelme_shapes_of_other_versions(labelme):
    turned = shape("dog", [[2, 3], [6, 3], [6, 9], [2, 9]], "rectangle")
    labelme_file(labelme / "val" / "d.json", [shape("cat", [[8, 2], [12, 2], [12, 6], [8, 6]], None), turned])
    mask = mask_of(check_dataset(load_image_labels(labelme)))
    assert (mask == 1).sum() == 16 and (mask[3:9, 2:6] == 2).all()


@pytest.mark.parametrize("name", ["coco_2017", "labelme"])
def test_the_validation_split_alone(request, name):
    options = {"splits": ["validation"], "class_names": ["background", "cat", "dog"]}
    folder = str(request.getfixturevalue(name))
    assert list(load_wsss_dataset(folder, dataset_options=options)) == ["validation"]


def test_labelme_faults(labelme):
    labelme_file(labelme / "train" / "twin.json", [shape("cat", BOX, "rectangle")], image="a.jpg")
    with pytest.raises(ValueError, match=r"a.json and .*twin.json are both of the image .*a.jpg: keep one of them"):
        load_image_labels(labelme)
    labelme_file(labelme / "train" / "twin.json", [shape("cat", BOX, "rectangle")])
    (labelme / "train" / "twin.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"twin.json: there is no image twin.jpg below"):
        load_image_labels(labelme)
    write_json(labelme / "train" / "twin.json", {"version": "5.4.1", "shapes": [{"points": []}], "imagePath": "a.jpg"})
    with pytest.raises(ValueError, match=r"twin.json is not a labelme file \(KeyError: 'label'\)"):
        load_image_labels(labelme)


def test_other_json_is_not_taken_for_annotations(tmp_path):
    save_image(tmp_path / "cat" / "1.jpg")
    write_json(tmp_path / "package.json", {"name": "pets", "version": "1.0"})
    write_json(tmp_path / "notes.json", ["a", "b"])
    write_json(tmp_path / "cat" / "api.json", {"info": {"title": "pets"}, "licenses": [], "data": []})
    assert labels_of(load_image_labels(tmp_path)) == {"train": {"1": ["cat"]}}
    with pytest.raises(ValueError, match="notes.json is not an annotation file of COCO, Label Studio or labelme"):
        load_image_labels(tmp_path / "notes.json")


def test_coco_in_a_folder_around_the_splits_and_with_another_suffix(tmp_path):
    for split in ("train", "valid"):
        save_image(tmp_path / "pets.v1" / split / "a.jpg")
        write_json(
            tmp_path / "pets.v1" / split / "_annotations.coco.JSON", coco_file(["a.jpg"], [(0, 1, [square(2, 2, 6)])])
        )
    assert labels_of(load_image_labels(tmp_path)) == {"train": {"a": ["cat"]}, "validation": {"a": ["cat"]}}


@pytest.mark.parametrize("name", [None, 5])
def test_categories_without_a_name_are_refused(tmp_path, name):
    save_image(tmp_path / "a.jpg")
    write_json(tmp_path / "instances.json", coco_file(["a.jpg"], [(0, 2, [])], ((1, "cat"), (2, name))))
    with pytest.raises(ValueError, match="the name of the category 2 is no text"):
        load_image_labels(tmp_path)


def test_detection_exports_need_no_sizes(tmp_path):
    for split in ("train", "valid"):
        save_image(tmp_path / split / "a.jpg")
        content = coco_file(["a.jpg"], [(0, 1, [])])
        content["images"] = [{"id": 0, "file_name": "a.jpg", "height": None}]
        write_json(tmp_path / split / "_annotations.coco.json", content)
    loaded = load_image_labels(tmp_path)
    assert labels_of(loaded)["validation"] == {"a": ["cat"]} and "mask" not in loaded["validation"].column_names


@pytest.mark.parametrize("nothing", [None, "", "none"])
def test_labelme_shapes_without_a_label_and_rotated_boxes(tmp_path, nothing):
    box = [[8, 2], [12, 2], [12, 6], [8, 6]]
    for split in ("train", "val"):
        shapes = [shape("cat", box, "rotation"), shape("cat", [[1, 9], [3, 9], [3, 12]]), shape(nothing, box)]
        labelme_file(tmp_path / split / "a.json", shapes)
    splits = check_dataset(load_image_labels(tmp_path))
    assert labels_of(splits)["validation"] == {"a": ["cat"]}
    assert (mask_of(splits)[2:6, 8:12] == 1).all()


def test_labelme_with_its_keys_in_order(tmp_path):
    labelme_file(tmp_path / "a.json", [shape("cat", BOX, "rectangle")])
    content = json.loads((tmp_path / "a.json").read_text()) | {"imageData": "A" * 20000}
    (tmp_path / "a.json").write_text(json.dumps(content, sort_keys=True))
    assert labels_of(load_image_labels(tmp_path)) == {"train": {"a": ["cat"]}}
