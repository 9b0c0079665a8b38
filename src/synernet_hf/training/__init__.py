"""Training and evaluation of SynerNet."""

from synernet_hf.training.arguments import (
    DataArguments,
    InvalidArguments,
    ModelArguments,
    SynerNetTrainingArguments,
    parse_arguments,
    read_recipe,
)
from synernet_hf.training.engine import train
from synernet_hf.training.evaluation import evaluate_model
from synernet_hf.training.optimization import LossWeightSchedule, learning_rate_multiplier, parameter_groups


__all__ = [
    "DataArguments",
    "InvalidArguments",
    "LossWeightSchedule",
    "ModelArguments",
    "SynerNetTrainingArguments",
    "evaluate_model",
    "learning_rate_multiplier",
    "parameter_groups",
    "parse_arguments",
    "read_recipe",
    "train",
]
