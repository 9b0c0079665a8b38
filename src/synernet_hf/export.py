"""SynerNet for other runtimes: one graph of its inference for `torch.export` and ONNX, and int8 weights.

The graph takes `pixel_values`, float32 `(batch, 3, height, width)`, normalised, of any size, and gives `logits`
`(batch, num_labels, height, width)` of that size. `post_process_semantic_segmentation` of the image processor, with
`target_sizes`, makes label maps of the size of the image of them.
"""

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from synernet_hf.files import replace_file
from synernet_hf.model import SynerNetForWeaklySupervisedSegmentation
from synernet_hf.model.cam_synernet import chosen_branches, lower_unlikely_classes
from synernet_hf.model.encoder_synernet import token_grid


TOLERANCE = 1e-4
# an ONNX file is one protocol buffer message, which ends at 2 GiB
MAX_ONNX_BYTES = 2_000_000_000


class SynerNetInferenceGraph(nn.Module):
    """
    The inference path of a model, without anything that depends on the values of heights and widths.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model.
        inference_branches (`str`, *optional*, defaults to `"both"`): `"broad"`, `"precise"` or `"both"`; the encoder
            of a branch that is left out is not part of the graph.
    """

    def __init__(self, model: SynerNetForWeaklySupervisedSegmentation, inference_branches: str | None = None):
        super().__init__()
        names = chosen_branches(inference_branches)
        self.shared_encoder = model.synernet.shared_encoder
        self.branches = nn.ModuleDict({name: getattr(model.synernet.pair, name) for name in names})
        self.broad_share = float(model.config.broad_share_in_logits) if len(names) == 2 else float("broad" in names)
        self.patch_size = model.config.patch_size
        self.class_prior_weight = float(model.config.class_prior_weight)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(B, 3, H, W)` normalised images → logits `(B, K, H, W)`."""
        height, width = pixel_values.shape[-2:]
        padded = F.pad(pixel_values, (0, -width % self.patch_size, 0, -height % self.patch_size))
        shared_states = None if self.shared_encoder is None else self.shared_encoder(padded)
        total, likely = None, None
        for name, branch in self.branches.items():
            share = self.broad_share if name == "broad" else 1 - self.broad_share
            tokens = branch.encode(padded, shared_states)[0]
            logits = share * branch.decode_head(branch.patch_map(tokens, token_grid(padded, self.patch_size)))
            total = logits if total is None else total + logits
            if branch.class_token_head is not None:
                scores = share * F.logsigmoid(branch.class_token_head(branch.class_token(tokens)))
                likely = scores if likely is None else likely + scores
        if likely is not None:
            total = lower_unlikely_classes(total, likely, self.class_prior_weight)
        size = (padded.shape[-2], padded.shape[-1])
        logits = F.interpolate(total, size=size, mode="bilinear", align_corners=False)
        # not sliced: that would tell images that were padded apart from others while it is traced
        rows, columns = (torch.arange(side, device=logits.device) for side in (height, width))
        return logits.index_select(-2, rows).index_select(-1, columns)


def _graph_and_example(
    model: SynerNetForWeaklySupervisedSegmentation, inference_branches: str | None
) -> tuple[nn.Module, torch.Tensor]:
    """The graph of a float32 copy, and a batch of an odd size, so that no size becomes part of what is traced."""
    graph = SynerNetInferenceGraph(copy.deepcopy(model).float().cpu().eval(), inference_branches).eval()
    return graph, torch.zeros(2, 3, 5 * graph.patch_size - 3, 7 * graph.patch_size - 1)


@contextmanager
def _symbolic_sizes(graph: nn.Module) -> Iterator[None]:
    """Has encoders of transformers interpolate their position embeddings for every size, kept as a symbol."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.jit.is_tracing", return_value=True))
        for name in {type(module).__module__ for module in graph.modules()}:
            if hasattr(sys.modules[name], "torch_int"):
                to_int = lambda size: size if isinstance(size, torch.SymInt) else int(size)  # noqa: E731
                stack.enter_context(mock.patch.object(sys.modules[name], "torch_int", to_int))
        yield


def export_program(
    model: SynerNetForWeaklySupervisedSegmentation, inference_branches: str | None = None
) -> torch.export.ExportedProgram:
    """
    Makes one `torch.export` program for every batch size, height and width.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model; it is copied, in float32 on the CPU.
        inference_branches (`str`, *optional*, defaults to `"both"`): As in [`SynerNetInferenceGraph`].

    Returns:
        `torch.export.ExportedProgram`: call `program.module()`. PyTorch's guards refuse images of a single patch on a
        side, and single images of a SigLIP encoder with a class token head, for which `module(check_guards=False)` is
        right too (PyTorch before 2.9 has no guards there).
    """
    dynamic = torch.export.Dim.DYNAMIC
    graph, example = _graph_and_example(model, inference_branches)
    with _symbolic_sizes(graph):
        return torch.export.export(
            graph,
            (example,),
            dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
            strict=False,
        )


def export_onnx(
    model: SynerNetForWeaklySupervisedSegmentation,
    path: str | Path,
    inference_branches: str | None = None,
    tolerance: float = TOLERANCE,
) -> dict[tuple[int, ...], float]:
    """
    Writes one ONNX graph for every batch size, height and width, after comparing it with the model in onnxruntime.

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model; it is copied, in float32 on the CPU.
        path (`str` or `Path`): The file to write. Its metadata hold class names, mean and standard deviation.
        inference_branches (`str`, *optional*, defaults to `"both"`): As in [`SynerNetInferenceGraph`].
        tolerance (`float`, *optional*, defaults to 1e-4): Largest difference of a logit that is accepted.

    Returns:
        `dict[tuple[int, ...], float]`: The largest difference of a logit for each of the three shapes compared.

    Raises:
        ImportError: If onnx, onnxruntime or onnxscript is missing.
        ValueError: If the model is too large for one ONNX file.
        RuntimeError: If the graph differs from the model by more than `tolerance`; nothing is written then.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'The export needs {", ".join(missing)}: pip install -e ".[onnx]" in a clone of the repository.'
        )
    graph, example = _graph_and_example(model, inference_branches)
    size = sum(4 * parameter.numel() for parameter in graph.parameters())
    if size > MAX_ONNX_BYTES:
        raise ValueError(
            f"The graph has {size / 1e9:.1f} GB of weights, an ONNX file holds 2 GB: export one branch alone with "
            "inference_branches."
        )
    with _symbolic_sizes(graph):
        program = torch.onnx.export(
            graph,
            (example,),
            dynamic_shapes=({0: "batch", 2: "height", 3: "width"},),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    config = model.config
    program.model.metadata_props.update(
        id2label=json.dumps(config.id2label, ensure_ascii=False),
        image_mean=json.dumps(list(config.image_mean)),
        image_std=json.dumps(list(config.image_std)),
        inference_branches=inference_branches or "both",
    )
    differences = {}

    def write_checked(unchecked: Path) -> None:
        program.save(unchecked, external_data=False)
        differences.update(_compare(graph, unchecked, config.patch_size))
        largest = max(differences.values())
        if not largest <= tolerance:
            raise RuntimeError(
                f"The ONNX graph differs from the model by up to {largest:.1e}, more than {tolerance:.1e}; nothing was "
                "written."
            )

    replace_file(Path(path), write_checked)
    return differences


def _compare(graph: nn.Module, path: Path, patch_size: int) -> dict[tuple[int, ...], float]:
    """Largest difference of a logit between the graph and its ONNX form, by shape: square, odd and narrow images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(1)
    differences = {}
    side = patch_size
    for batch, *size in ((1, 14 * side, 14 * side), (2, 9 * side + 5, 11 * side + 1), (1, 3 * side, 8 * side)):
        pixel_values = torch.randn(batch, 3, *size, generator=generator)
        with torch.no_grad():
            expected = graph(pixel_values).numpy()
        (found,) = session.run(["logits"], {"pixel_values": pixel_values.numpy()})
        differences[tuple(pixel_values.shape)] = float(np.abs(found - expected).max())
    return differences


def quantize_weights(model: SynerNetForWeaklySupervisedSegmentation) -> SynerNetForWeaklySupervisedSegmentation:
    """
    Copies a model, with the weights of its encoders' linear layers in int8, one scale per row (torchao).

    Args:
        model ([`SynerNetForWeaklySupervisedSegmentation`]): The model; it is left as it is.

    Returns:
        [`SynerNetForWeaklySupervisedSegmentation`]: For inference only. Heads and embeddings keep their precision.

    Raises:
        ImportError: If torchao is missing.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ImportError('Int8 weights need torchao: pip install -e ".[int8]" in a clone of the repository.')
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized = copy.deepcopy(model).eval()
    net = quantized.synernet
    for part in (net.shared_encoder, net.broad_branch, net.precise_branch):
        if part is not None:
            quantize_(part.backbone, Int8WeightOnlyConfig())
    return quantized


__all__ = ["SynerNetInferenceGraph", "export_onnx", "export_program", "quantize_weights"]
