"""How a run computes: precision, parameter groups, learning rate, loss weights, finite values, gathering."""

import copy
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from synernet_hf.model import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation


# how long processes wait for each other: the main process checks the data alone, the others must not give up
PATIENCE = timedelta(hours=6)

# the terms with a gate, which `config.<term>_start` opens
GATED_TERMS = ("segmentation", "spatial_bce", "prototype_contrast")


def resolve_precision(mixed_precision: str | None) -> str | None:
    """
    Resolves `"auto"` to the precision that is fast on the device of this process.

    Args:
        mixed_precision (`str`, *optional*): `"no"`, `"fp16"`, `"bf16"`, `"auto"` or `None`.

    Returns:
        `str`, *optional*: for `"auto"`, `"bf16"` on a GPU that has it and on a CPU with AVX-512 (ours, measured in
        docs/experiment_log.md), else `"no"`; any other value unchanged.
    """
    if mixed_precision != "auto":
        return mixed_precision
    # the first state decides on devices and processes for all later ones, so it must know what the Accelerator knows
    device = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE).device
    if device.type == "cpu":
        return "bf16" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "no"
    return "bf16" if device.type == "cuda" and not is_slow_in_bf16(device) else "no"


def settle_precision(accelerator: Accelerator) -> None:
    """Warns of emulated bf16; has shards of FSDP2 compute from float32 weights, which autocast casts where it may."""
    if accelerator.mixed_precision == "bf16" and is_slow_in_bf16(accelerator.device):
        accelerator.print(
            "This device only emulates bf16, many times slower than full precision: --mixed_precision auto takes what is "
            "fast."
        )
    if accelerator.is_fsdp2:
        # weights of half precision would meet the float32 of those losses that leave autocast
        accelerator.state.fsdp_plugin.mixed_precision_policy = None


def is_slow_in_bf16(device: torch.device) -> bool:
    """Whether a device is known to emulate bf16: CUDA without it, or a CPU whose best instructions are AVX2."""
    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    encoder_multiplier: float = 2.0,
    head_multiplier: float = 10.0,
) -> list[dict]:
    """
    Splits the trainable parameters into encoder (names with `.backbone.`) and heads, each with its own rate.
    Weight decay is the same everywhere (authors' code).

    Args:
        model (`nn.Module`): The unwrapped model.
        learning_rate (`float`): Base rate.
        weight_decay (`float`): Weight decay of every parameter.
        encoder_multiplier (`float`, *optional*, defaults to 2.0): Factor on the encoders' rate. [authors]
        head_multiplier (`float`, *optional*, defaults to 10.0): Factor on the rate of classifiers, projection heads
            and decoders. [authors]

    Returns:
        `list[dict]`: two groups for `torch.optim.AdamW`, with keys `name`, `params`, `lr` and `weight_decay`.

    Raises:
        ValueError: if a group would be empty, because the names no longer tell encoder from heads.
    """
    encoder, heads = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (encoder if ".backbone." in name else heads).append(parameter)
    if not encoder or not heads:
        raise ValueError(
            f"Expected encoder parameters (`.backbone.` in the name) and others, got {len(encoder)} and {len(heads)}."
        )
    groups = (("encoder", encoder, encoder_multiplier), ("heads", heads, head_multiplier))
    return [
        {"name": name, "params": parameters, "lr": learning_rate * factor, "weight_decay": weight_decay}
        for name, parameters, factor in groups
    ]


def learning_rate_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """
    Factor on every learning rate: linear warm-up from 6e-6, then polynomial decay with power 0.9. The decay counts
    from step 0, so the factor drops to `(1 - warmup_steps / total_steps)**0.9` when the warm-up ends (authors' code).

    Args:
        step (`int`): Optimizer steps already done, from 0.
        warmup_steps (`int`): Length of the warm-up; 0 leaves it out.
        total_steps (`int`): Length of the run; from here on the factor is 0.

    Returns:
        `float`: factor in [0, 1].
    """
    if step >= total_steps:
        return 0.0
    if step < warmup_steps:
        return 1 - (1 - step / warmup_steps) * (1 - 6e-6)
    return (1 - step / total_steps) ** 0.9


# tokens up to which products of matrices attend faster than the fused kernel, which counts in float32
SHORT_SEQUENCE = 512
BF16_ATTENTION = "synernet_bf16"


def bf16_attention(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """
    Attention for bf16 on a CPU: explicit for bf16 tokens of a short sequence, else that of PyTorch. Arguments and result
    are those of transformers' attention functions.
    """
    explicit = query.dtype == torch.bfloat16 and query.shape == key.shape and query.shape[-2] <= SHORT_SEQUENCE
    if not explicit or attention_mask is not None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = ((query * scale) @ key.transpose(-1, -2)).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register(BF16_ATTENTION, bf16_attention)


class LossWeightSchedule:
    """
    Weights of the loss terms during a run: those of the configuration, but 0 for a gated term (`segmentation`,
    `spatial_bce`, `prototype_contrast`) as long as the share of steps done is at most `config.<term>_start` (authors'
    code: 2,000 of 8,000 steps leave the first 2,001 without the term). A start of 0 has no gate.

    Args:
        config ([`SynerNetConfig`]): Holds weights and gates.

    Example:

    ```python
    >>> from synernet_hf import SynerNetConfig
    >>> from synernet_hf.training import LossWeightSchedule

    >>> schedule = LossWeightSchedule(SynerNetConfig(num_labels=3))
    >>> schedule(0.25)["segmentation"], schedule(0.26)["segmentation"]
    (0.0, 0.17)
    ```"""

    def __init__(self, config: SynerNetConfig):
        self.weights = {name: float(weight) for name, weight in config.loss_weights.items()}
        self.starts = {name: getattr(config, f"{name}_start") for name in GATED_TERMS}

    def __call__(self, progress: float) -> dict[str, float]:
        """Returns the `loss_weights` of the model's forward after the share `progress` of the steps, in [0, 1]."""
        if not 0 <= progress <= 1:
            raise ValueError(f"`progress` is a share of the run in [0, 1], got {progress}.")
        closed = {name for name, start in self.starts.items() if 0 < start and progress <= start}
        return {name: 0.0 if name in closed else weight for name, weight in self.weights.items()}


class LossMeter:
    """Collects loss terms as device tensors and reads them together, so that most steps never wait for the device."""

    def __init__(self):
        self.steps: list[int] = []
        self.terms: list[dict[str, torch.Tensor]] = []

    def add(self, step: int, loss: torch.Tensor, loss_dict: dict[str, torch.Tensor]) -> None:
        """Keeps the loss and its terms (scalars) of a forward pass made at `step`."""
        self.steps.append(step)
        self.terms.append({"loss": loss.detach(), **loss_dict})

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """
        Averages each term over the processes and over the passes that computed it, then resets; nothing else in a step
        waits for the device. `FloatingPointError` in every process if a value is not finite.
        """
        if not self.steps:
            return {}
        names = list(dict.fromkeys(name for terms in self.terms for name in terms))
        zero = torch.zeros_like(self.terms[0]["loss"], dtype=torch.float32)
        rows = torch.stack([torch.stack([terms.get(name, zero).float() for name in names]) for terms in self.terms])
        values = accelerator.reduce(rows, reduction="mean").tolist()
        for step, row in zip(self.steps, values, strict=True):
            broken = [name for name, value in zip(names, row, strict=True) if not math.isfinite(value)]
            if broken:
                raise FloatingPointError(
                    f"The loss is not finite at step {step} ({', '.join(broken)}): try a smaller learning_rate, "
                    "bf16 or full precision."
                )
        means = {}
        for column, name in enumerate(names):
            present = [row[column] for row, terms in zip(values, self.terms, strict=True) if name in terms]
            means[name] = sum(present) / len(present)
        self.steps, self.terms = [], []
        return means


def check_finite_weights(model: torch.nn.Module, step: int) -> None:
    """
    Checks every parameter and buffer: a finite loss may have had a gradient that is not, and training must be able to
    continue from each checkpoint. `FloatingPointError` names the first one with NaN or infinite values. Every process
    calls this, since weights may be in shards.
    """
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors.values())
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in own]).int()
    if sharded:
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN)
    finite = finite.tolist()
    if not all(finite):
        name = list(tensors)[finite.index(0)].removeprefix("module.")
        raise FloatingPointError(
            f"The weights are not finite after step {step} ({name}): try a smaller learning_rate, bf16 or full "
            "precision."
        )


def fill_sharded_state(optimizer: torch.optim.Optimizer) -> None:
    """
    Gives parameters in shards (FSDP2) that have had no gradient yet, such as those of a decoder before its gate, the
    state with which AdamW begins: torch loads the state of such an optimizer for all parameters or for none.
    """
    for parameter in itertools.chain.from_iterable(group["params"] for group in optimizer.param_groups):
        if isinstance(parameter, DTensor) and parameter.requires_grad and not optimizer.state.get(parameter):
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


@contextmanager
def whole_model(accelerator: Accelerator, model: nn.Module) -> Iterator[SynerNetForWeaklySupervisedSegmentation]:
    """
    The model to score and to save, without its distributed wrapper, in float32: accelerate wraps an autocast around
    `forward` under mixed precision, which is removed and put back at the end. Where weights are in shards (FSDP2) it is a
    copy with all of them. Every process calls this.
    """
    bare = accelerator.unwrap_model(model)
    state = bare.state_dict()
    if any(isinstance(tensor, DTensor) for tensor in state.values()):
        whole = SynerNetForWeaklySupervisedSegmentation(copy.deepcopy(bare.config)).to(accelerator.device)
        whole.load_state_dict(
            {name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for name, tensor in state.items()}
        )
        yield whole.train(bare.training)
        return
    wrapped = bare.__dict__.pop("forward", None)
    try:
        yield bare
    finally:
        if wrapped is not None:
            bare.forward = wrapped


def sum_over_processes(counts: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Sums counts over all processes, which call it together. The argument `sum_counts` of the model.

    Args:
        counts (`torch.Tensor`): int64, of any shape.

    Returns:
        `tuple[torch.Tensor, int]`: the sums, and the number of processes.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return counts, 1
    total = counts.clone()
    torch.distributed.all_reduce(total)
    return total, torch.distributed.get_world_size()


def gather_in_rank_order(
    embeddings: torch.Tensor, class_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """
    Collects the embeddings of all processes in rank order, so that every process makes the same update of its
    prototypes. The argument `gather_embeddings` of the model; all processes call it together, with batches of any size.

    Args:
        embeddings (`torch.Tensor` of shape `(n, P)`): of the images of this process.
        class_ids (`torch.Tensor` of shape `(n,)`): int64, of the images of this process.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, slice]`: embeddings `(N, P)`, with gradient only for those of this process;
        class ids `(N,)`, −1 where a process has fewer images than another; and the slice of this process.
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
