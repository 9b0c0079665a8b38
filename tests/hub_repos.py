"""What the loopback hub keeps: repositories with their commits and references, and the checks of a card's header."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml


class HubError(Exception):
    """An answer that is not a success: status, error code of the Hub (for 404 and the like) and message."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (headers or {})


@dataclass(frozen=True)
class Blob:
    """Content of a file: its digests and where it lies; `is_lfs` says how it was committed."""

    path: Path
    size: int
    sha256: str
    git_oid: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass(frozen=True)
class Commit:
    """A state of a repository: every path with its content."""

    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: its commits by hash, and `refs` such as `refs/heads/main` by name."""

    kind: str
    repo_id: str
    owner: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add_commit(self, parent: Commit | None, title: str, description: str, author: str, files: dict) -> Commit:
        date = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        listing = [(path, blob.sha256) for path, blob in sorted(files.items())]
        text = json.dumps([parent and parent.oid, title, author, date, len(self.commits), listing])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.commits[oid] = Commit(oid, parent and parent.oid, title, description, author, date, files)
        return self.commits[oid]

    def ref_of(self, revision: str) -> str | None:
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit_at(self, revision: str) -> Commit:
        ref = self.ref_of(revision)
        oid = self.refs[ref] if ref else revision
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


def split_card(content: str) -> tuple[dict | None, str]:
    """The YAML header of a card (`None` without one) and its text."""
    match = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)(.*)", content, re.DOTALL)
    return (yaml.safe_load(match[1]), match[2]) if match else (None, content)


def validate_card(content: str) -> tuple[list[str], list[str]]:
    """
    What the Hub refuses in the header of a card, and what it warns of, as far as this hub checks it.

    Returns:
        `tuple[list[str], list[str]]`: errors and warnings.
    """
    try:
        header = split_card(content)[0]
    except yaml.YAMLError as error:
        return [f"The header is not YAML: {error}"], []
    if not header:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = []
    ids = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
    for name in ("tags", "datasets", "metrics"):
        values = header.get(name) or []
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{name}" must be an array of strings')
        elif name != "tags":
            errors += [f'"{name}" holds {value!r}, which is no id' for value in values if not ids.fullmatch(value)]
    bases = header.get("base_model") or []
    for base in [bases] if isinstance(bases, str) else bases:
        if not ids.fullmatch(str(base)):
            errors.append(f'"base_model" is {base!r}, which is no model id')
    if "license" in header and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(header["license"])):
        errors.append(f'"license" is {header["license"]!r}, which is no licence id')
    if header.get("license") == "other" and "license_name" not in header:
        errors.append('"license_name" is needed beside the license "other"')
    for number, model in enumerate(header.get("model-index") or []):
        for text in _model_index_errors(model):
            errors.append(f'"model-index[{number}]{text}')
    return errors, []


def _model_index_errors(model: dict) -> list[str]:
    errors = [] if model.get("name") else ['.name" is required']
    for number, result in enumerate(model.get("results") or []):
        needed = [("task", "type"), ("dataset", "type"), ("dataset", "name")]
        for group, name in needed:
            value = (result.get(group) or {}).get(name)
            if not isinstance(value, str) or not value:
                errors.append(f'.results[{number}].{group}.{name}" is required')
        kind = str((result.get("dataset") or {}).get("type"))
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", kind):
            errors.append(f'.results[{number}].dataset.type" is {kind!r}, which is no data set id')
        for metric in result.get("metrics") or [{}]:
            if not re.fullmatch(r"[a-z0-9][\w.-]*(/[\w.-]+)?", str(metric.get("type", ""))):
                errors.append(f'.results[{number}].metrics.type" must be a metric id')
            if not isinstance(metric.get("value"), (int, float)):
                errors.append(f'.results[{number}].metrics.value" must be a number')
    return errors
