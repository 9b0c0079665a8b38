"""The documentation holds: links lead somewhere, named files exist, Python blocks marked for it run as written."""

import re
import shutil
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"])
# A Python block below this line is run; blocks of one page share their names, as when pasted one after another.
RUNNABLE = "<!-- runnable -->"
PYTHON_BLOCK = re.compile(re.escape(RUNNABLE) + r"\n+```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES_WITH_CODE = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("index.md", "inference.md", "hub.md"))]


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


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


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=page_name)
def test_python_blocks_run(page, tiny_run_folder, tmp_path, monkeypatch):
    blocks = PYTHON_BLOCK.findall(page.read_text(encoding="utf-8"))
    assert blocks, f"{page_name(page)} has no block marked {RUNNABLE}"
    shutil.copytree(tiny_run_folder, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"{page_name(page)}, block {number}", "exec"), names)


def test_readme_says_how_to_test_and_try():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for command in ("make test", "make demo", 'pip install -e ".[train]"', "examples/recipes/voc_animals.yaml"):
        assert command in text


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
