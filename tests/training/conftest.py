"""What all tests of the training room share."""

import pytest
from accelerate.state import AcceleratorState, GradientState
from training_utils import run


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and accumulation in singletons; each run here is a process of its own in life."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps that nothing ended, with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    run(folder)
    return folder
