"""Losses and weights of a running training, looked at without making every step wait for the device."""

import itertools
import math
import platform

import torch
from accelerate import Accelerator


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
    continue from each checkpoint.

    Args:
        model (`torch.nn.Module`):
            The model in training.
        step (`int`):
            Optimizer steps done.

    Raises:
        FloatingPointError: if a value is NaN or infinite; the sentence names the first parameter or buffer.
    """
    tensors = dict(itertools.chain(model.named_parameters(), model.named_buffers()))
    finite = torch.stack([tensor.detach().isfinite().all() for tensor in tensors.values()]).tolist()
    if not all(finite):
        name = list(tensors)[finite.index(False)].removeprefix("module.")
        raise FloatingPointError(
            f"The weights are not finite after step {step} ({name}): try a smaller learning_rate, bf16 or full "
            "precision."
        )


def hardware(accelerator: Accelerator) -> str:
    """
    Names what a run was computed on, for its model card.

    Args:
        accelerator (`Accelerator`):
            Of the run.

    Returns:
        `str`: such as `"2 × NVIDIA A100"` or `"cpu (x86_64, 2 threads)"`.
    """
    count = f"{accelerator.num_processes} × " if accelerator.num_processes > 1 else ""
    if accelerator.device.type == "cuda":
        return count + torch.cuda.get_device_name(accelerator.device)
    return f"{count}{accelerator.device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


__all__ = ["LossMeter", "check_finite_weights", "hardware"]
