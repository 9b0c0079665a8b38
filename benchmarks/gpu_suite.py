"""
For a few minutes on a GPU: the table of training steps, inference, then trainings on VOC-Animals side by side.

    python benchmarks/gpu_suite.py OUT --pack pack --minutes 8.5

Parts, in order: `training_step.py` for each line of `TABLE`; `inference.py`; a short run of every training of `--runs` (ROW:SEED, rows of
`ablation.py`), all at once, which says how long a step takes; then the same trainings with as many steps as the
time allows, the same for all. OUT/results.jsonl gets one line for every table and training as soon as it is there; OUT/log.txt
what all processes print. The data come from a folder that `make_pack.py` has made. `--tiny` does the same at small sizes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from make_pack import unpack

from synernet_hf.cli import CommandParser, run_command


HERE = Path(__file__).resolve().parent
RUNS = [f"{row}:{seed}" for seed in range(3) for row in ("class_prior", "logits_pooling", "two_branches")][:8]
# options of training_step.py in the order of their worth; the compiled step last, for its compilation takes longest
TABLE = [
    "--size base --warmup 2 --steps 6".split(),
    "--size tiny --warmup 3 --steps 7".split(),
    "--size base --warmup 2 --steps 4 --dtype bfloat16 --compile".split(),
]
INFERENCE = "--batch_sizes 1 16 --rounds 5 --no_onnx --no_large".split()
TINY_INFERENCE = "--sides 32 --batch_sizes 1 --rounds 1 --no_onnx --no_large".split()
TINY_TABLE = ["--size smoke --warmup 0 --steps 1 --dtype float32".split()]
TINY = "--crop_size 64 --per_device_batch_size 2 --inference_size 64 --max_eval_samples 4".split()
RATE_STEPS = 40


def planned_steps(seconds: float, step_seconds: float, other_seconds: float, most: int) -> int:
    """
    Steps that all trainings can do.

    Args:
        seconds (`float`): left for them.
        step_seconds (`float`): of one step of the slowest, beside the others.
        other_seconds (`float`): of its start and its scoring.
        most (`int`): largest answer.

    Returns:
        `int`: a tenth less than what fits; 0 where nothing does.
    """
    return max(min(int(0.9 * (seconds - other_seconds) / step_seconds), most), 0)


class Suite:
    """Starts the parts, keeps the time and writes their results."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.deadline = args, time.monotonic() + 60 * args.minutes
        args.out.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """`float`: seconds until the end."""
        return self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line, and adds it to OUT/log.txt."""
        line = f"[{time.strftime('%H:%M:%S')}, {self.left:.0f} s left] {text}"
        print(line, flush=True)
        with open(self.args.out / "log.txt", "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def write(self, record: dict) -> None:
        """Adds a line to OUT/results.jsonl."""
        with open(self.args.out / "results.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def run_all(self, commands: dict[str, list[str]], seconds: float) -> None:
        """Runs commands at once, their output in OUT/NAME.log, and ends what is not finished in time."""
        ends, processes = time.monotonic() + seconds, {}
        environ = dict(os.environ, OMP_NUM_THREADS="1") if len(commands) > 1 else None
        for name, words in commands.items():
            with open(self.args.out / f"{name}.log", "w", encoding="utf-8") as log:
                words = [sys.executable, *words]
                processes[name] = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environ)
        try:
            for name, process in processes.items():
                try:
                    code: int | str = process.wait(timeout=max(ends - time.monotonic(), 0.1))
                except subprocess.TimeoutExpired:
                    code = "out of time"
                tail = (self.args.out / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-1500:]
                self.say(f"{name}: {code}" + (f"\n{tail}" if code else ""))
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()

    def table(self) -> None:
        """One line of results for each line of the table; a table cut short keeps the variants it has."""
        ends = time.monotonic() + self.args.table_seconds
        for index, options in enumerate(TINY_TABLE if self.args.tiny else TABLE):
            seconds, path = ends - time.monotonic(), self.args.out / f"training_step-{index}.json"
            if seconds < 5:
                self.say(f"training_step {' '.join(options)}: left out, out of time")
                continue
            words = [str(HERE / "training_step.py"), *options, "--seconds", f"{seconds:.0f}", "--output", str(path)]
            self.run_all({path.stem: words}, seconds)
            if path.is_file():
                record = json.loads(path.read_text(encoding="utf-8"))
                self.write({"part": "training_step", "options": options, **record})

    def inference(self) -> None:
        """One line of results, if it ends in time."""
        path = self.args.out / "inference.json"
        words = [str(HERE / "inference.py"), *(TINY_INFERENCE if self.args.tiny else INFERENCE), "--output", str(path)]
        words += ["--backbone", str(self.args.out / "data" / "backbone")]
        self.run_all({path.stem: words}, self.args.inference_seconds)
        if path.is_file():
            self.write({"part": "inference", **json.loads(path.read_text(encoding="utf-8"))})

    def ablation(self, run: str, max_steps: int, kind: str, factor: float) -> list[str]:
        """The command of one training: its row and seed of the ablation, in a folder of its own."""
        row, _, seed = run.partition(":")
        data = self.args.out / "data"
        words = [str(HERE / "ablation.py"), "--data", "voc_animals", "--rows", row, "--seeds", seed]
        output = self.args.out / kind / f"{row}-{seed}"
        words += ["--output", str(output), "--results", str(output / "results"), "--data_dir", str(data)]
        words += ["--image_labels", str(data / "image_labels.npz"), "--backbone", str(data / "backbone")]
        words += ["--max_steps", str(max_steps), "--scale_range", str(0.35 / factor), str(0.7 / factor)]
        words += ["--check_data", "false", "--mixed_precision", "no" if self.args.tiny else "bf16"]
        words += TINY if self.args.tiny else []
        # of a short run the rate counts, not the scores
        return words if kind == "run" else [*words, "--max_eval_samples", "8"]

    def results(self, run: str, kind: str) -> dict | None:
        """What the ablation has written for a training, `None` where it did not finish."""
        name = run.replace(":", "-")
        found = list((self.args.out / kind / name / "results").glob("*/*.json"))
        return json.loads(found[0].read_text(encoding="utf-8")) if found else None

    def train(self, factor: float) -> None:
        """All trainings side by side, first in short."""
        args, rate_steps = self.args, 2 if self.args.tiny else RATE_STEPS

        def at_once(kind: str, steps: int) -> list[dict]:
            names = {run: f"{kind}-{run.replace(':', '-')}" for run in args.runs}
            self.run_all({names[run]: self.ablation(run, steps, kind, factor) for run in args.runs}, self.left - 2)
            return [content for run in args.runs if (content := self.results(run, kind)) is not None]

        started = time.monotonic()
        short = at_once("rate", rate_steps)
        if not short:
            self.say("no training came so far as to measure its rate")
            return
        step = max(60 * content["minutes"] / rate_steps for content in short)
        start = time.monotonic() - started - step * rate_steps
        scoring = args.image_seconds * (4 if args.tiny else 300)
        steps = planned_steps(self.left - 5, step, start + scoring, args.max_steps)
        self.write({"part": "plan", "steps": steps, "step_seconds": step, "start_seconds": start, "runs": args.runs})
        self.say(f"{step:.3f} s a step, {start:.0f} s to start: {steps} steps each")
        for content in at_once("run", steps) if steps else []:
            self.write({"part": "training", "side_by_side": len(args.runs), **content})
            kinds = ("segmentation", "broad_cam", "precise_cam", "fused_cam")
            scores = ", ".join(f"{kind} {100 * content['scores'][kind]['mean_iou']:.1f}" for kind in kinds)
            self.say(f"{content['row']}, seed {content['seed']}: {scores}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder of the results, and of the unpacked data")
    parser.add_argument("--pack", type=Path, required=True, help="folder that make_pack.py has made")
    parser.add_argument("--minutes", type=float, default=8.5, help="of the whole suite (default: 8.5)")
    parser.add_argument("--runs", nargs="+", default=RUNS, help="ROW:SEED of each training")
    parser.add_argument("--max_steps", type=int, default=2000, help="of each training, at most (default: 2000)")
    parser.add_argument("--table_seconds", type=float, default=160, help="for the table of steps (default: 160)")
    parser.add_argument("--inference_seconds", type=float, default=60, help="for inference, at most (default: 60)")
    parser.add_argument(
        "--image_seconds", type=float, default=0.4, help="to score an image, measured 0.27 on an H200 (default: 0.4)"
    )
    parser.add_argument("--tiny", action="store_true", help="small models and images, for a CPU")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Unpacks the data, times steps, trains."""
    suite = Suite(args)
    record = unpack(args.pack, args.out / "data", os.cpu_count() or 1)
    suite.say("unpacked")
    suite.table()
    suite.inference()
    suite.train(record["factor"])


def main(argv: list[str] | None = None) -> int:
    """Runs the suite; returns its exit code."""
    return run_command(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
