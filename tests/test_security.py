"""Nothing of ours unpickles or runs what it reads, and hostile model folders are refused in a sentence."""

import ast
import json
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from testing_utils import SynerNetModelTester

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor
from synernet_hf.commands import main
from synernet_hf.model_folder import check_model_folder, find_model_folder, load_model_folder


ROOT = Path(__file__).resolve().parents[1]
SHIPPED = sorted(
    path for folder in ("src", "scripts", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def calls(path: Path):
    """(dotted name as written, keyword arguments, line) of every call in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}, node


# our code


@pytest.mark.parametrize("path", SHIPPED, ids=name_of)
def test_nothing_of_ours_unpickles(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        found = {name.split(".")[0] for name in names} & UNPICKLERS
        assert not found, f"{name_of(path)}:{node.lineno} imports {found}"
    for name, keywords, node in calls(path):
        where = f"{name_of(path)}:{node.lineno}"
        if name == "torch.load":
            assert path.parent.name == "scripts", f"{where} loads a torch file outside the converters"
            assert keywords.get("weights_only") == "True", f"{where} loads without weights_only=True"
        assert keywords.get("allow_pickle", "False") == "False", f"{where} allows pickled arrays"
        assert name not in {"eval", "exec", "compile", "os.system", "yaml.unsafe_load"}, f"{where} {name}"
        # a subclass of the safe loader, see the test below
        assert name != "yaml.load" or keywords == {"Loader": "RecipeLoader"}, f"{where} reads YAML unsafely"
        assert keywords.get("shell", "False") == "False", f"{where} goes through a shell"


def test_the_check_of_our_code_finds_something():
    loads = [name_of(path) for path in SHIPPED for name, _, _ in calls(path) if name == "torch.load"]
    assert loads == ["scripts/convert_timm_vit_to_hf.py"]


def test_recipes_are_read_by_the_safe_loader():
    yaml = pytest.importorskip("yaml")
    from synernet_hf.training.arguments import RecipeLoader

    assert issubclass(RecipeLoader, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", Loader=RecipeLoader)


# model folders


class Touch:
    """Unpickling an instance makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SynerNetModelTester().model().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(folder, message, error=ValueError):
    with pytest.raises(error, match=message) as caught:
        check_model_folder(folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ("runs/dmeo", "runs/dmeo: no such folder; did you mean runs/demo?"),
        (
            "runs/other/model",
            "runs/other/model: no such folder; give the folder of a trained model, or its name on the",
        ),
        ("nothing", "nothing: no such folder; give"),
        ("C:\\runs\\demo", "no such folder; give"),
        ("/nowhere/runs/demo", "no such folder; give"),
        ("runs/demo", "runs/demo holds no trained model (no config.json); give"),
        ("runs/cut", "(no config.json): its training has not ended, continue it; give"),
        ("image.png", "image.png is a file; give the folder"),
    ],
)
def test_a_wrong_path_is_told_at_once(tmp_path, monkeypatch, run, told):
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "cut" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "image.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("synernet_hf.model_folder.snapshot_download", lambda *args, **kwargs: asked.append(args))
    for load in (find_model_folder, load_model_folder):
        with pytest.raises(ValueError) as caught:
            load(run)
        assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not asked


def test_without_network_a_hub_id_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        ValueError, match="owner/model: no such folder, and the Hub cannot be reached .*offline"
    ) as caught:
        find_model_folder("owner/model")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such folder; give the folder of a trained model[.]"):
        find_model_folder("owner/model", on_hub=False)


def test_a_saved_folder_passes(folder, tmp_path):
    assert check_model_folder(folder).to_dict() == SynerNetConfig.from_pretrained(folder).to_dict()
    model = SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder)
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    check_model_folder(tmp_path / "parts")


def test_a_pickle_named_like_weights_is_refused_and_not_run(folder, tmp_path):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    refused(folder, "it is not a safetensors file, or it is damaged")
    with pytest.raises(Exception, match="header|Header"):
        SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder)
    assert not (tmp_path / "touched").exists()


def test_pickled_weights_are_refused_and_not_run(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Touch(tmp_path / "touched")}, folder / "pytorch_model.bin")
    refused(folder, "weights in other files, such as pickled ones, are not loaded", FileNotFoundError)
    with pytest.raises(ValueError, match="such as pickled ones, are not loaded"):
        load_model_folder(folder)
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
        SynerNetForWeaklySupervisedSegmentation.from_pretrained(folder)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("length", [10 * 2**30, 2**63, 10**8 + 1])
def test_a_header_beyond_the_file_is_refused(folder, length):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(folder, f"its header claims {length:,} of 10 bytes")


def test_a_header_of_ten_gigabytes_in_a_sparse_file_is_refused(folder):
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 10 * 2**30))
        file.truncate(8 + 11 * 2**30)
    refused(folder, "its header claims 10,737,418,240")


def test_tensors_beyond_the_file_are_refused(folder):
    header = json.dumps({"weight": {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "it is not a safetensors file, or it is damaged")


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..\\secret.safetensors",
        "weights.bin",
        "..",
    ],
)
def test_an_index_leads_to_no_file_outside(folder, tmp_path, name):
    save_file({"weight": torch.ones(1)}, tmp_path / "secret.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "which is not a file of the folder")


@pytest.mark.parametrize(
    "fields",
    [
        {"decoder_hidden_size": 10**9},
        {"num_labels": 10**9, "id2label": None},
        {"prototype_size": 2**40},
        {"cam_scales": [1e9]},
        {"cam_scales": [1.0] * 1000},
        {"refinement_iterations": 10**9},
        {"refinement_dilations": [10**9]},
        {"backbone_config": {"model_type": "vit", "num_hidden_layers": 10**9}},
        {"backbone_config": {"model_type": "vit", "hidden_size": 10**9}},
        {"backbone_config": {"model_type": "vit", "num_labels": 10**9}},
        {"backbone_config": {"model_type": "vit", "image_size": [2**20, 2**20]}},
        {"backbone_config": {"model_type": "none of these"}},
        {"decoder_hidden_size": "os.system('true')"},
    ],
    ids=str,
)
def test_absurd_configurations_are_refused(folder, fields):
    change_config(folder, **fields)
    refused(folder, "its configuration is none of a SynerNet")
    with pytest.raises(ValueError, match="its configuration is none of a SynerNet"):
        load_model_folder(folder)


def test_sizes_that_the_weights_do_not_have_are_refused(folder):
    change_config(folder, decoder_hidden_size=60_000)
    refused(folder, "its configuration asks for 64,817,[0-9,]+ weights, its files hold")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "it is no JSON"),
        ("[" * 100_000, "it is no JSON"),
        ("[]", "it holds a list"),
        ("{}", "its model type is 'None'"),
        ('{"model_type": "bert"}', "its model type is 'bert'"),
        (" " * 20_000_001, "bytes are too many"),
    ],
    ids=["cut off", "deep", "list", "empty", "other model", "large"],
)
def test_other_configurations_are_refused(folder, text, message):
    (folder / "config.json").write_text(text)
    refused(folder, message)


def test_the_export_refuses_a_hostile_folder(folder, tmp_path, capsys):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    assert main(["export", str(folder), "--onnx", str(tmp_path / "model.onnx")]) == 2
    printed = capsys.readouterr().err
    assert "holds no usable model" in printed and printed.count("\n") == 1
    assert not (tmp_path / "touched").exists() and not (tmp_path / "model.onnx").exists()


def test_the_export_checks_a_model_of_the_hub(folder, tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(
        "synernet_hf.model_folder.snapshot_download", lambda name, **kwargs: asked.append(name) or folder
    )
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert main(["export", "owner/model", "--onnx", str(tmp_path / "model.onnx")]) == 2
    assert asked == ["owner/model"]
    assert "such as pickled ones, are not loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fields",
    [
        {"size": {"shortest_edge": 10**9}},
        {"size": 10**6},
        {"crop_size": {"height": 448, "width": 0}},
        {"pad_size": {"height": "448", "width": 448}},
        {"size_divisor": 2**40},
        {"size_divisor": -1},
    ],
    ids=str,
)
def test_absurd_sizes_of_the_image_processor_are_refused(folder, fields):
    path = folder / "preprocessor_config.json"
    SynerNetImageProcessor(do_pad=True).save_pretrained(folder)
    check_model_folder(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    refused(folder, f"its {next(iter(fields))} is .*, expected are whole numbers of pixels from 1 to 16,384")


@pytest.mark.parametrize("value", [10**12, 2**28 + 1, 0, -1, 1e6, "1048576", True, [2**20]], ids=str)
def test_a_bound_of_the_image_processor_that_bounds_nothing_is_refused(folder, value):
    path = folder / "preprocessor_config.json"
    for accepted in (1, 2**28, None):
        SynerNetImageProcessor(max_pixels=accepted).save_pretrained(folder)
        assert json.loads(path.read_text())["max_pixels"] == accepted
        check_model_folder(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_pixels": value}))
    refused(folder, "its max_pixels is .*, expected is a whole number of pixels from 1 to 268,435,456, or null")
