"""
One training step against a baseline in the reference's order of work, with the same weights, data and losses.

    python benchmarks/training_step.py --size tiny --dtype float32 --output runs/training_step.json

    python benchmarks/training_step.py --size base --dtype float32 bfloat16 --compile --output runs/training_step.json

The baseline is written from the method, with the functions of this package where the order of work does not differ:
explicit attention; one CAM call per branch, in which both branches run with their decoders and one is dropped; one
label map per branch and one more for the instances, each image and background plane refined alone with an affinity
of its own and neighbours taken by convolutions, as `refinement.py` does. Settings are those of the recipe
`voc12_authors` with all gates open. `--approximate` adds steps that compute less and therefore something else: CAMs of
the training pass alone (`cam_scales` of 1 without mirrored views), and decoders as wide as the encoder with it.
`--gains` adds our step with one saving undone at a time, and the step before the gate of the segmentation loss opens.

Each variant's loss is read and its parts are timed first; then whole steps are timed in turns, on weights that do not
move. On one thread of a CPU the seconds are those of the process, which other work on the machine lengthens less than
those of the wall. MFU is the matrix arithmetic that PyTorch counts in a variant's step (what it runs, not what it could
leave out), over its time and the rate measured for a large matrix product in the same format.
"""

import argparse
import copy
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from synernet_hf.cli import CommandParser, answer_early, needs_extra, run_command


with needs_extra("train"):
    from synernet_hf.training import read_recipe


# width, blocks and heads of the encoder; side of the crop, images per step
SIZES = {"smoke": (48, 4, 3, 64, 2), "tiny": (192, 12, 3, 224, 8), "base": (768, 12, 12, 448, 12)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="encoder, crop and batch (default: tiny)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    formats = ["float32", "bfloat16"]
    parser.add_argument("--dtype", nargs="+", choices=formats, default=formats, help="default: both")
    parser.add_argument("--batch_size", type=int, help="images per step (default: 8 for tiny, 12 for base)")
    parser.add_argument("--approximate", action="store_true", help="also steps that compute less")
    parser.add_argument("--gains", action="store_true", help="also our step with one saving undone at a time")
    parser.add_argument("--compile", action="store_true", help="also the last dtype with torch.compile")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the timed ones (default: 2)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each variant, in turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=1e9, help="no variant starts later (default: no bound)")
    parser.add_argument("--output", type=Path, help="JSON file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    # a wrong command line is answered before the imports below, which take seconds
    answer_early(parse)

import torch
import transformers
from refinement import ConvolvedRefinement
from side_by_side import choose_clock, median_ratio, save_record
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation
from synernet_hf.model import (
    BranchPair,
    SynerNetTargets,
    area_shares,
    cams_to_pseudo_labels,
    coverage,
    cut_instances,
    denormalize,
    ignore_outside,
    label_tokens,
    normalize_cams,
    pick_instance_classes,
    weighted_losses,
)


with needs_extra("train"):
    from synernet_hf.training import parameter_groups


RECIPE = Path(__file__).resolve().parents[1] / "src" / "synernet_hf" / "recipes" / "voc12_authors.yaml"
NUM_CLASSES = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "tf32": torch.float32}
PROGRESS = 0.75
# what `--approximate` changes, by the name of the variant
APPROXIMATIONS = {
    "one scale": {"cam_scales": (1.0,), "cam_flip": False},
    "one scale, narrow decoder": {"cam_scales": (1.0,), "cam_flip": False, "decoder_hidden_size": "encoder"},
}
# what `--gains` undoes: one saving each
SAVINGS = (
    "without fused AdamW",
    "without the views of the training pass",
    "without CAMs of both branches at once",
    "without one affinity for all maps",
    "without maps of present classes only",
    "with fused attention",
    "before the gate",
    "before the gate, with decoders",
)
# parts of a step and the functions that do them, of ours and of the reference; what is left is "rest"
PARTS = {
    "CAM passes": ("objective.multi_scale_cams", "reference.cams_of"),
    "training pass": ("model.forward", "reference.outputs_of"),
    "labels from CAMs": ("objective.fuse_branches", "objective.refine_present", "reference.targets"),
    "instances": ("objective._embed_instances", "reference.instances_of"),
    "losses": ("objective.weighted_losses", "reference.losses_of"),
}


class ReferenceOrder:
    """
    A step of the reference's order of work on the weights of a model of this package.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): with explicit attention.
    """

    def __init__(self, model: SynerNetForWeaklySupervisedSegmentation):
        self.synernet, self.config = model.synernet, model.config

    @torch.no_grad()
    def cams_of(self, branch: str, pixel_values: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
        """CAMs `(B, C, H, W)` of the last and the auxiliary layer of one branch; the other one is discarded."""
        size, patch = tuple(pixel_values.shape[-2:]), self.config.patch_size
        totals = [0, 0]
        for scale in self.config.cam_scales:
            scaled = [max(int(scale * side), 1) for side in size]
            views = F.interpolate(pixel_values, size=scaled, mode="bilinear", align_corners=False)
            views = torch.cat([views, views.flip(-1)])
            views = views[..., : scaled[0] // patch * patch, : scaled[1] // patch * patch]
            output = getattr(BranchPair(*(run(views, patch) for run in self.synernet.pair)), branch)
            for index, logits in enumerate((output.cam_logits, output.auxiliary_cam_logits)):
                logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
                straight, mirrored = logits.chunk(2)
                totals[index] = totals[index] + torch.maximum(straight, mirrored.flip(-1)).relu()
        return [normalize_cams(total) * labels[:, :, None, None] for total in totals]

    @torch.no_grad()
    def refined_labels(self, images, cams, labels, valid_boxes) -> torch.Tensor:
        """Label maps `(B, H, W)`: image by image and plane by plane, the affinity built each time."""
        config = self.config
        refinement = ConvolvedRefinement(config.refinement_dilations, config.refinement_iterations)
        size, half = cams.shape[-2:], [side // 2 for side in cams.shape[-2:]]
        label_maps = []
        for image, maps, present in zip(images, cams, labels, strict=True):
            class_ids = present.nonzero()[:, 0]
            small = F.interpolate(image[None], size=half, mode="bilinear", align_corners=False)
            own = F.interpolate(maps[class_ids][None].float(), size=half, mode="bilinear", align_corners=False)
            ids = F.pad(class_ids + 1, (1, 0))
            planes = []
            for background in (config.high_threshold, config.low_threshold):
                scores = torch.cat([torch.full_like(own[:, :1], background), own], dim=1).softmax(dim=1)
                refined = F.interpolate(refinement(small, scores), size=size, mode="bilinear", align_corners=False)
                planes.append(ids[refined.argmax(dim=1)[0]])
            high, low = planes
            label_maps.append(high.masked_fill((high == 0) & (low != 0), config.semantic_loss_ignore_index))
        return ignore_outside(torch.stack(label_maps), valid_boxes, config.semantic_loss_ignore_index)

    @torch.no_grad()
    def targets(self, images, cams: BranchPair, labels, valid_boxes) -> tuple[BranchPair, torch.Tensor]:
        """The targets of both branches, and the label map of the instances."""
        config, low, high = self.config, self.config.low_threshold, self.config.high_threshold
        mean_cams = 0.5 * (cams.broad[0] + cams.precise[0])
        shares = BranchPair(config.broad_share_in_broad_label, config.broad_share_in_precise_label)
        made = []
        for name, (last, auxiliary), share in zip(BranchPair._fields, cams, shares, strict=True):
            tokens, areas = label_tokens(config, auxiliary, labels, valid_boxes), None
            if name in config.spatial_bce_branches:
                areas = area_shares(mean_cams, labels, coverage(config, name, PROGRESS), low, high)
            # read once more for logging, as label maps before the refinement
            cams_to_pseudo_labels(last, labels, low, high, valid_boxes)
            fused = share * cams.broad[0] + (1 - share) * cams.precise[0]
            made.append(SynerNetTargets(tokens, areas, self.refined_labels(images, fused, labels, valid_boxes)))
        return BranchPair(*made), self.refined_labels(images, mean_cams, labels, valid_boxes)

    def outputs_of(self, pixel_values) -> BranchPair:
        """What both branches compute for the batch."""
        return BranchPair(*(branch(pixel_values, self.config.patch_size) for branch in self.synernet.pair))

    def instances_of(self, pixel_values, label_map, labels, valid_boxes) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per branch the embeddings and class ids of the cut images."""
        draws = torch.randint(2**31, labels.shape[:1], device=labels.device)
        class_ids = pick_instance_classes(label_map, labels, draws)
        ignore = self.config.semantic_loss_ignore_index
        cut = cut_instances(pixel_values, label_map, class_ids, valid_boxes, ignore)
        return [
            (branch.projection_head(branch.class_token(branch.encode(cut)[0])), class_ids)
            for branch in self.synernet.pair
        ]

    def losses_of(self, size, outputs, labels, targets, instances, loss_weights) -> torch.Tensor:
        """The weighted sum of the losses."""
        logits = BranchPair(*(F.interpolate(output.logits.float(), size, mode="bilinear") for output in outputs))
        return weighted_losses(self.synernet, outputs, logits, labels, targets, instances, loss_weights)[0]

    def __call__(self, pixel_values, labels, valid_boxes, loss_weights) -> torch.Tensor:
        """The loss of one batch."""
        cams = BranchPair(*(self.cams_of(name, pixel_values, labels) for name in BranchPair._fields))
        outputs = self.outputs_of(pixel_values)
        images = denormalize(pixel_values, self.config.image_mean, self.config.image_std)
        targets, label_map = self.targets(images, cams, labels, valid_boxes)
        instances = self.instances_of(pixel_values, label_map, labels, valid_boxes)
        return self.losses_of(tuple(pixel_values.shape[-2:]), outputs, labels, targets, instances, loss_weights)


def undone(saving: str, objective, synernet) -> list:
    """Patches of the module `objective` and of the class `synernet` under which a step lacks one saving."""
    patch = mock.patch.object
    if saving == "without the views of the training pass":
        return [patch(synernet, "seen_in", lambda self, outputs, size: {})]
    if saving == "without CAMs of both branches at once":
        plain = objective.multi_scale_cams

        def each(*args, seen):
            # a copy, so that the second call finds no more than the first
            plain(*args, seen={key: dict(view) for key, view in seen.items()})
            return plain(*args, seen=seen)

        return [patch(objective, "multi_scale_cams", each)]
    if saving == "without one affinity for all maps":
        plain = objective.refine_present

        def alone(images, cams, present, low, high, valid_boxes, *rest):
            label_maps = []
            for maps in cams:
                rows = zip(images, maps, present.ids, present.mask, valid_boxes, strict=True)
                made = [
                    plain(
                        image[None],
                        [own[None]],
                        present._replace(ids=ids[None], mask=mask[None]),
                        low,
                        high,
                        box[None],
                        *rest,
                    )[0]
                    for image, own, ids, mask, box in rows
                ]
                label_maps.append(torch.cat(made))
            return label_maps

        return [patch(objective, "refine_present", alone)]
    if saving == "without maps of present classes only":
        plain = objective.present_classes

        def every_class(labels, max_labels):
            ids = torch.arange(labels.shape[1], device=labels.device).expand(len(labels), -1)
            return plain(labels, max_labels)._replace(ids=ids, mask=labels > 0)

        return [patch(objective, "present_classes", every_class)]
    if saving == "before the gate, with decoders":
        forward = synernet.forward

        def decoding(*args, decode, **kwargs):
            return forward(*args, **kwargs)

        return [patch(synernet, "forward", decoding)]
    return []


def make_batch(size: int, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Smooth random images with one to three classes each, in valid boxes that leave a border out."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch_size, 3, size // 16, size // 16, generator=generator)
    images = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    labels = torch.zeros(batch_size, NUM_CLASSES)
    for index in range(batch_size):
        labels[index, torch.randperm(NUM_CLASSES, generator=generator)[: index % 3 + 1]] = 1
    boxes = torch.tensor([[0, size, 0, size - 16 * (index % 2)] for index in range(batch_size)])
    batch = {"pixel_values": images.clamp(-2, 2), "labels": labels, "valid_boxes": boxes}
    return {name: value.to(device) for name, value in batch.items()}


def make_model(encoder: dict, size: int, device: torch.device, attention: str, fields: dict | None = None):
    """A model of random weights, in training mode, with the settings of `voc12_authors` but for some `fields`."""
    recipe = read_recipe(RECIPE)
    fields = recipe["model_config"] | (fields or {})
    if fields.get("decoder_hidden_size") == "encoder":
        fields["decoder_hidden_size"] = encoder["hidden_size"]
    backbone_config = transformers.ViTConfig(image_size=min(size, 224), **recipe["backbone_overrides"], **encoder)
    backbone_config._attn_implementation = attention
    torch.manual_seed(0)
    config = SynerNetConfig(backbone_config=backbone_config, num_labels=NUM_CLASSES + 1, **fields)
    config._attn_implementation = attention
    model = SynerNetForWeaklySupervisedSegmentation(config)
    # drawn with a deviation of 0.02, the classifiers' CAMs would be next to flat
    with torch.no_grad():
        for branch in model.synernet.pair:
            for head in (branch.cam_head, branch.auxiliary_cam_head):
                head.classifier.weight.mul_(5)
    return model.train().to(device)


def compile_model(model):
    """A copy whose encoder blocks (one graph for all of a shape) and decoders are compiled."""
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.accumulated_recompile_limit = 1024
    model = copy.deepcopy(model)
    for branch in model.synernet.pair:
        blocks = [module for module in branch.backbone.modules() if type(module).__name__ == "ViTLayer"]
        for module in (*blocks, branch.decode_head):
            module.compile(dynamic=False)
    return model


def synchronise(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def allow_tf32(allowed: bool) -> None:
    """PyTorch lets convolutions use TF32 by default; float32 has to mean float32, since losses are compared."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def clock(device: torch.device) -> float:
    """Seconds of the process or of the wall."""
    return choose_clock(device.type)()


def matmul_rate(device: torch.device, dtype: str, seconds: float = 1.0) -> float:
    """TFLOP/s of a large square matrix product on random data: the best of several."""
    allow_tf32(dtype == "tf32")
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(DTYPES[dtype]) for _ in range(2))
    best, ends = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < ends:
        started = clock(device)
        for _ in range(3):
            left @ right
        synchronise(device)
        best = max(best, 6 * side**3 / (clock(device) - started) / 1e12)
    return best


def set_prototypes(model) -> None:
    """The class prototypes as they start: a step moves them."""
    for branch in model.synernet.pair:
        branch.projection_head.prototypes.zero_()


def loss_of(model, kind: str, dtype: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of the batch in one variant; the class of each instance is drawn alike in all."""
    set_prototypes(model)
    torch.manual_seed(1)
    device, weights = batch["pixel_values"].device, dict(model.config.loss_weights)
    # as a training does
    own = device.type == "cpu" and dtype == "bfloat16" and kind != "with fused attention"
    model.set_attn_implementation("eager" if kind == "reference" else "synernet_bf16" if own else "sdpa")
    if kind.startswith("before the gate"):
        weights["segmentation"] = 0.0
    with ExitStack() as stack:
        if dtype == "bfloat16":
            stack.enter_context(torch.autocast(device.type, torch.bfloat16))
        if kind == "reference":
            return ReferenceOrder(model)(**batch, loss_weights=weights)
        for patch in undone(kind, *rooms(model)):
            stack.enter_context(patch)
        # a loader knows how many classes the images have
        return model(**batch, loss_weights=weights, training_progress=PROGRESS, max_labels=3).loss


def rooms(model) -> tuple[ModuleType, type]:
    """The module of the model's objective, and the class of its branches."""
    return sys.modules[type(model).__module__.replace("modeling", "objective")], type(model.synernet)


class Variant:
    """One way to compute a step, with the optimizer that goes with it: the reference's is not fused."""

    def __init__(self, model, kind: str, dtype: str, batch: dict[str, torch.Tensor]):
        self.model, self.kind, self.dtype, self.batch = model, kind, dtype, batch
        self.device = batch["pixel_values"].device
        # a rate of 0: the optimizer's whole work, and weights as they were
        fused = None if kind in ("reference", "without fused AdamW") else True
        self.optimizer = torch.optim.AdamW(parameter_groups(model, 0.0, 0.0), fused=fused)
        self.entry: dict[str, Any] = {"all_seconds": []}

    def loss(self) -> torch.Tensor:
        """The loss of the batch."""
        allow_tf32(self.dtype == "tf32")
        return loss_of(self.model, self.kind, self.dtype, self.batch)

    def step(self, part: Callable = nullcontext) -> None:
        """One step; `part` is entered around backward pass and optimizer."""
        loss = self.loss()
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        synchronise(self.device)

    def prepare(self, warmup: int) -> None:
        """Everything that is measured but the seconds of a step."""
        with torch.no_grad():
            self.entry["loss"] = float(self.loss())
        for _ in range(max(warmup, 1)):
            self.step()
        self.entry["parts"] = self.parts()

    def parts(self) -> dict[str, float]:
        """Seconds of each part of one step."""
        seconds: dict[str, float] = {}

        @contextmanager
        def part(name: str) -> Iterator[None]:
            synchronise(self.device)
            started = clock(self.device)
            yield
            synchronise(self.device)
            seconds[name] = seconds.get(name, 0.0) + clock(self.device) - started

        owners = dict(zip(("objective", "model"), rooms(self.model), strict=True)) | {"reference": ReferenceOrder}
        started = clock(self.device)
        with ExitStack() as stack:
            for name, places in PARTS.items():
                for owner, function in (place.split(".") for place in places):
                    if (owner == "reference") == (self.kind == "reference"):
                        plain = getattr(owners[owner], function)
                        timed = functools.wraps(plain)(part(name)(plain))
                        stack.enter_context(mock.patch.object(owners[owner], function, timed))
            self.step(part)
        seconds["rest"] = clock(self.device) - started - sum(seconds.values())
        return seconds

    def time(self) -> None:
        """Times a step and, on a GPU, reads its peak memory."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        synchronise(self.device)
        started = clock(self.device)
        self.step()
        self.entry["all_seconds"].append(clock(self.device) - started)
        if on_gpu:
            # weights and states of the other variants lie there too: only what this one needs counts
            own = sum(tensor.nbytes for tensor in self.model.state_dict().values())
            states = sum(t.nbytes for state in self.optimizer.state.values() for t in state.values())
            peak = torch.cuda.max_memory_allocated() - before + own + states
            self.entry["peak_memory_gib"] = max(self.entry.get("peak_memory_gib", 0.0), peak / 2**30)


def count_tflop(model, kind: str, dtype: str, batch: dict[str, torch.Tensor]) -> float:
    """10¹² operations of matrix products, convolutions and attention in one forward and backward."""
    with FlopCounterMode(display=False) as counter:
        loss_of(model, kind, dtype, batch).backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 1e12


def plan(args: argparse.Namespace, device: torch.device) -> list[tuple[str, str, bool]]:
    """What to time, in the order of its worth: kind, format, compiled."""
    specs = [(kind, dtype, False) for dtype in args.dtype for kind in ("reference", "ours")]
    if device.type == "cuda" and "float32" in args.dtype:
        specs.append(("ours", "tf32", False))
    if args.approximate:
        specs += [(kind, dtype, False) for dtype in args.dtype for kind in APPROXIMATIONS]
    if args.gains:
        specs += [
            (kind, dtype, False)
            for dtype in args.dtype
            for kind in SAVINGS
            if dtype == "bfloat16" or "attention" not in kind
        ]
    return specs + [("ours", args.dtype[-1], True)] * args.compile


def measure(args: argparse.Namespace, log=print) -> dict:
    """
    Runs the comparison.

    Args:
        args (`argparse.Namespace`): see [`parse`].
        log (`Callable`, *optional*): called with each line to print.

    Returns:
        `dict`: the record that is saved.
    """
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    width, blocks, heads, size, batch_size = SIZES[args.size]
    batch_size = args.batch_size or batch_size
    deadline = time.monotonic() + args.seconds
    encoder = {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}
    encoder["intermediate_size"] = 4 * width
    batch = make_batch(size, batch_size, device)
    specs = plan(args, device)
    record: dict = {
        "size": args.size,
        "encoder": encoder,
        "crop_size": size,
        "batch_size": batch_size,
        "settings": "recipe voc12_authors, all gates open, random weights and images",
        "clock": choose_clock(device.type).__name__,
        "matmul_tflops": {dtype: matmul_rate(device, dtype) for dtype in dict.fromkeys(spec[1] for spec in specs)},
        "variants": {},
        "notes": [],
    }
    allow_tf32(False)
    model = make_model(encoder, size, device, "sdpa")
    models: dict = {}
    running: dict[str, Variant] = {}
    for kind, dtype, compiled in specs:
        name = f"{kind} {dtype}" + " compiled" * compiled
        if time.monotonic() > deadline:
            record["notes"].append(f"{name}: left out, out of time")
            continue
        try:
            if kind in APPROXIMATIONS and kind not in models:
                models[kind] = make_model(encoder, size, device, "sdpa", APPROXIMATIONS[kind])
            own = models.get(kind, model)
            variant = Variant(compile_model(own) if compiled else own, kind, dtype, batch)
            variant.prepare(args.warmup)
            # the counter does not see into compiled graphs; the arithmetic is the same
            plain = running[name.removesuffix(" compiled")].entry["matrix_tflop"] if compiled else None
            variant.entry["matrix_tflop"] = plain or count_tflop(variant.model, kind, dtype, batch)
            running[name] = variant
        except (RuntimeError, KeyError) as error:  # one variant must not stop the others
            record["notes"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            log(record["notes"][-1])
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for round_ in range(args.steps):
        if round_ >= 2 and time.monotonic() > deadline:
            record["notes"].append(f"{round_} steps timed, out of time")
            break
        for variant in running.values():
            variant.time()
        record["variants"] = {name: variant.entry for name, variant in running.items()}
        save_record(args.output, record)
    allow_tf32(False)
    for name, variant in running.items():
        entry = variant.entry
        entry["seconds"] = statistics.median(entry["all_seconds"])
        entry["mfu"] = entry["matrix_tflop"] / entry["seconds"] / record["matmul_tflops"][variant.dtype]
        log(_line(name, entry, record["variants"]))
    record["relative_loss_difference"] = {
        dtype: abs(running[f"ours {dtype}"].entry["loss"] / running[f"reference {dtype}"].entry["loss"] - 1)
        for dtype in args.dtype
        if f"ours {dtype}" in running and f"reference {dtype}" in running
    }
    log(f"relative differences of the losses: {record['relative_loss_difference']}")
    save_record(args.output, record)
    return record


def _line(name: str, entry: dict, variants: dict) -> str:
    text = f"{name:36s} {entry['seconds'] * 1e3:9.1f} ms  loss {entry['loss']:.5f}"
    text += f"  {entry['peak_memory_gib']:6.2f} GiB" if "peak_memory_gib" in entry else ""
    text += f"  {entry['matrix_tflop']:.3g} TFLOP  MFU {100 * entry['mfu']:.1f} %"
    for other, baseline in variants.items():
        if other.startswith(("reference", "ours")):
            text += f"  {median_ratio(baseline, entry):.2f}x {other}"
    total = sum(entry["parts"].values())
    shares = (f"{part} {100 * seconds / total:.0f} %" for part, seconds in entry["parts"].items())
    return f"{text}\n    {', '.join(shares)}"


def main(argv: list[str] | None = None) -> int:
    """Runs the script; returns its exit code."""
    return run_command(lambda: measure(parse(argv)) and None)


if __name__ == "__main__":
    sys.exit(main())
