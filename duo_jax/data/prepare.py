"""Turns text into token shards, once.

    python -m duo_jax.data.prepare --config=configs/quickstart.py [--config.data.KEY=VALUE ...]

Training calls `prepare` by itself; the command does it beforehand, or checks every hash of a finished folder. The 5M
characters of `wiki` take a few seconds.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from duo_jax import files, progress
from duo_jax.data import shards, sources, text_files, tokenizers
from duo_jax.errors import UserError

TOKENIZER_FOLDER = "tokenizer"
# Far more than a BPE of a few thousand merges needs; more text would only take more memory and time.
BPE_TRAINING_CHARACTERS = 10**9

# The paths, one per line, by which the tokenizer of a folder was given.
_TOKENIZER_PATHS = "tokenizer_paths.txt"

_BATCH_CHARACTERS = 4_000_000


def shards_folder(data: Any) -> Path:
    """Returns the folder for the shards of a `config.data` block, e.g. `data/wiki-bpe512`, whether or not it exists.

    The name depends on the content of a tokenizer that is given by its path. If that path no longer exists, the shards that
    were made with it are still found.

    Raises:
        UserError: the source or the tokenizer is unknown, or different tokenizers at its path have made shards.
    """
    if data.source not in sources.NAMES:
        raise UserError(f"Unknown data source {data.source!r}; choose one of {', '.join(sources.NAMES)}.")
    text = str(Path(data.path).expanduser().resolve()) if data.path else ""
    if _field(data) != text_files.FIELD:
        text += f"\0{_field(data)}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:8] if text else ""
    stem = Path(data.dir).expanduser() / "-".join(filter(None, (data.source, digest)))
    if _is_gone(data.tokenizer) and (made := _made_with(stem, data.tokenizer)):
        return made
    return stem.with_name(f"{stem.name}-{tokenizers.label(data.tokenizer, data.bpe_size)}")


def _is_gone(tokenizer: str) -> bool:
    path = tokenizers.path_of(tokenizer)
    return path is not None and not path.exists()


def _made_with(stem: Path, tokenizer: str) -> Path | None:
    """Returns the shards of a text that were made with a tokenizer whose path no longer exists, or None."""
    labels = tokenizers.LABELS_OF_PATHS
    folders = sorted(folder for label in labels for folder in stem.parent.glob(f"{stem.name}-{label}*"))
    found = [folder for folder in folders if _absolute(tokenizer) in _paths_of(folder)]
    if len(found) > 1:
        raise UserError(
            f"The tokenizer {tokenizer} is gone, and {' and '.join(map(str, found))} were made with different tokenizers at "
            f"that path; copy the right one back, from the folder {TOKENIZER_FOLDER} in one of them or in a run's workdir."
        )
    return found[0] if found else None


def _absolute(tokenizer: str) -> str:
    return str(Path(tokenizer).expanduser().resolve())


def _paths_of(folder: Path) -> list[str]:
    """Returns the paths by which the tokenizer of a prepared folder was given."""
    file = folder / _TOKENIZER_PATHS
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def _note_path(folder: Path, tokenizer: str) -> None:
    """Records a tokenizer's path in the folder, so that its shards are still found if the tokenizer is moved."""
    if tokenizers.path_of(tokenizer) and not _is_gone(tokenizer) and _absolute(tokenizer) not in _paths_of(folder):
        with (folder / _TOKENIZER_PATHS).open("a", encoding="utf-8") as file:
            file.write(_absolute(tokenizer) + "\n")


def load_tokenizer(folder: str | Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer with which a prepared folder was made.

    Raises:
        UserError: it is missing or damaged.
    """
    return tokenizers.load(Path(folder) / TOKENIZER_FOLDER)


def prepare(data: Any, *, verbose: bool = True) -> Path:
    """Makes the token shards that a `config.data` block describes, unless they exist.

    The folder is renamed to its final name when all of it is on the disk: a killed process leaves nothing that could be
    mistaken for shards, and the next call removes what it left. If two processes prepare the same folder, the second waits
    for the first and uses its shards.

    Args:
        data: the config block, with `source`, `path`, `field`, `tokenizer`, `bpe_size` and `dir`.
        verbose: show progress bars and a summary on stderr.

    Returns:
        the folder, for `train_iterator`, `heldout_batches` and `load_tokenizer`.

    Raises:
        UserError: a setting is wrong; the text or the tokenizer's files are missing; the folder cannot be written, the
            disk is full, or the folder holds damaged or other shards.
    """
    folder = shards_folder(data)
    if folder.exists():
        _check(folder, data)
        with contextlib.suppress(OSError):  # other people's shards may be read-only
            _note_path(folder, data.tokenizer)
        return folder

    def waits() -> None:
        if verbose:
            print(f"waiting for another process that prepares {folder}", file=sys.stderr)

    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(_lock_path(folder), waits):
            if not folder.exists():
                _make(folder, data, verbose)
    _check(folder, data)
    return folder


def summary(folder: str | Path) -> str:
    """Returns a few lines about the content of a prepared folder.

    Raises:
        UserError: there are no shards, or they are damaged.
    """
    metadata = shards.read_metadata(Path(folder))
    tokenizer = metadata["tokenizer"]
    lines = [f"{folder}: {metadata['source']['name']}, tokenizer {tokenizer['name']} (K = {tokenizer['vocab_size']:,})"]
    for name, split in metadata["splits"].items():
        per_token = split["characters"] / split["tokens"]
        lines.append(
            f"  {name:8}{split['documents']:>12,} documents{split['tokens']:>16,} tokens"
            f"{len(split['shards']):>5} shards{per_token:>7.2f} characters per token"
        )
    return "\n".join(lines)


def _check(folder: Path, data: Any) -> None:
    """Raises UserError unless the folder's shards are complete and match `data`."""
    metadata = shards.read_metadata(folder)
    found = (metadata["source"]["name"], metadata["tokenizer"]["name"], metadata["tokenizer"]["vocab_size"])
    if _is_gone(data.tokenizer):
        wanted = (data.source, *found[1:])  # the folder was found by the tokenizer's path
    else:
        wanted = (data.source, tokenizers.kind(data.tokenizer), tokenizers.vocab_size(data.tokenizer, data.bpe_size))
    if found != wanted:
        raise UserError(
            f"{folder} was made from {found[0]} with the tokenizer {found[1]} ({found[2]} ids), not from {wanted[0]} with "
            f"{wanted[1]} ({wanted[2]} ids); remove it, or set another config.data.dir."
        )
    try:
        identity = _open_source(data).identity
    except UserError:
        return  # the text is gone, and no longer needed
    if identity != metadata["source"]["identity"]:
        raise UserError(
            f"The text of config.data.source={data.source} has changed since {folder} was made from it; set another "
            "config.data.dir, or remove the folder to prepare it again: runs made from it then cannot go on."
        )


def _field(data: Any) -> str:
    return data.get("field", text_files.FIELD)  # configs saved by earlier versions lack it


def _open_source(data: Any) -> sources.Source:
    return sources.open_source(data.source, data.path, _field(data))


def _make(folder: Path, data: Any, verbose: bool) -> None:
    source = _open_source(data)
    if verbose and data.path and (path := Path(data.path).expanduser()).is_dir():
        print(text_files.about_files(path), file=sys.stderr)
    if isinstance(source, sources.TextFiles):
        source.check_splits()  # before the work of learning a BPE and tokenizing
    partial = folder.with_name(f".{folder.name}.partial")
    _remove_leftovers(folder)
    partial.mkdir()
    try:
        tokenizer = _tokenizer(source, data, verbose)
        metadata = _write_splits(partial, source, tokenizer, verbose)
        metadata["source"] = {"name": data.source, "path": str(data.path), "identity": source.identity}
        tokenizer.save(partial / TOKENIZER_FOLDER)
        _note_path(partial, data.tokenizer)
        (partial / shards.METADATA).write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
        for path in [*partial.rglob("*"), partial]:
            _sync(path)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if verbose:
        print(summary(folder), file=sys.stderr)


def _tokenizer(source: sources.Source, data: Any, verbose: bool) -> tokenizers.Tokenizer:
    if data.tokenizer != "bpe":
        return tokenizers.load(data.tokenizer)
    return tokenizers.train_bpe(_first_characters(source, data.bpe_size, verbose), data.bpe_size)


def _first_characters(source: sources.Source, size: int, verbose: bool) -> Iterator[str]:
    """Streams the text on which a BPE of `size` ids is trained; at the end prints that learning it takes time."""
    total = 0
    with progress.bar(
        iterable=source.documents(),
        desc="reading for the BPE",
        total=source.count(),
        unit=" documents",
        disable=not verbose,
    ) as documents:
        for split, text in documents:
            if split == sources.TRAIN:
                yield text
                total += len(text)
            if total >= BPE_TRAINING_CHARACTERS:
                break
    if verbose:
        message = f"learning a BPE of {size:,} ids from {total:,} characters (minutes, if there are many) ..."
        print(message, file=sys.stderr, flush=True)


def _write_splits(
    folder: Path, source: sources.Source, tokenizer: tokenizers.Tokenizer, verbose: bool
) -> dict[str, Any]:
    dtype = shards.token_dtype(tokenizer.vocab_size)
    writers = {split: shards.ShardWriter(folder, split, dtype) for split in sources.SPLITS}
    characters = dict.fromkeys(sources.SPLITS, 0)
    with progress.bar(total=source.count(), desc="tokenizing", unit=" documents", disable=not verbose) as bar:
        for batch in batches(source.documents()):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            for (split, text), ids in zip(batch, encoded, strict=True):
                writers[split].write([*ids, tokenizer.eos_id])
                characters[split] += len(text)
            bar.update(len(batch))
    splits = {}
    for split, writer in writers.items():
        writer.close()
        totals = {key: sum(entry[key] for entry in writer.entries) for key in ("documents", "tokens")}
        if not totals["documents"]:
            raise UserError(
                f"The {split} split is empty, because the text has too few documents; give more text, or a whole copy."
            )
        splits[split] = totals | {"characters": characters[split], "shards": writer.entries}
    return {
        "format_version": shards.FORMAT_VERSION,
        "tokenizer": tokenizer.facts(),
        "dtype": dtype.str,
        "content_hash": shards.content_hash(splits),
        "splits": splits,
    }


def batches(documents: sources.Documents) -> Iterator[list[tuple[str, str]]]:
    """Groups documents into batches of a few million characters: enough to keep all cores busy, with little memory."""
    batch: list[tuple[str, str]] = []
    size = 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed preparations left beside `folder`, whose own lock this process holds.

    Leaves what another preparation is still writing, which is locked; on a disk without locks, leaves all but its own.
    """
    for partial in folder.parent.glob(".*.partial"):
        path = _lock_path(partial.with_name(partial.name[1:].removesuffix(".partial")))
        if path == _lock_path(folder):
            shutil.rmtree(partial, ignore_errors=True)
        elif lock := files.acquire(path, block=False):
            if lock.exclusive:
                shutil.rmtree(partial, ignore_errors=True)
            path.unlink()
            lock.close()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turns an OSError into a UserError with advice."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "the disk is full: free some space, or set config.data.dir to another disk"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            advice = (
                f"{error.filename or folder} is not writable ({error.strerror}): set config.data.dir to another folder"
            )
        else:
            advice = str(error)
        raise UserError(f"The token shards cannot be written to {folder}; {advice}.") from error


def main(config: Any) -> None:
    """Prepares the data of `config.data`, or checks every hash if they exist, and prints a summary."""
    done = shards_folder(config.data).exists()
    folder = prepare(config.data)
    if done:
        shards.verify(folder)
        print(f"{summary(folder)}\n  prepared before; all hashes are right", file=sys.stderr)


if __name__ == "__main__":
    from duo_jax import cli

    cli.run(main)
