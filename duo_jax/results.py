"""What the Python interface returns: sampled texts, and the score of one."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

_SHOWN = 60  # characters of each text that `repr` shows


@dataclasses.dataclass(frozen=True)
class Samples:
    """What `sample` returns.

    Attributes:
        tokens: int32 `[B, L]`.
        text: the decoded rows, special tokens left out.
        entropy: `[B]`, each row's unigram entropy in nats; low means that it repeats itself.
        network_calls: how often the network was evaluated for a batch; the most, where batches differ. Guidance evaluates
            it twice per step; an autoregressive network reads one position per call.
        trajectory: int32 `[n, B, L]`, the tokens after every step, if asked for.
    """

    tokens: np.ndarray
    text: list[str]
    entropy: np.ndarray
    network_calls: int
    trajectory: np.ndarray | None = None

    def __repr__(self) -> str:
        """The texts' beginnings, as a notebook shows them, without the arrays."""
        beginnings = [text if len(text) <= _SHOWN else text[:_SHOWN] + "..." for text in self.text[:4]]
        more = ", ..." if len(self.text) > len(beginnings) else ""
        shown = ", ".join(map(repr, beginnings)) + more
        rows, length = self.tokens.shape
        return (
            f"Samples({rows} texts of {length} tokens, entropy {self.entropy.mean():.2f}, "
            f"{self.network_calls} network calls: [{shown}])"
        )


class _Estimate(NamedTuple):
    nll: float
    stderr: float


class Score(_Estimate):
    """What `score` returns: the pair (nll, stderr), with the number of tokens as an attribute.

    Attributes:
        nll: nats per token, an upper bound estimated by Monte Carlo.
        stderr: the standard error of that estimate.
        tokens: how many tokens were scored, BOS and EOS included (but for the given BOS of an autoregressive network).
    """

    tokens: int = 0  # for pairs that `jax.tree.map` or `_replace` make

    def __new__(cls, nll: float, stderr: float, tokens: int = 0) -> Score:
        """Makes the pair."""
        pair = super().__new__(cls, nll, stderr)
        pair.tokens = tokens
        return pair

    def __float__(self) -> float:
        """Returns nats per token."""
        return self.nll

    def __repr__(self) -> str:
        """Shows all three values."""
        return f"Score(nll={self.nll}, stderr={self.stderr}, tokens={self.tokens})"
