"""What all commands share: one sentence per error, exit statuses, and the extra that a command needs."""

import dataclasses
import enum
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from huggingface_hub.utils import are_progress_bars_disabled

from synernet_hf.cli import CommandParser, InvalidArguments, needs_extra, quiet_libraries, run_command
from synernet_hf.commands import main


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [path for folder in ("examples", "scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")]
# the others are imported by commands
COMMANDS = sorted(path for path in SCRIPTS if "__main__" in path.read_text(encoding="utf-8"))
# what a base installation lacks
TRAIN_PACKAGES = ("accelerate", "datasets", "evaluate", "kornia", "pycocotools", "tensorboard", "trackio")


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_misspelt_option_is_one_line_in_every_command(path, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [path.name, "--helpp"])
    monkeypatch.syspath_prepend(str(path.parent))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("script", "words", "meant"),
    [
        ("demo", ["--num_image", "3"], "--num_images"),
        ("demo", ["--max_step", "3"], "--max_steps"),
        ("benchmarks/ablation.py", ["--data", "shapes", "--output", "out", "--row", "full"], "--rows"),
        ("benchmarks/ablation.py", ["--data", "shapes", "--output", "out", "--max_step", "3"], "--max_steps"),
    ],
)
def test_commands_that_hand_on_options_know_their_own_too(script, words, meant, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / script))["main"](words) if "/" in script else main([script, *words])
    assert capsys.readouterr().err == f"error: There is no option {words[-2]}: did you mean {meant}?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (InvalidArguments("One.\nTwo."), 2, "error: One.\nerror: Two.\n"),
        (OSError("A message\n  of a library."), 2, "error: A message of a library.\n"),
        (FloatingPointError("Not finite."), 1, "error: Not finite.\n"),
        (KeyboardInterrupt(), 130, "error: Interrupted.\n"),
    ],
)
def test_what_a_command_raises_becomes_lines_and_a_status(error, status, printed, capsys):
    def command():
        raise error

    assert run_command(command) == status
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_of_downloads_and_of_datasets_are_for_terminals(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: terminal, write=lambda text: None))
    monkeypatch.delenv("HF_DATASETS_DISABLE_PROGRESS_BARS", raising=False)
    quiet_libraries()
    assert are_progress_bars_disabled() is not terminal
    assert os.environ.get("HF_DATASETS_DISABLE_PROGRESS_BARS") == (None if terminal else "1")


def test_the_status_of_a_command_is_kept():
    assert run_command(lambda number: number, 3) == 3
    assert run_command(print) == 0


def test_missing_words_are_one_line(capsys):
    parser = CommandParser()
    parser.add_argument("run")
    parser.add_argument("--size", type=int, default=3, help="of images")
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert capsys.readouterr().err == "error: the following arguments are required: run\n"
    assert "of images (default: 3)" in " ".join(parser.format_help().split())


class Speed(enum.Enum):
    SLOW = "slow"
    FAST = "fast"


@dataclasses.dataclass
class Fields:
    """One field of each kind that dataclasses of options have, those of `transformers.TrainingArguments` included."""

    needed: str
    number: int | None = 3
    choice: Literal["a", "b"] | None = None
    speed: Speed | str = "slow"
    on: bool = True
    maybe: bool | None = None
    numbers: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    mapping: dict[str, Any] | str | None = None
    several: str | list[str] = ""


def test_fields_of_dataclasses_are_read_as_their_types_say():
    parser = CommandParser(Fields)
    parser.add_argument("--other", default="x")
    [fields, rest] = parser.parse_args_into_dataclasses(["--needed", "1"])
    assert (fields, rest.other) == (Fields("1"), "x")
    words = "--needed 1 --number 4 --choice b --speed fast --no_on --maybe YES --numbers 1 2 --mapping {} --several c"
    [fields, _] = parser.parse_args_into_dataclasses(words.split())
    assert fields == Fields("1", 4, "b", "fast", False, True, [1.0, 2.0], "{}", "c")
    assert parser.parse_args(["--needed", "1", "--on"]).on is True
    assert parser.parse_args(["--needed", "1", "--on", "f"]).on is False
    only_given = CommandParser(Fields, only_given=True)
    assert vars(only_given.parse_args(["--needed=1", "--no-on"])) == {"needed": "1", "on": False}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("", "the following arguments are required: --needed"),
        ("--needed 1 --number x", "--number must be a whole number, got 'x'."),
        ("--needed 1 --on x", "--on must be true or false, got 'x'."),
        ("--needed 1 --choice x", "argument --choice: invalid choice: 'x'"),
        ("--needed 1 --speed x", "argument --speed: invalid choice: 'x'"),
        ("--needed 1 --numbe 3", "There is no option --numbe: did you mean --number?"),
        ("--needed 1 more", "Nothing is expected at more"),
    ],
)
def test_values_of_a_wrong_kind_are_refused_in_one_line(words, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        CommandParser(Fields).parse_args_into_dataclasses(words.split())
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and errors.startswith(f"error: {sentence}") and errors.count("\n") == 1, errors


@pytest.mark.parametrize(
    ("number", "status", "word"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Terminated")]
)
def test_signals_during_imports_and_work_are_one_line(number, status, word, capsys):
    def signalled():
        os.kill(os.getpid(), getattr(signal, number))
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    # a shell's background jobs ignore Ctrl-C
    interrupted = signal.signal(signal.SIGINT, signal.default_int_handler)
    assert run_command(signalled) == status
    with pytest.raises(SystemExit) as stop, needs_extra("train"):
        signalled()
    signal.signal(signal.SIGINT, interrupted)
    assert stop.value.code == status
    assert capsys.readouterr().err == 2 * f"error: {word}.\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("late", "printed"), [("KeyboardInterrupt", "error: Interrupted.\n"), ("ZeroDivisionError", "Traceback (most")]
)
def test_an_interruption_of_imports_after_the_early_answer_is_one_line(late, printed):
    code = f"from synernet_hf.cli import answer_early\nanswer_early(lambda: None)\nraise {late}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode and done.stderr.startswith(printed)
    assert ("Traceback" in done.stderr) == printed.startswith("Traceback")


def test_errors_of_the_package_itself_are_no_missing_extra():
    with pytest.raises(ModuleNotFoundError), needs_extra("train"):
        import synernet_hf.no_such_room  # noqa: F401


# peft requires accelerate, so that where one is missing the other one is too
BASE = f"""
import runpy, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in {[*TRAIN_PACKAGES, "peft"]!r}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print(script, stop.code or 0, file=sys.stderr)
"""


def test_without_the_extra_scripts_name_it_and_predict_works():
    scripts = [str(path) for path in COMMANDS if path.parent.name == "examples"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", BASE, *scripts], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    lines = done.stderr.splitlines()
    for script in scripts:
        base = Path(script).name == "predict.py"
        position = lines.index(f"{script} {0 if base else 2}")
        if not base:
            assert (
                'install the extra `train` of synernet_hf, in a clone of its repository with `pip install -e ".[train]"`.'
                in lines[position - 1]
            )
