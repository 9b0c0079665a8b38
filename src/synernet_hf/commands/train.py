"""Train a model from image labels."""

from synernet_hf.cli import CommandParser
from synernet_hf.training import (
    DataArguments,
    ModelArguments,
    SynerNetTrainingArguments,
    parse_arguments,
    training_parser,
)


def make_parser() -> CommandParser:
    """Settings that are not on the command line are those of the recipe."""
    return training_parser()


def read(argv: list[str]) -> tuple[ModelArguments, DataArguments, SynerNetTrainingArguments]:
    """Read the command line and the recipe."""
    return parse_arguments(argv)


def run(given: tuple[ModelArguments, DataArguments, SynerNetTrainingArguments]) -> None:
    """Train, and print the scores."""
    from synernet_hf.training import train

    *_, training_args = given
    results = train(*given)
    if training_args.dry_run:
        return
    training = results.pop("training")
    print(f"{training['step']} steps in {training['minutes']:.1f} minutes; the run is in {training_args.output_dir}")
    for kind, scores in results.items():
        print(f"  {kind:<24} mean IoU {100 * scores['mean_iou']:.1f}")


__all__ = ["make_parser", "read", "run"]
