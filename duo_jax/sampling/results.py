"""What is measured of sampled texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def unigram_entropy(tokens: np.ndarray) -> np.ndarray:
    """Returns each row's entropy in nats over its own token frequencies, `[B]`; low means that it repeats itself."""
    rows = []
    for row in np.asarray(tokens):
        share = np.unique(row, return_counts=True)[1] / row.size
        rows.append(-np.sum(share * np.log(share)))
    return np.asarray(rows)


def until_end(row: Sequence[int] | np.ndarray, eos_id: int) -> tuple[list[int], bool]:
    """Returns the ids of a row before its first EOS, the first place aside, and whether there is one."""
    ids = [int(i) for i in row]
    end = ids.index(eos_id, 1) if eos_id in ids[1:] else len(ids)
    return ids[:end], end < len(ids)
