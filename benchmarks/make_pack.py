"""
Packs VOC-Animals for a machine without a network: one folder in the layout of the VOC devkit, and an encoder.

    python benchmarks/make_pack.py --data_dir path/to/VOCdevkit --image_labels labels.npz \
        --backbone path/to/deit-tiny-patch16-224 --output pack

Images are shrunk to `--factor` of their sides and stored as WebP, so that a recipe's `scale_range` divided by the
factor shows the same crops (less what the compression takes); masks of `val` keep their size. Weights are stored in
half precision. `benchmarks/gpu_suite.py` unpacks it (`unpack`): validation images come back at their own size.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from synernet_hf.cli import CommandParser, run_command


LISTS = ("train_aug", "val")


def shrink_image(path: Path, factor: float, quality: int) -> tuple[bytes, tuple[int, int]]:
    """The image at `path` as WebP bytes, `factor` of its sides, and its own (width, height)."""
    with Image.open(path) as image:
        size = image.size
        small = image.convert("RGB").resize([max(1, round(side * factor)) for side in size], Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue(), size


def make_pack(
    data_dir: Path, image_labels: Path, backbone: Path, output: Path, factor: float, quality: int, processes: int
) -> None:
    """Writes the folder `output`: `data.tar.xz` (the devkit), `pack.json`, `image_labels.npz`, `backbone/`."""
    import torch
    from safetensors.torch import load_file, save_file

    root = data_dir / "VOC2012" if (data_dir / "VOC2012").is_dir() else data_dir
    output.mkdir(parents=True, exist_ok=True)
    lists = {name: (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().split() for name in LISTS}
    ids = [image_id for name in LISTS for image_id in lists[name]]
    sizes = {}
    with tarfile.open(output / "data.tar.xz", "w:xz", preset=3) as archive, ProcessPoolExecutor(processes) as pool:
        paths = [root / "JPEGImages" / f"{image_id}.jpg" for image_id in ids]
        shrunk = pool.map(partial(shrink_image, factor=factor, quality=quality), paths, chunksize=16)
        for image_id, (content, size) in zip(ids, shrunk, strict=True):
            add_bytes(archive, f"VOC2012/JPEGImages/{image_id}.webp", content)
            if image_id in set(lists["val"]):
                sizes[image_id] = size
        for name in LISTS:
            archive.add(
                root / "ImageSets" / "Segmentation" / f"{name}.txt", f"VOC2012/ImageSets/Segmentation/{name}.txt"
            )
        for image_id in lists["val"]:
            archive.add(
                root / "SegmentationClassAug" / f"{image_id}.png", f"VOC2012/SegmentationClassAug/{image_id}.png"
            )
    with np.load(image_labels) as table:
        names = [str(name) for name in table["ids"]]
        rows = [names.index(image_id) for image_id in ids]
        np.savez_compressed(output / "image_labels.npz", ids=table["ids"][rows], labels=table["labels"][rows])
    (output / "backbone").mkdir(exist_ok=True)
    shutil.copy(backbone / "config.json", output / "backbone" / "config.json")
    weights = {
        name: tensor.to(torch.float16)
        for name, tensor in load_file(backbone / "model.safetensors").items()
        if not name.startswith("classifier")
    }
    save_file(weights, output / "backbone" / "model.safetensors", metadata={"format": "pt"})
    record = {"factor": factor, "quality": quality, "val_sizes": sizes, "num_images": len(ids)}
    (output / "pack.json").write_text(json.dumps(record), encoding="utf-8")


def add_bytes(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file of `content` to the archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def restore_size(folder: Path, image_id: str, size: tuple[int, int]) -> None:
    """A validation image back at its own size, as a mask of that size needs it."""
    with Image.open(folder / f"{image_id}.webp") as image:
        large = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    large.save(folder / f"{image_id}.png", compress_level=1)
    (folder / f"{image_id}.webp").unlink()


def unpack(pack: Path, output: Path, processes: int) -> dict:
    """
    Unpacks into `output`: `output/VOC2012` is a devkit, `output/backbone` an encoder in float32.

    Returns:
        `dict`: the content of `pack.json`.
    """
    import torch
    from safetensors.torch import load_file, save_file

    record = json.loads((pack / "pack.json").read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    with tarfile.open(pack / "data.tar.xz") as archive:
        archive.extractall(output, filter="data")
    folder = output / "VOC2012" / "JPEGImages"
    with ProcessPoolExecutor(processes) as pool:
        names = list(record["val_sizes"])
        list(pool.map(partial(restore_size, folder), names, [tuple(record["val_sizes"][name]) for name in names]))
    shutil.copy(pack / "image_labels.npz", output / "image_labels.npz")
    (output / "backbone").mkdir(exist_ok=True)
    shutil.copy(pack / "backbone" / "config.json", output / "backbone" / "config.json")
    weights = {
        name: value.to(torch.float32) for name, value in load_file(pack / "backbone" / "model.safetensors").items()
    }
    save_file(weights, output / "backbone" / "model.safetensors", metadata={"format": "pt"})
    return record


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    parser = CommandParser(description=__doc__)
    for name in ("data_dir", "image_labels", "backbone", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--factor", type=float, default=0.7, help="of the sides")
    parser.add_argument("--quality", type=int, default=50, help="of the WebP files")
    parser.add_argument("--processes", type=int, default=2, help="that shrink images")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    """Makes the pack and prints its size."""
    make_pack(**vars(args))
    size = sum(path.stat().st_size for path in args.output.rglob("*") if path.is_file())
    print(f"{args.output}: {size / 1e6:.1f} MB")


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(run, parse(argv))


if __name__ == "__main__":
    sys.exit(main())
