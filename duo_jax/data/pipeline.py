"""Batches for training and evaluation, read from prepared token shards with grain.

The training order depends only on the seed and the batch number, not on the number of processes, workers or threads.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np
from absl import flags

from duo_jax import progress
from duo_jax.data.packing import Batch, Rows, Store, open_rows
from duo_jax.data.shards import TokenStore
from duo_jax.data.sources import HELDOUT, TRAIN
from duo_jax.errors import UserError


class TrainIterator(grain.DatasetIterator):
    """Yields batches forever, and can save and restore its position; made by `train_iterator`."""

    def __init__(
        self,
        folder: str | Path,
        batches: grain.MapDataset,
        identity: dict[str, Any],
        workers: int,
        threads: int,
        prefetch: int,
    ) -> None:
        super().__init__()
        self._folder, self._batches, self._identity = folder, batches, identity
        self._workers, self._prefetch = workers, prefetch
        self._options = grain.ReadOptions(num_threads=threads if prefetch else 0, prefetch_buffer_size=prefetch)
        self._yielded, self._ended = 0, False
        self._iterator: grain.DatasetIterator | None = None

    def __next__(self) -> Batch:
        """Returns `{"tokens": int32 [b, L], "mask": float32 [b, L]}`."""
        if self._ended:
            raise ValueError("the iterator is closed")
        batch = next(self._running())
        self._yielded += 1
        # Copied, because an array from a worker process is in shared memory that is freed with it.
        return {key: np.array(value) for key, value in batch.items()} if self._workers else batch

    def get_state(self) -> dict[str, Any]:
        """Returns the number of batches yielded and the identity of the data, as a dictionary of JSON types."""
        return {"batches": self._yielded, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to the position where `get_state` was called; the batches that follow are the same, bit for bit.

        Raises:
            UserError: the state belongs to other data or to another seed, batch size, length or packing.
        """
        for key, value in self._identity.items():
            if key == "content_hash" and state.get(key) != value:
                raise UserError(
                    f"The data cannot go on where the checkpoint stopped: the token shards in {self._folder} differ from "
                    "those it was trained on, because the text, its tokenizer or a setting of config.data has changed; "
                    "restore it, or start in a new workdir."
                )
            if state.get(key) != value:
                raise UserError(
                    f"The data cannot go on where the checkpoint stopped: {key} was {state.get(key)!r} and is now "
                    f"{value!r}; set it back, or start in a new workdir."
                )
        self._stop()
        self._yielded = int(state["batches"])

    def start_prefetch(self) -> None:
        """Starts to read ahead, before the first `next`."""
        self._running().start_prefetch()

    def close(self) -> None:
        """Ends the threads and worker processes."""
        super().close()
        self._ended = True
        self._stop()

    def __str__(self) -> str:
        return f"TrainIterator(batches={self._yielded})"

    def _running(self) -> grain.DatasetIterator:
        if self._iterator is None:
            # The position is an index into an endless list of batches. grain's own state is not used: it depends on its
            # version and on the number of workers.
            batches = self._batches[self._yielded :].to_iter_dataset(self._options)
            if self._workers:
                if not flags.FLAGS.is_parsed():  # grain reads one of its own flags, even without a command line
                    flags.FLAGS.mark_as_parsed()
                options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=max(1, self._prefetch))
                batches = batches.mp_prefetch(options)
            self._iterator = iter(batches)
        return self._iterator

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def train_iterator(
    folder: str | Path,
    *,
    length: int,
    batch_size: int,
    seed: int,
    packing: str = "packed",
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 16,
) -> TrainIterator:
    """Returns an endless iterator over shuffled batches of the training split.

    Every epoch is a new permutation of all rows, from `seed`, without the rows that do not fill its last batch. Process p
    gets rows `[p b, (p + 1) b)` of each global batch, with `b = batch_size / process_count`, so the global batches do not
    depend on the number of processes.

    Args:
        folder: what `prepare` returned.
        length: L, the length of a row.
        batch_size: the global batch size.
        seed: determines the order of the rows.
        packing: `packed` or `padded`.
        process_index, process_count: which slice of each global batch to yield.
        workers: processes that read and pack; 0 does it in this process.
        threads: threads that read ahead, in each worker process or in this one.
        prefetch: batches to read ahead, in each worker process or in this one; 0 reads each batch when it is needed.

    Returns:
        an iterator over `{"tokens": int32 [b, L], "mask": float32 [b, L]}` with `get_state`, `set_state` and `close`.

    Raises:
        UserError: the shards are missing or damaged, hold fewer rows than a batch, or a setting is out of range.
    """
    local = _local_size(batch_size, process_index, process_count)
    if not 0 <= seed < 2**64:
        raise UserError(f"The seed {seed} is out of range; use a number from 0 to 2**64 - 1.")
    if min(workers, prefetch) < 0 or threads < 1:
        raise UserError("The workers and the prefetch must be 0 or more, and the threads 1 or more.")
    store = TokenStore(folder, TRAIN)
    rows = open_rows(store, length, packing)
    if len(rows) < batch_size:
        raise UserError(
            f"{folder} has {len(rows):,} training rows of length {length}, fewer than one batch of {batch_size}; "
            "lower the batch size or the length, or give more text."
        )
    # Hashed, because grain adds the epoch to the seed, and adjacent seeds must not share epochs.
    shuffle_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    whole = len(rows) // batch_size * batch_size
    order = grain.MapDataset.range(len(rows)).shuffle(seed=shuffle_seed)[:whole].batch(batch_size)
    batches = order.map(_TakeSlice(rows, process_index * local, local)).repeat()
    identity = {"seed": seed, "batch_size": batch_size, "length": length, "packing": packing}
    identity["content_hash"] = store.metadata["content_hash"]
    return TrainIterator(folder, batches, identity, workers, threads, prefetch)


class _TakeSlice:
    """Reads this process's slice of a global batch of row numbers; a class, so that it pickles for the workers."""

    def __init__(self, rows: Rows, start: int, count: int) -> None:
        self._rows, self._slice = rows, slice(start, start + count)

    def __call__(self, indices: np.ndarray) -> Batch:
        return self._rows.take(indices[self._slice])


class HeldoutBatches:
    """The held-out rows in order, in batches of one shape; can be iterated over repeatedly."""

    def __init__(self, rows: Rows, pad_id: int, batch_size: int, start: int, local: int, count: int) -> None:
        self._rows, self._pad_id = rows, pad_id
        self._batch_size, self._start, self._local, self._count = batch_size, start, local, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        return (self._batch(i) for i in range(self._count))

    def _batch(self, index: int) -> Batch:
        first = index * self._batch_size + self._start
        indices = np.arange(first, first + self._local)
        # Rows past the end repeat the last row here and are overwritten below.
        batch = self._rows.take(np.minimum(indices, len(self._rows) - 1))
        missing = indices >= len(self._rows)
        batch["tokens"][missing], batch["mask"][missing] = self._pad_id, 0
        return batch


def heldout_batches(
    folder: str | Path | Store,
    *,
    length: int,
    batch_size: int,
    packing: str = "packed",
    max_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> HeldoutBatches:
    """Returns the batches of the held-out split, or of a whole text set, the same every time.

    The last batch is filled up with rows of PAD whose mask is 0, so that all batches have one shape.

    Args:
        folder: what `prepare` returned, or the tokens themselves, from `text_sets.read`.
        length: L, the length of a row.
        batch_size: the global batch size.
        packing: `packed` or `padded`.
        max_batches: the largest number of batches; None for all.
        process_index, process_count: which slice of each global batch to yield, as in `train_iterator`.

    Returns:
        a sized iterable over `{"tokens": int32 [b, L], "mask": float32 [b, L]}`.

    Raises:
        UserError: the shards are missing or damaged, or hold less than one row, or a setting is out of range.
    """
    local = _local_size(batch_size, process_index, process_count)
    store = TokenStore(folder, HELDOUT) if isinstance(folder, str | Path) else folder
    rows = open_rows(store, length, packing)
    if not len(rows):
        raise UserError(
            f"{folder} has {store.tokens:,} held-out tokens, too few for one row of length {length}; give more "
            "text, pad short rows with config.data.packing=padded, or train with a shorter config.model.length."
        )
    if max_batches is not None and max_batches < 1:
        raise UserError(f"A limit of {max_batches} batches is too small; use 1 or more, or None for the whole split.")
    count = -(-len(rows) // batch_size)
    count = count if max_batches is None else min(count, max_batches)
    return HeldoutBatches(rows, store.metadata["tokenizer"]["pad_id"], batch_size, process_index * local, local, count)


def unigram_counts(
    folder: str | Path, length: int, packing: str = "packed", max_rows: int | None = None, *, verbose: bool = False
) -> np.ndarray:
    """Counts the ids in the training rows, including BOS and EOS but not padding.

    Args:
        folder: what `prepare` returned.
        length: L, the length of a row.
        packing: `packed` or `padded`.
        max_rows: the largest number of rows to count, evenly spaced; None for all.
        verbose: show a progress bar on stderr.

    Returns:
        the counts, int64 `[K]`.

    Raises:
        UserError: the shards are missing or damaged, or a setting is out of range.
    """
    store = TokenStore(folder, TRAIN)
    rows = open_rows(store, length, packing)
    step = -(-len(rows) // max_rows) if max_rows else 1
    counts = np.zeros(store.metadata["tokenizer"]["vocab_size"], np.int64)
    indices = np.arange(0, len(rows), step)
    chunks = np.array_split(indices, max(1, len(indices) // 1024))
    for chunk in progress.passing(chunks, len(chunks), "counting tokens", unit=" chunks of rows", show=verbose):
        batch = rows.take(chunk)
        tokens = batch["tokens"][batch["mask"] > 0]
        if tokens.size and tokens.max() >= len(counts):
            raise UserError(
                f"The token shards in {folder} are damaged: they hold the id {tokens.max()}, and there are {len(counts)}; "
                "remove the folder to prepare the data again."
            )
        counts += np.bincount(tokens, minlength=len(counts))
    return counts


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
    if not 0 <= process_index < process_count:
        raise UserError(f"There is no process {process_index} among {process_count}; count from 0.")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"A batch of {batch_size} does not divide among {process_count} processes; use a multiple of "
            f"{process_count}."
        )
    return batch_size // process_count
