"""The files of a run: checkpoints and model folders, each complete or absent."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, load
from safetensors import SafetensorError

from synernet_hf.data import LOADERS
from synernet_hf.files import (
    LOCK_FILE,
    TEMPORARY_NAME,
    digest_file,
    finite,
    folder_in_use,
    make_folder,
    one_line,
    read_json,
    remove_folder,
    replace_folder,
    sync_files,
    try_writing,
    write_json,
)
from synernet_hf.model import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.training.arguments import ARGUMENTS_FILE, InvalidArguments


STATE_FILE = "trainer_state.json"
RESULTS_FILE = "eval_results.json"
CARD_FILE = "README.md"
IMAGES_FILE = "images.png"
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
# names of what is not complete yet
TEMPORARY_FOLDER = re.compile(r"(checkpoint-\d+(\.old)?|model)\.tmp")
OWN_FILES = {LOCK_FILE, ARGUMENTS_FILE, STATE_FILE, RESULTS_FILE, CARD_FILE, IMAGES_FILE}

# settings that may change between a run and its continuation: no weight depends on them, or only through what is
# compared as `run` (name of the backbone, fingerprint of the training split)
FREE_SETTINGS = {
    "model_args": {"backbone"},
    # what `on_bad_image` leaves out shows in the fingerprint of the training split
    "data_args": set(
        "data_dir image_labels num_workers metric_classes max_eval_samples validation_split on_bad_image "
        "check_data".split()
    ),
    # what `mixed_precision` was resolved to is compared
    "training_args": set(
        "output_dir eval_steps save_steps save_total_limit logging_steps resume_from_checkpoint report_to "
        "mixed_precision dry_run".split()
    ),
}


@dataclass
class TrainerState:
    """The counters of a run; with the accelerator's state this is everything a continuation needs."""

    # optimizer steps done
    step: int = 0
    # by the gradient scaler of fp16: these steps used up batches and changed nothing else
    skipped_steps: int = 0
    # in the loop with its evaluations, summed over continuations
    elapsed_seconds: float = 0.0
    # highest mean IoU of the segmentation, in [0, 1]
    best_metric: float | None = None
    best_step: int | None = None
    # in a stream, of each process
    places: list[list[int]] | None = None
    # what was logged, oldest first; each entry has its `step`
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_evaluated(self) -> bool:
        """Whether the history has an evaluation of the present step."""
        return any(entry["step"] == self.step and "loss" not in entry for entry in self.history)


def read_record(path: Path) -> Any:
    """Reads a JSON file of a run or checkpoint; `InvalidArguments` if it is missing or not JSON."""
    try:
        return read_json(path)
    except ValueError as error:
        raise InvalidArguments(f"{error} Choose another checkpoint.") from error


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Lists the checkpoints of a run, folders `checkpoint-<step>`, lowest step first; [`damage`] tells the whole ones."""
    if not output_dir.is_dir():
        return []
    found = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in output_dir.iterdir() if path.is_dir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def damage(checkpoint: Path) -> str | None:
    """
    Compares all files of a checkpoint with the sizes and digests that its `trainer_state.json` lists, and that file with
    its own. Returns a `str` that says what is wrong, or `None` for a whole checkpoint.
    """
    try:
        record = read_json(checkpoint / STATE_FILE)
        digest, files = record.pop("digest"), record["files"]
    except ValueError as error:
        return one_line(error).rstrip(".")
    except (AttributeError, KeyError, TypeError):
        return f"{checkpoint / STATE_FILE} is not of this version"
    if digest != _digest(record):
        return f"{checkpoint / STATE_FILE} was changed after it was written"
    for name, written in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != written["size"]:
            return f"{path} has {path.stat().st_size:,} bytes and was written with {written['size']:,}"
        if digest_file(path) != written["sha256"]:
            return f"the content of {path} is not what was written"
    return None


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(finite(record), sort_keys=True).encode()).hexdigest()


def passed_over(output_dir: Path, checkpoint: Path) -> list[str]:
    """Says what is wrong with each checkpoint of a run that is newer than the one it continues from."""
    checkpoints = list_checkpoints(output_dir)
    newer = checkpoints[checkpoints.index(checkpoint) + 1 :]
    return [f"{path.name} is passed over: {damage(path)}." for path in newer]


def _is_temporary(path: Path) -> bool:
    if path.is_dir():
        return TEMPORARY_FOLDER.fullmatch(path.name) is not None
    if path.name == LOCK_FILE:
        return True
    match = TEMPORARY_NAME.fullmatch(path.name)
    return match is not None and match["name"] in OWN_FILES


def _is_own_record(path: Path) -> bool:
    """Whether a file is the `training_args.json` of a run, not another program's file of that name."""
    try:
        record = read_json(path)
    except ValueError:
        return False
    return isinstance(record, dict) and {"model_args", "data_args", "training_args"} <= set(record)


def is_without_checkpoint(output_dir: Path) -> bool:
    """Tells whether a folder has the settings of a run but neither a checkpoint nor a final model."""
    finished = (output_dir / "config.json").exists() or (output_dir / "model.safetensors").exists()
    return not finished and not list_checkpoints(output_dir) and _is_own_record(output_dir / ARGUMENTS_FILE)


def find_resume_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    Finds the checkpoint that a run continues from; `None` for a run from the first step on. With `"latest"`, a run
    that was interrupted before its first checkpoint starts over in its folder. `InvalidArguments` if the folder holds
    another run, other files, or is no folder, or if the named checkpoint does not exist.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InvalidArguments(f"The output folder {output_dir} is a file: choose another `output_dir`.")
    problem = folder_in_use(output_dir)
    if problem is not None:
        raise InvalidArguments(problem)
    checkpoints = list_checkpoints(output_dir)
    holds_run = bool(checkpoints) or _is_own_record(output_dir / ARGUMENTS_FILE)
    if not holds_run and output_dir.is_dir() and not all(_is_temporary(path) for path in output_dir.iterdir()):
        raise InvalidArguments(
            f"The output folder {output_dir} holds files that are not of a run: choose a new or empty folder as "
            "`output_dir`."
        )
    if resume_from_checkpoint is None:
        if not holds_run:
            return None
        resumes = checkpoints or is_without_checkpoint(output_dir)
        way_on = "continue it with `--resume_from_checkpoint latest`" if resumes else "remove it"
        raise InvalidArguments(
            f"The output folder {output_dir} already holds a run: choose another `output_dir`, or {way_on}."
        )
    if resume_from_checkpoint == "latest":
        if is_without_checkpoint(output_dir):
            return None
        if not checkpoints:
            raise InvalidArguments(
                f"The output folder {output_dir} holds no checkpoint to resume from: start without "
                "`--resume_from_checkpoint`, in an empty folder."
            )
        problems = []
        for checkpoint in reversed(checkpoints):
            problem = damage(checkpoint)
            if problem is None:
                return checkpoint
            problems.append(problem)
        raise InvalidArguments(
            f"No checkpoint of {output_dir} is whole ({'; '.join(problems)}): start a new run in another `output_dir`."
        )
    checkpoint = Path(resume_from_checkpoint)
    if not (checkpoint / STATE_FILE).is_file():
        raise InvalidArguments(
            f"{checkpoint} is not a checkpoint of a run ({STATE_FILE} is missing): give a folder `checkpoint-<step>` "
            "or `latest`."
        )
    problem = damage(checkpoint)
    if problem is not None:
        raise InvalidArguments(f"The checkpoint is damaged: {problem}. Give another one, or `latest`.")
    own = [path.resolve() for path in checkpoints]
    if holds_run and checkpoint.resolve() not in own and not is_without_checkpoint(output_dir):
        raise InvalidArguments(
            f"The output folder {output_dir} already holds a run that {checkpoint} is not part of: choose another "
            "`output_dir`."
        )
    return checkpoint


def check_same_settings(checkpoint: Path, current: Mapping[str, Any]) -> None:
    """
    Checks that a run with this content of `training_args.json` can continue a checkpoint: `InvalidArguments` names all
    settings that weights depend on and that differ.
    """
    saved, current, differing = read_record(checkpoint / ARGUMENTS_FILE), finite(current), []
    for group in ("model_args", "data_args", "training_args", "run"):
        then, now = saved[group], current[group]
        for name in sorted((set(then) | set(now)) - FREE_SETTINGS.get(group, set())):
            # a folder may have moved; the fingerprint of the training split knows whether it is the same
            is_place = name == "dataset" and not {then.get(name), now.get(name)} & set(LOADERS)
            if then.get(name) != now.get(name) and not is_place:
                differing.append(f"{name} ({then.get(name)} → {now.get(name)})")
    for label, (then, now) in enumerate(itertools.zip_longest(saved["class_names"], current["class_names"])):
        if then != now:
            differing.append(f"the class list (label {label}: {then} → {now})")
            break
    if differing:
        raise InvalidArguments(
            f"{checkpoint} was made with other settings: {', '.join(differing)}. Resume with the same ones, or start a "
            "new run in another `output_dir`."
        )


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Makes `OSError` of what safetensors and torch raise where a file cannot be written into the folder."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
    except RuntimeError:
        # torch does not tell which error it was
        try_writing(folder)
        raise


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    state: TrainerState,
    arguments: Mapping[str, Any],
    save_total_limit: int | None = None,
) -> None:
    """
    Saves weights, optimizer, scheduler, random states and counters as `checkpoint-<step>`; every process calls this.
    The folder gets its name only when everything in it is on the disk; then older checkpoints beyond the limit are
    removed.
    """
    folder = output_dir / f"checkpoint-{state.step}"
    temporary = folder.with_name(folder.name + ".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        make_folder(temporary)
    accelerator.wait_for_everyone()
    with _disk_errors(temporary):
        accelerator.save_state(str(temporary))
    if accelerator.is_main_process:
        write_json(temporary / ARGUMENTS_FILE, arguments)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        files = {
            path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": digest_file(path)}
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        _write_state(temporary, state, files)
        replace_folder(temporary, folder)
        for old in list_checkpoints(output_dir)[:-save_total_limit] if save_total_limit is not None else ():
            # after resuming from an early checkpoint the newest one need not have the highest step
            if old != folder:
                remove_folder(old)
    accelerator.wait_for_everyone()


def _write_state(checkpoint: Path, state: TrainerState, files: Mapping[str, Any]) -> None:
    record = asdict(state) | {"files": files}
    write_json(checkpoint / STATE_FILE, record | {"digest": _digest(record)})


def write_state(checkpoint: Path, state: TrainerState) -> None:
    """Writes the counters of a checkpoint again, after an evaluation that follows it."""
    _write_state(checkpoint, state, read_record(checkpoint / STATE_FILE)["files"])


def read_state(checkpoint: Path, output_dir: Path, scored_on: Mapping[str, Any] | None) -> TrainerState:
    """
    Reads the counters of a checkpoint; [`load_checkpoint`] reads the rest. The best score is that of the `best/`
    folder in `output_dir`: a run that continues in another folder has none yet, nor has one that scores other images
    or classes than that folder was scored on.
    """
    record = read_record(checkpoint / STATE_FILE)
    state = TrainerState(**{item.name: record[item.name] for item in fields(TrainerState) if item.name in record})
    state.best_metric = state.best_step = None
    results = output_dir / "best" / RESULTS_FILE
    if results.is_file():
        best = read_record(results)
        if best.get("scored_on") == scored_on:
            state.best_metric, state.best_step = best["segmentation"]["mean_iou"], best["step"]
    return state


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """
    Restores what accelerate saved; every process calls this. `InvalidArguments` if the random states are not those of
    the checkpoint afterwards, of which accelerate says nothing.
    """
    accelerator.load_state(str(checkpoint))
    path = checkpoint / f"random_states_{accelerator.process_index}.pkl"
    try:
        states, problem = load(path), None
    except Exception as error:
        # of the unpickler, which raises anything
        problem = f"The random states in {path} cannot be read ({one_line(error)})."
    else:
        pairs = [(states["torch_manual_seed"], torch.get_rng_state())]
        if accelerator.device.type == "cuda":
            index = accelerator.device.index or 0
            # none, or fewer, of another machine
            saved = states.get("torch_cuda_manual_seed", [])[index : index + 1]
            pairs.append((saved[0] if saved else torch.empty(0), torch.cuda.get_rng_state(index)))
        if states["random_state"] != random.getstate() or not all(torch.equal(*pair) for pair in pairs):
            problem = f"The random states in {path} do not fit this machine: continue where they were saved."
    problems = [text for text in gather_object([problem]) if text]
    if problems:
        raise InvalidArguments("\n".join(problems))


def remove_unfinished(output_dir: Path) -> None:
    """Removes the temporary files of an interrupted write of this run, and nothing else."""
    for folder in (output_dir, output_dir / "best"):
        for path in [path for path in folder.glob("*.tmp") if _is_temporary(path)]:
            if path.is_dir():
                # another process may still write into it; the next start removes what is left
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    if (output_dir / "best").is_dir() and not any((output_dir / "best").iterdir()):
        (output_dir / "best").rmdir()


def save_model_folder(
    folder: Path,
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    json_files: Sequence[tuple[str, Any]] = (),
) -> None:
    """
    Writes a folder that `from_pretrained` reads, and JSON files beside the model. Files are made in a temporary folder
    and moved into place one by one once they are on the disk, so that a reader finds each of them complete.
    """
    temporary = folder / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    make_folder(temporary)
    with _disk_errors(temporary):
        model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    sync_files(temporary)
    for path in temporary.iterdir():
        os.replace(path, folder / path.name)
    temporary.rmdir()
    for name, data in json_files:
        write_json(folder / name, data)
