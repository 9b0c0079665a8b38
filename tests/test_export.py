"""The exported graph is the model: at every size, for each branch, in torch.export, ONNX and torch.compile."""

import inspect
import json

import pytest
import torch
from testing_utils import FAMILIES, SynerNetModelTester

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, export
from synernet_hf.commands import main
from synernet_hf.export import SynerNetInferenceGraph, export_onnx, export_program, quantize_weights


SIZES = [(1, 32, 32), (2, 37, 45), (3, 16, 80), (1, 64, 33)]


@pytest.fixture(scope="module")
def model():
    return SynerNetModelTester().model()


def images(batch_size, height, width):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(height))


def expected_logits(model, pixel_values, branches=None):
    return model.multi_scale_logits(pixel_values, scales=(1.0,), inference_branches=branches)


@pytest.mark.parametrize("branches", [None, "both", "broad", "precise"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers", "dinov3_vit"])
def test_the_graph_gives_the_logits_of_the_model(family, size, branches):
    model = SynerNetModelTester(family).model()
    pixel_values = images(*size)
    with torch.no_grad():
        found = SynerNetInferenceGraph(model, branches)(pixel_values)
    assert found.shape == (size[0], 4, *size[1:])
    assert (found - expected_logits(model, pixel_values, branches)).abs().max() < 1e-5


@pytest.mark.parametrize("branches", ["both", "precise"])
def test_the_graph_has_the_prior_of_the_class_tokens(branches, tmp_path):
    model = SynerNetModelTester(with_class_token_head=True).model()
    pixel_values = images(2, 37, 45)
    with torch.no_grad():
        found = SynerNetInferenceGraph(model, branches)(pixel_values)
    expected = expected_logits(model, pixel_values, branches)
    assert (found - expected).abs().max() < 1e-5
    model.config.class_prior_weight = 0.0
    assert (found - expected_logits(model, pixel_values, branches)).abs().max() > 1e-3
    # the written graph is compared with the model
    model.config.class_prior_weight = 4.0
    assert max(export_onnx(model, tmp_path / "model.onnx", branches).values()) < 1e-4


@pytest.mark.parametrize("branches", ["both", "precise"])
def test_the_graph_has_the_shared_blocks(branches):
    model = SynerNetModelTester("dinov3_vit", shared_encoder_layers=2).model()
    pixel_values = images(2, 37, 45)
    with torch.no_grad():
        found = SynerNetInferenceGraph(model, branches)(pixel_values)
    assert (found - expected_logits(model, pixel_values, branches)).abs().max() < 1e-5


def test_one_branch_is_half_the_encoders(model):
    def weights(branches):
        return sum(parameter.numel() for parameter in SynerNetInferenceGraph(model, branches).parameters())

    assert weights("broad") == weights("precise") == weights("both") / 2


def test_one_branch_runs_one_encoder(model):
    runs = []
    hooks = [
        getattr(model.synernet.pair, name).backbone.register_forward_hook(lambda *args, name=name: runs.append(name))
        for name in ("broad", "precise")
    ]
    try:
        with torch.no_grad():
            model(images(*SIZES[0]), inference_branches="precise")
            model.multi_scale_logits(images(*SIZES[0]), scales=(1.0,), inference_branches="broad")
    finally:
        for hook in hooks:
            hook.remove()
    assert runs == ["precise", "broad"]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=[] if family in ("vit", "dinov3_vit") or "dinov2" in family else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_an_exported_program_takes_every_size(family, tmp_path):
    # PyTorch's guards refuse single images where SigLIP's pooling head runs
    model = SynerNetModelTester(family, with_class_token_head=family != "siglip_vision_model").model()
    program = export_program(model, "precise")
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    # also multiples of the patch, and the size that the position embeddings were made for
    for module in (program.module(), loaded.module()):
        for size in (*SIZES, (1, 40, 40), (4, 9, 120)):
            pixel_values = images(*size)
            with torch.no_grad():
                assert (module(pixel_values) - expected_logits(model, pixel_values, "precise")).abs().max() < 1e-5
    # PyTorch before 2.9 does not check the size of the example, and does not know the argument
    knows = "check_guards" in inspect.signature(loaded.module).parameters
    module, pixel_values = loaded.module(**{"check_guards": False} if knows else {}), images(1, 8, 5)
    with torch.no_grad():
        assert (module(pixel_values) - expected_logits(model, pixel_values, "precise")).abs().max() < 1e-5


def test_inference_is_one_graph_for_the_compiler(model):
    torch.compiler.reset()
    # capturing is what can fail; code for the graph is not written here
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    pixel_values = images(*SIZES[1])
    with torch.no_grad():
        assert torch.allclose(compiled(pixel_values).logits, model(pixel_values).logits, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("shared", [0, 1])
def test_a_model_that_has_never_run_compiles_into_one_graph(tmp_path, shared):
    SynerNetModelTester(shared_encoder_layers=shared).model().save_pretrained(tmp_path)
    fresh, other = (SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path).eval() for _ in range(2))
    torch.compiler.reset()
    pixel_values = images(*SIZES[1])
    with torch.no_grad():
        found = torch.compile(fresh, fullgraph=True, backend="eager")(pixel_values).logits
        assert torch.allclose(found, other(pixel_values).logits, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.slow
def test_compiled_code_gives_the_same_logits(model):
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    pixel_values = images(*SIZES[1])
    with torch.no_grad():
        assert torch.allclose(compiled(pixel_values).logits, model(pixel_values).logits, atol=1e-4)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def onnx_file(model, tmp_path_factory):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    path = tmp_path_factory.mktemp("onnx") / "new" / "model.onnx"
    differences = export_onnx(model, path)
    assert len(differences) == 3 and max(differences.values()) < 1e-4
    assert [item.name for item in path.parent.iterdir()] == ["model.onnx"]
    return path


def test_onnxruntime_gives_the_logits_at_every_size(model, onnx_file):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    assert [(item.name, item.shape) for item in session.get_inputs()] == [
        ("pixel_values", ["batch", 3, "height", "width"])
    ]
    for size in SIZES:
        pixel_values = images(*size)
        (found,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        assert (torch.from_numpy(found) - expected_logits(model, pixel_values)).abs().max() < 1e-4
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["id2label"]) == {str(key): name for key, name in model.config.id2label.items()}
    assert json.loads(metadata["image_mean"]) == list(model.config.image_mean)


@pytest.mark.slow
def test_encoders_with_registers_become_onnx_graphs_of_every_size(tmp_path):
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    differences = export_onnx(SynerNetModelTester("dinov2_with_registers").model(), tmp_path / "model.onnx")
    assert max(differences.values()) < 1e-4


def test_a_wrong_graph_is_not_written(model, onnx_file, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_compare", lambda *args: {(1, 3, 8, 8): float("nan")})
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: SavedElsewhere(onnx_file))
    with pytest.raises(RuntimeError, match="nothing was written"):
        export_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class SavedElsewhere:
    """An export that copies a file; what follows the export is tested, not the export."""

    def __init__(self, source):
        self.source = source
        self.model = type("Model", (), {"metadata_props": {}})()

    def save(self, path, external_data):
        path.write_bytes(self.source.read_bytes())


def test_the_command_writes_the_file(model, onnx_file, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "run")
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **kwargs: SavedElsewhere(onnx_file))
    assert main(["export", str(tmp_path / "run"), "--onnx", str(tmp_path / "model.onnx")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("logits differ by at most") == 3 and "model.onnx" in printed
    assert (tmp_path / "model.onnx").read_bytes() == onnx_file.read_bytes()
    assert main(["export", str(tmp_path / "run"), "--onnx", str(tmp_path / "other.onnx"), "--tolerance", "0"]) == 1
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "other.onnx").exists()


def test_what_cannot_be_exported_is_told_in_a_sentence(model, tmp_path, monkeypatch, capsys):
    assert main(["export", str(tmp_path / "none"), "--onnx", str(tmp_path / "model.onnx")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--onnx", str(tmp_path)]) == 2
    assert "is a folder; name a file" in capsys.readouterr().err
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    model.save_pretrained(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--onnx", str(tmp_path / "model.onnx")]) == 2
    assert 'pip install -e ".[onnx]"' in capsys.readouterr().err
    with pytest.raises(ImportError, match="Int8 weights need torchao"):
        quantize_weights(model)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(export, "MAX_ONNX_BYTES", 10)
    with pytest.raises(ValueError, match="an ONNX file holds 2 GB"):
        export_onnx(model, tmp_path / "model.onnx")


def test_int8_weights_change_the_logits_little(model):
    pytest.importorskip("torchao")
    quantized = quantize_weights(model)
    pixel_values = images(*SIZES[1])
    with torch.no_grad():
        expected, found = model(pixel_values).logits, quantized(pixel_values).logits
        unchanged = model(pixel_values).logits
    assert torch.equal(expected, unchanged) and not torch.equal(expected, found)
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
