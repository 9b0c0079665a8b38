"""The command `synernet`: what it lists, what it answers, and where it prints that."""

import errno
import json
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from synernet_hf import SynerNetSegmentationPipeline, __version__
from synernet_hf.cli import Terminated
from synernet_hf.commands import COMMANDS, main
from synernet_hf.model_folder import load_model_folder


FOLDER = Path(__file__).resolve().parents[1] / "src" / "synernet_hf" / "commands"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_every_command_with_its_purpose(words, capsys):
    with pytest.raises(SystemExit, match="^(0|None)$"):
        main(words)
    printed = capsys.readouterr().out
    for name, purpose in COMMANDS.items():
        assert re.search(rf"^ +{name} +{purpose}$", printed, re.MULTILINE), printed
    assert {path.stem.replace("_", "-") for path in FOLDER.glob("[a-z]*.py")} == set(COMMANDS)


def test_a_usage_names_the_command_and_what_it_needs(capsys):
    needed = {"evaluate": " MODEL", "predict": " MODEL IMAGE ...", "pseudo-labels": " MODEL --output OUTPUT"}
    needed |= {"export": " MODEL --onnx OUT", "push": " RUN REPO_ID"}
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="^(0|None)$"):
            main([name, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: synernet {name} [OPTION ...]{needed.get(name, '')}\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "There is no command trian: did you mean train?"),
        (["waffle"], f"There is no command waffle: give one of {', '.join(COMMANDS)}."),
        (["pseudo_labels"], "There is no command pseudo_labels: did you mean pseudo-labels?"),
        (["--verison"], "There is no option --verison: did you mean --version?"),
        (["train", "--config", "voc_animal"], "The recipe voc_animal does not exist: did you mean voc_animals?"),
        (
            ["train", "--config", "examples/recipes/voc12.yaml"],
            "The recipe examples/recipes/voc12.yaml does not exist: did you mean voc12?",
        ),
    ],
    ids=str,
)
def test_a_misspelt_word_is_answered_with_what_was_meant(words, sentence, capsys):
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    errors = capsys.readouterr().err
    assert status == 2 and errors.startswith(f"error: {sentence}") and errors.count("\n") == 1, errors


STATUSES = {
    1: FloatingPointError("Not finite."),
    2: ValueError("Wrong."),
    3: OSError(errno.ENOSPC, "No space left", "file"),
    130: KeyboardInterrupt(),
    141: BrokenPipeError(),
    143: Terminated(),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_exit_statuses_of_every_command_are_those_of_the_documentation(name, monkeypatch, capsys):
    table = (FOLDER.parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    # 4 ends a process from another thread, see tests/training
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {0, 4, *STATUSES}
    redirected = []
    monkeypatch.setattr("os.dup2", lambda *descriptors: redirected.append(descriptors))
    command = import_module(f"synernet_hf.commands.{name.replace('-', '_')}")
    for status, error in STATUSES.items():

        def fail(_, error=error):
            raise error

        monkeypatch.setattr(command, "read", fail)
        assert main([name, "--some", "words"]) == status
        printed = capsys.readouterr()
        # one sentence, and nothing else
        assert not printed.out and printed.err.count("\n") == (status != 141)
        assert printed.err.startswith("error: " if status != 141 else "")
    assert len(redirected) == 1


@pytest.mark.parametrize(
    ("line", "offered"),
    [("synernet pre", ["predict", "--version"]), ("synernet train --max", ["--max_steps", "--config"])],
)
def test_a_shell_is_offered_commands_and_options(line, offered, monkeypatch):
    def autocomplete(parser):
        [commands] = [action for action in parser._actions if action.choices]
        known = parser if "train" not in line else commands.choices["train"]
        assert set(offered) <= {*known._option_string_actions, *commands.choices}
        raise SystemExit(0)

    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=autocomplete))
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("COMP_LINE", line)
    with pytest.raises(SystemExit, match="^0$"):
        main([])


def test_the_wheel_installs_the_command():
    settings = tomllib.loads((FOLDER.parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, name = settings["scripts"]["synernet"].partition(":")
    assert getattr(import_module(module), name) is main
    # named by `--config NAME`: package data, since a wheel holds this folder alone
    assert settings["name"] == FOLDER.parent.name and (FOLDER.parent / "recipes" / "tiny_cpu.yaml").is_file()


def test_version(capsys):
    with pytest.raises(SystemExit, match="^(0|None)$"):
        main(["--version"])
    assert capsys.readouterr().out == f"synernet_hf {__version__}\n"


def test_predict_answers_with_files_and_with_the_classes_and_scores_of_the_pipeline(tiny_run_folder, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes((tiny_run_folder / "image.png").read_bytes())
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    words = [
        "predict",
        str(tiny_run_folder),
        str(tmp_path / "images"),
        "--output_dir",
        str(tmp_path / "out"),
        "--json",
    ]
    assert main(words) == 2
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert printed.err.splitlines()[-1].startswith("error: 1 of 2 images cannot be decoded")
    assert [Path(left_out["image"]).name for left_out in answer["left_out"]] == ["b.png"]
    [result] = answer["results"]
    mask = np.asarray(Image.open(result["mask"]))
    model, processor = load_model_folder(tiny_run_folder)
    segmenter = SynerNetSegmentationPipeline(model=model, image_processor=processor)
    segments = {segment["label"]: segment["score"] for segment in segmenter(result["image"])}
    for found in result["classes"]:
        where = mask == model.config.label2id[found["label"]]
        assert found["coverage"] == where.mean()
        assert found["score"] == pytest.approx(segments.pop(found["label"]), rel=1e-4)
    assert not segments and sum(found["coverage"] for found in result["classes"]) == pytest.approx(1)
