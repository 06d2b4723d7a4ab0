"""A web page that replays how texts were sampled: every step's tokens, those that changed marked, under a slider."""

from __future__ import annotations

import itertools
import json
from importlib import resources

import numpy as np

from duo_jax.data.tokenizer import Tokenizer

_TEMPLATE = "replay.html"
_MASK = "▒"


def page(tokenizer: Tokenizer, trajectory: np.ndarray, mask_id: int | None = None) -> str:
    """Returns the page, complete in itself, for `trajectory`, int `[n, B, L]`: the tokens of B texts after every step.

    `mask_id` is the mask of an absorbing network; tokenizers may call the same id by another name.

    Raises:
        UserError: an id that the tokenizer does not have.
    """
    trajectory = np.asarray(trajectory)
    ids = np.unique(trajectory).tolist()
    data = {
        "pieces": {token: _MASK if token == mask_id else _piece(tokenizer, token) for token in ids},
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


def _piece(tokenizer: Tokenizer, token: int) -> str:
    """Returns what a token adds to a text: a word piece gets its space, or loses its ##, only after another token."""
    one, two = (tokenizer.decode(ids, special=True) for ids in ([token], [token, token]))
    return two[len(one) :]


def _changes(before: np.ndarray, after: np.ndarray) -> list[list[int]]:
    """Returns [position, token] for each token that changed."""
    places = np.flatnonzero(before != after)
    return np.stack([places, after[places]], axis=1).tolist()
