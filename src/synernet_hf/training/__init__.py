"""Training and evaluation of SynerNet."""

import importlib.util
from typing import TYPE_CHECKING

from synernet_hf.files import missing_extra
from synernet_hf.lazy import lazy_names
from synernet_hf.training.arguments import (
    DataArguments,
    DataSourceArguments,
    InvalidArguments,
    ModelArguments,
    SynerNetTrainingArguments,
    data_parser,
    parse_arguments,
    read_data_arguments,
    read_recipe,
    training_parser,
)


if TYPE_CHECKING:
    from synernet_hf.training.building import check_on_main_process, load_data
    from synernet_hf.training.engine import train
    from synernet_hf.training.evaluation import evaluate_model, results_table
    from synernet_hf.training.optimization import (
        LossWeightSchedule,
        gather_in_rank_order,
        learning_rate_multiplier,
        parameter_groups,
        resolve_precision,
        sum_over_processes,
    )


for package in ("accelerate", "datasets"):
    if importlib.util.find_spec(package) is None:
        raise missing_extra("train", ModuleNotFoundError(name=package))

# imported when they are first asked for, so that a command line is read without torch
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "building": ["check_on_main_process", "load_data"],
        "engine": ["train"],
        "evaluation": ["evaluate_model", "results_table"],
        "optimization": [
            "LossWeightSchedule",
            "gather_in_rank_order",
            "learning_rate_multiplier",
            "parameter_groups",
            "resolve_precision",
            "sum_over_processes",
        ],
    },
)

__all__ = [
    "DataArguments",
    "DataSourceArguments",
    "InvalidArguments",
    "LossWeightSchedule",
    "ModelArguments",
    "SynerNetTrainingArguments",
    "check_on_main_process",
    "data_parser",
    "evaluate_model",
    "gather_in_rank_order",
    "learning_rate_multiplier",
    "load_data",
    "parameter_groups",
    "parse_arguments",
    "read_data_arguments",
    "read_recipe",
    "resolve_precision",
    "results_table",
    "sum_over_processes",
    "train",
    "training_parser",
]
