"""Which number format a training run computes in."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


SLOW_BF16 = (
    "This device imitates bf16, many times slower than full precision: --mixed_precision auto takes what is fast."
)


def resolve_precision(mixed_precision: str | None) -> str | None:
    """
    What `"auto"` stands for on the device of this process.

    Args:
        mixed_precision (`str`, *optional*):
            `"no"`, `"fp16"`, `"bf16"`, `"auto"` or `None`.

    Returns:
        `str`, *optional*: `"bf16"` or `"no"` for `"auto"`: bf16 on a GPU that has it and on a CPU with AVX-512 (ours,
        measured in docs/experiment_log.md), else full precision; everything else as it is.
    """
    if mixed_precision != "auto":
        return mixed_precision
    # the first state decides on devices and processes for all later ones, so it must know what the Accelerator knows
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU")).device
    if device.type == "cpu":
        return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "no"
    return "bf16" if device.type == "cuda" and not is_slow_in_bf16(device) else "no"


def is_slow_in_bf16(device: torch.device) -> bool:
    """Whether a device is known to imitate bf16: CUDA without it, or a CPU whose best instructions are AVX2."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


__all__ = ["SLOW_BF16", "is_slow_in_bf16", "resolve_precision"]
