import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from crf_utils import Numbered

from synernet_hf.crf import DenseCRF, crf_workers


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
        "min_probability": 0.01,
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


class FakeField:
    """Stands for the extension: says which classes it was given, and answers evenly."""

    def __init__(self, width, height, num_labels):
        self.shape = num_labels, height * width

    def setUnaryEnergy(self, unary):  # noqa: N802
        assert unary.shape == self.shape

    def addPairwiseGaussian(self, **options):  # noqa: N802
        pass

    addPairwiseBilateral = addPairwiseGaussian  # noqa: N815

    def inference(self, num_iterations):
        return np.full(self.shape, 1 / self.shape[0], dtype=np.float32).tolist()


@pytest.mark.parametrize(("minimum", "shares"), [(0, [0.25] * 4), (0.4, [0.5, 0, 0.5, 0]), (0.95, [1, 0, 0, 0])])
def test_classes_that_are_unlikely_everywhere_are_left_out(monkeypatch, minimum, shares):
    monkeypatch.setattr("synernet_hf.crf._densecrf_class", lambda: FakeField)
    probabilities = np.full((4, 2, 3), 0.01, dtype=np.float32)
    probabilities[0], probabilities[2, 0, 0], probabilities[3, 1, 1] = 0.9, 0.4, 0.39
    refined = DenseCRF(min_probability=minimum)(np.zeros((2, 3, 3), np.uint8), probabilities)
    assert refined.dtype == np.float32
    np.testing.assert_array_equal(refined, np.broadcast_to(np.reshape(shares, (4, 1, 1)), (4, 2, 3)))


def test_classes_left_out_leave_the_others_as_they_are():
    pytest.importorskip("pydensecrf", reason="the optional extra `crf` is not installed")
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    scores = np.random.default_rng(1).normal(size=(2, 24, 32)).astype(np.float32)
    two = np.exp(scores) / np.exp(scores).sum(axis=0)
    four = np.insert(two * (1 - 2e-5), [1, 2], 1e-5, axis=0)
    refined = DenseCRF(min_probability=1e-3)(image, four)
    np.testing.assert_allclose(refined[[0, 2]], DenseCRF()(image, two), atol=1e-4)
    np.testing.assert_allclose(refined, DenseCRF()(image, four), atol=1e-3)
    assert not refined[[1, 3]].any()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_crf_works_beside_its_caller(num_workers):
    image, probabilities = np.zeros((2, 3, 3), np.uint8), np.ones((4, 2, 3))
    with crf_workers(Numbered(), num_workers) as pool:
        futures = [pool.submit(Numbered(), image, probabilities) for _ in range(3)]
        processes = {int(future.result()[0, 0, 0]) for future in futures}
    assert (processes == {os.getpid()}) == (num_workers == 0)


def test_what_does_not_reach_a_process_and_a_process_that_ends_are_told():
    with pytest.raises(ValueError, match="function of a module"), crf_workers(lambda image, maps: maps, 1):
        pass
    with pytest.raises(ChildProcessError, match="use fewer workers"), crf_workers(Numbered(), 1) as pool:
        pool.submit(Numbered(), np.ones((2, 3, 3), np.uint8), np.ones((4, 2, 3))).result()


@pytest.mark.slow
def test_processes_end_with_their_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time
            import numpy as np
            from synernet_hf.crf import crf_workers

            if __name__ == "__main__":
                with crf_workers(np.maximum, 1) as pool:
                    pool.submit(np.maximum, 1, 2).result()
                    print(*pool._processes, flush=True)
                    time.sleep(60)
            """
        )
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            # a dead child of a dead parent may stay as a zombie where nobody waits for it
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} lives on")
