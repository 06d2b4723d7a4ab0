"""Each algorithm's loss, averaged over its draws, is what its definition says: an integral over times, a sum over states.

A correct loss fails one such test in ten thousand keys; the keys are fixed.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from brute_force import FALSE_ALARM, exact_operator, published_nelbo, uniform_marginal
from scipy import stats

from duo_jax import config as config_lib
from duo_jax import objectives
from duo_jax.models.dit import TIME_FEATURES
from duo_jax.models.network import Network

TEXT = np.array([1, 2])
TOKENS = 3  # which text is made of; absorbing algorithms have the mask beside them
ROWS, KEYS = 2048, 16
D3PM_STEPS = 5
STATES = {k: np.array(list(itertools.product(range(k), repeat=len(TEXT)))) for k in (TOKENS, TOKENS + 1)}


def network(algo, **kwargs):
    vocab = TOKENS if algo in ("duo", "duo_base", "dcd") else TOKENS + 1
    base = Network(
        algo=algo, vocab_size=vocab, mask_id=TOKENS, length=len(TEXT), dim=8, blocks=1, heads=2, cond_dim=8, dropout=0.0,
        eps=0.05, eps_t=0.1, d3pm_steps=D3PM_STEPS, precision="float32",
    )  # fmt: skip
    return dataclasses.replace(base, **kwargs)


def opinionated(net, seed):
    """Weights made not to be zero, such that what is predicted depends much on the tokens and on the noise level."""

    @jax.jit
    def draw(key, another):
        weights = net.init(key)
        leaves, tree = jax.tree.flatten(weights)
        keys = jax.random.split(another, len(leaves))
        near = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
        normal = tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
        # Of the features of the noise level only its own cosine and sine: most others hardly change.
        heard = jnp.zeros((TIME_FEATURES, 1)).at[jnp.array([0, TIME_FEATURES // 2])].set(2.0)
        time_in = {"kernel": heard * normal["time_in"]["kernel"], "bias": normal["time_in"]["bias"]}
        loud = {name: normal[name] for name in ("embed", "time_out", "modulation_final")}
        head = jax.tree.map(lambda x: 0.4 * x, normal["head"])
        return {**tree.unflatten(near), **loud, "time_in": time_in, "head": head}

    return draw(jax.random.key(seed), jax.random.key(seed + 1))


def deaf(weights):
    """The same with blocks that add nothing, so that dropout in them changes nothing."""
    modulation = jax.tree.map(jnp.zeros_like, weights["block_0"]["modulation"])
    return {**weights, "block_0": {**weights["block_0"], "modulation": modulation}}


def predictions(net, weights, sigma):
    """The network's logits `[n, states, L, K]` at all states and each of the noise levels [n], in float64."""
    states = jnp.asarray(STATES[net.vocab_size])

    @jax.jit
    @jax.vmap
    def at(sigma):
        hidden = net.hidden(weights, net.embed(weights, states), jnp.full(len(states), sigma))
        return net.logits(weights, hidden)

    return np.float64(at(jnp.float32(sigma)))


def softmax(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def times(eps_t, n=400):
    """Nodes and weights [n] on [eps_t, 1], denser where little noise makes the integrand steep."""
    v = (np.arange(n) + 0.5) / n
    return eps_t + (1 - eps_t) * v**2, 2 * v / n


def losses(loss_fn, weights, *steps):
    """The losses [KEYS] at each of the steps, each with its own draws, of batches whose last row only fills up."""
    mask = jnp.ones((ROWS + 1, len(TEXT))).at[-1].set(0)
    batch = {"tokens": jnp.broadcast_to(jnp.asarray(TEXT), mask.shape), "mask": mask}
    keys = jax.random.split(jax.random.key(7), (len(steps), KEYS))

    @jax.jit
    def at(args):
        step, keys = args
        return jax.lax.map(lambda key: loss_fn(weights, batch, key, step)[0], keys)

    return np.float64(jax.lax.map(at, (jnp.asarray(steps, jnp.int32), keys)))


def assert_mean(values, want, resolution=0.07):
    assert stats.ttest_1samp(values, want).pvalue > FALSE_ALARM, (values.mean(), want)
    # What the test can tell: five standard errors are no more than this share of the loss.
    assert 5 * values.std(ddof=1) / np.sqrt(KEYS) < resolution * want


def discrete_bound(net, weights):
    """f_Duo of the whole text per token, as printed, for the log-linear schedule of eps."""
    t, weight = times(net.eps_t)
    alpha = 1 - (1 - net.eps) * t
    return uniform_integral(net, weights, alpha, np.full_like(t, -(1 - net.eps)), weight)


def uniform_integral(net, weights, alpha, dalpha, weight):
    z = STATES[TOKENS]
    table = np.stack([[uniform_marginal(a, v, TOKENS) for v in TEXT] for a in alpha])  # [n, L, K]
    q = np.prod([table[:, l, z[:, l]] for l in range(len(TEXT))], axis=0)  # [n, states]
    p = softmax(predictions(net, weights, -np.log(alpha)))
    shape = p.shape[:3]
    levels = (np.broadcast_to(v[:, None, None], shape) for v in (alpha, dalpha))
    f = published_nelbo(p, np.broadcast_to(z, shape), np.broadcast_to(TEXT, shape), *levels)
    return float(np.sum(weight[:, None] * q * f.mean(-1)))


def masked_integral(net, weights):
    """MDLM's, SEDD's and D3PM's bounds per token, from their definitions."""
    z, mask = STATES[TOKENS + 1], TOKENS
    possible = np.all((z == TEXT) | (z == mask), axis=1)
    hidden = z == mask
    if net.algo == "d3pm":
        t, weight = np.arange(1, D3PM_STEPS + 1) / D3PM_STEPS, np.full(D3PM_STEPS, 1 / D3PM_STEPS)
        alpha = 1 - t
    else:
        t, weight = times(net.eps_t)
        alpha = 1 - (1 - net.eps) * t
    q = possible * np.prod(np.where(hidden, 1 - alpha[:, None, None], alpha[:, None, None]), axis=-1)
    sigma = np.zeros_like(t) if net.algo == "mdlm" else -np.log(np.maximum(alpha, net.eps))
    logits = predictions(net, weights, sigma)
    if net.algo == "mdlm":
        p = softmax(logits[..., :mask])
        cost = (1 - net.eps) / (1 - alpha[:, None, None]) * -np.log(p[..., np.arange(len(TEXT)), TEXT])
    elif net.algo == "sedd":
        odds = alpha / (1 - alpha)
        score = np.exp(logits[..., :mask]) * (odds / TOKENS)[:, None, None, None]
        r, own = odds[:, None, None], score[..., np.arange(len(TEXT)), TEXT]
        entropy = score.sum(-1) - r * np.log(own) + r * (np.log(r) - 1)
        cost = (1 - net.eps) / alpha[:, None, None] * entropy
    else:
        cost = np.zeros(logits.shape[:3])
        for n, noise in enumerate(t):
            # One step of the chain, from the posteriors' definition; z_s is x, or still the mask.
            reveal = (1 / D3PM_STEPS) / noise
            p = softmax(logits[n])
            alpha_s, alpha_t = 1 - noise + 1 / D3PM_STEPS, 1 - noise
            joint = p * (alpha_s - alpha_t)  # z_s = j < mask, z_t = mask
            still = p[..., :mask].sum(-1) * (1 - alpha_s) + p[..., mask]
            total = joint[..., :mask].sum(-1) + still
            own = joint[:, np.arange(len(TEXT)), TEXT] / total
            cost[n] = reveal * np.log(reveal / own)
            if reveal < 1 - 1e-9:
                cost[n] += (1 - reveal) * np.log((1 - reveal) / (still / total))
        cost *= D3PM_STEPS
    found = float(np.sum(weight[:, None] * q * (cost * hidden).mean(-1)))
    if net.algo == "d3pm":
        clean = softmax(predictions(net, weights, np.zeros(1)))[0, np.all(z == TEXT, axis=1)][0]
        found -= np.log(clean[np.arange(len(TEXT)), TEXT]).mean()
    return found


@pytest.mark.parametrize("algo", ["duo_base", "mdlm", "sedd", "d3pm"])
def test_the_bound_that_is_evaluated(algo):
    """With a rate of dropout, which must not act."""
    net = network(algo, dropout=0.5)
    # Of moderate scores, whose exponential SEDD's loss is; and all much changed by another noise level.
    weights = opinionated(net, seed=3 if algo == "sedd" else 5)
    want = discrete_bound(net, weights) if algo == "duo_base" else masked_integral(net, weights)
    assert_mean(*losses(objectives.evaluation_loss(net), weights, 0), want)


def settings(algo, **values):
    config = config_lib.default()
    config.algo.name = algo
    config.algo.gamma_min, config.algo.gamma_max = -2.0, 1.0
    config.update_from_flattened_dict(values)
    return config


CURRICULUM = {
    "algo.curriculum.start": 10, "algo.curriculum.end": 30,
    "algo.curriculum.tau_log10_start": 0.4, "algo.curriculum.tau_log10_end": -1.6,
}  # fmt: skip


def test_the_curriculums_limit_is_the_bound_in_gaussian_time():
    """So cold a softmax is the one-hot of z_t: f_Duo at alpha = T(gamma_t), whose derivative in t carries gamma's range."""
    cold = dict.fromkeys(("algo.curriculum.tau_log10_start", "algo.curriculum.tau_log10_end"), -7.0)
    net = network("duo")
    weights = opinionated(net, seed=5)
    t, weight = times(net.eps_t)
    alpha, slope = exact_operator(-2.0 + 3.0 * t, TOKENS)
    want = uniform_integral(net, weights, alpha, 3.0 * slope, weight)
    loss_fn = objectives.training_loss(settings("duo", **cold), net)({})
    assert_mean(*losses(loss_fn, weights, 0), want)


@pytest.mark.parametrize("kind", ["full", "topk"])
def test_the_curriculum_reads_the_relaxed_latent(kind):
    """Against the latent drawn whole: w = a x + s eps, the network reads softmax(w / tau), or its k largest entries."""
    net = network("duo")
    weights = opinionated(net, seed=5)
    config = settings("duo", **CURRICULUM, **{"algo.curriculum.kind": kind, "algo.curriculum.k": 2})
    tau, step, rows = 10 ** (0.4 - 2.0 * 4 / 20), 14, 64
    t, weight = times(net.eps_t, 256)
    gamma = -2.0 + 3.0 * t
    a, s = (np.sqrt(1 / (1 + np.exp(sign * gamma)))[:, None, None, None] for sign in (1, -1))
    alpha, slope = exact_operator(gamma, TOKENS)

    @jax.jit
    def read(mix):
        sigma = jnp.repeat(jnp.float32(-np.log(alpha)), rows)
        return net.logits(weights, net.hidden(weights, mix @ weights["embed"]["embedding"], sigma))

    rng, drawn = np.random.default_rng(0), []
    for _ in range(KEYS):
        w = a * np.eye(TOKENS)[TEXT] + s * rng.normal(size=(len(t), rows, len(TEXT), TOKENS))
        mix = softmax(w / tau)
        if kind == "topk":
            mix = np.where(mix > mix.min(-1, keepdims=True), mix, 0)
        p = softmax(np.float64(read(jnp.float32(mix.reshape(-1, *mix.shape[2:]))))).reshape(mix.shape)
        levels = (np.broadcast_to(v[:, None, None], p.shape[:3]) for v in (alpha, 3.0 * slope))
        f = published_nelbo(p, w.argmax(-1), np.broadcast_to(TEXT, p.shape[:3]), *levels)
        drawn.append(np.sum(weight * f.mean((1, 2))))
    (ours,) = losses(objectives.training_loss(config, net)({}), weights, step)
    drawn = np.float64(drawn)
    assert stats.ttest_ind(ours, drawn, equal_var=False).pvalue > FALSE_ALARM, (ours.mean(), drawn.mean())
    assert 5 * np.hypot(ours.std(ddof=1), drawn.std(ddof=1)) / np.sqrt(KEYS) < 0.07 * drawn.mean()


def test_the_curriculum_is_over_at_its_end():
    net = network("duo")
    weights = opinionated(net, seed=5)
    loss_fn = objectives.training_loss(settings("duo", **CURRICULUM), net)({})
    want = discrete_bound(net, weights)
    before, over = losses(loss_fn, weights, 29, 30)
    assert_mean(over, want)
    assert stats.ttest_1samp(before, want).pvalue < 1e-8


@pytest.mark.parametrize(
    ("values", "step", "dt"),
    [
        ({"algo.distillation.n_steps": 8, "algo.distillation.round_length": 10}, 10, 1 / 4),
        ({"algo.distillation.dt": "linear", "algo.distillation.dt_start": 0.1, "algo.distillation.dt_end": 0.5,
          "train.steps": 100, "algo.distillation.kl": "forward"}, 50, 0.3),
    ],
    ids=["doubling backward", "linear forward"],
)  # fmt: skip
def test_distillation_compares_the_two_ends_of_one_trajectory(values, step, dt):
    """The student at (z_t, t), the teacher at (z_s, s) and without dropout; their pairs by the joint law of an argmax."""
    net = network("dcd", dropout=0.5)
    teacher = opinionated(net, seed=3)
    student = deaf(opinionated(net, seed=9))  # whose dropout changes nothing, while the teacher's would
    drawn, weight = times(net.eps_t)
    t = np.minimum(drawn + dt, 1.0)
    s = np.maximum(t - dt, 0.0)
    (alpha_t, _), (alpha_s, _) = (exact_operator(-2.0 + 3.0 * at, TOKENS) for at in (t, s))
    p = softmax(predictions(net, student, -np.log(alpha_t)))[:, :, None]
    q = softmax(predictions(net, teacher, -np.log(alpha_s)))[:, None]
    if values.get("algo.distillation.kl") == "forward":
        p, q = q, p
    divergence = np.sum(p * np.log(p / q), axis=-1).mean(-1)  # [n, z_t, z_s]

    win_t, win_s = (alpha + (1 - alpha) / TOKENS for alpha in (alpha_t, alpha_s))
    z = STATES[TOKENS]
    joint = np.ones(divergence.shape)
    for l, x in enumerate(TEXT):
        pair = np.zeros((len(t), TOKENS, TOKENS))
        pair[:, x, x] = win_t
        for rival in set(range(TOKENS)) - {x}:
            pair[:, rival, x] = (win_s - win_t) / (TOKENS - 1)
            pair[:, rival, rival] = (1 - win_s) / (TOKENS - 1)
        joint *= pair[:, z[:, l][:, None], z[:, l]]
    want = np.sum(weight[:, None, None] * joint * divergence)
    loss_fn = objectives.training_loss(settings("dcd", **values), net)(teacher)
    assert_mean(*losses(loss_fn, student, step), want)
