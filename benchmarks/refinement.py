"""
Refined pseudo-labels of a batch: ours against the reference's order of work, with equal label maps.

    python benchmarks/refinement.py --output runs/refinement.json

The reference refines image by image and background plane by background plane, and builds the affinity each time; ours
takes the whole batch, both planes and all branches' CAMs at once, with one affinity. Two sets of CAMs (one for each
branch) and one for the instances are refined, as in a training step.
"""

import argparse
import sys
from pathlib import Path

import torch
from side_by_side import median_ratio, save_record, time_in_turns
from torch.nn import functional as F

from synernet_hf.model import SynerNetPixelAdaptiveRefinement, refine_pseudo_labels


LOW, HIGH, IGNORE = 0.25, 0.5, 255


def reference_labels(images, cams, labels, refinement) -> torch.Tensor:
    """Label maps `(B, H, W)` of one set of CAMs, in the reference's order of work."""
    size, half = images.shape[-2:], [side // 2 for side in images.shape[-2:]]
    label_maps = []
    for image, maps, present in zip(images, cams, labels, strict=True):
        class_ids = present.nonzero()[:, 0]
        small = F.interpolate(image[None], size=half, mode="bilinear", align_corners=False)
        own = F.interpolate(maps[class_ids][None], size=half, mode="bilinear", align_corners=False)
        ids = F.pad(class_ids + 1, (1, 0))
        planes = []
        for background in (HIGH, LOW):
            scores = torch.cat([torch.full_like(own[:, :1], background), own], dim=1).softmax(dim=1)
            refined = F.interpolate(refinement(small, scores), size=size, mode="bilinear", align_corners=False)
            planes.append(ids[refined.argmax(dim=1)[0]])
        high, low = planes
        label_maps.append(high.masked_fill((high == 0) & (low != 0), IGNORE))
    return torch.stack(label_maps)


def make_batch(size: int, batch_size: int, num_classes: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smooth random images in [0, 1], three sets of CAMs in [0, 1], and labels of one to three classes an image."""
    generator = torch.Generator().manual_seed(0)

    def smooth(*shape: int) -> torch.Tensor:
        coarse = torch.rand(*shape, size // 16, size // 16, generator=generator)
        flat = F.interpolate(coarse.flatten(0, -4), size=(size, size), mode="bicubic", align_corners=False)
        return flat.clamp(0, 1).reshape(*shape, size, size)

    labels = torch.zeros(batch_size, num_classes)
    for index in range(batch_size):
        labels[index, torch.randperm(num_classes, generator=generator)[: index % 3 + 1]] = 1
    return smooth(batch_size, 3), smooth(3, batch_size, num_classes) * labels[:, :, None, None], labels


def measure(size: int, batch_size: int, rounds: int) -> dict:
    """Seconds of both, their ratio and the share of equal pixels."""
    images, cams, labels = make_batch(size, batch_size)
    refinement = SynerNetPixelAdaptiveRefinement()

    def reference():
        return torch.stack([reference_labels(images, maps, labels, refinement) for maps in cams])

    def ours():
        return refine_pseudo_labels(images, cams, labels, LOW, HIGH, ignore_index=IGNORE, refinement=refinement)

    with torch.no_grad():
        equal = float((reference() == ours()).float().mean())
        times = time_in_turns({"reference": reference, "ours": ours}, rounds)
    return {
        "crop_size": size,
        "batch_size": batch_size,
        "equal_pixels": equal,
        "variants": times,
        "ratio": median_ratio(times["reference"], times["ours"]),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=448, help="side of the images (default: 448)")
    parser.add_argument("--batch_size", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    figures = measure(args.size, args.batch_size, args.rounds)
    print(f"| labels of {args.batch_size} images, {args.size} px, 3 sets of CAMs | s | times as fast |")
    print("| --- | ---: | ---: |")
    print(f"| reference's order | {figures['variants']['reference']['seconds']:.2f} | 1.00 |")
    print(f"| ours | {figures['variants']['ours']['seconds']:.2f} | {figures['ratio']:.2f} |")
    print(f"Equal pixels: {100 * figures['equal_pixels']:.4f} %")
    save_record(args.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
