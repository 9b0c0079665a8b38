"""The tables of the ablation, made of its tracked results: means over seeds, and their place in a document."""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from synernet_hf.files import read_json, write_text


# title of a column -> kind of prediction and score
SCORES = {
    "segmentation": ("segmentation", "mean_iou"),
    "B alone": ("broad_segmentation", "mean_iou"),
    "P alone": ("precise_segmentation", "mean_iou"),
    "labels given": ("segmentation_given_labels", "mean_iou"),
    "fused CAM": ("fused_cam", "mean_iou"),
    "class AP": ("classification", "mean_average_precision"),
    "background": ("segmentation", "per_class_iou", "background"),
}
CAMS = {
    "B-CAM": ("broad_cam", "mean_iou"),
    "P-CAM": ("precise_cam", "mean_iou"),
    "auxiliary B": ("broad_aux_cam", "mean_iou"),
    "auxiliary P": ("precise_aux_cam", "mean_iou"),
    "B recall": ("broad_cam", "foreground_recall"),
    "P recall": ("precise_cam", "foreground_recall"),
    "B precision": ("broad_cam", "foreground_precision"),
    "P precision": ("precise_cam", "foreground_precision"),
    "background": ("fused_cam", "per_class_iou", "background"),
}
# of the labels that teach the decoders, in the first and in the last tenth of training that has any
LABELS = {
    f"{letter} {measure}": (branch, measure, "mean")
    for measure in ("precision", "recall")
    for letter, branch in (("B", "broad"), ("P", "precise"))
}
LABELS |= {"differ": ("differ",)}
# columns that masks teach: of CAMs they are no ceiling
SHARED = ("segmentation", "B alone", "P alone", "labels given")
CEILING = "ceiling"
MARKED = re.compile(r"(<!-- ablation (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# row -> seed -> content of its file
Results = dict[str, dict[int, dict[str, Any]]]


def read_results(folder: Path, order: Sequence[str]) -> Results:
    """
    The results of one table, rows in the given order and seeds in theirs.

    Args:
        folder (`Path`): holds `ROW-seedN.json`. order (`Sequence[str]`): names of the rows.

    Raises:
        ValueError: if a file is of no row in `order`, or two seeds of a row have other settings.
    """
    found: Results = {}
    for path in sorted(folder.glob("*-seed*.json")):
        content = read_json(path)
        row, seed = content["row"], content["seed"]
        if row not in order or path.name != f"{row}-seed{seed}.json":
            raise ValueError(f"{path} holds {row}, seed {seed}, which is no such row: remove or rename it.")
        by_seed = found.setdefault(row, {})
        for other, earlier in by_seed.items():
            names = sorted(set(earlier["settings"]) | set(content["settings"]))
            names = [name for name in names if earlier["settings"].get(name) != content["settings"].get(name)]
            if names:
                raise ValueError(f"Seeds {other} and {seed} of {row} in {folder} differ in {', '.join(names)}.")
        by_seed[seed] = content
    return {row: dict(sorted(found[row].items())) for row in order if row in found}


def values_of(by_seed: dict[int, dict[str, Any]], path: Sequence[str | int]) -> list[float] | None:
    """One number of the content of every seed, `None` where a seed does not have it."""
    values = []
    for content in by_seed.values():
        value: Any = content
        for name in path:
            # an index into a list, or a key
            found = value and (isinstance(name, int) or name in value)
            value = value[name] if found else None
        if value is None or math.isnan(value):
            return None
        values.append(value)
    return values


def _cell(values: list[float] | None, scale: float = 100) -> str:
    if values is None:
        return "-"
    spread = f" ± {scale * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.1f}{spread}"


def _markdown(lines: list[list[str]]) -> str:
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(results: Results) -> str:
    """
    The tables in Markdown, percent, and what they were measured on: segmentation, CAMs, and the labels that taught the
    decoders in the first and the last tenth of training that has any, against the masks of the training images.
    """
    top = {column: values_of(results.get(CEILING, {}), ("scores", *SCORES[column])) for column in SHARED}
    scores, cams = [["row (seeds)", *SCORES]], [["row (seeds)", *CAMS, "minutes"]]
    labels = [["labels of training (seeds)", *LABELS]]
    for row, by_seed in results.items():
        title, cells = f"`{row}` ({len(by_seed)})", []
        for column, path in SCORES.items():
            values = values_of(by_seed, ("scores", *path))
            share = ""
            if values and row != CEILING and top.get(column):
                share = f" ({100 * statistics.mean(values) / statistics.mean(top[column]):.0f} %)"
            cells.append(_cell(values) + share)
        scores.append([title, *cells])
        minutes = [content["minutes"] for content in by_seed.values()]
        measured = [_cell(values_of(by_seed, ("scores", *path))) for path in CAMS.values()]
        cams.append([title, *measured, _cell(minutes, 1)])
        pairs = [[values_of(by_seed, ("labels", tenth, *path)) for tenth in (0, -1)] for path in LABELS.values()]
        if row != CEILING and any(first for first, _ in pairs):
            labels.append([title, *(" → ".join(map(_cell, pair)) if pair[0] else "-" for pair in pairs)])
    contents = [content for by_seed in results.values() for content in by_seed.values()]
    images = {content["scores"]["segmentation"]["num_images"] for content in contents}
    machines = {"{device}, {precision}, torch {torch}".format(**content["machine"]) for content in contents}
    revisions = {content["revision"] for content in contents}
    note = (
        f"Percent of {' or '.join(map(str, sorted(images)))} images, mean ± sample standard deviation over seeds"
        + (", in brackets the share of the ceiling" if top["segmentation"] else "")
        + f". {'; '.join(sorted(machines))}. Revision {', '.join(sorted(revisions))}."
    )
    return "\n\n".join([*(_markdown(table) for table in (scores, cams, labels) if len(table) > 1), note])


def filled(text: str, results: Path, order: Sequence[str]) -> str:
    """
    A document with every table between `<!-- ablation TABLE -->` and `<!-- end -->` made anew from `results`/TABLE;
    `ValueError` if there is nothing for a table.
    """

    def fill(match: re.Match) -> str:
        found = read_results(results / match[2], order)
        if not found:
            raise ValueError(
                f"{results / match[2]} holds no results for the table {match[2]}: add them, or remove it."
            )
        return f"{match[1]}\n{tables(found)}\n\n{match[3]}"

    return MARKED.sub(fill, text)


def write_tables(document: Path, results: Path, order: Sequence[str]) -> int:
    """Makes the tables of a document anew, see [`filled`]; returns their number."""
    text = document.read_text(encoding="utf-8")
    write_text(document, filled(text, results, order))
    return len(MARKED.findall(text))
