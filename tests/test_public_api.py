"""The names and signatures that others rely on. Adding optional arguments is fine, renaming or dropping is not."""

import importlib
import inspect
import re
from importlib.metadata import metadata

import pytest

import synernet_hf


PUBLIC_NAMES = {
    "synernet_hf": [
        "SynerNetConfig",
        "SynerNetForWeaklySupervisedSegmentation",
        "SynerNetImageProcessor",
        "SynerNetModel",
        "SynerNetSegmentationPipeline",
        "__version__",
    ],
    "synernet_hf.cli": ["CommandParser", "InvalidArguments", "needs_extra", "run_command"],
    "synernet_hf.data": [
        "check_dataset",
        "inspect_dataset",
        "load_coco2014",
        "load_image_labels",
        "load_shapes",
        "load_voc2012",
        "load_wsss_dataset",
        "multi_hot",
    ],
    "synernet_hf.export": ["export_onnx", "export_program", "quantize_weights"],
    "synernet_hf.files": ["read_json", "replace_file", "write_json", "write_text"],
    "synernet_hf.mask_formats": ["MaskRecord", "read_masks", "write_masks"],
    "synernet_hf.metrics": ["MeanIoU"],
    "synernet_hf.model_folder": ["check_model_folder", "load_model", "load_model_folder"],
    "synernet_hf.pseudo_labels": ["PseudoLabelOptions", "with_pseudo_labels", "write_pseudo_labels"],
    "synernet_hf.review": ["export_masks", "import_masks", "write_report"],
    "synernet_hf.training": [
        "DataArguments",
        "DataSourceArguments",
        "InvalidArguments",
        "ModelArguments",
        "SynerNetTrainingArguments",
        "data_parser",
        "evaluate_model",
        "load_data",
        "parse_arguments",
        "read_data_arguments",
        "read_recipe",
        "train",
    ],
    "synernet_hf.visualization": ["colorize", "figure_panels", "overlay", "voc_palette"],
    "synernet_hf.model.cam_synernet": ["fuse_cams", "layer_confidence"],
}

# Argument names in order; those after "|" have a default.
SIGNATURES = {
    "synernet_hf.SynerNetForWeaklySupervisedSegmentation.forward": "self pixel_values | labels valid_boxes loss_weights "
    "training_progress inference_branches output_hidden_states output_attentions",
    "synernet_hf.SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained": "name_or_path | num_labels id2label",
    "synernet_hf.SynerNetForWeaklySupervisedSegmentation.generate_cams": "self pixel_values | labels scales flip",
    "synernet_hf.SynerNetImageProcessor.post_process_semantic_segmentation": "self outputs | target_sizes "
    "return_segmentation_scores",
    "synernet_hf.model.cam_synernet.multi_scale_cams": "model pixel_values | present scales flip",
    "synernet_hf.model.cam_synernet.cams_to_pseudo_labels": "cams labels low high | valid_boxes ignore_index",
    "synernet_hf.model.cam_synernet.area_shares": "cams labels coverage low high",
    "synernet_hf.model.refinement_synernet.SynerNetPixelAdaptiveRefinement.__init__": "self | dilations num_iterations",
    "synernet_hf.model.refinement_synernet.SynerNetPixelAdaptiveRefinement.forward": "self images maps",
    "synernet_hf.model.refinement_synernet.refine_pseudo_labels": "images cams labels low high | valid_boxes ignore_index",
    "synernet_hf.model.objective_synernet.classification_loss": "logits labels",
    "synernet_hf.model.objective_synernet.spatial_bce_loss": "cam_logits labels area_shares",
    "synernet_hf.model.objective_synernet.patch_token_contrast_loss": "features token_labels",
    "synernet_hf.model.objective_synernet.cross_supervised_segmentation_loss": "logits pseudo_labels",
    "synernet_hf.model.objective_synernet.prototype_contrast_terms": "embeddings class_ids prototypes",
    "synernet_hf.training.optimization.learning_rate_multiplier": "step warmup_steps total_steps",
    "synernet_hf.data.load_voc2012": "data_dir | image_labels train_split validation_split",
    "synernet_hf.data.load_coco2014": "data_dir | train_split validation_split on_bad_image",
    "synernet_hf.data.load_image_labels": "data_dir | class_names train_split validation_split on_bad_image streaming",
    "synernet_hf.data.load_shapes": "| num_train num_validation image_size seed",
    "synernet_hf.data.load_wsss_dataset": "name",
}

# The fields of the model's output, in this order.
OUTPUT_FIELDS = [
    "loss",
    "loss_dict",
    "logits",
    "broad_logits",
    "precise_logits",
    "classification_logits",
    "broad_cams",
    "precise_cams",
    "confidence",
    "pseudo_labels",
    "hidden_states",
    "attentions",
]


def resolve(dotted: str):
    """The object behind a dotted path of modules, classes and attributes."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"nothing is called {dotted}")


@pytest.mark.parametrize(("module", "names"), PUBLIC_NAMES.items(), ids=PUBLIC_NAMES)
def test_public_names(module, names):
    loaded = importlib.import_module(module)
    assert set(names) <= set(loaded.__all__)
    if module == "synernet_hf":
        assert sorted(loaded.__all__) == sorted(names)
    for name in loaded.__all__:
        assert hasattr(loaded, name), f"{module}.__all__ names {name}, which is not there"


@pytest.mark.parametrize("module", [name for name in PUBLIC_NAMES if name != "synernet_hf.model.cam_synernet"])
def test_public_functions_and_classes_are_documented(module):
    loaded = importlib.import_module(module)
    for name in loaded.__all__:
        member = getattr(loaded, name)
        if inspect.isclass(member) or inspect.isfunction(member):
            assert inspect.getdoc(member), f"{module}.{name} has no docstring"


@pytest.mark.parametrize(("dotted", "expected"), SIGNATURES.items(), ids=SIGNATURES)
def test_fixed_signatures(dotted, expected):
    required, _, optional = (expected + ("" if "|" in expected else " |")).partition("|")
    required, optional = required.split(), optional.split()
    # Decorators of transformers wrap forward; the signature is that of the function inside.
    parameters = list(inspect.signature(inspect.unwrap(resolve(dotted))).parameters.values())
    assert [parameter.name for parameter in parameters[: len(required + optional)]] == required + optional
    for position, parameter in enumerate(parameters):
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        has_default = parameter.default is not parameter.empty
        assert has_default == (position >= len(required)), f"{dotted}: {parameter} (has a default: {has_default})"


def test_config_fields_go_through_from_backbone_pretrained():
    method = synernet_hf.SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained
    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    assert inspect.Parameter.VAR_KEYWORD in kinds


def test_output_fields():
    from synernet_hf.model.modeling_synernet import SynerNetSegmenterOutput

    fields = list(SynerNetSegmenterOutput.__dataclass_fields__)
    assert fields[: len(OUTPUT_FIELDS)] == OUTPUT_FIELDS


def test_version_agrees_with_the_installed_package():
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", synernet_hf.__version__)
    assert metadata("synernet_hf")["Version"] == synernet_hf.__version__


def test_auto_classes_and_pipeline_know_synernet(tiny_config):
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation
    from transformers.pipelines import PIPELINE_REGISTRY

    assert isinstance(AutoConfig.for_model("synernet"), synernet_hf.SynerNetConfig)
    assert AutoModel._model_mapping[synernet_hf.SynerNetConfig] is synernet_hf.SynerNetModel
    segmenter = AutoModelForSemanticSegmentation.from_config(tiny_config)
    assert isinstance(segmenter, synernet_hf.SynerNetForWeaklySupervisedSegmentation)
    assert "weakly-supervised-segmentation" in PIPELINE_REGISTRY.get_supported_tasks()
    assert AutoImageProcessor is not None
