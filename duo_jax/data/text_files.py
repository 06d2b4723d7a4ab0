"""Text files: finds those at a path, and reads the documents in .txt, .jsonl and .parquet files."""

import contextlib
import gzip
import hashlib
import importlib.util
import itertools
import json
import reprlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duo_jax.errors import UserError

FIELD = "text"  # the default name of the text's field in rows of .jsonl and .parquet


def list_files(path: Path, setting: str = "config.data.path") -> list[Path]:
    """Returns the text files at a path, sorted by name.

    Leaves out files and folders whose names begin with a dot: editors and notebooks keep outdated copies there.

    Args:
        path: a file or folder.
        setting: the setting that gave the path, for messages.

    Raises:
        UserError: the path does not exist or holds no text file.
    """
    if not path.exists():
        raise UserError(f"There is no text at {path}; set {setting} to a file or folder.")
    files = [file for file in _visible_files(path) if file.name.endswith(tuple(_READERS))]
    if not files:
        raise UserError(
            f"{path} holds no text; it needs files that end in {', '.join(_READERS)} and whose names do not begin with a "
            "dot."
        )
    return files


def about_files(path: Path) -> str:
    """Returns a sentence on how many files `list_files` finds in a folder, and how many of other kinds it skips."""
    every = _visible_files(path)
    others = [file for file in every if not file.name.endswith(tuple(_READERS))]
    sentence = f"reading {_counted(len(every) - len(others))} in {path}"
    if others:
        kinds = sorted({file.suffix or "no ending" for file in others})
        kinds = kinds if len(kinds) <= 5 else [*kinds[:5], "..."]
        sentence += f"; {_counted(len(others))} of other kinds skipped ({', '.join(kinds)})"
    return sentence


def _counted(files: int) -> str:
    return f"{files:,} file" if files == 1 else f"{files:,} files"


def _visible_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    inside = ((file, file.relative_to(path).parts) for file in path.rglob("*") if file.is_file())
    return sorted(file for file, parts in inside if not any(part.startswith(".") for part in parts))


def fingerprint(files: list[Path], root: Path) -> str:
    """Returns a hash of the files' names, sizes, and first and last 64 KiB: cheap for a corpus of any size."""
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
        field: the text's field in rows of the last three.
        stripped: whether to remove leading and trailing white space of each row.
        setting: the setting that gave the field, for messages.

    Raises:
        UserError: the file does not have the format of its name, or a row has no text in the field.
    """
    with _reading(file):
        try:
            for text in _READERS[_kind(file)](file, field):
                yield text.strip() if stripped else text
        except _NoText as error:
            raise UserError(
                f"There is no text in the field `{field}` of {error}; set {setting} to the field that holds the text, or "
                "correct the file."
            ) from error


def count_rows(file: Path, field: str = FIELD) -> int:
    """Returns the number of rows of one file; a .parquet file states it, the others are read.

    Raises:
        UserError: the file does not have the format of its name.
    """
    if _kind(file) != ".parquet":
        return sum(1 for _ in read_rows(file, field))
    with _reading(file):
        return _parquet(file).metadata.num_rows


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turns the errors of reading a file into UserErrors."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not text in UTF-8 (it holds the byte {error.object[error.start]:#04x}); convert it, with `iconv -f "
            "latin1 -t utf-8` if it is Latin-1."
        ) from error
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read as {_kind(file)}: {error}.") from error


class _NoText(Exception):
    """A row has no text; the message says where it was expected and what is there instead."""


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
                    # The decoder sees one line at a time, so its own message would always say line 1.
                    what = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                    raise UserError(f"There is no JSON in {where} ({what}); correct or remove the line.") from error
                if not isinstance(row, dict):
                    raise _NoText(f"{where}, which is not a JSON object")
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
