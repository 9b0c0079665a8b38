"""The model card: the run's values, a valid header, and no folder of the machine it was made on."""

import re

import pytest
import yaml
from hub_repos import validate_card
from huggingface_hub import ModelCard

from synernet_hf.model_card import SynerNetModelCardData, generate_model_card, published_card


SCORES = {
    "mean_iou": 0.61234,
    "mean_iou_present": 0.4,
    "recall": 0.7,
    "precision": 0.8,
    "per_class_iou": {"background": 0.8, "cat": 0.42},
    "num_images": 17,
}


def card_data(**changes) -> SynerNetModelCardData:
    values = {
        "model_name": "animals",
        "settings": {
            "backbone": "/home/somebody/weights/deit-tiny",
            "backbone_config": None,
            "model_config": {"fusion": "fixed"},
            "dataset": "voc2012",
            "data_dir": "/home/somebody/VOCdevkit",
            "image_labels": "/home/somebody/labels.npz",
            "validation_split": "val",
            "metric_classes": ["background", "cat"],
            "output_dir": "/home/somebody/runs/animals",
            "crop_size": 224,
            "per_device_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "seed": 5,
        },
        "class_names": ["background", "cat", "dog"],
        "num_train": 3131,
        "steps": 1200,
        "minutes": 61.25,
        "num_processes": 3,
        "precision": "bf16",
        "hardware": "a machine",
        "versions": {"torch": "2.13.0"},
        "results": {"segmentation": SCORES, "broad_cam": SCORES | {"mean_iou": 0.5}},
    }
    return SynerNetModelCardData(**(values | changes))


def test_the_header_is_valid_and_holds_the_results():
    card = ModelCard(str(generate_model_card(card_data())))
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "image-segmentation")
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found == {"mean IoU, segmentation": 0.6123, "mean IoU, B-CAM": 0.5}
    assert {(r.dataset_name, r.dataset_split, r.metric_type) for r in card.data.eval_results} == {
        ("voc2012", "val", "mean_iou")
    }


@pytest.mark.parametrize(
    "row",
    [
        r"\| data \| voc2012, 3131 training images, image-level labels \|",
        r"\| encoder \| a local encoder \(deit-tiny\), pretrained \|",
        r"\| steps \| 1200 \|",
        r"\| images per step \| 24 \|",
        r"\| crop \| 224 px \|",
        r"\| seed \| 5, one run \|",
        r"\| precision \| mixed, bf16 \|",
        r"\| time \| 61.2 minutes, evaluations included \|",
        r"\| hardware \| a machine \|",
        r"\| software \| torch 2.13.0 \|",
        r"\| segmentation \| 61.2 \| 70.0 \| 80.0 \| 40.0 \|",
        r"\| B-CAM \| 50.0 \| 70.0 \| 80.0 \| 40.0 \|",
        r"On 17 images .* the 2 classes background, cat\.",
        r"0 background, 1 cat, 2 dog",
        r"\| class \| segmentation \| B-CAM \|",
        r"\| cat \| 42.0 \| 42.0 \|",
        r"\| dog \| – \| – \|",
        r"- It knows 2 classes;",
        r"- It is one run with one seed \(5\)",
        r"- Weights: no licence has been chosen for them yet. They start from a local encoder \(deit-tiny\), whose terms hold for them too\.",
        r"- Data: PASCAL VOC 2012; its images come from Flickr",
        r"@article\{synernet2026,",
    ],
)
def test_the_text_tells_the_runs_values(row):
    assert re.search(rf"^{row}", str(generate_model_card(card_data())), re.MULTILINE)


def test_no_folder_of_this_machine_is_told():
    text = str(generate_model_card(card_data()))
    assert "/home" not in text
    assert "somebody" not in text


@pytest.mark.parametrize(
    ("dataset", "data_dir", "told"),
    [
        ("/home/somebody/images", None, "image_folder"),
        ("~/somebody/images.csv", None, "image_folder"),
        ("C:\\home\\somebody\\images", None, "image_folder"),
        ("here/somebody", None, "image_folder"),
        ("image_folder", "/home/somebody/images", "image_folder"),
        ("hub", "/home/somebody/parquet", "image_folder"),
        ("hub", "owner/pets", "owner/pets"),
        ("owner/pets", None, "owner/pets"),
    ],
)
def test_data_is_told_by_its_id_and_never_by_its_folder(tmp_path, monkeypatch, dataset, data_dir, told):
    (tmp_path / "here" / "somebody").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    changes = {
        "dataset": dataset,
        "data_dir": data_dir,
        "validation_split": "/home/somebody/val.txt",
        "dataset_options": {"files": ["/home/somebody/a.csv"], "class_names": ["background", "cat/dog"]},
        "backbone_config": {"model_type": "vit", "_name_or_path": "/home/somebody/vit"},
    }
    data = card_data(settings=card_data().settings | changes)
    text = str(generate_model_card(data))
    assert "home" not in text and "somebody" not in text
    assert f"image-level labels only: {told} images" in text
    assert f"| data | {told}, 3131 training images" in text
    assert data.recipe()["dataset"] == told
    assert data.recipe()["dataset_options"] == {"files": ["a.csv"], "class_names": ["background", "cat/dog"]}
    card = ModelCard(text)
    assert {(r.dataset_type, r.dataset_name, r.dataset_split) for r in card.data.eval_results} == {
        (told, told, "val.txt")
    }
    assert card.data.datasets == (["owner/pets"] if "/" in told else None)
    assert validate_card(text) == ([], [])


def test_the_settings_are_a_recipe(tmp_path):
    from synernet_hf.training import read_recipe

    text = str(generate_model_card(card_data()))
    block = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    path = tmp_path / "recipe.yaml"
    path.write_text(block, encoding="utf-8")
    recipe = read_recipe(path)
    assert recipe["crop_size"] == 224
    assert recipe["image_labels"] == "labels.npz"
    assert "data_dir" not in recipe
    assert yaml.safe_load(block) == recipe


def test_a_hub_backbone_is_named_as_base_model():
    settings = card_data().settings | {"backbone": "google/vit-base-patch16-224"}
    card = ModelCard(str(generate_model_card(card_data(settings=settings))))
    assert card.data.base_model == "google/vit-base-patch16-224"
    assert "| encoder | google/vit-base-patch16-224, pretrained |" in card.text
    assert generate_model_card(card_data()).data.base_model is None


@pytest.mark.parametrize(
    ("backbone", "base_model", "told"),
    [
        ("google/vit", "google/vit", "google/vit"),
        ("/home/me/hub/models--google--vit-b_16/snapshots/0a1b2c", "google/vit-b_16", "google/vit-b_16"),
        ("C:\\me\\hub\\models--google--vit\\snapshots\\0a1b2c", "google/vit", "google/vit"),
        ("weights/deit", None, "a local encoder (deit)"),
        ("./weights/deit/", None, "a local encoder (deit)"),
        ("~/weights/deit", None, "a local encoder (deit)"),
        ("C:\\me\\deit", None, "a local encoder (deit)"),
        (".", None, "a local encoder (run)"),
    ],
)
def test_the_encoder_is_named_without_its_path(tmp_path, monkeypatch, backbone, base_model, told):
    (tmp_path / "run" / "weights" / "deit").mkdir(parents=True)
    # a folder called like an owner makes no path of an id
    (tmp_path / "run" / "google").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    card = ModelCard(str(generate_model_card(card_data(settings=card_data().settings | {"backbone": backbone}))))
    assert card.data.base_model == base_model
    assert f"| encoder | {told}, pretrained |" in card.text
    assert f"They start from {told}, whose terms" in card.text
    for word in ("snapshots", "models--", "/me", "\\me", "weights/"):
        assert word not in card.text


def test_random_weights_and_a_run_without_masks():
    settings = card_data().settings | {"backbone": None, "backbone_config": {"model_type": "vit"}}
    card = generate_model_card(card_data(settings=settings, results={}))
    assert "| encoder | random weights, vit |" in card.text
    assert "Not evaluated: there is no validation split with masks." in card.text
    assert "| prediction |" not in card.text
    assert card.data.eval_results is None


def test_weak_classes_and_unknown_terms_are_told():
    weak = SCORES | {"per_class_iou": {"background": 0.8, "cat": 0.12, "dog": None}}
    settings = card_data().settings | {"dataset": "mine", "backbone": "google/vit-base-patch16-224"}
    text = str(generate_model_card(card_data(settings=settings, results={"segmentation": weak})))
    assert "below 30 % for cat." in text
    assert "- Data: the terms of the images are not known" in text
    assert "whose terms are told at <https://huggingface.co/google/vit-base-patch16-224>." in text
    assert "below 30 %" not in str(generate_model_card(card_data()))


def test_images_stand_in_the_card_where_there_are_some():
    assert "![" not in str(generate_model_card(card_data()))
    text = str(generate_model_card(card_data(images="images.png", num_images=4)))
    assert "](images.png)" in text
    assert "The first 4 images of the validation split, not chosen" in text


@pytest.mark.parametrize("backbone", [None, "google/vit-base-patch16-224", "/home/somebody/weights/deit-tiny"])
@pytest.mark.parametrize("results", [{}, {"segmentation": SCORES}])
def test_the_header_passes_the_checks_of_a_hub(backbone, results):
    settings = card_data().settings | {"backbone": backbone, "backbone_config": {"model_type": "vit"}}
    card = generate_model_card(card_data(settings=settings, results=results))
    assert validate_card(str(card)) == ([], [])
    assert validate_card(str(published_card(str(card), "owner/animals", "apache-2.0"))) == ([], [])
    errors, _ = validate_card(str(published_card(str(card), "owner/animals", "Some Licence!")))
    assert errors == ["\"license\" is 'Some Licence!', which is no licence id"]


def test_a_published_card_names_its_repository_and_licence():
    text = str(published_card(str(generate_model_card(card_data())), "owner/animals", "cc-by-4.0"))
    assert 'name = "owner/animals"' in text
    assert "path/to/this/folder" not in text
    assert "- Weights: cc-by-4.0. They start from a local encoder (deit-tiny)" in text
    assert ModelCard(text).data.license == "cc-by-4.0"
    without = str(published_card(str(generate_model_card(card_data())), "owner/animals"))
    assert "no licence has been chosen" in without
    assert ModelCard(without).data.license is None


def test_the_snippet_of_the_card_runs(tiny_run_folder, monkeypatch):
    text = str(generate_model_card(card_data()))
    snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tiny_run_folder)
    assert len([line for line in snippet.splitlines() if line.strip()]) == 10
    names = {}
    exec(snippet.replace("path/to/this/folder", ".").replace("image.jpg", "image.png"), names)
    image, label_map = names["image"], names["label_map"]
    assert tuple(label_map.shape) == (image.height, image.width)
    assert set(label_map.unique().tolist()) <= set(names["model"].config.id2label)


def test_a_score_that_is_no_number_is_left_out():
    undefined = SCORES | {"mean_iou": float("nan"), "per_class_iou": {"background": 0.8, "cat": float("nan")}}
    card = generate_model_card(card_data(results={"segmentation": undefined, "broad_cam": SCORES}))
    assert [result.metric_name for result in card.data.eval_results] == ["mean IoU, B-CAM"]
    assert "nan" not in str(card).lower().split()
