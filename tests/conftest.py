"""What every test relies on: no network, few threads, and tiny models and images made on the spot."""

import os
import tempfile
from pathlib import Path


# Set before anything imports transformers, datasets or torch, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
_modules_cache = tempfile.TemporaryDirectory(prefix="synernet_hf_tests_")
os.environ["HF_MODULES_CACHE"] = _modules_cache.name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

ROOT = Path(__file__).resolve().parents[1]


def pytest_report_header(config) -> str:
    return f"offline, CPU, {torch.get_num_threads()} torch thread(s)"


@pytest.fixture(scope="session")
def root() -> Path:
    """Folder of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def tiny_config():
    """A SynerNet of 2 narrow layers, patch 8, background and two classes, random weights."""
    from transformers import ViTConfig

    from synernet_hf import SynerNetConfig

    backbone = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    return SynerNetConfig(
        backbone_config=backbone,
        id2label={0: "background", 1: "cat", 2: "dog"},
        auxiliary_layer_index=-2,
        decoder_hidden_size=8,
        projection_hidden_size=16,
        projection_bottleneck_size=8,
        prototype_size=16,
        cam_scales=(1.0, 0.5),
        inference_scales=(1.0, 1.25),
    )


@pytest.fixture(scope="session")
def tiny_run_folder(tiny_config, tmp_path_factory) -> Path:
    """A folder as a training run leaves it behind: model, processor, and one image in `image.png`."""
    from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor

    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    SynerNetForWeaklySupervisedSegmentation(tiny_config).save_pretrained(folder)
    SynerNetImageProcessor().save_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    return folder
