"""
Seconds until something happens: imports, `--help` of every command, and one prediction from the shell with its shares.

    python benchmarks/startup.py runs/voc_animals --output runs/startup.json

Each row is a process of its own, and all rows take turns. Times are medians over the rounds. The last column relates
what a row takes beyond Python's own start to what `import torch, transformers` takes, round by round. The prediction
is `examples/predict.py MODEL IMAGE` on a generated image of 500 x 375 pixels; without MODEL it is left out.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from synernet_hf.cli import CommandParser, answer_early, positive, run_command


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for folder in ("examples", "scripts", "benchmarks") for path in (ROOT / folder).glob("*.py"))
# the others are imported by commands
COMMANDS = [str(path.relative_to(ROOT)) for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8")]
PYTHON, LIMIT = "pass", "import torch, transformers"
STATEMENTS = (
    PYTHON,
    "import torch",
    LIMIT,
    "from transformers import PreTrainedModel",
    "import synernet_hf",
    "from synernet_hf import SynerNetForWeaklySupervisedSegmentation",
)
# runs in a process that says how long its parts take
PREDICTION = """
import json, sys, time
model, image, output = sys.argv[1:]
marks = [time.perf_counter()]
from transformers import PreTrainedModel
marks.append(time.perf_counter())
import synernet_hf.visualization
from synernet_hf.commands import main
from synernet_hf.model_folder import load_model_folder
marks.append(time.perf_counter())
load_model_folder(model)
marks.append(time.perf_counter())
main(["predict", model, image, "--output_dir", output])
marks.append(time.perf_counter())
base, ours, weights, rest = (after - before for before, after in zip(marks, marks[1:]))
print(json.dumps({"transformers and torch": base, "other imports": ours, "weights": weights, "prediction": rest - weights}))
"""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="folder of a trained model")
    parser.add_argument("--commands", nargs="*", default=COMMANDS, help="scripts whose --help is timed (default: all)")
    parser.add_argument("--rounds", type=positive, default=5, help="processes of each row (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

from PIL import Image
from side_by_side import save_record, time_in_turns


def run_python(*words: str) -> str:
    """What a Python process prints; `ChildProcessError` if it fails."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ChildProcessError(f"python {' '.join(words)} failed: {done.stderr[-500:]}")
    return done.stdout


def time_prediction(model: str, rounds: int) -> dict[str, float]:
    """Median seconds of the parts of a prediction from the shell, Python's start and end included."""
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as name:
        image = Path(name) / "image.png"
        Image.effect_mandelbrot((500, 375), (-2, -1.5, 1, 1.5), 100).convert("RGB").save(image)
        words = ["-c", PREDICTION, str(Path(model).resolve()), str(image), name]
        for _ in range(rounds):
            started = time.perf_counter()
            parts = json.loads(run_python(*words).splitlines()[-1])
            # weights are loaded twice, once to be timed
            parts["python's start and end"] = time.perf_counter() - started - sum(parts.values()) - parts["weights"]
            found.append(parts)
    return {name: statistics.median(parts[name] for parts in found) for name in found[0]}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each row, what it takes beyond Python's own start, and that in relation to `LIMIT`."""
    variants = {name: partial(run_python, "-c", name) for name in STATEMENTS}
    variants |= {f"{script} --help": partial(run_python, script, "--help") for script in args.commands}
    rows = time_in_turns(variants, args.rounds)
    starts, limits = rows[PYTHON]["all_seconds"], rows[LIMIT]["all_seconds"]
    for row in rows.values():
        beyond = [seconds - start for seconds, start in zip(row["all_seconds"], starts, strict=True)]
        row["beyond_python"] = statistics.median(beyond)
        ratios = [own / (limit - start) for own, limit, start in zip(beyond, limits, starts, strict=True)]
        row["ratio_to_limit"] = statistics.median(ratios)
    prediction = {} if args.model is None else time_prediction(args.model, args.rounds)
    return {"rounds": args.rounds, "limit": LIMIT, "variants": rows, "prediction": prediction}


def show(figures: dict[str, Any]) -> None:
    """Prints the tables."""
    print(f"| process | s | beyond Python's start | share of `{LIMIT}` |\n| --- | ---: | ---: | ---: |")
    for name, row in figures["variants"].items():
        print(f"| `{name}` | {row['seconds']:.2f} | {row['beyond_python']:.2f} | {row['ratio_to_limit']:.2f} |")
    total = sum(figures["prediction"].values())
    for name, seconds in figures["prediction"].items():
        print(f"prediction, {name}: {seconds:.2f} s, {100 * seconds / total:.0f} %")


def run(args: argparse.Namespace) -> None:
    """Measures, prints and writes."""
    figures = measure(args)
    show(figures)
    save_record(args.output, figures)


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
