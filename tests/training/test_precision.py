"""Automatic precision: bf16 where the device computes in it, and a word where it does not."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from synernet_hf.training import SynerNetTrainingArguments, engine, optimization


@pytest.mark.parametrize(("capability", "expected"), [("AVX512", "bf16"), ("AVX2", "no"), ("DEFAULT", "no")])
def test_auto_is_bf16_where_the_cpu_counts_in_it(monkeypatch, tmp_path, capsys, capability, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    arguments = SynerNetTrainingArguments(output_dir=str(tmp_path), mixed_precision="auto", report_to="none")
    assert engine.setup(arguments).mixed_precision == expected
    assert capsys.readouterr().out == ""
    # what was named is taken, with a word on what it costs
    arguments.mixed_precision = "bf16"
    AcceleratorState._reset_state()
    assert engine.setup(arguments).mixed_precision == "bf16"
    assert ("many times slower" in capsys.readouterr().out) == (capability == "AVX2")


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_bf16_on_gpus_that_have_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    for name, expected in (("cuda", "bf16" if supported else "no"), ("mps", "no")):
        state = SimpleNamespace(device=torch.device(name))
        monkeypatch.setattr(optimization, "PartialState", lambda cpu, timeout, state=state: state)
        assert optimization.resolve_precision("auto") == expected
    assert optimization.is_slow_in_bf16(torch.device("cuda")) != supported
    assert not optimization.is_slow_in_bf16(torch.device("mps"))


@pytest.mark.parametrize("name", [None, "no", "fp16", "bf16"])
def test_what_is_named_stays(name):
    assert optimization.resolve_precision(name) == name


@pytest.mark.parametrize("wanted", [None, "true"])
def test_the_processes_are_told_of_a_cpu_that_was_asked_for(monkeypatch, wanted):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    if wanted:
        monkeypatch.setenv("ACCELERATE_USE_CPU", wanted)
    seen = []

    def state(cpu, timeout):
        seen.append(cpu)
        return SimpleNamespace(device=torch.device("cpu"))

    monkeypatch.setattr(optimization, "PartialState", state)
    optimization.resolve_precision("auto")
    assert seen == [bool(wanted)]
