"""Bars of long work: bars on a terminal, lines in a log."""

import io
import sys

import pytest
from tqdm.auto import tqdm

from synernet_hf import progress
from synernet_hf.progress import progress_bar


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass as told, for the lines and for tqdm."""
    seconds = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(progress.std, "time", lambda: seconds[0])
    return seconds


def test_a_log_gets_a_line_a_minute_with_the_time_left(clock, capsys):
    bar = progress_bar(total=40, desc="train", unit="step")
    for step in range(40):
        clock[0] += 15
        bar.set_postfix(loss=f"{step}.5", refresh=False)
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[-1].startswith("train: 40 of 40, 10:00 passed, 00:00 left")
    assert lines[0] == "train: 4 of 40, 01:00 passed, 09:00 left, 15.00s/step, loss=3.5"
    assert not any("\r" in line for line in lines)


def test_short_work_and_bars_that_do_not_stay_leave_nothing_in_a_log(clock, capsys):
    assert list(progress_bar(range(3), "checking", 3, leave=False, delay=1)) == [0, 1, 2]
    outer = progress_bar(total=2, desc="train")
    assert len(list(progress_bar(range(3), desc="evaluate", leave=None))) == 3
    progress_bar(total=3, disable=True).close()
    tqdm.write("a message", file=sys.stderr)
    assert capsys.readouterr().err == "a message\n"
    outer.update()
    outer.close()
    outer.close()
    assert capsys.readouterr().err.startswith("train: 1 of 2") and not tqdm._instances


def test_a_terminal_gets_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    list(progress_bar(range(3), desc="train"))
    assert "\r" in sys.stderr.getvalue() and "100%" in sys.stderr.getvalue()
