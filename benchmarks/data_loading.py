"""
How fast the training loader feeds, against the bare rate of decoding and resizing the same images.

    python benchmarks/data_loading.py --data_dir path/to/VOCdevkit --image_labels path/to/labels.npz

Each round times, one after the other and for each number of processes: `bare`, that many processes which decode whole
images and resize them by the factors of training, and nothing else; `bare, draft`, the same with JPEGs decoded at a
reduced size where that is enough; `loader`, the loader of the training run with that many workers, batches of crops
included. Processes are started and warmed up before the first round. Rates are medians over the rounds, and ratios
medians of the ratios within a round, with the lowest and highest, so that a busy machine slows both sides alike.
"""

import argparse
import io
import json
import multiprocessing
import statistics
import sys
import time
from pathlib import Path

from synernet_hf.cli import answer_early, needs_extra, positive, run_command


with needs_extra("train"):
    from synernet_hf.training import data_parser, read_data_arguments


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = data_parser(description=__doc__)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes to try")
    parser.add_argument("--num_images", type=positive, default=256, help="images of a round")
    parser.add_argument("--rounds", type=positive, default=5, help="repetitions")
    parser.add_argument("--batch_size", type=int, default=8, help="images of a batch")
    parser.add_argument("--crop_size", type=int, default=448, help="side of the crop in pixels")
    parser.add_argument("--scale_range", type=float, nargs=2, default=[0.5, 2.0], help="rescale factors")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(argv)
    for name in ("num_images", "rounds", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; a positive number is expected")
    if min(args.workers) < 1:
        parser.error(f"--workers is {args.workers}; positive numbers are expected")
    return args


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader


with needs_extra("train"):
    import datasets

    from synernet_hf.data import (
        StreamBatchSampler,
        SynerNetDataCollator,
        TrainDataset,
        TrainTransform,
        class_names,
    )
    from synernet_hf.training import load_data


SEED = 0
KINDS = ("bare", "bare, draft", "loader")


def factor_of(position: int, scale_range: tuple[float, float]) -> float:
    """The rescale factor that [`TrainTransform`] draws first for this position of the stream."""
    return float(np.random.default_rng((SEED, position)).uniform(*scale_range))


def decode_and_resize(image: dict | Image.Image, factor: float, draft: bool) -> Image.Image:
    """A whole RGB image, rescaled; with `draft` a JPEG is decoded no larger than needed."""
    opened = image
    if isinstance(image, dict):
        opened = Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
    size = (max(1, round(opened.width * factor)), max(1, round(opened.height * factor)))
    if draft:
        opened.draft("RGB", size)
    return opened.convert("RGB").resize(size, Image.Resampling.BILINEAR)


def bare_work(share: tuple[list[tuple[dict, float]], bool]) -> int:
    """Decodes and resizes a share of the images in this process."""
    images, draft = share
    for image, factor in images:
        decode_and_resize(image, factor, draft)
    return len(images)


def loader_for(split: datasets.Dataset, args: argparse.Namespace, num_workers: int) -> DataLoader:
    """The loader of a training run; its workers stay from one pass to the next."""
    transform = TrainTransform(args.crop_size, tuple(args.scale_range), seed=SEED)
    num_batches = -(-args.num_images // args.batch_size)
    return DataLoader(
        TrainDataset(split, transform),
        batch_sampler=StreamBatchSampler(len(split), args.batch_size, num_batches, seed=SEED),
        collate_fn=SynerNetDataCollator(len(class_names({"train": split})) - 1),
        num_workers=num_workers,
        persistent_workers=True,
    )


def measure(split: datasets.Dataset, args: argparse.Namespace) -> dict[int, dict[str, list[float]]]:
    """Images per second: number of processes → kind → one rate for each round."""
    undecoded = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    num_batches = -(-args.num_images // args.batch_size)
    stream = [key for keys in StreamBatchSampler(len(split), args.batch_size, num_batches, seed=SEED) for key in keys]
    images = [(undecoded[index]["image"], factor_of(position, tuple(args.scale_range))) for index, position in stream]
    context = multiprocessing.get_context("fork")
    pools = {number: context.Pool(number) for number in args.workers}
    loaders = {number: loader_for(split, args, number) for number in args.workers}

    def run(number: int, kind: str) -> float:
        start = time.perf_counter()
        if kind == "loader":
            done = sum(len(batch["images"]) for batch in loaders[number])
        else:
            shares = [(images[rank::number], kind == "bare, draft") for rank in range(number)]
            done = sum(pools[number].map(bare_work, shares, chunksize=1))
        assert done == len(images)
        return done / (time.perf_counter() - start)

    rates = {number: {kind: [] for kind in KINDS} for number in args.workers}
    for number in args.workers:
        run(number, "loader")
        run(number, "bare")
    for turn in range(args.rounds):
        # the kind that goes first changes, so that a drift of the machine's load favours none
        order = KINDS[turn % 3 :] + KINDS[: turn % 3]
        for number in args.workers:
            for kind in order:
                rates[number][kind].append(run(number, kind))
    for pool in pools.values():
        pool.terminate()
        pool.join()
    return rates


def draft_difference(split: datasets.Dataset, args: argparse.Namespace, limit: int = 64) -> dict[str, float] | None:
    """How images decoded at a reduced size differ from whole ones, in grey levels of 255, where that happens."""
    undecoded = split.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    factor = args.scale_range[0]
    means, largest = [], []
    for index in range(min(limit, len(split))):
        image = undecoded[index]["image"]
        pair = [np.asarray(decode_and_resize(image, factor, draft), dtype=int) for draft in (False, True)]
        difference = np.abs(pair[0] - pair[1])
        means.append(float(difference.mean()))
        largest.append(float(np.quantile(difference, 0.99)))
    if not any(means):
        return None
    return {"factor": factor, "images": len(means), "mean": statistics.mean(means), "99 %": statistics.mean(largest)}


def summary(rates: dict[int, dict[str, list[float]]]) -> list[dict[str, float]]:
    """One row for each number of processes: median rates, and the loader's share of either bare rate."""
    rows = []
    for number, kinds in rates.items():
        row = {"processes": number} | {kind: statistics.median(values) for kind, values in kinds.items()}
        for kind in KINDS[:2]:
            shares = [mine / bare for mine, bare in zip(kinds["loader"], kinds[kind], strict=True)]
            row[f"loader / {kind}"] = statistics.median(shares)
            row[f"loader / {kind}, range"] = [min(shares), max(shares)]
        rows.append(row)
    return rows


def table(rows: list[dict[str, float]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| processes | bare | bare, draft | loader | loader / bare | loader / bare with draft |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        rates = [f"{row[kind]:.0f}" for kind in KINDS]
        shares = []
        for kind in KINDS[:2]:
            low, high = row[f"loader / {kind}, range"]
            shares.append(f"{row[f'loader / {kind}']:.2f} ({low:.2f} to {high:.2f})")
        lines.append(f"| {' | '.join([str(row['processes']), *rates, *shares])} |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    """Measures and prints."""
    split = load_data(read_data_arguments(args))["train"]
    rows = summary(measure(split, args))
    difference = draft_difference(split, args)
    print(f"images per second, {args.num_images} images, {args.rounds} rounds")
    print(table(rows))
    if difference is None:
        print(f"No image is decoded at a reduced size at the factor {args.scale_range[0]}.")
    else:
        print(
            f"Decoded at a reduced size and rescaled by {difference['factor']}, {difference['images']} images differ "
            f"by {difference['mean']:.2f} of 255 grey levels on average, 99 % of the values by at most "
            f"{difference['99 %']:.1f}."
        )
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"rates": rows, "draft": difference}, indent=2) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse_arguments(argv))


if __name__ == "__main__":
    sys.exit(main())
