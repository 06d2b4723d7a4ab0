"""Texts for zero-shot perplexity: held out as a whole, and tokenized in memory with a network's own tokenizer."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np

from duo_jax import progress
from duo_jax.data import detokenizers, prepare, sources, text_files
from duo_jax.data.shards import MemoryStore
from duo_jax.data.tokenizer import Tokenizer
from duo_jax.errors import UserError


def documents(path: Path, *, field: str, detokenizer: str, stripped: bool) -> sources.Documents:
    """Streams the documents of a file or folder, all held out, without empty ones.

    Args:
        path: .txt, .jsonl, .jsonl.gz or .parquet, read as by the source `text`.
        field: the text's field in rows of the last three.
        detokenizer: one of `detokenizers.NAMES`.
        stripped: whether to remove a document's leading and trailing white space before it is detokenized.

    Raises:
        UserError: the text is missing or cannot be read, or the detokenizer is unknown.
    """
    detokenize = detokenizers.by_name(detokenizer)
    files = text_files.list_files(path, setting="config.eval.path")
    rows = itertools.chain.from_iterable(
        text_files.read_rows(file, field, stripped=stripped, setting="config.eval.field") for file in files
    )
    return ((sources.HELDOUT, detokenize(text)) for text in rows if text)


def read(settings: Any, tokenizer: Tokenizer, *, verbose: bool = True) -> MemoryStore:
    """Returns the tokens of the text that a `config.eval` block describes.

    With `document_ends`, each document is followed by EOS, as in training. Without, documents are joined unchanged and no id
    marks their ends, as for the published zero-shot scores: rows of `.jsonl` and `.parquet` keep their leading and trailing
    white space, and of the blank lines between two documents of a `.txt` one line break is left.

    Args:
        settings: the block, with `path`, `field`, `detokenizer` and `document_ends`.
        tokenizer: the tokenizer of the network to be evaluated.
        verbose: show a progress bar and, for a folder, the number of files read.

    Raises:
        UserError: as `documents`, or there is no text.
    """
    path, ends = Path(settings.path).expanduser(), settings.document_ends
    texts = documents(path, field=settings.field, detokenizer=settings.detokenizer, stripped=ends)
    if verbose and path.is_dir():
        print(text_files.about_files(path), file=sys.stderr)
    end = [tokenizer.eos_id] if ends else []
    found: list[np.ndarray] = []
    with progress.bar(desc="tokenizing", unit=" documents", disable=not verbose) as bar:
        for batch in prepare.batches(texts):
            encoded = tokenizer.encode_batch([text for _, text in batch])
            found += [np.asarray([*ids, *end], np.int32) for ids in encoded]
            bar.update(len(batch))
    if not found:
        raise UserError(f"{path} holds no text; set config.eval.path to a file or folder that does.")
    return MemoryStore(str(path), found, tokenizer.facts(), ended=ends)
