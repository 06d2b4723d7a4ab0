"""Schedules: derivative, inverse and end points exact; times evenly spread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.diffusion import schedules
from duo_jax.errors import UserError

ALL = [schedules.log_linear(), schedules.log_linear(1e-5), schedules.cosine(), schedules.cosine(1e-5)]


@pytest.mark.parametrize("schedule", ALL)
def test_derivative_is_the_derivative(schedule):
    t = jnp.linspace(0.0, 1.0, 101)
    slopes = jax.vmap(jax.grad(schedule.alpha))(t)
    np.testing.assert_allclose(schedule.dalpha(t), slopes, rtol=1e-5, atol=1e-9)
    assert schedule.dalpha(t).shape == t.shape


@pytest.mark.parametrize("schedule", ALL)
def test_whole_numbers_are_times_too(schedule):
    for t in (0, 1):
        for value in (schedule.alpha, schedule.dalpha):
            np.testing.assert_array_equal(value(t), value(float(t)))


@pytest.mark.parametrize("schedule", ALL)
def test_inverse_undoes_alpha(schedule):
    t = np.linspace(0.0, 1.0, 201)
    with jax.enable_x64(True):
        np.testing.assert_allclose(schedule.inverse(schedule.alpha(t)), t, atol=1e-12)
    # In float32, t is lost where alpha hardly moves: an error of one unit in alpha, divided by the slope.
    t = np.float32(t)
    slack = 4e-7 * (1 + 1 / np.maximum(np.abs(schedule.dalpha(t)), 1e-4))
    assert np.all(np.abs(schedule.inverse(schedule.alpha(t)) - t) < slack)


def test_end_points():
    for eps in (1e-3, 1e-5):
        assert schedules.log_linear(eps).alpha(0.0) == 1.0
        np.testing.assert_allclose(schedules.log_linear(eps).alpha(1.0), eps, rtol=1e-6)
        np.testing.assert_allclose(schedules.cosine(eps).alpha(0.0), 1.0, rtol=1e-6)
        # 1 - cos y would be 0 here at eps = 1e-5.
        exact = 2 * np.sin(np.pi / 4 * eps) ** 2
        np.testing.assert_allclose(schedules.cosine(eps).alpha(jnp.float32(1.0)), exact, rtol=1e-5)


def test_against_the_reference(golden):
    vectors = golden("c_noise")
    with jax.enable_x64(True):
        t = jnp.asarray(vectors["t"])
        for eps in ("0.001", "1e-05"):
            log_linear, cosine = schedules.log_linear(float(eps)), schedules.cosine(float(eps))
            np.testing.assert_allclose(log_linear.alpha(t), vectors[f"loglinear_eps{eps}_alpha_f64"], rtol=1e-10)
            np.testing.assert_allclose(log_linear.dalpha(t), vectors[f"loglinear_eps{eps}_dalpha_f64"], rtol=1e-12)
            np.testing.assert_allclose(cosine.alpha(t), vectors[f"cosine_eps{eps}_alpha_f64"], rtol=1e-9, atol=1e-12)
            # The reference leaves the factor 1 - eps out of this one.
            slope = vectors[f"cosine_eps{eps}_dalpha_f64"] * (1 - float(eps))
            np.testing.assert_allclose(cosine.dalpha(t), slope, rtol=1e-9, atol=1e-12)
    for n in (4, 7):
        times = schedules.stratified_times(np.arange(n), vectors[f"sample_t_u_{n}"], n)
        np.testing.assert_allclose(times, vectors[f"sample_t_{n}"], rtol=1e-6)


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.2])
def test_times_towards_zero_give_the_integrals_of_even_ones(eps):
    with jax.enable_x64(True):
        nodes, shares = np.polynomial.legendre.leggauss(60)
        even = eps + (1 - eps) * 0.5 * (nodes + 1)
        t, weight = schedules.towards_zero(even, eps)
        for f, mean in (
            (lambda t: t * 0 + 1, 1.0),
            (lambda t: t**3, (1 - eps**4) / 4 / (1 - eps)),
            (np.cos, (np.sin(1) - np.sin(eps)) / (1 - eps)),
        ):
            np.testing.assert_allclose(0.5 * np.sum(shares * weight * f(t)), mean, rtol=1e-12)
        np.testing.assert_allclose(schedules.towards_zero(np.array([eps, 1.0]), eps)[0], [eps, 1.0], rtol=1e-12)
        # Their density: an equal share of them lies between each two square roots that are equally far apart.
        np.testing.assert_allclose(
            np.diff(np.sqrt(schedules.towards_zero(np.linspace(eps, 1, 9), eps)[0]), 2), 0, atol=1e-12
        )


def test_a_schedule_is_a_static_argument():
    evaluate = jax.jit(lambda schedule, t: schedule.alpha(t), static_argnums=0)
    assert evaluate(schedules.cosine(), 0.5) == schedules.by_name("cosine").alpha(0.5)
    for name in ("log-linear", "log_linear", "loglinear"):
        assert schedules.by_name(name, 1e-4) == schedules.log_linear(1e-4)
    np.testing.assert_allclose(schedules.sigma(schedules.log_linear().alpha(1.0)), -np.log(1e-3), rtol=1e-6)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="unknown noise schedule 'linear': choose one of log_linear, cosine"):
        schedules.by_name("linear")
    for make in (schedules.log_linear, schedules.cosine):
        for eps in (1.0, -1e-3):
            with pytest.raises(UserError, match="eps"):
                make(eps)
