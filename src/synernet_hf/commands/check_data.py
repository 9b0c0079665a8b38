"""
Look at a data set before training on it.

Prints images per class, sizes, and problems: files that do not decode, images without a class, exact
duplicates, classes without images. With --output, writes the report and a contact sheet; with --parquet, also the
data itself with the images inside, as `push_to_hub` would.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synernet_hf.cli import CommandParser, add_json_option
from synernet_hf.files import replace_file, write_json
from synernet_hf.training import data_parser, read_data_arguments


if TYPE_CHECKING:
    import datasets
    from PIL import Image

    from synernet_hf.data import DatasetReport


def make_parser() -> CommandParser:
    """Data options that are not on the command line are None."""
    parser = data_parser(prog="synernet check-data", description=__doc__)
    parser.add_argument("--output", type=Path, help="folder for report.json and contact_sheet.png")
    parser.add_argument("--parquet", action="store_true", help="also write the data to OUTPUT/data as parquet files")
    parser.add_argument("--push_to_hub", metavar="REPO", help="also upload the data as this data set, such as me/pets")
    parser.add_argument("--images_per_class", type=int, default=6, help="width of the contact sheet (default: 6)")
    parser.add_argument("--num_threads", type=int, default=2, help="threads that decode (default: 2)")
    add_json_option(parser, "the report")
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and find its mistakes before anything is loaded."""
    args = make_parser().parse_args(argv)
    if args.parquet and args.output is None:
        raise ValueError("--parquet needs --output: name the folder that the files go to.")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; give a folder.")
    for name in ("images_per_class", "num_threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; a positive number is expected.")
    return args


def contact_sheet(splits: "datasets.DatasetDict", report: "DatasetReport", images_per_class: int) -> "Image.Image":
    """One row per class that the first split shows, with its first images."""
    import datasets

    from synernet_hf.data import class_names
    from synernet_hf.visualization import figure_panels

    split_name = next(iter(splits))
    split = splits[split_name].select_columns(["image", "image_id", "labels"])
    split = split.cast_column("image", datasets.Image(decode=False))
    ids, labels = list(split["image_id"]), list(split["labels"])
    faulty = set(report.splits[split_name].undecodable) | set(report.splits[split_name].bad_labels)
    rows = []
    for column, name in enumerate(class_names(splits)[1:]):
        shown = [i for i, found in enumerate(labels) if ids[i] not in faulty and column in found][:images_per_class]
        if shown:
            rows.append([(f"{name}: {ids[i]}", thumbnail(split[i]["image"])) for i in shown])
    if not rows:
        raise ValueError(f"No image of the split {split_name!r} has a class; there is nothing to draw.")
    return figure_panels(rows, panel_size=(144, 108))


def thumbnail(image: dict) -> "Image.Image":
    """An upright image of about 144 pixels."""
    from synernet_hf.model import open_image

    opened = open_image(image)
    opened.thumbnail((144, 144))
    return opened


def run(args: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """Load the data, inspect it, print and write the report."""
    import datasets

    from synernet_hf.data import check_dataset, inspect_dataset, same_columns, write_parquet
    from synernet_hf.training import load_data

    data_args = read_data_arguments(args)
    missing: dict[str, list[str]] = {}
    # the report names every image that is missing, not the first ones
    splits = load_data(dataclasses.replace(data_args, on_bad_image="skip"), missing)
    if any(isinstance(split, datasets.IterableDataset) for split in splits.values()):
        raise ValueError("Streamed data cannot be counted: leave `streaming` out of `dataset_options`.")
    report = inspect_dataset(splits, args.num_threads)
    for name, phrases in missing.items():
        report.splits[name].missing = phrases
    print(report.text())
    answer(report.to_dict())
    if args.output is not None:
        write_json(args.output / "report.json", report.to_dict())
        sheet = contact_sheet(splits, report, args.images_per_class)
        replace_file(args.output / "contact_sheet.png", lambda path: sheet.save(path, format="PNG"))
        print(f"\nwritten: {args.output / 'report.json'}, {args.output / 'contact_sheet.png'}")
    if args.parquet or args.push_to_hub:
        if missing and data_args.on_bad_image == "raise":
            raise ValueError("Images are missing: add them, or leave them out with --on_bad_image skip.")
        shared = same_columns(check_dataset(splits, data_args.on_bad_image))
        if args.parquet:
            paths = write_parquet(shared, args.output)
            size = sum(path.stat().st_size for path in paths)
            print(f"written: {len(paths)} parquet files of together {size / 1e6:,.1f} MB in {args.output / 'data'}")
        if args.push_to_hub:
            shared.push_to_hub(args.push_to_hub)
            print(f"uploaded: {args.push_to_hub}")


__all__ = ["make_parser", "read", "run"]
