"""Checkpoints that survive: on the disk before they count, checked before they are used."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from training_utils import assert_equal_weights, run, snapshot, state_of, stop_at

from synernet_hf.training import InvalidArguments, checkpoints, engine
from synernet_hf.training.checkpoints import (
    damage,
    find_resume_checkpoint,
    list_checkpoints,
    passed_over,
)


pytestmark = pytest.mark.resume


@pytest.fixture
def interrupted(finished, tmp_path):
    """A copy of it without the final model."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    return folder


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def edit(path: Path) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"skipped_steps": 7}))


DAMAGES = {
    "weights, one bit": (lambda folder: flip(folder / "model.safetensors", -9), "model.safetensors is not what"),
    "optimizer, zeroed": (
        lambda folder: (folder / "optimizer.bin").write_bytes(bytes((folder / "optimizer.bin").stat().st_size)),
        "optimizer.bin is not what was written",
    ),
    "schedule, half": (
        lambda folder: os.truncate(folder / "scheduler.bin", 100),
        r"scheduler.bin has 100 bytes and was written with [\d,]+",
    ),
    "random states, none": (
        lambda folder: (folder / "random_states_0.pkl").unlink(),
        "random_states_0.pkl is missing",
    ),
    "settings, empty": (lambda folder: (folder / "training_args.json").write_bytes(b""), "has 0 bytes"),
    "counters, empty": (lambda folder: (folder / "trainer_state.json").write_bytes(b""), "cannot be read"),
    "counters, none": (lambda folder: (folder / "trainer_state.json").unlink(), "cannot be read"),
    "counters, edited": (lambda folder: edit(folder / "trainer_state.json"), "changed after it was written"),
    "counters, of another program": (
        lambda folder: (folder / "trainer_state.json").write_text('{"epoch": 1}'),
        "is not of this version",
    ),
}


@pytest.mark.parametrize(("spoil", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(interrupted, spoil, sentence):
    older, newer = list_checkpoints(interrupted)
    assert damage(older) is damage(newer) is None
    assert find_resume_checkpoint(interrupted, "latest") == newer
    spoil(newer)
    before = snapshot(interrupted)
    assert find_resume_checkpoint(interrupted, "latest") == older
    [told] = passed_over(interrupted, older)
    assert told.startswith("checkpoint-4 is passed over: ")
    with pytest.raises(InvalidArguments, match="is damaged: |is not a checkpoint of a run") as error:
        find_resume_checkpoint(interrupted, str(newer))
    assert (newer / "trainer_state.json").exists() == bool(re.search(sentence, str(error.value)))
    assert snapshot(interrupted) == before
    shutil.rmtree(older)
    with pytest.raises(InvalidArguments, match=f"No checkpoint of .* is whole .*{sentence}"):
        find_resume_checkpoint(interrupted, "latest")


def test_a_run_goes_on_from_the_newest_whole_checkpoint(finished, interrupted, capsys):
    flip(interrupted / "checkpoint-4" / "optimizer.bin", -1000)
    run(interrupted, resume_from_checkpoint="latest")
    printed = capsys.readouterr().out
    assert "checkpoint-4 is passed over: the content of" in printed
    assert f"Continuing from {interrupted / 'checkpoint-2'}." in printed
    # the damaged one is replaced on the way
    assert damage(interrupted / "checkpoint-4") is None
    for name in ("checkpoint-4", "best", "."):
        assert_equal_weights(finished / name, interrupted / name)
    assert state_of(finished / "checkpoint-4")["history"] == state_of(interrupted / "checkpoint-4")["history"]
    assert not list(interrupted.rglob("*.tmp"))


def test_folders_in_a_checkpoint_are_checked_too(tmp_path, monkeypatch):
    save_state = engine.Accelerator.save_state

    def with_folder(self, folder, **kwargs):
        save_state(self, folder, **kwargs)
        (Path(folder) / "shards").mkdir()
        (Path(folder) / "shards" / "0").write_text("whole")

    # as weights in shards are saved
    monkeypatch.setattr(engine.Accelerator, "save_state", with_folder)
    run(tmp_path / "run", save_steps=4)
    [checkpoint] = list_checkpoints(tmp_path / "run")
    assert damage(checkpoint) is None
    (checkpoint / "shards" / "0").write_text("other")
    assert f"the content of {checkpoint / 'shards' / '0'} is not" in damage(checkpoint)


def test_random_states_that_accelerate_does_not_restore_are_refused(interrupted, monkeypatch):
    def refuse(state):
        # a training draws nothing from this generator, whose state would be that of the checkpoint
        torch.manual_seed(1)
        raise RuntimeError("no such generator")

    monkeypatch.setattr(torch, "set_rng_state", refuse)
    with pytest.raises(InvalidArguments, match=r"random states in .*random_states_0.pkl do not fit this machine"):
        run(interrupted, resume_from_checkpoint="latest")


def test_everything_is_on_the_disk_before_a_checkpoint_counts_and_before_an_older_one_goes(tmp_path, monkeypatch):
    synced: dict[int, int] = {}
    renames = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        fsync(descriptor)
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_mtime_ns

    def recorded_replace(source, target):
        source = Path(source)
        paths = [source, *source.rglob("*")] if source.is_dir() else [source]
        late = [path.name for path in paths if synced.get(path.stat().st_ino) != path.stat().st_mtime_ns]
        parent = Path(target).parent
        renames.append((source.name, Path(target).name, late, synced.get(parent.stat().st_ino)))
        assert parent.is_dir()
        replace(source, target)
        # from here on the folder must be synced again
        synced.pop(parent.stat().st_ino, None)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    run(tmp_path / "run", save_steps=1, save_total_limit=1)
    named = [(source, target) for source, target, _, _ in renames]
    for step in (2, 3, 4):
        saved = named.index((f"checkpoint-{step}.tmp", f"checkpoint-{step}"))
        removed = named.index((f"checkpoint-{step - 1}", f"checkpoint-{step - 1}.old.tmp"))
        assert removed > saved
        # the new name is on the disk before the older checkpoint goes
        assert renames[removed][3] is not None
    assert {target: late for _, target, late, _ in renames if late and not target.endswith(".old.tmp")} == {}
    for name in ("model.safetensors", "eval_results.json", "training_args.json", "README.md", "images.png"):
        assert name in {target for _, target in named}
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-4"]


def test_a_checkpoint_that_is_saved_again_is_never_absent(interrupted, monkeypatch):
    replace, seen = os.replace, []

    def killed(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint-4":
            seen.append(sorted(path.name for path in interrupted.glob("checkpoint-4*")))
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, resume_from_checkpoint=str(interrupted / "checkpoint-2"))
    assert seen == [["checkpoint-4", "checkpoint-4.old.tmp"]]
    assert damage(interrupted / "checkpoint-4") is None
    # what is left of the older one goes with the clearing up
    assert not list(interrupted.glob("*.tmp"))


@pytest.mark.parametrize(
    "changes", [{"max_eval_samples": 1}, {"metric_classes": ["background", "dots"]}, {"max_eval_samples": 2}, {}]
)
def test_best_compares_scores_of_the_same_images_and_classes(tmp_path, monkeypatch, capsys, changes):
    scores, evaluate_model = iter([0.9, 0.1]), engine.evaluate_model

    def scored(*args, **kwargs):
        results = evaluate_model(*args, **kwargs)
        results["segmentation"]["mean_iou"] = next(scores)
        return results

    monkeypatch.setattr(engine, "evaluate_model", scored)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop_at(patch, 3, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", eval_steps=2)
    results = run(tmp_path / "run", data=changes, eval_steps=2, resume_from_checkpoint="latest")
    # two images are all there are
    differs = bool(changes) and changes != {"max_eval_samples": 2}
    assert results["training"]["best_step"] == (4 if differs else 2)
    assert json.loads((tmp_path / "run" / "best" / "eval_results.json").read_text())["step"] == (4 if differs else 2)
    assert ("than those of best/, which is chosen anew" in capsys.readouterr().out) == differs


def test_a_folder_of_images_may_move_between_a_run_and_its_continuation(tmp_path):
    record = {"model_args": {}, "training_args": {}, "class_names": ["background", "cat"]}
    record |= {"data_args": {"dataset": "here/images"}, "run": {"data_fingerprint": "1"}}
    (tmp_path / "training_args.json").write_text(json.dumps(record))
    checkpoints.check_same_settings(tmp_path, record | {"data_args": {"dataset": "there/images"}})
    for changed in ({"data_args": {"dataset": "shapes"}}, {"run": {"data_fingerprint": "2"}}):
        with pytest.raises(InvalidArguments, match="made with other settings"):
            checkpoints.check_same_settings(tmp_path, record | changed)
