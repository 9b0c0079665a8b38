import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from crf_utils import swap_classes
from datasets import DatasetDict
from datasets import Image as ImageFeature
from devkit_utils import write_voc_devkit
from PIL import Image
from safetensors.torch import save_file
from testing_utils import SynerNetModelTester

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor, visualization
from synernet_hf.commands import main
from synernet_hf.data import SHAPES_CLASSES, build_split, check_dataset
from synernet_hf.metrics import MeanIoU
from synernet_hf.model import PreparedImage
from synernet_hf.model.modeling_synernet import SynerNetCamOutput
from synernet_hf.model.refinement_synernet import present_classes, select_classes, spread_classes
from synernet_hf.training.evaluation import (
    CAM_KINDS,
    PART_KINDS,
    average_precision,
    evaluate_model,
    results_table,
    single_scale_cams,
)


NAMES = ["background", "cat", "dog"]
SCALES = (1.0, 1.5)


def image_of(label_map):
    """An image whose red channel tells the class of every pixel, so that an oracle can read it."""
    return Image.fromarray(np.stack([label_map * 100, label_map * 0, label_map * 0], axis=-1).astype(np.uint8))


def make_split(label_maps, ignored=0):
    masks = [label_map.astype(np.uint8) for label_map in label_maps]
    for mask in masks:
        mask[:ignored] = 255
    labels = [[c - 1 for c in (1, 2) if (label_map == c).any()] for label_map in label_maps]
    ids = [f"image_{i}" for i in range(len(masks))]
    return build_split([image_of(m) for m in label_maps], ids, labels, NAMES, [Image.fromarray(m) for m in masks])


@pytest.fixture
def label_maps():
    generator = np.random.default_rng(0)
    return [generator.integers(0, 3, size) for size in [(8, 9), (12, 7), (5, 5), (6, 10), (9, 4)]]


class OracleModel(torch.nn.Module):
    """Reads the true classes off the red channel; `shift` rolls its answer to the right by so many pixels."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, shift=0, cam_value=0.9):
        super().__init__()
        self.shift, self.cam_value = shift, cam_value
        self.seen, self.cam_labels = [], []
        self.config = SimpleNamespace(
            id2label=dict(enumerate(NAMES)),
            num_labels=3,
            background_threshold=0.5,
            semantic_loss_ignore_index=255,
            inference_scales=SCALES,
            broad_propagation_temperature=0.1,
            precise_propagation_temperature=None,
            precise_consensus=False,
            refine_predictions=False,
        )

    def one_hot(self, pixel_values):
        assert not self.training and not torch.is_grad_enabled()
        class_ids = torch.round((pixel_values[:, 0] * 0.229 + 0.485) * 255 / 100).long()
        return torch.nn.functional.one_hot(class_ids, 3).permute(0, 3, 1, 2).float().roll(self.shift, dims=-1)

    def class_scores(self, pixel_values, seen=None):
        return self.one_hot(pixel_values)[:, 1:].amax(dim=(2, 3)) - 0.5

    def multi_scale_logits(self, pixel_values, scales, flip, *options):
        self.seen.append((tuple(scales), flip))
        return self.one_hot(pixel_values)

    def generate_cams(
        self, pixel_values, labels=None, scales=None, flip=None, plain=False, all_classes=True, seen=None
    ):
        self.cam_labels.append(labels)
        cams = self.one_hot(pixel_values)[:, 1:] * labels[:, :, None, None] * self.cam_value
        if not all_classes:
            cams = select_classes(cams, present_classes(labels).ids)
        return SynerNetCamOutput(**{f"{kind}s": cams for kind in CAM_KINDS})


def score(model, split, **options):
    return evaluate_model(model, SynerNetImageProcessor(), split, class_names=NAMES, **options)


def test_an_oracle_scores_one_everywhere_and_background_only_does_not(label_maps):
    model = OracleModel().train()
    results = score(model, make_split(label_maps), multi_scale=True, flip=True, baselines=True)
    assert list(results) == [
        "segmentation",
        "segmentation_multi_scale",
        "segmentation_multi_scale_flip",
        *CAM_KINDS,
        "single_scale_cam",
        "single_scale_cam_predicted",
        "background_only",
    ]
    background_only = results.pop("background_only")
    for values in results.values():
        for name in ("mean_iou", "mean_iou_present", "recall", "precision", "foreground_recall", "pixel_accuracy"):
            assert values[name] == 1.0
        assert values["per_class_iou"] == dict.fromkeys(NAMES, 1.0)
        assert values["num_images"] == len(label_maps)
    assert background_only["foreground_recall"] == 0.0
    assert background_only["per_class_iou"]["background"] == background_only["pixel_accuracy"]
    assert set(model.seen) == {((1.0,), False), (SCALES, False), (SCALES, True)}
    assert model.training


class TwoBranchOracle(OracleModel):
    """Its precise branch is right, its broad branch and the mix are not; without a limit they see class 1 everywhere."""

    def multi_scale_logits(self, pixel_values, scales, flip, branches=None, prior=None, seen=None):
        right = self.one_hot(pixel_values)
        wrong = right.roll(1, dims=1)
        # the mix is right about the classes that an image has
        return {"precise": right, "broad": wrong}.get(branches, right + 2 * wrong if prior is None else right)


def test_the_parts_of_a_segmentation_are_scored(label_maps):
    split = make_split([*label_maps, np.zeros((4, 6), dtype=int)])
    results = score(TwoBranchOracle(), split, cams=False, parts=True)
    assert list(results) == ["segmentation", *PART_KINDS, "classification"]
    ious = {kind: results[kind]["mean_iou"] for kind in list(results)[:-1]}
    assert ious["segmentation"] == ious["broad_segmentation"] < 0.5
    assert ious["precise_segmentation"] == ious["segmentation_given_labels"] == 1
    expected = {"mean_average_precision": 1.0, "average_precision": {"cat": 1.0, "dog": 1.0}, "num_images": 6}
    assert results["classification"] == expected
    # the mix takes each class for the next one
    confusion = {"background": {"cat": 1.0}, "cat": {"dog": 1.0}, "dog": {"background": 1.0}}
    assert results["segmentation"]["confusion"] == confusion
    lines = results_table(results, NAMES[:2]).split("pixels of, taken for")[1].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][1:] == ["background", "cat", "others"]
    assert cells[2:] == [["background", "0.0", "100.0", "0.0"], ["cat", "0.0", "0.0", "100.0"]]
    # a class that no image has counts in no mean
    cats = make_split([np.minimum(label_map, 1) for label_map in label_maps])
    scores = score(TwoBranchOracle(), cats, cams=False, parts=True)["classification"]
    assert scores["average_precision"]["dog"] is None and scores["mean_average_precision"] == 1.0
    assert "| class scores " in results_table(results, NAMES) and "dog |" in results_table(results, NAMES)
    assert "others" not in results_table(results, NAMES)
    table = results_table(score(OracleModel(), split), NAMES)
    assert "class scores" not in table and "taken for" not in table


def test_average_precision_is_that_of_ranked_images():
    labels = np.array([True, False, True, False, True])
    assert average_precision(np.array([0.9, 0.8, 0.7, 0.2, 0.1]), labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)
    # images of one score have no order
    assert average_precision(np.array([3.0, 3.0, 2.0, 2.0, 2.0]), labels) == pytest.approx((1 / 2 + 3 / 5 + 3 / 5) / 3)
    assert np.isnan(average_precision(np.array([1.0]), np.array([False])))


def test_scores_come_from_one_matrix_of_the_whole_split(label_maps):
    metric = MeanIoU(3)
    for label_map in label_maps:
        reference = label_map.copy()
        reference[:2] = 255
        metric.update(np.roll(label_map, 1, axis=1), reference)
    expected = metric.compute()
    values = score(OracleModel(shift=1), make_split(label_maps, ignored=2), cams=False)["segmentation"]
    assert values["mean_iou"] == pytest.approx(expected["mean_iou"])
    assert list(values["per_class_iou"].values()) == pytest.approx(expected["per_class_iou"])
    assert values["foreground_recall"] == pytest.approx(np.mean(expected["per_class_recall"][1:]))
    assert values["foreground_precision"] == pytest.approx(np.mean(expected["per_class_precision"][1:]))


def test_metric_classes_restrict_the_means_only(label_maps):
    split = make_split(label_maps)
    everything = score(OracleModel(shift=1), split, cams=False)["segmentation"]
    part = score(OracleModel(shift=1), split, cams=False, metric_classes=["background", "dog"])["segmentation"]
    ious = everything["per_class_iou"]
    assert part["mean_iou"] == pytest.approx((ious["background"] + ious["dog"]) / 2)
    assert part["per_class_iou"] == ious and part["mean_iou_present"] == everything["mean_iou_present"]


def test_classes_are_matched_by_name_and_not_by_position(label_maps):
    swapped = [np.array([0, 2, 1])[label_map] for label_map in label_maps]
    model = OracleModel(shift=1)
    expected = score(model, make_split(label_maps, ignored=1))
    # the same images, but a source that counts dog as 1 and cat as 2
    split = make_split(label_maps, ignored=1)
    columns = {"image": split["image"][:], "image_id": split["image_id"][:]}
    masks = [np.where(np.asarray(mask) == 255, 255, ids) for mask, ids in zip(split["mask"][:], swapped, strict=True)]
    other = build_split(
        columns["image"],
        columns["image_id"],
        [[1 - label for label in labels] for labels in split["labels"]],
        ["background", "dog", "cat"],
        [Image.fromarray(mask.astype(np.uint8)) for mask in masks],
    )
    names = ["background", "dog", "cat"]
    assert evaluate_model(OracleModel(shift=1), SynerNetImageProcessor(), other, class_names=names) == expected
    # read by position, the scores would differ
    assert evaluate_model(OracleModel(shift=1), SynerNetImageProcessor(), other, class_names=NAMES) != expected


def test_cams_get_the_true_labels_and_the_single_threshold(label_maps):
    model = OracleModel(cam_value=0.5)
    split = make_split(label_maps)
    results = score(model, split)
    assert [labels.tolist() for labels in model.cam_labels] == [
        [[float(c in labels) for c in (0, 1)]] for labels in split["labels"]
    ]
    # 0.5 is at the threshold, hence background
    assert results["broad_cam"]["foreground_recall"] == 0.0
    assert score(OracleModel(cam_value=0.51), split)["broad_cam"]["foreground_recall"] == 1.0


def test_shards_summed_over_processes_equal_one_process(label_maps):
    split = make_split(label_maps)
    single = score(OracleModel(shift=1), split)
    counted = []

    def process(index, reduce):
        accelerator = SimpleNamespace(process_index=index, num_processes=2, device="cpu", reduce=reduce)
        return score(OracleModel(shift=1), split, accelerator=accelerator)

    process(1, lambda counts, reduction: counted.append(counts) or counts)
    remaining = iter(counted)
    assert process(0, lambda counts, reduction: counts + next(remaining)) == single


def test_class_scores_of_all_processes_count(label_maps, monkeypatch):
    split = make_split([*label_maps, label_maps[0] * 0])
    # a model that takes every image for one of class 1, the more the larger it is
    monkeypatch.setattr(
        OracleModel, "class_scores", lambda _, values, seen=None: torch.full((len(values), 2), values[0].numel() / 100)
    )
    single = score(OracleModel(), split, parts=True)
    gathered = []

    def process(index, gather):
        monkeypatch.setattr("synernet_hf.training.evaluation.gather_object", gather)
        accelerator = SimpleNamespace(
            process_index=index, num_processes=2, device="cpu", reduce=lambda counts, **_: counts
        )
        return score(OracleModel(), split, parts=True, accelerator=accelerator)

    assert process(1, lambda own: gathered.extend(own) or own)["classification"] != single["classification"]
    assert process(0, lambda own: [*own, *gathered])["classification"] == single["classification"]
    assert 0 < single["classification"]["mean_average_precision"] < 1


def test_counts_are_summed_as_integers(label_maps):
    """Counts above 2**24, which float32 does not hold, and every kind in the same order on all processes."""
    seen = []

    def reduce(counts, reduction):
        assert counts.dtype == torch.int64 and reduction == "sum"
        seen.append(counts)
        return counts + (2**40 + 1) * torch.eye(3, dtype=torch.int64)

    accelerator = SimpleNamespace(process_index=0, num_processes=2, device="cpu", reduce=reduce)
    results = score(OracleModel(shift=1), make_split(label_maps), accelerator=accelerator)
    assert len(seen) == len(results)
    for counts, values in zip(seen, results.values(), strict=True):
        hits, total = int(counts.trace()) + 3 * (2**40 + 1), int(counts.sum()) + 3 * (2**40 + 1)
        assert values["pixel_accuracy"] == hits / total


@pytest.mark.parametrize("orientation", [1, 6, 8])
def test_a_turned_image_passes_the_check_and_is_scored_upright(label_maps, tmp_path, orientation):
    (label_map, *_) = label_maps
    turns = {1: 0, 6: 1, 8: 3}[orientation]  # counter-clockwise, undone by showing
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "image.png"
    image_of(np.rot90(label_map, turns)).save(path, exif=exif)
    labels = [[c - 1 for c in (1, 2) if (label_map == c).any()]]
    mask = Image.fromarray(label_map.astype(np.uint8))
    split = build_split([str(path)], ["image"], labels, NAMES, [mask])
    check_dataset(DatasetDict(validation=split))
    assert score(OracleModel(), split)["segmentation"]["mean_iou"] == 1.0


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_a_split_in_any_format_has_the_same_scores(label_maps, kind):
    split = make_split(label_maps)
    expected = score(OracleModel(), split, baselines=True)
    assert score(OracleModel(), split.with_format(kind), baselines=True) == expected


def test_max_samples_takes_the_first_images(label_maps):
    split = make_split(label_maps)
    assert score(OracleModel(shift=1), split, max_samples=2) == score(OracleModel(shift=1), split.select(range(2)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_crf_refines_the_last_segmentation(label_maps, num_workers):
    model = OracleModel()
    options = {"multi_scale": True, "cams": False, "crf": swap_classes, "num_workers": num_workers}
    results = score(model, make_split(label_maps), **options)
    assert list(results) == ["segmentation", "segmentation_multi_scale", "segmentation_multi_scale_crf"]
    assert results["segmentation_multi_scale_crf"]["per_class_iou"] == {"background": 1.0, "cat": 0.0, "dog": 0.0}
    # it asks for no pass of its own
    assert model.seen.count((SCALES, False)) == model.seen.count(((1.0,), False)) == len(label_maps)


def test_the_real_model_is_scored_at_native_size(tiny_config, label_maps):
    torch.manual_seed(0)
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config).eval()
    big = [np.kron(label_map, np.ones((3, 3), dtype=int)) for label_map in label_maps[:2]]
    results = score(model, make_split(big), multi_scale=True, baselines=True)
    metric, cam_metric = MeanIoU(3), MeanIoU(3)
    for label_map in big:
        pixel_values = SynerNetImageProcessor()(image_of(label_map), return_tensors="pt")["pixel_values"]
        metric.update(model.multi_scale_logits(pixel_values, scales=(1.0,))[0].argmax(dim=0), label_map)
        labels = torch.tensor([[(label_map == c).any() for c in (1, 2)]]).float()
        values, ids = model.generate_cams(pixel_values, labels=labels).precise_cams[0].max(dim=0)
        cam_metric.update(torch.where(values > tiny_config.background_threshold, ids + 1, 0), label_map)
    assert results["segmentation"]["mean_iou"] == metric.compute()["mean_iou"]
    assert results["precise_cam"]["mean_iou"] == cam_metric.compute()["mean_iou"]
    assert all(0 <= values["mean_iou"] <= 1 for values in results.values())


def without_mask(split):
    return split.remove_columns("mask")


def with_wrong_id(split):
    return make_split([np.full((4, 4), 2)]).map(lambda record: {"mask": Image.new("L", (4, 4), 7)})


def with_wrong_size(split):
    return split.map(lambda record: {"mask": Image.new("L", (3, 3))})


def with_colours(split):
    return split.map(lambda record: {"mask": record["image"]})


@pytest.mark.parametrize(
    ("change", "options", "sentence"),
    [
        (without_mask, {}, r"lacks the columns \['mask'\]"),
        (lambda split: split.select([]), {}, "is empty"),
        (with_wrong_id, {}, r"mask of image image_0 holds the ids 7; 0 to 2 and 255 \(ignore\)"),
        (with_wrong_size, {}, "mask of image image_0 is 3 x 3"),
        (with_colours, {}, "mask of image image_0 has mode RGB"),
        (None, {"metric_classes": ["wolf"]}, r"hold \['wolf'\]"),
        (None, {"metric_classes": []}, "are an empty list"),
        (None, {"max_samples": 0}, "positive number of images"),
        (None, {"class_names": ["background", "cat", "horse"]}, "does not know the data set's classes horse"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(label_maps, change, options, sentence):
    split = make_split(label_maps)
    split = split if change is None else change(split)
    with pytest.raises(ValueError, match=sentence):
        evaluate_model(OracleModel(), SynerNetImageProcessor(), split, **({"class_names": NAMES} | options))


def test_table_holds_every_kind_and_marks_undefined_scores():
    split = make_split([np.zeros((4, 4), dtype=int), np.ones((4, 4), dtype=int)])
    table = results_table(score(OracleModel(), split), NAMES)
    means, classes = table.split("\n\n")
    assert len(means.splitlines()) == len(classes.splitlines()) == 2 + 1 + len(CAM_KINDS)
    cells = [cell.strip() for cell in classes.splitlines()[2].strip("|").split("|")]
    assert cells == ["segmentation", "100.0", "100.0", "-"]


@pytest.fixture
def shapes_run(tiny_config, tmp_path):
    pytest.importorskip("accelerate")
    config = type(tiny_config).from_dict(
        tiny_config.to_dict() | {"id2label": dict(enumerate(SHAPES_CLASSES)), "label2id": None}
    )
    SynerNetForWeaklySupervisedSegmentation(config).save_pretrained(tmp_path / "run")
    SynerNetImageProcessor().save_pretrained(tmp_path / "run")
    data_args = {
        "dataset": "shapes",
        "metric_classes": SHAPES_CLASSES[:3],
        "dataset_options": {"num_train": 1, "num_validation": 3, "image_size": 48},
    }
    (tmp_path / "run" / "training_args.json").write_text(json.dumps({"data_args": data_args}))
    return tmp_path / "run"


def test_predictions_of_resized_images_are_scored_at_the_images_size():
    plain = [np.full((12, 20), 1), np.full((18, 10), 2)]
    model = OracleModel()
    processor = SynerNetImageProcessor(do_resize=True, size={"shortest_edge": 31})
    seen = []
    class_scores = model.class_scores
    model.class_scores = lambda values, _: seen.append(tuple(values.shape[-2:])) or class_scores(values)
    results = evaluate_model(
        model, processor, make_split(plain, ignored=0), class_names=NAMES, multi_scale=True, baselines=True
    )
    assert [min(size) for size in seen] == [31, 31]
    assert results["segmentation"]["per_class_iou"]["background"] is None
    for kind in ("segmentation", "segmentation_multi_scale", "fused_cam", "single_scale_cam_predicted"):
        assert results[kind]["mean_iou_present"] == 1.0


def test_evaluate_script_takes_its_data_from_the_run(shapes_run, tmp_path, capsys):
    output = tmp_path / "scores" / "scores.json"
    assert main(["evaluate", str(shapes_run), "--baselines", "--output", str(output)]) == 0
    scores = json.loads(output.read_text())
    assert scores["metric_classes"] == SHAPES_CLASSES[:3]
    assert list(scores["results"]) == [
        "segmentation",
        "segmentation_multi_scale",
        *CAM_KINDS,
        "single_scale_cam",
        "single_scale_cam_predicted",
        "background_only",
    ]
    assert scores["results"]["background_only"]["num_images"] == 3
    assert results_table(scores["results"], SHAPES_CLASSES[:3]) in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["scores.json"]
    words = "--no_cams --no_multi_scale --max_samples 1 --num_workers 0 --classes dots --output".split()
    words.append(str(output))
    assert main(["evaluate", str(shapes_run), *words, "--json"]) == 0
    scores = json.loads(output.read_text())
    printed = capsys.readouterr()
    assert json.loads(printed.out) == scores and "scores written to" in printed.err
    assert list(scores["results"]) == ["segmentation"] and scores["results"]["segmentation"]["num_images"] == 1


def test_evaluate_script_draws_scores_confusion_and_curves(shapes_run, tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(shapes_run / "logs" / "run") as log:
        for step in (10, 20):
            log.add_scalar("eval/segmentation/mean_iou", step / 100, step)
            log.add_scalar("train/loss", 1.0, step)
    drawn, curves = {}, visualization.curves
    monkeypatch.setattr(
        visualization, "curves", lambda series, **names: drawn.update(series) or curves(series, **names)
    )
    words = [
        str(shapes_run),
        "--parts",
        "--no_multi_scale",
        "--num_workers",
        "0",
        "--figures",
        str(tmp_path / "charts"),
    ]
    assert main(["evaluate", *words]) == 0
    assert {path.name for path in (tmp_path / "charts").iterdir()} == {"scores.png", "confusion.png", "curves.png"}
    assert {kind: [(step, round(value)) for step, value in points] for kind, points in drawn.items()} == {
        "segmentation": [(10, 10), (20, 20)]
    }


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dataset", "voc2012"], "needs data_dir"),
        (["--classes", "wolf"], "wolf"),
        (["--classes", "dot"], "did you mean dots?"),
        (["--dataset", "nowhere"], "nowhere"),
        (["--max_samples", "0"], "--max_samples is 0"),
        (["--num_workers", "-1"], "--num_workers is -1"),
        (["--output", "."], "is a folder"),
        (["--figures", __file__], "is a file"),
    ],
)
def test_evaluate_script_refuses_in_a_sentence(shapes_run, capsys, words, sentence):
    assert main(["evaluate", str(shapes_run), *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_evaluate_script_names_a_folder_without_model(tmp_path, capsys):
    assert main(["evaluate", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert "holds no trained model" in capsys.readouterr().err


def break_run(run, broken):
    weights = run / "model.safetensors"
    if broken == "no weights":
        weights.unlink()
    elif broken == "truncated weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif broken == "foreign weights":
        save_file({"something": torch.zeros(1)}, weights, metadata={"format": "pt"})
    elif broken == "other shapes":
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"decoder_hidden_size": 12}))
    elif broken == "wrong config":
        config = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps(config | {"decoder_hidden_size": "many"}))
    else:
        (run / "preprocessor_config.json").unlink()


@pytest.mark.parametrize("script", ["evaluate", "predict"])
@pytest.mark.parametrize(
    "broken",
    ["no weights", "truncated weights", "foreign weights", "other shapes", "wrong config", "no processor"],
)
def test_a_broken_run_is_told_in_a_sentence(shapes_run, tiny_run_folder, tmp_path, capsys, script, broken):
    break_run(shapes_run, broken)
    words = [str(shapes_run)]
    if script == "predict":
        words += [str(tiny_run_folder / "image.png"), "--output_dir", str(tmp_path / "out")]
    assert main([script, *words]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(error) == 1 and str(shapes_run) in error[0] and "give the folder of a finished run" in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data_args": 3}'])
def test_evaluate_script_names_a_broken_record_of_the_run(shapes_run, capsys, content):
    (shapes_run / "training_args.json").write_text(content)
    assert main(["evaluate", str(shapes_run)]) == 2
    assert "training_args.json is not a record of a run's data" in capsys.readouterr().err


def test_evaluate_script_checks_the_split_before_it_scores(shapes_run, tmp_path, capsys, monkeypatch):
    devkit = write_voc_devkit(tmp_path)
    image = devkit.voc / "JPEGImages" / f"{devkit.validation_ids[1]}.jpg"
    image.write_bytes(b"no image")
    loaded_early = "the model was loaded before the check"
    monkeypatch.setattr("synernet_hf.model_folder.load_model_folder", lambda run: pytest.fail(loaded_early))
    words = [str(shapes_run), "--dataset", "voc2012", "--data_dir", str(devkit.root)]
    assert main(["evaluate", *words]) == 2
    sentence = f"the image {devkit.validation_ids[1]} ("
    assert sentence in capsys.readouterr().err
    with pytest.raises(pytest.fail.Exception, match="before the check"):
        main(["evaluate", *words, "--max_samples", "1"])  # the broken one is not asked for


def test_predict_script_says_what_cannot_be_written(tiny_run_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    words = [
        str(tiny_run_folder),
        str(tiny_run_folder / "image.png"),
        "--output_dir",
        str(tmp_path / "file" / "out"),
    ]
    assert main(["predict", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: The results cannot be written") and str(tmp_path / "file") in error


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf"])
def test_predict_script_refuses_scales_that_are_no_factors(tiny_run_folder, capsys, scale):
    words = [str(tiny_run_folder), str(tiny_run_folder / "image.png"), "--scales", "1.0", scale]
    assert main(["predict", *words]) == 2
    assert "not all positive numbers" in capsys.readouterr().err


def test_predict_script_writes_masks_and_overlays(tiny_run_folder, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    words = [str(tiny_run_folder), str(tiny_run_folder / "image.png"), str(tmp_path / "turned.jpg")]
    assert main(["predict", *words, "--output_dir", str(tmp_path / "out"), "--scales", "1.0", "0.5", "--flip"]) == 0
    names = ["image_mask.png", "image_overlay.png", "turned_mask.png", "turned_overlay.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    with Image.open(tmp_path / "out" / "turned_mask.png") as mask:
        assert mask.mode == "P" and mask.size == (20, 33)
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tiny_run_folder).eval()
    with Image.open(tiny_run_folder / "image.png") as image:
        pixel_values = SynerNetImageProcessor()(image, return_tensors="pt")["pixel_values"]
    expected = model.multi_scale_logits(pixel_values, scales=(1.0, 0.5), flip=True)[0].argmax(dim=0)
    with Image.open(tmp_path / "out" / "image_mask.png") as mask:
        assert np.array_equal(np.asarray(mask), expected.numpy())
    line = capsys.readouterr().out.splitlines()[0]
    assert all(f"{model.config.id2label[i]} " in line for i in expected.unique().tolist())


@pytest.mark.parametrize("broken", ["missing", "undecodable", "truncated", "twins"])
def test_predict_script_checks_every_image_before_any_work(tiny_run_folder, tmp_path, capsys, broken):
    good = tiny_run_folder / "image.png"
    bad = tmp_path / ("image.png" if broken == "twins" else "bad.png")
    content = {"undecodable": b"no image", "truncated": good.read_bytes()[:2000], "twins": good.read_bytes()}
    if broken != "missing":
        bad.write_bytes(content[broken])
    words = [str(tiny_run_folder), str(good), str(bad), "--output_dir", str(tmp_path / "out")]
    assert main(["predict", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(bad) in error and len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_baseline_cam_is_neither_propagated_nor_a_consensus():
    tester = SynerNetModelTester(broad_propagation_temperature=0.1, precise_consensus=True)
    model = tester.model().eval()
    pixel_values, labels = tester.inputs()["pixel_values"], tester.inputs()["labels"]
    images = [PreparedImage(values, None, tuple(values.shape[1:])) for values in pixel_values]
    found = single_scale_cams(model, SynerNetImageProcessor(), images, labels)
    baseline = torch.cat([spread_classes(item["cams"][None], item["present"], labels.shape[1]) for item in found])
    assert model.config.broad_propagation_temperature == 0.1 and model.config.precise_consensus
    cams = model.generate_cams(pixel_values, labels, scales=(1.0,), flip=False)
    model.config.broad_propagation_temperature = None
    model.config.precise_consensus = False
    plain = model.generate_cams(pixel_values, labels, scales=(1.0,), flip=False)
    assert not torch.allclose(cams.broad_cams, plain.broad_cams)
    assert not torch.allclose(cams.precise_cams, plain.precise_cams)
    mean = (plain.broad_cams + plain.precise_cams) / 2
    torch.testing.assert_close(baseline, mean / (mean.amax(dim=(2, 3), keepdim=True) + 1e-5))


def test_images_of_equal_size_run_together_and_count_as_alone(tiny_config):
    torch.manual_seed(0)
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config).eval()
    generator = np.random.default_rng(1)
    sizes = [(24, 32), (32, 24), (24, 32), (24, 32), (32, 24), (24, 32), (17, 20)]
    split = make_split([generator.integers(0, 3, size) for size in sizes])
    batches = []
    encoder = model.synernet.broad_branch.backbone
    hook = encoder.register_forward_pre_hook(lambda module, inputs: batches.append(tuple(inputs[0].shape)))
    together = score(model, split, cams=False, batch_size=3)
    hook.remove()
    assert sorted(shape[0] for shape in batches) == [1, 1, 2, 3]
    options = {"multi_scale": True, "flip": True, "baselines": True}
    alone = score(model, split, batch_size=1, **options)
    assert score(model, split, batch_size=3, **options) == alone == score(model, split, num_workers=1, **options)
    assert together["segmentation"] == alone["segmentation"]


@pytest.mark.parametrize("flip", [False, True])
def test_every_view_is_encoded_once_and_decoded_only_for_the_segmentation(label_maps, flip):
    model = SynerNetModelTester(num_labels=3, cam_scales=(1.0, 0.5), cam_flip=flip).model().eval()
    model.config.id2label = dict(enumerate(NAMES))
    encoded, decoded = [], []
    for branch in model.synernet.pair:
        branch.backbone.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
        branch.decode_head.register_forward_hook(lambda _, inputs, __: decoded.append(len(inputs[0])))
    split = make_split([np.kron(label_maps[0], np.ones((3, 3), dtype=int))])
    score(model, split, multi_scale=True, flip=True, baselines=True, parts=True)
    scales, views = len({1.0, *model.config.inference_scales}), 2
    # the CAMs add one scale
    assert sum(encoded) == 2 * (scales * views + 1 + flip)
    assert sum(decoded) == 2 * scales * views


def test_what_waits_for_its_batch_is_bounded():
    from synernet_hf.training.evaluation import _equal_batches

    def item(height, width):
        prepared = SimpleNamespace(pixel_values=torch.zeros(3, height, width), size=(height, width))
        return SimpleNamespace(prepared=prepared)

    drawn = []

    def items():
        for index in range(200):
            drawn.append(index)
            yield item(8, 8 + index)

    held = 0
    for count, batch in enumerate(_equal_batches(items(), 2), start=1):
        held = max(held, len(drawn) - count)
        assert len(batch) == 1
    assert count == 200 and held <= 8 * 2
    # a large image runs alone, and so does a small one of a large original
    large = item(8, 8)
    large.prepared.size = (3000, 4000)
    assert [len(batch) for batch in _equal_batches([large] * 3, 4)] == [1, 1, 1]
    assert [len(batch) for batch in _equal_batches([item(8, 8)] * 5, 4)] == [4, 1]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_mask_gets_its_sentence_from_a_worker_too(label_maps, num_workers):
    split = with_wrong_size(make_split(label_maps))
    with pytest.raises(ValueError, match=r"^The mask of image image_0 is 3 x 3"):
        score(OracleModel(), split, num_workers=num_workers)


def test_a_model_of_half_precision_is_scored(tiny_config, label_maps):
    model = SynerNetForWeaklySupervisedSegmentation(tiny_config).to(torch.bfloat16).eval()
    results = score(model, make_split(label_maps), multi_scale=True, baselines=True)
    assert all(0 <= values["pixel_accuracy"] <= 1 for values in results.values())


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("content", "error"), [(b"none", ValueError), (None, OSError)])
def test_an_image_that_cannot_be_read_is_told_from_a_worker_too(label_maps, tmp_path, num_workers, content, error):
    split = make_split(label_maps)
    paths = [str(tmp_path / f"{index}.png") for index in range(len(split))]
    for path, image in zip(paths, split["image"], strict=True):
        image.save(path)
    split = split.remove_columns("image").add_column("image", paths).cast_column("image", ImageFeature())
    Path(paths[1]).unlink() if content is None else Path(paths[1]).write_bytes(content)
    with pytest.raises(error, match="^Record 1 of the split to evaluate on cannot be read .*1[.]png"):
        score(OracleModel(), split, num_workers=num_workers)
