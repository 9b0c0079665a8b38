"""The tiny model for tests and documentation."""

import torch
from testing_utils import load_script

from synernet_hf import SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor


def test_a_tiny_model_is_written_and_the_same_for_the_same_seed(tmp_path, capsys):
    script = load_script("make_tiny_checkpoint")
    models = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert script.main([str(tmp_path / name), "--class_names", "bus", "tram", "--seed", seed]) == 0
        models.append(SynerNetForWeaklySupervisedSegmentation.from_pretrained(tmp_path / name))
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    assert models[0].config.id2label == {0: "background", 1: "bus", 2: "tram"}
    assert "random weights in" in capsys.readouterr().out
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 400_000
    inputs = SynerNetImageProcessor.from_pretrained(tmp_path / "a")(torch.zeros(3, 20, 30), return_tensors="pt")
    assert models[0](**inputs).logits.shape == (1, 3, 20, 30)
    assert script.main([str(tmp_path / "a")]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
