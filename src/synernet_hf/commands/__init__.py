"""
The command `synernet`: one module per command, with `make_parser`, `read` (reads and checks a command line, without torch)
and `run`, which gets what `read` returned and imports what takes seconds.
"""

import sys
from importlib import import_module

from synernet_hf.cli import quiet_libraries, run_command


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Args:
        argv (`list[str]`, *optional*): Name of the command and its words; `None` takes those of the process.

    Returns:
        `int`: exit status, as in [`~synernet_hf.cli.run_command`].
    """
    name, *words = sys.argv[1:] if argv is None else argv
    return run_command(_run, name, words)


def _run(name: str, words: list[str]) -> int | None:
    command = import_module(f"synernet_hf.commands.{name.replace('-', '_')}")
    given = command.read(words)
    quiet_libraries()
    return command.run(given)


__all__ = ["main"]
