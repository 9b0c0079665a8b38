"""
The command `synernet`: one module per command, with `make_parser`, `read` (reads and checks a command line, without torch)
and `run`, which gets what `read` returned and imports what takes seconds. Where there is `--json`, `run` gets a second
argument, which prints the answer.
"""

import os
import sys
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any

from synernet_hf import __version__
from synernet_hf.cli import CommandParser, InvalidArguments, json_answer, quiet_libraries, run_command


COMMANDS = {
    "demo": "go the whole way on generated images, without download",
    "check-data": "look at a data set before training on it",
    "train": "train a model from image labels",
    "evaluate": "score a model on images with masks",
    "predict": "segment images",
    "pseudo-labels": "write pixel labels of a whole data set",
    "export": "write a model as ONNX",
    "push": "push a trained model to the Hub",
}


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): Name of the command and its words; `None` takes those of the process.

    Returns:
        `int`: exit status, as in [`~synernet_hf.cli.run_command`].
    """
    return run_command(_run, sys.argv[1:] if argv is None else argv)


def _run(words: list[str]) -> int | None:
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    name, *rest = words or ["--help"]
    if name not in COMMANDS:
        if not name.startswith("-"):
            close = get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}."
            raise InvalidArguments(f"There is no command {name}: {hint}")
        _make_parser().parse_args(words or ["--help"])
    command = _module(name)
    given = command.read(rest)
    quiet_libraries()
    if not hasattr(given, "json"):
        return command.run(given)
    with json_answer(given.json) as answer:
        return command.run(given, answer)


def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name.replace('-', '_')}")


def _make_parser() -> CommandParser:
    """The parser of what stands before the name of a command."""
    listed = "\n".join(f"  {name:<{max(map(len, COMMANDS))}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = CommandParser(
        prog="synernet",
        description=f"Semantic segmentation learnt from image-level labels.\n\ncommands:\n{listed}\n\n"
        "`synernet COMMAND --help` lists the options of a command.",
    )
    parser.usage = "synernet [-h] [--version] COMMAND ..."
    parser.add_argument("--version", action="version", version=f"synernet_hf {__version__}", help="show the version")
    return parser


def _complete() -> None:
    """Answers a shell that asks argcomplete how a command line may go on, and ends the process."""
    parser = _make_parser()
    asked = os.environ.get("COMP_LINE", "").split()

    def parser_of(prog: str, **_: Any) -> CommandParser:
        # the others need not be there: some need an extra
        name = prog.split()[-1]
        return _module(name).make_parser() if name in asked else CommandParser()

    commands = parser.add_subparsers(parser_class=parser_of)
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, help=purpose)
    import_module("argcomplete").autocomplete(parser)


__all__ = ["main"]
