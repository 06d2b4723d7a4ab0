"""The known tokens of texts to be sampled: from prompts, texts with gaps, or tokens with a mask."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from duo_jax.data.tokenizer import Tokenizer, clean_unicode
from duo_jax.errors import UserError

GAP = re.compile(r"\s*_{3,}")
Known = tuple[np.ndarray, np.ndarray]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a text that is to be held.

    Raises:
        UserError: the tokenizer would change the text.
    """
    ids = tokenizer.encode(text)
    lost = clean_unicode(text) != text or (text.strip() and not ids)
    if lost or ("[UNK]" in tokenizer.decode(ids) and "[UNK]" not in text):
        raise UserError(
            f"the tokenizer {tokenizer.name} cannot encode {text!r}; leave out the characters it does not know."
        )
    return ids


def prefix(tokenizer: Tokenizer, prompt: str, length: int) -> Known:
    """Returns tokens `[L]` and where they are held `[L]`: BOS and the prompt, at the beginning.

    Raises:
        UserError: it does not fit, or cannot be encoded.
    """
    ids = [tokenizer.bos_id, *encode(tokenizer, prompt)]
    _check_room(len(ids), length, "BOS and the prompt")
    return np.array(ids + [0] * (length - len(ids)), np.int32), np.arange(length) < len(ids)


def gaps(tokenizer: Tokenizer, infill: str, length: int) -> Known:
    """Returns tokens `[L]` and where they are held `[L]`: BOS, the text, and EOS at the end, with room for its gaps.

    A gap is three or more underscores. The gaps share the rest of the length evenly; if it does not divide, the first ones
    get one more token. White space before a gap belongs to the gap, since tokens begin with their space.

    Raises:
        UserError: there is no gap, the text does not fit, or it cannot be encoded.
    """
    pieces = [encode(tokenizer, piece) for piece in GAP.split(infill)]
    n_gaps = len(pieces) - 1
    if not n_gaps:
        raise UserError(
            f"infill is {infill!r}, which has no gap; write ___ (three underscores) where text is to be found."
        )
    pieces[0].insert(0, tokenizer.bos_id)
    pieces[-1].append(tokenizer.eos_id)
    fixed = sum(map(len, pieces))
    _check_room(fixed + n_gaps, length, "BOS, EOS, the text and one token a gap")
    size, longer = divmod(length - fixed, n_gaps)
    tokens, held = [], []
    for piece, extra in itertools.zip_longest(pieces, range(n_gaps)):
        gap = 0 if extra is None else size + (extra < longer)
        tokens += piece + [0] * gap
        held += [True] * len(piece) + [False] * gap
    return np.array(tokens, np.int32), np.array(held)


def _check_room(need: int, length: int, what: str) -> None:
    if need > length:
        raise UserError(f"{what} are {need} tokens, more than the length {length}; shorten it or give a larger length.")


def arrays(tokens: Any, mask: Any, length: int) -> Known:
    """Returns tokens and where they are held, padded from `[l]` or `[B, l]` to the length.

    Raises:
        UserError: their shapes differ, or they do not fit.
    """
    try:
        tokens, mask = np.asarray(tokens), np.asarray(mask)
    except ValueError as error:
        raise UserError("the rows of infill's tokens or mask differ in length; pad them to one length.") from error
    if mask.dtype != bool and not np.isin(mask, (0, 1)).all():
        raise UserError("infill's mask holds other values than true and false, 1 and 0.")
    if tokens.shape != mask.shape or tokens.ndim not in (1, 2) or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"infill's tokens are {tokens.dtype} {tokens.shape} and its mask {mask.shape}; give whole numbers [L] or [B, L] "
            "and a mask of the same shape, true where a token is held."
        )
    _check_room(tokens.shape[-1], length, "infill's tokens")
    room = [(0, 0)] * (tokens.ndim - 1) + [(0, length - tokens.shape[-1])]
    # Ids beyond int32 are in no vocabulary; clipped, they stay invalid instead of wrapping to a valid id.
    largest = np.iinfo(np.int32).max
    tokens = np.clip(tokens, -largest, largest).astype(np.int32)
    return np.pad(tokens, room), np.pad(mask.astype(bool), room)


def known(
    tokenizer: Tokenizer,
    shape: tuple[int, int],
    *,
    prompt: str | Sequence[str] | None = None,
    infill: str | Sequence[str] | tuple[Any, Any] | None = None,
) -> Known:
    """Returns the known tokens of B texts, int32 `[B, L]`, and where they are held, bool `[B, L]`.

    Args:
        tokenizer: the network's.
        shape: (B, L).
        prompt: how the texts begin: one string for all, or one for each.
        infill: a text with gaps, one for all or one for each; or a pair of arrays (tokens, mask).

    Raises:
        UserError: both are given, their number is not B, or one does not fit or cannot be encoded.
    """
    rows, length = shape
    for name, value in (("prompt", prompt), ("infill", infill)):
        if value is not None and not isinstance(value, str | list | tuple):
            raise UserError(f"{name} is {value!r}; give text, or a list of texts.")
    if prompt is not None and not isinstance(prompt, str) and not all(isinstance(text, str) for text in prompt):
        raise UserError("a prompt is not text; token ids are given as infill=(tokens, mask).")
    if prompt is not None and infill is not None:
        raise UserError("prompt and infill were both given; write the prompt into infill, followed by ___.")
    if prompt is None and infill is None:
        return np.zeros(shape, np.int32), np.zeros(shape, bool)
    if infill is not None and not isinstance(infill, str) and not all(isinstance(text, str) for text in infill):
        if len(infill) != 2:
            raise UserError("infill is neither text nor a pair of arrays (tokens, mask).")
        one = arrays(*infill, length)
        if one[0].ndim == 2 and len(one[0]) != rows:
            raise UserError(f"infill has {len(one[0])} rows for {rows} texts; give as many, or one for all.")
    else:
        make, texts = (prefix, prompt) if infill is None else (gaps, infill)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if len(texts) not in (1, rows):
            raise UserError(
                f"{len(texts)} prompts or infill texts were given for {rows} texts; give as many, or one for all."
            )
        pairs = [make(tokenizer, text, length) for text in texts]
        one = np.stack([tokens for tokens, _ in pairs]), np.stack([held for _, held in pairs])
    return tuple(np.array(np.broadcast_to(part, shape)) for part in one)
