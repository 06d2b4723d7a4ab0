"""The train step in float16: the loss is scaled, and a gradient that overflows changes nothing but the scale."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_config

from duo_jax import objectives
from duo_jax.models.network import Network
from duo_jax.training import optimizer, state

SETTINGS = {
    "algo.name": "duo_base", "model.size": "nano", "model.dim": 32, "model.blocks": 2, "model.heads": 2,
    "model.cond_dim": 16, "model.length": 16, "model.dropout": 0.0, "train.lr": 3e-3, "train.warmup": 5, "train.ema": 0.9,
}  # fmt: skip


def setup(precision):
    config = make_config({**SETTINGS, "precision": precision})
    network = Network.from_config(config, 53)
    tx = optimizer.create(config.train)
    make_loss = objectives.training_loss(config, network)
    step = jax.jit(lambda s, b: state.train_step(s, b, make_loss=make_loss, optimizer=tx, ema=config.train.ema))
    tokens = jnp.tile(jnp.arange(16), (8, 1))
    return state.create(network, tx, 0), step, {"tokens": tokens, "mask": jnp.ones_like(tokens)}


def test_float16_learns_as_float32_does():
    losses = {}
    for precision in ("float16", "float32"):
        current, step, batch = setup(precision)
        rows = []
        for _ in range(40):
            current, metrics = step(current, batch)
            rows.append(float(metrics["loss"]))
        losses[precision] = np.array(rows)
    np.testing.assert_allclose(losses["float16"][:5], losses["float32"][:5], rtol=2e-3)
    np.testing.assert_allclose(losses["float16"][-10:].mean(), losses["float32"][-10:].mean(), rtol=0.05)
    # A time near 0 makes a loss of many times the others.
    assert np.median(losses["float16"][-10:]) < 0.7 * losses["float16"][0]


def test_an_overflow_changes_only_the_scale():
    current, step, batch = setup("float16")
    for _ in range(3):  # the head starts at zero, and with it every other gradient
        current, metrics = step(current, batch)
        assert metrics["skipped"] == 0
    assert metrics["loss_scale"] == 2.0**16
    scale = current.loss_scale.replace(scale=jnp.float32(2.0**60))
    after, metrics = step(current.replace(loss_scale=scale), batch)
    assert metrics["skipped"] == 1
    assert metrics["loss_scale"] == 2.0**59
    assert np.isfinite(metrics["loss"])
    assert int(after.step) == int(current.step) + 1
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(current, name))


def test_what_no_scale_cures_is_reported():
    current, step, batch = setup("float16")
    broken = jax.tree.map(lambda w: w * jnp.inf, current.params)
    scale = current.loss_scale.replace(scale=jnp.float32(2.0**-14))
    _, metrics = step(current.replace(params=broken, loss_scale=scale), batch)
    assert not np.isfinite(metrics["grad_norm"])


def test_the_scale_grows_after_a_while_without_overflow():
    current, step, batch = setup("float16")
    scale = current.loss_scale.replace(fin_steps=jnp.int32(2_000))
    _, metrics = step(current.replace(loss_scale=scale), batch)
    assert metrics["loss_scale"] == 2.0**17


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_in_parts_is_the_mean_over_all_tokens(precision):
    """Against the parts' own steps: plain gradient descent moves by the mean of their gradients, weighed by tokens."""
    current, _, batch = setup(precision)
    config = make_config({**SETTINGS, "precision": precision})
    network = Network.from_config(config, 53)
    make_loss = objectives.training_loss(config, network)
    tx = optax.sgd(1.0)
    weights = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), current.params)
    start = state.create(network, tx, 0, weights)
    batch["mask"] = batch["mask"].at[0, 3:].set(0)  # the parts differ in tokens

    def stepped(start, batch, n):
        return state.train_step(start, batch, make_loss=make_loss, optimizer=tx, ema=0.9, accumulate=n)

    after, metrics = jax.jit(stepped, static_argnums=2)(start, batch, 4)
    key = jax.random.fold_in(jax.random.wrap_key_data(start.key), 0)
    tokens, loss, gradient = 0, 0.0, jax.tree.map(jnp.zeros_like, weights)
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: x[i::4], batch)
        found = jax.jit(lambda part, key: state._gradient(make_loss({}), start, part, key))(
            part, jax.random.fold_in(key, i)
        )
        tokens, loss = tokens + found.tokens, loss + found.tokens * found.loss
        gradient = jax.tree.map(lambda a, b, n=found.tokens: a + n * b, gradient, found.gradient)
    assert tokens == 8 * 16 - 13
    np.testing.assert_allclose(metrics["loss"], loss / tokens, rtol=1e-6)
    tolerance = {"float32": 1e-6, "float16": 1e-3}[precision]
    for before, now, g in zip(*map(jax.tree.leaves, (weights, after.params, gradient)), strict=True):
        want = g / tokens
        np.testing.assert_allclose(before - now, want, rtol=0, atol=tolerance * np.abs(want).max() + 2e-7)


def test_parts_of_which_one_overflows_change_only_the_scale():
    current, _, batch = setup("float16")
    config = make_config({**SETTINGS, "precision": "float16"})
    network, tx = Network.from_config(config, 53), optimizer.create(config.train)
    make_loss = objectives.training_loss(config, network)
    step = jax.jit(
        lambda s, b: state.train_step(s, b, make_loss=make_loss, optimizer=tx, ema=config.train.ema, accumulate=2)
    )
    for _ in range(3):
        current, metrics = step(current, batch)
        assert (metrics["skipped"], metrics["loss_scale"]) == (0, 2.0**16)
    assert int(current.loss_scale.fin_steps) == 3
    after, metrics = step(current.replace(loss_scale=current.loss_scale.replace(scale=jnp.float32(2.0**60))), batch)
    assert (metrics["skipped"], metrics["loss_scale"], int(after.loss_scale.fin_steps)) == (1, 2.0**59, 0)
    jax.tree.map(np.testing.assert_array_equal, after.params, current.params)


def test_other_precisions_have_no_scale():
    current, step, batch = setup("float32")
    assert current.loss_scale == {}
    assert set(step(current, batch)[1]) == {"loss", "grad_norm"}
