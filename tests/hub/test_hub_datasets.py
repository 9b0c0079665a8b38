"""Data sets on a hub: pushed by `datasets`, loaded, streamed and kept for offline use."""

import pytest


pytest.importorskip("datasets")

PUSH = """
import datasets
from synernet_hf.data import load_shapes

shapes = load_shapes(num_train=6, num_validation=4, image_size=32)
kept = {name: [split[index]["image_labels"] for index in range(len(split))] for name, split in shapes.items()}
# splits with other columns, here `mask`, are configurations of their own
for name, split in shapes.items():
    split.push_to_hub("owner/shapes", config_name=name, split=name, private=True)
result = kept
"""
LOAD = """
import datasets

loaded = {name: datasets.load_dataset("owner/shapes", name, split=name) for name in ("train", "validation")}
result = {name: [record["image_labels"] for record in split] for name, split in loaded.items()}
for split in loaded.values():
    assert split[0]["image"].size == (32, 32)
assert loaded["validation"][0]["mask"].mode in ("L", "P")
assert "mask" not in loaded["train"].column_names
"""


def test_a_pushed_data_set_is_loaded_streamed_and_kept(client, new_client, hub, tmp_path):
    pushed = client(PUSH)
    home = tmp_path / "home"
    online = new_client(home=home)
    assert online(LOAD) == pushed
    start = len(hub.requests)
    streamed = online(
        """
        import datasets
        stream = datasets.load_dataset("owner/shapes", "validation", split="validation", streaming=True)
        result = [record["image_labels"] for record in stream]
        """
    )
    assert streamed == pushed["validation"]
    parquet = [path for method, path, _ in hub.requests[start:] if method == "GET" and "/lfs/" in path]
    assert parquet, "streaming reads from the hub"

    assert "owner/shapes" in new_client(token="hf_guest").error(
        "import datasets; datasets.load_dataset('owner/shapes')"
    )
    start = len(hub.requests)
    offline = new_client(home=home, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline(LOAD) == pushed
    assert len(hub.requests) == start
