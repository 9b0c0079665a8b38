"""A devkit folder for the data tests."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from devkit_utils import write_voc_devkit  # noqa: E402


@pytest.fixture
def devkit(tmp_path):
    return write_voc_devkit(tmp_path)
