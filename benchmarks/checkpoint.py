"""
What a durable checkpoint costs: written, with digests of its files, and on the disk before it gets its name.

    python benchmarks/checkpoint.py --folder runs/scratch --output runs/checkpoint.json

A checkpoint of `--megabytes` is a third weights, as safetensors, and two thirds optimizer state, as torch saves it. The
disk counts: give a folder on the one that runs are written to. The last row is what a start with
`--resume_from_checkpoint latest` reads before it loads anything.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, positive


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where to write (default: that of temporary files)")
    parser.add_argument("--megabytes", type=int, default=350, help="size of the checkpoint (default: 350)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import torch
from safetensors.torch import save_file
from side_by_side import median_ratio, save_record, time_in_turns

from synernet_hf.files import digest_file, make_folder, replace_folder


def measure(folder: Path, megabytes: int, rounds: int) -> dict:
    """Seconds of each way to save, and how many times those of plain writing."""
    weights = {f"layer{index}": torch.randn(megabytes * 2**20 // 3 // 4 // 10) for index in range(10)}
    moments = {name: (tensor.clone(), tensor.square()) for name, tensor in weights.items()}
    temporary, named = folder / "checkpoint-1.tmp", folder / "checkpoint-1"

    def write() -> None:
        make_folder(temporary)
        save_file(weights, temporary / "model.safetensors")
        torch.save(moments, temporary / "optimizer.bin")

    def digest(place: Path) -> list[str]:
        return [digest_file(path) for path in sorted(place.iterdir())]

    def rename() -> None:
        shutil.rmtree(named, ignore_errors=True)
        os.replace(temporary, named)

    variants = {
        "written": lambda: (write(), rename()),
        "with digests": lambda: (write(), digest(temporary), rename()),
        "with digests, on the disk": lambda: (write(), digest(temporary), replace_folder(temporary, named)),
        "checked": lambda: digest(named),
    }
    times = time_in_turns(variants, rounds)
    for entry in times.values():
        entry["times_of_written"] = median_ratio(entry, times["written"])
    size = sum(path.stat().st_size for path in named.iterdir())
    return {"megabytes": size / 2**20, "variants": times}


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = parse_arguments(argv)
    if args.folder is not None:
        make_folder(args.folder)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        figures = measure(Path(scratch), args.megabytes, args.rounds)
    print(f"| checkpoint of {figures['megabytes']:.0f} MB | s | times of written |")
    print("| --- | ---: | ---: |")
    for name, entry in figures["variants"].items():
        print(f"| {name} | {entry['seconds']:.2f} | {entry['times_of_written']:.2f} |")
    save_record(args.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
