"""
Refined pseudo-labels of a batch: ours against the reference's order of work, with equal label maps.

    python benchmarks/refinement.py --output runs/refinement.json

The reference refines image by image and background plane by background plane, builds the affinity each time and takes
neighbours by dilated convolutions with one-hot kernels, of which it keeps all 48 results. Ours refines both planes and
all sets of CAMs of an image with one affinity. Two sets of CAMs (one for each branch) and one for the instances are
refined, as in a training step. The second row is ours called in the reference's order.
"""

import argparse
import math
import sys
from pathlib import Path

from synernet_hf.cli import CommandParser, answer_early, positive


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--size", type=int, default=448, help="side of the images (default: 448)")
    parser.add_argument("--batch_size", type=int, default=8, help="images (default: 8)")
    parser.add_argument("--rounds", type=positive, default=5, help="timed calls of each (default: 5)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse_arguments)

import torch
from side_by_side import median_ratio, save_record, time_in_turns
from torch.nn import functional as F

from synernet_hf.model import SynerNetPixelAdaptiveRefinement, refine_pseudo_labels


LOW, HIGH, IGNORE = 0.25, 0.5, 255


class ConvolvedRefinement(SynerNetPixelAdaptiveRefinement):
    """The same refinement, its neighbours taken by convolutions and kept."""

    def _stacked(self, maps: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = maps.shape
        kernel = torch.zeros(8, 1, 3, 3, dtype=maps.dtype, device=maps.device)
        for index, position in enumerate(place for place in range(9) if place != 4):
            kernel[index, 0, position // 3, position % 3] = 1
        single = maps.reshape(batch * channels, 1, height, width)
        found = [
            F.conv2d(F.pad(single, [dilation] * 4, mode="replicate"), kernel, dilation=dilation)
            for dilation in self.dilations
        ]
        return torch.cat(found, dim=1).reshape(batch, channels, -1, height, width)

    def affinity(self, images: torch.Tensor) -> torch.Tensor:
        neighbours = self._stacked(images)
        deviation = neighbours.std(dim=2, keepdim=True)
        difference = (neighbours - images[:, :, None]).abs() / (deviation + 1e-8) / self.colour_temperature
        colour = -difference.square().mean(dim=1)
        around = [math.hypot(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column]
        distances = torch.tensor([dilation * length for dilation in self.dilations for length in around])
        distances = distances.to(images)
        position = -(distances / (distances.std() + 1e-8) / self.colour_temperature).square()
        return colour.softmax(dim=1) + self.position_weight * position.softmax(dim=0)[None, :, None, None]

    def propagate(self, affinity: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        for _ in range(self.num_iterations):
            maps = (self._stacked(maps) * affinity[:, None]).sum(dim=2)
        return maps


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
    ours, convolved = SynerNetPixelAdaptiveRefinement(), ConvolvedRefinement()
    variants = {
        "reference": lambda: torch.stack([reference_labels(images, maps, labels, convolved) for maps in cams]),
        "ours in the reference's order": lambda: torch.stack(
            [reference_labels(images, maps, labels, ours) for maps in cams]
        ),
        "ours": lambda: refine_pseudo_labels(images, cams, labels, LOW, HIGH, refinement=ours),
    }
    with torch.no_grad():
        equal = float((variants["reference"]() == variants["ours"]()).float().mean())
        times = time_in_turns(variants, rounds)
    for entry in times.values():
        entry["times_as_fast"] = median_ratio(times["reference"], entry)
    return {"crop_size": size, "batch_size": batch_size, "equal_pixels": equal, "variants": times}


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    args = parse_arguments(argv)
    figures = measure(args.size, args.batch_size, args.rounds)
    print(f"| labels of {args.batch_size} images, {args.size} px, 3 sets of CAMs | s | times as fast |")
    print("| --- | ---: | ---: |")
    for name, entry in figures["variants"].items():
        print(f"| {name} | {entry['seconds']:.2f} | {entry['times_as_fast']:.2f} |")
    print(f"Equal pixels: {100 * figures['equal_pixels']:.4f} %")
    save_record(args.output, figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
