"""Data sets on a hub: pushed by `datasets`, loaded, streamed and kept for offline use."""

import pytest


pytest.importorskip("datasets")

PUSH = """
from synernet_hf.data import load_shapes, same_columns

shapes = load_shapes(num_train=6, num_validation=4, image_size=32)
same_columns(shapes).push_to_hub("owner/shapes", private=True)
result = {name: [record["labels"] for record in split] for name, split in shapes.items()}
"""
LOAD = """
from synernet_hf.data import class_names, load_image_labels, load_wsss_dataset

loaded = load_image_labels("owner/shapes")
assert class_names(loaded) == class_names(load_wsss_dataset("shapes", dataset_options={"num_train": 1}))
assert loaded["train"][0]["image"].size == loaded["validation"][0]["mask"].size == (32, 32)
assert "mask" not in loaded["train"].column_names
result = {name: [list(record["labels"]) for record in split] for name, split in loaded.items()}
"""


def test_a_data_set_that_is_not_there_is_said_at_once(client, hub):
    start = len(hub.requests)
    assert "no such data set on the Hub" in client.error(
        "from synernet_hf.data import load_image_labels; load_image_labels('owner/nothing')"
    )
    assert len(hub.requests) <= start + 2


def test_a_pushed_data_set_is_loaded_streamed_and_kept(client, new_client, hub, tmp_path):
    pushed = client(PUSH)
    home = tmp_path / "home"
    online = new_client(home=home)
    assert online(LOAD) == pushed
    start = len(hub.requests)
    streamed = online(
        """
        from synernet_hf.data import load_image_labels
        stream = load_image_labels("owner/shapes", streaming=True)["validation"]
        result = [list(record["labels"]) for record in stream]
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
