"""CRFs of tests, in a module that worker processes find."""

import os

import numpy as np


def swap_classes(image, probabilities):
    assert image.dtype == np.uint8 and np.allclose(probabilities.sum(axis=0), 1)
    return probabilities[[0, 2, 1]]


class SlowlySure:
    """Stands for DenseCRF: makes the likeliest class certain, and leaves out classes like it."""

    def __init__(self, min_probability: float = 0.2, num_iterations: int = 10):
        self.min_probability = min_probability

    def __call__(self, image: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        kept = probabilities.max(axis=(1, 2), keepdims=True) >= self.min_probability
        return probabilities * kept


class Numbered:
    """A CRF of the tests: tells the process that it runs in, or ends it."""

    def __call__(self, image, probabilities):
        if image.any():
            os._exit(1)
        return np.full_like(probabilities, os.getpid())
