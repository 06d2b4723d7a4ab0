"""Settings, time grids and kappas; and the reference's step probabilities."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import config as config_lib
from duo_jax import sampling
from duo_jax.diffusion import absorbing, categorical, schedules
from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.sampling import engine
from duo_jax.sampling.settings import kappa, parse_mode

RESCALED = "max-rescale"


def test_times_and_kappas_equal_the_references(golden):
    data = golden("g_schedules")
    compared = 0
    for case in json.loads(str(data["info"])):
        modes = {part: case[f"{part}_mode"] for part in ("high", "middle", "low")}
        fractions = {name: case[name] for name in ("high_frac", "middle_frac", "time_profile")}
        psi = sampling.Psi(**modes, **fractions)
        schedule = schedules.log_linear() if case["noise"] == "loglinear" else schedules.cosine()
        n = case["num_steps"]
        times = psi.times(n, schedule)
        # The reference's inverse leaves eps out, which moves a level given as an alpha by up to 0.1%.
        np.testing.assert_allclose(times, data[f"{case['key']}/timesteps"], atol=1e-6, rtol=1.1e-3)
        alpha_t = schedule.alpha(jnp.float32(data[f"{case['key']}/timesteps"]))
        kappas = np.asarray(psi.kappas(alpha_t, jnp.append(alpha_t[1:], 1.0)))
        # Wrong in the reference: max-rescale (eta twice), and the last kappa of each segment.
        ends = np.cumsum(psi.segments(n)) - 1
        names = np.repeat(list(modes.values()), psi.segments(n))
        right = ~np.char.startswith(names, RESCALED) & ~np.isin(np.arange(n + 1), ends)
        expected = data[f"{case['key']}/kappas"]
        # 1 - alpha near t = 1e-5 holds few of float32's digits.
        np.testing.assert_allclose(kappas[right], expected[right], atol=2e-4)
        compared += right.sum()
    assert compared > 5_000


def test_the_kappa_modes():
    alpha_t, alpha_s = jnp.array([0.1, 0.5, 0.98]), jnp.array([0.2, 0.6, 0.99])
    noise, cap = 1 - alpha_s, (1 - alpha_s) / alpha_t
    for mode, sigma in (
        ("constant-remdm-0.05", 0.05),
        ("max-capped-0.05", np.minimum(0.05, cap)),
        ("max-rescale-0.05", 0.05 * np.minimum(1, cap)),
        ("max-rescale-1e-3", 1e-3 * np.minimum(1, cap)),
        ("pure-posterior", 0.0),
        ("constant-0.3", 0.7 * noise),
        ("pure-pc", noise),
    ):
        expected = np.clip(1 - sigma / noise, 0, 1)
        np.testing.assert_allclose(kappa(mode, alpha_t, alpha_s), expected, rtol=1e-5, err_msg=mode)
    assert parse_mode("constant-remdm-0.5") == ("constant-remdm", 0.5)
    # The noise removal is the same with any kappa, but must not be NaN.
    assert float(kappa("max-capped-0.05", jnp.float32(0.99), jnp.float32(1.0))) == 1


@pytest.fixture(scope="module")
def reference(golden):
    """Returns `logits(ids, sigma)` of the reference's network, and the vectors of its samplers."""
    from duo_jax import convert
    from duo_jax.models.dit import DiT

    vectors = golden("a_dit")
    weights = convert.from_torch({k[3:]: v for k, v in vectors.items() if k.startswith("sd/")})
    dim = vectors["sd/vocab_embed.embedding"].shape[1]
    heads = dim // vectors["rot_cos"].shape[1]
    blocks = 1 + max(int(k.split(".")[1]) for k in vectors if k.startswith("sd/blocks."))
    cond_dim = vectors["sd/sigma_map.mlp.0.bias"].shape[0]
    net = DiT(vocab_size=53, dim=dim, blocks=blocks, heads=heads, cond_dim=cond_dim, attention="xla")
    return jax.jit(lambda ids, sigma: net.apply({"params": weights}, ids, sigma)), golden("d_samplers")


def states(data, name):
    """Yields (z_t, q) of each call."""
    z = np.concatenate([data[f"{name}/x_init"][None], data[f"{name}/x"]])
    for z_t, q in zip(z, data[f"{name}/q"], strict=False):
        q = np.maximum(q, 0)
        yield jnp.asarray(z_t, jnp.int32), q / q.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("duo_ancestral", {}),
        ("duo_ancestral_f32_greedy", {"noise_removal": "greedy"}),
        (
            "duo_psi_p0.9",
            {
                "sampler": "psi",
                "nucleus": True,
                "psi": sampling.Psi("constant-0.3", "max-rescale-0.05", "pure-posterior", 0.3, 0.4),
            },
        ),
        ("mdlm_ancestral_cache", {"process": "absorbing", "mask_id": 52, "sampler": "ancestral_cache"}),
        (
            "mdlm_psi",
            {"process": "absorbing", "mask_id": 52, "sampler": "psi", "psi": sampling.Psi.throughout("max-capped-0.1")},
        ),
    ],
)
def test_step_probabilities_equal_the_references(reference, name, settings):
    logits, data = reference
    chosen = sampling.Settings(4, **settings)
    grid = engine.steps(chosen)
    if name == "duo_psi_p0.9":
        # What the reference gets wrong, put in: eta twice in max-rescale, and 1 at the end of its segment.
        wrong = 1 - 0.05 * min(0.05, float((1 - grid.alpha_s[2]) / grid.alpha_t[2])) / (1 - grid.alpha_s[2])
        right = np.asarray(grid.kappa)
        assert 0 < right[2] < wrong
        assert 0 < right[3] < 1
        grid = grid.replace(kappa=grid.kappa.at[2].set(wrong).at[3].set(1.0))
    n_calls = 0
    for i, (z_t, q) in enumerate(states(data, name)):
        step = jax.tree.map(lambda x, i=i: x[i], grid)
        told = 0.0 if name.startswith("mdlm") else schedules.sigma(step.alpha_t)
        shaped = engine._shape(logits(z_t, jnp.full(2, told)), chosen, engine.Knobs(top_p=0.9))
        mine = np.exp(engine._log_table(shaped, z_t, step, chosen.__class__(4, **settings | {"noise_removal": "none"})))
        np.testing.assert_allclose(mine, q, atol=3e-6, err_msg=f"call {i}")
        n_calls += 1
    assert n_calls == (4 if "greedy" in name else 5)
    if "greedy" in name:
        z_t = jnp.asarray(data[f"{name}/x"][-1], jnp.int32)
        step = jax.tree.map(lambda x: x[-1], grid)
        top = jnp.argmax(logits(z_t, jnp.full(2, schedules.sigma(step.alpha_t))), -1)
        np.testing.assert_array_equal(top, data[f"{name}/out"])


def test_sedd_probabilities_equal_the_references(reference):
    logits, data = reference
    grid = engine.steps(sampling.Settings(4))
    for i, (z_t, q) in enumerate(states(data, "sedd_analytic")):
        step = jax.tree.map(lambda x, i=i: x[i], grid)
        sigma = schedules.sigma(step.alpha_t)
        score = absorbing.sedd_log_score(logits(z_t, jnp.full(2, sigma)), z_t, step.alpha_t)
        mine = absorbing.sedd_probabilities(score, z_t, sigma - schedules.sigma(step.alpha_s), 52)
        np.testing.assert_allclose(mine, q, atol=2.5e-6, err_msg=f"call {i}")


@pytest.mark.parametrize("weight", ["0.5", "2.0"])
@pytest.mark.parametrize("top_p", ["1.0", "0.9"])
def test_guided_posteriors_equal_the_references(golden, weight, top_p):
    data = golden("d_posteriors")
    settings = sampling.Settings(4, guided=True)
    alphas = {"alpha_t": jnp.asarray(data["alpha_t"]), "alpha_s": jnp.asarray(data["alpha_s"])}
    compared = 0
    # Row by row: an engine's step has one signal level.
    for b in range(4):
        step = engine.Step(None, alphas["alpha_t"][b, 0], alphas["alpha_s"][b, 0], jnp.ones(()), False)
        tables = [
            engine._log_table(
                categorical.nucleus(jnp.float32(data[f"guided_logp_{which}"][b]), float(top_p)),
                jnp.asarray(data["xt"][b], jnp.int32),
                step,
                settings,
            )
            for which in ("cond", "uncond")
        ]
        mixed = jax.nn.softmax(engine._guide(*tables, float(weight)), axis=-1)
        expected = data[f"guided_posterior_g{weight}_p{top_p}"][b]
        if data["alpha_s"][b, 0] < 1 or top_p == "1.0":
            np.testing.assert_allclose(mixed, expected, atol=2e-6)
            compared += 1
        else:
            # Tokens that only the unconditional nucleus leaves out have infinite weight in the reference: NaN.
            assert np.isfinite(mixed).all()
    assert compared >= 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 0}, "at least 1 step"),
        ({"sampler": "magic"}, "choose one of ancestral, psi"),
        ({"noise_removal": "yes"}, "choose one of ancestral, greedy, none"),
        ({"top_p": 0.0}, "in \\(0, 1\\]"),
        ({"top_p": 1.5}, "in \\(0, 1\\]"),
        ({"temperature": 0.0}, "at least 0.001"),
        ({"temperature": 9e-4}, "at least 0.001"),
        ({"sampler": "autoregressive"}, "does not fit a network of the uniform process"),
        ({"sampler": "ancestral_cache"}, "does not fit a network of the uniform process"),
        ({"process": "absorbing"}, "needs mask_id"),
        ({"process": "absorbing", "mask_id": 2, "sampler": "analytic"}, "needs log-scores"),
        ({"process": "absorbing", "mask_id": 2, "early_stop": 3}, "is for uniform-state networks"),
        ({"process": "autoregressive"}, "has no denoiser"),
        ({"early_stop": -1}, "early_stop is -1"),
        ({"psi": "constant-0.9"}, "psi was given, but the sampler is 'ancestral'"),
        ({"sampler": "psi", "psi": "constant"}, "constant needs a number"),
        ({"sampler": "psi", "psi": "pure-pc-0.5"}, "takes no number"),
        ({"sampler": "psi", "psi": "wild-0.5"}, "choose one of pure-posterior"),
        ({"sampler": "psi", "psi": "constant0.9"}, "choose one of pure-posterior"),
        ({"sampler": "psi", "psi": "constant-1.5"}, "in \\[0, 1\\]"),
        ({"sampler": "psi", "psi": "constant--0.5"}, "in \\[0, 1\\]"),
        ({"tokens": [1]}, "belong together"),
        ({"guidance": 2.0}, "give it as unconditional_fn"),
        ({"score": True}, "are for the absorbing process"),
        ({"temperature": np.inf}, "a finite number of at least 0.001"),
        ({"n_steps": 1.5}, "n_steps is 1.5; it must be a whole number"),
        ({"schedule": "log_linear"}, "schedule is 'log_linear'; give one of duo_jax.diffusion.schedules"),
        ({}, r"the denoiser returns \(1, 1\); \(B, L, K\) is \(1, 1, 3\)"),
        ({"shape": (5,)}, r"shape is \(5,\); give \(B, L\)"),
        ({"shape": (0, 1)}, r"shape is \(0, 1\); give \(B, L\), both at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(kwargs, message):
    settings = {"n_steps": 2, "schedule": schedules.log_linear(), "shape": (1, 1)} | kwargs
    with pytest.raises(UserError, match=message) as error:
        sampling.generate(lambda z, s: z, jax.random.key(0), vocab_size=3, **settings)
    assert "\n" not in str(error.value)


def test_grids_that_cannot_be_are_refused():
    for fractions in ((0.7, 0.7), (-0.1, 0.5), (0.5, -0.1)):
        with pytest.raises(UserError, match="neither may be negative"):
            sampling.Psi(high_frac=fractions[0], middle_frac=fractions[1])
    with pytest.raises(UserError, match="time_profile is 'linear-constant-linear-2'"):
        sampling.Psi(time_profile="linear-constant-linear-2")
    with pytest.raises(UserError, match="outside \\(1e-5, 1\\)"):
        sampling.Settings(9, sampler="psi", psi=sampling.Psi(time_profile="linear-constant-linear-0.0005-inv"))
    for high, middle in ((0.0, 0.0), (0.0, 0.5), (0.5, 0.5)):
        late = sampling.Psi(high_frac=high, middle_frac=middle, time_profile="linear-constant-linear-0.9")
        with pytest.raises(UserError, match="needs steps before and after"):
            sampling.Settings(3, sampler="psi", psi=late)


def test_segments_share_all_times():
    """Also where two halves of an odd number are both rounded up."""
    halves = sampling.Psi("pure-pc", "pure-posterior", "pure-pc", 0.5, 0.5)
    assert halves.segments(2) == (2, 1, 0)
    alpha = jnp.array([0.1, 0.5, 0.9])
    np.testing.assert_array_equal(halves.kappas(alpha, jnp.append(alpha[1:], 1.0)), [0, 0, 1])


@pytest.mark.parametrize(
    ("algo", "schedule", "expected"),
    [
        ("mdlm", "log_linear", schedules.log_linear(0.02)),
        ("duo", "cosine", schedules.cosine(0.02)),
        ("d3pm", "log_linear", schedules.log_linear(0.0)),  # its chain ends in nothing but masks
    ],
)
def test_a_network_is_sampled_with_the_schedule_that_it_was_trained_with(algo, schedule, expected):
    network = Network(algo, 5, 4, 8, 16, 1, 2, 8, 0.0, schedule=schedule, eps=0.02)
    assert sampling.Settings.for_network(network, 4).schedule == expected


def test_all_that_a_config_says_reaches_the_sampler():
    config = config_lib.default()
    asked = {
        "n_steps": 7,
        "sampler": "psi",
        "noise_removal": "greedy",
        "top_p": 0.9,
        "early_stop": 3,
        "psi.low": "pure-pc",
    }
    config.sample.update_from_flattened_dict(asked)
    network = Network("duo", 5, 4, 8, 16, 1, 2, 8, 0.0)
    usual = sampling.Settings.from_config(config_lib.default().sample, network)
    assert not usual.nucleus, "a top_p of 1 sorts no probabilities"
    found = sampling.Settings.from_config(config.sample, network)
    assert (found.n_steps, found.sampler, found.noise_removal, found.nucleus) == (7, "psi", "greedy", True)
    assert (found.early_stop, found.psi) == (3, sampling.Psi(low="pure-pc"))


def test_unigram_entropy(golden):
    data = golden("l_metrics")
    np.testing.assert_allclose(sampling.unigram_entropy(data["tokens"]), data["entropy_each"], rtol=1e-6)
