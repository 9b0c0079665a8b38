"""The scripts under benchmarks/: the ablation's rows are what they say, its runs are kept, figures are drawn."""

import importlib.util
import json
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from crf_utils import SlowlySure
from devkit_utils import write_voc_devkit
from PIL import Image
from safetensors.torch import load_file
from testing_utils import SynerNetModelTester
from transformers import AutoConfig, AutoModel

from synernet_hf import SynerNetConfig
from synernet_hf.data import multi_hot
from synernet_hf.training import InvalidArguments
from synernet_hf.training.building import MODEL_FIELDS, validate_arguments


BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
LADDER = ["single", "two_branches", "cross_supervision", "complementary", "confidence", "class_token", "class_prior"]
TINY = {
    "--dataset_options": {"num_train": 8, "num_validation": 3, "image_size": 32},
    "--backbone_config": {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "--model_config": {
        "decoder_hidden_size": 8,
        "decoder_dilation": 2,
        "projection_hidden_size": 16,
        "projection_bottleneck_size": 8,
        "prototype_size": 16,
        "with_class_token_head": True,
        "cam_scales": [1.0, 0.5],
        "refinement_dilations": [1, 2],
        "refinement_iterations": 1,
    },
}
WORDS = "--data shapes --max_steps 2 --crop_size 32 --per_device_batch_size 2 --num_workers 0".split()
WORDS += [word for name, value in TINY.items() for word in (name, json.dumps(value))]


TABLE = "shapes-32px-2steps"


@pytest.fixture(scope="module", autouse=True)
def beside_benchmarks():
    """Scripts find the modules beside them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def load_benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return load_benchmark("ablation")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return load_benchmark("figures")


@pytest.fixture(scope="module")
def finished(ablation, tmp_path_factory) -> Path:
    """Output of an ablation of two rows, one of them a single branch, each with one seed."""
    output = tmp_path_factory.mktemp("ablation")
    words = [*WORDS, *folders(output), "--rows", "single", "class_prior", "--seeds", "0"]
    assert ablation.main(words) == 0
    return output


def folders(output: Path) -> list[str]:
    return ["--output", str(output), "--results", str(output / "results")]


def report(output: Path) -> dict:
    """Scores by row, of seed 0."""
    paths = (output / "results" / TABLE).glob("*-seed0.json")
    return {content["row"]: content["scores"] for content in map(json.loads, map(Path.read_text, paths))}


def test_the_rows_are_complete_and_in_the_papers_order(ablation):
    assert list(ablation.ROWS)[: len(LADDER)] == LADDER
    assert {"authors", "toco"} <= set(ablation.ROWS)
    for row in ablation.ROWS.values():
        assert set(row.model_config) | set(row.scored_with) <= MODEL_FIELDS
        assert row.trained_as is None or ablation.ROWS[row.trained_as].model_config == row.model_config
    # the last step of the ladder is the recipe as it is
    last = ablation.ROWS["class_prior"]
    assert last.model_config == last.backbone_overrides == last.scored_with == {}


@pytest.mark.parametrize("recipe", ["tiny_cpu", "voc_animals"])
def test_each_step_of_the_ladder_adds_one_part(ablation, recipe):
    base = ablation.read_recipe(ablation.RECIPES / f"{recipe}.yaml")["model_config"]
    rows = [ablation.ROWS[name] for name in LADDER[1:]]
    fields = [SynerNetConfig(**base | row.model_config | row.scored_with) for row in rows]
    changed = [
        {name for name in MODEL_FIELDS if getattr(before, name) != getattr(after, name)}
        for before, after in zip(fields, fields[1:], strict=False)
    ]
    later = {"fusion"}
    assert changed[0] == {"cross_supervision"}
    assert changed[1] and changed[1] <= set(ablation.ALONE) - {"cross_supervision", "with_class_token_head", *later}
    assert changed[2] == later
    if recipe == "voc_animals":
        # the weight of the prior means nothing without the head
        assert changed[3] == {"with_class_token_head", "class_prior_weight"} and changed[4] == {"class_prior_weight"}


def test_the_authors_row_is_their_recipe_whatever_ours_says(ablation, tmp_path):
    words = ["--data", "voc_animals", "--output", str(tmp_path), "--backbone", "some/encoder"]
    base = ablation.base_arguments(*ablation.parse_options(words))
    model_args, _, _ = ablation.row_arguments(base, ablation.ROWS["authors"], 0, tmp_path)
    theirs = SynerNetConfig(**ablation.read_recipe(ablation.RECIPES / "voc12_authors.yaml")["model_config"])
    ours = SynerNetConfig(**model_args.model_config)
    # what belongs to a size of image
    changed = {name for name in MODEL_FIELDS if getattr(theirs, name) != getattr(ours, name)}
    assert changed <= {
        "cam_scales",
        "cam_flip",
        "background_threshold",
        "high_threshold",
        "refinement_dilations",
        "inference_scales",
        # on equal terms: predictions of all rows are refined
        "refine_predictions",
        "segmentation_start",
    }


def test_every_row_is_a_valid_run(ablation, tmp_path):
    options, extra = ablation.parse_options([*WORDS, "--output", str(tmp_path)])
    base = ablation.base_arguments(options, extra)
    for name, row in ablation.ROWS.items():
        model_args, data_args, training_args = ablation.row_arguments(base, row, 3, tmp_path / name)
        validate_arguments(model_args, data_args, training_args)
        assert training_args.seed == 3
        # of the three blocks here, one is shared
        shared = {"shared_encoder_layers": 1} if "shared_encoder_layers" in row.model_config else {}
        assert model_args.model_config == base[0].model_config | row.model_config | shared
        assert row.backbone_overrides.items() <= model_args.backbone_config.items()
    # rows leave the base as it was for the next one
    assert base[0].model_config == TINY["--model_config"]
    assert base[0].backbone_config == TINY["--backbone_config"]


def test_settings_of_the_fusion_and_of_the_encoder_have_a_row(ablation):
    default = SynerNetConfig()
    for name in (
        "shared_encoder_layers",
        "fusion_range",
        "confidence_layers",
        "confidence_threshold",
        "precise_coverage",
    ):
        rows = [row for row in ablation.ROWS.values() if name in row.model_config]
        assert rows and all(row.model_config[name] != getattr(default, name) for row in rows)


def test_rows_keep_what_the_recipe_says(ablation, tmp_path):
    words = ["--data", "voc_animals", "--output", str(tmp_path), "--backbone", "some/encoder", "--crop_size", "160"]
    base = ablation.base_arguments(*ablation.parse_options(words))
    model_args, data_args, training_args = ablation.row_arguments(base, ablation.ROWS["authors"], 0, tmp_path)
    assert (model_args.backbone, training_args.crop_size) == ("some/encoder", 160)
    assert model_args.model_config["cam_scales"] == [1.0]
    assert model_args.model_config["fusion"] == "fixed"
    assert model_args.backbone_overrides["qkv_bias"] is False
    assert data_args.metric_classes[0] == "background"


def precise_gradients(row, disturbed: bool) -> list[torch.Tensor]:
    """What the precise branch learns from a batch, beside one broad branch or, `disturbed`, another one."""
    tester = SynerNetModelTester(**row.model_config)
    model = tester.model()
    if disturbed:
        with torch.no_grad():
            for parameter in model.synernet.broad_branch.parameters():
                parameter.mul_(-1.5)
    model(**tester.inputs(), training_progress=0.9).loss.backward()
    gradients = [parameter.grad for parameter in model.synernet.precise_branch.parameters()]
    return [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize(
    ("name", "alone"), [("two_branches", True), ("toco", True), ("cross_supervision", False), ("confidence", False)]
)
def test_branches_of_single_rows_do_not_know_of_each_other(ablation, name, alone):
    first, second = (precise_gradients(ablation.ROWS[name], disturbed) for disturbed in (False, True))
    assert len(first) == len(second) > 20
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True)) == alone


def test_the_ablation_keeps_what_was_measured(ablation, finished):
    contents = {path.stem: json.loads(path.read_text()) for path in (finished / "results" / TABLE).iterdir()}
    assert set(contents) == {"single-seed0", "class_prior-seed0"}
    content = contents["class_prior-seed0"]
    own = ["data", "row", "seed", "settings", "revision", "scores", "labels", "minutes", "machine"]
    assert list(content) == own and content["settings"]["crop_size"] == 32 and content["minutes"] > 0
    assert set(content["machine"]) == {"device", "precision", "torch"}
    assert str(finished) not in json.dumps(contents)
    single, default = report(finished)["single"], report(finished)["class_prior"]
    assert len({scores["num_images"] for scores in default.values()} | {3}) == 1
    parts = {"broad_segmentation", "precise_segmentation", "segmentation_given_labels", "classification"}
    assert parts | {"broad_aux_cam"} <= set(default)
    assert not any(kind.startswith(("broad", "classification")) for kind in single)
    assert single["fused_cam"] == single["precise_cam"]
    assert single["segmentation"].items() >= single["precise_segmentation"].items()
    # models stay for figures, what only training needs goes
    for name in ("two_branches", "class_prior"):
        run = finished / TABLE / f"{name}-seed0"
        assert (run / "model.safetensors").is_file()
        assert not (run / "best").exists() and not list(run.glob("checkpoint-*"))


def test_finished_rows_are_kept(ablation, finished, monkeypatch, capsys):
    def refuse(*arguments):
        raise AssertionError("trained again")

    before = report(finished)
    monkeypatch.setattr(ablation, "train", refuse)
    words = [*WORDS, *folders(finished), "--seeds", "0", "--rows"]
    # two_branches is the other reading of the run that `single` has left
    assert ablation.main([*words, "single", "class_prior", "two_branches"]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 rows and seeds were finished before" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in rows[2:5]] == [
        f"| `{name}` (1)" for name in ("single", "two_branches", "class_prior")
    ]
    after = report(finished)
    assert {name: after[name] for name in before} == before
    assert after["two_branches"]["precise_cam"] == before["single"]["precise_cam"]
    assert after["two_branches"]["precise_segmentation"].items() <= before["single"]["segmentation"].items()


def test_two_processes_share_rows_and_output(ablation, finished, monkeypatch, capsys):
    from synernet_hf.files import hold_folder

    words = [*WORDS, *folders(finished), "--seeds", "1", "--rows", "single", "two_branches", "class_prior"]
    done = []

    def fake_train(model_args, data_args, training_args):
        done.append(Path(training_args.output_dir).name)
        Path(training_args.output_dir).mkdir(parents=True)
        return {"training": {"minutes": 1.0}}

    other = report(finished)["class_prior"]
    monkeypatch.setattr(ablation, "train", fake_train)
    monkeypatch.setattr(ablation, "score", lambda *arguments: other)
    with hold_folder(finished / TABLE / "claims" / "two_branches-seed1"):
        assert ablation.main(words) == 0
    # both of its readings are left to the other process
    assert done == ["class_prior-seed1"]
    assert "single, seed 1 is passed over" in capsys.readouterr().out
    assert ablation.main(words) == 0
    assert done == ["class_prior-seed1", "two_branches-seed1"]
    assert not (finished / TABLE / "claims").exists()
    for path in [*(finished / "results" / TABLE).glob("*-seed1.json")]:
        path.unlink()


def test_a_row_that_differs_in_scoring_only_is_another_reading_of_the_same_runs(ablation, finished, monkeypatch):
    monkeypatch.setattr(ablation, "train", None)
    seen = []
    evaluate_model = ablation.evaluate_model

    def watching(model, *arguments, **options):
        seen.append(model.config.class_prior_weight)
        return evaluate_model(model, *arguments, **options)

    monkeypatch.setattr(ablation, "evaluate_model", watching)
    words = [*WORDS, *folders(finished), "--seeds", "0", "--rows"]
    assert ablation.main([*words, "class_token", "class_prior"]) == 0
    assert seen == [0]
    rows = report(finished)
    assert rows["class_token"]["fused_cam"] == rows["class_prior"]["fused_cam"]
    saved = finished / "results" / TABLE / "class_token-seed0.json"
    assert json.loads(saved.read_text())["settings"]["class_prior_weight"] == 0
    # as it was for the tests that follow
    saved.unlink()


def test_a_run_is_scored_with_the_recipes_fields_of_predictions(ablation, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(ablation, "train", None)
    marker, saved = (tmp_path / name for name in (f"{TABLE}/class_prior-seed0/ablation_run.json", f"results/{TABLE}"))
    content, seen = json.loads(marker.read_text()), []
    expected = content["settings"]["class_prior_weight"]
    # trained with another prior, by a package that lacked a setting of today
    content["settings"]["class_prior_weight"] = expected + 1
    del content["settings"]["check_data" if "check_data" in content["settings"] else "flip"]
    marker.write_text(json.dumps(content))
    words = [*WORDS, *folders(tmp_path), "--seeds", "0", "--rows", "class_prior"]
    evaluate_model = ablation.evaluate_model

    def watching(model, *arguments, **options):
        seen.append(model.config.class_prior_weight)
        return evaluate_model(model, *arguments, **options)

    monkeypatch.setattr(ablation, "evaluate_model", watching)
    (saved / "class_prior-seed0.json").unlink()
    assert ablation.main(words) == 0
    assert seen == [expected]
    assert json.loads((saved / "class_prior-seed0.json").read_text())["settings"]["class_prior_weight"] == expected
    # what acts on training, too, is another run
    content["settings"]["cls_weight"] = 7.0
    marker.write_text(json.dumps(content))
    (saved / "class_prior-seed0.json").unlink()
    assert ablation.main(words) == 2
    assert "cls_weight (7.0 → 1.0)" in capsys.readouterr().err


def test_other_settings_and_taken_options_are_refused(ablation, finished, tmp_path, capsys):
    # rows of one table belong together
    words = [*WORDS, *folders(finished), "--rows", "toco"]
    assert ablation.main([*words, "--learning_rate", "1"]) == 2
    error = capsys.readouterr().err
    assert "learning_rate" in error and "single-seed0.json" in error
    assert ablation.main([*WORDS, "--output", str(tmp_path / "new"), "--seed", "4"]) == 2
    assert "--seeds" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_interrupted_run_goes_on(ablation, tmp_path, monkeypatch):
    base = ablation.base_arguments(*ablation.parse_options([*WORDS, *folders(tmp_path), "--save_steps", "1"]))
    train = ablation.train

    def killed(*arguments):
        train(*arguments)
        # as after step 1
        shutil.rmtree(Path(arguments[2].output_dir) / "checkpoint-2")
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        ablation.trained_run(base, "class_prior", 0, tmp_path, "old")
    resumed = []
    monkeypatch.setattr(
        ablation, "train", lambda *given: resumed.append(given[2].resume_from_checkpoint) or train(*given)
    )
    for _ in range(2):
        folder, found = ablation.trained_run(base, "class_prior", 0, tmp_path, "new")
    assert resumed == ["latest"] and found["revision"] == "new" and (folder / "model.safetensors").is_file()
    assert not list(folder.glob("checkpoint-*"))


def content_of(row: str, seed: int, value: float) -> dict:
    """A result whose every score is `value`, of segmentation and classes alone."""
    scores = {"mean_iou": value, "per_class_iou": {"background": value}, "num_images": 3}
    scores = {"segmentation": scores, "classification": {"mean_average_precision": value}}
    machine = {"device": "a processor", "precision": "no", "torch": "2"}
    content = {"row": row, "seed": seed, "settings": {"steps": 1}, "revision": f"of{seed}", "scores": scores}
    return content | {"minutes": 2.0, "machine": machine}


@pytest.fixture
def ablation_tables() -> ModuleType:
    return load_benchmark("ablation_tables")


def test_tables_in_a_document_are_made_of_the_results(ablation, ablation_tables, tmp_path, monkeypatch, capsys):
    folder, document = tmp_path / "results" / "one-table", tmp_path / "method.md"
    folder.mkdir(parents=True)
    for row, seed, value in (("toco", 0, 0.1), ("class_prior", 1, 0.4), ("class_prior", 0, 0.2), ("ceiling", 0, 0.5)):
        (folder / f"{row}-seed{seed}.json").write_text(json.dumps(content_of(row, seed, value)))
    document.write_text("before\n<!-- ablation one-table -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(ablation, "DOCUMENT", document)
    words = ["--tables", "--results", str(tmp_path / "results")]
    assert ablation.main(words) == 0
    text = document.read_text()
    assert "1 tables" in capsys.readouterr().out
    lines = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| `")]
    # in the order of the rows; the mix alone has a ceiling here
    assert lines[:3] == [
        ["| `class_prior` (2)", "30.0 ± 14.1 (60 %)", "-"],
        ["| `toco` (1)", "10.0 (20 %)", "-"],
        ["| `ceiling` (1)", "50.0", "-"],
    ]
    assert "3 images" in text and "Revision of0, of1." in text and "a processor" in text
    assert text.startswith("before\n<!-- ablation one-table -->\n\n|")
    assert text.endswith("\n\n<!-- end -->\nafter\n") and "old" not in text
    assert ablation_tables.filled(text, tmp_path / "results", list(ablation.ROWS)) == text
    # seeds of one row belong together
    other = content_of("class_prior", 2, 0.3) | {"settings": {"steps": 2}}
    (folder / "class_prior-seed2.json").write_text(json.dumps(other))
    assert ablation.main(words) == 2
    assert "differ in steps" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no results for the table none"):
        ablation_tables.filled("<!-- ablation none -->\n<!-- end -->", tmp_path, [])


def test_the_documentation_has_the_tables_of_the_tracked_results(ablation, ablation_tables):
    text = ablation.DOCUMENT.read_text(encoding="utf-8")
    assert ablation_tables.filled(text, ablation.RESULTS, list(ablation.ROWS)) == text


def test_a_tuning_split_leaves_the_validation_split_alone(ablation, tmp_path, monkeypatch):
    ablation_data = sys.modules[ablation.cut_tuning_split.__module__]
    devkit = write_voc_devkit(tmp_path, num_train=6, num_validation=2)
    words = ["--data", "voc_animals", "--data_dir", str(devkit.root), "--backbone", "some/encoder", "--tuning"]
    options, extra = ablation.parse_options([*words, *folders(tmp_path / "out")])
    base = ablation.base_arguments(options, extra)
    with pytest.raises(InvalidArguments, match="lists 6 images"):
        ablation.cut_tuning_split(base[1], tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(ablation_data, "TUNING_IMAGES", 2)
    ids = sorted(devkit.train_ids)
    random.Random(0).shuffle(ids)
    for _ in range(2):
        data_args = ablation.cut_tuning_split(base[1], tmp_path / "cut")
        splits = ablation.load_data(data_args)
        assert splits["validation"]["image_id"][:] == sorted(ids[:2]) and "mask" in splits["validation"].column_names
        assert splits["train"]["image_id"][:] == sorted(ids[2:])
    assert ablation.table_of(base, options) == "voc_animals-160px-2000steps-tuning"
    shapes = ablation.base_arguments(*ablation.parse_options([*WORDS, *folders(tmp_path)]))
    with pytest.raises(InvalidArguments, match="VOC"):
        ablation.cut_tuning_split(shapes[1], tmp_path / "cut")


def test_the_ceiling_learns_from_masks_cropped_as_their_images(ablation, tmp_path, monkeypatch):
    from synernet_hf.data import TrainTransform

    base = ablation.base_arguments(*ablation.parse_options([*WORDS, *folders(tmp_path)]))
    _, data_args, training_args = ablation.row_arguments(base, ablation.ROWS["ceiling"], 0, tmp_path / "run")
    training_args.scale_range = (0.8, 1.6)
    ablation_data = sys.modules[ablation.labels_against_masks.__module__]
    stream = ablation_data.MaskStream(data_args, training_args)
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    transform = TrainTransform(32, (0.8, 1.6), training_args.flip, training_args.seed)
    for position in range(6):
        # an image that shows its mask
        record = stream.split[position]
        image = Image.fromarray(colours[np.asarray(record["mask"])])
        sample = transform(record | {"image": image}, position)
        mask, box = stream.mask(position, position)
        assert torch.equal(box, sample["valid_box"])
        inside = mask != 255
        assert inside.sum() == (box[1] - box[0]) * (box[3] - box[2])
        # of the colours of its classes that of a pixel's is the closest
        classes = torch.from_numpy(np.unique(record["mask"]).astype(np.int64))
        own = torch.from_numpy(colours.astype(np.float32))[classes][:, :, None, None]
        closest = classes[(sample["image"] - own).square().sum(dim=1).argmin(dim=0)]
        assert (closest == mask)[inside].float().mean() > 0.95
    # the batch that the training has at this step
    keys = next(iter(ablation_data.StreamBatchSampler(8, 2, 4, 0, 3)))
    stored = ablation.load_data(data_args)["train"]
    boxes = torch.stack([transform(stored[index], position)["valid_box"] for index, position in keys])
    labels = torch.stack([multi_hot(stored[index]["labels"], 5) for index, _ in keys])
    assert stream(3, boxes, labels).shape == (2, 32, 32)
    for wrong in ((boxes + 1, labels), (boxes, 1 - labels)):
        with pytest.raises(ValueError, match="not those of its images"):
            stream(3, *wrong)


def test_only_the_segmentation_of_the_ceiling_sees_masks(ablation, tmp_path):
    words = [*WORDS, *folders(tmp_path), "--rows", "class_prior", "ceiling", "--seeds", "0"]
    weights = {}
    for start in (0.0, 1.0):
        output = tmp_path / str(start)
        model_config = TINY["--model_config"] | {"segmentation_start": start}
        base = ablation.base_arguments(*ablation.parse_options([*words, "--model_config", json.dumps(model_config)]))
        for row in ("class_prior", "ceiling"):
            folder, _ = ablation.trained_run(base, row, 0, output, "")
            weights[row, start] = load_file(folder / "model.safetensors")

    def differing(start: float) -> set[str]:
        first, second = weights["class_prior", start], weights["ceiling", start]
        return {name for name in first if not torch.equal(first[name], second[name])}

    assert not differing(1.0)
    assert any("decode_head" in name for name in differing(0.0))


def test_labels_are_compared_with_masks_during_training(ablation, tmp_path, monkeypatch):
    ablation_data = sys.modules[ablation.labels_against_masks.__module__]
    monkeypatch.setattr(ablation_data, "RECORD_EVERY", 1)
    words = [*WORDS, *folders(tmp_path), "--rows", "single", "ceiling", "--seeds", "0", "--max_steps", "4"]
    assert ablation.main([*words, "--save_steps", "100"]) == 0
    for row, branches in (("single", {"precise"}), ("ceiling", {"broad", "precise"})):
        content = json.loads((tmp_path / "results" / "shapes-32px-4steps" / f"{row}-seed0.json").read_text())
        # the segmentation starts after a quarter: two steps of four have labels
        assert [tenth["until"] for tenth in content["labels"]] == [0.6, 0.8]
        for tenth in content["labels"]:
            assert branches == tenth.keys() - {"until", "differ"}
            assert all(0 <= tenth[branch][score]["mean"] <= 1 for branch in branches for score in tenth[branch])


def test_labels_are_counted_by_class_against_the_masks(ablation, tmp_path):
    ablation_data = sys.modules[ablation.labels_against_masks.__module__]
    masks = torch.tensor([[[0, 1, 1, 1, 2, 255]]])
    broad = torch.tensor([[[3, 1, 1, 0, 255, 2]]])
    precise = torch.tensor([[[0, 1, 2, 0, 2, 0]]])
    counts = json.loads(json.dumps(ablation_data.label_counts(broad, precise, masks)))
    # rightly labelled, labelled, of this class; where the mask is unknown nothing counts
    assert counts["broad"] == {"0": [0, 1, 1], "1": [2, 2, 3], "2": [0, 0, 1], "3": [0, 1, 0]}
    assert counts["precise"] == {"0": [1, 2, 1], "1": [1, 1, 3], "2": [1, 2, 1]}
    assert counts["differ"] == [4, 3]
    record = tmp_path / "labels.jsonl"
    # step 40 was done again after an interruption
    lines = [{"step": 40, "broad": {}, "precise": {}, "differ": [9, 9]}, {"step": 40} | counts, {"step": 49} | counts]
    lines.append({"step": 99} | counts | {"differ": [0, 0]})
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, last = ablation_data.label_quality(record, 100, [1, 2, 3], ["background", "cat", "dog", "cow"])
    assert (first["until"], last["until"]) == (0.5, 1.0)
    # a class that is not there has no recall
    assert first["broad"]["recall"] == {"cat": 2 / 3, "dog": 0.0, "mean": 1 / 3}
    assert first["broad"]["precision"] == {"cat": 1.0, "cow": 0.0, "mean": 0.5}
    assert first["precise"]["precision"] == {"cat": 1.0, "dog": 0.5, "mean": 0.75}
    assert (first["differ"], last["differ"]) == (0.75, 0)


def test_figures_of_the_split_and_of_a_file(figures, finished, tmp_path, capsys):
    run = finished / TABLE / "class_prior-seed0"
    image = tmp_path / "mine.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 46, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    words = [str(run), "--images", "validation_000001", str(image), "--output", str(tmp_path / "out")]
    assert figures.main([*words, "--panel_size", "64"]) == 0
    drawn = [Image.open(line).convert("RGB") for line in capsys.readouterr().out.split()]
    assert [Path(path).name for path in sorted((tmp_path / "out").iterdir())] == ["mine.png", "validation_000001.png"]
    # seven panels side by side, four rows or more, and not all of one colour
    for figure in drawn:
        assert figure.width == 8 + 7 * (64 + 8) and figure.height > 3 * 40
        assert np.asarray(figure).std() > 10
    assert figures.main([*words[:2], "validation_999999"]) == 2
    assert "validation_000000" in capsys.readouterr().err
    # of three images two, the same each time
    words = [str(run), "--output", str(tmp_path / "even"), "--panel_size", "32", "--number"]
    assert figures.main([*words, "2"]) == 0
    ids = ["validation_000000", "validation_000001"]
    assert [Path(line).stem for line in capsys.readouterr().out.split()] == ids
    assert figures.main([*words, "4"]) == 2
    assert "has 3 images" in capsys.readouterr().err


def test_figures_show_what_the_model_sees_in_evaluation(figures, finished):
    from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor

    run = finished / TABLE / "class_prior-seed0"
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(run).eval()
    processor = SynerNetImageProcessor.from_pretrained(run, do_resize=True, size={"shortest_edge": 24})
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (48, 72, 3), dtype=np.uint8))
    seen = figures.inspect_image(model, processor, image, None)
    pixel_values = processor(images=image, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape[-2:] == (24, 36)
    with torch.no_grad():
        logits = model.multi_scale_logits(pixel_values, scales=(1.0,))
    expected = torch.nn.functional.interpolate(logits, size=(48, 72), mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(seen["label_maps"]["segmentation"], expected.argmax(dim=1)[0].numpy())
    assert {maps.shape for maps in (*seen["cams"].values(), *seen["label_maps"].values())} == {(48, 72)}


def test_what_a_figure_shows(figures, finished):
    from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor

    run = finished / TABLE / "class_prior-seed0"
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(run).eval()
    processor = SynerNetImageProcessor.from_pretrained(run)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    seen = figures.inspect_image(model, processor, image, [0, 2])
    # the labels of the figure are those of training
    pixel_values = processor(images=image, do_resize=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        taught = model(
            pixel_values, labels=torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0]]), loss_weights={"segmentation": 1.0}
        )
    label_map = seen["label_maps"]["label that teaches P"]
    assert (label_map == taught.pseudo_labels[0].numpy()).mean() > 0.99
    np.testing.assert_allclose(seen["confidence"], taught.confidence[0, 0].numpy())
    assert set(np.unique(seen["votes"]["broad", "aux"])) <= {0, 1, 3, 255}
    truth = np.zeros((32, 48), dtype=np.int64)
    truth[:16] = 2
    assert figures.image_iou(truth, truth, 6) == 1.0
    assert figures.image_iou(np.full_like(truth, 255), truth, 6) == pytest.approx(0.25)


def test_figures_of_more_than_two_layers(figures):
    from synernet_hf import SynerNetImageProcessor

    model = SynerNetModelTester(confidence_layers=[1, -2, -1]).model()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    seen = figures.inspect_image(model, SynerNetImageProcessor(size_divisor=8), image, [0, 2])
    assert [layer for branch, layer in seen["cams"] if branch == "broad"] == ["last", "aux", "block 1"]
    assert set(np.unique((6 * seen["confidence"]).round(4))) <= set(range(7))
    record = {"image": image, "image_id": "image", "mask": None}
    figure = figures.draw(record, seen, ["background", "cat", "dog", "horse"], 64)
    assert figure.width == 8 + 9 * (64 + 8)


def test_unknown_classes_are_refused(figures, tmp_path):
    with pytest.raises(InvalidArguments, match="zebra"):
        figures.read_file(tmp_path / "any.png", ["zebra"], ["background", "cat"])


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    return load_benchmark("pseudo_label_quality")


def test_quality_of_pseudo_labels(quality, finished, tmp_path, capsys):
    run = finished / TABLE / "class_prior-seed0"
    words = [
        str(run),
        "--max_samples",
        "2",
        "--variants",
        "fusion",
        "--set",
        "low_threshold=0.1",
        "precise_consensus=true",
    ]
    record = saved(quality, words, tmp_path / "quality.json")
    named = "low_threshold 0.1, precise_consensus true"
    assert list(record["variants"]) == [quality.OWN, 'fusion "fixed"', "cross_supervision false", named]
    assert (record["size"], record["num_images"], record["run"]) == (32, 2, "class_prior-seed0")
    assert record["fields"][named] == {"low_threshold": 0.1, "precise_consensus": True}
    own, other = record["variants"][quality.OWN]["broad"], record["variants"][named]["broad"]
    assert list(own) == ["mean_iou", "recall", "precision", "decided"] and own["decided"].keys() == {"value"}
    assert other["decided"]["difference"] == pytest.approx(other["decided"]["value"] - own["decided"]["value"])
    low, high = other["decided"]["interval"]
    assert low <= other["decided"]["difference"] <= high
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]) == 2 + 2 * 4
    for fault, sentence in (("low_threshold=0.8", "does not go with"), ("lowest=1", "has no field lowest")):
        assert quality.main([str(run), "--set", fault]) == 2
        assert sentence in capsys.readouterr().err
    assert quality.main([str(finished / "nothing")]) == 2


def test_labels_of_variants_are_those_of_training(quality):
    tester = SynerNetModelTester(precise_consensus=True, broad_propagation_temperature=0.2, cam_scales=(1.0, 0.5))
    model, pixel_values = tester.model().eval(), tester.inputs()["pixel_values"][:1]
    labels = torch.zeros(1, model.config.num_labels - 1)
    classes = [0, model.config.num_labels - 2]
    labels[0, classes] = 1
    variants = {name: fields for group in quality.VARIANTS.values() for fields in group for name in [str(fields)]}
    variants = {"own": {}} | {name: fields for name, fields in variants.items() if "threshold" not in name}
    variants["thresholds"] = {"low_threshold": 0.3, "high_threshold": 0.4}
    variants["layers"] = {"confidence_layers": [-1, -2]}
    encoded = []
    hook = model.synernet.broad_branch.backbone.register_forward_pre_hook(lambda *_: encoded.append(1))
    found = quality.taught_labels(model, pixel_values, classes, variants)
    hook.remove()
    views, before = len(encoded), model.config.to_dict()
    different = set()
    for label, (name, fields) in zip(found, variants.items(), strict=True):
        for field, value in fields.items():
            setattr(model.config, field, value)
        with torch.no_grad():
            outputs = model(pixel_values, labels=labels, loss_weights={"segmentation": 1.0})
        assert torch.equal(label[1], outputs.pseudo_labels[0]), name
        different.add(label.numpy().tobytes())
        for field in fields:
            setattr(model.config, field, before[field])
    assert len(different) > 8
    # scales 1, 0.5, 0.75 and 1.5 and their mirrors in as few calls as scales and mirrors are first asked for; and the
    # own two scales of other layers
    assert views <= 2 + 4 + 2


def test_scores_of_pseudo_labels_are_counted_right(quality):
    # rows background, cat, dog; columns the same and undecided
    counts = np.array([[60, 10, 0, 30], [5, 20, 5, 10], [0, 0, 0, 60]])
    scores = quality.scores_of(counts, [0, 1, 2])
    assert scores["mean_iou"] == pytest.approx(100 * (60 / 75 + 20 / 40 + 0 / 5) / 3)
    assert scores["recall"] == pytest.approx(100 * (20 / 40 + 0) / 2)
    assert scores["precision"] == pytest.approx(100 * (20 / 30 + 0) / 2)
    assert scores["decided"] == pytest.approx(50)
    assert quality.scores_of(counts, [0, 1])["recall"] == pytest.approx(50)


def test_intervals_are_of_differences_on_the_same_images(quality):
    generator = np.random.default_rng(1)
    first = generator.integers(1, 60, (40, 1, 2, 3, 4))
    # the second variant is right on one pixel of each class more, everywhere
    second = first + np.pad(np.eye(3, dtype=int), ((0, 0), (0, 1)))
    figures = quality.compare(np.concatenate([first, second], axis=1), ["first", "second"], [0, 1, 2])
    entry = figures["second"]["precise"]["mean_iou"]
    low, high = entry["interval"]
    # unpaired it would hold 0: images differ by far more than the variants
    assert 0 < low < entry["difference"] < high
    drawn = []
    for weights in np.random.default_rng(0).multinomial(40, [1 / 40] * 40, quality.RESAMPLES):
        images = np.repeat(np.arange(40), weights)
        values = [
            quality.scores_of(counts[images, 0, 1].sum(axis=0), [0, 1, 2])["recall"] for counts in (first, second)
        ]
        drawn.append(values[1] - values[0])
    assert figures["second"]["precise"]["recall"]["interval"] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])))


def test_the_loader_is_timed_beside_the_bare_work(tmp_path, capsys, monkeypatch):
    data_loading = load_benchmark("data_loading")
    # the other processes look the module up by its name
    monkeypatch.setitem(sys.modules, data_loading.__name__, data_loading)
    words = ["--dataset", "shapes", "--dataset_options", '{"num_train": 6, "num_validation": 1, "image_size": 32}']
    words += ["--workers", "1", "--num_images", "8", "--rounds", "2", "--batch_size", "4", "--crop_size", "24"]
    assert data_loading.main([*words, "--output", str(tmp_path / "rates.json")]) == 0
    # images without loss have no reduced size
    assert "No image is decoded at a reduced size" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "rates.json").read_text())["rates"]
    low, high = row["loader / bare, range"]
    assert row["loader"] > 0 and low <= row["loader / bare"] <= high
    assert data_loading.main(["--dataset", "nothing"]) == 2


def test_ratios_are_those_of_a_round():
    data_loading = load_benchmark("data_loading")
    rates = {2: {"bare": [10.0, 100.0, 20.0], "bare, draft": [20.0, 100.0, 40.0], "loader": [9.0, 80.0, 20.0]}}
    (row,) = data_loading.summary(rates)
    assert row["bare"] == 20 and row["loader / bare"] == pytest.approx(0.9)
    assert row["loader / bare, draft, range"] == pytest.approx([0.45, 0.8])
    assert "| 2 | 20 | 40 | 20 | 0.90 (0.80 to 1.00) |" in data_loading.table([row])


def test_the_bare_work_uses_the_factors_of_training():
    data_loading = load_benchmark("data_loading")
    image = Image.new("RGB", (400, 300), "white")
    transform = data_loading.TrainTransform(2000, (0.5, 2.0), seed=data_loading.SEED)
    for position in range(5):
        record = {"image": image, "image_id": "one", "labels": [0]}
        top, bottom, left, right = transform(record, position)["valid_box"].tolist()
        resized = data_loading.decode_and_resize(image, data_loading.factor_of(position, (0.5, 2.0)), False)
        assert resized.size == (right - left, bottom - top)


def test_a_training_step_has_the_loss_of_the_reference_order_of_work(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    training_step = load_benchmark("training_step")
    words = ["--size", "smoke", "--device", "cpu", "--warmup", "0", "--steps", "1", "--dtype", "float32"]
    assert training_step.main([*words, "--output", str(tmp_path / "step.json")]) == 0
    record = json.loads((tmp_path / "step.json").read_text())
    assert record["notes"] == [] and list(record["variants"]) == ["reference float32", "ours float32"]
    assert record["relative_loss_difference"]["float32"] < 1e-5
    reference, ours = record["variants"].values()
    assert reference["loss"] > 1 and reference["matrix_tflop"] > 2 * ours["matrix_tflop"] > 0
    parts = ["training pass", "CAM passes", "labels from CAMs", "instances", "losses", "backward", "optimizer", "rest"]
    assert sorted(ours["parts"]) == sorted(reference["parts"]) == sorted(parts)
    assert min(*ours["parts"].values(), *reference["parts"].values()) > -1e-3
    assert "1.00x reference float32" in capsys.readouterr().out


@pytest.mark.slow
def test_approximate_steps_run_beside_the_exact_one(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    training_step = load_benchmark("training_step")
    words = "--size smoke --device cpu --warmup 0 --steps 1 --dtype bfloat16 --approximate --batch_size 1".split()
    record = training_step.measure(training_step.parse(words))
    kinds = ["reference", "ours", "one scale", "one scale, narrow decoder"]
    assert record["notes"] == [] and list(record["variants"]) == [f"{kind} bfloat16" for kind in kinds]
    arithmetic = [entry["matrix_tflop"] for entry in record["variants"].values()]
    assert arithmetic == sorted(set(arithmetic), reverse=True)


@pytest.mark.slow
def test_a_saving_undone_costs_time_and_changes_no_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    training_step = load_benchmark("training_step")
    words = "--size smoke --device cpu --warmup 0 --steps 1 --dtype float32 --gains".split()
    variants = training_step.measure(training_step.parse(words))["variants"]
    ours, before, decoding = (variants[f"{kind} float32"] for kind in ("ours", *training_step.SAVINGS[-2:]))
    assert before["loss"] == decoding["loss"] < ours["loss"]
    assert before["matrix_tflop"] < decoding["matrix_tflop"] < ours["matrix_tflop"]
    undone = {name: entry for name, entry in variants.items() if name.startswith("without")}
    assert len(undone) == 5 and {entry["loss"] for entry in undone.values()} == {ours["loss"]}
    more = {name for name, entry in undone.items() if entry["matrix_tflop"] > ours["matrix_tflop"]}
    assert {name.removesuffix(" float32") for name in more} == set(training_step.SAVINGS[1:3])


def test_a_pack_unpacks_to_the_same_data_set(tmp_path):
    from safetensors.torch import load_file, save_file

    from synernet_hf.data import load_voc2012

    devkit = write_voc_devkit(tmp_path, num_train=3, num_validation=2)
    plain = load_voc2012(devkit.root, image_labels="annotations")
    ids = plain["train"]["image_id"][:] + plain["validation"]["image_id"][:]
    vectors = [multi_hot(labels, 20) for split in plain.values() for labels in split["labels"]]
    np.savez(tmp_path / "labels.npz", ids=np.array(ids), labels=np.stack(vectors))
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone" / "config.json").write_text("{}")
    save_file({"weight": torch.ones(2), "classifier.weight": torch.ones(2)}, tmp_path / "backbone/model.safetensors")
    words = [
        f"--{name}={tmp_path / path}" for name, path in (("image_labels", "labels.npz"), ("backbone", "backbone"))
    ]
    make_pack = load_benchmark("make_pack")
    sys.modules[make_pack.__name__] = make_pack  # other processes look the module up by its name
    make_pack.main([*words, "--data_dir", str(devkit.root), "--output", str(tmp_path / "pack"), "--processes", "1"])
    record = make_pack.unpack(tmp_path / "pack", tmp_path / "data", 1)
    assert record["factor"] == 0.7 and record["num_images"] == 5
    packed = load_voc2012(tmp_path / "data", image_labels=tmp_path / "data" / "image_labels.npz")
    for name, split in plain.items():
        assert packed[name]["labels"][:] == split["labels"][:]
    sizes = {name: [image.size for image in packed[name]["image"]] for name in packed}
    assert sizes == {"train": [(34, 28)] * 3, "validation": [(48, 40)] * 2}
    weights = load_file(tmp_path / "data" / "backbone" / "model.safetensors")
    assert list(weights) == ["weight"] and weights["weight"].dtype == torch.float32


def test_the_gpu_suite_plans_steps_that_fit_and_trainings_that_the_ablation_takes(ablation, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu_suite = load_benchmark("gpu_suite")
    assert gpu_suite.planned_steps(500.0, 0.2, 100.0, 5000) == 1800
    assert gpu_suite.planned_steps(500.0, 0.2, 100.0, 1000) == 1000
    assert gpu_suite.planned_steps(50.0, 0.2, 100.0, 1000) == 0
    suite = gpu_suite.Suite(gpu_suite.parse([str(tmp_path / "out"), "--pack", "pack", "--tiny"]))
    for run in suite.args.runs:
        words = suite.ablation(run, 7, "run", 0.5)[1:]
        _, _, training_args = ablation.base_arguments(*ablation.parse_options(words))
        assert (training_args.max_steps, list(training_args.scale_range)) == (7, [0.7, 1.4])
    commands: dict = {}
    with monkeypatch.context() as patched:
        patched.setattr(suite, "run_all", lambda words, seconds: commands.update(words))
        suite.inference()
    options = load_benchmark("inference").parse_arguments(commands["inference"][1:])
    assert options.backbone == str(tmp_path / "out" / "data" / "backbone") and not options.large
    suite.run_all({"one": ["-c", "print(3)"], "two": ["-c", "import time; time.sleep(60)"]}, 1.0)
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "one: 0" in log and "two: out of time" in log


def saved(module: ModuleType, words: list[str], path: Path) -> dict:
    """The record that a benchmark writes."""
    assert module.main([*words, "--output", str(path)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_ways_to_a_mean_iou_agree(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = "--num_images 2 --size 12 10 --num_labels 4 --rounds 1".split()
    variants = saved(load_benchmark("metric"), words, tmp_path / "metric.json")["variants"]
    assert {"evaluate", "ours", "ours through evaluate", "np.bincount", "np.histogram2d"} <= set(variants)
    assert max(entry["difference"] for entry in variants.values()) < 1e-6
    assert "| ours |" in capsys.readouterr().out


def test_a_crf_on_likely_classes_is_compared_with_one_on_all(finished, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    crf = load_benchmark("crf")
    monkeypatch.setattr(crf, "DenseCRF", SlowlySure)
    words = [str(finished / TABLE / "class_prior-seed0"), "--max_samples", "3", "--processes", "1"]
    record = saved(crf, words, tmp_path / "crf.json")
    ways = ["plain", "likely classes", "likely classes and 5 iterations"]
    assert list(record["variants"]) == [*ways, *(f"{way}, 1 processes" for way in ways)]
    # what falls below 0.2 everywhere is never the likeliest of six classes
    assert [entry["equal_pixels"] for entry in record["variants"].values()] == [1.0] * 6
    assert len(set(record["mean_iou"].values())) == 1 and record["num_images"] == 3
    assert 1 <= record["mean_likely_classes"] < record["num_labels"] == 6
    assert "| likely classes |" in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux")
def test_growth_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scaling = load_benchmark("scaling")
    # other processes would look the module up by its name
    words = "--parts classes size images memory --classes 3 6 --size 32 --sizes 32 48 --images 4 8"
    words += " --batch_size 4 --crop_size 64 --rounds 1"
    record = saved(scaling, words.split(), tmp_path / "scaling.json")
    assert set(record["images"]) == {"confusion matrix", "pseudo-labels, records", "pseudo-labels, found finished"}
    rows = [row for part in ("classes", "size", "images") for row in record[part].values()]
    assert all(len(row["seconds"]) == 2 and row["seconds"][0] > 0 for row in rows)
    assert record["memory"]["most_classes"] == 4 and "| refinement |" in capsys.readouterr().out


def test_exponents_and_memory_are_those_of_the_work(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    scaling = load_benchmark("scaling")
    assert scaling.curve([10, 20, 40], [1.0, 3.0, 16.0], 1)["exponent"] == pytest.approx(2)
    if Path("/proc/self/clear_refs").exists():
        assert 60 < scaling.peak_memory(lambda: np.ones(2**23)) < 90
    model, batch = scaling.make_model(5).eval(), scaling.make_batch(3, 5, 64)
    # the naive form mixes both branches evenly
    model.config.fusion = "fixed"
    with torch.no_grad():
        ours, naive = scaling.supervise(model, *batch), scaling.supervise_naively(model, *batch)
    slots = torch.where(naive == 255, 255, (naive > 0).long())
    # the first image has one class, and its slot is the first
    assert (slots[:, 0] == ours[:, 0]).float().mean() > 0.99


def test_checkpoints_are_timed_with_and_without_what_makes_them_durable(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    words = ["--megabytes", "1", "--rounds", "1", "--folder", str(tmp_path), "--output", str(tmp_path / "out.json")]
    assert load_benchmark("checkpoint").main(words) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert list(record["variants"]) == ["written", "with digests", "with digests, on the disk", "checked"]
    assert record["variants"]["written"]["times_of_written"] == 1
    assert 0.9 < record["megabytes"] < 1.1
    assert capsys.readouterr().out.count("\n| ") == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory) -> list[str]:
    """Words that name a tiny encoder and a recipe for it."""
    folder = tmp_path_factory.mktemp("encoder")
    AutoModel.from_config(AutoConfig.for_model(**TINY["--backbone_config"])).save_pretrained(folder)
    (folder / "recipe.yaml").write_text(json.dumps({"model_config": TINY["--model_config"]}))
    return ["--backbone", str(folder), "--recipe", str(folder / "recipe.yaml")]


def test_evaluation_is_compared_with_passes_of_its_own(tiny_recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    evaluation = load_benchmark("evaluation")
    words = ["--dataset", "shapes", "--dataset_options", json.dumps(TINY["--dataset_options"]), "--size", "24"]
    words += ["--rounds", "1", "--memory_images", "--workers", "1", "--output", str(tmp_path / "figures.json")]
    assert evaluation.main([*tiny_recipe, *words]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["rows"]) == [*list(evaluation.KINDS)[:-1], "plain, several scales, CAMs, 1 workers decode"]
    assert all(share > 0 for row in figures["rows"].values() for share in row.values())
    assert figures["largest_difference_of_a_score"] == 0 and "| plain |" in capsys.readouterr().out
    # it would see another count
    names = ["background", "cat"]
    metric = evaluation.MeanIoU(2).update(np.array([[0, 1]]), np.array([[0, 0]]))
    scored = {"segmentation": {"pixel_accuracy": 1.0, "per_class_iou": {"background": 1.0, "cat": None}}}
    assert evaluation.largest_difference(scored, {"segmentation": metric}, names) >= 0.5
    assert evaluation.main([*tiny_recipe, "--dataset", "shapes", "--generated", "2"]) == 0
    assert 10 < float(capsys.readouterr().out.split()[-1]) < 1e5


def test_inference_is_compared_with_bare_encoders(tiny_recipe, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    inference = load_benchmark("inference")
    monkeypatch.setattr(inference, "LARGE", (80, 60))
    words = ["--sides", "24", "--batch_sizes", "2", "--rounds", "1", "--no_onnx", "--no_large"]
    assert inference.main([*tiny_recipe, *words, "--output", str(tmp_path / "figures.json")]) == 0
    cases = json.loads((tmp_path / "figures.json").read_text())["cases"]
    assert [case["multi_scale"] for case in cases] == [False, True]
    for case in cases:
        assert list(case["variants"]) == ["limit", "encoders and decoders", "model", "pipeline"]
        assert case["variants"]["limit"]["share_of_limit"] == 1
    assert "| 24 | 2 | several, mirrored | pipeline |" in capsys.readouterr().out
    assert inference.main([*tiny_recipe, "--large_only"]) == 0
    seconds, before, after = map(float, capsys.readouterr().out.split()[-3:])
    assert seconds > 0 and 10 < before <= after


def test_starts_are_timed_in_turns(tiny_run_folder, monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    startup = load_benchmark("startup")
    # stand-ins that take no seconds
    monkeypatch.setattr(startup, "LIMIT", "import time; time.sleep(0.5)")
    monkeypatch.setattr(startup, "STATEMENTS", (startup.PYTHON, startup.LIMIT, "import synernet_hf"))
    words = [str(tiny_run_folder), "--rounds", "1", "--commands", "examples/predict.py"]
    record = saved(startup, words, tmp_path / "startup.json")
    rows = record["variants"]
    assert list(rows) == [*startup.STATEMENTS, "examples/predict.py --help"]
    assert rows[startup.LIMIT]["ratio_to_limit"] == 1 and rows[startup.PYTHON]["ratio_to_limit"] == 0
    assert set(record["prediction"]) > {"transformers and torch", "weights", "prediction"}
    assert "| `import synernet_hf` |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        startup.main(["--rounds", "0"])
    assert refused.value.code == 2
    with pytest.raises(ChildProcessError, match="no_such_module"):
        startup.run_python("-c", "import no_such_module")
