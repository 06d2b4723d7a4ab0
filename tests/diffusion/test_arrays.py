"""The entry of each row's token, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.diffusion import categorical, distillation, uniform
from duo_jax.diffusion.arrays import before_sum, in_one_pass, in_two_passes, recompute_after, take


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_taking_an_entry_and_its_gradient(dtype):
    rng = np.random.default_rng(0)
    values, ids = jnp.asarray(rng.normal(size=(4, 3, 7)), dtype), jnp.asarray(rng.integers(0, 7, (4, 3)))
    cotangent = jnp.asarray(rng.normal(size=(4, 3)), dtype)
    found, pull = jax.vjp(lambda v: take(v, ids), values)
    hot = np.eye(7)[np.asarray(ids)]
    np.testing.assert_array_equal(np.float64(found), (np.float64(values) * hot).sum(-1))
    (gradient,) = pull(cotangent)
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(np.float64(gradient), np.float64(cotangent)[..., None] * hot)


def test_what_is_recomputed_is_the_same():
    x, after = jnp.arange(3.0), jnp.ones(2)
    np.testing.assert_array_equal(jax.jit(recompute_after)(x, after), x)
    for platform, kept in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = jax.jit(recompute_after).trace(x, after).lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" not in text) == kept


def test_what_a_cpu_computes_before_a_sum_is_the_same():
    x = jnp.asarray([0.0, 1e-45, 1.2e-38, 1.0 + 2**-23, -3e38, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    for kind in (jnp.float32, jnp.bfloat16):
        np.testing.assert_array_equal(np.float32(jax.jit(before_sum)(x.astype(kind))), np.float32(x.astype(kind)))
    for platform, rounds in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = jax.jit(before_sum).trace(x).lower(lowering_platforms=(platform,)).as_text()
        assert ("reduce_precision" in text) == rounds


@pytest.mark.parametrize("find", [in_one_pass, in_two_passes])
@pytest.mark.parametrize("scale", [0.1, 3.0, 500.0])
def test_the_largest_and_the_sum_of_exponentials(find, scale):
    rng = np.random.default_rng(0)
    values = np.float32(rng.normal(scale=scale, size=(6, 1000)))
    values[0, :990] = -np.inf
    if find is in_one_pass:
        values[1] = -np.inf
    values[2, 500] = np.float32(1e30)
    values[3] = values[3, 0]  # ties
    counts = rng.random(values.shape) < 0.7
    top, total = jax.jit(find)(jnp.asarray(values), jnp.asarray(counts))
    np.testing.assert_array_equal(top, values.max(-1))
    wide = np.float64(values)
    reference = np.where(np.isneginf(wide.max(-1)), 0, wide.max(-1))[:, None]
    np.testing.assert_allclose(total, (np.exp(wide - reference) * counts).sum(-1), rtol=2e-6, atol=1e-37)
    assert (total[1] == 0) == (find is in_one_pass)


def as_an_accelerator(monkeypatch):
    """What is written for accelerators runs on a CPU too, if not as fast."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))


def losses():
    """Functions of logits `[24, 60]` that visit them in other passes on an accelerator."""
    rng = np.random.default_rng(0)
    z_t, x = (jnp.asarray(rng.integers(0, 59, 24)) for _ in range(2))
    z_t = z_t.at[:8].set(x[:8])
    alpha, dalpha = jnp.asarray(rng.uniform(0.05, 0.95, 24), jnp.float32), -jnp.ones(24)
    other = jnp.asarray(rng.normal(size=(24, 60)), jnp.float32)
    return {
        "nelbo": lambda logits: uniform.nelbo_from_logits(logits, z_t, x, alpha, dalpha),
        "nll": lambda logits: categorical.nll(logits, x, 59),
        "kl": lambda logits: distillation.kl(logits, other),
        "kl of": lambda logits: distillation.kl(other, logits),
    }


@pytest.mark.parametrize("name", losses())
def test_an_accelerators_passes_give_a_cpus_value_and_gradient(name, monkeypatch):
    logits = 3 * jax.random.normal(jax.random.key(0), (24, 60))

    def value_and_gradient():
        value, pull = jax.vjp(losses()[name], logits)
        return value, pull(jnp.linspace(0.5, 2.0, 24))[0]

    want = jax.jit(lambda: value_and_gradient())()
    as_an_accelerator(monkeypatch)
    text = str(jax.make_jaxpr(lambda: value_and_gradient())())
    assert "platform_index" not in text
    assert text.count(" reduce[") >= (1 if name in ("nelbo", "nll") else 2), "it is the other way that is tested"
    for ours, theirs in zip(jax.jit(lambda: value_and_gradient())(), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("shift", [0.0, 90.0, -300.0])
def test_the_sums_that_accelerators_take_are_those_of_a_cpu(shift, monkeypatch):
    logits = 4 * jax.random.normal(jax.random.key(0), (5, 1000)) + shift
    logits = logits.at[:, 40:80].set(-jnp.inf)  # a whole block of them
    want = jax.jit(categorical._block_log_sums, static_argnums=1)(logits, 32)
    as_an_accelerator(monkeypatch)
    got = jax.jit(lambda *args: categorical._block_log_sums(*args), static_argnums=1)(logits, 32)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
