"""With the exact denoiser of a known joint, every sampler's texts follow that joint: chi-square at FALSE_ALARM."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from known_joint import (
    FALSE_ALARM,
    distance,
    given_revealed,
    leave_one_out,
    p_value,
    random_joint,
    score_given_revealed,
)
from scipy import stats

from duo_jax import sampling
from duo_jax.diffusion import schedules
from duo_jax.diffusion.arrays import numbered_keys
from duo_jax.errors import UserError
from duo_jax.sampling import engine

SCHEDULE = schedules.log_linear()
UNIFORM = [{}, {"sampler": "psi"}, {"sampler": "psi", "psi": "constant-0.5"}, {"sampler": "psi", "psi": "pure-pc"}]
ABSORBING = [
    {},
    {"sampler": "ancestral_cache"},
    {"sampler": "psi", "psi": "constant-remdm-0.1"},
    {"sampler": "psi", "psi": "max-rescale-0.3"},
    {"sampler": "analytic", "score": True},
    {"sampler": "ancestral", "score": True},
]


def name(case):
    return "-".join(str(value) for value in case.values()) or "ancestral"


def uniform(joint, key, rows, n_steps, **settings):
    settings = {"schedule": SCHEDULE} | settings
    shape = (rows, joint.ndim)
    walk = lambda key: sampling.walk(leave_one_out(joint), key, shape, joint.shape[0], n_steps=n_steps, **settings)  # noqa: E731
    return jax.jit(walk)(jax.random.key(key))


def absorbing(joint, key, rows, n_steps, **settings):
    denoise = (score_given_revealed if settings.get("score") else given_revealed)(joint)
    vocab = joint.shape[0]
    settings = {"schedule": SCHEDULE, "process": "absorbing", "mask_id": vocab} | settings
    walk = lambda key: sampling.walk(denoise, key, (rows, joint.ndim), vocab + 1, n_steps=n_steps, **settings)  # noqa: E731
    return jax.jit(walk)(jax.random.key(key))


@pytest.mark.parametrize("case", UNIFORM, ids=name)
@pytest.mark.parametrize("n_steps", [1, 6])
def test_one_uniform_position_is_exact_with_any_number_of_steps(case, n_steps):
    joint = random_joint(5, 1, seed=n_steps)
    schedule = schedules.cosine() if n_steps == 1 else SCHEDULE
    result = uniform(joint, 0, 20_000, n_steps, schedule=schedule, **case)
    assert result.tokens.dtype == jnp.int32
    assert int(result.network_calls) == n_steps + 1
    assert p_value(result.tokens, joint) > FALSE_ALARM


@pytest.mark.parametrize("case", ABSORBING, ids=name)
@pytest.mark.parametrize("n_steps", [1, 6])
def test_one_masked_position_is_exact_with_any_number_of_steps(case, n_steps):
    joint = random_joint(6, 1, seed=n_steps)
    assert p_value(absorbing(joint, 0, 20_000, n_steps, **case).tokens, joint) > FALSE_ALARM


@pytest.mark.parametrize("case", UNIFORM, ids=name)
def test_several_uniform_positions_are_exact_with_many_steps(case):
    joint = random_joint(3, 2, seed=1)
    assert p_value(uniform(joint, 1, 3_000, 200, **case).tokens, joint) > FALSE_ALARM
    # One step draws the positions independently: the test can fail.
    assert p_value(uniform(joint, 1, 3_000, 1, **case).tokens, joint) < 1e-12


@pytest.mark.parametrize("case", ABSORBING, ids=name)
def test_several_masked_positions_are_exact_with_many_steps(case):
    joint = random_joint(3, 3, seed=2)
    assert p_value(absorbing(joint, 1, 5_000, 150, **case).tokens, joint) > FALSE_ALARM


def test_one_step_is_not_enough_for_several_masked_positions():
    joint = random_joint(3, 3, seed=2)
    assert p_value(absorbing(joint, 1, 5_000, 1).tokens, joint) < 1e-12


@pytest.mark.parametrize("case", ABSORBING, ids=name)
def test_held_tokens_of_masked_texts_condition_the_rest_exactly(case):
    joint = random_joint(3, 3, seed=3)
    tokens = absorbing(joint, 2, 4_000, 150, tokens=[0, 2, 0], held=[False, True, False], **case).tokens
    assert (np.asarray(tokens)[:, 1] == 2).all()
    exact = joint[:, 2] / joint[:, 2].sum()
    assert p_value(tokens[:, [0, 2]], exact) > FALSE_ALARM
    assert p_value(tokens[:, [0, 2]], joint.sum(1)) < 1e-12  # not the unconditional one


@pytest.mark.usefixtures("optimized")
def test_held_tokens_of_uniform_texts_condition_the_rest_exactly_in_the_limit_of_psi_steps():
    joint = random_joint(3, 2, seed=1)
    exact = joint[:, 0] / joint[:, 0].sum()

    def sample(n_steps, **settings):
        tokens = uniform(joint, 3, 1_500, n_steps, tokens=[0, 0], held=[False, True], **settings).tokens
        assert (np.asarray(tokens)[:, 1] == 0).all()
        return tokens[:, :1]

    psi = {"sampler": "psi", "psi": "pure-pc"}
    assert p_value(sample(1_600, **psi), exact) > FALSE_ALARM
    # The error shrinks as the square root of the number of steps; the ancestral sampler's stays (docs/sampling.md).
    assert distance(sample(50, **psi), exact) > 0.03
    assert 0.05 < distance(sample(400), exact) < 0.16
    unconditional = distance(np.repeat([[0], [1], [2]], np.round(1_500 * joint.sum(1)).astype(int), axis=0), exact)
    assert unconditional > 0.3


def test_the_noise_removal_options():
    joint = np.array([0.1, 0.2, 0.7])
    assert (np.asarray(uniform(joint, 2, 2_000, 3, noise_removal="greedy").tokens) == 2).all()
    assert (np.asarray(absorbing(joint, 2, 2_000, 1, noise_removal="greedy").tokens) < 3).all()
    # At t = 1e-5 there is next to no noise to remove.
    assert p_value(uniform(joint, 2, 20_000, 3, noise_removal="none").tokens, joint) > FALSE_ALARM
    assert int(uniform(joint, 2, 4, 3, noise_removal="none").network_calls) == 3


def test_the_greedy_tail_is_deterministic_given_z():
    joint = random_joint(4, 2, seed=5)
    result = uniform(joint, 4, 500, 5, noise_removal="greedy", trajectory=True)
    assert result.trajectory.shape == (6, 500, 2)
    np.testing.assert_array_equal(result.trajectory[-1], result.tokens)
    sigma = jnp.full(500, schedules.sigma(SCHEDULE.alpha(1e-5)))
    top = jnp.argmax(leave_one_out(joint)(result.trajectory[-2], sigma), -1)
    np.testing.assert_array_equal(result.tokens, top)


@pytest.mark.parametrize("top_p", [0.6, 0.85])
def test_nucleus(top_p):
    joint = np.array([0.05, 0.15, 0.3, 0.5])
    counts = np.bincount(np.asarray(uniform(joint, 3, 20_000, 4, top_p=top_p).tokens)[:, 0], minlength=4)
    order = np.argsort(-joint)
    kept = order[np.cumsum(joint[order]) - joint[order] <= top_p]
    cut = np.setdiff1d(range(4), kept)
    # The prior's tokens survive the walk only where no call has replaced them.
    assert counts[cut].sum() < 20
    expected = joint[kept] / joint[kept].sum() * counts[kept].sum()
    assert stats.chisquare(counts[kept], expected).pvalue > FALSE_ALARM


@pytest.mark.parametrize("sample", [uniform, absorbing])
def test_temperature_sharpens_p(sample):
    joint = np.array([0.05, 0.15, 0.3, 0.5])
    sharper = joint**2 / (joint**2).sum()
    assert p_value(sample(joint, 4, 20_000, 3, temperature=0.5).tokens, sharper) > FALSE_ALARM


def test_temperature_does_not_change_how_much_a_score_reveals():
    joint = np.array([0.05, 0.15, 0.3, 0.5])
    settings = {"sampler": "analytic", "score": True, "noise_removal": "none", "trajectory": True}
    cold, warm = (absorbing(joint, 5, 20_000, 4, temperature=t, **settings).trajectory for t in (0.5, 1.0))
    for step in range(3):
        shares = [(np.asarray(z[step]) == 4).mean() for z in (cold, warm)]
        expected = 1 - float(SCHEDULE.alpha(1 - (step + 1) / 4))
        np.testing.assert_allclose(shares, expected, atol=5 * 0.5 / np.sqrt(20_000))


def test_cached_predictions_give_the_same_texts_with_fewer_calls():
    joint = random_joint(3, 3, seed=6)
    plain = absorbing(joint, 6, 8, 60, trajectory=True)
    cached = absorbing(joint, 6, 8, 60, sampler="ancestral_cache", trajectory=True)
    np.testing.assert_array_equal(plain.trajectory, cached.trajectory)
    z = np.asarray(plain.trajectory)
    before = np.concatenate([np.full_like(z[:1], 3), z[:-1]])
    assert int(plain.network_calls) == 61
    assert int(cached.network_calls) == (z != before).any((1, 2)).sum() <= 24


def test_guidance_cannot_skip_calls():
    joint = random_joint(3, 2, seed=6)
    with pytest.raises(UserError, match="ancestral_cache does not draw from"):
        absorbing(joint, 6, 8, 60, sampler="ancestral_cache", unconditional_fn=given_revealed(joint), guidance=2.0)


def test_skipped_calls_do_not_happen():
    joint, seen = random_joint(3, 2, seed=6), []
    denoise = given_revealed(joint)

    def counting(z_t, sigma):
        jax.debug.callback(lambda: seen.append(1))
        return denoise(z_t, sigma)

    result = sampling.walk(
        counting, jax.random.key(0), (2, 2), 4, schedule=SCHEDULE, n_steps=40, process="absorbing", mask_id=3,
        sampler="ancestral_cache",
    )  # fmt: skip
    jax.block_until_ready(result.tokens)
    jax.effects_barrier()
    assert len(seen) == int(result.network_calls) <= 4


def test_early_stopping_leaves_out_calls_and_freezes_rows():
    joint = np.array([0.02, 0.02, 0.96])
    result = uniform(joint, 7, 16, 200, early_stop=10, trajectory=True)
    z = np.asarray(result.trajectory)[:, :, 0]
    assert int(result.network_calls) < 201
    changes = z[1:] != z[:-1]
    for row in range(16):
        quiet = 0
        for step in range(len(changes) - 1):  # the noise removal comes for all
            assert not (quiet >= 10 and changes[step, row])
            quiet = 0 if changes[step, row] else quiet + 1
    assert int(uniform(joint, 7, 16, 200).network_calls) == 201


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("sample", [uniform, absorbing])
def test_guidance_of_one_step(sample, weight):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])

    def posterior(p):
        # q(z_s | z_1 = i) for the step from t = 1 to 1e-5, i along the first axis; masks know no i.
        if sample is absorbing:
            return p[None]
        alpha_s, alpha_t = (float(SCHEDULE.alpha(t)) for t in (1e-5, 1.0))
        a = alpha_t / alpha_s
        table = (a * np.eye(3) + (1 - a) / 3) * (alpha_s * p + (1 - alpha_s) / 3)
        return table / table.sum(1, keepdims=True)

    mixed = posterior(p) ** weight * posterior(q) ** (1 - weight)
    exact = (mixed / mixed.sum(1, keepdims=True)).mean(0)
    second = (leave_one_out if sample is uniform else given_revealed)(q)
    # The second call, at t = 1e-5, changes next to nothing.
    result = sample(p, 8, 20_000, 1, unconditional_fn=second, guidance=weight)
    assert int(result.network_calls) == 4
    assert p_value(result.tokens, exact) > FALSE_ALARM


def test_a_process_that_computes_in_float64_samples_too():
    log_p = jnp.log(jnp.asarray([0.5, 0.3, 0.2]))
    with jax.enable_x64(True):
        tokens = sampling.generate(
            lambda z, sigma: jnp.broadcast_to(log_p, (*z.shape, 3)), jax.random.key(0), (4, 5), 3,
            schedule=schedules.log_linear(), n_steps=3,
        )  # fmt: skip
    assert tokens.dtype == jnp.int32


@pytest.mark.parametrize(("weight", "best"), [(2.0, 0), (-1.0, 2)])
@pytest.mark.parametrize("sample", [uniform, absorbing])
def test_a_guided_text_ends_in_the_most_probable_tokens_of_the_mixture(sample, weight, best):
    """Of p^g q^(1-g) itself, whatever token the walk has come to."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    second = (leave_one_out if sample is uniform else given_revealed)(q)
    settings = {"unconditional_fn": second, "guidance": weight, "noise_removal": "greedy", "trajectory": True}
    z = np.asarray(sample(p, 9, 500, 2, **settings).trajectory)
    assert len(np.unique(z[-2])) > 1
    if sample is uniform:
        assert (z[-1] == best).all()
    else:  # what is revealed stays
        assert (z[-1] == np.where(z[-2] == 3, best, z[-2])).all()


def test_the_unconditional_text_goes_its_own_way_only_where_the_prompt_is():
    """Under guidance both networks read one text, but for the places that only the prompt holds."""
    rows, vocab, n_steps = 64, 4, 20
    certain = {name: 30.0 * jax.nn.one_hot(token, vocab) for name, token in (("conditional", 0), ("free", 1))}
    seen = []

    def denoise(states, sigma, visitor, needs_prediction, *per_token):
        jax.debug.callback(lambda *z: seen.append([np.asarray(x) for x in z]), *states, ordered=True)
        logits = tuple(jnp.broadcast_to(values, (rows, 3, vocab)) for values in certain.values())
        return visitor(logits, *per_token)

    def known(tokens, held):
        return engine.Given(jnp.tile(jnp.array(tokens), (rows, 1)), jnp.tile(jnp.array(held), (rows, 1)))

    # The prompt holds the first place, both texts hold the last one.
    given, free = known([2, 0, 3], [True, False, True]), known([0, 0, 3], [False, False, True])
    settings = sampling.Settings(n_steps, guided=True)
    walk = engine.run(
        denoise, numbered_keys(jax.random.key(0), rows), given, vocab, settings, sampling.Knobs(guidance=1.0), free
    )
    jax.block_until_ready(walk.tokens)
    jax.effects_barrier()
    prompted, unprompted = (np.stack(z) for z in zip(*seen, strict=True))
    assert len(prompted) == n_steps + 1
    np.testing.assert_array_equal(prompted[..., 1:], unprompted[..., 1:])
    assert (prompted[..., 0] == 2).all()
    assert (prompted[..., 2] == 3).all()
    # It starts from noise there, too, and ends at what the unconditional network says.
    assert set(np.unique(unprompted[0, :, 0])) == set(range(vocab))
    assert (unprompted[-1, :, 0] == 1).mean() > 0.9
    assert (walk.tokens[:, 1] == 0).all()
    assert int(walk.predictions) == 2 * rows * 3 * (n_steps + 1)
