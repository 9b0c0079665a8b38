"""Pseudo-labels of a whole data set: palette PNGs shared over processes, resumable, with a manifest for review."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from synernet_hf.files import (
    LOCK_FILE,
    TEMPORARY_NAME,
    hold_folder,
    missing_extra,
    read_json,
    safe_file_names,
    write_json,
)


try:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list
except ModuleNotFoundError as error:
    raise missing_extra("train", error) from error

from synernet_hf.data.checks import DECODING_ERRORS
from synernet_hf.data.schema import check_on_bad_image, class_names, multi_hot, name_some, record_features
from synernet_hf.model import (
    PreparedBatch,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    SynerNetPixelAdaptiveRefinement,
    generate_image_cams,
    open_image,
    predict_labels,
    prepare_image,
    resize_maps,
    segment_images,
)
from synernet_hf.model.refinement_synernet import refine_present
from synernet_hf.progress import progress_bar, write_message
from synernet_hf.pseudo_label_files import (
    MANIFEST_FILE,
    MASK_FOLDER,
    REVIEW_FILES,
    SETTINGS_FILE,
    build_manifest,
    file_names,
    mask_record,
    read_manifest,
    write_manifest,
    write_mask,
)


MAPS = ("pseudo_label", "segmentation")
LABEL_SOURCES = ("auto", "known", "predicted")
# fields of a configuration that say where it came from
ORIGIN_FIELDS = ("_name_or_path", "transformers_version", "auto_map")


@dataclass(frozen=True)
class PseudoLabelOptions:
    """
    Which label map to make of an image, and of which images.

    Args:
        map (`str`, *optional*, defaults to `"pseudo_label"`): `"pseudo_label"`: the fused CAM under two background
            hypotheses, refined by the image's colours, 255 where they leave a pixel open. `"segmentation"`: the
            decoders' multi-scale segmentation, limited to the image's classes and background; decides every pixel.
        label_source (`str`, *optional*, defaults to `"auto"`): Which classes an image may show: `"known"`, those of
            its record (none: all background); `"predicted"`, those that the classifier finds (a logit above 0);
            `"auto"`, known where the record has one at least, predicted elsewhere.
        scales (`tuple[float, ...]`, *optional*): Scales at which an image is seen. Default: `config.cam_scales`, for a
            segmentation `config.inference_scales`.
        flip (`bool`, *optional*): Also see the mirror of every scale. Default: `config.cam_flip`, for a segmentation
            `False`.
        num_shards (`int`, *optional*, defaults to 1), shard (`int`, *optional*): In how many shares the images are made,
            and which one, from 0. Default: all images.

    Raises:
        ValueError: A choice is unknown, a scale is not positive, or there is no such shard.
    """

    map: str = "pseudo_label"
    label_source: str = "auto"
    scales: tuple[float, ...] | None = None
    flip: bool | None = None
    num_shards: int = 1
    shard: int | None = None

    def __post_init__(self) -> None:
        for name, value, choices in (("map", self.map, MAPS), ("label_source", self.label_source, LABEL_SOURCES)):
            if value not in choices:
                raise ValueError(f"`{name}` is {value!r}; one of {', '.join(choices)} is expected.")
        if self.scales is not None and not (self.scales and all(0 < scale < float("inf") for scale in self.scales)):
            raise ValueError(f"`scales` is {self.scales}; positive factors such as (1.0, 1.25) are expected.")
        if self.num_shards < 1 or self.shard not in (range(self.num_shards) if self.num_shards > 1 else (None, 0)):
            raise ValueError(f"`shard` is {self.shard} of {self.num_shards}; a number from 0 of several is expected.")


@dataclass
class PseudoLabeler:
    """
    Makes the pseudo-label of one image.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model, unwrapped, on its device, in evaluation mode.
        processor ([`SynerNetImageProcessor`]): Saved with the model.
        options ([`PseudoLabelOptions`], *optional*): What to make.
    """

    model: SynerNetForWeaklySupervisedSegmentation
    processor: SynerNetImageProcessor
    options: PseudoLabelOptions = PseudoLabelOptions()

    @torch.no_grad()
    def __call__(
        self, image: Image.Image, label_ids: Sequence[int] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """
        Labels the pixels of one image, alone in its forward passes, so that no other image has an influence.

        Args:
            image (`PIL.Image.Image`): Of any size and mode.
            label_ids (`Sequence[int]`, *optional*): Its labels, 0-based ids over the foreground classes.

        Returns:
            `tuple[np.ndarray, dict]`: the label map, uint8 of shape `(height, width)`, 0 background and 255 undecided;
            and `width`, `height`, `labels` (ids of the classes it could show), `label_source` (`"known"` or
            `"predicted"`), `found` (ids of the classes it shows), `confidence` (in [0, 1]: the mean share of layers
            and branches that agree on a pixel, of a segmentation the mean probability of the chosen class), `coverage`
            (share of decided pixels) and `foreground` (share of pixels with a class).
        """
        prepared = prepare_image(self.processor, image)
        source = _label_source(self.options, label_ids)
        labels = [multi_hot(label_ids, self.model.config.num_labels - 1)] if source == "known" else "predicted"
        make = self._pseudo_label if self.options.map == "pseudo_label" else self._segmentation
        label_map, confidence, labels = make(prepared, labels)
        label_map = label_map.to("cpu", torch.uint8).numpy()
        found = [int(class_id) for class_id in np.unique(label_map) if 0 < class_id < 255]
        return label_map, {
            "width": image.width,
            "height": image.height,
            "labels": (labels.nonzero()[:, 0] + 1).tolist(),
            "label_source": source,
            "found": found,
            "confidence": round(float(confidence), 6),
            "coverage": round(float((label_map != 255).mean()), 6),
            "foreground": round(float(((label_map != 0) & (label_map != 255)).mean()), 6),
        }

    def _pseudo_label(self, prepared, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config, options, batch = self.model.config, self.options, PreparedBatch([prepared])
        if labels == "predicted":
            labels = predict_labels(self.model, self.processor, batch)
        # the label itself is refined below
        wanted = {"scales": options.scales, "flip": options.flip, "all_classes": False}
        [cams] = generate_image_cams(self.model, self.processor, batch, labels, refine=False, **wanted)
        pixels = torch.from_numpy(np.array(prepared.image)).to(self.model.device).permute(2, 0, 1).float() / 255
        [label_map] = refine_present(
            pixels[None],
            [resize_maps(cams["fused_cams"], tuple(pixels.shape[1:]))[None]],
            cams["present"],
            config.low_threshold,
            config.high_threshold,
            refinement=SynerNetPixelAdaptiveRefinement(config.refinement_dilations, config.refinement_iterations),
        )
        # ids and 255 cannot be mixed: the nearest pixel of an image that was shrunk
        label_map = F.interpolate(label_map[None].float(), size=prepared.size)[0, 0]
        return label_map, cams["confidence"].float().mean(), labels[0]

    def _segmentation(self, prepared, labels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scales, flip = self.options.scales, bool(self.options.flip)
        [segmented] = segment_images(self.model, self.processor, [prepared], labels, scales, flip)
        return segmented.label_map, segmented.probabilities().mean(), segmented.labels


def _label_source(options: PseudoLabelOptions, label_ids: Sequence[int] | None) -> str:
    """`"known"` or `"predicted"`: whose classes the options choose for an image with these labels."""
    if options.label_source == "auto":
        return "known" if label_ids else "predicted"
    return options.label_source


def write_pseudo_labels(
    model: SynerNetForWeaklySupervisedSegmentation,
    processor: SynerNetImageProcessor,
    dataset: datasets.Dataset,
    output_dir: str | Path,
    options: PseudoLabelOptions | None = None,
    accelerator: Accelerator | None = None,
    on_bad_image: str = "raise",
    progress: bool = False,
) -> pa.Table:
    """
    Writes the pseudo-label of every image and a manifest of them; a repeated call makes only what is missing.

    The folder holds `masks/IMAGE_ID.png` ([`~synernet_hf.files.safe_file_names`]; VOC palette, 255 = undecided),
    `manifest.parquet` and `pseudo_labels.json` (what made them). A mask belongs to the content and the labels of its
    image: it is made again where they differ, and where its pixels are not those that were written. Every file appears
    whole or not at all. Files are equal byte for byte for any number of processes and after any interruption, on one kind
    of device and with the same number of threads per process. Shards may be made at once, in one folder or in several, and
    write no manifest: a call for all images, where all masks are together, checks them, makes what is missing, and does.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model, unwrapped, on its device. Its training mode is
            restored afterwards.
        processor ([`SynerNetImageProcessor`]): Saved with the model.
        dataset (`datasets.Dataset`): Records with `image`, `image_id` (unique) and, unless labels are to be predicted,
            `labels`. A `mask` column is not read.
        output_dir (`str` or `Path`): New folder, or one that was made with the same model and options.
        options ([`PseudoLabelOptions`], *optional*): What to make.
        accelerator (`accelerate.Accelerator`, *optional*): Shares the images over its processes, all of which must
            call this function.
        on_bad_image (`str`, *optional*, defaults to `"raise"`): `"raise"` stops at the first image that does not
            decode, `"skip"` names and leaves out such images.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar on the first process.

    Returns:
        `pyarrow.Table`: the manifest, least confident image first: `image_id`, `mask` (path in the folder), `file_name`
        (of the image, below the folder that all are in), `classes` (names of the classes it could show), `missing_classes` (those of them it does not show), and `width`,
        `height`, `label_source`, `confidence`, `coverage` and `foreground` as [`PseudoLabeler`] returns them, and
        `pixels`, the SHA-256 of the label map's bytes. Of a shard, its own rows.

    Raises:
        ValueError: The split lacks a column, is empty, has other classes than the model, or an identifier that is no
            file name or occurs twice; the folder was made with another model or other options, or another process
            writes into it; or an image does not decode.
    """
    output_dir, options = Path(output_dir), options or PseudoLabelOptions()
    check_on_bad_image(on_bad_image)
    first, step = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    _check_classes(model, dataset, options)
    dataset = dataset.with_format(None)
    records = _wanted_records(dataset, options)[options.shard or 0 :: options.num_shards]
    part = None if options.shard is None else (options.shard, options.num_shards)
    settings = _settings(model, processor, options)
    _check_same_settings(output_dir, settings)
    share = None if accelerator is None else lambda problem: broadcast_object_list([problem])[0]
    with hold_folder(output_dir, first == 0, share, part):
        if first == 0:
            _prepare_folder(output_dir, settings, None if part is None else {record["mask"] for record in records})
        _wait(accelerator)
        # another shard may have begun meanwhile
        _check_same_settings(output_dir, settings)
        labeler = PseudoLabeler(model, processor, options)
        return _write_all(labeler, dataset, records, output_dir, accelerator, on_bad_image, progress)


def _write_all(
    labeler: PseudoLabeler,
    dataset: datasets.Dataset,
    records: list[dict[str, Any]],
    output_dir: Path,
    accelerator: Accelerator | None,
    on_bad_image: str,
    progress: bool,
) -> pa.Table:
    """Makes this process's share of what is missing, then the manifest."""
    model, options = labeler.model, labeler.options
    settings = hashlib.sha256((output_dir / SETTINGS_FILE).read_bytes()).hexdigest()
    first, step = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    images = dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    was_training, made, share = model.training, [], records[first::step]
    model.eval()
    try:
        for record in progress_bar(share, desc="pseudo-labels", disable=not progress or first > 0):
            path = output_dir / record["mask"]
            try:
                image = images[record["index"]]["image"]
                content = Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]
                made_of = {"image": hashlib.sha256(content).hexdigest(), "settings": settings}
                if _is_current(mask_record(path), record, made_of, options):
                    continue
                image = open_image(content)
            except DECODING_ERRORS as error:
                fault = f"The image {record['image_id']} does not decode ({error})"
                if on_bad_image == "raise":
                    raise ValueError(
                        f"{fault}: repair it, or leave such images out (on_bad_image='skip', on the command line "
                        "--on_bad_image skip)."
                    ) from error
                write_message(f"{fault}: it gets no mask.")
                path.unlink(missing_ok=True)
                continue
            label_map, found = labeler(image, record["labels"])
            write_mask(path, label_map, found | made_of)
            made.append(record["image_id"])
    finally:
        model.train(was_training)
    if progress and first == 0 and 0 < len(made) < len(share):
        write_message(f"{len(made)} of {len(share)} masks were missing or other: {name_some(made)}.")
    _wait(accelerator)
    if options.shard is not None:
        return build_manifest(output_dir, records, model.config.id2label)
    if first == 0:
        paths = (image["path"] for batch in images.iter(100) for image in batch["image"])
        for record, name in zip(
            records, file_names(zip((record["mask"] for record in records), paths, strict=True)), strict=True
        ):
            record["file_name"] = name
        rows = build_manifest(output_dir, records, model.config.id2label)
        write_manifest(output_dir, rows)
    _wait(accelerator)
    manifest = pq.read_table(output_dir / MANIFEST_FILE)
    if len(manifest) == 0:
        raise ValueError(f"None of the {len(records)} images decodes; there is nothing to label.")
    return manifest


def with_pseudo_labels(dataset: datasets.Dataset, folder: str | Path, min_confidence: float = 0.0) -> datasets.Dataset:
    """
    Joins images with the pseudo-labels made of them, for training any segmentation model.

    Args:
        dataset (`datasets.Dataset`): The records that the pseudo-labels were made of.
        folder (`str` or `Path`): What [`write_pseudo_labels`] wrote.
        min_confidence (`float`, *optional*, defaults to 0.0): Leaves out images whose `confidence` in the manifest is
            below.

    Returns:
        `datasets.Dataset`: the records that have a pseudo-label, with it in the column `mask`; `labels` are those
        of the manifest where the records have none.

    Raises:
        FileNotFoundError: The folder has no manifest or settings.
        ValueError: No record is left, or the records carry another class list than the masks.
    """
    dataset = dataset.with_format(None)
    names, rows = read_manifest(Path(folder))
    if "labels" in dataset.column_names:
        given = class_names(datasets.DatasetDict(split=dataset))
        if given != names:
            raise ValueError(
                f"The data set's classes ({name_some(given)}) are not those of the masks in {folder} "
                f"({name_some(names)}), in this order: load it with the masks' class list (class_names)."
            )
    rows = {row["image_id"]: row for row in rows if row["confidence"] >= min_confidence}
    chosen = [index for index, image_id in enumerate(map(str, dataset["image_id"][:])) if image_id in rows]
    if not chosen:
        raise ValueError(
            f"None of the {len(dataset)} images has a pseudo-label in {folder} with a confidence of {min_confidence} "
            "or more: give the data set that they were made of, or a lower bound."
        )
    dataset = dataset.remove_columns("mask") if "mask" in dataset.column_names else dataset
    dataset = dataset.select(chosen)
    rows = [rows[str(image_id)] for image_id in dataset["image_id"][:]]
    if "labels" not in dataset.column_names:
        labels = [[names.index(name) - 1 for name in row["classes"]] for row in rows]
        dataset = dataset.add_column("labels", labels, feature=record_features(names)["labels"])
    paths = [{"path": str(Path(folder) / row["mask"]), "bytes": None} for row in rows]
    return dataset.add_column("mask", paths, feature=datasets.Image())


def _wait(accelerator: Accelerator | None) -> None:
    if accelerator is not None:
        accelerator.wait_for_everyone()


def _check_classes(model, dataset: datasets.Dataset, options: PseudoLabelOptions) -> None:
    needed = ["image", "image_id"] + ["labels"] * (options.label_source == "known")
    missing = [name for name in needed if name not in dataset.column_names]
    if missing or len(dataset) == 0:
        fault = f"lacks the columns {', '.join(missing)}" if missing else "is empty"
        raise ValueError(f"The split to label {fault}; give records as docs/data.md describes them.")
    if model.config.num_labels > 255:
        raise ValueError(f"The model has {model.config.num_labels} classes; a palette mask holds 255 at most.")
    if options.label_source == "predicted" or "labels" not in dataset.column_names:
        return
    known = [model.config.id2label[index] for index in range(model.config.num_labels)]
    names = class_names(datasets.DatasetDict(split=dataset))
    if names != known:
        raise ValueError(
            f"The data set's classes ({name_some(names)}) are not the model's ({name_some(known)}), in this order: give "
            "the data set the model was trained for, or have the classes predicted."
        )


def _wanted_records(dataset: datasets.Dataset, options: PseudoLabelOptions) -> list[dict[str, Any]]:
    """What is known of each image before it is opened: `index`, `image_id`, `mask` (path), `labels`."""
    image_ids, labels = list(map(str, dataset["image_id"][:])), [None] * len(dataset)
    if options.label_source != "predicted" and "labels" in dataset.column_names:
        labels = dataset["labels"][:]
    places: dict[str, int] = {}
    for index, image_id in enumerate(image_ids):
        if not image_id.strip("/") or image_id.startswith("/") or ".." in image_id.split("/"):
            raise ValueError(
                f"The image identifier {image_id!r} cannot name a mask: rename it without a leading / or `..`."
            )
        if places.setdefault(image_id, index) != index:
            raise ValueError(f"The image identifier {image_id!r} occurs twice: identifiers name the masks.")
    names = [f"{MASK_FOLDER}/{name}" for name in safe_file_names(image_ids, ".png")]
    return [
        {"index": index, "image_id": image_id, "mask": mask, "labels": label_ids}
        for index, (image_id, mask, label_ids) in enumerate(zip(image_ids, names, labels, strict=True))
    ]


def _is_current(content: dict[str, Any] | None, record: dict, made_of: dict, options: PseudoLabelOptions) -> bool:
    """Whether a mask was made of this file with these settings, for these image labels."""
    if content is None or any(content.get(name) != digest for name, digest in made_of.items()):
        return False
    source = _label_source(options, record["labels"])
    wanted = [label + 1 for label in record["labels"] or ()]
    return content["label_source"] == source and (source != "known" or content["labels"] == wanted)


def _settings(model, processor, options: PseudoLabelOptions) -> dict[str, Any]:
    """Everything that decides the masks apart from the images and their labels."""
    digest = hashlib.sha256()
    for part in (model.config, processor):
        text = json.dumps(part.to_dict(), sort_keys=True, default=str)
        content = json.loads(text, object_hook=lambda item: {k: v for k, v in item.items() if k not in ORIGIN_FIELDS})
        digest.update(json.dumps(content).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    config = model.config
    is_label = options.map == "pseudo_label"
    scales = options.scales or (config.cam_scales if is_label else config.inference_scales)
    flip = (is_label and config.cam_flip) if options.flip is None else options.flip
    return {
        "model": digest.hexdigest(),
        "map": options.map,
        "label_source": options.label_source,
        "scales": [float(scale) for scale in scales],
        "flip": bool(flip),
        "id2label": {str(key): name for key, name in config.id2label.items()},
    }


def _check_same_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"{output_dir} is a file; give a folder for the pseudo-labels.")
    try:
        earlier = read_json(output_dir / SETTINGS_FILE)
        earlier = earlier if isinstance(earlier, dict) else {}
    except ValueError:
        # missing or damaged: each mask knows what made it
        own = {MASK_FOLDER, MANIFEST_FILE, SETTINGS_FILE, *REVIEW_FILES}
        names = [path.name for path in output_dir.glob("*") if not path.name.startswith(LOCK_FILE)]
        foreign = [name for name in names if name not in own and not TEMPORARY_NAME.fullmatch(name)]
        if foreign:
            names = name_some(sorted(foreign))
            raise ValueError(f"{output_dir} holds other things ({names}); give a new folder.") from None
        return
    other = [name for name, value in settings.items() if earlier.get(name) != value]
    if other:
        raise ValueError(
            f"The pseudo-labels in {output_dir} were made with another {', '.join(other)}; give a new folder, or the "
            "earlier settings to go on."
        )


def _prepare_folder(output_dir: Path, settings: dict[str, Any], masks: set[str] | None) -> None:
    """Removes half-written files, of these `masks` alone if others may be being written, and writes the settings."""
    (output_dir / MASK_FOLDER).mkdir(parents=True, exist_ok=True)
    for path in output_dir.rglob(".*.tmp"):
        name = TEMPORARY_NAME.fullmatch(path.name)
        if name and (masks is None or path.with_name(name["name"]).relative_to(output_dir).as_posix() in masks):
            path.unlink(missing_ok=True)
    write_json(output_dir / SETTINGS_FILE, settings)


__all__ = [
    "LABEL_SOURCES",
    "MAPS",
    "PseudoLabelOptions",
    "PseudoLabeler",
    "with_pseudo_labels",
    "write_pseudo_labels",
]
