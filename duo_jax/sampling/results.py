"""What is measured of sampled texts."""

from __future__ import annotations

import numpy as np


def unigram_entropy(tokens: np.ndarray) -> np.ndarray:
    """Returns each row's entropy in nats over its own token frequencies, `[B]`; low means that it repeats itself."""
    rows = []
    for row in np.asarray(tokens):
        share = np.unique(row, return_counts=True)[1] / row.size
        rows.append(-np.sum(share * np.log(share)))
    return np.asarray(rows)
