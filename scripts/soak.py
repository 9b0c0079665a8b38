"""Kills a small training again and again, damages its checkpoints and cuts its power, and compares what comes out.

    python scripts/soak.py runs/soak

Each training is a process of its own that ends by SIGKILL and goes on with `--resume_from_checkpoint latest`. Every run
that finishes must equal an undisturbed one bit for bit: weights, optimizer, schedule, random states, losses, scores. A
power cut is a copy of the block device of a small file system, without what only memory holds; it needs Linux and root,
and is left out elsewhere. Exit status 1 if a run differs or cannot go on.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, needs_extra, positive, run_command
from synernet_hf.files import read_json


RECIPE = Path(__file__).parents[1] / "src" / "synernet_hf" / "recipes" / "tiny_cpu.yaml"
SMALL = {"num_train": 40, "num_validation": 8, "image_size": 32}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = CommandParser(description=__doc__)
    parser.add_argument("out", type=Path, help="new folder for the runs, 200 MB")
    parser.add_argument("--kills", type=int, default=20, help="at random moments")
    parser.add_argument("--kills_in_saves", type=int, default=5, help="how many of them amid writing a checkpoint")
    parser.add_argument(
        "--damages", type=int, default=3, help="a flipped byte, a truncated file and a missing one in turn"
    )
    parser.add_argument("--power_cuts", type=int, default=2, help="on a file system in a file, as root")
    parser.add_argument(
        "--max_steps", type=positive, default=12, help="of each training, with a checkpoint every other"
    )
    parser.add_argument("--num_workers", type=int, default=1, help="of the loader")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


if __name__ == "__main__":
    answer_early(parse_arguments)

with needs_extra("train"):
    import numpy as np
    import torch
    from accelerate.utils import load
    from safetensors.torch import load_file

    from synernet_hf.training import parse_arguments as parse_training
    from synernet_hf.training import train


def in_child(work: Callable[[], object], log: Path) -> int:
    """Starts a process of its own group, with what is imported here; returns its id."""
    sys.stdout.flush()
    child = os.fork()
    # in both, since either may be the first
    with suppress(OSError):
        os.setpgid(child, child)
    if child:
        return child
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 1
    try:
        status = run_command(lambda: work() and None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("checkpoint-*") if path.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def same(one: object, other: object) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def differences(one: Path, other: Path) -> list[str]:
    """Names the files of two finished runs whose content differs or is missing in the second one."""

    def read(path: Path) -> object:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix != ".json":
            return load(path)
        # times, and the digests of the files that hold them
        return {
            name: value
            for name, value in read_json(path).items()
            if name not in ("elapsed_seconds", "files", "digest")
        }

    last = checkpoints(one)[-1]
    paths = [*one.glob("*"), *(one / "best").glob("*"), *last.glob("*")]
    kinds = (".safetensors", ".bin", ".pkl", ".json")
    names = [path.relative_to(one) for path in paths if path.suffix in kinds and path.name != "training_args.json"]
    return [
        str(name) for name in names if not ((other / name).is_file() and same(read(one / name), read(other / name)))
    ]


class Soak:
    """The trainings of one call, their disturbances, and the counts of both."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.random, self.reference = args, random.Random(args.seed), args.out / "undisturbed"
        self.started = self.finished = self.failures = 0

    def start(self, folder: Path) -> int:
        """Starts a training, or its continuation."""
        self.started += 1
        words = ["--config", str(RECIPE), "--output_dir", str(folder), "--no_check_data", "--report_to", "none"]
        settings = {"max_steps": self.args.max_steps, "crop_size": 32, "per_device_batch_size": 2, "save_steps": 2}
        settings |= {"eval_steps": 6, "logging_steps": 1, "save_total_limit": 3, "num_workers": self.args.num_workers}
        settings |= {"dataset_options": str(SMALL).replace("'", '"')}
        for name, value in settings.items():
            words += [f"--{name}", str(value)]
        if (folder / "training_args.json").exists():
            words += ["--resume_from_checkpoint", "latest"]
        self.log = self.args.out / f"start-{self.started}.log"
        return in_child(lambda: train(*parse_training(words)), self.log)

    def ends(self, child: int, until: Callable[[], bool]) -> bool:
        """Waits until a training ends or must end: then it is killed, with its workers. Whether it ended by itself."""
        ended = 0
        try:
            while not ended and not until():
                ended, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
        finally:
            if not ended:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
        if ended:
            self.status = os.waitstatus_to_exitcode(status)
        return bool(ended)

    def judge(self, folder: Path) -> None:
        """Compares a run that ended by itself with the undisturbed one."""
        if self.status:
            print(f"{folder.name} ended with status {self.status}: {self.log.read_text().splitlines()[-1:]}")
            self.failures += 1
            return
        # in a process of its own: this one only forks
        log = self.log.with_suffix(".differences")
        child = in_child(lambda: print(*differences(self.reference, folder)), log)
        failed = os.waitpid(child, 0)[1] != 0
        text = log.read_text().strip()
        self.finished += 1
        self.failures += failed or bool(text)
        print(f"{folder.name} finished, {'differs: ' + text if text or failed else 'equal'}")

    def go_on(self, folder: Path) -> None:
        """Lets a run go on to its end."""
        self.ends(self.start(folder), lambda: False)
        self.judge(folder)

    def kill(self, folder: Path, seconds: float, in_save: bool) -> str | None:
        """
        Starts a training and kills it; returns what it left, "" for one that was to be killed in a save and was not, or
        `None` if it ended by itself.
        """
        begin, pause = time.time(), self.random.uniform(0, 0.03)
        moment = begin + self.random.uniform(0, seconds)

        def saves() -> bool:
            # what an earlier kill left is older
            with suppress(FileNotFoundError):
                return any(path.stat().st_ctime > begin for path in folder.glob("checkpoint-*[0-9].tmp"))
            return False

        def is_over() -> bool:
            if not in_save:
                return time.time() > moment
            if not saves():
                return False
            time.sleep(pause)
            return True

        if self.ends(self.start(folder), is_over):
            return None
        if in_save and not saves():
            return ""
        left = [path.name for path in folder.glob("checkpoint-*")]
        return ", ".join(sorted(left, key=lambda name: (len(name), name))) or "no checkpoint"

    def damage(self, folder: Path, number: int) -> str:
        """Damages the newest checkpoint."""
        newest = checkpoints(folder)[-1]
        path = newest / ("model.safetensors", "optimizer.bin", "random_states_0.pkl")[number % 3]
        if number % 3 == 2:
            path.unlink()
            return f"{newest.name}/{path.name} removed"
        size = path.stat().st_size
        if number % 3 == 1:
            os.truncate(path, size // 2)
            return f"{newest.name}/{path.name} truncated"
        place = self.random.randrange(size // 2, size)
        with path.open("r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        return f"a bit of {newest.name}/{path.name} flipped"


@contextmanager
def mounted(image: Path, place: Path) -> Iterator[Path]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        yield place / "run"
    finally:
        subprocess.run(["umount", place], check=True)


def cut_power(soak: Soak, number: int, seconds: float) -> None:
    """Kills a training on a file system of its own, and goes on with what the block device has of it."""
    image, place = soak.args.out / f"disk-{number}.img", soak.args.out / "disk"
    with image.open("wb") as file:
        file.truncate(300 * 2**20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    copy = image.with_suffix(".copy")
    with mounted(image, place) as folder:
        pause = soak.random.uniform(0, seconds)
        moment = None

        def is_over() -> bool:
            nonlocal moment
            if moment is None and len(checkpoints(folder)) > 1:
                moment = time.monotonic() + pause
            return moment is not None and time.monotonic() > moment

        ended = soak.ends(soak.start(folder), is_over)
        shutil.copyfile(image, copy)
        before = [path.name for path in checkpoints(folder)]
    image.unlink()
    with mounted(copy, place) as folder:
        after = [path.name for path in checkpoints(folder)]
        print(f"power cut {number + 1}{' after the end' if ended else ''}: {before} before, {after} after")
        if ended or after:
            soak.go_on(folder)
        else:
            print("nothing survived the power cut")
            soak.failures += 1
    copy.unlink()


def run(argv: list[str] | None) -> int:
    """Disturbs and compares; returns the exit status."""
    args = parse_arguments(argv)
    args.out.mkdir(parents=True)
    soak = Soak(args)
    begin = time.monotonic()
    soak.ends(soak.start(soak.reference), lambda: False)
    if soak.status:
        print(f"The undisturbed run ended with status {soak.status}: see {soak.log}.")
        return 1
    seconds = time.monotonic() - begin
    kinds = [True] * args.kills_in_saves + [False] * (args.kills - args.kills_in_saves)
    soak.random.shuffle(kinds)
    number, damages, passed_over = 1, 0, 0
    folder = args.out / "run-1"
    while kinds or damages < args.damages:
        in_save = bool(kinds) and kinds[0]
        left = soak.kill(folder, 0.6 * seconds, in_save)
        if left is None:
            soak.judge(folder)
            number += 1
            folder = args.out / f"run-{number}"
            continue
        if not left:
            continue
        if kinds:
            kinds.pop(0)
            print(f"kill {args.kills - len(kinds)}{' in a save' if in_save else ''} of {folder.name}: {left}")
        if damages < args.damages and len(checkpoints(folder)) > 1:
            print(f"damage {damages + 1} of {folder.name}: {soak.damage(folder, damages)}")
            damages += 1
            # it must be told, and an older one taken
            soak.go_on(folder)
            passed_over += "is passed over" in soak.log.read_text()
            number += 1
            folder = args.out / f"run-{number}"
    if folder.exists():
        soak.go_on(folder)
    soak.failures += damages - passed_over
    cuts = args.power_cuts if hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mkfs.ext4") else 0
    for cut in range(cuts):
        cut_power(soak, cut, 0.2 * seconds)
    if cuts < args.power_cuts:
        print("Power cuts are left out: they need Linux and root.")
    print(
        f"{args.kills} kills ({args.kills_in_saves} in a save), {damages} damaged checkpoints ({passed_over} passed over), "
        f"{cuts} power cuts: {soak.finished} runs finished, {soak.failures} failures"
    )
    return int(soak.failures > 0)


if __name__ == "__main__":
    sys.exit(run_command(run, None))
