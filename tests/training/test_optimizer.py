"""The optimizer and the average against the reference's numbers."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from duo_jax import config as config_lib
from duo_jax.training import optimizer


@pytest.mark.parametrize(("lr", "warmup"), [("0.0003", 2500), ("6e-05", 500)])
def test_learning_rate(golden, lr, warmup):
    data = golden("h_optim")
    config = config_lib.default().train
    config.lr, config.warmup = float(lr), warmup
    schedule = optimizer.learning_rate(config)
    got = [float(schedule(n)) for n in data[f"lr_steps_{lr}_{warmup}"]]
    np.testing.assert_allclose(got, data[f"lr_{lr}_{warmup}"], rtol=1e-6)


@pytest.mark.parametrize("decay", ["0.0", "0.1"])
def test_adamw_with_clipping_and_warmup(golden, decay):
    data = golden("h_optim")
    config = config_lib.default().train
    config.lr, config.warmup, config.weight_decay = 3e-2, 3, float(decay)
    adam = optimizer.create(config)
    params = jnp.asarray(data[f"adamw_wd{decay}_p0"])
    state = adam.init(params)
    for gradient, expected in zip(data[f"adamw_wd{decay}_grads"], data[f"adamw_wd{decay}_params"], strict=True):
        updates, state = adam.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-5, atol=1e-6)


def test_every_setting_of_adam_is_used():
    """Two steps by hand, with settings that are nobody's defaults."""
    config = config_lib.default().train
    config.update(
        {"lr": 0.1, "warmup": 0, "clip": 100.0, "beta1": 0.5, "beta2": 0.7, "adam_eps": 0.3, "weight_decay": 0.2}
    )
    adam = optimizer.create(config)
    weight, mean, square = 2.0, 0.0, 0.0
    params = jnp.asarray(weight)
    state = adam.init(params)
    for n, gradient in enumerate((0.8, -0.4), start=1):
        updates, state = adam.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        mean, square = 0.5 * mean + 0.5 * gradient, 0.7 * square + 0.3 * gradient**2
        step = mean / (1 - 0.5**n) / (np.sqrt(square / (1 - 0.7**n)) + 0.3)
        weight -= 0.1 * (step + 0.2 * weight)
        np.testing.assert_allclose(params, weight, rtol=1e-6)


@pytest.mark.parametrize("decay", ["0.9999", "0.3"])
def test_ema(golden, decay):
    data = golden("h_optim")
    params, shadow = data[f"ema_{decay}_params"], data[f"ema_{decay}_shadow"]
    ema = jnp.asarray(shadow[0])
    for n in range(1, 6):
        ema = optimizer.update_ema(ema, jnp.asarray(params[n]), jnp.asarray(n), float(decay))
        np.testing.assert_allclose(ema, shadow[n], rtol=1e-5)
