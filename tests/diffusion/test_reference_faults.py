"""Where the PyTorch reference is wrong, measured beside our own error: the figures of docs/mathematics.md.

`pytest tests/diffusion/test_reference_faults.py -s` prints them. A test fails if the fault is not there or if we share
it.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import exact_operator, published_nelbo, softmax

from duo_jax.diffusion import absorbing, duality, operators, schedules, uniform


def report(what, theirs, ours):
    print(f"\n{what}: reference {theirs:.2g}, here {ours:.2g}")


def relative(value, exact):
    return np.max(np.abs(np.float64(value) / exact - 1))


def test_nelbo_in_float32(golden):
    vectors = golden("b_losses")
    logits, z_t, x = np.float32(vectors["logits"]), vectors["xt"], vectors["x0"]
    alpha, dalpha = np.float32(vectors["alpha_t"]), np.float32(vectors["dalpha_t"])
    exact = published_nelbo(softmax(logits), z_t, x, np.broadcast_to(alpha, x.shape), dalpha)
    theirs = vectors["duo_nll_f32"] - exact
    ours = np.float64(uniform.nelbo_from_logits(logits, z_t, x, alpha, dalpha)) - exact
    report("NELBO, float32, largest absolute error", np.max(np.abs(theirs)), np.max(np.abs(ours)))
    report("NELBO, float32, largest relative error", np.max(np.abs(theirs / exact)), np.max(np.abs(ours / exact)))
    assert np.max(np.abs(ours / exact)) < 1e-5 < np.max(np.abs(theirs / exact))


@pytest.mark.parametrize(("name", "k"), [("gpt2", 50_257), ("bert-base-uncased", 30_522)])
def test_operator_table(golden, name, k):
    vectors = golden("e_t_operator")
    gamma, span = np.float32(vectors[f"{name}/gamma"]), np.ptp(vectors[f"{name}/gamma"])
    exact, slope = exact_operator(gamma, k)
    alpha_error = relative(vectors[f"{name}/alpha_cached_f32gamma"], exact), relative(duality.alpha(gamma, k), exact)
    slope_error = (
        relative(vectors[f"{name}/dalpha_cached_f32gamma"], slope * span),
        relative(duality.dalpha(gamma, k), slope),
    )
    report(f"{name}: T, largest relative error", *alpha_error)
    report(f"{name}: alpha', largest relative error", *slope_error)
    assert slope_error[1] < 1e-5 < 1e-3 < slope_error[0]
    assert alpha_error[1] < 1e-5 < alpha_error[0]


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid-edge-corrected"])
def test_derivative_of_the_sigmoid_fits(golden, name):
    vectors = golden("e_t_operator")
    t = np.float64(vectors["series/t"])
    numeric = np.gradient(np.float64(vectors[f"approx/{name}/alpha"]), t)[1:-1]
    theirs = np.max(numeric / vectors[f"approx/{name}/dalpha"][1:-1])
    operator = operators.by_name(name, 50_257, -3.55, -1.85)
    gamma = jnp.float32(vectors["series/gamma"])
    slopes = jax.vmap(jax.grad(operator.alpha))(gamma)
    ours = np.max(np.abs(slopes / operator.dalpha(gamma)))
    report(f"{name}: true derivative over the one given, largest", theirs, ours)
    assert theirs > 1.3
    np.testing.assert_allclose(slopes / operator.dalpha(gamma), 1.0, rtol=1e-5)


def test_cosine_derivative_and_the_inverses(golden):
    vectors = golden("c_noise")
    t, inner = vectors["t"], vectors["t"] < 0.999
    exact = -0.999 * np.pi / 2 * np.sin(np.pi / 2 * (1 - 0.999 * t))
    theirs = relative(vectors["cosine_eps0.001_dalpha_f64"][inner], exact[inner])
    ours = relative(schedules.cosine().dalpha(np.float32(t))[inner], exact[inner])
    report("cosine: alpha', relative error", theirs, ours)
    assert ours < 2e-5 < 9e-4 < theirs
    levels = vectors["alpha"][(vectors["alpha"] > 2e-3) & (vectors["alpha"] < 1)]
    seen = np.isin(vectors["alpha"], levels)
    theirs = np.max(np.abs(schedules.log_linear().alpha(vectors["loglinear_t_for_alpha_f64"][seen]) - levels))
    ours = np.max(np.abs(schedules.log_linear().alpha(schedules.log_linear().inverse(np.float32(levels))) - levels))
    report("log-linear: alpha(inverse(alpha)) - alpha, largest", theirs, ours)
    assert ours < 1e-6 < 5e-4 < theirs


def test_d3pm_bound(golden):
    vectors = golden("b_losses")
    exact, masked = vectors["d3pm_kl_correct_f64"], vectors["xt_absorb"] == 52
    theirs = relative(vectors["d3pm_nll_f64"][masked], exact[masked])
    arguments = [vectors[name] for name in ("logits", "xt_absorb", "x0", "d3pm_alpha_t")]
    in_float32 = absorbing.d3pm_nelbo(*(jnp.asarray(np.float32(v) if v.dtype == float else v) for v in arguments), 52)
    with jax.enable_x64(True):
        exactly = absorbing.d3pm_nelbo(*map(jnp.asarray, arguments), 52)
        # 1 - alpha is 2/T at the least, of which the rounding of alpha to float32 takes 3e-5: not ours to answer for.
        rounded = absorbing.d3pm_nelbo(
            *(jnp.asarray(np.float64(np.float32(v)) if v.dtype == float else v) for v in arguments), 52
        )
        report("D3PM: relative error of a term, float64", theirs, relative(exactly[masked], exact[masked]))
        report(
            "D3PM: relative error of a term, float32", theirs, relative(in_float32[masked], np.asarray(rounded)[masked])
        )
        assert relative(exactly[masked], exact[masked]) < 1e-8 < 1e-3 < theirs
        assert relative(in_float32[masked], np.asarray(rounded)[masked]) < 1e-4


def test_efficient_curriculum_marginal(golden):
    worst = np.zeros(2)
    draw = jax.jit(duality.tempered_topk, static_argnums=(4, 5))
    for case in json.loads(str(golden("i_curriculum")["stats"])):
        _, _, z_t = draw(jax.random.key(0), jnp.full((100, 1000), 3), case["gamma"], case["tau"], 5, 1000)
        exact = case["exact_pt"]
        gaps = abs(case["P_xt_eq_x0_topk"] - exact), abs(float(np.mean(np.asarray(z_t) == 3)) - exact)
        worst = np.maximum(worst, gaps)
    report("efficient curriculum: P(z_t = x) - P(argmax w_t = x), largest (ours from 100,000 draws)", *worst)
    assert worst[1] < 5 * 0.5 / np.sqrt(100_000) < 0.2 < worst[0]


def test_efficient_curriculum_ids(golden):
    """The reference draws slot j's id below K - k + j, so that slot 0 cannot hold the k largest ids."""
    drawn = golden("i_curriculum")["topk_randint"]  # [k, B, L] for K = 53, k = 5
    assert drawn[0].max() < 53 - 5
    draw = jax.jit(duality.tempered_topk, static_argnums=(4, 5))
    _, ids, _ = draw(jax.random.key(0), jnp.zeros((300, 300), int), 3.0, 1.0, 5, 53)
    share = [float(np.mean(np.asarray(ids[..., slot]) >= 48)) for slot in range(5)]
    report("efficient curriculum: share of the 5 largest ids in slot 0 (5/53 = 0.094 is right)", 0.0, share[0])
    np.testing.assert_allclose(share, 5 / 53, atol=5 * np.sqrt(0.1 / 90_000))
