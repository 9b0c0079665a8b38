"""What the benchmarks share: variants timed in turns, and the record of a measurement."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from synernet_hf.files import write_json


def machine() -> dict[str, Any]:
    """What the figures belong to: processor, cores, threads and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def choose_clock(device: str = "cpu") -> Callable[[], float]:
    """`time.process_time` on one thread of a CPU, where other work lengthens it less; else `time.perf_counter`."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def time_in_turns(
    variants: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, dict[str, Any]]:
    """
    Times each variant once per round, after one call of each to warm up, so that a busy machine slows all of them.

    Args:
        variants (`dict[str, Callable]`): What to call, by name.
        rounds (`int`): Timed calls of each variant.
        clock (`Callable`, *optional*, defaults to `time.perf_counter`): Gives seconds. That of the process does not
            count what other processes do.

    Returns:
        `dict[str, dict]`: by name `"seconds"` (median) and `"all_seconds"`.
    """
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            started = clock()
            run()
            seconds[name].append(clock() - started)
    return {name: {"seconds": statistics.median(taken), "all_seconds": taken} for name, taken in seconds.items()}


def median_ratio(slow: dict[str, Any], fast: dict[str, Any]) -> float:
    """How many times as fast `fast` is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(slow["all_seconds"], fast["all_seconds"], strict=True))


def save_record(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes figures with date and machine as JSON; `None` writes nothing."""
    if path is not None:
        record = {"date": datetime.now().isoformat(timespec="seconds"), "machine": machine()} | figures
        write_json(path, record)
