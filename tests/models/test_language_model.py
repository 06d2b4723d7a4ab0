"""GPT-2 and Llama against the same written out in NumPy; see `plain_language_models`."""

import dataclasses

import numpy as np
import plain_language_models as plain
import pytest

from duo_jax.models import head, language_model

VOCAB = 37
MODELS = {
    "gpt2": (plain.GPT2, False),
    "llama": (plain.LLAMA, False),
    "llama with a head of its own": (plain.LLAMA, True),
}


@pytest.fixture(params=MODELS)
def model(request):
    """A spec, weights, and tokens `[3, 23]`."""
    spec, own_head = MODELS[request.param]
    tokens = np.random.default_rng(1).integers(0, VOCAB, (3, 23))
    return spec, plain.weights(spec, VOCAB, head=own_head), tokens


def test_nll_is_that_of_the_plain_forward(model):
    spec, weights, tokens = model
    expected = np.stack([plain.plain_nll(spec, weights, row) for row in tokens])
    assert expected.std() > 0.5, "weights so small that any model would do"
    got = np.asarray(language_model.nll(weights, tokens, spec=spec))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_one_token_alone_costs_nothing(model):
    spec, weights, tokens = model
    for length in (0, 1):
        assert language_model.nll(weights, tokens[:, :length], spec=spec).shape == (3, 0)


def test_products_are_in_full_precision_on_every_device(model):
    spec, weights, tokens = model
    program = language_model.nll.lower(weights, tokens, spec=spec).as_text()
    products = [line for line in program.splitlines() if "dot_general" in line]
    assert len(products) > 5
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)


def test_later_tokens_change_nothing_earlier(model):
    spec, weights, tokens = model
    changed = tokens.copy()
    changed[:, 12:] = (changed[:, 12:] + 5) % VOCAB
    a, b = (np.asarray(language_model.nll(weights, rows, spec=spec)) for rows in (tokens, changed))
    np.testing.assert_array_equal(a[:, :11], b[:, :11])  # of tokens 1 to 11
    assert (a[:, 11:] != b[:, 11:]).all()


def test_earlier_tokens_and_their_order_matter(model):
    spec, weights, tokens = model
    swapped = tokens.copy()
    swapped[:, 2], swapped[:, 5] = tokens[:, 5], tokens[:, 2]
    a, b = (np.asarray(language_model.nll(weights, rows, spec=spec)) for rows in (tokens, swapped))
    assert not np.isclose(a[:, -1], b[:, -1], rtol=1e-5).any()


def test_the_head_in_chunks_equals_the_dense_one(model):
    spec, _, tokens = model
    vocab = 30_000  # so that one position of the three rows takes more than a MiB of logits
    weights = plain.weights(spec, vocab)
    dense, chunked = (dataclasses.replace(spec, head_mib=mib) for mib in (1024, 4))
    length = tokens.shape[1] - 1
    assert head.chunk_length(3, length, vocab, dense.head_mib) == length
    assert 1 < head.chunk_length(3, length, vocab, chunked.head_mib) < length / 2
    a, b = (np.asarray(language_model.nll(weights, tokens, spec=s)) for s in (dense, chunked))
    np.testing.assert_allclose(a, b, rtol=1e-5)
