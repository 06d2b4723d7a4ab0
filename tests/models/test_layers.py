"""What a block computes between its products, and the derivatives written for it, against plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.models import attention, layers

B, L, D = 3, 5, 8


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape))


def plain_norm(x, weight, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    out = weight * centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return out if scale is None else out * (1 + scale) + shift


def plain_sum(x, y, bias, gate, kept, share):
    y = y if bias is None else y + bias
    y = y if kept is None else y * kept / share
    return x + (y if gate is None else gate * y)


def plain_heads(qkv, cos, sin):
    """Each pair (i, i + head_dim / 2) as a complex number, turned."""
    half = cos.shape[-1] // 2
    q, k, v = (part.reshape(B, L, -1, 2 * half) for part in jnp.split(qkv, 3, axis=-1))

    def turn(x):
        turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, None, :half]
        return jnp.concatenate([turned.real, turned.imag], axis=-1)

    return turn(q), turn(k), v


def cases():
    """A function, its plain formula, and its arguments of float64."""
    rng = np.random.default_rng(0)
    x, y, weight, bias = normal(rng, B, L, D), normal(rng, B, L, D), normal(rng, D), normal(rng, D)
    scale, shift = normal(rng, B, 1, D), normal(rng, B, 1, D)
    kept = jnp.asarray(rng.random((B, L, D)) < 0.7)
    angles = tuple(angle.astype(x.dtype) for angle in attention.rotary_angles(L, 4))

    def norm(*args):
        return layers.modulated_norm(*args, x.dtype)

    def gelu(x, bias):
        return jax.nn.gelu(x + bias, approximate=True)

    def masked(fn, kept, share):
        return lambda x, y, bias, gate: fn(x, y, bias, gate, kept, share)

    sums = layers.gated_sum, plain_sum
    return {
        "norm": (norm, plain_norm, (3 + x, weight, scale, shift)),
        "norm, not modulated": (norm, plain_norm, (3 + x, weight, None, None)),
        "gelu": (layers.gelu, gelu, (x.reshape(-1, D), bias)),
        "sum": (*(masked(fn, kept, 0.7) for fn in sums), (x, y, bias, scale)),
        "sum, no dropout": (*(masked(fn, None, 1.0) for fn in sums), (x, y, bias, scale)),
        "sum, no bias": (*(masked(fn, kept, 0.7) for fn in sums), (x, y, None, scale)),
        "sum, no gate": (*(masked(fn, kept, 0.7) for fn in sums), (x, y, bias, None)),
        "sum alone": (*(masked(fn, None, 1.0) for fn in sums), (x, y, None, None)),
        "heads": (
            *((lambda q, fn=fn: fn(q, *angles)) for fn in (layers.heads_of, plain_heads)),
            (normal(rng, B, L, 24),),
        ),
    }


@pytest.fixture
def float64():
    """JAX computes in float64 what is given as float64."""
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("as_on", ["cpu", "accelerator"])
@pytest.mark.parametrize("name", cases())
def test_values_and_gradients_are_those_of_the_plain_formula(name, as_on, float64, monkeypatch):
    if as_on == "accelerator":
        monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    ours, plain, args = cases()[name]
    value, pull = jax.vjp(ours, *args)
    wanted, plain_pull = jax.vjp(plain, *args)
    cotangent = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype), wanted)
    assert jax.tree.structure(pull(cotangent)) == jax.tree.structure(plain_pull(cotangent))
    assert all(x.dtype == np.float64 for x in jax.tree.leaves((value, pull(cotangent))))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12)  # noqa: E731
    jax.tree.map(close, (value, pull(cotangent)), (wanted, plain_pull(cotangent)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_summed_over_tokens_in_float32(dtype):
    """4,101 gradients of 1: bfloat16 would stop at 256 and float16 at 2,048, one by one, and lose digits in any order."""
    ones, zero = jnp.ones((3, 1367, 2), dtype), jnp.zeros(2)
    gate = jnp.ones((3, 1, 2), dtype)
    _, pull = jax.vjp(lambda b, g: layers.gated_sum(jnp.zeros(ones.shape), ones, b, g, None, 1.0), zero, gate)
    d_bias, d_gate = pull(ones.astype(jnp.float32))
    np.testing.assert_array_equal(d_bias, 4101)
    np.testing.assert_array_equal(d_gate, jnp.full(gate.shape, 1367, dtype))
    x = jnp.zeros((4098, 2), dtype)
    _, pull = jax.vjp(lambda b: layers.gelu(x, b), zero)
    np.testing.assert_array_equal(pull(jnp.ones_like(x))[0], 2049)  # the slope at 0 is 1/2
    _, pull = jax.vjp(
        lambda shift: layers.modulated_norm(jnp.zeros(ones.shape), jnp.ones(2), gate, shift, dtype),
        jnp.zeros((3, 1, 2)),
    )
    np.testing.assert_array_equal(pull(ones)[0], 1367)


def test_half_precision_operands_are_computed_with_in_float32():
    """In bfloat16 1 + 1/512 would be 1, 1 / 0.7 1.4297, and -1 + 1/1024 -1."""
    x, weight = jnp.asarray([[[-1.0, 1.0]]]), jnp.ones(2)
    scale = jnp.full((1, 1, 2), 2**-9, jnp.bfloat16)
    out, pull = jax.vjp(lambda w: layers.modulated_norm(x, w, scale, jnp.zeros((1, 1, 2)), jnp.float32), weight)
    wanted = (1 + 2**-9) / np.sqrt(1 + layers.EPSILON) * np.asarray([-1.0, 1.0])
    np.testing.assert_allclose(out[0, 0], wanted, rtol=1e-6)
    np.testing.assert_allclose(pull(jnp.ones_like(out))[0], wanted, rtol=1e-6)
    y, kept = jnp.ones((1, 1, 2), jnp.bfloat16), jnp.ones((1, 1, 2), bool)
    np.testing.assert_allclose(layers.gated_sum(jnp.zeros((1, 1, 2)), y, None, None, kept, 0.7), 1 / 0.7, rtol=1e-6)
    (out,) = layers.gelu(y[0], jnp.full(2, -1 + 2**-10))
    np.testing.assert_allclose(out, jax.nn.gelu(2**-10), rtol=2**-8)


def test_a_norms_sums_do_not_overflow_float16():
    x = jax.random.normal(jax.random.key(0), (1, 4096, 4))
    _, pull = jax.vjp(lambda s: layers.modulated_norm(x, jnp.ones(4), s, s, jnp.float16), jnp.zeros((1, 1, 4)))
    (gradient,) = pull(jnp.full(x.shape, 40, jnp.float16))
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient) > 65504).any()


@pytest.mark.parametrize("rate", [0.1, 0.5, 1e-6, 0.999999])
def test_dropout_lets_its_share_through(rate):
    """Twelve tests, each with a false alarm in 16 million (5.3 standard deviations)."""
    kept, share = layers.dropout_mask(jax.random.key(0), rate, (64, 128, 64))
    assert kept.shape == (64, 128, 64)
    assert abs(share - (1 - rate)) <= 2**-16
    kept = np.float64(kept)

    def check(values, mean, deviation):
        assert abs(values.mean() - mean) <= 5.3 * deviation / values.size**0.5 + 1e-15

    deviation = (share * (1 - share)) ** 0.5
    check(kept, share, deviation)
    # Neighbours share a random word; halves of it are as independent as words are.
    check(kept[..., ::2] * kept[..., 1::2], share**2, (share**2 * (1 - share**2)) ** 0.5)
    check(kept[..., 1:-1:2] * kept[..., 2::2], share**2, (share**2 * (1 - share**2)) ** 0.5)


def test_a_dropout_of_every_rate_that_is_allowed_lets_something_through():
    for rate in (0.0, 1e-9, 1 - 1e-9):
        kept, share = layers.dropout_mask(jax.random.key(0), rate, (2, 2))
        assert 0 < share <= 1
        assert kept.all() or rate > 0.5
