"""How good sampled texts are: perplexity under a language model, and how much they vary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from duo_jax import sampling
from duo_jax.data.tokenizers import Tokenizer
from duo_jax.evaluation.judges import Judge


@dataclasses.dataclass(frozen=True)
class Quality:
    """Figures of a set of texts; a low perplexity at a low entropy is repetition, so they belong together.

    Attributes:
        ppl: exp of the judge's nats per token of its own.
        bits: the judge's bits per character, however many tokens it takes them for.
        entropy: mean over the texts of the unigram entropy of the generating tokenizer's ids, in nats.
        distinct: shares of different n-grams of words among all of them, for n = 1, 2, 3.
        judged: how many tokens the judge has scored.
    """

    ppl: float
    bits: float
    entropy: float
    distinct: tuple[float, float, float]
    judged: int


def until_end(row: Sequence[int] | np.ndarray, eos_id: int) -> tuple[list[int], bool]:
    """Returns the ids of a row before its first EOS, the first place aside, and whether there is one."""
    ids = [int(i) for i in row]
    end = ids.index(eos_id, 1) if eos_id in ids[1:] else len(ids)
    return ids[:end], end < len(ids)


def distinct(texts: Sequence[str], n: int) -> float:
    """Returns the share of different n-grams of words among all n-grams of all texts; NaN if there are none."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def quality(
    tokens: np.ndarray, tokenizer: Tokenizer, judge: Judge, done: Callable[[int], Any] = lambda n: None
) -> tuple[Quality, list[str]]:
    """Returns the figures of rows of token ids `[B, L]`, and their texts.

    A row counts up to its first EOS, whose place in the text the judge scores as its own end of text; it is decoded, and
    tokenized anew by the judge. The entropy is that of the whole row.
    """
    rows = [until_end(row, tokenizer.eos_id) for row in tokens]
    texts = [tokenizer.decode(ids) for ids, _ in rows]
    scores = judge.nll(texts, [ended for _, ended in rows], done)
    nats, count, characters = (float(part.sum()) for part in scores)
    ppl = math.exp(nats / count) if count else math.nan
    bits = nats / math.log(2) / characters if characters else math.nan
    entropy = float(sampling.unigram_entropy(tokens).mean())
    return Quality(ppl, bits, entropy, tuple(distinct(texts, n) for n in (1, 2, 3)), int(count)), texts
