"""Shared by all commands: the parser, the handling of errors, and the check for missing packages."""

import argparse
import dataclasses
import difflib
import enum
import errno
import json
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from synernet_hf.files import finite, missing_extra, one_line


KINDS = {"int": "a whole number", "float": "a number", "true_or_false": "true or false", "positive": "1 or more"}
BOOLEANS = {word: word in "yes true t y 1".split() for word in "yes true t y 1 no false f n 0".split()}


# what a disk refuses, as opposed to a path that was given wrongly
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE)


class InvalidArguments(ValueError):
    """A command cannot start with this input; the message has one sentence per line."""


class DiskError(OSError):
    """A file could not be read or written while a command worked; the message is a sentence."""


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM."""


def _with_default(action: argparse.Action) -> str:
    """The help of an option and its default, unless it tells that itself."""
    text = action.help or ""
    if action.nargs == 0 or action.default in (None, {}, argparse.SUPPRESS) or "default" in text:
        return text
    return f"{text} (default: {action.default})".replace("%", "%%")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        return _with_default(action)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Fills paragraphs to the width of the terminal, and keeps those with indented lines, which are examples."""
        paragraphs = text.strip("\n").split("\n\n")
        return "\n\n".join(it if re.search("^ ", it, re.MULTILINE) else textwrap.fill(it, width) for it in paragraphs)

    def add_usage(self, usage: str | None, actions: Any, *args: Any, **options: Any) -> None:
        """The usage names what has to be given; options are listed below it, and some commands have sixty."""
        words = ["%(prog)s", "[OPTION ...]"]
        for action in actions:
            if action.required:
                name = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
                words += [*action.option_strings[:1], f"{name} ..." if action.nargs == "+" else name]
        super().add_usage(usage or " ".join(words), actions, *args, **options)


def true_or_false(word: str) -> bool:
    """Reads a truth value; `ValueError` for other words."""
    if word.lower() not in BOOLEANS:
        raise ValueError(word)
    return BOOLEANS[word.lower()]


def positive(word: str) -> int:
    """Reads a whole number of at least 1; `ValueError` for other words."""
    if int(word) < 1:
        raise ValueError(word)
    return int(word)


def _how_to_read(hint: Any, default: Any) -> dict[str, Any]:
    """The arguments of `add_argument` by which a dataclass field of this type and default is read."""
    options = (hint,) if get_origin(hint) in (Literal, list) else get_args(hint) or (hint,)
    kinds = [option for option in options if (get_origin(option) or option) not in (str, dict, NoneType)]
    # text where it may be text, as mappings are, but truth values and choices
    choosing = any(option is bool or isinstance(option, enum.EnumType) for option in kinds)
    kind = str if not kinds or (str in options and not choosing) else kinds[0]
    if get_origin(kind) is list:
        return {"nargs": "+", "type": get_args(kind)[0]}
    if kind is bool:
        return {"type": true_or_false} if default is None else {"type": true_or_false, "nargs": "?", "const": True}
    choices = get_args(kind) if get_origin(kind) is Literal else None
    if isinstance(kind, enum.EnumType):
        choices = [member.value for member in kind]
    return {"type": kind} if choices is None else {"choices": choices, "type": str}


class CommandParser(argparse.ArgumentParser):
    """
    A parser of dataclasses and options whose errors are one sentence: `error: …` and status 2, without the usage. Options
    are not abbreviated. For an unknown one the error suggests the closest.

    Args:
        groups (`type`): Dataclasses of options, each field with a `help` in its metadata.
        description (`str`, *optional*): Shown by `--help` as it is.
        only_given (`bool`, *optional*, defaults to `False`): Leave fields that are not on the command line out of the
            result.
        prog (`str`, *optional*): Name in the usage (default: that of the script).
    """

    def __init__(
        self, *groups: type, description: str | None = None, only_given: bool = False, prog: str | None = None
    ) -> None:
        super().__init__(prog, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self.groups = groups
        # options of a command around this one, which a misspelt option may mean
        self.further_options: Collection[str] = ()
        for group in groups:
            hints = get_type_hints(group)
            title = one_line(group.__doc__ or "").partition(".")[0]
            section = self.add_argument_group(title[:1].lower() + title[1:] if len(title) < 80 else group.__name__)
            for item in dataclasses.fields(group):
                if item.init:
                    self._add_field(section, item, hints[item.name])
        for action in self._actions[1:]:
            # the spelling with hyphens is read, and not shown again
            action.option_strings = action.option_strings[:1]
            if action.option_strings[0].startswith("--no_"):
                action.help = f"Turn --{action.dest} off."
            if only_given:
                action.help, action.default = _with_default(action), argparse.SUPPRESS

    def _add_field(self, section: Any, item: dataclasses.Field, hint: Any) -> None:
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        found = {"required": True} if default is dataclasses.MISSING else {"default": default}
        found |= _how_to_read(hint, default) | item.metadata
        hyphens = item.name.replace("_", "-")
        section.add_argument(f"--{item.name}", f"--{hyphens}", **found)
        if hint is bool and default is True:
            off = {"action": "store_false", "dest": item.name, "default": False}
            section.add_argument(f"--no_{item.name}", f"--no-{hyphens}", **off)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        """Reads a command line, of which every word must be known."""
        parsed, unknown = self.parse_known_args(args, namespace)
        self.refuse(unknown)
        return parsed

    def parse_args_into_dataclasses(self, args=None) -> tuple[Any, ...]:
        """Reads a command line into one object per dataclass, and a namespace of the other options, if any."""
        values = vars(self.parse_args(args))
        parsed = []
        for group in self.groups:
            names = {item.name for item in dataclasses.fields(group)} & values.keys()
            parsed.append(group(**{name: values.pop(name) for name in names}))
        return (*parsed, argparse.Namespace(**values)) if values else tuple(parsed)

    def refuse(self, unknown: list[str]) -> None:
        """Ends the process with one sentence and status 2, if words of the command line are unknown."""
        options = [word.split("=")[0] for word in unknown if word.startswith("--")]
        known = [option for action in self._actions for option in action.option_strings] + [*self.further_options]
        if options:
            self.error(" ".join(f"There is no option {option}{did_you_mean(option, known)}" for option in options))
        if unknown:
            self.error(f"Nothing is expected at {' '.join(unknown)}: quote words with spaces, or see --help.")

    def error(self, message: str) -> NoReturn:
        """Ends the process with one sentence and status 2."""
        wrong = re.fullmatch(rf"argument (.*): invalid ({'|'.join(KINDS)}) value: (.*)", message)
        if wrong:
            message = f"{wrong[1]} must be {KINDS[wrong[2]]}, got {wrong[3]}."
        self.exit(2, f"error: {message}\n")


def did_you_mean(word: str, known: Collection[str]) -> str:
    """
    Ends a sentence about an unknown word.

    Args:
        word (`str`): The word.
        known (`Collection[str]`): Words that would have been right.

    Returns:
        `str`: `": did you mean …?"`, or a pointer to `--help` where none is close.
    """
    close = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {close[0]}?" if close else "; --help lists all."


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Makes SIGTERM a `Terminated` inside, in the main thread."""

    def terminate(*_: Any) -> NoReturn:
        raise Terminated

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """
    Ends the process with one sentence and status 2 if an import inside fails because a package is not installed. Ctrl-C
    and SIGTERM meanwhile, since imports take seconds, are answered as in [`run_command`].

    Args:
        extra (`str`): The optional dependencies of `synernet_hf` that bring the package.
    """
    try:
        with _sigterm_raises():
            yield
    except KeyboardInterrupt as error:
        signalled = error

        def answer() -> NoReturn:
            raise signalled

        sys.exit(run_command(answer))
    except ModuleNotFoundError as error:
        if (error.name or "synernet_hf").split(".")[0] == "synernet_hf":
            raise
        print(f"error: {missing_extra(extra, error)}", file=sys.stderr)
        sys.exit(2)


def answer_early(read: Callable[[], Any]) -> None:
    """
    Reads a command line before imports that take seconds, and ends the process where it asks for help or is refused.
    Ctrl-C during these imports prints one line.

    Args:
        read (`Callable[[], Any]`): Reads and checks it, as far as that needs none of these imports.
    """
    status = run_command(lambda: read() and None)
    if status:
        sys.exit(status)
    hook = sys.excepthook

    def end(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("error: Interrupted.", file=sys.stderr)
        else:
            hook(kind, error, traceback)

    sys.excepthook = end


def _transport_error() -> type[Exception]:
    """The error of the HTTP library of `huggingface_hub`, whichever it is: connections that fail, which are no OSError."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def quiet_libraries() -> None:
    """
    Hides what libraries say that a user cannot act on: the bars of transformers for loading and saving, which take no
    time; and where standard error is no terminal, the bars of downloads and of `datasets` as well.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if sys.stderr.isatty():
        enable_progress_bars()
    else:
        # read by the import of datasets, which takes a second that not every command has to spend
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def add_json_option(parser: argparse.ArgumentParser, answer: str) -> None:
    """Adds `--json`, which has a command print its answer as [`json_answer`] does; `answer` says what that is."""
    text = f"print one JSON object on standard output, {answer}, and everything else on standard error"
    parser.add_argument("--json", action="store_true", help=text)


@contextmanager
def json_answer(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """
    Keeps standard output free for one JSON object: what is printed inside goes to standard error.

    Args:
        wanted (`bool`): Without it nothing of this happens.

    Returns:
        `Callable[[Any], None]`, as a context: prints mappings, lists, text and numbers as JSON, with `null` for NaN and
        infinities.
    """
    output = sys.stdout

    def answer(result: Any) -> None:
        if wanted:
            print(json.dumps(finite(result), ensure_ascii=False, allow_nan=False), file=output, flush=True)

    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield answer


def run_command(command: Callable[..., int | None], *args: Any) -> int:
    """
    Runs a command and prints what it refuses as lines `error: …`, without a traceback. Where transformers is imported
    already, [`quiet_libraries`] comes first.

    Args:
        command (`Callable`): Does the work; returns an exit status or `None`.
        args (`Any`): Its arguments.

    Returns:
        `int`: exit status: the command's own, 0 done, 1 diverged, 2 input refused, 3 the disk failed, 130 interrupted,
        141 nobody reads the output, 143 ended by SIGTERM.
    """
    if "transformers" in sys.modules:
        quiet_libraries()
    try:
        with _sigterm_raises():
            return command(*args) or 0
    except BrokenPipeError:
        # nobody reads the output any more, as after `| head`: what is left in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except KeyboardInterrupt as error:
        problem, status = error, 143 if isinstance(error, Terminated) else 130
    except OSError as error:
        fails = error.errno in DISK_ERRORS
        problem, status = error, 3 if fails or isinstance(error, DiskError) else 2
        if fails:
            problem = f"{error.filename or 'A file'} cannot be written or read ({error.strerror})."
    except (ValueError, ImportError) as error:
        problem, status = error, 2
    except _transport_error() as error:
        problem, status = f"The Hub cannot be reached ({error}): try again with a network.", 2
    except FloatingPointError as error:
        problem, status = error, 1
    text = str(problem) or ("Terminated." if status == 143 else "Interrupted.")
    # messages of libraries have line breaks within their sentences
    lines = text.splitlines() if isinstance(problem, InvalidArguments) else [one_line(text)]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    _tell_launcher("; ".join(lines))
    return status


def _tell_launcher(text: str) -> None:
    """Has torchrun, and `accelerate launch` with several processes, close their own report with the error."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        content = {"message": f"error: {text}", "extraInfo": {"timestamp": str(int(time.time()))}}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": content}), encoding="utf-8")


__all__ = [
    "CommandParser",
    "InvalidArguments",
    "add_json_option",
    "answer_early",
    "did_you_mean",
    "json_answer",
    "needs_extra",
    "positive",
    "quiet_libraries",
    "run_command",
]
