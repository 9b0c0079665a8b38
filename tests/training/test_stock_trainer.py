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
