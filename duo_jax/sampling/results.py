"""Figures of sampled texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def unigram_entropy(tokens: np.ndarray) -> np.ndarray:
    """Returns each row's entropy in nats over its own token frequencies, `[B]`; low means that it repeats itself."""
    entropies = []
    for row in np.asarray(tokens):
        share = np.unique(row, return_counts=True)[1] / row.size
        entropies.append(-np.sum(share * np.log(share)))
    return np.asarray(entropies)


def until_end(row: Sequence[int] | np.ndarray, eos_id: int) -> tuple[list[int], bool]:
    """Returns a row's ids before its first EOS after position 0, and whether there is one."""
    ids = [int(i) for i in row]
    end = ids.index(eos_id, 1) if eos_id in ids[1:] else len(ids)
    return ids[:end], end < len(ids)
