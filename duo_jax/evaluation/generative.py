"""The quality of sampled texts: perplexity under a language model, and how much they vary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from duo_jax import sampling
from duo_jax.data.tokenizer import Tokenizer
from duo_jax.evaluation.judge import Judge

PROTOCOLS = OURS, REFERENCE = "ours", "reference"


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of a set of texts; a low perplexity at a low entropy is repetition, so they belong together.

    Attributes:
        ppl: exp of the judge's nats per token, in tokens of its own tokenizer.
        bits: the judge's bits per character, whatever its number of tokens.
        entropy: mean over the texts of the unigram entropy of the generating tokenizer's ids, in nats.
        distinct: shares of different n-grams of words among all of them, for n = 1, 2, 3.
        judged: how many tokens the judge has scored.
    """

    ppl: float
    bits: float
    entropy: float
    distinct: tuple[float, float, float]
    judged: int


def distinct(texts: Sequence[str], n: int) -> float:
    """Returns the share of different n-grams of words among all n-grams of all texts; NaN if there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def quality(
    tokens: np.ndarray,
    tokenizer: Tokenizer,
    judge: Judge,
    done: Callable[[int], Any] = lambda n: None,
    *,
    protocol: str = OURS,
) -> tuple[Quality, list[str]]:
    """Returns the figures of rows of token ids `[B, L]`, and the texts that were judged.

    Rows are decoded, and tokenized again by the judge. The entropy is that of the whole row.

    Args:
        tokens: the rows.
        tokenizer: their tokenizer.
        judge: the language model that judges.
        done: called with the number of texts just judged.
        protocol: `ours`: a row is judged up to its first EOS, which the judge scores as its own end of text. `reference`: as
            published, a whole row is judged, with its special ids written by name; GPT-2's EOS is also the judge's boundary.
            See `Judge.published_nll`.
    """
    if protocol == REFERENCE:
        texts = [tokenizer.decode(row, special=True) for row in tokens]
        scores = judge.published_nll(texts, done)
    else:
        rows = [sampling.until_end(row, tokenizer.eos_id) for row in tokens]
        texts = [tokenizer.decode(ids) for ids, _ in rows]
        scores = judge.nll(texts, [ended for _, ended in rows], done)
    nats, count, characters = (float(part.sum()) for part in scores)
    ppl = math.exp(nats / count) if count else math.nan
    bits = nats / math.log(2) / characters if characters else math.nan
    entropy = float(sampling.unigram_entropy(tokens).mean())
    return Quality(ppl, bits, entropy, tuple(distinct(texts, n) for n in (1, 2, 3)), int(count)), texts
