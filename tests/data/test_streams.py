"""Data that is streamed: every record once an epoch over all processes, and the same again after an interruption."""

import io
import json
import tarfile
from itertools import islice

import pytest
from accelerate.data_loader import BatchSamplerShard

from synernet_hf.data import check_dataset, class_names, load_image_labels, load_shapes, streams
from synernet_hf.data.streams import StreamedBatchSampler, first_records


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """WebDataset: four archives to train on and one to validate, of unequal size; and the same records in memory."""
    folder = tmp_path_factory.mktemp("shards")
    shapes = load_shapes(num_train=18, num_validation=2, image_size=32)
    names = class_names(shapes)
    for split, sizes in (("train", (6, 3, 5, 4)), ("validation", (2,))):
        records = iter(shapes[split])
        for number, size in enumerate(sizes):
            with tarfile.open(folder / f"{split}-{number}.tar", "w") as archive:
                for record in islice(records, size):
                    image, mask = io.BytesIO(), io.BytesIO()
                    record["image"].save(image, "PNG")
                    labels = json.dumps({"labels": [names[label + 1] for label in record["labels"]]}).encode()
                    parts = {"png": image.getvalue(), "json": labels}
                    if split == "validation":
                        record["mask"].save(mask, "PNG")
                        parts["mask.png"] = mask.getvalue()
                    for suffix, content in parts.items():
                        info = tarfile.TarInfo(f"{record['image_id']}.{suffix}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    return folder, shapes


@pytest.fixture(scope="module")
def loaded(shards):
    columns = {"image_column": "png", "label_column": "json", "mask_column": "mask.png"}
    return load_image_labels(shards[0], class_names=class_names(shards[1]), streaming=True, **columns)


def test_archives_give_the_records_that_were_put_in(shards, loaded):
    for split, expected in shards[1].items():
        held = first_records(loaded[split])
        by_id = {record["image_id"]: record for record in held}
        assert sorted(by_id) == sorted(expected["image_id"])
        for record in expected:
            found = by_id[record["image_id"]]
            assert found["labels"] == record["labels"]
            assert found["image"].tobytes() == record["image"].tobytes()
            assert split == "train" or found["mask"].tobytes() == record["mask"].tobytes()
    assert len(first_records(loaded["train"], 5)) == 5


def keys_of(stream, process, count, number, start=0, place=None, seed=3):
    """Image and position of the keys of so many batches of two, and the sampler."""
    sampler = StreamedBatchSampler(stream, 2, seed, process, count, start, place)
    # as accelerate gives each process its own
    own = islice(BatchSamplerShard(sampler, count, process), number)
    return [[(record["image_id"], position) for record, position in batch] for batch in own], sampler


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_share_each_epoch_and_go_on_where_they_were(loaded, shards, monkeypatch, count):
    monkeypatch.setattr(streams, "BLOCK_SIZE", 4)
    stream = loaded["train"]
    runs = [keys_of(stream, process, count, 18) for process in range(count)]
    positions = [position for batches, _ in runs for batch in batches for _, position in batch]
    assert sorted(positions) == list(range(36 * count))
    first, second = [], []
    for process, (batches, sampler) in enumerate(runs):
        images = [image for batch in batches for image, _ in batch]
        size = sum(1 for _ in sampler._records(0, 0, 0))
        first += images[:size]
        second.append(images[:size] != images[size : 2 * size])
        for start in (1, 5, 9, 14):
            again, _ = keys_of(stream, process, count, 18 - start, start, sampler.place_at(start))
            assert again == batches[start:]
    # each image once, whatever the process, and another order in the next epoch
    assert sorted(first) == sorted(shards[1]["train"]["image_id"])
    assert all(second)
    assert keys_of(stream, 0, count, 3, seed=4)[0] != runs[0][0][:3]


def test_the_first_records_of_a_stream_are_checked(loaded):
    assert check_dataset(loaded) is loaded
    with pytest.raises(ValueError, match="Streamed data is not read beforehand"):
        check_dataset(loaded, "skip")
    train = loaded["train"]
    with pytest.raises(ValueError, match="carries no class list"):
        check_dataset({"train": train.map(lambda record: record)})
    broken = {"image": {"bytes": b"none", "path": None}}
    damaged = {"train": train.map(lambda record: record | broken, features=train.features)}
    with pytest.raises(ValueError, match=r"'train \(first 64 records\)'.*does not decode"):
        check_dataset(damaged)
