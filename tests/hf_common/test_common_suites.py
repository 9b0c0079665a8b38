"""The common suites of transformers' source distribution, which pip fetches: `pytest -m hf_common`."""

import subprocess
import sys

import pytest


@pytest.mark.hf_common
def test_nothing_fails_in_the_common_suites(root):
    pytest.importorskip("parameterized")
    script = root / "scripts" / "run_transformers_common_tests.py"
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=900)
    if "could not be fetched" in result.stderr:
        pytest.skip(result.stderr.strip().splitlines()[-1])
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert " 0 passed" not in result.stdout
