"""Ends a run in order: at SIGTERM, without its launcher or another process, at Ctrl-C, and when the disk fails."""

import os
import platform
import re
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader

from synernet_hf.cli import DiskError, InvalidArguments, Terminated
from synernet_hf.files import LOCK_FILE, hold_folder, one_line
from synernet_hf.training.checkpoints import TrainerState, list_checkpoints, remove_unfinished
from synernet_hf.training.optimization import PATIENCE


# launchers pass on a signal that the whole group of processes got already
ECHO_SECONDS = 3.0
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")
PARENT = os.getppid()
# A thread of each process counts, whatever the process does. One that stands still for five minutes is frozen or lost:
# what holds up a healthy one (compiled code that keeps the interpreter, memory on disk) takes seconds.
BEAT_SECONDS, SILENT_LOOKS = 10.0, 30
SILENCE_STATUS = 4
# network file systems remember for up to a minute that a file is not there
SHARING_SECONDS = 90.0


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


@contextmanager
def hold_run_folder(accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """
    Keeps other runs out of the folder while the processes of this one, who all call this, write into it.
    `InvalidArguments` in all of them where one does not see the folder of the main one.
    """
    is_main, rank, host = accelerator.is_main_process, accelerator.process_index, platform.node()
    with hold_folder(output_dir, is_main, share=lambda problem: broadcast_object_list([problem])[0]):
        lock, problem, start = output_dir / LOCK_FILE, None, time.monotonic()
        main_host, text = broadcast_object_list([host, lock.read_text() if is_main else None])
        while problem is None and not (lock.is_file() and lock.read_text() == text):
            time.sleep(0.5)
            if time.monotonic() - start > SHARING_SECONDS:
                problem = (
                    f"Process {rank} on {host} does not see {lock}, which process 0 on {main_host} wrote: choose an "
                    "`output_dir` on a file system that all machines share."
                )
        problems = [text for text in gather_object([problem]) if text]
        if problems:
            raise InvalidArguments("\n".join(problems))
        yield


@contextmanager
def watch_processes(accelerator: Accelerator, output_dir: Path) -> Iterator[None]:
    """
    Ends this process, with a sentence and a status of its own, once another one gives no sign of life: its main thread
    would wait for the other as long as for one that works. Every process calls this. Looks are counted, not seconds, so
    that a run which was stopped as a whole goes on.
    """
    number, rank = accelerator.num_processes, accelerator.process_index
    if number == 1:
        yield
        return
    # on a port of its own: the questions to a frozen store never return, and would keep others from asking
    address, make_store = os.environ["MASTER_ADDR"], torch.distributed.TCPStore
    store = make_store(address, 0, is_master=True, wait_for_workers=False) if rank == 0 else None
    [port] = broadcast_object_list([store and store.port])
    store = store or make_store(address, port, is_master=False, wait_for_workers=False)
    hosts, ended = gather_object([platform.node()]), threading.Event()
    counts, missed = [0] * number, [0] * number

    def beat() -> None:
        # fails once the process that keeps the counts is gone
        with suppress(RuntimeError):
            while not ended.wait(BEAT_SECONDS):
                store.add(str(rank), 1)
                for other in range(number):
                    count = store.add(str(other), 0)
                    if count > counts[other]:
                        counts[other], missed[other] = count, 0

    def judge() -> None:
        while not ended.wait(BEAT_SECONDS):
            missed[:] = [looks + 1 for looks in missed]
            silent = [other for other in range(number) if missed[other] > SILENT_LOOKS]
            if silent:
                # without process 0, which keeps the counts, all are missed
                who = silent[0]
                _end_for_silence(f"Process {who} of {number}, on {hosts[who]}", output_dir, rank == 0)

    beating = threading.Thread(target=beat, daemon=True)
    beating.start()
    threading.Thread(target=judge, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        # the store must not go amid a question
        beating.join(BEAT_SECONDS)


def _end_for_silence(who: str, output_dir: Path, is_main: bool) -> NoReturn:
    try:
        print(
            f"error: {who}, gave no sign of life for {SILENT_LOOKS * BEAT_SECONDS:.0f} seconds: it is frozen, or its "
            f"machine cannot be reached. Training stopped; {_way_on(output_dir)}",
            file=sys.stderr,
            flush=True,
        )
        if is_main:
            (output_dir / LOCK_FILE).unlink(missing_ok=True)
    finally:
        # the main thread is in a call that nothing ends; what it left half-written, the next start removes
        os._exit(SILENCE_STATUS)


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
    except (KeyboardInterrupt, FloatingPointError, OSError, RuntimeError, ValueError, tarfile.TarError) as error:
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
        way_on = _way_on(output_dir)
        if isinstance(error, FloatingPointError):
            raise FloatingPointError(f"{error} Training stopped; {way_on.rpartition(' (')[0]}.") from error
        if isinstance(error, OSError):
            raise DiskError(f"{_fault(error)}. Training stopped after step {state.step}; {way_on}") from error
        if isinstance(error, ValueError | tarfile.TarError):
            raise ValueError(
                f"{one_line(error).rstrip('.')}. Training stopped after step {state.step}; {way_on}"
            ) from error
        word = "Terminated" if isinstance(error, Terminated) else "Interrupted"
        raise type(error)(f"{word} after step {state.step}; {way_on}") from error
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)


def _way_on(output_dir: Path) -> str:
    checkpoints = list_checkpoints(output_dir)
    last = f"the last checkpoint is {checkpoints[-1]}" if checkpoints else "there is no checkpoint yet"
    return f"{last} ({'continue' if checkpoints else 'start over'} with --resume_from_checkpoint latest)."


def _fault(error: OSError) -> str:
    if error.filename is not None and error.strerror:
        return f"{error.filename} cannot be read or written ({error.strerror})"
    return one_line(error).rstrip(".")
