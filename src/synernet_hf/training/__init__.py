"""Training and evaluation of SynerNet."""

from synernet_hf.files import missing_extra


try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
except ModuleNotFoundError as error:
    raise missing_extra("train", error) from error

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
)
from synernet_hf.training.building import check_on_main_process, load_data
from synernet_hf.training.engine import train
from synernet_hf.training.evaluation import evaluate_model, results_table
from synernet_hf.training.optimization import (
    LossWeightSchedule,
    gather_in_rank_order,
    learning_rate_multiplier,
    parameter_groups,
    resolve_precision,
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
    "train",
]
