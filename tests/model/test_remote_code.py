"""A saved model in other processes: with the package, and without it through the code that travels with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from synernet_hf import (
    SynerNetConfig,
    SynerNetForWeaklySupervisedSegmentation,
    SynerNetImageProcessor,
    SynerNetSegmentationPipeline,
)


CODE = Path(sys.modules[SynerNetForWeaklySupervisedSegmentation.__module__].__file__).parent

# Makes every import of synernet_hf fail, whether it is installed or not.
HIDE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "synernet_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""

LOAD_WITHOUT_PACKAGE = """
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

folder, out = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model.config).__name__ == type(config).__name__ == "SynerNetConfig"
image = Image.open(folder + "/image.png")
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
    base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    features = base(**inputs).precise.features
segments = pipeline(model=folder, trust_remote_code=True)(image)
cams = model.generate_cams(**inputs).fused_cams
masks = torch.stack([torch.frombuffer(bytearray(s["mask"].tobytes()), dtype=torch.uint8) for s in segments])
assert not any(name.split(".")[0] == "synernet_hf" for name in sys.modules)
save_file({"logits": logits, "features": features.contiguous(), "cams": cams, "masks": masks}, out)
"""

LOAD_WITH_PACKAGE = """
import sys

import torch
from PIL import Image
from safetensors.torch import save_file
from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor

folder, out = sys.argv[1:]
model, info = SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder, output_loading_info=True)
assert not model.training
assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
inputs = SynerNetImageProcessor.from_pretrained(folder)(Image.open(folder + "/image.png"), return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
save_file(tensors | {"logits": logits}, out)
"""


def run_python(code: str, *arguments: Path, hidden_home: Path) -> None:
    """Run code in a fresh, isolated interpreter without network and with caches of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hidden_home), "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(hidden_home / "modules")
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd=hidden_home, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def noisy_model(tiny_config):
    """A model in which every tensor, buffers included, holds values that no initialisation would give."""
    model = SynerNetForWeaklySupervisedSegmentation(SynerNetConfig.from_dict(tiny_config.to_dict())).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.25)
    return model


@pytest.fixture
def image() -> Image.Image:
    gradient = Image.linear_gradient("L").resize((45, 37))
    return Image.merge("RGB", (gradient, gradient.rotate(180), gradient))


def test_saved_folder_gives_the_same_logits_without_the_package(noisy_model, image, tmp_path):
    folder = tmp_path / "model"
    processor = SynerNetImageProcessor()
    segmenter = SynerNetSegmentationPipeline(
        model=noisy_model, image_processor=processor, task="weakly-supervised-segmentation"
    )
    inputs = processor(image, return_tensors="pt")
    with torch.no_grad():
        logits = noisy_model(**inputs).logits
    segments = segmenter(image)
    segmenter.save_pretrained(folder)
    image.save(folder / "image.png")

    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForSemanticSegmentation"}
    assert "weakly-supervised-segmentation" in config["custom_pipelines"]
    assert {path.name for path in folder.glob("*.py")} == {path.name for path in CODE.glob("*_synernet.py")}

    run_python(HIDE_PACKAGE + LOAD_WITHOUT_PACKAGE, folder, tmp_path / "out.safetensors", hidden_home=tmp_path)
    loaded = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(loaded["logits"], logits)
    with torch.no_grad():
        torch.testing.assert_close(loaded["features"], noisy_model.synernet(**inputs).precise.features)
    torch.testing.assert_close(loaded["cams"], noisy_model.generate_cams(**inputs).fused_cams)
    assert [bytes(mask.numpy()) for mask in loaded["masks"]] == [segment["mask"].tobytes() for segment in segments]


def test_a_folder_saved_without_the_pipeline_carries_the_code_too(noisy_model, image, tmp_path):
    folder = tmp_path / "model"
    noisy_model.save_pretrained(folder)
    SynerNetImageProcessor().save_pretrained(folder)
    needed = {path.name for path in CODE.glob("*_synernet.py")} - {"pipeline_synernet.py", "inference_synernet.py"}
    assert {path.name for path in folder.glob("*.py")} == needed
    code = LOAD_WITHOUT_PACKAGE.replace("pipeline(model=folder", 'pipeline("image-segmentation", model=folder')
    image.save(folder / "image.png")
    run_python(HIDE_PACKAGE + code, folder, tmp_path / "out.safetensors", hidden_home=tmp_path)
    with torch.no_grad():
        logits = noisy_model(**SynerNetImageProcessor()(image, return_tensors="pt")).logits
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors")["logits"], logits)


def test_every_tensor_survives_saving_and_loading_in_a_new_process(noisy_model, image, tmp_path):
    folder = tmp_path / "model"
    noisy_model.save_pretrained(folder)
    processor = SynerNetImageProcessor()
    processor.save_pretrained(folder)
    image.save(folder / "image.png")
    with torch.no_grad():
        logits = noisy_model(**processor(image, return_tensors="pt")).logits

    run_python(LOAD_WITH_PACKAGE, folder, tmp_path / "out.safetensors", hidden_home=tmp_path)
    loaded = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(loaded.pop("logits"), logits, rtol=0, atol=0)
    expected = noisy_model.state_dict()
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), f"{name} changed by saving and loading"


def test_the_processor_alone_survives(tmp_path):
    processor = SynerNetImageProcessor(do_resize=True, size={"height": 24, "width": 40}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    again = SynerNetImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()


@pytest.mark.parametrize("keep_head", [True, False])
def test_the_projection_head_is_saved_unless_left_out(tiny_config, tmp_path, keep_head):
    config = SynerNetConfig.from_dict(tiny_config.to_dict() | {"with_projection_head": keep_head})
    SynerNetForWeaklySupervisedSegmentation(config).save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors")
    assert any("projection_head" in name for name in names) == keep_head
    assert any("prototypes" in name for name in names) == keep_head
