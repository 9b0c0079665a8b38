"""Mixed precision: what counts in float32 is that of its half-precision inputs, the rest stays near full precision."""

import pytest
import torch
from testing_utils import ALL_TERMS, SynerNetModelTester

from synernet_hf.model import cam_synernet, objective_synernet, refine_pseudo_labels
from synernet_hf.model.cam_synernet import at_input_size, lower_unlikely_classes
from synernet_hf.model.refinement_synernet import SynerNetPixelAdaptiveRefinement, refine_maps


# largest deviation from float32: of a loss term relative to it, of CAMs in [0, 1], and the share of pixels with other
# votes or labels; floats of bf16 have 8 bits, of fp16 11
TOLERANCES = {torch.bfloat16: (0.03, 0.02, 0.05), torch.float16: (0.003, 0.003, 0.01)}
HALVES = list(TOLERANCES)
# pure functions on the way from CAMs to losses, which all count in float32
PIECES = (
    "area_shares",
    "cams_to_pseudo_labels",
    "fuse_branches",
    "label_tokens",
    "refine_present",
    "weighted_losses",
)


@pytest.fixture(scope="module")
def tester():
    return SynerNetModelTester(broad_propagation_temperature=0.1, precise_consensus=True, fusion="confidence")


@pytest.fixture(scope="module")
def model(tester):
    model = tester.model()
    # prototypes that were seen
    for branch in model.synernet.pair:
        branch.projection_head.prototypes.copy_(torch.nn.functional.normalize(torch.randn(3, 12), dim=1))
    return model


def flat(value):
    """The tensors in what a function returns."""
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in values for tensor in flat(item)]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_pieces_in_float32_are_those_of_their_inputs(tester, model, monkeypatch, dtype):
    calls = []
    for name in PIECES:
        original = getattr(objective_synernet, name, None) or getattr(cam_synernet, name)

        def recorded(*args, name=name, original=original, **kwargs):
            result = original(*args, **kwargs)
            calls.append((name, original, args, kwargs, flat(result)))
            return result

        for module in (objective_synernet, cam_synernet):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, recorded)
    with torch.autocast("cpu", dtype=dtype):
        model(**tester.inputs(), loss_weights=ALL_TERMS, training_progress=0.5)
    assert {name for name, *_ in calls} == set(PIECES)
    for name, original, args, kwargs, found in calls:
        expected = flat(original(*args, **kwargs))
        assert found, name
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name
            assert one.dtype in (torch.float32, torch.int64), (name, one.dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_maps_and_scores_of_half_precision_are_counted_in_float32(tester, dtype):
    config, generator = tester.config(), torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, 4, generator=generator).to(dtype)
    images, logits = torch.randn(2, 3, 32, 32, generator=generator), maps * 20 - 10
    refinement = SynerNetPixelAdaptiveRefinement((1, 2), 2)
    pieces = {
        "at_input_size": lambda maps: at_input_size(maps, (30, 31), 8),
        "refinement": lambda maps: refinement(images, at_input_size(maps, (32, 32), 8)),
        "refine_maps": lambda maps: refine_maps(config, images[0], at_input_size(maps, (32, 32), 8)[0]),
        "labels": lambda maps: refine_pseudo_labels(images, maps, torch.ones(2, 3), 0.3, 0.6, refinement=refinement),
        "prior": lambda maps: lower_unlikely_classes(logits.float(), maps[:, :2, 0, 0].float().log(), 0.5),
        "classification": lambda maps: objective_synernet.classification_loss(maps[..., 0, 0], torch.ones(2, 3)),
    }
    for name, piece in pieces.items():
        expected = piece(maps.float())
        with torch.autocast("cpu", dtype=dtype):
            found = piece(maps)
        assert found.dtype == expected.dtype and torch.equal(found, expected), name


@pytest.mark.parametrize("dtype", HALVES)
def test_losses_and_cams_stay_near_those_of_full_precision(tester, model, dtype):
    of_loss, of_map, of_labels = TOLERANCES[dtype]
    inputs = tester.inputs()
    results = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
            output = model(**inputs, loss_weights=ALL_TERMS, training_progress=0.5)
            results.append((output, model.generate_cams(**inputs)))
    (exact, exact_cams), (half, half_cams) = results
    assert set(exact.loss_dict) == {f"loss_{name}" for name in ALL_TERMS}
    for name, value in exact.loss_dict.items():
        assert half.loss_dict[name] == pytest.approx(float(value), rel=of_loss), name
    for name in ("broad_cams", "precise_cams"):
        assert (half_cams[name] - exact_cams[name]).abs().max() < of_map, name
    # a vote that tips changes the mix of a pixel
    assert (half_cams["fused_cams"] - exact_cams["fused_cams"]).abs().mean() < of_map
    assert (half.confidence != exact.confidence).float().mean() < of_labels
    assert (half.pseudo_labels != exact.pseudo_labels).float().mean() < of_labels
