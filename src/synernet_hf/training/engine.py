"""The only training loop: validate_arguments → setup → prepare_data → build_run → fit → finish."""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from torch.utils.data import DataLoader

from synernet_hf.cli import Terminated
from synernet_hf.data import PhotometricAugmentation, StreamBatchSampler, class_names
from synernet_hf.data.streams import StreamedBatchSampler
from synernet_hf.files import FolderInUse, finite, write_json
from synernet_hf.model import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.progress import progress_bar, write_message
from synernet_hf.training.arguments import (
    ARGUMENTS_FILE,
    DataArguments,
    InvalidArguments,
    ModelArguments,
    SynerNetTrainingArguments,
)
from synernet_hf.training.building import (
    RunData,
    build_model,
    make_processor,
    prepare_data,
    run_record,
    train_loader,
    validate_arguments,
)
from synernet_hf.training.checkpoints import (
    RESULTS_FILE,
    TrainerState,
    check_same_settings,
    is_without_checkpoint,
    load_checkpoint,
    passed_over,
    read_record,
    read_state,
    remove_unfinished,
    save_checkpoint,
    save_model_folder,
    write_state,
)
from synernet_hf.training.evaluation import evaluate_model
from synernet_hf.training.optimization import (
    BF16_ATTENTION,
    PATIENCE,
    LossMeter,
    LossWeightSchedule,
    check_finite_weights,
    fill_sharded_state,
    gather_in_rank_order,
    learning_rate_multiplier,
    parameter_groups,
    resolve_precision,
    settle_precision,
    sum_over_processes,
    whole_model,
)
from synernet_hf.training.reporting import TIMED_STEPS, describe_plan, duration, hardware, show_images, write_card
from synernet_hf.training.stopping import StopRequest, batches_of, hold_run_folder, stop_cleanly, watch_processes


# a gradient scaler halves its scale at each skipped step; no finite gradient needs this many halvings
MAX_SKIPPED_IN_A_ROW = 100


@dataclass
class TrainingRun:
    """What the functions after `build_run` share. Model, optimizer, scheduler and loader are prepared."""

    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    # the rest of the training stream, this process's share
    loader: DataLoader
    # of the batches of all processes
    sampler: StreamBatchSampler | StreamedBatchSampler
    augmentation: PhotometricAugmentation
    loss_weights: LossWeightSchedule
    processor: SynerNetImageProcessor
    splits: datasets.DatasetDict
    data_args: DataArguments
    training_args: SynerNetTrainingArguments
    # content of `training_args.json`
    record: dict[str, Any]
    state: TrainerState
    stop: StopRequest
    # of the latest evaluation
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.training_args.output_dir)

    @property
    def bare_model(self) -> SynerNetForWeaklySupervisedSegmentation:
        """The model without its distributed wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def can_evaluate(self) -> bool:
        """Whether there is a validation split with masks."""
        return "validation" in self.splits and "mask" in self.splits["validation"].column_names


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: SynerNetTrainingArguments
) -> dict[str, dict[str, Any]]:
    """
    Trains a SynerNet from image-level labels and writes its run folder: model, processor, model card,
    `training_args.json`, `eval_results.json` (where the validation split has masks), the best evaluated model in
    `best/`, checkpoints and logs. No mask of a training image is opened.

    Args:
        model_args ([`ModelArguments`]): What is trained.
        data_args ([`DataArguments`]): The data.
        training_args ([`SynerNetTrainingArguments`]): The settings of the training.

    Returns:
        `dict[str, dict]`: the scores of the final weights as [`evaluate_model`] gives them (none without masks), and
        under `"training"` the step, minutes, and the last logged losses. Nothing after a `dry_run`, which prints the
        plan of the run and writes no file.

    Raises:
        InvalidArguments: with one sentence per problem, before any work and before the output folder is made.
        FloatingPointError: if a loss or weight becomes NaN or infinite; the last checkpoint stays good.
    """
    checkpoint = validate_arguments(model_args, data_args, training_args)
    accelerator = setup(training_args)
    # no process may take the folder while another one still looks whether it is free
    accelerator.wait_for_everyone()
    output_dir = Path(training_args.output_dir)
    held = nullcontext() if training_args.dry_run else hold_run_folder(accelerator, output_dir)
    try:
        with watch_processes(accelerator, output_dir), held:
            data = prepare_data(data_args, accelerator, checkpoint and read_record(checkpoint / ARGUMENTS_FILE))
            run = build_run(model_args, data_args, training_args, accelerator, data, checkpoint)
            _tell_surprises(run)
            if training_args.dry_run:
                accelerator.print(describe_plan(run, train_step))
                results = {}
            else:
                open_folder(run, checkpoint)
                with stop_cleanly(accelerator, run.output_dir, run.state, run.stop):
                    fit(run)
                    results = finish(run)
    except (InvalidArguments, FolderInUse):
        # every process gets here; without the wait, one that ends early would abort the others before they report
        accelerator.wait_for_everyone()
        accelerator.end_training()
        raise
    accelerator.end_training()
    return results


def _tell_surprises(run: TrainingRun) -> None:
    if not run.can_evaluate:
        run.accelerator.print("The data has no validation split with masks: this run computes no scores.")
    size, crop = run.training_args.inference_size, run.training_args.crop_size
    if size is not None and size > 2 * crop:
        run.accelerator.print(
            f"The model learns on crops of {crop} px and will see images with a shortest edge of {size} px, as "
            f"`inference_size` says: objects look larger than in training; --inference_size {round(1.25 * crop)} fits."
        )


def setup(training_args: SynerNetTrainingArguments) -> Accelerator:
    """Starts processes and devices and seeds every random generator; touches no file."""
    output_dir = Path(training_args.output_dir)
    accelerator = Accelerator(
        mixed_precision=resolve_precision(training_args.mixed_precision),
        gradient_accumulation_steps=training_args.gradient_accumulation_steps,
        log_with=None if training_args.report_to == "none" else training_args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # otherwise accelerate steps the scheduler once per process, and the rate would depend on their number
        step_scheduler_with_optimizer=False,
        # a loss term of weight 0 is skipped, so decoder and projection head get no gradient before their gates open
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    settle_precision(accelerator)
    # equal heads on all processes: DDP would make them equal, shards of different ones would be put together
    set_seed(training_args.seed)
    return accelerator


def build_run(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: SynerNetTrainingArguments,
    accelerator: Accelerator,
    data: RunData,
    checkpoint: Path | None = None,
) -> TrainingRun:
    """
    Makes model, optimizer and data stream, with the counters of the checkpoint if there is one; writes nothing.
    `InvalidArguments` if the checkpoint was made with other settings.
    """
    output_dir = Path(training_args.output_dir)
    record = run_record(model_args, data_args, training_args, accelerator, data)
    if checkpoint is not None:
        check_same_settings(checkpoint, record)
        if training_args.resume_from_checkpoint == "latest" and accelerator.is_main_process:
            for sentence in passed_over(output_dir, checkpoint):
                write_message(sentence)
        accelerator.print(f"Continuing from {checkpoint}.")
    model = build_model(model_args, class_names(data.splits))
    # the stream knows all random numbers but those of dropout
    set_seed(training_args.seed, device_specific=True)
    if (
        model.config._attn_implementation == "sdpa"
        and accelerator.device.type == "cpu"
        and accelerator.mixed_precision == "bf16"
    ):
        model.set_attn_implementation(BF16_ATTENTION)
    config, args = model.config, training_args
    optimizer = torch.optim.AdamW(
        parameter_groups(
            model, args.learning_rate, args.weight_decay, args.encoder_lr_multiplier, args.head_lr_multiplier
        ),
        # of a fused step under the scaler of fp16, accelerate does not learn that it was skipped
        fused=True if accelerator.scaler is None else None,
    )
    multiplier = partial(learning_rate_multiplier, warmup_steps=args.warmup_steps, total_steps=args.max_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
    augmentation = PhotometricAugmentation(
        config.image_mean, config.image_std, args.color_jitter, args.grayscale, args.blur
    ).to(accelerator.device)
    state = TrainerState() if checkpoint is None else read_state(checkpoint, output_dir, finite(record["scored_on"]))
    done = state.step + state.skipped_steps
    loader = train_loader(data_args, training_args, accelerator, data.splits["train"], done, state.places)
    sampler = loader.batch_sampler
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    return TrainingRun(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=loader,
        sampler=sampler,
        augmentation=augmentation,
        loss_weights=LossWeightSchedule(config),
        processor=make_processor(config, training_args.inference_size),
        splits=data.splits,
        data_args=data_args,
        training_args=training_args,
        record=record,
        state=state,
        stop=StopRequest(accelerator.num_processes),
    )


def open_folder(run: TrainingRun, checkpoint: Path | None) -> None:
    """Writes the record of a run, starts its trackers, and restores the checkpoint if there is one."""
    accelerator, output_dir, report_to = run.accelerator, run.output_dir, run.training_args.report_to
    if accelerator.is_main_process:
        if checkpoint is not None and run.state.best_metric is None and (output_dir / "best" / RESULTS_FILE).is_file():
            write_message(
                "Scores are of other validation images or classes than those of best/, which is chosen anew."
            )
        if checkpoint is None and is_without_checkpoint(output_dir):
            write_message(f"{output_dir}: the run was interrupted before its first checkpoint and starts over.")
        remove_unfinished(output_dir)
        write_json(output_dir / ARGUMENTS_FILE, run.record)
    if report_to != "none":
        # TensorBoard's folder, or trackio's project, and the run in it
        name = output_dir.resolve().name
        accelerator.init_trackers(name, init_kwargs={"trackio": {"name": name, "resume": "allow"}})
    if checkpoint is not None:
        # last, because it restores the random states too
        load_checkpoint(accelerator, checkpoint)


def fit(run: TrainingRun) -> None:
    """
    Runs optimizer steps until `max_steps`, with logs, evaluations and checkpoints in between. The last step is always
    logged, saved and evaluated. A checkpoint is saved before the evaluation of the same step, so that a failing
    evaluation costs no step; a resumed run starts with the missing evaluation.
    """
    args, state, accelerator = run.training_args, run.state, run.accelerator
    # `passes`: those of the present step, which count once the step is known not to be skipped
    meter, passes, skipped_in_a_row = LossMeter(), [], 0
    started = time.perf_counter() - state.elapsed_seconds
    bar = progress_bar(
        total=args.max_steps,
        initial=state.step,
        desc="train",
        unit="step",
        smoothing=0.05,
        disable=not accelerator.is_main_process,
    )
    clock = _StepClock(run)
    run.model.train()
    if state.step and _evaluates(run) and not state.is_evaluated:
        evaluate(run)
    if state.step == args.max_steps:
        bar.close()
        return
    run.stop.deferred = True
    # the bar closes before the final folder is written, so that its last line comes before the messages
    with bar:
        for batch in batches_of(run.loader, run.stop):
            passes.append(train_step(run, batch))
            if not accelerator.sync_gradients:
                continue
            if accelerator.optimizer_step_was_skipped:
                passes.clear()
                state.skipped_steps += 1
                skipped_in_a_row += 1
                if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                    raise FloatingPointError(
                        f"The gradients are not finite in {skipped_in_a_row} passes after step {state.step}: try a "
                        "smaller learning_rate, bf16 or full precision."
                    )
                continue
            skipped_in_a_row = 0
            state.step += 1
            for loss, loss_dict in passes:
                meter.add(state.step, loss, loss_dict)
            passes.clear()
            bar.update()
            clock.tick()
            evaluates, stops = _evaluates(run), run.stop.agreed()
            saves = stops or state.step == args.max_steps or state.step % args.save_steps == 0
            state.elapsed_seconds = time.perf_counter() - started
            if evaluates or saves or state.step % args.logging_steps == 0:
                log(run, meter.read(accelerator), bar)
            if saves:
                save(run)
                if stops or run.stop.agreed(now=True):
                    raise Terminated
            if evaluates:
                # with a checkpoint of this step nothing is lost by ending at once
                run.stop.deferred = not saves
                if not evaluate(run):
                    save(run)
                    raise Terminated
                run.stop.deferred = True
            if saves or evaluates:
                clock.restart()
            if state.step == args.max_steps:
                break
        else:
            # the loader ended with its workers: a checkpoint of whole steps, where no other process is amid one
            if state.step and not passes and accelerator.num_processes == 1:
                save(run)
            raise Terminated
    run.stop.deferred = False


def save(run: TrainingRun) -> None:
    """Saves a checkpoint of finite weights; every process calls this."""
    check_finite_weights(run.model, run.state.step)
    fill_sharded_state(run.optimizer)
    if isinstance(run.sampler, StreamedBatchSampler):
        passes = (run.state.step + run.state.skipped_steps) * run.training_args.gradient_accumulation_steps
        run.state.places = gather_object([run.sampler.place_at(passes)])
    save_checkpoint(run.accelerator, run.output_dir, run.state, run.record, run.training_args.save_total_limit)


class _StepClock:
    """Prints how long a run will take: after its first steps, and again when all losses take part."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        # the first step of a kind is slower than the others and does not count
        gate = max(run.loss_weights.starts.values()) * run.training_args.max_steps
        self.marks = {run.state.step + 1, math.floor(gate) + 2}
        self.seconds: list[float] | None = None

    def restart(self) -> None:
        """Leaves out what was done since the last step."""
        self.last = time.perf_counter()

    def tick(self) -> None:
        """Counts a step that is done."""
        step, total = self.run.state.step, self.run.training_args.max_steps
        if self.seconds is None and step not in self.marks:
            return
        if self.run.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()
        if self.seconds is None:
            self.seconds = []
        else:
            self.seconds.append(time.perf_counter() - self.last)
        self.restart()
        if len(self.seconds) == TIMED_STEPS:
            each, self.seconds = sum(self.seconds) / TIMED_STEPS, None
            if self.run.accelerator.is_main_process and step < total:
                write_message(
                    f"{duration(each * (total - step))} for the remaining {total - step:,} steps at {each:.2g} s a step, "
                    "evaluations not counted."
                )


def _evaluates(run: TrainingRun) -> bool:
    """Whether the present step is one to evaluate."""
    step, args = run.state.step, run.training_args
    return run.can_evaluate and (step == args.max_steps or step % args.eval_steps == 0)


def train_step(run: TrainingRun, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Runs one forward and backward pass on a batch of [`SynerNetDataCollator`], and the optimizer step when enough passes
    are accumulated. Returns the loss, its active terms, without gradient, and the share of confident pixels.
    """
    accelerator, args = run.accelerator, run.training_args
    progress = run.state.step / args.max_steps
    with accelerator.accumulate(run.model):
        outputs = run.model(
            pixel_values=run.augmentation(batch["images"], batch["draws"], run.state.step),
            labels=batch["labels"],
            valid_boxes=batch["valid_boxes"],
            loss_weights=run.loss_weights(progress),
            training_progress=progress,
            gather_embeddings=gather_in_rank_order,
            max_labels=batch["max_labels"],
            draws=batch["draws"],
            sum_counts=sum_over_processes,
        )
        accelerator.backward(outputs.loss)
        if accelerator.sync_gradients and args.max_grad_norm is not None:
            accelerator.clip_grad_norm_(run.model.parameters(), args.max_grad_norm)
        run.optimizer.step()
        # a step that the fp16 scaler skips changes no weight and must not change the rate
        if accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped:
            run.scheduler.step()
        run.optimizer.zero_grad()
    terms = outputs.loss_dict
    if outputs.confidence is not None:
        sure = outputs.confidence >= run.bare_model.config.confidence_threshold
        terms = terms | {"confident_share": sure.float().mean()}
    return outputs.loss.detach(), terms


def log(run: TrainingRun, means: dict[str, float], bar: Any) -> None:
    """Writes the mean losses since the last log to the bar, the tracker and the run's history."""
    # the groups already hold the rates of the next step; the log gets that of the last one
    args = run.training_args
    multiplier = learning_rate_multiplier(run.state.step - 1, args.warmup_steps, args.max_steps)
    groups = run.optimizer.param_groups
    rates = {f"learning_rate_{group['name']}": group["initial_lr"] * multiplier for group in groups}
    rate = rates["learning_rate_encoder"]
    run.state.history.append({"step": run.state.step, **means, "learning_rate": rate})
    run.accelerator.log({f"train/{name}": value for name, value in (means | rates).items()}, step=run.state.step)
    shown = {name.removeprefix("loss_"): f"{value:.3f}" for name, value in means.items()}
    bar.set_postfix(shown | {"lr": f"{rate:.1e}"}, refresh=False)


def evaluate(run: TrainingRun) -> dict[str, dict[str, Any]]:
    """
    Scores the current weights on the validation split in float32, whatever the precision of the training, and saves
    them as `best/` if they are better than all earlier ones. Every process calls this. Returns nothing where a run that
    would lose steps by it is to end.
    """
    accelerator, state = run.accelerator, run.state
    started = time.perf_counter()
    if accelerator.is_main_process and not sys.stderr.isatty():
        write_message(f"step {state.step}: evaluating.")
    with whole_model(accelerator, run.model) as model:
        results = evaluate_model(
            model,
            run.processor,
            run.splits["validation"],
            class_names=run.record["class_names"],
            metric_classes=run.data_args.metric_classes,
            max_samples=run.data_args.max_eval_samples,
            accelerator=accelerator,
            num_workers=run.data_args.num_workers,
            progress=True,
            stop=run.stop if run.stop.deferred else None,
        )
        if results:
            _keep_results(run, model, results)
    run.model.train()
    if not results:
        return results
    state.elapsed_seconds += time.perf_counter() - started
    checkpoint = run.output_dir / f"checkpoint-{state.step}"
    if accelerator.is_main_process and checkpoint.is_dir():
        write_state(checkpoint, state)
    accelerator.wait_for_everyone()
    run.results = results
    return results


def _keep_results(run: TrainingRun, model: torch.nn.Module, results: dict[str, dict[str, Any]]) -> None:
    """Writes scores into history, trackers and log, and the whole model into `best/` if it is better than all earlier."""
    accelerator, state, shown = run.accelerator, run.state, ("mean_iou", "recall", "precision")
    curves = {f"{kind}/{name}": values[name] for name in shown for kind, values in results.items()}
    if not state.is_evaluated:
        scores = {name: value for name, value in curves.items() if name.endswith("mean_iou")}
        state.history.append({"step": state.step, **scores})
    accelerator.log({f"eval/{name}": value for name, value in curves.items()}, step=state.step)
    metric = results["segmentation"]["mean_iou"]
    is_best = not math.isnan(metric) and (state.best_metric is None or metric > state.best_metric)
    if is_best:
        state.best_metric, state.best_step = metric, state.step
    if not accelerator.is_main_process:
        return
    listing = ", ".join(f"{kind} {100 * values['mean_iou']:.1f}" for kind, values in results.items())
    write_message(f"step {state.step}: mean IoU on {results['segmentation']['num_images']} images: {listing}")
    show_images(accelerator.trackers, model, run.processor, run.splits["validation"], state.step)
    if is_best:
        best = (RESULTS_FILE, {"step": state.step, "scored_on": run.record["scored_on"], **results})
        save_model_folder(run.output_dir / "best", model, run.processor, [best, (ARGUMENTS_FILE, run.record)])


def finish(run: TrainingRun) -> dict[str, dict[str, Any]]:
    """Writes the final folder (model, processor, results, card, images); every process calls this."""
    state, record = run.state, run.record
    # a run that is resumed after its last step has nothing from `fit`
    results = run.results or (evaluate(run) if run.can_evaluate else {})
    with whole_model(run.accelerator, run.model) as model:
        if run.accelerator.is_main_process:
            files = [(RESULTS_FILE, {"step": state.step, **results})] if results else []
            save_model_folder(run.output_dir, model, run.processor, [*files, (ARGUMENTS_FILE, record)])
            used = run.accelerator
            facts = {"steps": state.step, "minutes": state.elapsed_seconds / 60, "hardware": hardware(used)}
            facts |= {"num_processes": used.num_processes, "precision": used.mixed_precision}
            write_card(run.output_dir, model, run.processor, run.splits, record, results, **facts)
    run.accelerator.wait_for_everyone()
    losses = next((entry for entry in reversed(state.history) if "loss" in entry), {})
    training = {
        "step": state.step,
        "minutes": state.elapsed_seconds / 60,
        "best_step": state.best_step,
        "losses": {name: value for name, value in losses.items() if name.startswith("loss")},
    }
    return {**results, "training": training}
