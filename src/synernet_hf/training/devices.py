"""What a run computes on: number format, hardware, and what processes exchange."""

import platform
from datetime import timedelta

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env


# how long processes wait for each other: the main process checks the data alone, the others must not give up
PATIENCE = timedelta(hours=6)
SLOW_BF16 = (
    "This device imitates bf16, many times slower than full precision: --mixed_precision auto takes what is fast."
)


def resolve_precision(mixed_precision: str | None) -> str | None:
    """
    What `"auto"` stands for on the device of this process.

    Args:
        mixed_precision (`str`, *optional*): `"no"`, `"fp16"`, `"bf16"`, `"auto"` or `None`.

    Returns:
        `str`, *optional*: `"bf16"` or `"no"` for `"auto"`: bf16 on a GPU that has it and on a CPU with AVX-512 (ours,
        measured in docs/experiment_log.md), else full precision; everything else as it is.
    """
    if mixed_precision != "auto":
        return mixed_precision
    # the first state decides on devices and processes for all later ones, so it must know what the Accelerator knows
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE).device
    if device.type == "cpu":
        return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "no"
    return "bf16" if device.type == "cuda" and not is_slow_in_bf16(device) else "no"


def is_slow_in_bf16(device: torch.device) -> bool:
    """Whether a device is known to imitate bf16: CUDA without it, or a CPU whose best instructions are AVX2."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def hardware(accelerator: Accelerator) -> str:
    """Names what a run was computed on, such as `2 × NVIDIA A100` or `cpu (x86_64, 2 threads)`."""
    count = f"{accelerator.num_processes} × " if accelerator.num_processes > 1 else ""
    if accelerator.device.type == "cuda":
        return count + torch.cuda.get_device_name(accelerator.device)
    return f"{count}{accelerator.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def gather_in_rank_order(
    embeddings: torch.Tensor, class_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """
    Collects the embeddings of all processes in rank order, so that every process updates its prototypes alike. All
    processes must call this together; their batches may differ in size. For the model's `gather_embeddings`.

    Args:
        embeddings (`torch.Tensor` of shape `(n, P)`): of the own images.
        class_ids (`torch.Tensor` of shape `(n,)`): int64, of the own images.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, slice]`: embeddings `(N, P)`, with gradient for the own ones only; class ids
        `(N,)`, −1 where a process has fewer images than another; and the position of the own ones.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return embeddings, class_ids, slice(None)
    ranks, rank, count = distributed.get_world_size(), distributed.get_rank(), class_ids.shape[0]
    counts = [torch.zeros(1, dtype=torch.long, device=class_ids.device) for _ in range(ranks)]
    distributed.all_gather(counts, torch.full_like(counts[0], count))
    longest = int(torch.cat(counts).max())
    embeddings = F.pad(embeddings, (0, 0, 0, longest - count))
    class_ids = F.pad(class_ids, (0, longest - count), value=-1)
    all_embeddings = [torch.empty_like(embeddings) for _ in range(ranks)]
    all_ids = [torch.empty_like(class_ids) for _ in range(ranks)]
    distributed.all_gather(all_embeddings, embeddings.detach().contiguous())
    distributed.all_gather(all_ids, class_ids)
    all_embeddings[rank] = embeddings
    return torch.cat(all_embeddings), torch.cat(all_ids), slice(rank * longest, rank * longest + count)


__all__ = ["PATIENCE", "SLOW_BF16", "gather_in_rank_order", "hardware", "is_slow_in_bf16", "resolve_precision"]
