"""A judge of text: a language model with its tokenizer, and how it scores texts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from duo_jax.models import language_model
from duo_jax.models.language_model import Spec, Weights

BOUNDARY = "<|endoftext|>"

_ROWS = 8  # texts scored together
_LENGTHS = 32  # texts are padded to multiples of this; fewer would compile more programs, more would judge more padding


class Scores(NamedTuple):
    """A judge's scores of n texts.

    Attributes:
        nll: negative log-likelihoods in nats, float64 `[n]`.
        tokens: the number of tokens in each sum, `[n]`.
        characters: the length of each text, `[n]`; for a truncated text, scaled by the fraction of tokens kept.
    """

    nll: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray


@dataclasses.dataclass(frozen=True)
class Judge:
    """A language model with its tokenizer.

    Attributes:
        name: what reports call it.
        spec: see `language_model.Spec`.
        weights: float32.
        encode: text to ids, without special ones.
        boundary: the id before a text, and after one that has ended.
    """

    name: str
    spec: Spec
    weights: Weights
    encode: Callable[[str], list[int]]
    boundary: int

    def costs(self, rows: Sequence[Sequence[int]], done: Callable[[int], Any] = lambda n: None) -> list[np.ndarray]:
        """Returns the cost in nats of each id but the first, float64 `[n - 1]`, for rows of n ids within the context."""
        found: list[np.ndarray] = [np.zeros(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), _ROWS):
            picked = order[start : start + _ROWS]
            longest = max(len(rows[i]) for i in picked)
            tokens = np.full((_ROWS, -(-longest // _LENGTHS) * _LENGTHS), self.boundary, np.int32)
            for at, i in enumerate(picked):
                tokens[at, : len(rows[i])] = rows[i]
            costs = np.asarray(
                language_model.nll(self.weights, tokens[:, : self.spec.context], spec=self.spec), np.float64
            )
            for at, i in enumerate(picked):
                found[i] = costs[at, : max(0, len(rows[i]) - 1)]
            done(len(picked))
        return found

    def nll(self, texts: Sequence[str], ended: Sequence[bool], done: Callable[[int], Any] = lambda n: None) -> Scores:
        """Returns the scores of texts.

        A text follows the boundary token, which is not scored; if the text has ended, the boundary that follows it is.
        A text longer than the context is truncated.

        Args:
            texts: to be scored.
            ended: whether each text came to its end, rather than being cut.
            done: called with the number of texts just scored.
        """
        ids = [self.encode(text) for text in texts]
        rows = [
            [self.boundary, *of_text, *([self.boundary] if end else [])][: self.spec.context]
            for of_text, end in zip(ids, ended, strict=True)
        ]
        kept = [min(1.0, (self.spec.context - 1) / max(1, len(of_text))) for of_text in ids]
        characters = np.array([len(text) * part for text, part in zip(texts, kept, strict=True)])
        total = np.array([costs.sum() for costs in self.costs(rows, done)])
        return Scores(total, np.array([len(row) - 1 for row in rows]), characters)

    def published_nll(self, texts: Sequence[str], done: Callable[[int], Any] = lambda n: None) -> Scores:
        """Returns the scores of whole rows by the protocol of the published generative perplexities.

        Nothing is put before or after a text. Its first token is not scored; the others are if `published_tokens` says so,
        given all tokens before them, even those of other documents. A text longer than the context is truncated.

        Args:
            texts: to be scored; `<|endoftext|>` in them is the boundary token.
            done: called with the number of texts just scored.
        """
        whole = [[self.encode(part) for part in text.split(BOUNDARY)] for text in texts]
        ids = [list(itertools.chain(parts[0], *([self.boundary, *part] for part in parts[1:]))) for parts in whole]
        rows = [of_text[: self.spec.context] for of_text in ids]
        scored = [published_tokens(row, self.boundary) for row in rows]
        total = [costs[mask].sum() for costs, mask in zip(self.costs(rows, done), scored, strict=True)]
        characters = [
            len(text.replace(BOUNDARY, "")) * len(row) / max(1, len(of_text))
            for text, row, of_text in zip(texts, rows, ids, strict=True)
        ]
        return Scores(np.array(total), np.array([mask.sum() for mask in scored]), np.array(characters))


def published_tokens(ids: Sequence[int] | np.ndarray, boundary: int) -> np.ndarray:
    """Returns which ids after the first count in the published generative perplexities, bool `[n - 1]` of n ids.

    Those are all ids that are not the boundary, and the row's first boundary unless the row begins with it.
    """
    ends = np.asarray(ids, np.int64) == boundary
    return (~ends | (np.cumsum(ends) == 1))[1:]
