"""The benchmark of runtimes: equal models agree, others are told apart, the script prints its table."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from devkit_utils import write_voc_devkit
from testing_utils import SynerNetModelTester

from synernet_hf import SynerNetImageProcessor


@pytest.fixture(scope="module")
def runtimes():
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "runtimes.py"
    spec = importlib.util.spec_from_file_location("benchmark_runtimes", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    SynerNetModelTester(num_classes=20).model().save_pretrained(tmp_path / "run")
    SynerNetImageProcessor().save_pretrained(tmp_path / "run")
    write_voc_devkit(tmp_path)
    record = {"data_args": {"dataset": "voc2012", "data_dir": str(tmp_path / "VOCdevkit")}}
    (tmp_path / "run" / "training_args.json").write_text(json.dumps(record), encoding="utf-8")
    return tmp_path / "run"


def test_the_table_compares_with_float32(runtimes, run, tmp_path, capsys):
    output = tmp_path / "new" / "rows.json"
    words = [str(run), "--output", str(output)]
    assert runtimes.main([*words, "--runtimes", "precise", "bfloat16", "averaged"]) == 0
    rows = json.loads(output.read_text())
    assert list(rows) == ["float32", "precise", "bfloat16", "averaged"]
    assert 0 <= rows["float32"]["mean_iou"] <= 1 and "equal_pixels" not in rows["float32"]
    assert rows["bfloat16"]["equal_pixels"] > 0.9 and 0 < rows["bfloat16"]["largest_difference"] < 0.5
    assert rows["averaged"]["largest_difference"] > rows["bfloat16"]["largest_difference"]
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in rows)


def test_the_average_of_equal_branches_is_the_model(runtimes):
    model = SynerNetModelTester().model()
    model.synernet.precise_branch.load_state_dict(model.synernet.broad_branch.state_dict())
    pixel_values = torch.randn(1, 3, 30, 40, generator=torch.Generator().manual_seed(0))
    expected = runtimes.in_torch(model)(pixel_values)
    assert torch.allclose(runtimes.averaged_branches(model)(pixel_values), expected, atol=1e-5)
    assert torch.allclose(runtimes.in_torch(model, "broad")(pixel_values), expected, atol=1e-5)


def test_mistakes_are_told_in_a_sentence(runtimes, run, tmp_path, capsys):
    assert runtimes.main([str(tmp_path / "none"), "--data_dir", str(tmp_path / "VOCdevkit")]) == 2
    assert runtimes.main([str(run), "--data_dir", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2
