"""What all tests of the training room share."""

import pytest
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps precision and accumulation in singletons; each run here is a process of its own in life."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
