"""The walk-through of docs/hub.md, block by block as it is written there."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import yaml
from hub_client import client_environment
from hub_repos import split_card, validate_card


ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"<!-- walk-through -->\n+```(bash|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Found by every interpreter on its path: the package is installed here, elsewhere it is not.
HIDE_PACKAGE = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "synernet_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_walk_through_runs_as_written(tmp_path):
    port = free_port()
    blocks = BLOCK.findall((ROOT / "docs" / "hub.md").read_text(encoding="utf-8"))
    assert [language for language, _ in blocks] == ["bash", "bash", "bash", "python", "bash", "python"]
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
    for name in ("examples", "scripts", "tests"):
        (here / name).symlink_to(ROOT / name)
    (elsewhere / "sitecustomize.py").write_text(HIDE_PACKAGE)
    (elsewhere / "predict.py").write_text(blocks[3][1])
    command = tmp_path / "bin" / "synernet"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m synernet_hf "$@"\n')
    command.chmod(0o755)
    (here / "push.py").write_text(blocks[5][1])

    # one shell for all blocks, as for a reader; the Python block runs where the package cannot be imported
    start, *steps = [text for language, text in blocks if language == "bash"]
    wait = f"""
for attempt in $(seq 100); do (exec 3<> /dev/tcp/127.0.0.1/{port}) 2> /dev/null && break; sleep 0.2; done
"""
    predict = f"""
(cd {elsewhere} && HF_HOME={elsewhere}/home PYTHONPATH={elsewhere} python predict.py > predicted.txt)
"""
    script = "\n".join(
        ["set -e", start, "trap 'kill %1' EXIT", wait, steps[0], steps[1], predict, steps[2], "python push.py"]
    )
    environment = client_environment(None, here / "home", token=None) | {
        "PATH": f"{command.parent}:{Path(sys.executable).parent}:/usr/bin:/bin"
    }
    done = subprocess.run(
        ["bash", "-c", script.replace("8808", str(port))],
        cwd=here,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]

    predicted = (elsewhere / "predicted.txt").read_text().splitlines()
    assert predicted
    assert all("(90, 64)" in line for line in predicted)
    card = (here / "runs" / "tiny" / "README.md").read_text(encoding="utf-8")
    assert validate_card(card) == ([], [])
    header, text = split_card(card)
    assert header["model-index"][0]["results"][0]["dataset"]["type"] == "shapes"
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert recipe["max_steps"] == 10

    page = (here / "runs" / "card.html").read_text(encoding="utf-8")
    assert "<h1>tiny</h1>" in page
    assert '<img alt="Images' in page
    assert 'src="/owner/synernet-tiny/resolve/main/images.png"' in page
    assert page.count("<table>") >= 3
    assert "Weights: apache-2.0." in page
    assert "name = &quot;owner/synernet-tiny&quot;" in page
