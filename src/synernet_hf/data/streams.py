"""Data sets that are read while a run trains on them: their order, the shares of processes, the place to resume at."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Sampler

from synernet_hf.data.coco import PolygonMask


# batches of a stream of training: the loop ends it
ENDLESS = 2**48
# records that are shuffled together, in memory as they are stored
BLOCK_SIZE = 512
# of a stream that are checked and compared on resuming
NUM_SAMPLED = 64


def is_stream(split: Any) -> bool:
    """Whether a split is read during the training and has no length."""
    return isinstance(split, datasets.IterableDataset)


def first_records(stream: datasets.IterableDataset, number: int | None = None) -> datasets.Dataset:
    """The first records of a stream (all without `number`) in memory, images as they are stored."""
    features = stream.features
    for name, feature in features.items():
        if isinstance(feature, datasets.Image | PolygonMask):
            stream = stream.cast_column(name, type(feature)(decode=False))
    records = list(stream if number is None else stream.take(number))
    if not records:
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features)
    return datasets.Dataset.from_list(records, features=features)


class StreamedBatchSampler(Sampler[list]):
    """
    Batches of (record, position) keys for [`~synernet_hf.data.TrainDataset`], read in this process, whatever the number
    of workers that make crops of them.

    Each epoch reads the shards in an order of its own and shuffles blocks of `BLOCK_SIZE` records. Where the shards can
    be shared equally, each process reads its own, else all of them and uses every n-th record. Each process counts its
    own epochs. The batches of the other processes, which accelerate leaves out, are empty keys.

    Args:
        stream (`datasets.IterableDataset`): Records with undecoded images.
        batch_size (`int`): Number of samples in a batch.
        seed (`int`): Seed of the orders.
        process, num_processes (`int`): Number of this process, from 0, and of all.
        start (`int`): Number of batches that this process has seen in an earlier run.
        place (`Sequence[int]`, *optional*): What [`place_at`] gave for `start`.
    """

    drop_last = False

    def __init__(
        self,
        stream: datasets.IterableDataset,
        batch_size: int,
        seed: int = 0,
        process: int = 0,
        num_processes: int = 1,
        start: int = 0,
        place: Sequence[int] | None = None,
    ) -> None:
        self.stream, self.batch_size, self.seed = stream, batch_size, seed
        self.process, self.num_processes, self.start = process, num_processes, start
        # of each batch of this process, by its number: epoch, shard and record where its block begins, records of the
        # block that were given before
        self._places: dict[int, list[int]] = {start: list(place or (0, 0, 0, 0))}

    def __len__(self) -> int:
        return ENDLESS

    def place_at(self, batch: int) -> list[int]:
        """The place before the batch of this number, for `place`; those of earlier batches are forgotten."""
        self._places = {number: place for number, place in self._places.items() if number >= batch}
        return self._places[batch]

    def __iter__(self) -> Iterator[list[Any]]:
        number, keys = self.start, []
        epoch, shard, record, given = self._places[number]
        while True:
            records = self._records(epoch, shard, record)
            is_empty = shard == record == 0
            while block := list(islice(records, BLOCK_SIZE)):
                is_empty = False
                order = np.random.default_rng((self.seed, epoch, shard, record)).permutation(len(block))
                for index in order[given:]:
                    given += 1
                    keys.append(
                        (block[index][0], (number * self.num_processes + self.process) * self.batch_size + len(keys))
                    )
                    if len(keys) == self.batch_size:
                        number += 1
                        self._places[number] = [epoch, shard, record, given]
                        for process in range(self.num_processes):
                            yield keys if process == self.process else [None] * self.batch_size
                        keys = []
                (shard, record), given = block[-1][1], 0
            if is_empty:
                raise ValueError(
                    f"The stream has no record for process {self.process} of {self.num_processes}: give more images than "
                    "processes."
                )
            epoch, shard, record = epoch + 1, 0, 0

    def _records(self, epoch: int, shard: int, record: int) -> Iterator[tuple[dict, tuple[int, int]]]:
        """The records of this process in an epoch from a place on, each with the place after it."""
        shards, count = self.stream.num_shards, self.num_processes
        order, own = np.random.default_rng((self.seed, epoch)).permutation(shards), slice(self.process, None, count)
        is_shared = shards % count == 0
        for number, index in list(enumerate(order[own] if is_shared else order))[shard:]:
            part, start = self.stream.shard(shards, int(index)), record if number == shard else 0
            for place, item in enumerate(part.skip(start), start):
                if is_shared or place % count == self.process:
                    yield item, (number, place + 1)


__all__ = ["ENDLESS", "NUM_SAMPLED", "StreamedBatchSampler", "first_records", "is_stream"]
