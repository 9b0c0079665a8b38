"""Mean IoU as a local `evaluate` module: `evaluate.load("<this folder>")`, no network needed."""

import datasets
import evaluate

from synernet_hf.metrics import MeanIoU


_DESCRIPTION = """
Mean intersection over union of predicted label maps, from one confusion matrix of all images. Reference pixels equal
to `ignore_index` are left out.
"""

_CITATION = """
@article{everingham2010pascal,
  title = {The Pascal Visual Object Classes (VOC) Challenge},
  author = {Everingham, Mark and Van Gool, Luc and Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  journal = {International Journal of Computer Vision},
  volume = {88},
  number = {2},
  pages = {303--338},
  year = {2010}
}
"""

_INPUTS_DESCRIPTION = """
Args:
    predictions (`list` of label maps of shape `(height, width)`):
        Predicted class ids, 0 to `num_labels - 1`. Images may differ in size.
    references (`list` of label maps of shape `(height, width)`):
        True class ids, or `ignore_index`.
    num_labels (`int`):
        Number of classes, background included.
    ignore_index (`int`, *optional*, defaults to 255):
        Reference id that is not scored.

Returns:
    `dict`: see `synernet_hf.metrics.MeanIoU.compute`.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS_DESCRIPTION)
class MeanIoUMetric(evaluate.Metric):
    """`evaluate` front of [`~synernet_hf.metrics.MeanIoU`]."""

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("uint16")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS_DESCRIPTION,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
        )

    def _compute(self, predictions, references, num_labels: int, ignore_index: int = 255) -> dict:
        metric = MeanIoU(num_labels, ignore_index)
        for prediction, reference in zip(predictions, references, strict=True):
            metric.update(prediction, reference)
        return metric.compute()
