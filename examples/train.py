"""
Trains SynerNet from image-level labels.

    python examples/train.py --config examples/recipes/tiny_cpu.yaml --output_dir runs/tiny_cpu

    python examples/train.py --config examples/recipes/voc_animals.yaml --data_dir path/to/VOCdevkit \
        --backbone facebook/deit-tiny-patch16-224 --output_dir runs/voc_animals

A recipe holds settings, options on the command line override it, and `--help` lists them all. docs/training.md
describes the run folder and how to resume.
"""

import sys

from synernet_hf.cli import answer_early, needs_extra, run_command


with needs_extra("train"):
    from synernet_hf.training import parse_arguments

if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

with needs_extra("train"):
    from synernet_hf.training import train


def run(argv: list[str] | None) -> None:
    """Trains, and prints the scores."""
    model_args, data_args, training_args = parse_arguments(argv)
    results = train(model_args, data_args, training_args)
    if training_args.dry_run:
        return
    training = results.pop("training")
    print(f"{training['step']} steps in {training['minutes']:.1f} minutes; the run is in {training_args.output_dir}")
    for kind, scores in results.items():
        print(f"  {kind:<24} mean IoU {100 * scores['mean_iou']:.1f}")


def main(argv: list[str] | None = None) -> int:
    """Runs one training; returns its exit status, as docs/training.md lists them."""
    return run_command(run, argv)


if __name__ == "__main__":
    sys.exit(main())
