"""Families of encoders: prefix tokens, the grid of patches, positions at other sizes, what stands for the class token."""

import itertools
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from testing_utils import ALL_TERMS, FAMILIES, SynerNetModelTester, tiny_backbone_config
from transformers import (
    AutoModel,
    CLIPConfig,
    ConvNextConfig,
    PreTrainedConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SwinConfig,
    ViTMAEConfig,
)

from synernet_hf import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation
from synernet_hf.model import configuration_synernet
from synernet_hf.model.configuration_synernet import encoder_family
from synernet_hf.model.encoder_synernet import pooling_arguments


# class tokens, distillation tokens and registers of the tiny encoders
PREFIX_TOKENS = dict.fromkeys(FAMILIES, 1) | {
    "deit": 2,
    "dinov2_with_registers": 4,
    "dinov3_vit": 5,
    "siglip_vision_model": 0,
    "ijepa": 0,
}
# the tiny encoders are made for a grid of 4 × 4
ROWS, COLUMNS = 3, 7
# what else the configuration of an encoder may ask for
VARIANTS = {
    "siglip_vision_model": {"vision_use_head": False},
    "beit": {
        "use_relative_position_bias": False,
        "use_shared_relative_position_bias": True,
        "use_mean_pooling": False,
    },
    "data2vec-vision": {
        "use_shared_relative_position_bias": False,
        "use_relative_position_bias": True,
        "use_mean_pooling": False,
    },
}


def branch_of(family, **overrides):
    tester = SynerNetModelTester(family, backbone_config=tiny_backbone_config(family, **overrides))
    return tester.model().synernet.broad_branch


def own_encoder(branch):
    """The encoder as its family runs it, with the weights of a branch."""
    config = branch.backbone.config
    encoder = AutoModel.from_config(config, **pooling_arguments(config)).eval()
    encoder.load_state_dict(branch.backbone.state_dict())
    return encoder


def noise(rows=ROWS, columns=COLUMNS):
    return torch.randn(2, 3, 8 * rows, 8 * columns, generator=torch.Generator().manual_seed(0))


def linear_map(size_in, size_out, kernel, support, antialias=False):
    """Resampling of a row of `size_in` numbers to `size_out`, as a matrix: half-pixel centres."""
    scale = size_in / size_out
    width = max(scale, 1.0) if antialias else 1.0
    matrix = np.zeros((size_out, size_in))
    for out in range(size_out):
        centre = (out + 0.5) * scale - 0.5
        for index in range(math.ceil(centre - support * width), math.floor(centre + support * width) + 1):
            if antialias and not 0 <= index < size_in:
                continue
            matrix[out, min(max(index, 0), size_in - 1)] += kernel(abs(index - centre) / width)
    return torch.tensor(matrix / matrix.sum(axis=1, keepdims=True), dtype=torch.float32)


def cubic(a):
    def kernel(x):
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    return kernel


def bicubic(size_in, size_out, antialias):
    return linear_map(size_in, size_out, cubic(-0.5 if antialias else -0.75), 2, antialias)


def bilinear(size_in, size_out):
    return linear_map(size_in, size_out, lambda x: max(1 - x, 0.0), 1)


# prefix tokens and the grid


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tokens_are_left_out_of_the_maps(family):
    branch = branch_of(family)
    with torch.no_grad():
        output = branch(noise(), 8)
    states, prefix = output.hidden_states[branch.auxiliary_layer_index], PREFIX_TOKENS[family]
    assert states.shape == (2, prefix + ROWS * COLUMNS, 16)
    assert encoder_family(branch.backbone.config).prefix_tokens == prefix
    expected = states[:, prefix:].reshape(2, ROWS, COLUMNS, 16).permute(0, 3, 1, 2)
    assert torch.equal(output.auxiliary_features, expected)
    assert output.features.shape == (2, 16, ROWS, COLUMNS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shifted_image_shifts_the_cams(family):
    tester = SynerNetModelTester(family)
    model = tester.model()
    with torch.no_grad():
        # each token by itself: no position, and nothing of the others
        alone = [
            parameter.zero_()
            for name, parameter in model.named_parameters()
            if any(part in name for part in (".o_proj.weight", ".out_proj.weight", "attention.output.dense.weight"))
            and "head" not in name
        ]
        assert len(alone) == 6
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.zero_()
        image = noise()
        maps, shifted = (model.cam_logits(values) for values in (image, image.roll((8, 16), dims=(-2, -1))))
    for before, after in zip(itertools.chain(*maps), itertools.chain(*shifted), strict=True):
        assert before.shape == (2, 3, ROWS, COLUMNS) and before.std() > 1e-3
        torch.testing.assert_close(after, before.roll((1, 2), dims=(-2, -1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_map_follows_the_image(family):
    # patch embedding and position are all that tells tokens apart before the first block
    model = SynerNetModelTester(family, auxiliary_layer_index=0).model()
    changed = torch.zeros(1, 3, 32, 48)
    changed[..., 8:16, 24:32] = 1.0
    with torch.no_grad():
        first, second = (model.synernet(values).broad.auxiliary_features for values in (0 * changed, changed))
    moved = (first - second).abs().amax(dim=1)[0] > 1e-6
    assert moved.nonzero().tolist() == [[1, 3]]


# positions at a size that is not that of pretraining


ABSOLUTE = {family: {} for family in FAMILIES if family != "dinov3_vit"} | dict.fromkeys(
    ("beit", "data2vec-vision"), {"use_absolute_position_embeddings": True}
)


@pytest.mark.parametrize("family, overrides", ABSOLUTE.items())
def test_position_embeddings_are_resampled_to_the_grid(family, overrides):
    branch = branch_of(family, **overrides)
    [(name, positions)] = [
        (name, value)
        for name, value in branch.named_parameters()
        if ".position_embedding" in name and "table" not in name
    ]
    own = positions.detach().reshape(-1, 16)[-16:].reshape(4, 4, 16)
    # DINOv2 with registers was trained with antialiasing
    rows, columns = (bicubic(4, size, family == "dinov2_with_registers") for size in (ROWS, COLUMNS))
    expected = torch.einsum("hi,wj,ijd->hwd", rows, columns, own)
    norm = branch.backbone.pre_layrnorm if hasattr(branch.backbone, "pre_layrnorm") else torch.nn.Identity()
    with torch.no_grad():
        patches = branch.encode(torch.zeros(1, 3, 8 * ROWS, 8 * COLUMNS))[1][0][0, -ROWS * COLUMNS :]
        projection = branch.backbone.get_input_embeddings()
        bias = getattr(projection, "projection", projection).bias
        expected = norm(expected if bias is None else expected + bias)
    torch.testing.assert_close(patches, expected.reshape(-1, 16), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["beit", "data2vec-vision"])
def test_relative_positions_are_resampled_to_the_grid(family):
    branch = branch_of(family)
    table = next(value for name, value in branch.named_parameters() if name.endswith("relative_position_bias_table"))
    # differences of rows and columns; the last three entries are of the class token
    own = table.detach()[:-3].reshape(7, 7, 2)
    maps = [bilinear(7, 2 * size - 1) for size in (ROWS, COLUMNS)]
    resampled = torch.einsum("hi,wj,ijn->hwn", *maps, own)
    y, x = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    y, x = y.flatten(), x.flatten()
    expected = resampled[y[:, None] - y + ROWS - 1, x[:, None] - x + COLUMNS - 1].permute(2, 0, 1)
    found = []
    for module in branch.modules():
        if type(module).__name__.endswith("RelativePositionBias"):
            module.register_forward_hook(lambda module, inputs, output: found.append(output[0, :, 1:, 1:]))
    with torch.no_grad():
        branch.encode(noise())
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_rotary_positions_are_those_of_the_grid():
    branch = branch_of("dinov3_vit")
    found = []
    branch.backbone.rope_embeddings.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        branch.encode(noise())
    y, x = torch.meshgrid(torch.arange(ROWS), torch.arange(COLUMNS), indexing="ij")
    centres = torch.stack([(2 * y + 1) / ROWS - 1, (2 * x + 1) / COLUMNS - 1], dim=-1).reshape(-1, 2)
    # eight channels of a head: two frequencies of rows and of columns, twice
    periods = torch.tensor([1.0, 100**0.5])
    angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1).repeat(1, 2)
    torch.testing.assert_close(found[0][0], angles.cos())
    torch.testing.assert_close(found[0][1], angles.sin())


# the class token


@pytest.mark.parametrize("family, overrides", [*dict.fromkeys(FAMILIES, {}).items(), *VARIANTS.items()])
def test_each_family_has_its_class_token(family, overrides):
    branch = branch_of(family, **overrides)
    with torch.no_grad():
        own = own_encoder(branch)(noise(), **branch.backbone_arguments)
        output = branch(noise(), 8)
        if family in ("clip_vision_model", "siglip_vision_model") and not overrides:
            expected = own.pooler_output
        elif family in ("siglip_vision_model", "ijepa"):
            expected = own.last_hidden_state.mean(dim=1)
        elif family in ("beit", "data2vec-vision") and not overrides:
            expected = own_encoder(branch).pooler.layernorm(own.last_hidden_state)[:, 1:].mean(dim=1)
        else:
            expected = own.last_hidden_state[:, 0]
    torch.testing.assert_close(output.class_token, expected)
    # normalised, all of them
    tokens = output.features.flatten(2)
    assert tokens.mean(dim=1).abs().max() < 0.6 and (tokens.std(dim=1) - 1).abs().max() < 0.6


@pytest.mark.parametrize("family", ["vit", "clip_vision_model", "siglip_vision_model", "ijepa", "beit"])
def test_every_user_of_the_class_token_has_the_same(family, monkeypatch):
    tester = SynerNetModelTester(family, with_class_token_head=True)
    model, inputs = tester.model(), tester.inputs(2, 24, 56)
    branch = model.synernet.broad_branch
    read = {"head": [], "projection": []}
    branch.class_token_head.register_forward_pre_hook(lambda module, given: read["head"].append(given[0]))
    branch.projection_head.register_forward_pre_hook(lambda module, given: read["projection"].append(given[0]))
    encoded, encode = [], branch.encode
    monkeypatch.setattr(
        branch, "encode", lambda *args, **kwargs: encoded.append(encode(*args, **kwargs)) or encoded[-1]
    )
    with torch.no_grad():
        model(**inputs, loss_weights=ALL_TERMS)
        # the image, the scaled views, the instances
        assert torch.equal(read["projection"][-1], branch.class_token(encoded[-1][0]))
        assert torch.equal(read["head"][0], branch.class_token(encoded[0][0]))
        output = model.synernet(inputs["pixel_values"])
        assert torch.equal(output.last_hidden_state[:, 0, :16], output.broad.class_token)
        assert torch.equal(output.broad.class_token, read["head"][0])
        view = branch.view(inputs["pixel_values"], 8)
        assert torch.equal(view.class_token, output.broad.class_token)
        if family in ("siglip_vision_model", "ijepa", "beit"):
            assert not torch.allclose(view.class_token, encoded[0][0][:, 0], atol=1e-2)


# blocks that both branches share, with other settings than the families' tests have


@pytest.mark.parametrize("family, overrides", VARIANTS.items())
def test_shared_blocks_run_as_in_a_whole_encoder(family, overrides):
    config = tiny_backbone_config(family, **overrides)
    model = SynerNetModelTester(family, backbone_config=config, shared_encoder_layers=2).model()
    encoder = own_encoder(branch_of(family, **overrides))
    model.synernet.load_encoder(encoder)
    branch = model.synernet.precise_branch
    with torch.no_grad():
        expected = encoder(noise(), output_hidden_states=True, **branch.backbone_arguments)
        tokens, states, _ = branch.encode(noise(), model.synernet.shared_states(noise()))
    for found, state in zip(states, expected.hidden_states, strict=True):
        torch.testing.assert_close(found, state)
    torch.testing.assert_close(tokens, expected.last_hidden_state)


# starting from a pretrained encoder


@pytest.mark.parametrize("config_class", [CLIPConfig, SiglipConfig])
def test_an_encoder_saved_with_a_text_encoder_is_taken_alone(config_class, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    both = AutoModel.from_config(
        config_class(
            text_config=small | {"vocab_size": 20, "max_position_embeddings": 8},
            vision_config=small | {"image_size": 32, "patch_size": 8},
        )
    )
    both.save_pretrained(tmp_path)
    model = SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(
        tmp_path, num_labels=3, auxiliary_layer_index=-2
    )
    expected = {name.removeprefix("vision_model."): value for name, value in both.vision_model.state_dict().items()}
    for branch in model.synernet.pair:
        found = branch.backbone.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("config_class", [ViTMAEConfig, Siglip2VisionConfig, SwinConfig, ConvNextConfig])
def test_families_that_cannot_work_are_refused_before_any_weight(config_class, tmp_path):
    message = (
        f"family {config_class.model_type} are not supported.* use one of the families vit, .*clip_vision_model.*"
    )
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SynerNetConfig(backbone_config=config_class(), num_labels=3)
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        SynerNetConfig(backbone_config={"model_type": config_class.model_type}, num_labels=3)
    # no weights lie there
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        SynerNetForWeaklySupervisedSegmentation.from_backbone_pretrained(tmp_path, num_labels=3)


@pytest.mark.parametrize("overrides", [{"patch_size": (8, 16)}, {"image_size": (32, 64)}])
def test_patches_and_pretraining_sizes_that_are_not_square_are_refused(overrides):
    with pytest.raises(StrictDataclassClassValidationError, match="needs square patches"):
        SynerNetConfig(backbone_config=tiny_backbone_config(**overrides), num_labels=3)
    assert SynerNetConfig(backbone_config=tiny_backbone_config(image_size=(32, 32)), num_labels=3)


def test_every_family_is_tested():
    assert configuration_synernet.FAMILIES.keys() == FAMILIES.keys()
    assert all(issubclass(config_class, PreTrainedConfig) for config_class, _ in FAMILIES.values())
