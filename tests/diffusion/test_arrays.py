"""The entry of each row's token, and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.diffusion.arrays import anew, take


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


def test_what_is_computed_anew_is_the_same():
    x, after = jnp.arange(3.0), jnp.ones(2)
    np.testing.assert_array_equal(jax.jit(anew)(x, after), x)
    for platform, kept in (("cpu", True), ("cuda", False), ("tpu", False)):
        text = jax.jit(anew).trace(x, after).lower(lowering_platforms=(platform,)).as_text()
        assert ("optimization_barrier" not in text) == kept
