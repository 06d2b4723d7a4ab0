"""The chunked vocabulary head against the dense computation, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from duo_jax.models import head

VOCAB = 53


@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 12])
def test_the_chunked_head_equals_the_dense_one(chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 12, 8))
    weights = {"kernel": jax.random.normal(keys[1], (8, VOCAB)), "bias": jax.random.normal(keys[2], (VOCAB,))}
    targets = jax.random.randint(keys[3], (3, 12), 0, VOCAB)

    def nll(logits, x):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]

    def loss(hidden, weights, chunk):
        per_token = head.in_chunks(
            lambda hidden, x: nll(head.logits(hidden, weights, jnp.dtype("float32")), x), hidden, targets, chunk=chunk
        )
        return (per_token * jnp.arange(12)).sum(), per_token

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (gradient, value), (dense_gradient, dense_value) = grad(hidden, weights, chunk), grad(hidden, weights, 12)
    np.testing.assert_allclose(value, dense_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), gradient, dense_gradient)


@pytest.mark.parametrize("chunk", [1, 4, 7, 36, 100])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_some_tokens_are_visited_and_no_others(chunk, share):
    keys = jax.random.split(jax.random.key(0), 3)
    which = jax.random.uniform(keys[0], (3, 12)) < share
    x, token_keys = jax.random.normal(keys[1], (3, 12, 5)), jax.random.split(keys[2], (3, 12))

    def fn(x, keys):
        assert x.ndim == 2
        return {"sum": x.sum(-1), "twice": 2 * x, "noise": jax.vmap(jax.random.uniform)(keys)}

    found = jax.jit(lambda *args: head.map_selected_tokens(fn, which, *args, chunk=chunk))(x, token_keys)
    expected = jax.vmap(fn)(x, token_keys)
    visited = found["twice"].any(-1)
    assert (visited | ~which).all()
    assert visited.sum() <= min(-(-which.sum() // min(chunk, 36)) * chunk, 36)  # the last chunk is filled up
    for name, want in expected.items():
        np.testing.assert_allclose(found[name][visited], want[visited], rtol=1e-6)


def test_the_chunked_head_holds_no_batch_of_logits():
    batch, length, vocab = 4, 256, 20_000
    chunk = head.chunk_length(batch, length, vocab, mib=16)
    weights = {"kernel": jnp.zeros((8, vocab)), "bias": jnp.zeros(vocab)}

    def log_normaliser(hidden):
        return jax.nn.logsumexp(head.logits(hidden, weights, jnp.dtype("float32")), axis=-1)

    def loss(hidden):
        return head.in_chunks(log_normaliser, hidden, chunk=chunk).sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((batch, length, 8))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20 < batch * length * vocab * 4


def test_chunk_length_covers_and_fits():
    sizes = [(32, 1024, 50_258, 256), (8, 127, 512, 1), (2, 100, 512, 1), (1, 1, 2, 1), (512, 1024, 50_258, 1)]
    for batch, length, vocab, mib in sizes:
        chunk = head.chunk_length(batch, length, vocab, mib)
        assert 1 <= chunk <= length
        assert -length % chunk < -(-length // chunk), "a shorter chunk would do as often"
        assert chunk == 1 or batch * chunk * vocab * 16 <= mib * 2**20
    assert head.tokens_at_once(50_258, 0) == 1


def dense(logits, x, slope):
    return slope * -jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]


def arguments():
    keys = jax.random.split(jax.random.key(0), 6)
    weights = {"kernel": jax.random.normal(keys[1], (8, VOCAB)), "bias": jax.random.normal(keys[2], (VOCAB,))}
    mask = (jax.random.uniform(keys[4], (4, 12)) < 0.7).astype(jnp.float32)
    x, slope = jax.random.randint(keys[3], (4, 12), 0, VOCAB), jax.random.uniform(keys[5], (4, 12))
    return weights, jax.random.normal(keys[0], (4, 12, 8)), mask, x, slope


@pytest.mark.parametrize("chunk", [1, 5, 7, 12, 20])
def test_the_weighted_sum_and_its_gradient_equal_the_dense_ones(chunk):
    weights, hidden, mask, x, slope = arguments()
    weight = mask * jnp.linspace(-1.0, 2.0, mask.size).reshape(mask.shape)

    def chunked(weights, hidden):
        return 3 * head.weighted_sum(dense, weights, hidden, weight, (x, slope), chunk=chunk, dtype=jnp.float32)

    def whole(weights, hidden):
        return 3 * (weight * dense(hidden @ weights["kernel"] + weights["bias"], x, slope)).sum()

    got, want = (jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(weights, hidden) for f in (chunked, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), got, want)
    np.testing.assert_allclose(jax.jit(chunked)(weights, hidden), want[0], rtol=1e-6)  # without a gradient


def test_a_token_without_weight_may_cost_infinitely_much():
    weights, hidden, mask, x, _ = arguments()

    def cost(logits, x, counts):
        return jnp.where(counts > 0, dense(logits, x, 1.0), jnp.inf)

    def loss(weights, hidden):
        return head.weighted_sum(cost, weights, hidden, mask, (x, mask), chunk=5, dtype=jnp.float32)

    value, gradient = jax.value_and_grad(loss, argnums=(0, 1))(weights, hidden)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("dtype", "rtol"), [("bfloat16", 0.02), ("float16", 0.003)])
def test_half_precision_products_are_close_both_ways(dtype, rtol):
    weights, hidden, mask, x, slope = arguments()

    def loss(weights, hidden, dtype):
        return head.weighted_sum(dense, weights, hidden, mask, (x, slope), chunk=5, dtype=dtype)

    grad = jax.grad(loss, argnums=(0, 1))
    half, full = grad(weights, hidden, jnp.dtype(dtype)), grad(weights, hidden, jnp.float32)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < rtol * np.linalg.norm(b)


def test_the_backward_products_are_in_the_compute_type():
    weights, hidden, mask, x, slope = arguments()

    def loss(weights, hidden):
        return head.weighted_sum(dense, weights, hidden, mask, (x, slope), chunk=5, dtype=jnp.bfloat16)

    types = [
        [var.aval.dtype for var in eqn.invars]
        for eqn in equations(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(weights, hidden).jaxpr)
        if eqn.primitive.name == "dot_general" and all(var.aval.ndim > 1 for var in eqn.invars)  # not the bias's sum
    ]
    assert types == [[jnp.bfloat16] * 2] * 3  # one product forward and two back: each chunk is visited once


def test_a_gradient_beyond_float16_is_its_largest_number():
    cotangent = jnp.asarray([[[1e6, -1e6, 3.0]]])
    gradients = head.products_gradient(jnp.ones((1, 1, 2)), jnp.ones((2, 3), jnp.float16), cotangent)
    within = np.array([65504.0, -65504.0, 3.0])
    for found, wanted in zip(gradients, ([[[3.0, 3.0]]], [within, within], within), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("as_on", ["cpu", "accelerator"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_rows_are_summed_in_float32(dtype, as_on, monkeypatch):
    if as_on == "accelerator":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    found = head.sum_of_rows(jnp.ones((17, 241, 3), dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [4097] * 3)  # which half precision rounds to 4096


def equations(jaxpr):
    """Every equation of a program, those of its loops included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_transposed_head_gives_the_same_logits(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (16, 37)), "bias": jax.random.normal(keys[1], 37)}
    hidden = jax.random.normal(keys[2], (2, 5, 16))
    reader = head.transposed(params, dtype)
    assert reader["kernel"].dtype == dtype
    got, want = head.logits_of_transposed(hidden, reader), head.logits(hidden, params, dtype)
    assert got.dtype == want.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_half_precision_head_is_read_in_whole_tiles_and_says_the_same(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {"kernel": jax.random.normal(keys[0], (16, 37)), "bias": jax.random.normal(keys[1], 37)}
    hidden = jax.random.normal(keys[2], (2, 5, 16))
    padded = head.padded_head(params, dtype)
    assert padded["kernel"].shape == (16, 128)
    assert head.padded_head(params, jnp.dtype("float32"))["kernel"].shape == (16, 37)
    whole = {"kernel": jnp.zeros((16, 256)), "bias": jnp.zeros(256)}
    assert head.padded_head(whole, dtype)["kernel"].shape == (16, 256)
    got, want = head.padded_head_logits(hidden, padded), head.logits(hidden, params, dtype)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
