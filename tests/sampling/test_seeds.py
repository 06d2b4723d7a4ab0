"""What a text's draws depend on: its seed and its number, and nothing else."""

import jax
import numpy as np
import pytest
from helpers import of_algorithm

import duo_jax
from duo_jax import sampling


@pytest.mark.parametrize(
    ("algo", "kwargs"),
    [
        ("duo_base", {"sampler": "psi", "top_p": 0.9}),
        ("duo_base", {"prompt": "The town", "guidance": 1.5}),
        ("duo_base", {"length": 50}),  # three windows
        ("mdlm", {"sampler": "ancestral_cache", "n_steps": 20}),
        ("ar", {}),
    ],
)
def test_a_text_does_not_depend_on_the_texts_beside_it(params, algo, kwargs):
    network = of_algorithm(params, algo)
    five = duo_jax.sample(network, **{"n_steps": 4} | kwargs, batch_size=5, seed=3, rows_at_once=5).tokens
    assert len(np.unique(five, axis=0)) == 5
    two_at_once = duo_jax.sample(network, **{"n_steps": 4} | kwargs, batch_size=5, seed=3, rows_at_once=2).tokens
    np.testing.assert_array_equal(two_at_once, five)
    alone = duo_jax.sample(network, **{"n_steps": 4} | kwargs, batch_size=1, seed=3, rows_at_once=2).tokens
    np.testing.assert_array_equal(alone, five[:1])


def test_texts_may_have_seeds_of_their_own(params):
    settings = {"n_steps": 3, "length": 20, "rows_at_once": 4}
    texts = duo_jax.sample(params, seed=[7, 5, 7], **settings).tokens
    for text, seed in zip(texts, (7, 5, 7), strict=True):
        np.testing.assert_array_equal(text, duo_jax.sample(params, seed=np.uint32(seed), **settings).tokens[0])
    assert (texts[0] != texts[1]).any()
    np.testing.assert_array_equal(
        texts, duo_jax.sample(params, seed=np.array([7, 5, 7]), batch_size=3, **settings).tokens
    )


def test_every_window_of_every_text_has_draws_of_its_own(params, monkeypatch):
    draw, seen = sampling.networks.sample_tokens, []

    def spy(weights, keys, *args, **kwargs):
        seen.append(jax.random.key_data(keys))
        return draw(weights, keys, *args, **kwargs)

    monkeypatch.setattr(sampling.networks, "sample_tokens", spy)
    duo_jax.sample(params, n_steps=1, batch_size=4, rows_at_once=2, length=50, seed=5)
    assert len(seen) == 2 * 3
    assert len(np.unique(np.concatenate(seen), axis=0)) == 4 * 3
    # Nor are they those of training or of a score with this seed.
    plain = jax.random.key_data(jax.random.split(jax.random.key(5), 64))
    assert len(np.unique(np.concatenate([*seen, plain]), axis=0)) == 4 * 3 + 64


def test_the_origins_of_texts():
    origins = sampling.texts.origins_of(2**32 - 1, 3)
    assert origins.tolist() == [[2**32 - 1, 0], [2**32 - 1, 1], [2**32 - 1, 2]]
    assert sampling.texts.origins_of([5, 6, 5], 3).tolist() == [[5, 0], [6, 0], [5, 0]]
    with jax.default_prng_impl("unsafe_rbg"):  # JAX would use only the first of a batch of such keys
        keys = sampling.texts._keys(origins, np.uint32(0))
    expected = sampling.texts._keys(origins, np.uint32(0))
    np.testing.assert_array_equal(jax.random.key_data(keys), jax.random.key_data(expected))
