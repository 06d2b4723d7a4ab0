"""The train step in float16: the loss is scaled, and a gradient that overflows changes nothing but the scale."""

import functools

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
    batch["tokens"] += jnp.arange(8)[:, None]  # and it matters which rows a part has

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


def scalar_state(tx, seed=0, teacher=None):
    """A state of two weights, with which a step is easily taken by hand."""
    params = {"w": jnp.array([2.0, -1.0])}
    return state.TrainState(
        step=jnp.int32(0), params=params, ema=params, opt_state=tx.init(params),
        key=jax.random.key_data(jax.random.key(seed)), teacher=teacher or {}, loss_scale={},
    )  # fmt: skip


def scalar_steps(n, value, *, start=None, accumulate=1, tx=None, **kwargs):
    """The metrics of n steps on the loss `value(params, teacher, key, step)`, and the state after each."""
    tx = tx or optax.sgd(0.1)

    def make_loss(teacher):
        def loss_fn(params, batch, key, step):
            return value(params, teacher, key, step), {"tokens": batch["mask"].sum()}

        return loss_fn

    settings = {"make_loss": make_loss, "optimizer": tx, "ema": 0.5, "accumulate": accumulate} | kwargs
    step = jax.jit(lambda s: state.train_step(s, {"mask": jnp.ones((4, 1))}, **settings))
    current, metrics, states = start or scalar_state(tx), [], []
    for _ in range(n):
        current, found = step(current)
        metrics.append({name: float(x) for name, x in found.items()})
        states.append(current)
    return metrics, states


def test_every_step_of_every_run_has_noise_of_its_own():
    def noise(params, teacher, key, step):
        return jax.random.uniform(key) + 0 * params["w"].sum()

    seen = []
    for accumulate in (1, 2, 4):
        for seed in (0, 1):
            start = scalar_state(optax.sgd(0.1), seed)
            seen += [row["loss"] for row in scalar_steps(5, noise, start=start, accumulate=accumulate)[0]]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_loss_is_told_how_many_steps_were_taken_before(accumulate):
    metrics, states = scalar_steps(4, lambda params, teacher, key, step: 1.0 * step, accumulate=accumulate)
    assert [row["loss"] for row in metrics] == [0, 1, 2, 3]
    assert [int(s.step) for s in states] == [1, 2, 3, 4]


def test_the_average_is_of_the_weights_after_each_step_and_warms_up():
    """By hand; the decay of 0.5 is reached at the eighth step."""
    _, states = scalar_steps(12, lambda params, teacher, key, step: jnp.sum(params["w"] ** 2))
    weights = ema = np.array([2.0, -1.0])
    for n, found in enumerate(states, start=1):
        weights = weights - 0.1 * 2 * weights
        decay = min(0.5, (1 + n) / (10 + n))
        ema = decay * ema + (1 - decay) * weights
        np.testing.assert_allclose(found.params["w"], weights, rtol=1e-5)
        np.testing.assert_allclose(found.ema["w"], ema, rtol=1e-5)


@pytest.mark.parametrize("source", ["ema", "student"])
def test_a_teacher_is_renewed_at_the_end_of_its_round_and_not_learnt(source):
    """Three steps a round: the fourth learns from what the third has made."""
    teacher = {"w": jnp.array([7.0, 7.0])}

    def value(params, teacher, key, step):
        return teacher["w"].sum() + params["w"].sum()

    renew = functools.partial(state.renew_teacher, every=3, source=source)
    start = scalar_state(optax.sgd(0.1), teacher=teacher)
    metrics, states = scalar_steps(7, value, start=start, new_teacher=renew)
    kept = "ema" if source == "ema" else "params"
    for n, found in enumerate(states):
        last = 3 * ((n + 1) // 3) - 1
        want = teacher if last < 0 else getattr(states[last], kept)
        np.testing.assert_array_equal(found.teacher["w"], want["w"])
    for n, row in enumerate(metrics):
        before = states[n - 1] if n else start
        assert row["loss"] == pytest.approx(float(before.teacher["w"].sum() + before.params["w"].sum()), rel=1e-6)


def test_the_norm_that_is_told_is_the_gradients_before_clipping():
    config = make_config({**SETTINGS, "train.clip": 1.0, "train.lr": 0.1, "train.warmup": 0})
    slope = jnp.array([30.0, 40.0])
    metrics, _ = scalar_steps(2, lambda p, t, k, s: jnp.sum(slope * p["w"]), tx=optimizer.create(config.train))
    assert [row["grad_norm"] for row in metrics] == pytest.approx([50, 50])


def test_the_norm_of_all_weights_together_is_clipped():
    """A gradient of norm 5, half of the weights' parts below 1 each: clipped as a whole, it keeps its direction."""
    config = make_config({**SETTINGS, "train.clip": 1.0, "train.lr": 1.0, "train.warmup": 0})
    clip = optimizer.create(config.train)
    gradient = {"a": jnp.array([3.0, 0.6]), "b": jnp.array([-0.8, np.sqrt(25 - 9 - 0.36 - 0.64)])}
    _, moments = clip.update(gradient, clip.init(gradient), gradient)
    first = next(s.mu for s in jax.tree.leaves(moments, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for name, g in gradient.items():
        np.testing.assert_allclose(first[name], 0.1 * g / 5, rtol=1e-5)


@pytest.mark.parametrize("overflowing", [0, 1, 2])
def test_one_part_that_overflows_is_enough_whichever_it_is(overflowing):
    """The gradient of one of three parts is beyond float32; those of the others are 1."""

    def make_loss(teacher):
        def loss_fn(params, batch, key, step):
            return jnp.sum(params["w"] * batch["tokens"].mean()), {"tokens": batch["mask"].sum()}

        return loss_fn

    tx = optax.sgd(0.1)
    start = scalar_state(tx).replace(loss_scale=state.new_loss_scale())
    size = jnp.ones((6, 1)).at[overflowing::3].set(1e38)  # every third row is of one part
    step = jax.jit(
        lambda s, b: state.train_step(s, b, make_loss=make_loss, optimizer=tx, ema=0.5, accumulate=3),
    )
    after, metrics = step(start, {"tokens": size, "mask": jnp.ones((6, 1))})
    assert (metrics["skipped"], metrics["loss_scale"], int(after.loss_scale.fin_steps)) == (1, 2.0**15, 0)
    np.testing.assert_array_equal(after.params["w"], start.params["w"])
    np.testing.assert_array_equal(after.ema["w"], start.ema["w"])
    after, metrics = step(start, {"tokens": jnp.ones((6, 1)), "mask": jnp.ones((6, 1))})
    assert (metrics["skipped"], metrics["loss_scale"], int(after.loss_scale.fin_steps)) == (0, 2.0**16, 1)
    np.testing.assert_allclose(after.params["w"], start.params["w"] - 0.1, rtol=1e-6)
