import sys

import numpy as np
import pytest

from synernet_hf.crf import DenseCRF


def test_absence_of_the_package_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(ImportError, match=r"pip install -e .\.\[crf\]"):
        DenseCRF()


def test_defaults_are_the_authors_values():
    fields = {name: field.default for name, field in DenseCRF.__dataclass_fields__.items()}
    assert fields == {
        "num_iterations": 10,
        "gaussian_sxy": 1.0,
        "gaussian_compat": 1.0,
        "bilateral_sxy": 121.0,
        "bilateral_srgb": 5.0,
        "bilateral_compat": 4.0,
    }


def test_noise_is_cleaned_along_the_contour_of_the_image():
    pytest.importorskip("pydensecrf", reason="the optional extra `crf` is not installed")
    height, width = 24, 32
    truth = np.zeros((height, width), dtype=int)
    truth[:, width // 2 :] = 1
    image = np.where(truth[..., None] == 1, 200, 40).astype(np.uint8).repeat(3, axis=2)
    image.flags.writeable = False  # as arrays of PIL images are
    noisy = np.where(np.random.default_rng(0).random(truth.shape) < 0.2, 1 - truth, truth)
    probabilities = np.stack([np.where(noisy == 0, 0.7, 0.3), np.where(noisy == 1, 0.7, 0.3)]).astype(np.float32)
    refined = DenseCRF()(image, probabilities)
    assert refined.shape == probabilities.shape and refined.dtype == np.float32
    assert np.allclose(refined.sum(axis=0), 1, atol=1e-4)
    assert (noisy == truth).mean() < 0.85
    assert (refined.argmax(axis=0) == truth).mean() == 1.0


@pytest.mark.parametrize(
    ("image", "probabilities", "sentence"),
    [
        (np.zeros((4, 5, 3)), np.ones((2, 4, 5)), "uint8"),
        (np.zeros((4, 5, 3), np.uint8), np.ones((2, 5, 4)), "height and width of the image"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(image, probabilities, sentence, monkeypatch):
    monkeypatch.setattr("synernet_hf.crf._densecrf_class", lambda: None)
    with pytest.raises(ValueError, match=sentence):
        DenseCRF()(image, probabilities)
