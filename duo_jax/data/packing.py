"""Makes rows of equal length from documents: packed (documents joined and cut) or padded (one document per row)."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from duo_jax.config import PACKINGS
from duo_jax.data.shards import MemoryStore, TokenStore
from duo_jax.errors import UserError

Store = TokenStore | MemoryStore
Batch = dict[str, np.ndarray]  # {"tokens": int32 [B, L], "mask": float32 [B, L]}


def pack(tokens: np.ndarray, length: int, *, bos_id: int, eos_id: int) -> Batch:
    """Cuts a stream of documents, each ended with EOS, into pieces of `length - 2` and wraps each in BOS ... EOS.

    Args:
        tokens: ids `[N]`.
        length: L, at least 3.
        bos_id, eos_id: the first and last id of each row.

    Returns:
        tokens int32 `[N // (L - 2), L]` (the remainder is dropped), and a float32 mask of ones with the same shape.
    """
    _check_length(length)
    count = len(tokens) // (length - 2)
    rows = np.empty((count, length), np.int32)
    rows[:, 0], rows[:, -1] = bos_id, eos_id
    rows[:, 1:-1] = tokens[: count * (length - 2)].reshape(count, length - 2)
    return {"tokens": rows, "mask": np.ones(rows.shape, np.float32)}


def pad(documents: Sequence[np.ndarray], length: int, *, bos_id: int, eos_id: int, pad_id: int) -> Batch:
    """Puts each document in a row of its own, BOS document EOS PAD ..., cut to its first `length - 2` ids.

    Args:
        documents: B arrays of ids, without special ids.
        length: L, at least 3.
        bos_id, eos_id, pad_id: the special ids.

    Returns:
        tokens int32 `[B, L]` and a mask float32 `[B, L]`: 1 on BOS, the document and EOS, 0 on PAD.
    """
    _check_length(length)
    rows = np.full((len(documents), length), pad_id, np.int32)
    mask = np.zeros(rows.shape, np.float32)
    for row, row_mask, document in zip(rows, mask, documents, strict=True):
        end = min(len(document), length - 2) + 1
        row[0], row[1:end], row[end] = bos_id, document[: end - 1], eos_id
        row_mask[: end + 1] = 1
    return {"tokens": rows, "mask": mask}


class Rows(Protocol):
    """Random access to the rows of a split; uses numpy only, and can be pickled."""

    def __len__(self) -> int:
        """Returns the number of rows."""
        ...

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the rows `indices` as tokens int32 `[B, L]` and mask float32 `[B, L]`."""
        ...


class PackedRows:
    """Row i is the i-th piece of `length - 2` ids of a split's stream, wrapped in BOS ... EOS."""

    def __init__(self, store: Store, length: int) -> None:
        _check_length(length)
        self._store, self._length = store, length
        self._special = {key: store.metadata["tokenizer"][key] for key in ("bos_id", "eos_id")}

    def __len__(self) -> int:
        return self._store.tokens // (self._length - 2)

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the rows `indices` as tokens int32 `[B, L]` and mask float32 `[B, L]`, all ones."""
        width = self._length - 2
        pieces = [self._store.read(int(i) * width, width) for i in indices]
        return pack(np.concatenate(pieces), self._length, **self._special)


class PaddedRows:
    """Row i is document i as BOS document EOS PAD ..., cut to `length`."""

    def __init__(self, store: Store, length: int) -> None:
        _check_length(length)
        self._store, self._length = store, length
        self._special = {key: store.metadata["tokenizer"][key] for key in ("bos_id", "eos_id", "pad_id")}

    def __len__(self) -> int:
        return self._store.documents

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns the rows `indices` as tokens int32 `[B, L]` and mask float32 `[B, L]`, 0 on PAD."""
        return pad([self._store.document(int(i)) for i in indices], self._length, **self._special)


def open_rows(store: Store, length: int, packing: str) -> Rows:
    """Returns the rows of a split.

    Raises:
        UserError: `length` is below 3, or `packing` is neither `packed` nor `padded`.
    """
    if packing not in PACKINGS:
        raise UserError(f"Unknown packing {packing!r}; choose one of {', '.join(PACKINGS)}.")
    return (PackedRows if packing == "packed" else PaddedRows)(store, length)


def _check_length(length: int) -> None:
    if length < 3:
        raise UserError(f"A row of length {length} has no room between BOS and EOS; use a length of 3 or more.")
