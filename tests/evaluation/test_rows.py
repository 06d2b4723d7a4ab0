"""The rows that likelihoods are measured on: every token of a text is in one of them, and is scored once or given."""

import types

import numpy as np
import pytest

from duo_jax.errors import UserError
from duo_jax.evaluation import rows

BOS, EOS = 0, 1
# Its tokens are pairs of letters, from the left: where a text is cut, the pairs of its two parts are others.
PAIRS = types.SimpleNamespace(
    bos_id=BOS, eos_id=EOS, encode=lambda text: [hash_of(text[i : i + 2]) for i in range(0, len(text), 2)]
)


def hash_of(pair):
    return 2 + sum(ord(letter) << 8 * i for i, letter in enumerate(pair))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7, 12, 13])
def test_a_text_is_cut_into_rows_of_which_the_last_is_short(count):
    tokens = list(range(100, 100 + count))
    found = rows.of_text(tokens, PAIRS, 8)
    assert [row[0] for row in found] == [BOS] * len(found)
    assert [row[-1] for row in found] == [EOS] * len(found)
    assert [token for row in found for token in row[1:-1]] == tokens
    assert len(found) == max(1, -(-count // 6))
    assert all(len(row) == 8 for row in found[:-1])


def test_a_token_that_is_partly_the_prompts_is_scored():
    for prompt, text, given in (("abcd", "ef", 3), ("abc", "def", 2), ("a", "b", 1), ("", "ab", 1)):
        row, found = rows.after_prompt(prompt, text, PAIRS, 10)
        assert row == [BOS, *PAIRS.encode(prompt + text), EOS]
        assert found == given


def test_a_prompt_and_its_text_may_fill_a_row():
    assert len(rows.after_prompt("ab", "cd", PAIRS, 4)[0]) == 4
    with pytest.raises(UserError, match="are 4 tokens with BOS and EOS, and the network reads 3"):
        rows.after_prompt("ab", "cd", PAIRS, 3)


@pytest.mark.parametrize("given", [0, 3])
@pytest.mark.parametrize("lengths", [[70] * 4, [70] * 3, [32, 64, 32], [5, 70, 31, 32, 33, 64, 69, *[10] * 70]])
def test_batches_hold_every_row_once(given, lengths):
    rng = np.random.default_rng(0)
    texts = [rng.integers(100, 10**6, n).tolist() for n in lengths]
    found = []
    for batch in rows.batches(texts, given, 70):
        tokens, mask = batch["tokens"], batch["mask"]
        assert tokens.shape == mask.shape
        assert len(tokens) in (1, 2, 4, 8, 16, 32)
        assert tokens.shape[1] in (32, 64, 70)
        ends = batch.get("lengths", np.full(len(tokens), tokens.shape[1]))
        if "given" in batch:
            np.testing.assert_array_equal(batch["given"], mask == 0)
        filling = ~mask.any(axis=1) & (tokens == 0).all(axis=1)
        assert filling.sum() < len(tokens) / 2
        if "given" not in batch:
            assert mask[~filling].all()
        for row, counted, end in zip(tokens[~filling], mask[~filling], ends[~filling], strict=True):
            np.testing.assert_array_equal(np.flatnonzero(counted), np.arange(min(given, end), end))
            assert not row[end:].any()
            found.append(row[:end].tolist())
    assert sorted(found) == sorted(texts)
