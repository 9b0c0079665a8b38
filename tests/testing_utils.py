"""Tiny models and inputs for tests: random weights, CPU, milliseconds."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from transformers import (
    BeitConfig,
    CLIPVisionConfig,
    Data2VecVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    IJepaConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTMSNConfig,
)

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation


# Each family of encoders that works, with what the tiny encoder of it has beside the common fields.
FAMILIES = {
    "vit": (ViTConfig, {"intermediate_size": 32}),
    "vit_msn": (ViTMSNConfig, {"intermediate_size": 32}),
    "deit": (DeiTConfig, {"intermediate_size": 32}),
    "dinov2": (Dinov2Config, {"mlp_ratio": 2}),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, {"mlp_ratio": 2, "num_register_tokens": 3}),
    "dinov3_vit": (DINOv3ViTConfig, {"intermediate_size": 32, "num_register_tokens": 4}),
    "clip_vision_model": (CLIPVisionConfig, {"intermediate_size": 32}),
    "siglip_vision_model": (SiglipVisionConfig, {"intermediate_size": 32}),
    # positions as in the published encoders of both
    "beit": (BeitConfig, {"intermediate_size": 32, "use_relative_position_bias": True}),
    "data2vec-vision": (Data2VecVisionConfig, {"intermediate_size": 32, "use_shared_relative_position_bias": True}),
    "ijepa": (IJepaConfig, {"intermediate_size": 32}),
}

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"

# Every loss term at a weight of its own, for tests that want all of them at once.
ALL_TERMS = {
    "cls": 1.0,
    "cls_aux": 1.0,
    "spatial_bce": 0.4,
    "patch_contrast": 0.2,
    "prototype_contrast": 0.05,
    "segmentation": 0.17,
}

# What training computes before its gates open.
EARLY_TERMS = {"cls": 1.0, "cls_aux": 1.0, "patch_contrast": 0.2}

# Settings of the model that training tests train: half a second for a few steps.
TRAINED_MODEL = {
    "backbone_config": {
        "model_type": "vit",
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    },
    "model_config": {
        "auxiliary_layer_index": -2,
        "decoder_hidden_size": 8,
        "projection_hidden_size": 16,
        "projection_bottleneck_size": 8,
        "prototype_size": 16,
        "cam_scales": [1.0, 0.5],
        "refinement_iterations": 1,
        "segmentation_start": 0.25,
        "spatial_bce_start": 0.25,
        "prototype_contrast_start": 0.25,
    },
}


def tiny_backbone_config(family: str = "vit", **overrides) -> PreTrainedConfig:
    """
    A random encoder of 3 narrow layers and patch 8, made for 32-pixel images.

    Args:
        family (`str`, *optional*, defaults to `"vit"`): one of `FAMILIES`.
        overrides: fields of the family's config to set.
    """
    fields = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config_class, more = FAMILIES[family]
    return config_class(**fields | more | overrides)


class SynerNetModelTester:
    """
    Makes tiny SynerNets and inputs that fit them.

    Args:
        family (`str`, *optional*, defaults to `"vit"`): encoder family, see [`tiny_backbone_config`].
        num_classes (`int`, *optional*, defaults to 3): foreground classes.
        config_fields: fields of `SynerNetConfig` to set.
    """

    def __init__(self, family: str = "vit", num_classes: int = 3, **config_fields):
        self.family = family
        self.num_classes = num_classes
        self.config_fields = config_fields

    def config(self) -> SynerNetConfig:
        names = ["background", *(f"class {index}" for index in range(1, self.num_classes + 1))]
        fields = {
            "backbone_config": tiny_backbone_config(self.family),
            "id2label": dict(enumerate(names)),
            "auxiliary_layer_index": -2,
            "decoder_hidden_size": 8,
            "decoder_dilation": 2,
            "projection_hidden_size": 16,
            "projection_bottleneck_size": 8,
            "prototype_size": 12,
            "cam_scales": (1.0, 0.5),
            "inference_scales": (1.0, 1.5),
            "refinement_dilations": (1, 2),
            "refinement_iterations": 2,
        }
        return SynerNetConfig(**fields | self.config_fields)

    def model(self, seed: int = 0) -> SynerNetForWeaklySupervisedSegmentation:
        """A model in evaluation mode with weights that depend on `seed` alone."""
        torch.manual_seed(seed)
        model = SynerNetForWeaklySupervisedSegmentation(self.config()).eval()
        with torch.no_grad():
            # freshly drawn weights are so small that every output is almost equal
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return model

    def inputs(self, batch_size: int = 2, height: int = 32, width: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
        """`pixel_values` `(B, 3, H, W)` and multi-hot `labels` `(B, C)`, each image with one class at least."""
        generator = torch.Generator().manual_seed(seed)
        labels = (torch.rand(batch_size, self.num_classes, generator=generator) > 0.5).float()
        labels[torch.arange(batch_size), torch.arange(batch_size) % self.num_classes] = 1.0
        return {"pixel_values": torch.randn(batch_size, 3, height, width, generator=generator), "labels": labels}


def load_script(name: str) -> ModuleType:
    """The module `scripts/<name>.py`; scripts are no package, but may import one another."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module(name)
