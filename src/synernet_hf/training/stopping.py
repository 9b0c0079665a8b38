"""Ends a run in order: at SIGTERM, without its launcher, at Ctrl-C, and when the disk fails."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from synernet_hf.cli import DiskError, Terminated
from synernet_hf.files import one_line
from synernet_hf.training.checkpoints import TrainerState, list_checkpoints, remove_unfinished
from synernet_hf.training.optimization import PATIENCE


# launchers pass on a signal that the whole group of processes got already
ECHO_SECONDS = 3.0
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
PARENT = os.getppid()


def outlive_sigterm(_: int) -> None:
    """For workers of loaders: clusters signal them too, whose batches the run still needs; their parent may end them."""
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


class StopRequest:
    """
    Whether a run is to end after the present step, because it got SIGTERM or because its launcher is gone. The
    processes agree by a sum on the CPU that each step starts and the next one reads: no step waits for it.
    """

    def __init__(self, num_processes: int) -> None:
        self.signalled_at: float | None = None
        # in a step or a save, whose work would be lost: elsewhere SIGTERM ends the run at once
        self.deferred = False
        # without a launcher the parent is a shell, which may end
        self.launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        distributed = torch.distributed
        self.group = distributed.new_group(backend="gloo", timeout=PATIENCE) if num_processes > 1 else None
        self.flag, self.work = torch.zeros(1), None

    def on_signal(self, *_) -> None:
        """Handles SIGTERM."""
        # clusters signal the workers of the loaders too: their end is no error of its own then
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, lambda *_: None)
        first = self.signalled_at is None
        if first:
            self.signalled_at = time.monotonic()
        if not self.deferred or not first and time.monotonic() - self.signalled_at >= ECHO_SECONDS:
            raise Terminated

    def agreed(self, now: bool = False) -> bool:
        """
        Whether all processes stop; every process calls this at the same steps. What one learned since the last call
        shows in the next one, with `now` in this one.
        """
        wanted = self.signalled_at is not None or (self.launched and os.getppid() != PARENT)
        if self.group is None:
            return wanted
        stops = self._read()
        self.flag = torch.tensor([float(wanted)])
        self.work = torch.distributed.all_reduce(self.flag, group=self.group, async_op=True)
        return self._read() if now else stops

    def _read(self) -> bool:
        if self.work is not None:
            self.work.wait()
        return bool(self.flag.item())


def batches_of(loader: DataLoader, stop: StopRequest) -> Iterator[dict[str, torch.Tensor]]:
    """The training stream; it ends only if the workers of the loader got the SIGTERM that this process got too."""
    try:
        yield from loader
    except RuntimeError:
        if stop.signalled_at is None:
            raise
    except (OSError, ValueError) as error:
        # from a worker the message is a traceback, whose last line names the error; a wrong image is no fault of the disk
        kind, line = DiskError if isinstance(error, OSError) else ValueError, str(error).strip().splitlines()[-1]
        raise kind(re.sub(r"^\w*Error: ", "", line)) from error


@contextmanager
def stop_cleanly(accelerator: Accelerator, output_dir: Path, state: TrainerState, stop: StopRequest) -> Iterator[None]:
    """
    Answers SIGTERM with `stop`. However a run ends early, removes what is half-written and says what the last checkpoint
    is and how to go on.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, stop.on_signal) if in_main_thread else None
    try:
        yield
    except (KeyboardInterrupt, FloatingPointError, OSError, RuntimeError, ValueError) as error:
        if stop.signalled_at is not None and isinstance(error, RuntimeError):
            # of loaders whose workers got the signal too
            error = Terminated()
        if isinstance(error, RuntimeError):
            raise
        if in_main_thread:
            # a second one must not end the clearing up
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for tracker in accelerator.trackers:
            tracker.finish()
        if accelerator.is_main_process:
            remove_unfinished(output_dir)
        checkpoints = list_checkpoints(output_dir)
        last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
        if isinstance(error, FloatingPointError):
            raise FloatingPointError(f"{error} Training stopped; {last}.") from error
        way_on = f"{last} ({'continue' if checkpoints else 'start over'} with --resume_from_checkpoint latest)."
        if isinstance(error, OSError):
            raise DiskError(f"{_fault(error)}. Training stopped after step {state.step}; {way_on}") from error
        if isinstance(error, ValueError):
            raise ValueError(
                f"{one_line(error).rstrip('.')}. Training stopped after step {state.step}; {way_on}"
            ) from error
        word = "Terminated" if isinstance(error, Terminated) else "Interrupted"
        raise type(error)(f"{word} after step {state.step}; {way_on}") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _fault(error: OSError) -> str:
    if error.filename is not None and error.strerror:
        return f"{error.filename} cannot be read or written ({error.strerror})"
    return one_line(error).rstrip(".")
