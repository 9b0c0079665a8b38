"""The training loop on a few 32-pixel images: what it leaves behind, resuming, refusing, stopping."""

import io
import json
import logging
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.optimizer import AcceleratedOptimizer
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from testing_utils import TRAINED_MODEL as MODEL
from training_utils import DATA, TRAINING, assert_equal_weights, run, snapshot, state_of, stop_at, weights

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.data import load_shapes, streams, write_parquet
from synernet_hf.training import (
    DataArguments,
    InvalidArguments,
    ModelArguments,
    building,
    engine,
    learning_rate_multiplier,
    load_data,
    reporting,
)
from synernet_hf.training.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps that was not interrupted: its folder and what `train` returned."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    return folder, run(folder, report_to="tensorboard")


def test_the_inference_size_is_saved_with_the_model(tmp_path):
    run(tmp_path / "run", max_steps=1, inference_size=40)
    processor = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert processor["do_resize"]
    assert processor["size"] == {"shortest_edge": 40}


def test_a_run_leaves_a_complete_folder(finished):
    folder, results = finished
    for name in ("model.safetensors", "config.json", "preprocessor_config.json", "README.md", "eval_results.json"):
        assert (folder / name).stat().st_size > 0
    assert not json.loads((folder / "preprocessor_config.json").read_text())["do_resize"]
    assert list(folder.rglob("events.out.tfevents*"))
    assert not list(folder.rglob("*.tmp"))
    record = json.loads((folder / "training_args.json").read_text())
    assert {"model_args", "data_args", "training_args", "class_names", "versions"} <= set(record)
    assert record["training_args"]["max_steps"] == 4
    assert record["class_names"][0] == "background"
    assert record["versions"]["torch"] == torch.__version__
    written = json.loads((folder / "eval_results.json").read_text())
    assert written["step"] == results["training"]["step"] == 4
    assert written["segmentation"]["mean_iou"] == pytest.approx(results["segmentation"]["mean_iou"])
    assert {"segmentation", "broad_cam", "precise_cam", "fused_cam"} <= set(written)
    assert results["training"]["minutes"] > 0
    card = (folder / "README.md").read_text()
    assert "| steps | 4 |" in card
    assert "](images.png)" in card
    # two validation images, four panels each
    width, height = Image.open(folder / "images.png").size
    assert width > 4 * 160
    assert 2 * 160 < height < 3 * 160


def test_saved_model_is_the_trained_one(finished):
    folder, _ = finished
    loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder).state_dict()
    trained = load_file(folder / "checkpoint-4" / "model.safetensors")
    assert loaded.keys() == trained.keys()
    for name, tensor in trained.items():
        assert torch.equal(loaded[name], tensor), name
    assert SynerNetImageProcessor.from_pretrained(folder).image_mean == pytest.approx([0.485, 0.456, 0.406])


def test_weights_move_and_prototypes_fill(finished):
    folder, _ = finished
    early, late = (load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4))
    still = [name for name in early if torch.equal(early[name], late[name]) and not name.endswith("prototypes")]
    assert still == []
    prototypes = [tensor for name, tensor in late.items() if name.endswith("prototypes")]
    assert len(prototypes) == 2
    assert all(tensor.norm(dim=-1).max() == pytest.approx(1, abs=1e-5) for tensor in prototypes)


def test_best_is_the_best_evaluated_model(tmp_path, monkeypatch):
    scores = iter([0.3, 0.5, 0.4, float("nan")])
    evaluate_model = engine.evaluate_model

    def scored(*args, **kwargs):
        results = evaluate_model(*args, **kwargs)
        results["segmentation"]["mean_iou"] = next(scores)
        return results

    monkeypatch.setattr(engine, "evaluate_model", scored)
    results = run(tmp_path / "run", eval_steps=1, save_steps=1)
    assert results["training"]["best_step"] == 2
    assert_equal_weights(tmp_path / "run" / "best", tmp_path / "run" / "checkpoint-2")
    assert json.loads((tmp_path / "run" / "best" / "eval_results.json").read_text())["step"] == 2
    assert (tmp_path / "run" / "best" / "preprocessor_config.json").is_file()
    assert state_of(tmp_path / "run" / "checkpoint-4")["best_metric"] == 0.5


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gates_and_rates_follow_the_optimizer_steps(tmp_path, accumulation):
    run(tmp_path / "run", gradient_accumulation_steps=accumulation, warmup_ratio=0.5)
    history = [entry for entry in state_of(tmp_path / "run" / "checkpoint-4")["history"] if "loss" in entry]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    gated = {"loss_segmentation", "loss_spatial_bce", "loss_prototype_contrast"}
    assert [gated & set(entry) for entry in history] == [set(), set(), gated, gated]
    assert all({"loss_cls", "loss_cls_aux", "loss_patch_contrast"} <= set(entry) for entry in history)
    expected = [2e-3 * learning_rate_multiplier(step, 2, 4) for step in range(4)]
    assert [entry["learning_rate"] for entry in history] == pytest.approx(expected)
    scheduler = torch.load(tmp_path / "run" / "checkpoint-2" / "scheduler.bin", weights_only=False)
    assert scheduler["last_epoch"] == 2
    assert scheduler["_last_lr"] == pytest.approx([expected[2], 5 * expected[2]])


def interrupt(*args):
    raise KeyboardInterrupt


@pytest.mark.resume
@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_steps_and_a_resume_equal_four_steps(tmp_path, monkeypatch, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "eval_steps": 1}
    run(tmp_path / "straight", **settings)
    with monkeypatch.context() as patch:
        # in the middle of the third step where two passes make one
        stop_at(patch, 3 * accumulation - 1, interrupt)
        with pytest.raises(KeyboardInterrupt, match="after step 2; the last checkpoint is .*checkpoint-2"):
            run(tmp_path / "broken", **settings)
    assert [path.name for path in list_checkpoints(tmp_path / "broken")] == ["checkpoint-2"]
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    run(tmp_path / "broken", resume_from_checkpoint="latest", **settings)
    for folder in ("checkpoint-4", "best", "."):
        assert_equal_weights(tmp_path / "straight" / folder, tmp_path / "broken" / folder)
    straight, resumed = (state_of(tmp_path / name / "checkpoint-4") for name in ("straight", "broken"))
    assert straight["history"] == resumed["history"]
    assert straight["best_step"] == resumed["best_step"]


def test_the_disk_of_the_plan_is_what_a_run_needs(finished, tmp_path, capsys):
    run(tmp_path / "run", dry_run=True)
    needed = float(re.search(r"disk +([\d.]+) MB at most \(([\d.]+) MB a checkpoint\)", capsys.readouterr().out)[2])
    tensors = [path for path in (finished[0] / "checkpoint-4").iterdir() if path.suffix in (".safetensors", ".bin")]
    assert needed == pytest.approx(sum(path.stat().st_size for path in tensors) / 1e6, rel=0.3)


def test_nothing_is_drawn_from_the_generator_of_the_process(finished, tmp_path, monkeypatch):
    step = engine.train_step

    def disturbed(run, batch):
        torch.manual_seed(1000 + run.state.step)
        return step(run, batch)

    monkeypatch.setattr(engine, "train_step", disturbed)
    run(tmp_path / "run")
    assert_equal_weights(finished[0], tmp_path / "run")


@pytest.mark.resume
def test_a_checkpoint_can_be_continued_in_another_folder(finished, tmp_path):
    folder, _ = finished
    before = snapshot(folder)
    run(tmp_path / "copy", resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert_equal_weights(folder, tmp_path / "copy")
    assert snapshot(folder) == before


@pytest.mark.resume
def test_a_failing_evaluation_costs_no_step(tmp_path, monkeypatch):
    settings = {"eval_steps": 2, "save_steps": 2}
    run(tmp_path / "straight", **settings)
    evaluate_model = engine.evaluate_model

    def failing(*args, **kwargs):
        raise ValueError("a mask is broken")

    # what the evaluations of each start do: a continuation first makes up for the one that is missing
    for step, calls in ((2, [failing]), (4, [evaluate_model, failing])):
        with monkeypatch.context() as patch:
            patch.setattr(engine, "evaluate_model", lambda *args, calls=calls, **kwargs: calls.pop(0)(*args, **kwargs))
            with pytest.raises(ValueError, match="a mask is broken"):
                run(tmp_path / "run", resume_from_checkpoint=None if step == 2 else "latest", **settings)
        assert calls == []
        assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step}"
        assert (tmp_path / "run" / "best").exists() == (step == 4)
    run(tmp_path / "run", resume_from_checkpoint="latest", **settings)
    for folder in ("checkpoint-4", "best", "."):
        assert_equal_weights(tmp_path / "straight" / folder, tmp_path / "run" / folder)
    for step in (2, 4):
        straight, resumed = (state_of(tmp_path / name / f"checkpoint-{step}") for name in ("straight", "run"))
        for state in (straight, resumed):
            assert state.pop("elapsed_seconds") > 0
            # folders and times are in them
            del state["files"], state["digest"]
        assert straight == resumed
        assert [entry["step"] for entry in straight["history"] if "loss" not in entry] == list(range(2, step + 1, 2))
    results = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("straight", "run")]
    assert results[0] == results[1]


def test_the_best_model_is_that_of_the_own_folder(tmp_path, monkeypatch):
    scores = iter([0.5, 0.4, 0.3, 0.2, 0.3, 0.2])
    evaluate_model = engine.evaluate_model

    def scored(*args, **kwargs):
        results = evaluate_model(*args, **kwargs)
        results["segmentation"]["mean_iou"] = next(scores)
        return results

    monkeypatch.setattr(engine, "evaluate_model", scored)
    run(tmp_path / "first", eval_steps=1)
    # goes on at step 3, worse than step 1 of the folder it comes from
    results = run(tmp_path / "other", eval_steps=1, resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-2"))
    assert results["training"]["best_step"] == 3
    best = json.loads((tmp_path / "other" / "best" / "eval_results.json").read_text())
    assert (best["step"], best["segmentation"]["mean_iou"]) == (3, 0.3)
    assert json.loads((tmp_path / "first" / "best" / "eval_results.json").read_text())["step"] == 1
    assert state_of(tmp_path / "other" / "checkpoint-4")["best_metric"] == 0.3


def test_evaluation_under_bf16_is_that_of_the_saved_model(tmp_path, monkeypatch):
    evaluate_model, seen = engine.evaluate_model, []
    pixels = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)

    def recorded(model, *args, **kwargs):
        model.eval()
        with torch.no_grad():
            seen.append(model(pixels).logits)
        return evaluate_model(model, *args, **kwargs)

    def autocast_in(original, training_run, batch):
        dtypes = []
        decoder = next(module for module in training_run.bare_model.modules() if isinstance(module, torch.nn.Conv2d))
        handle = decoder.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
        result = original(training_run, batch)
        handle.remove()
        assert set(dtypes) == {torch.bfloat16}
        assert training_run.bare_model.config._attn_implementation == "synernet_bf16"
        trained.append(training_run.state.step)
        return result

    trained, train_step = [], engine.train_step
    monkeypatch.setattr(engine, "evaluate_model", recorded)
    monkeypatch.setattr(engine, "train_step", lambda *args: autocast_in(train_step, *args))
    results = run(tmp_path / "run", mixed_precision="bf16", eval_steps=2)
    # the evaluation after step 2 left the autocast of the training as it was
    assert trained == [0, 1, 2, 3]
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        expected = model(pixels).logits
    assert seen[-1].dtype == expected.dtype == torch.float32
    assert torch.equal(seen[-1], expected)
    processor = SynerNetImageProcessor.from_pretrained(tmp_path / "run")
    data = load_data(DataArguments(**DATA))
    names = json.loads((tmp_path / "run" / "training_args.json").read_text())["class_names"]
    again = evaluate_model(model, processor, data["validation"], class_names=names)
    assert {kind: scores["per_class_iou"] for kind, scores in again.items()} == {
        kind: scores["per_class_iou"] for kind, scores in results.items() if kind != "training"
    }


def test_the_length_of_a_run_is_told_from_its_first_steps_and_after_the_last_gate(tmp_path, monkeypatch, capsys):
    starts = dict.fromkeys(("segmentation_start", "spatial_bce_start", "prototype_contrast_start"), 0.5)
    slow = iter([0] * 9 + [0.2] * 7)
    train_step = engine.train_step
    monkeypatch.setattr(engine, "train_step", lambda *args: (time.sleep(next(slow)), train_step(*args))[1])
    run(tmp_path / "run", {"model_config": MODEL["model_config"] | starts}, max_steps=16, logging_steps=16)
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("evaluations not counted.")]
    pattern = r"Less than a minute for the remaining (\d+) steps at ([\d.]+) s a step, evaluations not counted."
    (first, fast), (second, seconds) = (re.fullmatch(pattern, line).groups() for line in told)
    # evaluations and checkpoints are no part of a step
    assert (first, second) == ("12", "3")
    assert float(fast) < 0.2 <= float(seconds) < 0.4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3, "Less than a minute"),
        (80, "About a minute"),
        (38 * 60, "About 38 minutes"),
        (89 * 60, "About 89 minutes"),
        (9000, "About 2.5 hours"),
    ],
)
def test_durations_are_words(seconds, text):
    assert engine.duration(seconds) == text


def test_what_goes_on_is_told_where_no_terminal_is(tmp_path, capsys, monkeypatch):
    gathered, original = [], engine.whole_model
    monkeypatch.setattr(engine, "whole_model", lambda *args: gathered.append(args) or original(*args))
    run(tmp_path / "run", max_steps=1, inference_size=80)
    # shards are put together for the scores with best/, and for the final folder
    assert len(gathered) == 2 and (tmp_path / "run" / "best" / "config.json").is_file()
    out = capsys.readouterr().out
    assert "Checking 8 images (--no_check_data skips this)." in out and "step 1: evaluating." in out
    assert "crops of 32 px" in out and "--inference_size 40 fits" in out
    run(tmp_path / "other", max_steps=1, inference_size=64)
    assert "--inference_size" not in capsys.readouterr().out


def test_curves_are_named_after_the_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(engine.Accelerator, "init_trackers", lambda self, *args, **kwargs: seen.append((args, kwargs)))
    run(tmp_path / "cats", max_steps=1, report_to="tensorboard")
    assert seen == [(("cats",), {"init_kwargs": {"trackio": {"name": "cats", "resume": "allow"}}})]


def test_curves_and_images_go_to_tensorboard(finished):
    folder, results = finished
    [logs] = (folder / "logs").iterdir()
    events = EventAccumulator(str(logs), {"images": 0}).Reload()
    losses = {f"train/{name}" for name in results["training"]["losses"]}
    rates = {"train/learning_rate_encoder", "train/learning_rate_heads"}
    kinds = [kind for kind in results if kind != "training"]
    scores = {f"eval/{kind}/{name}" for kind in kinds for name in ("mean_iou", "recall", "precision")}
    assert {"segmentation", "broad_cam", "precise_cam", "fused_cam"} <= set(kinds)
    assert set(events.Tags()["scalars"]) == losses | rates | scores | {"train/confident_share"}
    for kind, name in (("broad_cam", "recall"), ("segmentation", "precision")):
        [event] = events.Scalars(f"eval/{kind}/{name}")
        assert (event.step, event.value) == (4, pytest.approx(results[kind][name], rel=1e-5, nan_ok=True))
    shares = [event.value for event in events.Scalars("train/confident_share")]
    assert shares and all(0 <= share <= 1 for share in shares)
    encoder, heads = ([event.value for event in events.Scalars(name)] for name in sorted(rates))
    assert heads == pytest.approx([5 * rate for rate in encoder])
    [image] = events.Images("eval/images")
    grid = Image.open(io.BytesIO(image.encoded_image_string))
    assert image.step == 4 and np.array_equal(np.asarray(grid), np.asarray(Image.open(folder / "images.png")))


def test_images_go_to_the_trackers_that_take_them(monkeypatch):
    logged = []
    takes = {"log": lambda values, step: logged.append((values, step))}
    trackers = [SimpleNamespace(name="trackio", **takes), SimpleNamespace(name="mlflow")]
    trackers.append(SimpleNamespace(name="wandb", log_images=takes["log"]))
    grid = Image.new("RGB", (2, 3), "red")
    monkeypatch.setattr(reporting, "image_grid", lambda *_: (grid, 1))
    reporting.show_images(trackers, None, None, None, 7)
    (trackio, step), wandb = logged
    assert step == 7 and trackio["eval/images"]._value is grid
    assert wandb == ({"eval/images": [grid]}, 7)


def test_old_checkpoints_go(tmp_path):
    run(tmp_path / "run", save_steps=1, save_total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3", "checkpoint-4"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    def broken(original, *args):
        loss, terms = original(*args)
        return loss, terms | {"loss_cls": terms["loss_cls"] * math.nan}

    stop_at(monkeypatch, 2, broken)
    # logged every 100 steps: the checkpoint is what makes it look
    with pytest.raises(FloatingPointError, match=r"not finite at step 3 \(loss_cls\).*checkpoint-2"):
        run(tmp_path / "run", save_steps=1, logging_steps=100)
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-2"


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def broken(original, training_run, batch):
        result = original(training_run, batch)
        with torch.no_grad():
            next(training_run.model.parameters()).fill_(math.inf)
        return result

    stop_at(monkeypatch, 2, broken)
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 3.*checkpoint-2"):
        run(tmp_path / "run", save_steps=1)
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-2"


def test_buffers_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    def broken(original, training_run, batch):
        result = original(training_run, batch)
        with torch.no_grad():
            next(tensor for name, tensor in training_run.model.named_buffers() if "prototypes" in name)[0] = math.nan
        return result

    stop_at(monkeypatch, 2, broken)
    with pytest.raises(FloatingPointError, match=r"not finite after step 3 \(.*prototypes\).*checkpoint-2"):
        run(tmp_path / "run", save_steps=1)
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-2"


def skip_steps(monkeypatch, skipped) -> list[int]:
    """Makes accelerate skip the optimizer steps with these numbers, as the gradient scaler of fp16 does."""
    original, calls = AcceleratedOptimizer.step, []

    def step(self, closure=None):
        self._is_overflow = len(calls) in skipped
        if not self._is_overflow:
            original(self, closure)
        calls.append(len(calls))

    monkeypatch.setattr(AcceleratedOptimizer, "step", step)
    return calls


@pytest.mark.resume
def test_skipped_steps_advance_neither_schedule_nor_gates(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls = skip_steps(patch, {0, 2})
        run(tmp_path / "straight", warmup_ratio=0.5)
    assert len(calls) == 6
    state = state_of(tmp_path / "straight" / "checkpoint-4")
    assert (state["step"], state["skipped_steps"]) == (4, 2)
    history = [entry for entry in state["history"] if "loss" in entry]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in history] == pytest.approx(
        [2e-3 * learning_rate_multiplier(step, 2, 4) for step in range(4)]
    )
    assert torch.load(tmp_path / "straight" / "checkpoint-2" / "scheduler.bin", weights_only=False)["last_epoch"] == 2
    # the stream goes on behind the batches of the skipped steps
    with monkeypatch.context() as patch:
        skip_steps(patch, {0, 2})
        stop_at(patch, 4, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", warmup_ratio=0.5)
    run(tmp_path / "broken", warmup_ratio=0.5, resume_from_checkpoint="latest")
    assert_equal_weights(tmp_path / "straight", tmp_path / "broken")


def test_steps_that_a_gradient_scaler_skips_are_noticed(tmp_path, monkeypatch):
    setup = engine.setup

    def scaled(training_args):
        accelerator = setup(training_args)
        # the first scales overflow
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
        return accelerator

    monkeypatch.setattr(engine, "setup", scaled)
    run(tmp_path / "run")
    state = state_of(tmp_path / "run" / "checkpoint-4")
    assert state["step"] == 4 and state["skipped_steps"] > 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_of_a_skipped_step_is_not_logged(tmp_path, monkeypatch, accumulation):
    def overflow(original, *args):
        loss, terms = original(*args)
        return loss * math.inf, terms | {"loss_cls": terms["loss_cls"] * math.inf}

    # the second step, by its last pass; its first one is not finite
    skip_steps(monkeypatch, {2 * accumulation - 1})
    stop_at(monkeypatch, accumulation, overflow)
    run(tmp_path / "run", gradient_accumulation_steps=accumulation)
    state = state_of(tmp_path / "run" / "checkpoint-4")
    assert (state["step"], state["skipped_steps"]) == (4, 1)
    history = [entry for entry in state["history"] if "loss" in entry]
    assert [entry["step"] for entry in history] == [1, 2, 3, 4]
    assert all(math.isfinite(value) for entry in history for value in entry.values())


def test_a_run_whose_steps_are_all_skipped_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "MAX_SKIPPED_IN_A_ROW", 3)
    calls = skip_steps(monkeypatch, range(100))
    with pytest.raises(FloatingPointError, match="gradients are not finite in 3 passes after step 0.*no checkpoint"):
        run(tmp_path / "run")
    assert len(calls) == 3


def count_checks(monkeypatch) -> list[str]:
    """Records each scan of the images of the data, by what is done about bad ones."""
    original, scans = building.check_dataset, []

    def recorded(splits, on_bad_image="raise", decode_images=True, **kwargs):
        if decode_images:
            scans.append(on_bad_image)
        return original(splits, on_bad_image, decode_images, **kwargs)

    monkeypatch.setattr(building, "check_dataset", recorded)
    return scans


def test_data_is_checked_once_and_not_again_on_resume(tmp_path, monkeypatch, capsys):
    scans = count_checks(monkeypatch)
    run(tmp_path / "run")
    assert scans == ["raise"]
    assert "Checked 8 images in 0." in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert scans == ["raise"]
    # other data is checked, also where the weights do not depend on it
    other = {"dataset_options": DATA["dataset_options"] | {"num_validation": 3}}
    with pytest.raises(InvalidArguments, match="dataset_options"):
        run(tmp_path / "other", data=other, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert scans == ["raise", "raise"]


def test_the_check_of_images_can_be_left_out(tmp_path, monkeypatch, capsys):
    scans = count_checks(monkeypatch)
    run(tmp_path / "run", data={"check_data": False})
    assert scans == []
    assert "Checked" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "training_args.json").read_text())["checked"] is None
    # what was not checked is checked by a continuation that wants it
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert scans == ["raise"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"crop_size": 7}, "`crop_size` is 7, smaller than a patch of 8 pixels"),
        ({"output_dir": None}, "`output_dir` is missing"),
        ({"mixed_precision": "int8"}, "`mixed_precision` must be no, fp16, bf16 or auto, got 'int8'"),
        ({"max_steps": 0}, "`max_steps` must be from 1 to 1,000,000,000, got 0"),
        ({"model": {"backbone": "folder"}}, "Give either `backbone` .* or `backbone_config` .* got both"),
        ({"model": {"backbone_config": None}}, "Give either `backbone` .* or `backbone_config` .* got neither"),
        ({"model": {"backbone_config": None, "backbone": "./nowhere"}}, r"The encoder \./nowhere: no such folder"),
        ({"model": {"backbone_config": {"model_type": "vitt"}}}, "No model can be made of `backbone_config`.*vitt"),
        ({"model": {"backbone_overrides": {"qkv_bias": False}}}, "`backbone_overrides` goes with `backbone` only"),
        ({"model": {"model_config": {"fuson": "fixed"}}}, "`model_config` has unknown fields fuson; known are"),
        ({"model": {"model_config": {"low_threshold": 0.9}}}, "threshold must rise"),
        ({"model": {"model_config": {"fusion": "mean"}}}, "No model can be made of .*'fusion'"),
        (
            {"model": {"model_config": {"fusion_range": -1}}},
            r"`model_config`: `fusion_range` must lie in \[0, 1\], got -1",
        ),
        ({"model": {"model_config": {"refinement_dilations": []}}}, "`refinement_dilations` must be a non-empty list"),
        (
            {"model": {"model_config": {"auxiliary_layer_index": -30}}},
            "`auxiliary_layer_index` must pick out of .* got -30",
        ),
        ({"model": {"model_config": {"cam_scales": "all"}}}, "No model can be made of .*'cam_scales'"),
        ({"model": {"model_config": {"cam_flip": 2}}}, "No model can be made of .*'cam_flip' expected bool, got int"),
        (
            {"model": {"backbone_config": {"model_type": "resnet"}}},
            "family resnet are not supported.*one of the families vit, ",
        ),
        ({"model": {"model_config": {"num_labels": 3}}}, "`model_config` sets num_labels, but the labels come from"),
        ({"data": {"metric_classes": ["dots", "unicorn"]}}, "`metric_classes` has unknown names unicorn; known are"),
        ({"data": {"dataset": "voc"}}, "Unknown data set 'voc'"),
        ({"data": {"dataset_options": {"num_trian": 3}}}, "num_trian"),
        ({"data": {"max_eval_samples": 0}}, "`max_eval_samples` must be from 1 to"),
        ({"data": {"dataset": "voc2012", "data_dir": "nowhere", "dataset_options": {}}}, "nowhere"),
        ({"resume_from_checkpoint": "latest"}, "holds no checkpoint to resume from"),
        ({"resume_from_checkpoint": "nowhere/checkpoint-2"}, "is not a checkpoint of a run"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing_behind(tmp_path, changes, sentence):
    with pytest.raises(InvalidArguments, match=sentence) as error:
        run(tmp_path / "run", **changes)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(InvalidArguments) as error:
        run(
            tmp_path / "run",
            crop_size=4,
            learning_rate=-1.0,
            data={"metric_classes": ["unicorn"]},
            resume_from_checkpoint="latest",
        )
    text = str(error.value)
    assert "`learning_rate` must be above 0" in text
    assert "smaller than a patch" in text
    assert "unicorn" in text
    assert "no checkpoint" in text
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_refused_and_not_touched(finished):
    folder, _ = finished
    before = snapshot(folder)
    with pytest.raises(InvalidArguments, match="already holds a run"):
        run(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("name", ["README.md", "notes.tmp", "training_args.json", "logs/notes.txt", "config.json"])
def test_a_folder_with_other_files_is_refused_and_not_touched(finished, tmp_path, name):
    (tmp_path / "home" / name).parent.mkdir(parents=True)
    (tmp_path / "home" / name).write_text("{}")
    before = snapshot(tmp_path / "home")
    for checkpoint in (None, "latest", str(finished[0] / "checkpoint-2")):
        with pytest.raises(InvalidArguments, match="home holds files that are not of a run: choose a new or empty"):
            run(tmp_path / "home", resume_from_checkpoint=checkpoint)
    assert snapshot(tmp_path / "home") == before


def test_only_the_temporaries_of_a_run_are_removed(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    # as after a power cut in the very first write
    folder.mkdir()
    (folder / ".training_args.json.12.tmp").write_text("{")
    with monkeypatch.context() as patch:
        stop_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, eval_steps=2)
    others = [folder / "notes.tmp", folder / "best" / "mine.tmp" / "notes", folder / "checkpoint-2.tmp.tmp"]
    own = [folder / "checkpoint-4.tmp" / "model.safetensors", folder / "best" / "model.tmp" / "config.json"]
    for path in others + own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("text")
    (folder / ".README.md.12.tmp").write_text("text")
    run(folder, eval_steps=2, resume_from_checkpoint="latest")
    assert all(path.read_text() == "text" for path in others)
    assert sorted(path.name for path in folder.rglob("*.tmp")) == ["checkpoint-2.tmp.tmp", "mine.tmp", "notes.tmp"]


@pytest.mark.resume
def test_a_run_without_a_checkpoint_starts_over(finished, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at(patch, 1, interrupt)
        with pytest.raises(
            KeyboardInterrupt, match="no checkpoint yet .start over with --resume_from_checkpoint latest"
        ):
            run(folder, report_to="tensorboard", eval_steps=1)
    before = snapshot(folder)
    with pytest.raises(
        InvalidArguments, match="already holds a run: .* or continue it with `--resume_from_checkpoint"
    ):
        run(folder)
    assert snapshot(folder) == before
    capsys.readouterr()
    run(folder, resume_from_checkpoint="latest")
    assert "was interrupted before its first checkpoint and starts over" in capsys.readouterr().out
    for name in ("checkpoint-4", "best", "."):
        assert_equal_weights(finished[0] / name, folder / name)


def test_a_finished_run_whose_checkpoints_were_removed_does_not_start_over(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = snapshot(folder)
    with pytest.raises(InvalidArguments, match="already holds a run: choose another `output_dir`, or remove it"):
        run(folder)
    with pytest.raises(InvalidArguments, match="holds no checkpoint to resume from"):
        run(folder, resume_from_checkpoint="latest")
    assert snapshot(folder) == before


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(InvalidArguments, match="is a file"):
        run(tmp_path / "run")


@pytest.mark.resume
@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 1}, r"seed \(0 → 1\)"),
        ({"per_device_batch_size": 1}, r"per_device_batch_size \(2 → 1\)"),
        ({"max_steps": 6}, r"max_steps \(4 → 6\)"),
        ({"mixed_precision": "bf16"}, r"mixed_precision \(no → bf16\)"),
        ({"model": {"model_config": MODEL["model_config"] | {"fusion": "fixed"}}}, "model_config"),
        ({"data": {"dataset_options": DATA["dataset_options"] | {"seed": 1}}}, "data_fingerprint"),
    ],
)
def test_resuming_with_other_settings_is_refused(finished, changes, name):
    folder, _ = finished
    before = snapshot(folder)
    with pytest.raises(InvalidArguments, match=f"made with other settings: .*{name}"):
        run(folder, resume_from_checkpoint=str(folder / "checkpoint-2"), **changes)
    assert snapshot(folder) == before


@pytest.mark.resume
def test_settings_without_influence_may_change_on_resume(finished, tmp_path, capsys, monkeypatch):
    folder, _ = finished
    # the precision that counts is the one computed in, whatever word stands for it
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    changes = {"logging_steps": 3, "save_total_limit": 1, "mixed_precision": "auto"}
    run(tmp_path / "run", resume_from_checkpoint=str(folder / "checkpoint-2"), **changes)
    printed = capsys.readouterr().out
    assert f"Continuing from {folder / 'checkpoint-2'}." in printed and "no scores" not in printed
    assert_equal_weights(folder, tmp_path / "run")


def voc_folder(root: Path) -> Path:
    """A devkit of four training and two validation images with masks for all of them."""
    voc, rng = root / "VOCdevkit" / "VOC2012", np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClassAug", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    lists = {"train_aug": ["a", "b", "c", "d"], "val": ["e", "f"]}
    labels = {}
    for number, name in enumerate(lists["train_aug"] + lists["val"]):
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(voc / "JPEGImages" / f"{name}.jpg")
        mask = np.zeros((40, 48), dtype=np.uint8)
        mask[8:24, 8:30] = 8 + number % 2
        Image.fromarray(mask).save(voc / "SegmentationClassAug" / f"{name}.png")
        labels[name] = ["cat" if number % 2 == 0 else "chair"]
    for name, ids in lists.items():
        (voc / "ImageSets" / "Segmentation" / f"{name}.txt").write_text("\n".join(ids) + "\n")
    (root / "labels.json").write_text(json.dumps(labels))
    return voc


def test_training_never_opens_a_mask_of_its_images(tmp_path):
    voc = voc_folder(tmp_path)
    data = {
        "dataset": "voc2012",
        "data_dir": str(tmp_path / "VOCdevkit"),
        "image_labels": str(tmp_path / "labels.json"),
        "dataset_options": {},
    }
    with_masks = run(tmp_path / "with", data=data, max_steps=2)
    assert "segmentation" in with_masks
    for name in "abcd":
        (voc / "SegmentationClassAug" / f"{name}.png").unlink()
    without_training_masks = run(tmp_path / "without", data=data, max_steps=2)
    assert without_training_masks["segmentation"] == with_masks["segmentation"]
    assert_equal_weights(tmp_path / "with", tmp_path / "without")


def test_a_run_without_any_mask_trains_and_says_so(tmp_path):
    voc = voc_folder(tmp_path)
    for path in (voc / "SegmentationClassAug").iterdir():
        path.unlink()
    (voc / "SegmentationClassAug").rmdir()
    data = {
        "dataset": "voc2012",
        "data_dir": str(voc),
        "image_labels": str(tmp_path / "labels.json"),
        "dataset_options": {},
    }
    results = run(tmp_path / "run", data=data, max_steps=2, eval_steps=1)
    assert set(results) == {"training"}
    assert not (tmp_path / "run" / "eval_results.json").exists()
    assert not (tmp_path / "run" / "best").exists()
    assert "Not evaluated" in (tmp_path / "run" / "README.md").read_text()
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_pretrained_encoder_starts_both_branches(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(1)
    fields = {key: value for key, value in MODEL["backbone_config"].items() if key != "model_type"}
    encoder = ViTForImageClassification(ViTConfig(**fields, num_labels=10))
    encoder.save_pretrained(tmp_path / "encoder")
    arguments = ModelArguments(
        backbone=str(tmp_path / "encoder"),
        backbone_overrides={"layer_norm_eps": 1e-5},
        model_config=MODEL["model_config"],
    )
    model = engine.build_model(arguments, ["background", "cat", "dog"])
    assert model.config.id2label == {0: "background", 1: "cat", 2: "dog"}
    assert model.config.backbone_config.layer_norm_eps == 1e-5
    # the two ways to the configuration agree, and `validate_arguments` looks at the right one
    looked_at = building.model_config_from(arguments, ["background", "cat", "dog"])
    assert looked_at.backbone_config.layer_norm_eps == 1e-5
    misspelt = replace(arguments, backbone_overrides={"qkv_bais": False})
    for build in (engine.build_model, building.model_config_from):
        with pytest.raises(ValueError, match=r"has no field qkv_bais: did you mean qkv_bias\?"):
            build(misspelt, ["background", "cat", "dog"])
    expected = encoder.vit.state_dict()
    for branch in ("broad", "precise"):
        for name, tensor in getattr(model.synernet.pair, branch).backbone.state_dict().items():
            assert torch.equal(tensor, expected[name]), (branch, name)


def test_the_report_on_heads_of_another_task_is_one_line(tmp_path, caplog):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    fields = {key: value for key, value in MODEL["backbone_config"].items() if key != "model_type"}
    ViTForImageClassification(ViTConfig(**fields, num_labels=10)).save_pretrained(tmp_path / "encoder")
    logger = logging.getLogger("transformers")
    monkeypatched, logger.propagate = logger.propagate, True
    try:
        arguments = ModelArguments(backbone=str(tmp_path / "encoder"), model_config=MODEL["model_config"])
        building.build_model(arguments, ["background", "cat"])
        texts = {record.getMessage() for record in caplog.records if "transformers" in record.name}
        assert texts == {"The encoder has no place for these weights of its file: classifier.bias, classifier.weight."}
        caplog.clear()
        # what is missing is still reported in full
        model = ViTModel(ViTConfig(**fields), add_pooling_layer=False)
        del model.layernorm
        model.save_pretrained(tmp_path / "encoder")
        building.build_model(arguments, ["background", "cat"])
        assert "LOAD REPORT" in caplog.text and "MISSING" in caplog.text
    finally:
        logger.propagate = monkeypatched


@pytest.mark.parametrize(
    ("name", "offline", "sentence"),
    [
        ("facebook/deit-small-patch16-224", True, "is not on this machine and the Hub cannot be reached"),
        ("facebook/deit-small-patch16-224", False, "is not on this machine and the Hub cannot be reached"),
        ("./encoders/deit", False, "The encoder ./encoders/deit: no such folder; give the folder"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_told_at_once(tmp_path, monkeypatch, name, offline, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    # nobody listens there
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(InvalidArguments, match=sentence) as error:
        run(tmp_path / "run", model={"backbone": name, "backbone_config": None})
    assert time.monotonic() - started < 10
    assert "--backbone FOLDER" in str(error.value) and len(str(error.value).splitlines()) == 1


RANK_SCRIPT = """
import sys
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, GradientState
from synernet_hf.training import engine, parse_arguments

fit = engine.fit

def fit_and_keep(run):
    fit(run)
    torch.save(run.bare_model.state_dict(), f"{sys.argv[1]}/{run.output_dir.name}{run.accelerator.process_index}.pt")

engine.fit = fit_and_keep
# the processes stay connected, for the second training
Accelerator.end_training = lambda self: None
engine.train(*parse_arguments(sys.argv[2:]))
AcceleratorState._reset_state(reset_partial_state=True)
GradientState._reset_state()
resumed = ["--output_dir", f"{sys.argv[1]}/resumed", "--resume_from_checkpoint", f"{sys.argv[1]}/run/checkpoint-2"]
engine.train(*parse_arguments(sys.argv[2:] + resumed))
"""


ALONE_SCRIPT = """
import os
import sys
import torch
from testing_utils import ALL_TERMS, SynerNetModelTester
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from synernet_hf.training import gather_in_rank_order, sum_over_processes

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
tester = SynerNetModelTester()
model = tester.model().train()
if rank == 0:
    # nobody else takes part in this step
    assert model(**tester.inputs(), loss_weights=ALL_TERMS).loss.isfinite()
torch.distributed.barrier()
# batches of different sizes, gathered
inputs = tester.inputs(2 + rank)
torch.manual_seed(rank)
model = tester.model().train()
loss = model(**inputs, loss_weights=ALL_TERMS, gather_embeddings=gather_in_rank_order).loss
loss.backward()
torch.save({name: buffer for name, buffer in model.named_buffers()}, f"{sys.argv[1]}/buffers{rank}.pt")

def losses_and_gradients(model, rows, **arguments):
    inputs = {name: tensor[rows] for name, tensor in tester.inputs(8).items()}
    outputs = model(**inputs, loss_weights=ALL_TERMS, draws=range(8)[rows], **arguments)
    outputs.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    gradients = {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}
    return {"loss": outputs.loss.detach(), **outputs.loss_dict, **gradients}

shared = {"gather_embeddings": gather_in_rank_order, "sum_counts": sum_over_processes}
halves = losses_and_gradients(tester.model().train(), slice(4 * rank, 4 * rank + 4), **shared)
for tensor in halves.values():
    torch.distributed.all_reduce(tensor)
    tensor /= 2
# every layer's weights cut in two, as by FSDP2
sharded_model, mesh = tester.model().train(), init_device_mesh("cpu", (2,))
for module in [*sharded_model.modules()]:
    if type(module).__name__ == "ViTLayer":
        fully_shard(module, mesh=mesh)
fully_shard(sharded_model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in sharded_model.parameters())
sharded = losses_and_gradients(sharded_model, slice(4 * rank, 4 * rank + 4), **shared)
for name, tensor in sharded.items():
    if name.startswith("loss"):
        torch.distributed.all_reduce(tensor)
        tensor /= 2
if rank == 0:
    whole = losses_and_gradients(tester.model().train(), slice(0, 8))
    torch.save([whole, halves, sharded], f"{sys.argv[1]}/losses.pt")
torch.distributed.barrier()
# threads of the groups of shards may outlive them, and C++ would abort
os._exit(0)
"""


@pytest.mark.distributed
def test_a_step_of_one_process_alone_waits_for_nobody(root, tmp_path):
    (tmp_path / "script.py").write_text(ALONE_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = os.pathsep.join([str(root / "src"), str(root / "tests")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"buffers{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(buffer.any() for buffer in first.values())
    for name, buffer in first.items():
        assert torch.equal(buffer, second[name]), name
    # eight images in one process, and four in each of two, whose weights are whole or in shards: every loss term, and the
    # mean gradient of every weight
    whole, halves, sharded = torch.load(tmp_path / "losses.pt", weights_only=True)
    assert whole.keys() == halves.keys() == sharded.keys()
    assert len([name for name in whole if name.startswith("loss_")]) >= 6
    for name, tensor in whole.items():
        if name.endswith("k_proj.bias"):
            # 0 but for rounding: a softmax does not see what all its inputs share
            continue
        for kind, other in (("2 x 4", halves), ("2 x 4 with shards", sharded)):
            difference = (other[name] - tensor).abs().max() / tensor.abs().max()
            print(f"1 x 8 and {kind}, {name}: relative difference {difference:.1e}")
            assert difference < 1e-4, (kind, name)


@pytest.mark.distributed
def test_two_processes_keep_equal_weights_and_prototypes_and_resume(root, tmp_path):
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    settings = MODEL | DATA | TRAINING | {"output_dir": str(tmp_path / "run"), "num_workers": 0, "save_total_limit": 2}
    settings |= {"mixed_precision": "auto"}
    settings["model_config"] = settings["model_config"] | {"with_class_token_head": True}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    arguments = [str(tmp_path / "script.py"), str(tmp_path), "--config", str(tmp_path / "recipe.yaml")]
    done = subprocess.run(command + arguments, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"run{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    for rank in (0, 1):
        resumed = torch.load(tmp_path / f"resumed{rank}.pt", weights_only=True)
        for name, tensor in first.items():
            assert torch.equal(tensor, resumed[name]), (rank, name)
    filled = [tensor.norm(dim=-1) for name, tensor in first.items() if name.endswith("prototypes")]
    assert all(norms.max() == pytest.approx(1, abs=1e-5) for norms in filled)
    state = state_of(tmp_path / "run" / "checkpoint-4")
    rates = [entry["learning_rate"] for entry in state["history"] if "loss" in entry]
    assert rates == pytest.approx([2e-3 * learning_rate_multiplier(step, 1, 4) for step in range(4)])
    scheduler = torch.load(tmp_path / "run" / "checkpoint-4" / "scheduler.bin", weights_only=False)
    assert scheduler["last_epoch"] == 4
    record = json.loads((tmp_path / "run" / "training_args.json").read_text())
    assert record["run"]["num_processes"] == 2
    # one process with batches of twice the size: the same images, crops, colours and classes
    model = {"model_config": settings["model_config"]}
    run(tmp_path / "one", model, per_device_batch_size=4, mixed_precision="auto")
    histories = [state_of(tmp_path / name / "checkpoint-4")["history"] for name in ("one", "run")]
    for one, two in zip(*histories, strict=True):
        losses = {name: value for name, value in one.items() if name.startswith("loss")}
        for name, value in losses.items():
            print(f"step {one['step']}, {name}: relative difference {abs(two[name] / value - 1):.1e}")
            # after a step with a loss of its own, rounding has moved weights without a gradient by a whole step
            exact = record["run"]["mixed_precision"] == "no" and one["step"] <= 2
            assert two[name] == pytest.approx(value, rel=1e-5 if exact else 0.05)


def test_deepspeed_is_refused_before_accelerate_looks_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(InvalidArguments, match="DeepSpeed takes over .*fsdp2.yaml instead"):
        run(tmp_path / "run")
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_train_as_one_does_with_two_processes(root, tmp_path):
    """Each machine is a launcher of its own; they meet on the loopback."""
    settings = MODEL | DATA | TRAINING | {"num_workers": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    accelerate += ["--num_machines", "2", "--main_process_ip", "127.0.0.1", "--mixed_precision", "no"]
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    meeting = [
        "--nnodes",
        "2",
        "--rdzv_backend",
        "c10d",
        "--rdzv_id",
        "run",
        "--rdzv_endpoint",
        f"127.0.0.1:{ports[0]}",
    ]
    launchers = {
        "one": [[*torchrun, "--standalone", "--nproc_per_node", "2"]],
        "torchrun": [[*torchrun, "--nproc_per_node", "1", *meeting]] * 2,
        "accelerate": [[*accelerate, "--main_process_port", ports[1], "--machine_rank", rank] for rank in "01"],
    }
    for name, commands in launchers.items():
        words = [str(root / "examples" / "train.py"), "--config", str(tmp_path / "recipe.yaml")]
        words += ["--output_dir", str(tmp_path / name)]
        machines = [
            subprocess.Popen(command + words, env=environment, stderr=subprocess.PIPE, text=True)
            for command in commands
        ]
        try:
            for machine in machines:
                _, printed = machine.communicate(timeout=300)
                assert machine.returncode == 0, printed
        finally:
            for machine in machines:
                machine.kill()
        assert_equal_weights(tmp_path / "one", tmp_path / name)
        assert state_of(tmp_path / name / "checkpoint-4")["step"] == 4
        print(f"{name}: {len(commands)} launchers, weights bit-equal")
        assert json.loads((tmp_path / name / "training_args.json").read_text())["run"]["num_processes"] == 2
        assert (tmp_path / name / "checkpoint-4" / "random_states_1.pkl").is_file()


SHARDED_SCRIPT = """
import sys
import torch
import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType

# accelerate shards no model on CPUs; told that they are GPUs, it does
PartialState._prepare_backend = lambda *arguments, **options: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
from synernet_hf.training import engine, parse_arguments
from torch.distributed.tensor import DTensor

fit = engine.fit

def fit_shards(run):
    assert all(isinstance(parameter, DTensor) for parameter in run.model.parameters())
    fit(run)

engine.fit = fit_shards
engine.train(*parse_arguments(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_in_shards_is_the_run_of_whole_weights_and_resumes(root, tmp_path):
    (tmp_path / "script.py").write_text(SHARDED_SCRIPT)
    settings = MODEL | DATA | TRAINING | {"num_workers": 0, "mixed_precision": "no", "logging_steps": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    config = yaml.safe_load((root / "examples" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    # as accelerate hands its file to the processes
    names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
    shards = {names.get(name, name.upper()): str(value) for name, value in config.items()}

    def start(script, folder, *words, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        command += ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / folder), *words]
        environment |= os.environ | {"PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    start(root / "examples" / "train.py", "whole", ACCELERATE_USE_CPU="true")
    start(tmp_path / "script.py", "shards", ACCELERATE_USE_FSDP="true", **shards)
    resume = ["--resume_from_checkpoint", str(tmp_path / "shards" / "checkpoint-2")]
    start(tmp_path / "script.py", "resumed", *resume, ACCELERATE_USE_FSDP="true", **shards)
    histories = [state_of(tmp_path / name / "checkpoint-4")["history"] for name in ("whole", "shards")]
    for one, two in zip(*histories, strict=True):
        for name, value in one.items():
            print(f"step {one['step']}, {name}: {value} whole, {two[name]} in shards")
            # a step of Adam is as large for a gradient of rounding as for any other
            assert two[name] == pytest.approx(
                value, rel=1e-5 if one["step"] <= 2 else 0.05, abs=0.01 * ("iou" in name)
            )
    assert_equal_weights(tmp_path / "shards", tmp_path / "resumed")
    start(tmp_path / "script.py", "half", "--mixed_precision", "bf16", ACCELERATE_USE_FSDP="true", **shards)
    assert state_of(tmp_path / "half" / "checkpoint-4")["step"] == 4
    # whole weights, as every other run leaves them
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / "shards")
    assert weights(tmp_path / "shards").keys() == weights(tmp_path / "whole").keys()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.resume
def test_a_stream_is_resumed_where_it_was(tmp_path, monkeypatch, capsys):
    shapes = load_shapes(num_train=10, num_validation=2, image_size=32)
    write_parquet(shapes, tmp_path / "data", images_per_file=4)
    data = {"dataset": "hub", "data_dir": str(tmp_path / "data"), "dataset_options": {"streaming": True}}
    monkeypatch.setattr(streams, "BLOCK_SIZE", 3)
    results = run(tmp_path / "straight", data=data)
    assert results["segmentation"]["num_images"] == 2
    with monkeypatch.context() as patch:
        stop_at(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "broken", data=data)
    # workers make crops of what this process has read
    run(tmp_path / "broken", data=data | {"num_workers": 1}, resume_from_checkpoint="latest")
    assert_equal_weights(tmp_path / "straight", tmp_path / "broken")
    straight, resumed = (state_of(tmp_path / name / "checkpoint-4") for name in ("straight", "broken"))
    assert straight["places"] == resumed["places"] == [[0, 1, 3, 2]]
    assert "streamed training images" in (tmp_path / "straight" / "README.md").read_text()
    capsys.readouterr()
    run(tmp_path / "plan", data=data, dry_run=True)
    assert "a stream to train on, 2 to evaluate on" in capsys.readouterr().out
