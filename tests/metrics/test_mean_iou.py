import math
from pathlib import Path

import numpy as np
import pytest
import torch

import synernet_hf.metrics
from synernet_hf.metrics import MeanIoU


def random_maps(seed, num_labels=4, shape=(3, 7, 5)):
    generator = np.random.default_rng(seed)
    predictions = generator.integers(0, num_labels, shape)
    references = generator.integers(0, num_labels, shape)
    references[generator.random(shape) < 0.1] = 255
    return predictions, references


def test_equals_the_definition_with_sets_of_pixels():
    predictions, references = random_maps(0)
    scores = MeanIoU(4).update(predictions, references).compute()
    scored = references != 255
    for class_id in range(4):
        predicted, true = (predictions == class_id) & scored, (references == class_id) & scored
        hits = (predicted & true).sum()
        assert scores["per_class_iou"][class_id] == pytest.approx(hits / (predicted | true).sum())
        assert scores["per_class_recall"][class_id] == pytest.approx(hits / true.sum())
        assert scores["per_class_precision"][class_id] == pytest.approx(hits / predicted.sum())
    assert scores["mean_iou"] == pytest.approx(np.mean(scores["per_class_iou"]))
    assert scores["pixel_accuracy"] == pytest.approx((predictions == references)[scored].mean())


def test_a_perfect_prediction_scores_one_and_a_wrong_one_zero():
    references = np.array([[0, 1], [2, 255]])
    perfect = MeanIoU(3).update(np.array([[0, 1], [2, 0]]), references).compute()
    wrong = MeanIoU(3).update(np.array([[1, 2], [0, 0]]), references).compute()
    for name in ("mean_iou", "recall", "precision", "pixel_accuracy"):
        assert (perfect[name], wrong[name]) == (1.0, 0.0)


def test_streaming_image_by_image_equals_one_batch():
    predictions, references = random_maps(1)
    batch = MeanIoU(4).update(predictions, references)
    stream = MeanIoU(4)
    for prediction, reference in zip(predictions, references, strict=True):
        stream.update(torch.from_numpy(prediction), torch.from_numpy(reference))
    assert np.array_equal(batch.confusion, stream.confusion)
    assert batch.confusion.dtype == np.int64
    stream.reset()
    assert stream.confusion.sum() == 0


def test_rows_are_references_and_ignored_pixels_are_left_out_whatever_was_predicted():
    metric = MeanIoU(2).update(np.array([[1, 1, 77]]), np.array([[0, 1, 255]]))
    assert metric.confusion.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("types", [("int64", "uint8"), ("uint8", "int64"), ("int16", "int32"), ("uint64", "int16")])
@pytest.mark.parametrize("ignore_index", [3, 255, 300, -100])
@pytest.mark.parametrize("wild", [False, True])
def test_every_type_of_ids_and_every_ignore_index_gives_the_same_counts(types, ignore_index, wild):
    generator = np.random.default_rng(0)
    references = generator.integers(0, 3, (2, 6, 7))
    predictions = generator.integers(0, 3, (2, 6, 7))
    expected = np.zeros((3, 3), dtype=np.int64)
    ignored = generator.random(references.shape) < 0.2
    for row, column in zip(references[~ignored], predictions[~ignored], strict=True):
        expected[row, column] += 1
    if wild:
        predictions[ignored] = 77
    references[ignored] = ignore_index
    if not np.iinfo(types[1]).min <= ignore_index <= np.iinfo(types[1]).max:
        types = types[0], "int64"
    metric = MeanIoU(3, ignore_index)
    # columns first in memory, as transposed masks are
    metric.update(np.asfortranarray(predictions.astype(types[0])), references.astype(types[1]))
    np.testing.assert_array_equal(metric.confusion, expected)


@pytest.mark.parametrize("stray", [3, 200, 254, 256, -1])
def test_an_id_between_the_classes_and_the_ignore_index_is_refused(stray):
    references = np.array([[0, 1, 255], [2, stray, 0]])
    with pytest.raises(ValueError, match=rf"references hold the ids \[{stray}\]"):
        MeanIoU(3).update(np.zeros((2, 3), dtype=int), references)


def test_absent_classes_are_undefined_and_predicted_absent_classes_count_as_zero():
    scores = MeanIoU(4).update(np.array([[0, 2]]), np.array([[0, 0]])).compute()
    assert scores["per_class_iou"][:1] == [0.5] and scores["per_class_iou"][2] == 0.0
    assert math.isnan(scores["per_class_iou"][1]) and math.isnan(scores["per_class_iou"][3])
    assert scores["mean_iou"] == 0.25
    assert scores["mean_iou_present"] == 0.5


def test_a_class_that_is_never_predicted_has_precision_zero():
    scores = MeanIoU(2).update(np.array([[0, 0]]), np.array([[0, 1]])).compute()
    assert scores["per_class_precision"] == [0.5, 0.0]
    assert scores["precision"] == 0.25


def test_means_run_over_the_chosen_classes_only():
    metric = MeanIoU(4).update(*random_maps(2))
    ious = metric.compute()["per_class_iou"]
    assert metric.compute([1, 3])["mean_iou"] == pytest.approx((ious[1] + ious[3]) / 2)


def test_nothing_counted_gives_undefined_scores():
    assert math.isnan(MeanIoU(3).compute()["mean_iou"])
    assert math.isnan(MeanIoU(3).compute()["pixel_accuracy"])


def test_reduction_by_a_function_and_by_an_accelerator():
    metric = MeanIoU(4).update(*random_maps(3))
    counts = metric.confusion.copy()
    metric.reduce(lambda tensor: tensor * 2)
    assert np.array_equal(metric.confusion, counts * 2) and metric.confusion.dtype == np.int64
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    metric.reduce(accelerator)
    assert np.array_equal(metric.confusion, counts * 2) and metric.confusion.dtype == np.int64


@pytest.mark.parametrize(
    ("predictions", "references", "sentence"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "equal shapes"),
        (np.zeros((2, 2)), np.zeros((2, 2), int), "integer class ids"),
        (np.full((2, 2), 3), np.zeros((2, 2), int), r"predictions hold the ids \[3\]"),
        (np.zeros((2, 2), int), np.full((2, 2), 254), r"references hold the ids \[254\]"),
        (np.full((2, 2), 255), np.zeros((2, 2), int), r"predictions hold the ids \[255\]"),
    ],
)
def test_bad_maps_are_refused_in_a_sentence(predictions, references, sentence):
    with pytest.raises(ValueError, match=sentence):
        MeanIoU(3).update(predictions, references)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="positive number"):
        MeanIoU(0)
    with pytest.raises(ValueError, match="also a class id"):
        MeanIoU(300, ignore_index=255)


def test_local_evaluate_module_agrees_and_takes_images_of_several_sizes(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    evaluate = pytest.importorskip("evaluate")
    folder = Path(synernet_hf.metrics.__file__).parent / "mean_iou"
    module = evaluate.load(str(folder), cache_dir=str(tmp_path))
    pairs = [random_maps(4, shape=(3, 4)), random_maps(5, shape=(5, 2))]
    metric = MeanIoU(4)
    for predictions, references in pairs:
        metric.update(predictions, references)
        module.add(prediction=predictions.tolist(), reference=references.tolist())
    assert module.compute(num_labels=4) == metric.compute()
