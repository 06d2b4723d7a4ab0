"""Rows of tokens to score: cut from a text, and padded to few shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from duo_jax.data.tokenizer import Tokenizer
from duo_jax.errors import UserError

# Rows that one call of the network scores at once; a bounded number, whatever the length of the text.
_ROWS = 32
# Rows are padded to a multiple of this many tokens.
_MULTIPLE = 32


def of_text(tokens: list[int], tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Cuts a text's tokens into rows as in training, BOS ... EOS; the last one may be shorter."""
    body = length - 2
    pieces = [tokens[i : i + body] for i in range(0, max(len(tokens), 1), body)]
    return [[tokenizer.bos_id, *piece, tokenizer.eos_id] for piece in pieces]


def after_prompt(prompt: Any, text: str, tokenizer: Tokenizer, length: int) -> tuple[list[int], int]:
    """Returns the one row of a prompt and a text, BOS ... EOS, and how many of its tokens are given.

    Raises:
        UserError: the prompt is not text, or the row is longer than `length`.
    """
    if not isinstance(prompt, str):
        raise UserError(f"prompt is {prompt!r}; give text.")
    before, whole = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    row = [tokenizer.bos_id, *whole, tokenizer.eos_id]
    if len(row) > length:
        raise UserError(
            f"the prompt and the text are {len(row)} tokens with BOS and EOS, and the network reads {length}; shorten them."
        )
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, whole, strict=False))
    return row, 1 + sum(1 for _ in alike)  # a token that is only partly the prompt's is scored


def filled(row: Sequence[int], length: int) -> np.ndarray:
    """Returns a row of at most `length` tokens, int32, padded with zeros to one of few lengths, to compile few programs."""
    room = min(-(-len(row) // _MULTIPLE) * _MULTIPLE, length)
    return np.pad(np.asarray(row, np.int32), (0, room - len(row)))


def batches(rows: Sequence[Sequence[int]], given: int, length: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups rows into batches of a few shapes, as `objectives` take them.

    These hold `tokens` and `mask`, `[b, l]`; if rows are short, or their first tokens given, also `given` and `lengths`.
    Empty rows pad each batch to a power of two, to compile few programs.

    Args:
        rows: token ids, at most `length` each.
        given: how many tokens at the beginning of each are given, not scored.
        length: the network's length.
    """
    pairs = [(filled(row, length), len(row)) for row in rows]
    for shape in sorted({len(tokens) for tokens, _ in pairs}):
        alike = [pair for pair in pairs if len(pair[0]) == shape]
        for i in range(0, len(alike), _ROWS):
            tokens, lengths = map(np.array, zip(*alike[i : i + _ROWS], strict=True))
            place = np.arange(shape)
            counted = (place >= given) & (place < lengths[:, None])
            ragged = given or (lengths < shape).any()
            filling = (1 << (len(tokens) - 1).bit_length()) - len(tokens)
            tokens, counted = (np.pad(x, ((0, filling), (0, 0))) for x in (tokens, counted))
            batch = {"tokens": tokens, "mask": counted.astype(np.float32)}
            if ragged:
                lengths = np.pad(lengths, (0, filling), constant_values=shape)
                batch |= {"given": ~counted, "lengths": lengths.astype(np.int32)}
            yield batch
