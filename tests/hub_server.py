"""
A small hub on the loopback interface, for the unmodified `huggingface_hub` client: no network, no account.

    python tests/hub_server.py --port 8808

Models and data sets with commits, branches, tags, pull requests, large files over LFS, private repositories and
resumable downloads. Everything lives as long as the process. `make hub` starts it and says how to use it.
"""

import argparse
import base64
import hashlib
import hmac
import json
import re
import secrets
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import markdown
from hub_repos import Blob, Commit, HubError, Repo, split_card, validate_card


# Who owns which token. `owner` writes to owner/…, `guest` reads what is public.
TOKENS = {"hf_owner": "owner", "hf_guest": "guest"}
# Files that go over LFS whatever their size, as the Hub's default .gitattributes has it; others from 10 MiB on.
LFS_SUFFIXES = {".safetensors", ".parquet", ".arrow", ".bin", ".npz", ".onnx", ".zip", ".pt"}
LFS_SIZE = 10 * 2**20
CHUNK = 2**16
KINDS = ("models", "datasets", "spaces")


class HubServer(ThreadingHTTPServer):
    """
    The hub, serving in a thread of its own between `__enter__` and `__exit__`.

    Args:
        port (`int`, *optional*, defaults to 0): port on 127.0.0.1; 0 takes a free one.

    `requests` lists what was asked for, as `(method, path, Range header)`.
    """

    daemon_threads = True

    def __init__(self, port: int = 0):
        super().__init__(("127.0.0.1", port), HubHandler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        # large files come from another host, as they do on the Hub: the client treats such redirects in its own way
        self.content_endpoint = f"http://localhost:{self.server_address[1]}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.lock = threading.RLock()
        self.secret = secrets.token_bytes(16)
        self._folder = tempfile.TemporaryDirectory(prefix="hub_server_")
        self._interruptions: list[int] = []

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc_info) -> None:
        self.shutdown()
        self.close()

    def close(self) -> None:
        self.server_close()
        self._folder.cleanup()

    def interrupt(self, *lengths: int) -> None:
        """Drop the connection of the next downloads, one after so many bytes each; without lengths, of none."""
        self._interruptions = list(lengths)

    def next_interruption(self, length: int) -> int | None:
        with self.lock:
            if self._interruptions and self._interruptions[0] < length:
                return self._interruptions.pop(0)
        return None

    def object_path(self, sha256: str) -> Path:
        return Path(self._folder.name) / sha256

    def signature(self, sha256: str) -> str:
        return hmac.new(self.secret, sha256.encode(), "sha256").hexdigest()

    def store(self, content: bytes) -> Blob:
        sha256 = hashlib.sha256(content).hexdigest()
        self.object_path(sha256).write_bytes(content)
        return self.blob(sha256, is_lfs=False)

    def blob(self, sha256: str, is_lfs: bool) -> Blob:
        path = self.object_path(sha256)
        size = path.stat().st_size
        content = self._pointer(sha256, size) if is_lfs else path.read_bytes()
        git_oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        return Blob(path, size, sha256, git_oid, is_lfs)

    @staticmethod
    def _pointer(sha256: str, size: int) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


class HubHandler(BaseHTTPRequestHandler):
    """One request. The path decides on the method `on_…` that answers it."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    # --- answering ---

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *arguments) -> None:
        """Quiet; `HubServer.requests` keeps what was asked for."""

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        self.server.requests.append((self.command, self.path, self.headers.get("Range")))
        # split first, so that the %2F of a revision such as refs%2Fpr%2F1 stays in its place
        segments = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        self.body_is_read = False
        try:
            self._route(segments)
        except HubError as error:
            self._send_json({"error": str(error)}, error.status, error.headers)

    def _route(self, segments: list[str]) -> None:
        self.user = self._authenticated()
        match segments:
            case ["api", "whoami-v2"]:
                self._require_user()
                self._send_json({"type": "user", "name": self.user, "fullname": self.user, "orgs": [], "auth": {}})
            case ["api", "validate-yaml"]:
                self.on_validate_yaml()
            case ["api", "repos", "create"]:
                self.on_create()
            case ["api", "repos", "delete"]:
                self.on_delete()
            case ["api", kind, namespace, name, *rest] if kind in KINDS:
                self._repo_route(self._repo(kind, f"{namespace}/{name}"), rest)
            case ["lfs", sha256]:
                self.on_lfs_object(sha256)
            case [*prefix, namespace, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                self._repo(prefix[0] if prefix else "models", f"{namespace}/{name.removesuffix('.git')}")
                self.on_lfs_batch()
            case [kind, namespace, name, "resolve", revision, *path] if kind in KINDS[1:]:
                self.on_resolve(self._repo(kind, f"{namespace}/{name}"), revision, "/".join(path))
            case [namespace, name, "resolve", revision, *path]:
                self.on_resolve(self._repo("models", f"{namespace}/{name}"), revision, "/".join(path))
            case [kind, namespace, name] if kind in KINDS[1:]:
                self.on_page(self._repo(kind, f"{namespace}/{name}"))
            case [namespace, name] if namespace != "api":
                self.on_page(self._repo("models", f"{namespace}/{name}"))
            case _:
                raise HubError(404, f"{self.command} {self.path} is not a route of this hub")

    def _repo_route(self, repo: Repo, rest: list[str]) -> None:
        match self.command, rest:
            case ("GET", []):
                self.on_info(repo, "main")
            case ("GET", ["revision", revision]):
                self.on_info(repo, revision)
            case ("GET", ["tree", revision, *path]):
                self.on_tree(repo, revision, "/".join(path))
            case ("POST", ["paths-info", revision]):
                self.on_paths_info(repo, revision)
            case ("GET", ["refs"]):
                self.on_refs(repo)
            case ("GET", ["commits", revision]):
                self.on_commits(repo, revision)
            case ("POST", ["preupload", revision]):
                self.on_preupload(repo, revision)
            case ("POST", ["commit", revision]):
                self.on_commit(repo, revision)
            case ("POST" | "DELETE", ["branch" | "tag" as what, name]):
                self.on_ref(repo, what, name)
            case _:
                raise HubError(404, f"{self.command} {self.path} is not a route of this hub")

    def _read(self) -> bytes:
        self.body_is_read = True
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _read_json(self) -> dict[str, Any]:
        return json.loads(self._read() or b"{}")

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if not self.body_is_read:
            self._read()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    # --- who may do what ---

    def _authenticated(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def _require_user(self) -> None:
        if self.user is None:
            raise HubError(401, "Invalid username or password.")

    def _repo(self, kind: str, repo_id: str) -> Repo:
        repo = self.server.repos.get((kind, repo_id))
        if repo is None or (repo.private and self.user != repo.owner):
            # like the Hub, which does not say whether a private repository exists
            raise HubError(401 if self.user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _require_write(self, repo: Repo) -> None:
        self._require_user()
        if self.user != repo.owner:
            raise HubError(403, f"Forbidden: {self.user} has no right to write to {repo.repo_id}.")

    # --- repositories ---

    def on_create(self) -> None:
        self._require_user()
        asked = self._read_json()
        owner = asked.get("organization") or self.user
        kind = f"{asked.get('type') or 'model'}s"
        repo_id = f"{owner}/{asked['name']}"
        prefix = "" if kind == "models" else f"{kind}/"
        answer = {"url": f"{self.server.endpoint}/{prefix}{repo_id}", "name": repo_id}
        if owner != self.user:
            raise HubError(403, f"Forbidden: {self.user} cannot create repositories under {owner}.")
        if kind not in KINDS:
            raise HubError(400, f"This hub holds models, datasets and Spaces, not {kind}.")
        with self.server.lock:
            if (kind, repo_id) in self.server.repos:
                self._send_json({"error": "You already created this repo"} | answer, 409)
                return
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repo = self.server.repos[kind, repo_id] = Repo(kind, repo_id, owner, private)
            attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))
            files = {".gitattributes": self.server.store(attributes.encode())}
            repo.refs["refs/heads/main"] = repo.add_commit(None, "initial commit", "", owner, files).oid
        self._send_json(answer)

    def on_delete(self) -> None:
        asked = self._read_json()
        kind = f"{asked.get('type') or 'model'}s"
        repo = self._repo(kind, f"{asked.get('organization') or self.user}/{asked['name']}")
        self._require_write(repo)
        del self.server.repos[kind, repo.repo_id]
        self._send_json({})

    def on_info(self, repo: Repo, revision: str) -> None:
        commit = repo.commit_at(revision)
        card = self._card(commit)[0] or {}
        self._send_json(
            {
                "_id": hashlib.sha1(repo.repo_id.encode()).hexdigest()[:24],
                "id": repo.repo_id,
                "author": repo.owner,
                "sha": commit.oid,
                "private": repo.private,
                "disabled": False,
                "gated": False,
                "downloads": 0,
                "likes": 0,
                "lastModified": commit.date,
                "createdAt": commit.date,
                "tags": card.get("tags") or [],
                "pipeline_tag": card.get("pipeline_tag"),
                "library_name": card.get("library_name"),
                "cardData": card,
                "siblings": [{"rfilename": path} for path in sorted(commit.files)],
            }
            | ({"modelId": repo.repo_id} if repo.kind == "models" else {})
        )

    def on_page(self, repo: Repo) -> None:
        header, text = self._card(repo.commit_at(self.query.get("revision", "main")))
        body = markdown.markdown(text, extensions=["tables", "fenced_code"])
        # images of the card lie beside it
        prefix = f"/{'' if repo.kind == 'models' else f'{repo.kind}/'}{repo.repo_id}/resolve/main/"
        body = re.sub(r'src="(?![a-z]+:|/)', f'src="{prefix}', body)
        tags = ", ".join(map(str, (header or {}).get("tags") or []))
        page = f"<!doctype html><meta charset=utf-8><title>{repo.repo_id}</title><p>{repo.repo_id} · {tags}</p>{body}"
        self._send(page.encode(), headers={"Content-Type": "text/html; charset=utf-8"})

    def _card(self, commit: Commit) -> tuple[dict | None, str]:
        blob = commit.files.get("README.md")
        return split_card(blob.path.read_text(encoding="utf-8")) if blob else (None, "")

    def on_validate_yaml(self) -> None:
        content = self._read_json()["content"]
        errors, warnings = validate_card(content)
        answer = {"errors": [{"message": text} for text in errors], "warnings": [{"message": w} for w in warnings]}
        self._send_json(answer, 400 if errors else 200)

    # --- reading ---

    def _tree_entry(self, path: str, commit: Commit, expand: bool) -> dict[str, Any]:
        blob = commit.files.get(path)
        if blob is None:
            entry = {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        else:
            entry = {"type": "file", "oid": blob.git_oid, "size": blob.size, "path": path}
            if blob.is_lfs:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        if expand:
            entry["lastCommit"] = {"id": commit.oid, "title": commit.title, "date": commit.date}
        return entry

    def on_tree(self, repo: Repo, revision: str, folder: str) -> None:
        commit = repo.commit_at(revision)
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in commit.files if path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        folders = {"/".join(path.split("/")[:depth]) for path in inside for depth in range(1, path.count("/") + 1)}
        paths = sorted([*inside, *(name for name in folders if name.startswith(prefix) and name != folder)])
        if self.query.get("recursive", "").lower() not in ("true", "1"):
            paths = [path for path in paths if "/" not in path.removeprefix(prefix)]
        expand = self.query.get("expand", "").lower() in ("true", "1")
        self._send_json([self._tree_entry(path, commit, expand) for path in paths])

    def on_paths_info(self, repo: Repo, revision: str) -> None:
        text = self._read().decode()
        is_json = text.lstrip().startswith("{")
        asked = json.loads(text) if is_json else parse_qs(text)
        expand = str(asked.get("expand", False) if is_json else asked.get("expand", [""])[0]).lower() == "true"
        commit = repo.commit_at(revision)
        found = [path for path in asked["paths"] if any(f"{name}/".startswith(f"{path}/") for name in commit.files)]
        self._send_json([self._tree_entry(path, commit, expand) for path in found])

    def on_refs(self, repo: Repo) -> None:
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        refs = {
            kind: [
                {"name": ref.removeprefix("refs/heads/").removeprefix("refs/tags/"), "ref": ref, "targetCommit": oid}
                for ref, oid in repo.refs.items()
                if ref.startswith(prefix)
            ]
            for kind, prefix in kinds.items()
        }
        self._send_json(refs | {"converts": []})

    def on_commits(self, repo: Repo, revision: str) -> None:
        commit, listing = repo.commit_at(revision), []
        while commit is not None:
            entry = {"id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date}
            listing.append(entry | {"authors": [{"user": commit.author}]})
            commit = repo.commits.get(commit.parent)
        self._send_json(listing)

    def on_resolve(self, repo: Repo, revision: str, path: str) -> None:
        commit = repo.commit_at(revision)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        blob = commit.files.get(path)
        if blob is None:
            raise HubError(404, f"Entry not found: {path}", "EntryNotFound", headers)
        if blob.is_lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size)}
            target = f"{self.server.content_endpoint}/lfs/{blob.sha256}?signature={self.server.signature(blob.sha256)}"
            self._send(b"", 302, headers | {"Location": target})
        else:
            self._send_file(blob.path, headers | {"ETag": f'"{blob.etag}"'})

    def _send_file(self, path: Path, headers: dict[str, str]) -> None:
        size = path.stat().st_size
        start, stop, status = 0, size, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = asked.groups()
            start = int(first) if first else max(size - int(last), 0)
            stop = min(int(last) + 1, size) if first and last else size
            if start >= size:
                raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
            status, headers = 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        self.send_response(status)
        for name, value in ({"Content-Length": str(stop - start)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = self.server.next_interruption(stop - start)
        remaining = stop - start if limit is None else limit
        with path.open("rb") as file:
            file.seek(start)
            while remaining and (chunk := file.read(min(CHUNK, remaining))):
                self.wfile.write(chunk)
                remaining -= len(chunk)
        if limit is not None:
            self.wfile.flush()
            self.close_connection = True

    # --- writing ---

    def on_preupload(self, repo: Repo, revision: str) -> None:
        self._require_user() if self.query.get("create_pr") else self._require_write(repo)
        commit = repo.commit_at(revision)

        def answer(file: dict[str, Any]) -> dict[str, Any]:
            is_lfs = file["size"] > LFS_SIZE or Path(file["path"]).suffix in LFS_SUFFIXES
            present = commit.files.get(file["path"])
            return {
                "path": file["path"],
                "uploadMode": "lfs" if is_lfs else "regular",
                "shouldIgnore": False,
                "oid": present and present.etag,
            }

        self._send_json({"files": [answer(file) for file in self._read_json()["files"]], "commitOid": commit.oid})

    def on_lfs_batch(self) -> None:
        self._require_user()
        objects = []
        for item in self._read_json()["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if not self.server.object_path(item["oid"]).exists():
                href = f"{self.server.endpoint}/lfs/{item['oid']}?signature={self.server.signature(item['oid'])}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": href}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def on_lfs_object(self, sha256: str) -> None:
        """Upload (PUT), the check after it (POST) and download of one object; the signature stands for the token."""
        if not hmac.compare_digest(self.query.get("signature", ""), self.server.signature(sha256)):
            raise HubError(403, "Wrong signature")
        path = self.server.object_path(sha256)
        if self.command == "PUT":
            remaining, digest = int(self.headers["Content-Length"]), hashlib.sha256()
            self.body_is_read = True
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                while remaining and (chunk := self.rfile.read(min(CHUNK, remaining))):
                    digest.update(chunk)
                    file.write(chunk)
                    remaining -= len(chunk)
            if digest.hexdigest() != sha256:
                Path(file.name).unlink()
                raise HubError(400, f"The content has the hash {digest.hexdigest()}, not {sha256}.")
            Path(file.name).replace(path)
            self._send(b"")
        elif not path.exists():
            raise HubError(404, "No such object")
        elif self.command == "POST":
            size = self._read_json()["size"]
            self._send_json({}, 200 if path.stat().st_size == size else 400)
        else:
            self._send_file(path, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def on_commit(self, repo: Repo, revision: str) -> None:
        as_pull_request = self.query.get("create_pr") == "1"
        self._require_user() if as_pull_request else self._require_write(repo)
        operations = [json.loads(line) for line in self._read().splitlines() if line.strip()]
        header = next(item["value"] for item in operations if item["key"] == "header")
        with self.server.lock:
            parent = repo.commit_at(revision)
            if header.get("parentCommit") not in (None, parent.oid):
                raise HubError(412, f"The parent commit is {parent.oid}, not {header['parentCommit']}.")
            files = self._changed(dict(parent.files), operations)
            commit = repo.add_commit(parent, header["summary"], header.get("description") or "", self.user, files)
            answer = {"success": True, "commitOid": commit.oid}
            prefix = "" if repo.kind == "models" else f"{repo.kind}/"
            if as_pull_request:
                number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
                repo.refs[f"refs/pr/{number}"] = commit.oid
                answer["pullRequestUrl"] = f"{self.server.endpoint}/{prefix}{repo.repo_id}/discussions/{number}"
            else:
                ref = repo.ref_of(revision)
                if ref is None or ref.startswith("refs/tags/"):
                    raise HubError(400, f"{revision} is not a branch; commits go to branches.")
                repo.refs[ref] = commit.oid
        self._send_json(answer | {"commitUrl": f"{self.server.endpoint}/{prefix}{repo.repo_id}/commit/{commit.oid}"})

    def _changed(self, files: dict[str, Blob], operations: list[dict]) -> dict[str, Blob]:
        for item in operations:
            value = item["value"]
            path = value.get("path", "")
            if item["key"] != "header" and (path.startswith("/") or ".." in path.split("/")):
                raise HubError(400, f"{path} leads out of the repository.")
            if item["key"] == "file":
                files[path] = self.server.store(base64.b64decode(value["content"]))
            elif item["key"] == "lfsFile":
                if not self.server.object_path(value["oid"]).exists():
                    raise HubError(400, f"The content of {path} was not uploaded.")
                files[path] = self.server.blob(value["oid"], is_lfs=True)
            elif item["key"] == "deletedFile":
                files.pop(path, None)
            elif item["key"] == "deletedFolder":
                files = {name: blob for name, blob in files.items() if not name.startswith(f"{path.rstrip('/')}/")}
        return files

    def on_ref(self, repo: Repo, what: str, name: str) -> None:
        self._require_write(repo)
        asked = self._read_json()
        if what == "tag" and self.command == "POST":
            name, start = asked["tag"], name
        else:
            start = asked.get("startingPoint") or "main"
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
        if self.command == "DELETE":
            if repo.refs.pop(ref, None) is None:
                raise HubError(404, f"There is no {what} {name}", "RevisionNotFound")
        elif ref in repo.refs:
            raise HubError(409, f"Reference already exists: {ref}")
        else:
            repo.refs[ref] = repo.commit_at(start).oid
        self._send_json({})


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8808, help="port on 127.0.0.1; 0 takes a free one")
    server = HubServer(parser.parse_args().port)
    print(f"A hub for trying things out listens on {server.endpoint}; it forgets everything when it ends (Ctrl-C).")
    print("In the shell that is to use it:\n")
    print(
        f"export HF_ENDPOINT={server.endpoint} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_owner HF_HOME=$(mktemp -d)", flush=True
    )
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        server.close()


if __name__ == "__main__":
    main()
