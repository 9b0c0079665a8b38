"""
Segment images with a trained model.

NAME_mask.png is a palette PNG of class ids, as VOC has
them; NAME_overlay.png shows the classes over the image, with a legend.
"""

import argparse
import functools
import glob
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synernet_hf.cli import CommandParser, add_json_option
from synernet_hf.files import IMAGE_SUFFIXES, is_hidden, one_line, replace_file


if TYPE_CHECKING:
    from PIL import Image


def make_parser() -> CommandParser:
    """It needs no extra."""
    parser = CommandParser(prog="synernet predict", description=__doc__)
    parser.add_argument("run", metavar="MODEL", help="folder or Hub id of a trained model, such as runs/voc_animals")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help="image files, folders of images (with their subfolders), or patterns such as 'a/*.jpg'",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("predictions"), help="folder of the results")
    parser.add_argument("--scales", type=float, nargs="+", help="scales to use (default: those of the model)")
    parser.add_argument("--flip", action="store_true", help="also use the mirrored image at every scale")
    parser.add_argument("--crf", action="store_true", help="refine the result with DenseCRF (extra `crf`)")
    add_json_option(parser, "for each image its files and, as the pipeline gives them, classes and scores")
    return parser


def images_in(folder: Path, output_dir: Path, pattern: str = "**/*") -> dict[Path, Path]:
    """Image files below a folder, without hidden ones and earlier results, and their paths below it."""
    paths = [Path(path) for path in sorted(glob.glob(pattern, root_dir=folder, recursive=True))]
    return {
        folder / path: path
        for path in paths
        if path.suffix.lower() in IMAGE_SUFFIXES
        and (folder / path).is_file()
        and not any(map(is_hidden, path.parts))
        and output_dir.resolve() not in (folder / path).resolve().parents
    }


def find_images(names: Iterable[str], output_dir: Path) -> dict[Path, str]:
    """
    The image files that the command line names, and for each the path and beginning of the name of its results.

    Results are called like the file, with the subfolders of a folder or pattern, and with its suffix where two files
    differ in nothing else.
    """
    places: dict[Path, Path] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = images_in(path, output_dir)
        elif path.is_file():
            found = {path: Path(path.name)}
        elif glob.has_magic(name):
            root = next(folder for folder in path.parents if not glob.has_magic(str(folder)))
            found = images_in(root, output_dir, str(path.relative_to(root)))
        else:
            raise ValueError(f"There is no image {path}; check the path.")
        if not found:
            raise ValueError(f"{name} holds no image; give image files, a folder of images, or a pattern.")
        places |= found
    stems = Counter(str(place.with_suffix("")).casefold() for place in places.values())
    results = {
        path: str(place if stems[str(place.with_suffix("")).casefold()] > 1 else place.with_suffix(""))
        for path, place in places.items()
    }
    seen: dict[str, Path] = {}
    for path, result in results.items():
        other = seen.setdefault(result.casefold(), path)
        if other != path:
            raise ValueError(f"{other} and {path} would write the same results; segment them separately.")
    return results


def read(argv: list[str]) -> argparse.Namespace:
    """Read the command line, find its mistakes before anything is loaded, and the `found` images."""
    args = make_parser().parse_args(argv)
    if args.scales is not None and not all(0 < scale < math.inf for scale in args.scales):
        raise ValueError(f"The scales {args.scales} are not all positive numbers; give factors such as 1.0 1.25 1.5.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise ValueError(f"{args.output_dir} is a file; give a folder for the results.")
    args.found = find_images(args.images, args.output_dir)
    return args


def read_image(path: Path) -> "Image.Image":
    """An image as the model sees it, upright and in colour; [`ValueError`] says what is wrong with it."""
    from synernet_hf.model import open_image

    try:
        return open_image(path)
    except ValueError as error:
        reason = one_line(error.__cause__ or error)
        raise ValueError(
            f"The image {path} cannot be decoded ({reason}); give a valid JPEG, PNG or the like."
        ) from error


def run(args: argparse.Namespace, answer: Callable[[Any], None]) -> None:
    """Segment every image and write its results."""
    import numpy as np
    import torch

    from synernet_hf.crf import DenseCRF
    from synernet_hf.model import segment_images
    from synernet_hf.model_folder import find_model_folder, load_model_folder
    from synernet_hf.visualization import overlay, palette_image

    images = args.found
    # before the model is loaded and anything is written
    find_model_folder(args.run)
    for path in images:
        if str(path) in args.images:
            read_image(path)
    crf = DenseCRF() if args.crf else None
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model, processor = load_model_folder(args.run)
    model = model.to(device).eval()
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"The results cannot be written: {error}") from error
    names, scales = model.config.id2label, args.scales and tuple(args.scales)
    results, unread = [], []
    for path, result in images.items():
        try:
            image = read_image(path)
        except ValueError as error:
            # of a folder; a file that was named is read beforehand
            print(f"left out: {error}", file=sys.stderr)
            unread.append({"image": str(path), "error": str(error)})
            continue
        [segmented] = segment_images(model, processor, [image], scales=scales, flip=args.flip, crf=crf)
        label_map = segmented.label_map.cpu().numpy()
        mask_path, overlay_path = (args.output_dir / f"{result}_{kind}.png" for kind in ("mask", "overlay"))
        drawn = {mask_path: palette_image(label_map), overlay_path: overlay(image, label_map, class_names=names)}
        for target, figure in drawn.items():
            replace_file(target, functools.partial(figure.save, format="PNG"))
        ids, counts = np.unique(label_map, return_counts=True)
        shares = {int(i): int(n) / label_map.size for i, n in zip(ids, counts, strict=True)}
        found = (f"{names[i]} {100 * share:.1f} %" for i, share in shares.items())
        print(f"{path}: {', '.join(found)} -> {mask_path}, {overlay_path}", flush=True)
        if args.json:
            scores = segmented.probabilities().cpu().numpy()
            classes = [
                {"label": names[i], "score": float(scores[label_map == i].mean()), "coverage": share}
                for i, share in shares.items()
            ]
            files = {"image": str(path), "mask": str(mask_path), "overlay": str(overlay_path)}
            results.append(files | {"classes": classes})
    answer({"results": results, "left_out": unread})
    if unread:
        raise ValueError(f"{len(unread)} of {len(images)} images cannot be decoded and have no result, see above.")


__all__ = ["make_parser", "read", "run"]
