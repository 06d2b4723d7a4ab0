"""What is held in a text: prompts, gaps and arrays, as they are tokenized and as they are sampled around."""

import itertools

import numpy as np
import pytest

import duo_jax
from duo_jax import sampling
from duo_jax.data import tokenizers


def test_gaps_are_filled(params):
    result = duo_jax.sample(params, infill="The ___ is on the ____.", batch_size=2, length=30)
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    first, second, third = (tokenizer.encode(piece) for piece in ("The", " is on the", "."))
    free = 30 - 2 - len(first) - len(second) - len(third)
    gaps = free - free // 2, free // 2
    for row in result.tokens.tolist():
        assert row[0] == tokenizer.bos_id
        assert row[-1] == tokenizer.eos_id
        row = row[1:-1]
        assert row[: len(first)] == first
        start = len(first) + gaps[0]
        assert row[start : start + len(second)] == second
        assert row[-len(third) :] == third
        assert start + len(second) + gaps[1] + len(third) == 28


def test_a_text_may_fill_its_length_but_for_a_token_a_gap(params):
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    ids = [tokenizer.bos_id, *tokenizer.encode("The town")]
    tokens, held = sampling.prompts.prefix(tokenizer, "The town", len(ids))
    assert (tokens.tolist(), held.all()) == (ids, True)
    with pytest.raises(duo_jax.UserError, match="more than the length"):
        sampling.prompts.prefix(tokenizer, "The town", len(ids) - 1)
    need = 2 + sum(len(tokenizer.encode(piece)) for piece in ("The", " of", " is"))
    for room, gaps in ((2, [1, 1]), (3, [2, 1]), (4, [2, 2])):
        _, held = sampling.prompts.gaps(tokenizer, "The ___ of ___ is", need + room)
        assert [len(list(free)) for is_held, free in itertools.groupby(held) if not is_held] == gaps
    with pytest.raises(duo_jax.UserError, match="more than the length"):
        sampling.prompts.gaps(tokenizer, "The ___ of ___ is", need + 1)


def test_what_a_tokenizer_would_change_is_not_held(tmp_path):
    """Of a vocabulary of two words: another becomes [UNK], and a control character nothing."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]) + "\n")
    tokenizer = tokenizers.load(tmp_path / "vocab.txt")
    assert sampling.prompts.encode(tokenizer, "The cat") == [5, 6]
    assert sampling.prompts.encode(tokenizer, " ") == []
    for text in ("the dog", "\x01", "the \ud800cat"):
        with pytest.raises(duo_jax.UserError, match="cannot encode"):
            sampling.prompts.encode(tokenizer, text)


def test_arrays_are_filled(params):
    tokens, mask = np.full((2, 6), 50), np.zeros((2, 6), bool)
    mask[0, 1], mask[1, 5] = True, True
    result = duo_jax.sample(params, infill=(tokens, mask), batch_size=2, length=20)
    assert result.tokens[0, 1] == result.tokens[1, 5] == 50
    assert (result.tokens == 50).sum() < 12
