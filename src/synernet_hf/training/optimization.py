"""Parameter groups, learning rate, weights of the loss terms, and embeddings gathered from all processes."""

import torch
from torch import nn
from torch.nn import functional as F

from synernet_hf.model import SynerNetConfig


# the gated terms and the config field that opens each gate
GATED_TERMS = {
    "segmentation": "segmentation_start",
    "spatial_bce": "spatial_bce_start",
    "prototype_contrast": "prototype_contrast_start",
}


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
        model (`nn.Module`):
            The unwrapped model.
        learning_rate (`float`):
            Base rate.
        weight_decay (`float`):
            Weight decay of every parameter.
        encoder_multiplier (`float`, *optional*, defaults to 2.0):
            Factor on the encoders' rate. [authors]
        head_multiplier (`float`, *optional*, defaults to 10.0):
            Factor on the rate of classifiers, projection heads and decoders. [authors]

    Returns:
        `list[dict]`: two groups for `torch.optim.AdamW`, with keys `name`, `params`, `lr` and `weight_decay`; every
        trainable parameter is in exactly one.

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
    return [
        {
            "name": "encoder",
            "params": encoder,
            "lr": learning_rate * encoder_multiplier,
            "weight_decay": weight_decay,
        },
        {"name": "heads", "params": heads, "lr": learning_rate * head_multiplier, "weight_decay": weight_decay},
    ]


def learning_rate_multiplier(step: int, warmup_steps: int, total_steps: int) -> float:
    """
    Factor on every learning rate: linear warm-up from 6e-6, then polynomial decay with power 0.9. The decay counts
    from step 0, so the factor drops to `(1 - warmup_steps / total_steps)**0.9` when the warm-up ends (authors' code).

    Args:
        step (`int`):
            Optimizer steps already done, from 0.
        warmup_steps (`int`):
            Length of the warm-up; 0 leaves it out.
        total_steps (`int`):
            Length of the run; from here on the factor is 0.

    Returns:
        `float`: factor in [0, 1].
    """
    if step < warmup_steps:
        return 1 - (1 - step / warmup_steps) * (1 - 6e-6)
    return max(0.0, 1 - step / total_steps) ** 0.9


class LossWeightSchedule:
    """
    Weights of the loss terms during a run: those of the configuration, but 0 for a gated term (`segmentation`,
    `spatial_bce`, `prototype_contrast`) as long as the share of steps done is at most `config.<term>_start` (authors'
    code: 2,000 of 8,000 steps leave the first 2,001 without the term). A start of 0 has no gate.

    Args:
        config ([`SynerNetConfig`]):
            Holds weights and gates.

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
        self.starts = {name: getattr(config, start) for name, start in GATED_TERMS.items()}

    def __call__(self, progress: float) -> dict[str, float]:
        """
        Args:
            progress (`float`):
                Share of the optimizer steps already done, in [0, 1].

        Returns:
            `dict[str, float]`: `loss_weights` for the model's forward.

        Raises:
            ValueError: if `progress` is outside [0, 1].
        """
        if not 0 <= progress <= 1:
            raise ValueError(f"`progress` is a share of the run in [0, 1], got {progress}.")
        closed = {name for name, start in self.starts.items() if 0 < start and progress <= start}
        return {name: 0.0 if name in closed else weight for name, weight in self.weights.items()}


def gather_in_rank_order(
    embeddings: torch.Tensor, class_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """
    Collects the embeddings of all processes in rank order, so that every process updates its prototypes alike. All
    processes must call this together; their batches may differ in size.

    Args:
        embeddings (`torch.Tensor` of shape `(n, P)`): embeddings of the own images.
        class_ids (`torch.Tensor` of shape `(n,)`): int64, class ids of the own images.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, slice]`: embeddings `(N, P)`, with gradient for the own ones only; class ids
        `(N,)`, -1 in rows that pad a smaller batch; and the rows of the own images.
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


__all__ = ["LossWeightSchedule", "gather_in_rank_order", "learning_rate_multiplier", "parameter_groups"]
