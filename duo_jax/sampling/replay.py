"""A web page that replays how texts were sampled: every step's tokens, those that changed marked, under a slider."""

from __future__ import annotations

import itertools
import json
from importlib import resources

import numpy as np

from duo_jax.data.tokenizer import Tokenizer

_TEMPLATE = "replay.html"


def page(tokenizer: Tokenizer, trajectory: np.ndarray) -> str:
    """Returns the page, complete in itself, for `trajectory`, int `[n, B, L]`: the tokens of B texts after every step.

    Raises:
        UserError: an id that the tokenizer does not have.
    """
    trajectory = np.asarray(trajectory)
    ids = np.unique(trajectory).tolist()
    data = {
        "pieces": {token: tokenizer.decode([token], special=True) for token in ids},
        "special": [token for token in ids if token in tokenizer.special_names],
        "texts": [
            {"first": steps[0].tolist(), "changes": [_changes(*pair) for pair in itertools.pairwise(steps)]}
            for steps in trajectory.swapaxes(0, 1)
        ],
    }
    # "</script>" in a text would end the data; "<!--" and "<script" together would make them swallow the real end.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return template.replace("{{data}}", text)


def _changes(before: np.ndarray, after: np.ndarray) -> list[list[int]]:
    """Returns [position, token] for each token that changed."""
    places = np.flatnonzero(before != after)
    return np.stack([places, after[places]], axis=1).tolist()
