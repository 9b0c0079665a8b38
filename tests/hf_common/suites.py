"""
SynerNet under the common suites of transformers: copied beside them by `scripts/run_transformers_common_tests.py`,
not collected here. Class and method names are those that the suites expect.
"""

import tempfile
import unittest

import torch
from testing_utils import SynerNetModelTester as TinyModels
from tests.test_configuration_common import ConfigTester
from tests.test_image_processing_common import (
    ImageProcessingTester,
    ImageProcessingTestMixin,
    PostProcessSemanticSegmentationTestMixin,
)
from tests.test_modeling_common import ModelTesterMixin
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from synernet_hf import (
    SynerNetConfig,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    SynerNetModel,
)


# Models of the library stand in this table; the suite knows by it which class has no loss.
MODEL_MAPPING_NAMES["synernet"] = "SynerNetModel"


class SynerNetModelTester:
    """What the modelling suite asks of a tester."""

    def __init__(self, parent):
        self.parent = parent
        self.tiny = TinyModels(cam_scales=(1.0,), cam_flip=False, refinement_iterations=1)
        self.batch_size = 2
        self.image_size = 32
        self.num_channels = 3
        self.hidden_size = 16
        self.num_attention_heads = 2
        # Hidden states and attention maps of both branches come one after the other: the two layers that the suite
        # allows are one layer in each branch, and the hidden states of a branch are its embeddings and that layer.
        self.num_hidden_layers = 2
        self.expected_num_hidden_layers = 4
        self.seq_length = 17
        self.is_training = True

    def get_config(self) -> SynerNetConfig:
        config = self.tiny.config()
        config.backbone_config.num_hidden_layers = 1
        return config

    def prepare_config_and_inputs_for_common(self):
        pixel_values = self.tiny.inputs(self.batch_size, self.image_size, self.image_size)["pixel_values"]
        return self.get_config(), {"pixel_values": pixel_values}


class SynerNetModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SynerNetModel, SynerNetForWeaklySupervisedSegmentation)
    pipeline_model_mapping = {
        "image-feature-extraction": SynerNetModel,
        "image-segmentation": SynerNetForWeaklySupervisedSegmentation,
    }
    _is_composite = True
    test_resize_embeddings = False
    # the suite leaves it out where no model has a copyright line of 2023 or later
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = SynerNetModelTester(self)
        self.config_tester = ConfigTester(self, config_class=SynerNetConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        """Image labels are multi-hot; the suite would hand label maps to a class for semantic segmentation."""
        inputs_dict = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
        if return_labels and model_class is SynerNetForWeaklySupervisedSegmentation:
            inputs_dict["labels"] = self.model_tester.tiny.inputs(self.model_tester.batch_size)["labels"]
        return inputs_dict

    def test_model_get_set_embeddings(self):
        """Image models have a convolution in the place of word embeddings, and replace it in this test too."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            self.assertTrue(any(isinstance(module, nn.Conv2d) for module in model.get_input_embeddings().modules()))
            self.assertIsNone(model.get_output_embeddings())

    def test_can_load_ignoring_mismatched_shapes(self):
        """
        The suite's own test is for classifiers, and sets every field whose name holds `_std` to a number, `image_std`
        too; this is the same for a segmentation model.
        """
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        model = SynerNetForWeaklySupervisedSegmentation(config)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            with self.assertRaises(RuntimeError):
                SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder, num_labels=42)
            loaded = SynerNetForWeaklySupervisedSegmentation.from_pretrained(
                folder, num_labels=42, ignore_mismatched_sizes=True
            )
        branch, other = loaded.synernet.broad_branch, model.synernet.broad_branch
        self.assertEqual(branch.decode_head.classifier.out_channels, 42)
        self.assertTrue(torch.equal(branch.decode_head.conv_in.weight, other.decode_head.conv_in.weight))


class SynerNetImageProcessingTester(ImageProcessingTester):
    """What the image-processing suite asks of a tester."""

    def __init__(self, parent, **kwargs):
        kwargs.setdefault("size", {"height": 20, "width": 24})
        kwargs.setdefault("do_resize", True)
        kwargs.setdefault("image_mean", [0.5, 0.4, 0.3])
        kwargs.setdefault("image_std", [0.5, 0.4, 0.3])
        kwargs.setdefault("num_labels", 5)
        super().__init__(parent, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": SynerNetImageProcessor}


class SynerNetImageProcessingTest(
    ImageProcessingTestMixin, PostProcessSemanticSegmentationTestMixin, unittest.TestCase
):
    image_processor_tester_class = SynerNetImageProcessingTester
