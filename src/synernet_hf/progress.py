"""The bar of everything that takes long: tqdm's on a terminal and in a notebook; elsewhere a line a minute."""

import sys
import time
from typing import Any

from tqdm import auto, std


SECONDS_BETWEEN_LINES = 60.0
LINE = "{desc}: {n_fmt} of {total_fmt}, {elapsed} passed, {remaining} left, {rate_fmt}{postfix}"
# a message above the bars, on standard output
write_message = auto.tqdm.write


class _Lines(std.tqdm):
    """Writes whole lines, for a log: no line before the first minute, and the last one if the bar is to stay."""

    _written: float | None = None
    _number = 0

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        now = time.monotonic()
        if self._written is None:
            self._written = now
        if now - self._written >= SECONDS_BETWEEN_LINES:
            self._written = now
            self._write_line()

    def clear(self, nolock: bool = False) -> None:
        """Messages of `write` stand on lines of their own anyway."""

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            stays = self.leave or (self.leave is None and not self.pos)
            self._decr_instances(self)
            if stays and self.n != self._number:
                self._write_line()

    def _write_line(self) -> None:
        self._number = self.n
        self.fp.write(f"{self}\n")
        self.fp.flush()


def progress_bar(*args: Any, **options: Any) -> std.tqdm:
    """A bar with the arguments of `tqdm.tqdm`."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return auto.tqdm(*args, **options)
    return _Lines(*args, **options, bar_format=LINE, mininterval=1)


__all__ = ["progress_bar", "write_message"]
