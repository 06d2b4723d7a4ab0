"""Writes, describes, checks and reads token shards on disk.

A folder holds, for each split, files `train-00000.tokens` (flat ids, little-endian uint16 or uint32, every document
followed by EOS) and `train-00000.ends` (int64: the end of each document in its shard, including EOS), a folder
`tokenizer/`, and `metadata.json`, which is written last and holds all that is needed to read and verify the rest. If the
tokenizer was given by its path, `tokenizer_paths.txt` records that path, by which the shards are found if the tokenizer is
gone. Documents never span shards; rows of a batch may.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duo_jax.errors import UserError

FORMAT_VERSION = 1
METADATA = "metadata.json"
SHARD_TOKENS = 2**27  # 256 MiB of GPT-2 ids

_ENDS_DTYPE = np.dtype("<i8")


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest of uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes the documents of one split, one shard file after another, with bounded memory.

    `close` flushes everything to the disk; then `entries` describes the shards, in the form used in metadata.json.
    """

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        self.entries: list[dict[str, Any]] = []
        self._folder, self._split, self._dtype = folder, split, dtype
        self._file: Any = None
        self._digest = hashlib.sha256()
        self._ends = array("q")

    def write(self, document: Sequence[int]) -> None:
        """Appends one document, which already ends in EOS."""
        if self._file is None:
            self._digest, self._ends = hashlib.sha256(), array("q")
            self._file = (self._folder / f"{self._name()}.tokens").open("wb")
        data = np.asarray(document, self._dtype).tobytes()
        self._file.write(data)
        self._digest.update(data)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(document))
        if self._ends[-1] >= SHARD_TOKENS:
            self.close()

    def close(self) -> None:
        """Finishes the current shard, if there is one."""
        if self._file is None:
            return
        sync_and_close(self._file)
        self._file = None
        ends = np.asarray(self._ends, _ENDS_DTYPE).tobytes()
        with (self._folder / f"{self._name()}.ends").open("wb") as file:
            file.write(ends)
            sync_and_close(file)
        entry = {"name": self._name(), "tokens": self._ends[-1], "documents": len(self._ends)}
        entry |= {"tokens_sha256": self._digest.hexdigest(), "ends_sha256": hashlib.sha256(ends).hexdigest()}
        self.entries.append(entry)

    def _name(self) -> str:
        return f"{self._split}-{len(self.entries):05d}"


def sync_and_close(file: Any) -> None:
    """Flushes a file to the disk before closing it, so that it is complete when its folder is renamed."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def content_hash(splits: dict[str, Any]) -> str:
    """Returns one hash over all shards of all splits."""
    hashes = [shard[key] for split in sorted(splits) for shard in splits[split]["shards"] for key in _HASHES]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def read_metadata(folder: Path) -> dict[str, Any]:
    """Reads metadata.json and checks that every shard has the size stated there.

    Raises:
        UserError: there are no shards, they have another format, or they are damaged.
    """
    path = folder / METADATA
    if not path.is_file():
        raise UserError(f"{folder} holds no token shards; prepare them with python -m duo_jax.data.prepare.")
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        if metadata["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder} was written in format {metadata['format_version']}, but this version reads format "
                f"{FORMAT_VERSION}; remove the folder and prepare the data again."
            )
        for file, size, _ in _files(folder, metadata):
            found = file.stat().st_size if file.is_file() else 0
            if found != size:
                raise _damaged(folder, f"{file.name} has {found:,} bytes instead of {size:,}")
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise _damaged(folder, f"{METADATA} cannot be read: {error!r}") from error
    return metadata


def verify(folder: Path) -> dict[str, Any]:
    """Compares the hash of every shard with the metadata, and returns the metadata.

    Raises:
        UserError: as `read_metadata`, or a shard's content has changed.
    """
    metadata = read_metadata(folder)
    for file, _, sha256 in _files(folder, metadata):
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
                raise _damaged(folder, f"the content of {file.name} has changed")
    return metadata


class TokenStore:
    """One split, read by memory map: any part of its token stream, or any document.

    Opens the files at the first read, and pickles only their paths, so that each worker process maps them itself.

    Attributes:
        tokens, documents: their numbers.
        metadata: the content of metadata.json.

    Raises:
        UserError: as `read_metadata`.
    """

    def __init__(self, folder: str | Path, split: str) -> None:
        folder = Path(folder)
        self.metadata = read_metadata(folder)
        shards = self.metadata["splits"][split]["shards"]
        self._paths = [folder / shard["name"] for shard in shards]
        self._dtype = np.dtype(self.metadata["dtype"])
        self._token_starts = np.cumsum([0] + [shard["tokens"] for shard in shards])
        self._document_starts = np.cumsum([0] + [shard["documents"] for shard in shards])
        self.tokens, self.documents = int(self._token_starts[-1]), int(self._document_starts[-1])
        self._maps: dict[Path, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns `count` ids (fewer at the end of the split) from position `start` of the whole stream."""
        pieces = []
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while count > 0 and shard < len(self._paths):
            piece = self._map(shard, ".tokens", self._dtype)[start - self._token_starts[shard] :][:count]
            pieces.append(piece)
            start, count, shard = start + len(piece), count - len(piece), shard + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, self._dtype), *pieces])

    def document(self, index: int) -> np.ndarray:
        """Returns the ids of one document, without the EOS that ends it."""
        shard = int(np.searchsorted(self._document_starts, index, side="right")) - 1
        ends, local = self._map(shard, ".ends", _ENDS_DTYPE), index - self._document_starts[shard]
        start = ends[local - 1] if local else 0
        return self._map(shard, ".tokens", self._dtype)[start : ends[local] - 1]

    def _map(self, shard: int, suffix: str, dtype: np.dtype) -> np.ndarray:
        path = self._paths[shard].with_suffix(suffix)
        if path not in self._maps:
            # A plain array over the map: slicing numpy's memmap class takes ten times as long.
            self._maps[path] = np.asarray(np.memmap(path, dtype, mode="r"))
        return self._maps[path]


class MemoryStore:
    """Like `TokenStore`, for documents in memory.

    Attributes:
        tokens, documents: their numbers.
        metadata: `{"tokenizer": its facts}`.
    """

    def __init__(self, name: str, documents: Sequence[np.ndarray], tokenizer: dict[str, Any], *, ended: bool) -> None:
        """Joins the ids of documents.

        Args:
            name: its name in messages.
            documents: at least one.
            tokenizer: what `Tokenizer.facts` returned.
            ended: whether each document ends in EOS.
        """
        self.metadata = {"tokenizer": tokenizer}
        self._name, self._last = name, int(ended)
        self._ids = np.concatenate(documents)
        self._starts = np.cumsum([0] + [len(document) for document in documents])
        self.tokens, self.documents = len(self._ids), len(documents)

    def __str__(self) -> str:
        return self._name

    def read(self, start: int, count: int) -> np.ndarray:
        """Returns `count` ids (fewer at the end) from position `start` of the whole stream."""
        return self._ids[start : start + count]

    def document(self, index: int) -> np.ndarray:
        """Returns the ids of one document, without any EOS that ends it."""
        return self._ids[self._starts[index] : self._starts[index + 1] - self._last]


def _files(folder: Path, metadata: dict[str, Any]) -> Iterable[tuple[Path, int, str]]:
    itemsize = np.dtype(metadata["dtype"]).itemsize
    for split in metadata["splits"].values():
        for shard in split["shards"]:
            yield folder / f"{shard['name']}.tokens", shard["tokens"] * itemsize, shard["tokens_sha256"]
            yield folder / f"{shard['name']}.ends", shard["documents"] * _ENDS_DTYPE.itemsize, shard["ends_sha256"]


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(
        f"The token shards in {folder} are damaged ({what}); remove the folder and prepare the data again."
    )


_HASHES = ("tokens_sha256", "ends_sha256")
