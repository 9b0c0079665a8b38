"""The documentation holds: links lead somewhere, named files exist, Python blocks run, commands have real options."""

import argparse
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from devkit_utils import write_labels_npz, write_voc_devkit
from PIL import Image
from testing_utils import tiny_backbone_config
from transformers import ViTForImageClassification

from synernet_hf import SynerNetImageProcessor
from synernet_hf.commands import COMMANDS, main


ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / folder / "README.md" for folder in ("examples", "benchmarks")]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *READMES])
BLOCK = re.compile(r"(<!-- walk-through -->\n+)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"bash", "csv", "json", "python", "text", "yaml"}
# What makes a block short enough for a test. The text on the left has to be on the page.
SHORTER = {
    "docs/data.md": {"num_batches=100": "num_batches=2", '"num_train": 500': '"num_train": 8, "num_validation": 4'},
    "docs/training.md": {
        "crop_size=224": "crop_size=32",
        "max_steps=1200": "max_steps=1",
        "max_steps=100,": "max_steps=2, use_cpu=True,",
    },
}
# Options of accelerate, torchrun and transformers' Trainer.
FOREIGN_OPTIONS = {
    "--config_file",
    "--cpu",
    "--local-rank",
    "--logdir",
    "--machine_rank",
    "--main_process_ip",
    "--main_process_port",
    "--multi_gpu",
    "--nnodes",
    "--nproc_per_node",
    "--num_machines",
    "--num_processes",
    "--project",
    "--quiet",
    "--rdzv_backend",
    "--rdzv_endpoint",
    "--rdzv_id",
}
FOREIGN_OPTIONS |= {"--per_device_train_batch_size"}
FOLDERS = ("benchmarks", "examples", "scripts")
SCRIPTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py") if "__main__" in path.read_text())


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> list[str]:
    """Python blocks of a page but for those of the walk-through, which tests/hub runs."""
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [text for elsewhere, language, text in blocks if language == "python" and not elsewhere]


PAGES_WITH_PYTHON = [page for page in PAGES if python_blocks(page)]


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors_of(path: Path) -> set[str]:
    """Anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    kept = [re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page_name(page)} links to {target}, which is not there"
        if anchor and linked.suffix == ".md":
            assert anchor in anchors_of(linked), f"{page_name(page)} links to {target}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_exist(page):
    pattern = r"(?<![\w./-])((?:examples|docs|src|tests)/[\w./-]*\w\.(?:py|md|yaml))\b"
    for name in set(re.findall(pattern, page.read_text(encoding="utf-8"))):
        assert (ROOT / name).is_file(), f"{page_name(page)} names {name}, which is not there"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    used = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert used <= targets, f"{page_name(page)} names make targets that are not there: {used - targets}"


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_pages_have_no_marks_of_a_merge(page):
    assert not re.search(r"^(<<<<<<<|=======|>>>>>>>)( |$)", page.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_block_names_its_language(page):
    languages = {language for _, language, _ in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert languages <= LANGUAGES, f"{page_name(page)} has blocks in {languages - LANGUAGES or 'no language'}"


def write_images_of_the_table(folder: Path) -> None:
    """Writes the table of docs/data.md and the images and masks that it names."""
    (table,) = [
        text for _, language, text in BLOCK.findall((ROOT / "docs" / "data.md").read_text()) if language == "csv"
    ]
    for name in re.findall(r"[\w/]+\.(?:jpg|png)", table):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L" if "masks" in name else "RGB", (48, 40)).save(folder / name)
    (folder / "labels.csv").write_text(table)


def write_coco(folder: Path) -> None:
    """Writes a COCO folder with one image in each split."""
    for split in ("train2014", "val2014"):
        (folder / split).mkdir(parents=True)
        Image.new("RGB", (48, 40)).save(folder / split / "1.jpg")
        annotation = {"id": 1, "image_id": 1, "category_id": 18, "iscrowd": 0, "segmentation": [[4, 4, 20, 4, 20, 20]]}
        content = {
            "images": [{"id": 1, "file_name": "1.jpg", "width": 48, "height": 40}],
            "annotations": [annotation],
            "categories": [{"id": 18, "name": "dog"}],
        }
        (folder / "annotations").mkdir(exist_ok=True)
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


@pytest.fixture(params=[None, 32], ids=["as they are", "resized"])
def reader_folder(request, tiny_run_folder, tmp_path, monkeypatch) -> Path:
    """What a reader of the pages has: a run that shows the model images as they are or resized, data, an encoder."""
    shutil.copytree(tiny_run_folder, tmp_path / "runs" / "demo")
    if request.param is not None:
        processor = SynerNetImageProcessor(do_resize=True, size={"shortest_edge": request.param})
        processor.save_pretrained(tmp_path / "runs" / "demo")
    data = tmp_path / "path" / "to"
    write_labels_npz(data / "voc2012_image_labels.npz", write_voc_devkit(data).labels)
    write_coco(data / "coco")
    write_images_of_the_table(data / "images")
    rows = {
        "image": [str(tiny_run_folder / "image.png")] * 2,
        "objects": ["cat", "cat;dog"],
        "segmentation": [None] * 2,
    }
    for split in ("train", "validation"):
        split_rows = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        split_rows.cast_column("segmentation", datasets.Image()).to_parquet(
            tmp_path / "owner" / "name" / f"{split}.parquet"
        )
    encoder = tmp_path / "facebook" / "deit-tiny-patch16-224"
    ViTForImageClassification(tiny_backbone_config()).save_pretrained(encoder)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: "runs/demo")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", PAGES_WITH_PYTHON, ids=page_name)
def test_python_blocks_run(page, reader_folder, monkeypatch):
    for words in commands_of(page):
        if words[:2] == ["synernet", "export"]:
            assert main(words[1:]) == 0
    names: dict = {"__name__": "__main__"}
    shorter = dict(SHORTER.get(page_name(page), {}))
    for number, block in enumerate(python_blocks(page), start=1):
        for long in [long for long in shorter if long in block]:
            block = block.replace(long, shorter.pop(long))
        exec(compile(block, f"{page_name(page)}, block {number}", "exec"), names)
    assert not shorter, f"{page_name(page)} has no {list(shorter)}"


# what makes the first notebook short enough for a test
SHORTER_CELLS = {
    "num_train=600": "num_train=40",
    '"--max_steps", "400"': '"--max_steps", "1", "--per_device_batch_size", "4"',
    "range(50)": "range(4)",
}


def test_notebooks_run(tmp_path, monkeypatch):
    """The second one looks into the model that the first one trains."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    folder, shorter = ROOT / "examples" / "notebooks", dict(SHORTER_CELLS)
    assert {path.stem for path in folder.glob("*.ipynb")} == {"own_images", "looking_inside"}
    for notebook in ("own_images", "looking_inside"):
        names: dict = {"__name__": "__main__"}
        cells = json.loads((folder / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
        for number, cell in enumerate(cells, start=1):
            code = "".join(cell["source"])
            for long in [long for long in shorter if long in code]:
                code = code.replace(long, shorter.pop(long))
            if cell["cell_type"] == "code":
                exec(compile(code, f"{notebook}, cell {number}", "exec"), names)
        if notebook == "own_images":
            Path("runs", "demo").symlink_to(tmp_path / "runs" / "my_images")
    assert not shorter, f"own_images has no {list(shorter)}"


def commands_of(page: Path) -> list[list[str]]:
    """Words of the commands in blocks and in the text that run a script of ours."""
    text = page.read_text(encoding="utf-8")
    blocks = "".join(block for _, language, block in BLOCK.findall(text) if language == "bash")
    lines = blocks.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|synernet|accelerate launch) [^`]+)`", without_code(text))
    lines = [line.replace("$VOC", "--data_dir $DEVKIT --image_labels $LABELS --backbone $DEIT") for line in lines]
    words = [shlex.split(line, comments=True) for line in lines if "…" not in line]
    # the last word is the script's or command's name where it is only named
    return [line for line in words if any(map(is_ours, line[:-1])) and (line[0] != "synernet" or len(line) > 2)]


def is_ours(word: str) -> bool:
    return (
        (ROOT / word).is_file()
        and word.endswith(".py")
        and not word.startswith("tests")
        or word in ("synernet", "synernet_hf")
    )


class Parsed(BaseException):
    """Ends a script as soon as its command line is read."""


def read_command_line(words: list[str], monkeypatch, options: set[str] | None = None) -> None:
    """Runs a script up to the point where it has read its command line; collects the options it has."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_and_end(parser, args=None, namespace=None):
        if options is not None:
            options.update(parser._option_string_actions)
        known, rest = parse(parser, args, namespace)
        # the recipe's own parser leaves the rest to the next one
        if parser.add_help and not rest:
            raise Parsed
        return known, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", words)
    if words[0] in ("synernet", "synernet_hf"):
        sys.exit(main(words[1:]))
    else:
        monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=page_name)
def test_commands_are_read(page, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in commands_of(page):
        script = next(place for place, word in enumerate(words) if is_ours(word))
        with monkeypatch.context() as patch:
            try:
                read_command_line(words[script:], patch)
            except Parsed:
                continue
            except SystemExit as ended:
                assert not ended.code, f"{page_name(page)}: {shlex.join(words)}\n{capsys.readouterr().err[-500:]}"


@pytest.fixture(scope="module")
def all_options() -> set[str]:
    """Options of all scripts, of accelerate, torchrun and the Trainer as far as the pages name them."""
    options = set(FOREIGN_OPTIONS)
    commands = [["synernet", name] for name in ("", *COMMANDS)]
    for words in [*([page_name(path)] for path in (*SCRIPTS, ROOT / "tests" / "hub_server.py")), *commands]:
        with pytest.MonkeyPatch.context() as patch, pytest.raises((Parsed, SystemExit)):
            read_command_line([*filter(None, words), "--help"], patch, options)
    return options


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=page_name)
def test_named_options_exist(page, all_options):
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text(encoding="utf-8")))
    assert named <= all_options, f"{page_name(page)} names options that no script has: {named - all_options}"


def test_the_site_has_every_page():
    named = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages <= set(named)
    for name in set(named) - pages:
        assert (ROOT / name).is_file()
    assert len(named) == len(set(named))


def test_tests_named_beside_promises_exist():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 8
    assert not named - set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))


def test_readme_says_how_to_test_and_try():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make test", "make demo", 'pip install -e ".[train]"', "--config voc_animals"):
        assert command in text


def test_public_names_stand_in_their_modules():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").replace("`evaluate`", "evaluate")
    rows = re.findall(r"^\| (`synernet_hf[^|]*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 8
    for modules, names in rows:
        found = [importlib.import_module(module) for module in re.findall(r"`([\w.]+)`", modules)]
        missing = [name for name in re.findall(r"`(\w+)`", names) if not any(hasattr(it, name) for it in found)]
        assert not missing, f"{modules} has no {missing}"


def test_parts_of_the_method_stand_in_their_files():
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[\w/]+\.py`[^|]*) \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 6
    for files, names in rows:
        paths = [
            name if "/" in name else f"src/synernet_hf/model/{name}" for name in re.findall(r"`([\w/.]+)`", files)
        ]
        sources = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
        missing = [name for name in re.findall(r"`(\w+)`", names) if not re.search(rf"\b{name}\b", sources)]
        assert not missing, f"{files} has no {missing}"


def test_the_docstring_names_the_source_of_every_config_field():
    from synernet_hf import SynerNetConfig

    entries = dict(
        re.findall(r"^        (\w+) \(`.*?\):\s(.*\n(?:            .*\n)*)", SynerNetConfig.__doc__, re.MULTILINE)
    )
    own = [name for name in SynerNetConfig.__annotations__ if not name.startswith(("_", "model_type", "sub_configs"))]
    assert len(own) > 20
    named = [name for name in own if re.search(r"\[(?:paper|authors|ours)\b", entries.get(name, ""))]
    assert named == own, f"the docstring does not say where these defaults come from: {set(own) - set(named)}"


def test_changelog_names_the_version():
    import synernet_hf

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = synernet_hf.__version__.partition(".dev")[0]
    assert "## [Unreleased]" in text or f"## [{released}]" in text
