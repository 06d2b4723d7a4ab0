"""The likelihood of a text's end given its beginning, against brute force."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.diffusion import absorbing, schedules, uniform
from duo_jax.evaluation import likelihood
from duo_jax.models.network import Network

VOCAB = 5
TEXT = np.array([1, 3, 0, 2])


def network(algo):
    return Network(
        algo=algo, vocab_size=VOCAB, mask_id=VOCAB - 1, length=8, dim=16, blocks=1, heads=2, cond_dim=8, dropout=0.0,
        precision="float32",
    )  # fmt: skip


def opinionated(net, seed=0):
    """Weights that are zero at the start, made not to be: the network says something, and what depends on all it reads."""
    leaves, tree = jax.tree.flatten(net.init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def attentive(weights):
    """The same with a block that says more, so that what is predicted depends much on the other tokens."""
    return {**weights, "block_0": jax.tree.map(lambda x: 3 * x, weights["block_0"])}


def predicted(net, weights, row):
    """The logits `[L, K]` of a network that is told no noise."""
    z = jnp.asarray([row])
    return net.logits(weights, net.hidden(weights, net.embed(weights, z), jnp.zeros(1)))[0]


def nats(net, weights, first, n_samples, *, filled=0, key=0):
    tokens = np.concatenate([TEXT, np.full(filled, 2)]).astype(np.int32)
    found = likelihood.continuation(
        weights, tokens, first, len(TEXT), jax.random.key(key), network=net, n_samples=n_samples
    )
    return float(found[0]), bool(found[1])


@pytest.mark.parametrize("first", [2, 3])
def test_the_bound_of_uniform_states_equals_the_integral_over_times_and_states(first):
    net = network("duo_base")
    weights = opinionated(net, seed=3)  # one for which the ends are neither certain nor absurd
    ends = np.array(list(itertools.product(range(VOCAB), repeat=len(TEXT) - first)))
    z_t = jnp.asarray(np.hstack([np.tile(TEXT[:first], (len(ends), 1)), ends]))
    x = jnp.broadcast_to(TEXT, z_t.shape)
    schedule = schedules.by_name(net.schedule, net.eps)

    def at(t):
        """The mean over z_t of the ends' loss at one time; q(z_t | x) of each is alpha [z = x] + (1 - alpha) / K."""
        alpha, dalpha = schedule.alpha(t), schedule.dalpha(t)
        q = jnp.prod((alpha * (z_t == x) + (1 - alpha) / VOCAB)[:, first:], axis=1)
        sigma = jnp.full(len(ends), schedules.sigma(alpha))
        logits = net.logits(weights, net.hidden(weights, net.embed(weights, z_t), sigma))
        loss = uniform.nelbo(jax.nn.log_softmax(logits), z_t, x, alpha, dalpha)
        return jnp.sum(q[:, None] * loss * (jnp.arange(len(TEXT)) >= first))

    times = net.eps_t + (1 - net.eps_t) * (np.arange(2048) + 0.5) / 2048
    want = float(jnp.mean(jax.lax.map(at, jnp.asarray(times))))
    got = [nats(net, weights, first, 2048, key=key)[0] for key in range(8)]
    # Eight independent estimates: a deviation of five standard errors has a probability below 1e-3 with seven degrees.
    assert abs(np.mean(got) - want) < 5.4 * np.std(got, ddof=1) / np.sqrt(len(got))
    assert np.std(got, ddof=1) < 0.1 * want  # or the test could not tell much


@pytest.mark.parametrize("algo", ["mdlm", "d3pm"])
def test_the_bound_of_a_single_masked_token_is_its_cross_entropy(algo):
    # One token is masked or not, no more: the bound of a network that does not read the time is exact.
    net = network(algo)
    weights = attentive(opinionated(net, seed=4))  # which would say something else, saw it what fills the row up
    for name in ("time_in", "time_out"):
        weights[name] = jax.tree.map(jnp.zeros_like, weights[name])
    z_t = jnp.asarray([[*TEXT[:3], net.mask_id]])
    logits = net.logits(weights, net.hidden(weights, net.embed(weights, z_t), jnp.zeros(1)))
    want = -float(absorbing.subs(logits, z_t, net.mask_id)[0, 3, TEXT[3]])
    # What fills the row up is not seen, and costs nothing.
    got = [nats(net, weights, 3, 2048, key=key, filled=3)[0] for key in range(8)]
    if algo == "d3pm":  # its reconstruction term is that of the whole clean token
        clean = net.logits(weights, net.hidden(weights, net.embed(weights, jnp.asarray(TEXT[None])), jnp.zeros(1)))
        want -= float(jax.nn.log_softmax(clean)[0, 3, TEXT[3]])
    assert abs(np.mean(got) - want) < 5.4 * np.std(got, ddof=1) / np.sqrt(len(got))
    assert np.std(got, ddof=1) < 0.12 * want


def test_an_autoregressive_networks_is_exact():
    net = network("ar")
    weights = opinionated(net)
    logits = net.logits(weights, net.hidden(weights, net.embed(weights, jnp.asarray(TEXT[None])), None))[0]
    log_p = jax.nn.log_softmax(logits.at[:, net.mask_id].set(-jnp.inf))
    want = -sum(float(log_p[i - 1, TEXT[i]]) for i in (2, 3))
    assert nats(net, weights, 2, 32)[0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("algo", ["duo_base", "mdlm", "ar"])
def test_what_fills_a_row_up_is_not_seen(algo):
    net = network(algo)
    weights = opinionated(net)
    hidden = net.hidden(weights, net.embed(weights, jnp.asarray(TEXT[None])), jnp.ones(1))
    for rest in ([0, 0], [4, 3]):
        filled = jnp.asarray([[*TEXT, *rest]])
        got = net.hidden(weights, net.embed(weights, filled), jnp.ones(1), lengths=jnp.asarray([len(TEXT)]))
        np.testing.assert_allclose(got[:, : len(TEXT)], hidden, rtol=1e-5, atol=1e-5)
    unaware = net.hidden(weights, net.embed(weights, filled), jnp.ones(1))
    changed = float(jnp.max(jnp.abs(unaware[:, : len(TEXT)] - hidden)))
    assert changed < 1e-5 if algo == "ar" else changed > 0.01


@pytest.mark.parametrize("algo", ["duo_base", "mdlm", "sedd", "ar"])
def test_a_greedy_step_writes_what_the_network_holds_most_probable(algo):
    net = network(algo)
    weights = net.init(jax.random.key(0))  # its head is zero: every prediction is that of the bias
    bias = jnp.asarray([0.0, 0.0, 3.0, 0.0, 9.0 if algo != "duo_base" else 0.0])  # the mask is no text
    weights["head"] = {**weights["head"], "bias": bias}
    assert nats(net, weights, 3, 1, filled=2)[1]
    assert not nats(net, weights, 2, 1, filled=2)[1]


def test_a_greedy_step_predicts_a_masked_end_from_the_beginning_alone():
    """The end is judged by what the network says where masks stand in its place, whatever fills the row up."""
    net = network("mdlm")
    mask = net.mask_id
    found, misled = set(), 0
    for seed in range(4):
        weights = attentive(opinionated(net, seed=seed))
        text = TEXT.copy()
        best, other = (
            np.asarray(predicted(net, weights, [*text[:2], mask, mask, *rest])[:4, :mask].argmax(-1))
            for rest in ([], [0, 1])
        )
        misled += (best != other).any()
        for end in itertools.product(range(mask), repeat=2):
            text[2:] = end
            row = np.asarray([*text, 0, 1], np.int32)
            _, greedy = likelihood.continuation(weights, row, 2, 4, jax.random.key(0), network=net, n_samples=1)
            assert bool(greedy) == (end == tuple(best[2:])), (seed, end)
            found.add(bool(greedy))
    assert found == {True, False}
    assert misled, "or what fills the row up could be seen, and none would notice"


def test_a_greedy_step_predicts_an_end_from_uniform_noise():
    """How often one is called greedy, over noise, against the sum over all noise; a false alarm in 16 million."""
    net = network("duo_base")
    weights = opinionated(net, seed=3)
    sigma = schedules.sigma(schedules.by_name(net.schedule, net.eps).alpha(1.0))
    ends = np.array(list(itertools.product(range(VOCAB), repeat=2)))
    z = jnp.asarray(np.hstack([np.tile(TEXT[:2], (len(ends), 1)), ends]))
    logits = net.logits(weights, net.hidden(weights, net.embed(weights, z), jnp.full(len(ends), sigma)))
    best = np.asarray(logits.argmax(-1))[:, 2:]
    likely = next(end for end in ends if 0.2 < (best == end).all(1).mean() < 0.8)
    share = (best == likely).all(1).mean()
    row = np.asarray([*TEXT[:2], *likely, 3, 0], np.int32)
    n = 200

    def greedy(key):
        return likelihood.continuation(weights, row, 2, 4, key, network=net, n_samples=1)[1]

    called = np.asarray(jax.jit(jax.vmap(greedy))(jax.random.split(jax.random.key(0), n)))
    assert abs(called.mean() - share) < 5.3 * (share * (1 - share) / n) ** 0.5


def test_an_autoregressive_greedy_step_reads_what_stands_before():
    net = network("ar")
    weights = opinionated(net)
    text = np.array([1, 3, 0, 0, 0])
    for place in (2, 3, 4):
        hidden = net.hidden(weights, net.embed(weights, jnp.asarray(text[None, :place])), None)
        text[place] = int(net.logits(weights, hidden)[0, -1, : net.mask_id].argmax())
    for changed in (None, 2, 3, 4):
        row = text.copy()
        if changed:
            row[changed] = (row[changed] + 1) % net.mask_id
        row = np.asarray([*row, 3, 3, 3], np.int32)
        _, greedy = likelihood.continuation(weights, row, 2, 5, jax.random.key(0), network=net, n_samples=1)
        assert bool(greedy) == (changed is None)


def test_one_program_serves_all_borders():
    net = network("duo_base")
    weights = opinionated(net)
    nats(net, weights, 1, 3)
    compiled = likelihood.continuation._cache_size()
    for first in (2, 3):
        nats(net, weights, first, 3)
    assert likelihood.continuation._cache_size() == compiled
