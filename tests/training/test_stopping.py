"""Runs that end early: signals, launchers that are gone, folders in use, disks that fail."""

import errno
import json
import multiprocessing
import os
import platform
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import SafetensorError
from testing_utils import TRAINED_MODEL as MODEL
from training_utils import DATA, TRAINING, assert_equal_weights, run, snapshot, state_of, stop_at

from synernet_hf import files
from synernet_hf.cli import DiskError, Terminated, run_command
from synernet_hf.files import LOCK_FILE, FolderInUse, folder_in_use, hold_folder
from synernet_hf.training import InvalidArguments, engine, evaluation, stopping
from synernet_hf.training.checkpoints import TrainerState, damage, list_checkpoints


pytestmark = pytest.mark.resume


@pytest.fixture(autouse=True)
def handlers():
    """A run leaves the handlers of signals as they were, but for that of ended workers."""
    before, children = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD)
    yield
    assert signal.getsignal(signal.SIGTERM) is before
    signal.signal(signal.SIGCHLD, children)


def terminate(times: int = 1):
    """In place of a pass: SIGTERM, then the pass."""

    def passed(original, *args):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    return passed


def names(folder: Path) -> list[str]:
    assert not list(folder.rglob("*.tmp")) and not (folder / LOCK_FILE).exists()
    assert [damage(path) for path in list_checkpoints(folder)] == [None] * len(list_checkpoints(folder))
    return [path.name for path in list_checkpoints(folder)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_saves_the_step_it_came_in(finished, tmp_path, monkeypatch, accumulation, times):
    straight, settings = finished, {"gradient_accumulation_steps": accumulation, "eval_steps": 2}
    with monkeypatch.context() as patch:
        # launchers pass on a signal that the group got already: the second one is an echo
        stop_at(patch, 2 * accumulation, terminate(times))
        with pytest.raises(
            Terminated, match="Terminated after step 3; the last checkpoint is .*checkpoint-3 .continue"
        ):
            run(tmp_path / "run", **settings)
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    run(tmp_path / "run", resume_from_checkpoint="latest", **settings)
    if accumulation == 2:
        straight = tmp_path / "straight"
        run(straight, **settings)
    assert_equal_weights(straight, tmp_path / "run")


def test_a_second_sigterm_ends_at_once_and_a_third_does_not_disturb_the_clearing_up(tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 0)
    remove = stopping.remove_unfinished

    def interrupted_again(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        remove(folder)

    monkeypatch.setattr(stopping, "remove_unfinished", interrupted_again)
    stop_at(monkeypatch, 2, terminate(2))
    with pytest.raises(Terminated, match="after step 2; the last checkpoint is .*checkpoint-2 "):
        run(tmp_path / "run")
    assert names(tmp_path / "run") == ["checkpoint-2"]


def test_a_save_that_sigterm_meets_is_finished(tmp_path, monkeypatch):
    save_state, evaluated = engine.Accelerator.save_state, []

    def signalled_while_saving(self, folder, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return save_state(self, folder, **kwargs)

    monkeypatch.setattr(engine.Accelerator, "save_state", signalled_while_saving)
    monkeypatch.setattr(engine, "evaluate_model", lambda *args, **kwargs: evaluated.append(1))
    with pytest.raises(Terminated, match="after step 1; the last checkpoint is .*checkpoint-1 "):
        run(tmp_path / "run", save_steps=1, eval_steps=1)
    assert names(tmp_path / "run") == ["checkpoint-1"] and not evaluated


@pytest.mark.parametrize("save_steps", [1, 3])
def test_sigterm_in_an_evaluation_ends_it_and_loses_nothing(finished, tmp_path, monkeypatch, save_steps):
    scorer, scored = evaluation._KindScorer.__call__, []

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        scored.append(1)
        return scorer(*args, **kwargs)

    data = {"dataset_options": DATA["dataset_options"] | {"num_validation": 6}}
    with monkeypatch.context() as patch:
        patch.setattr(evaluation._KindScorer, "__call__", signalled)
        with pytest.raises(Terminated, match="after step 1; the last checkpoint is .*checkpoint-1 "):
            run(tmp_path / "run", data=data, save_steps=save_steps, eval_steps=1)
    assert names(tmp_path / "run") == ["checkpoint-1"]
    # one batch, after which the step is saved, or none where it was
    assert len(scored) == (save_steps > 1)
    if save_steps == 1:
        return
    run(tmp_path / "run", data=data, save_steps=4, eval_steps=1, resume_from_checkpoint="latest")
    assert_equal_weights(finished, tmp_path / "run")
    history = state_of(tmp_path / "run" / "checkpoint-4")["history"]
    assert [entry["step"] for entry in history if "loss" not in entry] == [1, 2, 3, 4]


def test_a_loader_whose_workers_got_the_signal_too_costs_no_step(finished, tmp_path, monkeypatch):
    def broken(loader):
        for number, batch in enumerate(loader):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
            yield batch

    batches_of = engine.batches_of
    with monkeypatch.context() as patch:
        patch.setattr(engine, "batches_of", lambda loader, stop: batches_of(broken(loader), stop))
        with pytest.raises(Terminated, match="after step 3; the last checkpoint is .*checkpoint-3 "):
            run(tmp_path / "run")
    run(tmp_path / "run", resume_from_checkpoint="latest")
    assert_equal_weights(finished, tmp_path / "run")


@pytest.mark.parametrize(("place", "step"), [("train_step", 3), ("evaluate_model", 2)])
def test_workers_of_loaders_outlive_the_signal_of_their_group(tmp_path, monkeypatch, place, step):
    original, count, seen = getattr(engine, place), iter(range(10**6)), []

    def signalled(*args, **kwargs):
        # the first pass of the third step; the evaluation that follows the second one
        if next(count) == (4 if place == "train_step" else 0):
            os.kill(os.getpid(), signal.SIGTERM)
            [worker] = multiprocessing.active_children()
            # from another process: that of the parent ends it
            subprocess.run(["kill", str(worker.pid)], check=True)
            worker.join(0.5)
            seen.append(worker)
        return original(*args, **kwargs)

    monkeypatch.setattr(engine, place, signalled)
    settings = {"gradient_accumulation_steps": 2, "eval_steps": 2, "save_steps": 4}
    with pytest.raises(Terminated, match=f"after step {step}; the last checkpoint is .*checkpoint-{step} "):
        run(tmp_path / "run", data={"num_workers": 1}, **settings)
    assert names(tmp_path / "run") == [f"checkpoint-{step}"]
    seen[0].terminate()
    seen[0].join(5)
    assert not seen[0].is_alive()


@pytest.mark.parametrize("launched", [True, False])
def test_a_run_ends_with_its_launcher_and_not_with_its_shell(tmp_path, monkeypatch, launched):
    for name in stopping.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if launched:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")

    def orphaned(original, *args):
        monkeypatch.setattr(stopping, "PARENT", -1)
        return original(*args)

    stop_at(monkeypatch, 2, orphaned)
    if launched:
        with pytest.raises(Terminated, match="after step 3; the last checkpoint is .*checkpoint-3 "):
            run(tmp_path / "run")
    else:
        run(tmp_path / "run")
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3" if launched else "checkpoint-4"]


def other_process(**changes) -> str:
    """The text of a lock of a process that runs, or of one that differs from it."""
    holder = {"host": platform.node(), "pid": os.getppid(), "started": "2026-01-02 03:04:05"}
    holder["process"] = stopping_process(holder["pid"])
    return json.dumps(holder | changes)


def stopping_process(pid: int) -> str | None:
    return files._process(pid)


def test_a_folder_that_another_process_holds_is_refused_and_not_touched(finished, tmp_path):
    for folder in (finished, tmp_path / "new"):
        folder.mkdir(exist_ok=True)
        (folder / LOCK_FILE).write_text(other_process())
        before = snapshot(folder)
        for checkpoint in (None, "latest"):
            with pytest.raises(
                InvalidArguments, match=rf"Process {os.getppid()} on .* since 2026-01-02 03:04:05: wait"
            ):
                run(folder, resume_from_checkpoint=checkpoint)
        assert snapshot(folder) == before
        (folder / LOCK_FILE).unlink()


def test_processes_of_another_container_are_not_looked_up_here(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "readlink", lambda path: "pid:[7]")
    with hold_folder(tmp_path):
        monkeypatch.undo()
        # its number may be anyone's, or no one's, in this one
        lock = json.loads((tmp_path / LOCK_FILE).read_text())
        (tmp_path / LOCK_FILE).write_text(json.dumps(lock | {"pid": 2**22 + 1}))
        assert "has been writing into" in folder_in_use(tmp_path)


def test_a_run_that_takes_the_folder_during_the_start_wins(tmp_path, monkeypatch):
    setup, folder = engine.setup, tmp_path / "run"

    def overtaken(training_args):
        folder.mkdir()
        (folder / LOCK_FILE).write_text(other_process())
        return setup(training_args)

    monkeypatch.setattr(engine, "setup", overtaken)
    with pytest.raises(FolderInUse, match="writing into .*run since"):
        run(folder)
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize(
    ("content", "is_held"),
    [
        (other_process(), True),
        # of a process that has ended, of an earlier one of that number, of one before the machine started anew
        (other_process(pid=2**22 + 1), False),
        (other_process(process="0 1"), False),
        (other_process(host="elsewhere", pid=2**22 + 1), True),
        ("", True),
        ("[]", True),
    ],
)
def test_locks_that_count_and_those_that_do_not(tmp_path, content, is_held):
    (tmp_path / LOCK_FILE).write_text(content)
    assert (folder_in_use(tmp_path) is not None) == is_held
    if is_held:
        assert f"remove {tmp_path / LOCK_FILE}" in folder_in_use(tmp_path)
        with pytest.raises(ValueError, match="writing into"), hold_folder(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).read_text() == content
    else:
        with hold_folder(tmp_path):
            assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
            with pytest.raises(ValueError, match="writing into"), hold_folder(tmp_path):
                pass
        assert not list(tmp_path.iterdir())


def test_the_lock_of_another_machine_counts_as_long_as_it_is_touched(tmp_path, monkeypatch):
    lock = tmp_path / LOCK_FILE
    lock.write_text(other_process(host="elsewhere"))
    assert "Ten minutes after the last sign of another machine" in folder_in_use(tmp_path)
    old = time.time() - files.SILENCE_SECONDS - 60
    os.utime(lock, (old, old))
    assert folder_in_use(tmp_path) is None
    monkeypatch.setattr(files, "BEAT_SECONDS", 0.01)
    with hold_folder(tmp_path):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        os.utime(lock, (old, old))
        deadline = time.monotonic() + 20
        while lock.stat().st_mtime < old + 60 and time.monotonic() < deadline:
            time.sleep(0.01)
        # as another machine sees it
        assert files._silence(lock) < files.SILENCE_SECONDS
    assert not list(tmp_path.iterdir())


def test_parts_of_a_folder_are_held_beside_each_other_and_not_beside_the_whole(tmp_path):
    with hold_folder(tmp_path, part=(0, 2)):
        for part in (None, (0, 2), (0, 3)):
            with pytest.raises(FolderInUse, match="writing into"), hold_folder(tmp_path, part=part):
                pytest.fail("the folder is not held")
        with hold_folder(tmp_path, part=(1, 2)):
            assert len(list(tmp_path.iterdir())) == 2
    with hold_folder(tmp_path), pytest.raises(FolderInUse), hold_folder(tmp_path, part=(0, 2)):
        pytest.fail("the folder is not held")
    # what killed processes left
    for name in (".lock-0-of-2", ".lock-2-of-5"):
        (tmp_path / name).write_text(other_process(pid=2**22 + 1))
    with hold_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]
    assert not list(tmp_path.iterdir())


def test_of_two_that_find_the_lock_of_an_ended_process_one_gets_the_folder(tmp_path, monkeypatch):
    (tmp_path / LOCK_FILE).write_text(other_process(pid=2**22 + 1))
    judge, judged, taken = files.folder_in_use, threading.Event(), threading.Event()

    def slow(*folder):
        problem = judge(*folder)
        if problem is None and not judged.is_set():
            # the other one has time to take it, unless it may not
            judged.set()
            taken.wait(0.3)
        return problem

    def second():
        judged.wait(5)
        problem = files._take(tmp_path, None)
        taken.set()
        return problem

    monkeypatch.setattr(files, "folder_in_use", slow)
    with ThreadPoolExecutor(2) as pool:
        problems = [future.result() for future in (pool.submit(files._take, tmp_path, None), pool.submit(second))]
    assert problems[0] is None and "writing into" in problems[1]


def test_a_lock_that_cannot_be_written_is_told_to_all_and_leaves_nothing(monkeypatch, tmp_path):
    def fails(path):
        if path.name == LOCK_FILE:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("synernet_hf.files._sync", fails)
    told = []
    with pytest.raises(OSError, match="No space left"), hold_folder(tmp_path, share=lambda text: told.append(text)):
        pytest.fail("the folder is not held")
    assert len(told) == 1 and "No space left" in told[0] and not any(tmp_path.iterdir())
    # in another process
    with pytest.raises(FolderInUse, match="No space left"), hold_folder(tmp_path, False, lambda _: told[0]):
        pytest.fail("the folder is not held")


def test_a_held_folder_that_stays_empty_is_removed(tmp_path, monkeypatch):
    synced, fsync = {}, os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (fsync(file), synced.update({os.fstat(file).st_ino: os.fstat(file)}))
    )
    with hold_folder(tmp_path / "a" / "b"):
        lock = (tmp_path / "a" / "b" / LOCK_FILE).stat()
        # whole after a power cut too, or nobody could tell whether it counts
        assert synced[lock.st_ino].st_size == lock.st_size > 0
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_a_lock_that_does_not_count(tmp_path):
    program = "import os, sys; from pathlib import Path; from synernet_hf.files import hold_folder; "
    program += "held = hold_folder(Path(sys.argv[1])); held.__enter__(); os.kill(os.getpid(), 9)"
    source = str(Path(stopping.__file__).parents[2])
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=os.environ | {"PYTHONPATH": source})
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).is_file()
    assert folder_in_use(tmp_path) is None
    with hold_folder(tmp_path):
        pass


def test_an_archive_that_ends_early_has_a_sentence_and_the_way_on(tmp_path):
    accelerator = SimpleNamespace(trackers=[], is_main_process=True)
    stop = SimpleNamespace(signalled_at=None, on_signal=signal.SIG_DFL)
    with (
        pytest.raises(ValueError, match="unexpected end of data. Training stopped after step 3; .*start over with"),
        stopping.stop_cleanly(accelerator, tmp_path, TrainerState(step=3), stop),
    ):
        raise tarfile.ReadError("unexpected end of data")


def test_a_full_disk_has_a_sentence_and_a_status(tmp_path, monkeypatch, capsys):
    """A limit on the size of files fails where a full disk does, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(original, *args):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, hard))
        return original(*args)

    stop_at(monkeypatch, 3, full)
    try:
        status = run_command(run, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 3
    assert f"{tmp_path / 'run' / 'checkpoint-4.tmp'} cannot be read or written (File too large)" in line
    assert "Training stopped after step 4; the last checkpoint is" in line and "checkpoint-2 (continue with" in line
    assert names(tmp_path / "run") == ["checkpoint-2"]


@pytest.mark.parametrize("folder, kept", [("checkpoint-4.tmp", [2]), ("best/model.tmp", [2, 4])])
def test_a_disk_too_full_for_the_weights_alone(tmp_path, monkeypatch, capsys, folder, kept):
    """safetensors tells it by an error of its own, and removes its file: smaller files can be written again."""
    original = safetensors.torch.serialize_file

    def full(tensors, path, **kwargs):
        if folder in str(path):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return original(tensors, path, **kwargs)

    monkeypatch.setattr("safetensors.torch.serialize_file", full)
    assert run_command(run, tmp_path / "run") == 3
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'run' / folder} cannot be read or written (No space left on device). Training" in line
    assert f"stopped after step 4; the last checkpoint is {tmp_path / 'run'}/checkpoint-{kept[-1]} (continue" in line
    assert names(tmp_path / "run") == [f"checkpoint-{step}" for step in kept]


@pytest.mark.parametrize(
    ("num_workers", "content", "status", "fault"),
    [
        (0, None, 3, r"cannot be read \(No such file or directory: .*png\)"),
        (1, None, 3, r"cannot be read \(No such file or directory: .*png\)"),
        # a wrong image is no fault of the disk
        (1, b"none", 2, "does not decode: cannot identify image file .*png'"),
    ],
)
def test_an_image_that_is_deleted_or_damaged_during_the_training_is_named(
    tmp_path, monkeypatch, capsys, num_workers, content, status, fault
):
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(folder / name / f"{number}.png")

    def deleted(original, *args):
        for path in folder.rglob("*.png"):
            path.unlink() if content is None else path.write_bytes(content)
        return original(*args)

    stop_at(monkeypatch, 2, deleted)
    data = {"dataset": "image_folder", "data_dir": str(folder), "dataset_options": {}, "num_workers": num_workers}
    # workers are some batches ahead
    assert run_command(lambda: run(tmp_path / "run", None, data, max_steps=16) and 0) == status
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in errors[0]
    assert re.search(rf"error: The image (cat|dog)__\d {fault}[.] Training stopped", errors[0]), errors
    assert re.search(r"Training stopped after step \d+; the last checkpoint is .*checkpoint-\d+ .continue", errors[0])


def test_a_folder_that_cannot_be_written_is_told_before_anything_else(tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system", "somewhere")

    (tmp_path / "file").touch()
    with pytest.raises(InvalidArguments, match=rf"cannot be written .Not a directory: {tmp_path / 'file'}.: choose"):
        run(tmp_path / "file" / "run")
    monkeypatch.setattr("synernet_hf.files.tempfile.TemporaryFile", refuse)
    with pytest.raises(
        InvalidArguments, match=rf"cannot be written .Read-only file system: {tmp_path}.: choose another"
    ):
        run(tmp_path / "run" / "new")


def test_what_a_disk_refuses_has_a_status_of_its_own_in_every_command(capsys):
    def full(number):
        raise OSError(number, os.strerror(number), "out/scores.json")

    assert run_command(full, errno.ENOSPC) == 3
    assert capsys.readouterr().err == "error: out/scores.json cannot be written or read (No space left on device).\n"
    assert run_command(full, errno.ENOENT) == 2
    assert issubclass(DiskError, OSError)


class Counts:
    """A store of counts in place of torch's: of `dead` processes they stand still, and a frozen one never answers."""

    def __init__(self, *dead: int, frozen: bool = False):
        self.port, self.dead, self.frozen, self.counts = 1, {str(rank) for rank in dead}, frozen, {}

    def __call__(self, *args, **kwargs):
        return self

    def add(self, name, number):
        if self.frozen:
            threading.Event().wait()
        for other in {"0", "1", "2"} - self.dead if number else ():
            self.counts[other] = self.counts.get(other, 0) + number
        return self.counts.get(name, 0)


def test_silence_ends_a_process_whose_log_is_gone_too(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(stopping.os, "_exit", left.append)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=lambda text: os.write(-1, b"")))
    with pytest.raises(OSError):
        stopping._end_for_silence("Process 1 of 2, on a", tmp_path, True)
    assert left == [stopping.SILENCE_STATUS]


@pytest.mark.parametrize(
    ("rank", "store", "silent"),
    [(0, Counts(1), 1), (0, Counts(2), 2), (1, Counts(2), 2), (1, Counts(frozen=True), 0), (0, Counts(), None)],
)
def test_a_process_without_a_sign_of_life_is_named(tmp_path, monkeypatch, capsys, rank, store, silent):
    left, over = [], threading.Event()
    folder = tmp_path / "run"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / LOCK_FILE).touch()

    def leave(status):
        left.append(status)
        over.set()
        threading.Event().wait()

    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(torch.distributed, "TCPStore", store)
    monkeypatch.setattr(stopping, "broadcast_object_list", lambda objects: objects)
    monkeypatch.setattr(stopping, "gather_object", lambda objects: ["a", "b", "c"])
    monkeypatch.setattr(stopping, "BEAT_SECONDS", 0.01)
    monkeypatch.setattr(stopping.os, "_exit", leave)
    with stopping.watch_processes(SimpleNamespace(num_processes=3, process_index=rank), folder):
        while silent is None and store.counts.get("0", 0) < 2 * stopping.SILENT_LOOKS:
            time.sleep(0.01)
        assert silent is None or over.wait(30)
    if silent is None:
        assert not left
        return
    assert left == [stopping.SILENCE_STATUS]
    assert f"error: Process {silent} of 3, on {'abc'[silent]}, gave no sign of life" in capsys.readouterr().err
    # who does not hold the folder leaves the lock
    assert (folder / LOCK_FILE).exists() == (rank != 0)


def test_a_machine_that_does_not_see_the_folder_is_told_so(tmp_path, monkeypatch):
    main, other = (SimpleNamespace(is_main_process=rank == 0, process_index=rank, num_processes=2) for rank in (0, 1))
    monkeypatch.setattr(stopping, "SHARING_SECONDS", 0)
    with stopping.hold_run_folder(main, tmp_path / "shared"):
        text = (tmp_path / "shared" / LOCK_FILE).read_text()
        monkeypatch.setattr(
            stopping, "broadcast_object_list", lambda objects: objects if len(objects) == 1 else ["a", text]
        )
        with stopping.hold_run_folder(other, tmp_path / "shared"):
            pass
        # what another run left there
        (tmp_path / "own").mkdir()
        (tmp_path / "own" / LOCK_FILE).write_text(other_process(pid=2**22 + 1))
        for name in ("own", "none"):
            with (
                pytest.raises(
                    InvalidArguments, match=rf"Process 1 on .* does not see .*{name}/{LOCK_FILE}.*on a wrote"
                ),
                stopping.hold_run_folder(other, tmp_path / name),
            ):
                pytest.fail("the folder is not shared")


FROZEN_SCRIPT = """
import os, signal, sys
from synernet_hf.cli import run_command
from synernet_hf.training import engine, parse_arguments, stopping

train_step, stopping.BEAT_SECONDS = engine.train_step, 0.3

def freezing(run, batch):
    if run.state.step == 3 and run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return train_step(run, batch)

engine.train_step = freezing
sys.exit(run_command(lambda: engine.train(*parse_arguments(sys.argv[1:])) and None))
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_a_frozen_process_ends_the_run(root, tmp_path):
    (tmp_path / "script.py").write_text(FROZEN_SCRIPT)
    settings = MODEL | DATA | TRAINING | {"output_dir": str(tmp_path / "run"), "num_workers": 0}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(tmp_path / "script.py"), "--config", str(tmp_path / "recipe.yaml")]
    processes = [
        subprocess.Popen(
            command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    try:
        _, printed = processes[0].communicate(timeout=300)
        assert processes[1].poll() is None
    finally:
        processes[1].kill()
        processes[1].communicate()
    print(printed.splitlines()[-1])
    assert processes[0].returncode == stopping.SILENCE_STATUS
    assert re.search(r"error: Process 1 of 2, on .*; the last checkpoint is .*checkpoint-2 .continue with", printed)
    assert names(tmp_path / "run") == ["checkpoint-2"]


RANK_SCRIPT = """
import os, signal, sys
from synernet_hf.training import engine, parse_arguments

train_step = engine.train_step

def signalled(run, batch):
    if run.state.step == 1 and run.accelerator.process_index == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(run, batch)

engine.train_step = signalled
try:
    engine.train(*parse_arguments(sys.argv[1:]))
except KeyboardInterrupt as error:
    print(f"rank: {error}", flush=True)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_agree_on_the_step_to_stop_at(root, tmp_path):
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    settings = MODEL | DATA | TRAINING | {"output_dir": str(tmp_path / "run"), "num_workers": 0, "max_steps": 8}
    settings |= {"save_steps": 8, "eval_steps": 8}
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}

    def start(script, *words):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
        command += ["--config", str(tmp_path / "recipe.yaml"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = start(tmp_path / "script.py")
    # the signal of step 2 is known to both after step 3
    assert printed.count("rank: Terminated after step 3; the last checkpoint is") == 2
    assert names(tmp_path / "run") == ["checkpoint-3"]
    start(root / "examples" / "train.py", "--resume_from_checkpoint", "latest")
    start(root / "examples" / "train.py", "--output_dir", str(tmp_path / "straight"))
    assert_equal_weights(tmp_path / "straight", tmp_path / "run")
    assert torch.distributed.is_initialized() is False
