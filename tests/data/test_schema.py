import json

import datasets
import pytest
import torch

from synernet_hf.data import COCO_CLASSES, VOC_CLASSES, build_split, class_names, id2label_from, multi_hot
from synernet_hf.data.schema import class_index


def test_class_lists_have_the_benchmarks_lengths_and_well_known_ids():
    assert len(VOC_CLASSES) == len(set(VOC_CLASSES)) == 21
    assert [VOC_CLASSES.index(name) for name in ("aeroplane", "cat", "person", "tvmonitor")] == [1, 8, 15, 20]
    assert len(COCO_CLASSES) == len(set(COCO_CLASSES)) == 81
    assert [COCO_CLASSES.index(name) for name in ("person", "stop sign", "couch", "tv", "toothbrush")] == [
        1,
        12,
        58,
        63,
        80,
    ]


def test_coco_order_is_that_of_the_official_categories(root):
    path = root.parent / "shared" / "data" / "coco" / "annotations" / "instances_val2014.json"
    if not path.is_file():
        pytest.skip("the COCO sample is not beside the checkout")
    categories = sorted(json.loads(path.read_text())["categories"], key=lambda category: category["id"])
    assert [category["name"] for category in categories] == COCO_CLASSES[1:]


def test_id2label_numbers_the_list_and_refuses_a_bad_one():
    assert id2label_from(["background", "cat"]) == {0: "background", 1: "cat"}
    with pytest.raises(ValueError, match="starts with 'background'"):
        id2label_from(["cat", "dog"])
    with pytest.raises(ValueError, match="cat occurs more than once"):
        id2label_from(["background", "cat", "cat"])


def test_unknown_class_name_lists_close_matches():
    assert class_index("cat", VOC_CLASSES) == 8
    with pytest.raises(ValueError, match="Unknown class name 'airplane': did you mean aeroplane"):
        class_index("airplane", VOC_CLASSES)
    with pytest.raises(ValueError, match="the classes are aeroplane, bicycle"):
        class_index("qqqq", VOC_CLASSES)


def test_class_names_survive_what_people_do_to_a_split(tmp_path):
    names = ["background", "cat", "dog"]
    split = build_split(["a.jpg", "b.jpg"], ["a", "b"], [[0], [1]], names)
    used = split.select([1]).cast_column("image", datasets.Image(decode=False)).filter(lambda record: True)
    used.remove_columns("image").save_to_disk(tmp_path / "saved")
    saved = datasets.load_from_disk(tmp_path / "saved")
    assert class_names(datasets.DatasetDict(train=split, validation=saved)) == names


def test_class_names_refuses_splits_without_or_with_different_lists():
    bare = datasets.Dataset.from_dict({"image_id": ["a"]})
    with pytest.raises(ValueError, match="'train' carries no class list"):
        class_names(datasets.DatasetDict(train=bare))
    one = build_split(["a.jpg"], ["a"], [[0]], ["background", "cat"])
    other = build_split(["a.jpg"], ["a"], [[0]], ["background", "dog"])
    with pytest.raises(ValueError, match="do not share one class list"):
        class_names(datasets.DatasetDict(train=one, validation=other))


@pytest.mark.parametrize("wrong", [-1, 2])
def test_build_split_wants_ids_of_the_foreground_classes(wrong):
    with pytest.raises(ValueError, match=f"labels of a hold {wrong}, but 0 to 1 are expected"):
        build_split(["a.jpg"], ["a"], [[0, wrong]], ["background", "cat", "dog"])


def test_labels_are_sorted_ids_that_name_themselves():
    split = build_split(["a.jpg", "b.jpg"], ["a", "b"], [[1, 0, 1], []], ["background", "cat", "dog"])
    assert split["labels"][:] == [[0, 1], []]
    assert split.features["labels"].feature.int2str([0, 1]) == ["cat", "dog"]
    assert not split.info.description


def test_multi_hot():
    vector = multi_hot([2, 0, 2], 4)
    assert vector.dtype == torch.float32 and vector.tolist() == [1, 0, 1, 0]
    assert multi_hot([], 2).tolist() == [0, 0]
    with pytest.raises(IndexError):
        multi_hot([4], 4)
