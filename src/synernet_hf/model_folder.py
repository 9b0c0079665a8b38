"""Checks a model folder from an unknown source before anything of it is built or loaded."""

import difflib
from pathlib import Path, PurePosixPath, PureWindowsPath

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open

from synernet_hf.files import is_hub_id, one_line, read_json
from synernet_hf.model import SynerNetConfig, SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor


CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PROCESSOR = "preprocessor_config.json"
# pixels of a side that an image may be resized, cropped or padded to
MAX_SIDE = 16_384
# pixels that an image may keep: 1.5 times what Pillow opens
MAX_PIXELS = 2**28
MAX_JSON_BYTES = 20_000_000
# Largest sizes of a configuration (ours): far above every published encoder, low enough to bound what is built.
MAX_FIELDS = {
    "pooling_top_k": 2**20,
    "broad_pooling_top_k": 2**20,
    "decoder_hidden_size": 2**16,
    "decoder_dilation": 2**10,
    "projection_hidden_size": 2**16,
    "projection_bottleneck_size": 2**16,
    "prototype_size": 2**16,
    "refinement_iterations": 10**4,
    "num_labels": 10**5,
    "class_prior_weight": 10**3,
    "cam_scales": 16,
    "inference_scales": 16,
    "refinement_dilations": 2**12,
}
MAX_BACKBONE_FIELDS = {
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2**12,
    "num_register_tokens": 2**12,
    "image_size": 2**14,
    "patch_size": 2**10,
    "num_channels": 2**10,
    "mlp_ratio": 2**6,
    "num_labels": 10**5,
}
MAX_LIST = 64
# that of the safetensors library
MAX_HEADER_BYTES = 100_000_000
# what a folder with missing, truncated or foreign files raises on loading
LOADING_ERRORS = (OSError, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError)


def find_model_folder(run: str | Path, on_hub: bool = True) -> Path:
    """
    Finds a trained model. A missing path is reported at once, without asking the Hub.

    Args:
        run (`str` or `Path`): Folder, or Hub id `owner/name`. Only JSON and safetensors files are fetched.
        on_hub (`bool`, *optional*, defaults to `True`): Whether a Hub id is accepted.

    Returns:
        `Path`: the folder, with a `config.json`.

    Raises:
        ValueError: If there is no such folder, it holds no model, or the Hub does not give the model.
    """
    folder = Path(run)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            unfinished = ": its training has not ended, continue it" if any(folder.glob("checkpoint-*")) else ""
            raise ValueError(
                f"{run} holds no trained model (no {CONFIG}){unfinished}; give the folder of a finished run."
            )
        return folder
    if folder.exists():
        raise ValueError(f"{run} is a file; give the folder of a trained model.")
    expected = "the folder of a trained model" + (", or its name on the Hub (owner/name)" if on_hub else "")
    # with a folder `owner` here, `owner/name` is a misspelt path
    if not on_hub or not is_hub_id(str(run)) or folder.parent.is_dir():
        beside = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = difflib.get_close_matches(folder.name, beside, n=1)
        hint = f"did you mean {folder.parent / close[0]}?" if close else f"give {expected}."
        raise ValueError(f"{run}: no such folder; {hint}")
    try:
        return Path(snapshot_download(str(run), allow_patterns=["*.json", "*.safetensors"]))
    except GatedRepoError as error:
        raise ValueError(f"{run} is gated: ask for access at <https://huggingface.co/{run}>, then log in.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{run}: no such folder, and no such model on the Hub, or a private one; give {expected}, and log in "
            "(hf auth login) for a private model."
        ) from error
    except (OSError, HfHubHTTPError.__bases__[0]) as error:
        # the base is that of the HTTP library, which has errors of its own for connections that fail
        reason = one_line(error.__cause__ or error)[:200]
        raise ValueError(
            f"{run}: no such folder, and the Hub cannot be reached ({reason}); give the folder of a trained model, or "
            "try again with a network."
        ) from error


def check_model_folder(folder: str | Path) -> SynerNetConfig:
    """
    Refuses a folder that `from_pretrained` should not be given.

    Nothing is unpickled, no tensor is read, no file outside the folder is opened. After this check loading needs no
    more memory than the folder's weights. `max_pixels` of the image processor may be null: set
    `processor.max_pixels` after loading where the images are not your own.

    Args:
        folder (`str` or `Path`): The folder: `config.json` and `model.safetensors`, or its parts with their index.

    Returns:
        [`SynerNetConfig`]: The folder's configuration.

    Raises:
        FileNotFoundError: If the configuration or the weights are missing.
        ValueError: If the configuration is none of a SynerNet, it or the image processor's (where there is one) asks
            for absurd sizes, an index names files outside the folder, a weights file is no safetensors file, or the
            weights are fewer than the configuration asks for.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if (folder / PROCESSOR).is_file():
        _check_processor(folder / PROCESSOR)
    held = sum(_count_elements(path) for path in _weight_files(folder))
    with torch.device("meta"):
        model = SynerNetForWeaklySupervisedSegmentation(config)
    needed = sum(parameter.numel() for parameter in model.parameters())
    if held < needed:
        raise ValueError(
            f"{folder} is refused: its configuration asks for {needed:,} weights, its files hold {held:,}; they do not "
            "belong together."
        )
    return config


def load_model(run: str | Path) -> SynerNetForWeaklySupervisedSegmentation:
    """
    Checks and loads a trained model, which must have all its weights.

    Args:
        run (`str` or `Path`): Folder, or Hub id `owner/name`, of which only JSON and safetensors files are fetched.

    Returns:
        [`SynerNetForWeaklySupervisedSegmentation`]: in evaluation mode on the CPU.

    Raises:
        ValueError: [`check_model_folder`] refuses the folder, or the model cannot be loaded.
    """
    return _load(run)[0]


def load_model_folder(run: str | Path) -> tuple[SynerNetForWeaklySupervisedSegmentation, SynerNetImageProcessor]:
    """Loads the model and the image processor beside it, with the argument and errors of [`load_model`]."""
    return _load(run, with_processor=True)


def _load(run: str | Path, with_processor: bool = False):
    folder = find_model_folder(run)
    try:
        check_model_folder(folder)
        model, report = SynerNetForWeaklySupervisedSegmentation.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
        processor = SynerNetImageProcessor.from_pretrained(folder) if with_processor else None
    except LOADING_ERRORS as error:
        raise ValueError(
            f"{run} holds no usable model ({one_line(error)}); give the folder of a finished run."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"The weights in {run} lack {len(missing)} parameters, such as {missing[0]}; give the folder of a finished "
            "run."
        )
    return model, processor


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; name the folder of a saved SynerNet.")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} is refused: {path.stat().st_size:,} bytes are too many for a description of a model."
        )
    try:
        content = read_json(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is refused: it is no JSON that can be read.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is refused: it holds a {type(content).__name__}, fields by name are expected.")
    return content


def _read_config(folder: Path) -> SynerNetConfig:
    fields = _read_json(folder / CONFIG)
    if fields.get("model_type") != SynerNetConfig.model_type:
        raise ValueError(
            f"{folder} is refused: its model type is {str(fields.get('model_type'))[:40]!r}, expected is "
            f"{SynerNetConfig.model_type!r}."
        )
    try:
        _check_sizes(fields, MAX_FIELDS, "")
        if isinstance(fields.get("backbone_config"), dict):
            _check_sizes(fields["backbone_config"], MAX_BACKBONE_FIELDS, "backbone_config.")
        return SynerNetConfig.from_dict(fields)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{folder} is refused: its configuration is none of a SynerNet ({one_line(error)[:300]})."
        ) from error


def _check_sizes(fields: dict, limits: dict[str, int], where: str) -> None:
    """Refuses sizes above `limits`, numbers or lists of numbers; the configuration itself checks the types."""
    for name, limit in limits.items():
        given = fields.get(name)
        values = given if isinstance(given, list) else [given]
        if len(values) > MAX_LIST:
            raise ValueError(f"{where}{name} has {len(values)} items, more than {MAX_LIST}")
        for value in values:
            if isinstance(value, int | float) and not value <= limit:
                raise ValueError(f"{where}{name} is {value}, more than {limit}")


def _check_processor(path: Path) -> None:
    fields = _read_json(path)
    for name in ("size", "crop_size", "pad_size", "size_divisor"):
        value = fields.get(name)
        sides = value.values() if isinstance(value, dict) else [value]
        for side in sides:
            if side is not None and not (type(side) is int and 1 <= side <= MAX_SIDE):
                raise ValueError(
                    f"{path} is refused: its {name} is {str(value)[:80]}, expected are whole numbers of pixels from 1 "
                    f"to {MAX_SIDE:,}."
                )
    bound = fields.get("max_pixels")
    if bound is not None and not (type(bound) is int and 1 <= bound <= MAX_PIXELS):
        raise ValueError(
            f"{path} is refused: its max_pixels is {str(bound)[:80]}, expected is a whole number of pixels from 1 to "
            f"{MAX_PIXELS:,}, or null for no bound."
        )


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {WEIGHTS}; weights in other files, such as pickled ones, are not loaded."
        )
    table = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{folder / INDEX} is refused: it names no weights.")
    files = []
    for name in sorted({str(value) for value in table.values()}):
        plain = name == PurePosixPath(name).name == PureWindowsPath(name).name
        if not plain or not name.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} is refused: it names {name[:80]!r}, which is not a file of the folder."
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}, which its index names.")
        files.append(folder / name)
    return files


def _count_elements(path: Path) -> int:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise ValueError(
            f"{path} is refused: its header claims {length:,} of {size:,} bytes; it is not a safetensors file, or it is damaged."
        )
    try:
        with safe_open(path, framework="pt") as content:
            shapes = [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is refused: it is not a safetensors file, or it is damaged ({error}).") from error
    return sum(torch.Size(shape).numel() for shape in shapes)


__all__ = ["check_model_folder", "find_model_folder", "load_model", "load_model_folder"]
