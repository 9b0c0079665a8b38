"""What is imported when: nothing heavy before it is needed, and the auto classes know SynerNet in every order of imports."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [ROOT / name for name in ("examples", "scripts", "benchmarks")]
COMMANDS = sorted(
    path for folder in FOLDERS for path in folder.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")
)
# words that are answered at once
WORDS = ("--help", "--helpp", "export --help", "push --help")

LIGHT = f"""
import os, runpy, sys
from contextlib import redirect_stderr, redirect_stdout

def heavy():
    return sorted({{"torch", "transformers", "datasets", "accelerate"}} & set(sys.modules))

import synernet_hf
assert "SynerNetModel" in dir(synernet_hf) and not heavy(), heavy()
sys.path[:0] = {[str(folder) for folder in FOLDERS]!r}
with open(os.devnull, "w") as nowhere:
    for script in sys.argv[1:]:
        for word in {WORDS!r}[: 4 if script == "-m" else 2]:
            sys.argv = [script, *word.split()]
            try:
                with redirect_stdout(nowhere), redirect_stderr(nowhere):
                    run = runpy.run_module if script == "-m" else runpy.run_path
                    run("synernet_hf" if script == "-m" else script, run_name="__main__")
                print(script, word, "goes on")
            except SystemExit as stop:
                if stop.code not in (None, 0) and word != "--helpp":
                    print(script, word, stop.code)
            if heavy():
                sys.exit(f"{{script}} {{word}} imports {{heavy()}}")
"""


def run_python(code: str, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True)


def test_package_help_and_misspelt_options_import_neither_torch_nor_transformers():
    done = run_python(LIGHT, "-m", *map(str, COMMANDS))
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "words",
    [
        ("src/synernet_hf/__main__.py", "trian"),
        ("src/synernet_hf/__main__.py", "export", "model", "--onnx", "out", "--tolerance", "much"),
        ("src/synernet_hf/__main__.py", "push", "run"),
        ("examples/train.py", "--max_steps", "many"),
        ("examples/train.py", "--config", "no_such_recipe.yaml"),
        ("examples/train.py", "--dataset_options", "[1"),
        ("examples/demo.py", "--max_step", "3"),
        ("examples/demo.py", "--num_images", "0"),
        ("examples/evaluate.py", "run", "--max_samples", "0"),
        ("examples/predict.py", "run", "no_such_image.jpg"),
        ("examples/prepare_data.py", "--num_threads", "0"),
        ("examples/pseudo_labels.py", "run", "--output", "out", "--map", "waffle"),
        ("examples/train_on_pseudo_labels.py", "--pseudo_labels", "x", "--output_dir", "out", "--max_step", "3"),
        ("examples/train_on_pseudo_labels.py", "--pseudo_labels", "x", "--output_dir", "out", "--model", "./nowhere"),
        ("benchmarks/ablation.py", "--data", "shapes", "--output", "out", "--seed", "3"),
        ("benchmarks/metric.py", "--num_images", "0"),
        ("benchmarks/refinement.py", "--rounds", "0"),
    ],
    ids=" ".join,
)
def test_mistakes_are_answered_without_torch(words, tmp_path):
    script, *rest = words
    code = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\ntry:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n    print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = run_python(code, str(ROOT / script), *rest)
    assert done.returncode == 2 and done.stdout == "False\n", done
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("package", ["synernet_hf", "synernet_hf.training"])
def test_type_checkers_see_the_names_that_are_imported_late(package):
    loaded = importlib.import_module(package)
    tree = ast.parse(Path(loaded.__file__).read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in block.body:
        home = importlib.import_module("." * node.level + node.module, package if node.level else None)
        for alias in node.names:
            assert alias.name in loaded.__all__ and alias.name in dir(loaded)
            assert getattr(loaded, alias.name) is getattr(home, alias.name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = loaded.no_such_name


# each in a process of its own, in which torch is loaded and transformers is not
ORDERS = {
    "package, model": "import synernet_hf; from transformers import AutoModelForSemanticSegmentation as Auto; "
    "assert type(Auto.from_pretrained(FOLDER)) is synernet_hf.SynerNetForWeaklySupervisedSegmentation",
    # loads the auto classes amid modeling_utils, which the model needs
    "package, base class, config": "import synernet_hf; from transformers import PreTrainedModel, AutoConfig; "
    "assert type(AutoConfig.from_pretrained(FOLDER)) is synernet_hf.SynerNetConfig",
    # two watchers of imports, of which each asks the other
    "package, again, config": "import synernet_hf, importlib; importlib.reload(synernet_hf); "
    "from transformers import AutoConfig; assert type(AutoConfig.from_pretrained(FOLDER)) is synernet_hf.SynerNetConfig",
    "auto class, package": "from transformers import AutoModel; import synernet_hf; "
    "assert type(AutoModel.from_pretrained(FOLDER)) is synernet_hf.SynerNetModel",
    "package, pipeline": "import synernet_hf; from transformers import pipeline; "
    "assert type(pipeline('weakly-supervised-segmentation', FOLDER)) is synernet_hf.SynerNetSegmentationPipeline",
    "forked": "import synernet_hf; child = os.fork(); from transformers import AutoImageProcessor as Auto; "
    "assert type(Auto.from_pretrained(FOLDER)) is synernet_hf.SynerNetImageProcessor; "
    "child and os._exit(os.waitpid(child, 0)[1])",
}
MORE_ORDERS = {
    "package, config": "import synernet_hf; from transformers import AutoConfig; "
    "assert type(AutoConfig.from_pretrained(FOLDER)) is synernet_hf.SynerNetConfig",
    "package, module of auto": "import synernet_hf; from transformers.models.auto.configuration_auto import AutoConfig; "
    "assert type(AutoConfig.for_model('synernet')) is synernet_hf.SynerNetConfig",
    "package, image processor": "import synernet_hf; from transformers import AutoImageProcessor as Auto; "
    "assert type(Auto.from_pretrained(FOLDER)) is synernet_hf.SynerNetImageProcessor",
    "package, tasks": "import synernet_hf; from transformers.pipelines import PIPELINE_REGISTRY; "
    "assert 'weakly-supervised-segmentation' in PIPELINE_REGISTRY.get_supported_tasks()",
    "package, stock pipeline": "import synernet_hf; from transformers import pipeline; "
    "assert type(pipeline('image-segmentation', FOLDER).model) is synernet_hf.SynerNetForWeaklySupervisedSegmentation",
    "transformers, package": "import transformers, synernet_hf; "
    "assert type(transformers.AutoModel.from_pretrained(FOLDER)) is synernet_hf.SynerNetModel",
    "class, config": "from synernet_hf import SynerNetConfig; from transformers import AutoConfig; "
    "assert type(AutoConfig.from_pretrained(FOLDER)) is SynerNetConfig",
    "a file of the model": "from synernet_hf.model.image_processing_synernet import SynerNetImageProcessor as Own; "
    "from transformers import AutoImageProcessor as Auto; assert type(Auto.from_pretrained(FOLDER)) is Own",
    "spawned": "import synernet_hf, importlib, multiprocessing; from transformers import AutoConfig; "
    "pool = multiprocessing.get_context('spawn').Pool(1, importlib.import_module, ['synernet_hf']); "
    "assert type(pool.apply(AutoConfig.for_model, ['synernet'])) is synernet_hf.SynerNetConfig; pool.terminate()",
    "two threads": "import synernet_hf, transformers; from concurrent.futures import ThreadPoolExecutor; "
    "pool = ThreadPoolExecutor(2); load = lambda _: type(transformers.AutoModel.from_pretrained(FOLDER)); "
    "assert set(pool.map(load, range(2))) == {synernet_hf.SynerNetModel}",
}
IN_CHILDREN = """
import os, sys, traceback
import torch
FOLDER, *cases = sys.argv[1:]
for case in cases:
    child = os.fork()
    if not child:
        try:
            exec(case)
            os._exit(0)
        except BaseException:
            traceback.print_exc(limit=-3)
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        print(case)
"""


def assert_registered(orders: dict[str, str], folder: Path) -> None:
    done = run_python(IN_CHILDREN, str(folder), *orders.values())
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr[-4000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its cases by forking")
def test_auto_classes_know_synernet_in_every_order_of_imports(tiny_run_folder):
    assert_registered(ORDERS, tiny_run_folder)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its cases by forking")
def test_auto_classes_know_synernet_in_further_orders_of_imports(tiny_run_folder):
    assert_registered(MORE_ORDERS, tiny_run_folder)
