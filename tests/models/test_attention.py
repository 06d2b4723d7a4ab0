"""Attention against its formula in float64, and what its gradient keeps."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import hardware
from duo_jax.errors import UserError
from duo_jax.hardware import Hardware
from duo_jax.models import attention

attend = functools.partial(attention.attend, requested="xla")


def draws(heads=4, kv_heads=4, length=24, head_dim=8, dtype=jnp.float32, scale=2.0):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return tuple((scale * jax.random.normal(k, s)).astype(dtype) for k, s in zip(keys, shapes, strict=True))


def by_formula(q, k, v, causal):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = np.einsum("blhd,bmhd->bhlm", q, k) / np.sqrt(q.shape[-1])
    if causal:
        scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhlm,bmhd->blhd", weights / weights.sum(-1, keepdims=True), v)


def gradient_by_formula(q, k, v, g, causal):
    """By central differences along random directions: what `<g, out>` gains per step."""
    rng = np.random.default_rng(0)
    for at in range(3):
        args = [np.asarray(x, np.float64) for x in (q, k, v)]
        way = rng.normal(size=args[at].shape)
        ends = []
        for sign in (1, -1):
            moved = list(args)
            moved[at] = args[at] + sign * 1e-5 * way
            ends.append(np.sum(np.asarray(g, np.float64) * by_formula(*moved, causal)))
        yield way, (ends[0] - ends[1]) / 2e-5


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_value_and_gradient_are_those_of_the_formula(causal, kv_heads):
    q, k, v, g = draws(kv_heads=kv_heads)
    out, pull = jax.vjp(functools.partial(attend, causal=causal), q, k, v)
    np.testing.assert_allclose(out, by_formula(q, k, v, causal), rtol=2e-5, atol=2e-6)
    for gradient, (way, slope) in zip(pull(g), gradient_by_formula(q, k, v, g, causal), strict=True):
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * way), slope, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_near_the_formula_as_its_products_allow(dtype, causal, monkeypatch):
    product = attention._product

    def rounded(a, b, dtype):  # as a GPU has it: a CPU would multiply float16 as float32
        return product(a.astype(dtype), b.astype(dtype), dtype)

    monkeypatch.setattr(attention, "_product", rounded)
    q, k, v, g = draws(dtype=dtype)
    out, pull = jax.vjp(functools.partial(attend, causal=causal), q, k, v)
    assert out.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    # One rounding of the result, and one of each weight, whose sum is 1, times the largest of v.
    np.testing.assert_allclose(np.asarray(out, np.float64), by_formula(q, k, v, causal), atol=eps * np.abs(v).max())
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    _, exact = jax.vjp(functools.partial(attend, causal=causal), *wide)
    for got, want in zip(pull(g), exact(g.astype(jnp.float32)), strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=4 * eps * np.abs(want).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_of_some_tokens_is_as_near(dtype):
    q, k, v, _ = draws(dtype=dtype)
    wanted = by_formula(q, k, v, True)
    filled = jax.jit(functools.partial(attend, causal=True))(q, k, v, lengths=jnp.array([24, 24]))
    last = jax.jit(attention.attend_to_past)(q[:, 23:], k, v, jnp.int32(23))
    assert filled.dtype == last.dtype == dtype
    close = functools.partial(np.testing.assert_allclose, atol=2 * float(jnp.finfo(dtype).eps) * np.abs(v).max())
    close(np.asarray(filled, np.float64), wanted)
    close(np.asarray(last, np.float64), wanted[:, 23:])


def test_float16_is_multiplied_as_float32_on_a_cpu_alone():
    with hardware.compiling_for(Hardware("gpu", 7.5)):
        assert attention._operand_type(jnp.float16) == jnp.float16
    with hardware.compiling_for(Hardware("cpu")):
        assert attention._operand_type(jnp.float16) == jnp.float32
        assert attention._operand_type(jnp.bfloat16) == jnp.bfloat16


def test_no_rows_are_attended_to_as_some_are():
    nothing = (x[:0] for x in draws()[:3])
    assert attend(*nothing, causal=False).shape == (0, 24, 4, 8)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v, g = draws(scale=60.0)
    out, pull = jax.vjp(functools.partial(attend, causal=True), q, k, v)
    np.testing.assert_allclose(out, by_formula(q, k, v, True), rtol=1e-4, atol=1e-3)
    assert all(np.isfinite(x).all() for x in pull(g))


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_keeps_no_weights(causal):
    length = 24
    _, pull = jax.vjp(functools.partial(attend, causal=causal), *draws(length=length)[:3])
    kept = [x.shape for x in jax.tree.leaves(pull)]
    assert len(kept) == 5
    assert not [shape for shape in kept if shape[-2:] == (length, length)]


def test_a_query_attends_to_its_past_as_in_the_whole_text():
    q, k, v, _ = draws()
    whole = attend(q, k, v, causal=True)
    for position in (0, 7, 23):
        alone = attention.attend_to_past(q[:, position : position + 1], k, v, jnp.int32(position))
        np.testing.assert_allclose(alone[:, 0], whole[:, position], rtol=2e-5, atol=1e-6)


@pytest.fixture(params=["xla", "cudnn"])
def name(request, monkeypatch):
    """Who computes attention; for cuDNN, which is not here, XLA answers what it is asked."""
    plain = jax.nn.dot_product_attention

    def answer(*args, implementation, **kwargs):
        assert implementation == request.param
        return plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(attention, "backend", lambda *_, **__: request.param)
    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    return request.param


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_whoever_computes_it_follows_the_formula_up_to_each_rows_end(kv_heads, causal, name):
    q, k, v, _ = draws(kv_heads=kv_heads)
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-5)
    close(attend(q, k, v, causal=causal), by_formula(q, k, v, causal))
    ends = 24, 9
    found = attend(q, k, v, causal=causal, lengths=jnp.array(ends))
    for row, end in enumerate(ends):
        cut = (x[row : row + 1, :end] for x in (q, k, v))
        close(found[row : row + 1, :end], by_formula(*cut, causal))


def test_another_name_is_refused():
    with pytest.raises(UserError, match="choose auto, xla or cudnn"):
        attention.choose("flash", Hardware("cpu"), dtype=jnp.float32, head_dim=8, length=4)


@pytest.mark.parametrize(("named", "expected"), [("8.6", 8.6), ("12.0", 12.0), ("gfx942", 0.0), (None, 0.0)])
def test_the_compute_capability_of_any_gpu_is_a_number(named, expected, monkeypatch):
    device = types.SimpleNamespace(platform="gpu", compute_capability=named, memory_stats=lambda: None)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert hardware.present() == Hardware("gpu", expected, None)
    device.memory_stats = lambda: {"bytes_in_use": 1, "bytes_limit": 7, "peak_bytes_in_use": 3}
    assert hardware.present().memory == 7
