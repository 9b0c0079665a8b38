"""
Train any semantic segmentation model of transformers on pseudo-labels, with the stock Trainer:

    python examples/train_on_pseudo_labels.py --pseudo_labels pseudo_labels --data_dir path/to/VOCdevkit \
        --model nvidia/mit-b0 --output_dir runs/segformer --max_steps 2000 --per_device_train_batch_size 8

Further options are those of `transformers.TrainingArguments`. Where the validation split has masks, the model is scored
on it at the size it sees, which is quick and not the protocol of the benchmarks.
"""

import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from synernet_hf.cli import answer_early, needs_extra, run_command
from synernet_hf.files import is_hub_id


with needs_extra("train"):
    from synernet_hf.training import data_parser, read_data_arguments


@dataclass
class SegmenterArguments:
    """What is trained, and on which masks."""

    pseudo_labels: str = field(metadata={"help": "Folder that `synernet pseudo-labels` wrote."})
    model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of a model or encoder, such as nvidia/mit-b0."}
    )
    model_config: str | None = field(
        default=None, metadata={"help": "Configuration of a model with random weights, as JSON with a model_type."}
    )
    size: int = field(default=512, metadata={"help": "Height and width that images are resized to."})
    check_data: bool = field(default=True, metadata={"help": "Decode every image before the training starts."})
    min_confidence: float = field(default=0.0, metadata={"help": "Leave out images that are less confident."})


def read_own_options() -> None:
    """Check the command line as far as that needs no transformers; its options are known by name only."""
    parser = data_parser(SegmenterArguments, description=__doc__)
    source = Path(importlib.util.find_spec("transformers").origin).with_name("training_args.py")
    names = re.findall(r"^    (\w+): ", source.read_text(encoding="utf-8"), re.MULTILINE)
    parser.further_options = [f"--{name}" for name in names]
    known, words = parser.parse_known_args()
    options = {word: word.split("=")[0].replace("-", "_").removeprefix("__") for word in words}
    parser.refuse(
        [word for word, name in options.items() if name.removeprefix("no_") not in names and word[:2] == "--"]
    )
    check_model(known)


def check_model(args: Any) -> None:
    """Find what is wrong with the model's options without loading anything."""
    if (args.model is None) == (args.model_config is None):
        raise ValueError("Give either --model, a folder or Hub id, or --model_config, a configuration as JSON.")
    if args.model is not None and not Path(args.model).is_dir() and not is_hub_id(args.model):
        raise ValueError(f"--model {args.model}: no such folder; give the folder or the Hub id owner/name of a model.")
    if args.model_config is not None:
        try:
            settings = json.loads(args.model_config)
        except (ValueError, RecursionError):
            settings = None
        if not isinstance(settings, dict) or "model_type" not in settings:
            raise ValueError(f"--model_config must be JSON with a model_type, got {args.model_config[:80]!r}.")


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(read_own_options)

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerImageProcessorPil,
    Trainer,
    TrainingArguments,
)

from synernet_hf.metrics import MeanIoU
from synernet_hf.model import open_image


with needs_extra("train"):
    import datasets
    from accelerate import PartialState

    from synernet_hf.data import class_names, id2label_from
    from synernet_hf.pseudo_labels import with_pseudo_labels
    from synernet_hf.training import check_on_main_process, load_data


class SegmentationDataset(torch.utils.data.Dataset):
    """Images and masks of one size; `mirror` flips each image with probability 0.5."""

    def __init__(self, dataset: datasets.Dataset, processor: SegformerImageProcessorPil, mirror: bool = False) -> None:
        self.dataset = dataset.select_columns(["image", "mask"])
        self.processor = processor
        self.mirror = mirror

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        record = self.dataset[index]
        inputs = self.processor(open_image(record["image"]), segmentation_maps=record["mask"], return_tensors="pt")
        # (3, S, S) and (S, S)
        item = {"pixel_values": inputs["pixel_values"][0], "labels": inputs["labels"][0].long()}
        if self.mirror and torch.rand(()) < 0.5:
            item = {name: tensor.flip(-1) for name, tensor in item.items()}
        return item


def build_model(args: SegmenterArguments, names: list[str]) -> PreTrainedModel:
    """A pretrained model with a new head for these classes, or one of random weights."""
    id2label = id2label_from(names)
    labels = {"id2label": id2label, "label2id": {name: index for index, name in id2label.items()}}
    if args.model is not None:
        return AutoModelForSemanticSegmentation.from_pretrained(args.model, ignore_mismatched_sizes=True, **labels)
    settings = json.loads(args.model_config)
    return AutoModelForSemanticSegmentation.from_config(AutoConfig.for_model(**settings | labels))


def build_processor(args: SegmenterArguments) -> SegformerImageProcessorPil:
    """Resizes and normalises images with the model's mean and deviation, and resizes masks."""
    colours = {}
    if args.model is not None:
        try:
            processor = AutoImageProcessor.from_pretrained(args.model)
            colours = {"image_mean": processor.image_mean, "image_std": processor.image_std}
        except (OSError, ValueError):
            print(f"{args.model} has no image processor: ImageNet's mean and deviation are used.")
    # ids stay as they are: 0 is a class here, the background
    return SegformerImageProcessorPil(
        size={"height": args.size, "width": args.size}, do_reduce_labels=False, **colours
    )


def predicted_ids(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Label maps `(B, S, S)` of the masks' size, so that the Trainer keeps no logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear").argmax(dim=1)


class Scores:
    """Mean IoU over the batches of an evaluation, for `Trainer(compute_metrics=…)` with `batch_eval_metrics`."""

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self.metric = MeanIoU(num_labels, 255)

    def __call__(self, evaluated: Any, compute_result: bool) -> dict[str, float]:
        for prediction, mask in zip(evaluated.predictions, evaluated.label_ids, strict=True):
            self.metric.update(torch.as_tensor(prediction), np.asarray(torch.as_tensor(mask).cpu()))
        if not compute_result:
            return {}
        scores = self.metric.compute()
        self.metric = MeanIoU(self.num_labels, 255)
        return {
            "mean_iou_present": float(scores["mean_iou_present"]),
            "pixel_accuracy": float(scores["pixel_accuracy"]),
        }


def train(data_args: Any, args: SegmenterArguments, training_args: TrainingArguments) -> None:
    """Join images and pseudo-labels, train, score, save."""
    check_model(args)
    data_args = read_data_arguments(data_args)
    data_args.check_data = args.check_data
    splits = check_on_main_process(load_data(data_args), data_args, PartialState())
    names = class_names(splits)
    images = with_pseudo_labels(splits["train"], args.pseudo_labels, args.min_confidence)
    model = build_model(args, names)
    processor = build_processor(args)
    scored = "validation" in splits and "mask" in splits["validation"].column_names
    training_args.batch_eval_metrics = True
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=SegmentationDataset(images, processor, mirror=True),
        eval_dataset=SegmentationDataset(splits["validation"], processor) if scored else None,
        processing_class=processor,
        compute_metrics=Scores(len(names)),
        preprocess_logits_for_metrics=predicted_ids,
    )
    print(f"{len(images)} of {len(splits['train'])} images have a pseudo-label to train on")
    trainer.train()
    trainer.save_model()
    if scored:
        scores = trainer.evaluate()
        print(f"mean IoU at {args.size} px over the classes present: {100 * scores['eval_mean_iou_present']:.1f} %")
    print(f"model: {training_args.output_dir}")


def main(argv: list[str] | None = None) -> int:
    """Run the script; return its exit code."""
    parser = data_parser(SegmenterArguments, TrainingArguments, description=__doc__.splitlines()[1])
    return run_command(lambda: train(*parser.parse_args_into_dataclasses(argv)))


if __name__ == "__main__":
    sys.exit(main())
