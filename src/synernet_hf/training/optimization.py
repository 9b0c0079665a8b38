"""Optimization of a run: parameter groups, learning rate, loss weights, and the checks that numbers stay finite."""

import itertools
import math

import torch
from accelerate import Accelerator
from torch import nn

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
        model (`nn.Module`): The unwrapped model.
        learning_rate (`float`): Base rate.
        weight_decay (`float`): Weight decay of every parameter.
        encoder_multiplier (`float`, *optional*, defaults to 2.0): Factor on the encoders' rate. [authors]
        head_multiplier (`float`, *optional*, defaults to 10.0): Factor on the rate of classifiers, projection heads
            and decoders. [authors]

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
        self.starts = {name: getattr(config, start) for name, start in GATED_TERMS.items()}

    def __call__(self, progress: float) -> dict[str, float]:
        """
        Args:
            progress (`float`): Share of the optimizer steps already done, in [0, 1].

        Returns:
            `dict[str, float]`: `loss_weights` for the model's forward.

        Raises:
            ValueError: if `progress` is outside [0, 1].
        """
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
        Averages over passes and processes and starts anew; the one place where a step waits for the device.

        Returns:
            `dict[str, float]`: mean of each term over the passes that had it; empty if nothing was added.

        Raises:
            FloatingPointError: if a value is not finite; every process raises, because all read the same numbers.
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
    continue from each checkpoint. `FloatingPointError` names the first one with NaN or infinite values.
    """
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors.values()]).tolist()
    if not all(finite):
        name = list(tensors)[finite.index(False)].removeprefix("module.")
        raise FloatingPointError(
            f"The weights are not finite after step {step} ({name}): try a smaller learning_rate, bf16 or full "
            "precision."
        )


__all__ = ["LossMeter", "LossWeightSchedule", "check_finite_weights", "learning_rate_multiplier", "parameter_groups"]
