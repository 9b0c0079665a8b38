"""One mask as polygons or as packed runs, and back."""

from collections.abc import Sequence

import numpy as np


# Label Studio packs masks as runs of bytes: bits of a byte, and bits of the four kinds of lengths
BYTE_BITS, LENGTH_BITS = 8, (3, 4, 8, 16)


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """
    Outlines the connected parts of a mask (neighbours share an edge) a quarter of a pixel inside their edges, where
    filling by pixel centres gives the mask back, and OpenCV's `fillPoly` after rounding down all of it but the cuts.

    Args:
        mask (`np.ndarray` of dtype bool and shape `(height, width)`): The mask.

    Returns:
        `list[np.ndarray]`: per part a polygon of shape `(points, 2)`, x and y in pixels, to fill by the even-odd rule.
        A hole is joined to its outline by a cut of no width.
    """
    around = np.pad(mask, 1)
    # the four pixels around each corner of the pixel grid: (height + 1, width + 1)
    top_left, top_right, low_left, low_right = around[:-1, :-1], around[:-1, 1:], around[1:, :-1], around[1:, 1:]
    crossing = (top_left == low_right) & (top_right == low_left) & (top_left != top_right)
    turns = (top_left ^ top_right ^ low_left ^ low_right) + 2 * crossing
    y, x = np.nonzero(turns)
    repeats = turns[y, x]
    y, x = np.repeat(y, repeats), np.repeat(x, repeats)
    if not len(y):
        return []
    # two outlines touch where pixels cross: the first copy of the corner ends the edge on its left
    second = np.r_[False, (y[1:] == y[:-1]) & (x[1:] == x[:-1])]
    pixels = [part[y, x].astype(int) for part in (top_left, top_right, low_left, low_right)]
    is_crossing, is_swapped = crossing[y, x], crossing[y, x] & top_right[y, x]
    order = np.lexsort((second ^ is_swapped, y, x))
    above_or_below = np.empty(len(y), dtype=np.int64)
    above_or_below[order[::2]], above_or_below[order[1::2]] = order[1::2], order[::2]
    # towards the mask
    right = np.where(is_crossing, 2 * second - 1, pixels[1] + pixels[3] - pixels[0] - pixels[2])
    down = np.where(is_crossing, 2 * (second ^ is_swapped) - 1, pixels[2] + pixels[3] - pixels[0] - pixels[1])
    corners = np.stack((x, y), axis=1)
    return _joined(mask, _rings(above_or_below.tolist()), corners, corners + np.stack((right, down), axis=1) / 4)


def _rings(above_or_below: list[int]) -> list[list[int]]:
    """Walks along the edges: positions of the corners of each ring from its first one (top, then left)."""
    rings, seen = [], bytearray(len(above_or_below))
    for start in range(len(above_or_below)):
        ring, place = [], start
        while not seen[place]:
            # corners of a row are joined in pairs
            across = place ^ 1
            seen[place] = seen[across] = True
            ring += [place, across]
            place = above_or_below[across]
        if ring:
            rings.append(ring)
    return rings


def _joined(mask: np.ndarray, rings: list[list[int]], corners: np.ndarray, drawn: np.ndarray) -> list[np.ndarray]:
    """Polygons of outer rings, each with the rings of its holes; corners are `drawn` at other places than they are."""
    # the ring that each upright edge of a pixel belongs to
    owner = np.full((mask.shape[0], mask.shape[1] + 1), -1, dtype=np.int32)
    polygons: dict[int, np.ndarray] = {}
    part_of: list[int] = []
    for number, ring in enumerate(rings):
        points = corners[ring]
        ends = np.roll(points[::2], -1, axis=0)
        for (column, low), (_, high) in zip(points[1::2].tolist(), ends.tolist(), strict=True):
            owner[min(low, high) : max(low, high), column] = number
        (left, top), points = points[0], drawn[ring]
        if mask[top, left]:
            part_of.append(number)
            polygons[number] = points
            continue
        # the nearest edge on the left of the pixel above belongs to the same part, and began above
        part = part_of[owner[top - 1, np.flatnonzero(owner[top - 1, : left + 1] >= 0)[-1]]]
        part_of.append(part)
        outer = polygons[part]
        at = int(np.square(outer - points[0]).sum(axis=1).argmin())
        polygons[part] = np.concatenate((outer[: at + 1], points, points[:1], outer[at:]))
    return list(polygons.values())


def pack_runs(mask: np.ndarray) -> list[int]:
    """
    Packs a mask as Label Studio's brush does: runs of equal bytes of an RGBA image, white and opaque where the mask is.

    Args:
        mask (`np.ndarray` of dtype bool and shape `(height, width)`): The mask.

    Returns:
        `list[int]`: the bytes.
    """
    flat = mask.ravel()
    starts = np.r_[0, np.flatnonzero(flat[1:] != flat[:-1]) + 1]
    bits = [f"{4 * flat.size:032b}{BYTE_BITS - 1:05b}", *(f"{size - 1:04b}" for size in LENGTH_BITS)]
    for start, length in zip(starts.tolist(), np.diff(starts, append=flat.size).tolist(), strict=True):
        value, rest = 255 * bool(flat[start]), 4 * length
        while rest:
            taken = min(rest, 1 << LENGTH_BITS[-1])
            kind = next(kind for kind, size in enumerate(LENGTH_BITS) if taken <= 1 << size)
            bits.append(f"1{kind:02b}{taken - 1:0{LENGTH_BITS[kind]}b}{value:08b}")
            rest -= taken
    text = "".join(bits)
    return np.packbits(np.frombuffer(text.encode(), dtype=np.uint8) - ord("0")).tolist()


def unpack_runs(packed: Sequence[int], height: int, width: int) -> np.ndarray:
    """
    Reads what [`pack_runs`] or Label Studio wrote.

    Args:
        packed (`Sequence[int]`): The bytes.
        height (`int`), width (`int`): Of the image.

    Returns:
        `np.ndarray` of dtype bool and shape `(height, width)`: where the image is opaque.

    Raises:
        ValueError: The bytes are no such image.
    """
    text = "".join(f"{byte:08b}" for byte in packed)
    place = 0

    def number(size: int) -> int:
        nonlocal place
        place += size
        if place > len(text):
            raise ValueError("The packed mask ends too early.")
        return int(text[place - size : place], 2)

    total, size = number(32), number(5) + 1
    lengths = [number(4) + 1 for _ in range(4)]
    if total != 4 * height * width:
        raise ValueError(f"The packed mask has {total} values, but {width}x{height} pixels have {4 * height * width}.")
    values, filled = np.empty(total, dtype=np.uint8), 0
    while filled < total:
        is_run = number(1)
        count = min(number(lengths[number(2)]) + 1, total - filled)
        if is_run:
            values[filled : filled + count] = number(size) & 255
        else:
            values[filled : filled + count] = [number(size) & 255 for _ in range(count)]
        filled += count
    return values.reshape(height, width, 4)[..., 3] > 0


__all__ = ["outlines", "pack_runs", "unpack_runs"]
