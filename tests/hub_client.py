"""The unmodified client of the Hub in a process of its own that is pointed at the loopback hub."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from hub_server import HubServer


# Runs what it is sent and answers with `result`, or with the exception's class and message.
WORKER = """
import json, sys

answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    names = {}
    try:
        exec(json.loads(line), names)
        answer = {"result": names.get("result")}
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


def client_environment(
    hub: HubServer | None, home: Path, token: str | None = "hf_owner", **changes: str
) -> dict[str, str]:
    """Environment of a user of the hub: endpoint, token, and caches of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    source = str(Path(__file__).resolve().parents[1] / "src")
    environment = {
        "HF_HOME": str(home),
        "PYTHONPATH": source,
        "OMP_NUM_THREADS": "1",
        # large files go over LFS: the hub does not speak the Xet protocol
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    if hub is not None:
        environment["HF_ENDPOINT"] = hub.endpoint
    return kept | environment | ({"HF_TOKEN": token} if token else {}) | changes


class Client:
    """A process with the unmodified client. Calling it runs code there and returns what the code calls `result`."""

    def __init__(self, environment: dict[str, str], folder: Path):
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr.txt").open("w"),
            env=environment,
            cwd=folder,
            text=True,
        )

    def ask(self, code: str) -> dict[str, Any]:
        self.process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.folder / "stderr.txt").read_text()[-3000:]
        return json.loads(line)

    def __call__(self, code: str) -> Any:
        answer = self.ask(code)
        assert "error" not in answer, answer
        return answer["result"]

    def error(self, code: str) -> str:
        """Class and message of the exception that the code ends in."""
        answer = self.ask(code)
        assert "error" in answer, f"the code ended well: {answer}"
        return f"{answer['error']}: {answer['message']}"

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
