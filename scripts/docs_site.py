"""
What `make docs` adds to the pages of docs/ (hooks of mkdocs.yml): pages that stand elsewhere in the repository, files
that pages link to, and the reference of the public names, from their docstrings.
"""

import ast
import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).resolve().parents[1]
# pages for readers of the repository, under the same path on the site
PAGES = ("examples/README.md", "benchmarks/README.md", "CHANGELOG.md", "CONTRIBUTING.md")
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)(#[\w-]+)?\)")
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def place_of(uri: str) -> str:
    """Folder in the repository that relative links of a page start from."""
    return posixpath.dirname(uri if uri in PAGES else f"docs/{uri}")


def target_of(page: str, link: str) -> str:
    """Path in the repository that a page's relative link leads to."""
    return posixpath.normpath(posixpath.join(place_of(page), link))


def uri_of(path: str) -> str:
    """Path on the site of a file of the repository."""
    return path.removeprefix("docs/")


def modules() -> dict[str, list[str]]:
    """Names that the package and its rooms export, read without importing them."""
    found = {}
    for path in sorted((ROOT / "src" / "synernet_hf").glob("**/*.py")):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        inner = len(parts) == 3 and path.name != "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" and not inner:
                names = [name for name in ast.literal_eval(node.value) if not name.startswith("__")]
                found[".".join(parts)] = names
    return found


def reference() -> str:
    """The pages' text below docs/api.md: each public name with its docstring."""
    text = ""
    for module, names in modules().items():
        text += f"\n## {module} {{ #{module.replace('.', '-')} }}\n"
        text += "".join(f"\n::: {module}.{name}\n    options: {{heading_level: 3}}\n" for name in names)
    return text


def on_files(files: Files, config) -> Files:
    """Adds the pages of other folders, and the files that pages link to."""
    for uri in PAGES:
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / uri)))
    for page in [file for file in files if file.is_documentation_page()]:
        text = CODE.sub("", page.content_string)
        for _, link, _ in LINK.findall(text):
            path = target_of(page.src_uri, link)
            if (ROOT / path).is_file() and files.get_file_from_path(uri_of(path)) is None:
                files.append(File.generated(config, uri_of(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Turns links to files of the repository into links within the site; folders are named only."""
    uri = page.file.src_uri

    def on_site(match: re.Match) -> str:
        path = target_of(uri, match[2])
        if (ROOT / path).is_dir():
            return match[1]
        return f"[{match[1]}]({posixpath.relpath(uri_of(path), posixpath.dirname(uri) or '.')}{match[3] or ''})"

    markdown = LINK.sub(on_site, markdown)
    return markdown + reference() if uri == "api.md" else markdown


class PlainTypes(griffe.Extension):
    """Docstrings write types as transformers does, in backticks; the site sets them in code by itself."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Takes the backticks of types and the brackets of names off a docstring."""
        if obj.docstring is not None:
            text = re.sub(r"\[(`~?[\w.]+`)\]", r"\1", obj.docstring.value)
            obj.docstring.value = re.sub(r"^(\s+[*\w, ]+) \((.*)\):", self._plain, text, flags=re.MULTILINE)

    @staticmethod
    def _plain(match: re.Match) -> str:
        return f"{match[1]} ({match[2].replace('`', '').replace('*optional*', 'optional')}):"
