"""What would make a run fail later, found before it starts."""

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from synernet_hf.model import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.training.arguments import (
    DataArguments,
    InvalidArguments,
    ModelArguments,
    SynerNetTrainingArguments,
)
from synernet_hf.training.building import (
    INPUT_ERRORS,
    MODEL_FIELDS,
    data_problems,
    load_data,
    model_config_from,
    one_line,
)
from synernet_hf.training.checkpoints import find_resume_checkpoint


def validate_arguments(
    model_args: ModelArguments, data_args: DataArguments, training_args: SynerNetTrainingArguments
) -> Path | None:
    """
    Checks everything that can be known without opening an image, writes nothing, and returns the checkpoint to
    continue from, if any. Raises one `InvalidArguments` with a sentence per problem. [`prepare_data`] loads and checks
    the data; here it is loaded only to report its problems together with others.
    """
    problems, checkpoint = training_args.problems(), None
    if data_args.num_workers < 0:
        problems.append(f"`num_workers` must not be negative, got {data_args.num_workers}.")
    if data_args.max_eval_samples is not None and data_args.max_eval_samples < 1:
        problems.append(f"`max_eval_samples` must be at least 1, got {data_args.max_eval_samples}.")
    problems += _model_problems(model_args, training_args.crop_size)
    if training_args.output_dir:
        try:
            checkpoint = find_resume_checkpoint(Path(training_args.output_dir), training_args.resume_from_checkpoint)
        except InvalidArguments as error:
            problems.append(str(error))
    if not problems:
        return checkpoint
    try:
        problems += data_problems(load_data(data_args), data_args)
    except INPUT_ERRORS as error:
        problems.append(one_line(error))
    raise InvalidArguments("\n".join(problems))


def _model_problems(model_args: ModelArguments, crop_size: int) -> list[str]:
    """Says what is wrong with the model arguments, without reading or drawing a weight."""
    if (model_args.backbone is None) == (model_args.backbone_config is None):
        got = "neither" if model_args.backbone is None else "both"
        return [f"Give either `backbone` (pretrained) or `backbone_config` (random weights), got {got}."]
    if model_args.backbone is None and model_args.backbone_overrides:
        return ["`backbone_overrides` goes with `backbone` only: write its fields into `backbone_config`."]
    problems = []
    named_labels = {"num_labels", "id2label", "label2id"} & set(model_args.model_config)
    unknown = sorted(set(model_args.model_config) - MODEL_FIELDS - named_labels)
    if unknown:
        problems.append(
            f"`model_config` has unknown fields {', '.join(unknown)}; known are {', '.join(sorted(MODEL_FIELDS))}."
        )
    if named_labels:
        problems.append(
            f"`model_config` sets {', '.join(sorted(named_labels))}, but the labels come from the data set: leave it out."
        )
    try:
        config = model_config_from(model_args, ["background", "object"])
        patch_size = config.patch_size
        # shapes only: the model itself checks what spans encoder and heads
        with torch.device("meta"):
            SynerNetForWeaklySupervisedSegmentation(config)
    except (*INPUT_ERRORS, StrictDataclassError, KeyError, AttributeError, ArithmeticError, RuntimeError) as error:
        source = model_args.backbone or "`backbone_config`"
        # the strict checks wrap the sentence that says what is wrong
        reason = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
        return [*problems, f"No model can be made of {source} and `model_config`: {one_line(reason)}"]
    if crop_size < patch_size:
        problems.append(f"`crop_size` is {crop_size}, smaller than a patch of {patch_size} pixels: enlarge it.")
    return problems


__all__ = ["validate_arguments"]
