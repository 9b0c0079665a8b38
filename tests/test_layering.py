"""Who may import whom, what scripts may import, and the rules that keep `model/` exportable to the Hub as a flat folder of files."""

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest


SOURCE = Path(__file__).resolve().parents[1] / "src" / "synernet_hf"
FILES = sorted(SOURCE.rglob("*.py"))
MODEL_FILES = sorted(path for path in (SOURCE / "model").glob("*.py") if path.name != "__init__.py")

MAX_LINES = 550
# read from top to bottom, as model files of transformers are
MAX_MODELING_LINES = 800
MAX_FUNCTION_LINES = 80
MAX_LOOP_LINES = 120
MAX_ARGUMENTS = 8

# Per room: which other rooms of the package it may import, and which third-party roots.
DATA_LIBRARIES = {"torch", "datasets", "PIL", "numpy", "kornia", "pycocotools", "evaluate"}
ROOMS = {
    "__init__": ({"lazy", "model"}, set()),
    "__main__": ({"commands"}, set()),
    "commands": (
        set(
            "cli crf data export files model model_card model_folder pseudo_labels review training visualization".split()
        ),
        DATA_LIBRARIES | {"accelerate", "huggingface_hub", "tensorboard"},
    ),
    "lazy": (set(), set()),
    "model": (set(), {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "safetensors"}),
    "files": (set(), set()),
    "progress": (set(), {"tqdm"}),
    "cli": ({"files"}, {"transformers", "huggingface_hub"}),
    "data": ({"files", "model", "progress"}, DATA_LIBRARIES | {"huggingface_hub"}),
    "metrics": (set(), DATA_LIBRARIES),
    "visualization": ({"files", "model"}, DATA_LIBRARIES | {"matplotlib"}),
    "crf": (set(), {"numpy", "PIL", "pydensecrf"}),
    "model_folder": ({"model", "files"}, {"torch", "huggingface_hub", "safetensors"}),
    "export": (
        {"cli", "model", "model_folder", "files"},
        {"torch", "numpy", "onnxruntime", "torchao"},
    ),
    "mask_encodings": (set(), {"numpy"}),
    "mask_formats": ({"data", "files", "mask_encodings", "visualization"}, {"numpy", "PIL", "pycocotools", "yaml"}),
    "pseudo_label_files": ({"files", "visualization"}, {"numpy", "PIL", "pyarrow"}),
    "review": (
        {"data", "files", "mask_formats", "model", "pseudo_label_files", "pseudo_labels", "visualization"},
        {"datasets", "numpy", "PIL"},
    ),
    "pseudo_labels": (
        {"model", "data", "files", "progress", "pseudo_label_files", "visualization"},
        {"torch", "numpy", "PIL", "datasets", "pyarrow", "accelerate"},
    ),
    "model_card": ({"files"}, {"huggingface_hub", "yaml", "jinja2"}),
    "training": (
        {"cli", "files", "lazy", "model", "data", "metrics", "crf", "model_card", "progress", "visualization"},
        DATA_LIBRARIES | {"accelerate", "transformers", "huggingface_hub", "safetensors", "yaml"},
    ),
}
# Inside model/: files that import no other file of the folder, and what the others may build on.
LEAVES = {"configuration", "refinement", "image_processing"}


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[int, str, int]]:
    """(level of the relative import, module, line) of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", node.lineno))
    return found


def test_the_package_is_found():
    assert {"__init__.py", "model/__init__.py", "data/__init__.py"} <= {relative(path) for path in FILES}
    assert {room_of(path) for path in FILES} <= set(ROOMS), "a new file or folder: add it to ROOMS with its rules"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_in_allowed_directions(path):
    room = room_of(path)
    rooms, libraries = ROOMS[room]
    for level, module, line in imported(path):
        where = f"{relative(path)}:{line}"
        assert level <= 1, f"{where} climbs with `..`: write synernet_hf.… instead"
        if level == 1:
            depth = len(path.relative_to(SOURCE).parts)
            target = module.split(".")[0] if depth == 1 else room
            assert target == room or target in rooms, f"{where} imports {target}, which {room} may not know"
            continue
        root, *rest = module.split(".")
        if root == "synernet_hf":
            assert room != "model", f"{where} imports the package: files of model/ only know their neighbours"
            assert not rest or rest[0] == room or rest[0] in rooms, f"{where} imports {module}, which {room} may not"
        elif root not in sys.stdlib_module_names:
            assert root in libraries, f"{where} imports {root}, which {room} may not use"


@pytest.mark.parametrize("path", MODEL_FILES, ids=relative)
def test_model_files_import_named_neighbours_only(path):
    assert path.stem.endswith("_synernet"), f"{path.name} must be called <name>_synernet.py"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.module and re.fullmatch(r"[a-z_]+_synernet", node.module), (
                f"{relative(path)}:{node.lineno}: only `from .<name>_synernet import …` travels to the Hub"
            )
            assert (SOURCE / "model" / f"{node.module}.py").is_file()


def test_model_imports_form_a_hierarchy():
    edges = {
        path.stem.removesuffix("_synernet"): {
            module.removesuffix("_synernet") for level, module, _ in imported(path) if level
        }
        for path in MODEL_FILES
    }
    for leaf in LEAVES:
        assert edges[leaf] == set(), f"{leaf}_synernet.py must not import its neighbours, it imports {edges[leaf]}"
    done: set[str] = set()
    while len(done) < len(edges):
        ready = {name for name, needs in edges.items() if name not in done and needs <= done}
        assert ready, f"a circle among {sorted(set(edges) - done)}"
        done |= ready


@pytest.mark.parametrize("path", MODEL_FILES, ids=relative)
def test_no_import_line_in_texts_of_exported_files(path):
    # The export finds imports with regular expressions over the text, docstrings included.
    pattern = re.compile(r"^\s*(from\s+\S+\s+import\b|import\s+\S+\s*$)", re.MULTILINE)
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            match = pattern.search(node.value)
            assert match is None, f"{relative(path)}:{node.lineno}: reads as an import: {match.group().strip()!r}"


@pytest.mark.parametrize("path", MODEL_FILES, ids=relative)
def test_model_files_end_with_all(path):
    last = parsed(path).body[-1]
    assert isinstance(last, ast.Assign) and [target.id for target in last.targets] == ["__all__"]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_words_that_are_not_used(path):
    text = path.read_text(encoding="utf-8")
    for word in (r"\.cuda\(", r"\btorchvision\b", r"\btimm\b"):
        assert not re.search(word, text), f"{relative(path)} holds {word}"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_sizes(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = MAX_MODELING_LINES if path.name == "modeling_synernet.py" else MAX_LINES
    assert lines <= limit, f"{relative(path)} has {lines} lines; split it at {limit}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.lineno
            length = node.end_lineno - start + 1
            limit = MAX_LOOP_LINES if room_of(path) == "training" else MAX_FUNCTION_LINES
            assert length <= limit, f"{relative(path)}:{node.lineno} {node.name} has {length} lines of code"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_signatures_are_short(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
            # what comes on top of the task model's fixed signature: image processors hand out `pixel_mask`, training
            # loops hand in the others
            extra = "self cls pixel_mask gather_embeddings max_labels draws sum_counts".split()
            count = len([name for name in names if name not in extra])
            assert count <= MAX_ARGUMENTS, f"{relative(path)}:{node.lineno} {node.name} takes {count} arguments"


PUBLIC_MODULES = {
    "synernet_hf",
    *(
        f"synernet_hf.{name}"
        for name in (
            "cli commands crf data export files mask_formats metrics model model_card model_folder pseudo_labels review training visualization".split()
        )
    ),
}
ROOT = SOURCE.parents[1]
SCRIPTS = sorted(
    path for folder in ("examples", "examples/space", "scripts", "benchmarks") for path in (ROOT / folder).glob("*.py")
)
SCRIPTS += sorted((SOURCE / "commands").glob("[a-z]*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_scripts_import_public_names_only(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.split(".")[0] == "synernet_hf"]
            assert not set(modules) - PUBLIC_MODULES, f"{path.name}:{node.lineno} imports {modules}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "synernet_hf":
            where = f"{path.name}:{node.lineno}"
            assert node.module in PUBLIC_MODULES, f"{where} imports from {node.module}, which is inside a room"
            public = importlib.import_module(node.module).__all__
            private = [alias.name for alias in node.names if alias.name not in public]
            assert not private, f"{where} imports {private}, not in the __all__ of {node.module}"
