"""
Write the pseudo-labels of a whole data set, for any segmentation model, or read corrected ones back.

OUTPUT/masks/IMAGE_ID.png are palette masks (0 background, 255 undecided), OUTPUT/manifest.parquet lists them, the least
confident image first, and OUTPUT/report.html shows these. --format writes the masks for annotation tools and trainers as
well; `synernet pseudo-labels OUTPUT --from EXPORT --output NEW` reads what was corrected there into a new folder.

Several devices: `accelerate launch -m synernet_hf pseudo-labels MODEL --output OUTPUT`. The processes share the images;
after an interruption the same command keeps what is finished. With --num_shards N --shard K (0 to N - 1), on any machine,
a command makes every N-th image; the same one without them checks the masks of all shards, makes those that are missing,
and writes the manifest. Without data options, the data set is the one MODEL was trained on.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from synernet_hf.cli import CommandParser, add_json_option
from synernet_hf.training import data_parser, read_data_arguments


SPLITS = ("train", "validation")
FORMATS = ("png", "coco", "yolo", "labelstudio", "cvat")
NUM_SHOWN = 5


def make_parser() -> CommandParser:
    """Data options that are not on the command line are None."""
    parser = data_parser(prog="synernet pseudo-labels", description=__doc__)
    parser.add_argument(
        "run",
        metavar="MODEL",
        help="folder or Hub id of a trained model; with --from, the pseudo-labels that were corrected",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the masks and their manifest")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        nargs="+",
        default=["png"],
        help="also write coco.json, yolo/, label_studio.json or cvat.zip (default: png alone, which is always written)",
    )
    parser.add_argument(
        "--from",
        dest="corrected",
        type=Path,
        help="read corrected masks: an export of COCO, YOLO, Label Studio or CVAT, or a folder of PNG masks",
    )
    parser.add_argument("--split", default="train", help="split to label (default: train)")
    parser.add_argument("--max_samples", type=int, help="label the first so many images only")
    parser.add_argument(
        "--map",
        choices=("pseudo_label", "segmentation"),
        default="pseudo_label",
        help="pseudo_label: the fused, refined CAM with undecided pixels (default); segmentation: the decoders' "
        "segmentation, limited to the image's classes",
    )
    parser.add_argument(
        "--label_source",
        choices=("auto", "known", "predicted"),
        default="auto",
        help="known: the labels of the image; predicted: those of the classifier; auto: known where there are some (default)",
    )
    parser.add_argument("--scales", type=float, nargs="+", help="scales of the maps (default: those of the model)")
    parser.add_argument("--flip", action="store_true", default=None, help="also use the mirrored image at every scale")
    parser.add_argument(
        "--num_threads", type=int, default=1, help="CPU threads of a process; more processes are faster (default: 1)"
    )
    parser.add_argument("--num_shards", type=int, default=1, help="label the images in so many commands (default: 1)")
    parser.add_argument("--shard", type=int, help="which of them this command is, from 0")
    add_json_option(parser, "the number of masks and the first images to review")
    return parser


def read(argv: list[str]) -> argparse.Namespace:
    """Read the command line, and find its mistakes before anything is loaded."""
    args = make_parser().parse_args(argv)
    for name in ("max_samples", "num_threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; a positive number is expected.")
    if args.split not in SPLITS:
        raise ValueError(f"There is no split {args.split!r}; --split can be {' or '.join(SPLITS)}.")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file; give a folder.")
    if args.corrected is not None and not args.corrected.exists():
        raise FileNotFoundError(
            f"--from {args.corrected}: no such file or folder; give the export of corrected masks."
        )
    return args


def run(args: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """Load the run and the data, write what is missing, and name the images to look at first."""
    if args.corrected is not None:
        return read_corrected(args, answer)

    import datasets
    import torch
    from accelerate import Accelerator

    from synernet_hf.model_folder import load_model_folder
    from synernet_hf.pseudo_labels import PseudoLabelOptions, write_pseudo_labels
    from synernet_hf.training import load_data

    shards = (args.num_shards, args.shard)
    options = PseudoLabelOptions(args.map, args.label_source, args.scales and tuple(args.scales), args.flip, *shards)
    model, processor = load_model_folder(args.run)
    data_args = read_data_arguments(args, args.run)
    id2label = None if args.label_source == "predicted" else model.config.id2label
    splits = load_data(data_args, id2label=id2label, splits=(args.split,))
    if any(isinstance(split, datasets.IterableDataset) for split in splits.values()):
        raise ValueError("Streamed data cannot be shared over processes: leave `streaming` out of `dataset_options`.")
    if args.split not in splits:
        raise ValueError(f"The data has no split {args.split!r}, only {', '.join(splits)}.")
    split = splits[args.split]
    if args.max_samples is not None:
        split = split.select(range(min(args.max_samples, len(split))))
    # sums over pixels are ordered by the number of threads: fixed, so that files do not depend on the machine's load
    torch.set_num_threads(args.num_threads)
    accelerator = Accelerator()
    manifest = write_pseudo_labels(
        model.to(accelerator.device),
        processor,
        split,
        args.output,
        options,
        accelerator=accelerator,
        on_bad_image=data_args.on_bad_image,
        progress=True,
    )
    if accelerator.is_main_process:
        written = [] if options.shard is not None else write_for_review(args, split)
        first = manifest.slice(0, NUM_SHOWN).drop_columns(["pixels"]).to_pylist()
        _tell(args, len(split), len(manifest), first, written)
        counts = {"output": str(args.output), "images": len(split), "masks": len(manifest)}
        answer(counts | {"written": list(map(str, written)), "review_first": first})
    accelerator.end_training()


def _tell(args: argparse.Namespace, images: int, masks: int, first: list[dict], written: list[Path]) -> None:
    """Print what there is now, and the images to look at first."""
    if args.shard is not None:
        print(
            f"shard {args.shard} of {args.num_shards}: {masks} masks are in {args.output / 'masks'}; after the last shard, "
            "the same command without --num_shards and --shard writes the manifest."
        )
        return
    for path in written:
        print(f"written: {path}")
    print(f"{masks} of {images} images have a mask in {args.output / 'masks'}")
    print(f"manifest: {args.output / 'manifest.parquet'}; the first images to review:")
    for row in first:
        missing = f", not found: {', '.join(row['missing_classes'])}" if row["missing_classes"] else ""
        print(
            f"  {row['image_id']}: confidence {row['confidence']:.3f}, decided {100 * row['coverage']:.1f} %, "
            f"classes {', '.join(row['classes']) or 'none'}{missing}"
        )


def write_for_review(args: argparse.Namespace, split: Any) -> list[Path]:
    """Write the page of the least confident images and the further formats."""
    from synernet_hf.review import export_masks, write_report

    formats = [kind for kind in dict.fromkeys(args.format) if kind != "png"]
    return [*export_masks(args.output, formats), write_report(args.output, split)]


def read_corrected(args: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """Make a folder of pseudo-labels with the corrected masks."""
    from synernet_hf.review import import_masks

    found, changed = import_masks(args.corrected, args.run, args.output)
    print(f"{found} masks read, {changed} of which differ from {args.run}; all pseudo-labels are in {args.output}")
    answer({"output": str(args.output), "masks": found, "changed": changed})


__all__ = ["make_parser", "read", "run"]
