"""A stock `transformers.Trainer` trains our model and scores its segmentation."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from testing_utils import SynerNetModelTester
from transformers import Trainer, TrainingArguments


class Images(torch.utils.data.Dataset):
    """Random images of one size with multi-hot labels."""

    def __init__(self, tester: SynerNetModelTester, number: int) -> None:
        self.inputs = tester.inputs(number)

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.inputs.items()}


@pytest.fixture(autouse=True)
def fresh_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_stock_trainer_trains_and_scores_the_segmentation_alone(tmp_path):
    tester, seen = SynerNetModelTester(), []
    model = tester.model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def label_maps(logits, labels):
        assert isinstance(logits, torch.Tensor) and logits.shape == (len(labels), 4, 32, 32)
        return logits.argmax(dim=1)

    def compute_metrics(evaluated):
        seen.append(evaluated)
        return {"background": float((evaluated.predictions == 0).mean())}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        label_names=["labels"],
        remove_unused_columns=False,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Images(tester, 8),
        eval_dataset=Images(tester, 3),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=label_maps,
    )
    result = trainer.train()
    assert result.global_step == 2 and np.isfinite(result.training_loss)
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    for part in ("broad_branch.backbone", "precise_branch.backbone", "broad_branch.decode_head"):
        assert any(part in name for name in moved), part

    scores = trainer.evaluate()
    evaluated = seen.pop()
    assert evaluated.predictions.shape == (3, 32, 32) and evaluated.label_ids.shape == (3, 3)
    model.eval()
    with torch.no_grad():
        output = model(**tester.inputs(3))
        expected = model(tester.inputs(3)["pixel_values"]).logits.argmax(dim=1)
    np.testing.assert_array_equal(evaluated.predictions, expected.numpy())
    assert scores["eval_background"] == pytest.approx((expected == 0).float().mean().item())
    assert np.isfinite(scores["eval_loss"]) and output.loss.isfinite()


def label_maps(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As docs/training.md has it."""
    return logits.argmax(dim=1).to(torch.int16)


def make_trainer(folder, tester, **options):
    model = options.pop("model", None) or tester.model()
    datasets = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    calls = {
        name: options.pop(name) for name in ("compute_metrics", "preprocess_logits_for_metrics") if name in options
    }
    fields = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "label_names": ["labels"],
        "remove_unused_columns": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "seed": 3,
    }
    arguments = TrainingArguments(**fields | options)
    return Trainer(model=model, args=arguments, **datasets, **calls)


def test_a_resumed_run_of_a_stock_trainer_ends_like_an_uninterrupted_one(tmp_path):
    tester = SynerNetModelTester()
    options = {"train_dataset": Images(tester, 8), "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", tester, **options)
    whole.train()
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    resumed = make_trainer(tmp_path / "resumed", tester, model=tester.model(seed=5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)
    # checkpoints are folders of ours: they load without the trainer
    loaded = type(whole.model).from_pretrained(tmp_path / "whole" / "checkpoint-4")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_stock_trainer_accumulates_as_if_the_batch_were_larger(tmp_path):
    # a term that is a mean over images; others are means over pixels or pairs of the whole batch
    fields = {f"{term}_weight": 0.0 for term in ("cls_aux", "patch_contrast", "prototype_contrast", "segmentation")}
    tester = SynerNetModelTester(**fields, spatial_bce_share=0.0)
    ended = {}
    for steps, size in ((1, 4), (2, 2), (4, 1)):
        options = {"gradient_accumulation_steps": steps, "per_device_train_batch_size": size, "max_steps": 2}
        trainer = make_trainer(tmp_path / str(steps), tester, train_dataset=Images(tester, 8), **options)
        trainer.train()
        ended[steps] = (
            trainer.model.state_dict(),
            [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        )
    for weights, losses in (ended[2], ended[4]):
        assert losses == pytest.approx(ended[1][1], rel=1e-4)
        for name, value in weights.items():
            torch.testing.assert_close(value, ended[1][0][name], atol=2e-5, rtol=1e-3, msg=name)


def test_a_stock_trainer_keeps_the_best_model(tmp_path):
    tester = SynerNetModelTester()
    best = make_trainer(
        tmp_path,
        tester,
        train_dataset=Images(tester, 8),
        eval_dataset=Images(tester, 3),
        compute_metrics=lambda evaluated: {"background": float((evaluated.predictions == 0).mean())},
        preprocess_logits_for_metrics=label_maps,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="background",
        greater_is_better=False,
    )
    best.train()
    scores = [entry["eval_background"] for entry in best.state.log_history if "eval_background" in entry]
    assert len(scores) == 2 and best.state.best_metric == min(scores)
    assert best.evaluate()["eval_background"] == min(scores)


@pytest.mark.parametrize("preprocess", [label_maps, None])
def test_predictions_are_the_segmentation_alone(tmp_path, preprocess):
    tester, seen = SynerNetModelTester(), []
    trainer = make_trainer(
        tmp_path,
        tester,
        eval_dataset=Images(tester, 5),
        compute_metrics=lambda evaluated: seen.append(evaluated.predictions) or {},
        preprocess_logits_for_metrics=preprocess,
    )
    trainer.evaluate()
    with torch.no_grad():
        expected = tester.model()(tester.inputs(5)["pixel_values"]).logits
    [predictions] = seen
    if preprocess is None:
        np.testing.assert_allclose(predictions, expected.numpy(), atol=1e-5)
        return
    # two bytes for each pixel, however many classes there are
    assert predictions.dtype == np.int16 and predictions.nbytes == 2 * 5 * 32 * 32
    np.testing.assert_array_equal(predictions, label_maps(expected, None).numpy())
    # images of several sizes are padded with -100
    images = [{name: values[index] for name, values in tester.inputs(2).items()} for index in range(2)]
    images[1]["pixel_values"] = images[1]["pixel_values"][:, :24]
    found = make_trainer(
        tmp_path, tester, preprocess_logits_for_metrics=label_maps, per_device_eval_batch_size=1
    ).predict(images)
    assert found.predictions.shape == (2, 32, 32) and (found.predictions[1, 24:] == -100).all()
