"""The training loss end to end, against the reference's value and gradients."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import config as config_lib
from duo_jax import convert, gaussian, objectives, sampling
from duo_jax.diffusion import absorbing, duality, schedules, uniform
from duo_jax.diffusion.arrays import per_token
from duo_jax.models import head
from duo_jax.models.network import Network

VOCAB = 53


def network(**kwargs):
    base = {"algo": "duo_base", "vocab_size": VOCAB, "mask_id": VOCAB - 1, "length": 16, "dim": 64, "blocks": 2,
            "heads": 4, "cond_dim": 32,
            "dropout": 0.0, "precision": "float32"}  # fmt: skip
    return Network(**{**base, **kwargs})


@pytest.mark.parametrize("head_mib", [256, 0])
def test_loss_and_gradients_equal_the_references(golden, head_mib):
    # With no memory allowed, the head is visited one position at a time: the chunked path must give the same.
    data = golden("a_dit")
    params = convert.from_torch({k[3:]: v for k, v in data.items() if k.startswith("sd/")})
    net = network(head_mib=head_mib)
    x, z_t = jnp.asarray(data["e2e_x0"], jnp.int32), jnp.asarray(data["e2e_xt"], jnp.int32)
    alpha, dalpha = (jnp.asarray(data[f"e2e_{name}_t"]) for name in ("alpha", "dalpha"))
    spread = per_token(alpha, x.shape), per_token(dalpha, x.shape)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        hidden = net.hidden(params, net.embed(params, z_t), schedules.sigma(alpha[:, 0]))
        return head.weighted_sum(
            uniform.nelbo_from_logits, params["head"], hidden, jnp.full(x.shape, 1 / x.size), (z_t, x, *spread),
            chunk=net.chunk(*x.shape), dtype=net.dtype,
        )  # fmt: skip

    value, gradient = loss(jax.tree.map(jnp.asarray, params))
    np.testing.assert_allclose(value, data["e2e_nll"].mean(), rtol=2e-6)
    theirs = convert.to_torch(gradient, heads=4)
    for name in json.loads(str(data["e2e_grad_names"])):
        if f"e2e_grad/{name}" in data:
            want = data[f"e2e_grad/{name}"]
            np.testing.assert_allclose(theirs[name], want, rtol=5e-5, atol=5e-6 * np.abs(want).max())
    norms = [np.linalg.norm(theirs[name]) for name in json.loads(str(data["e2e_grad_names"]))]
    np.testing.assert_allclose(norms, data["e2e_grad_norms"], rtol=5e-6, atol=1e-7)


def test_an_untrained_networks_loss_is_the_uniform_one():
    """Uniform predictions make the bound nearly log K; 12 batches, five standard errors, a false alarm in 1.7e6."""
    net = network(vocab_size=10, length=64)
    weights = net.init(jax.random.key(0))
    batch = {"tokens": jax.random.randint(jax.random.key(1), (256, 64), 0, 10), "mask": jnp.ones((256, 64))}
    loss_fn = jax.jit(objectives.evaluation_loss(net))
    draws = [loss_fn(weights, batch, jax.random.key(2 + i), 0) for i in range(12)]
    losses = np.array([loss for loss, _ in draws])
    assert all(aux["tokens"] == 256 * 64 for _, aux in draws)
    np.testing.assert_allclose([aux["nll"] / aux["tokens"] for _, aux in draws], losses, rtol=1e-6)

    with jax.enable_x64(True):  # the integral from eps_t to 1, over a token that is right and one that is wrong
        nodes, shares = np.polynomial.legendre.leggauss(200)
        t, weight = schedules.towards_zero(net.eps_t + (1 - net.eps_t) * 0.5 * (nodes + 1), net.eps_t)
        schedule = schedules.log_linear()
        alpha, dalpha = (np.asarray(f(t))[:, None] for f in (schedule.alpha, schedule.dalpha))
        f = uniform.nelbo(
            jnp.full((200, 2, 10), -np.log(10.0)), jnp.array([[0, 1]] * 200), jnp.zeros((200, 2), int), alpha, dalpha
        )
        right = alpha[:, 0] + (1 - alpha[:, 0]) / 10
        expected = float(np.sum(0.5 * shares * weight * (right * f[:, 0] + (1 - right) * f[:, 1])))
    np.testing.assert_allclose(expected, np.log(10), rtol=6e-3)
    assert abs(losses.mean() - expected) < 5 * losses.std() / 12**0.5


@pytest.mark.parametrize("algo", ["duo_base", "mdlm", "sedd"])
@pytest.mark.parametrize("rows", [2, 8, 64])
def test_a_batch_that_is_not_full_measures_the_same(algo, rows):
    # Times are spread over the rows that count; over all 64, a few real rows would only see the least noise.
    net = network(algo=algo, vocab_size=30, mask_id=29, length=32, blocks=1, dim=16, heads=2)
    weights = net.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (64, 32), 0, 29)
    mask = jnp.ones((64, 32)).at[rows:].set(0)
    batch = {"tokens": jnp.where(mask > 0, tokens, 29), "mask": mask}
    loss_fn = jax.jit(objectives.evaluation_loss(net))
    losses = [loss_fn(weights, batch, jax.random.key(i), 0)[0] for i in range(400 // rows)]
    expected = {"duo_base": np.log(30), "mdlm": np.log(29), "sedd": np.log(29)}[algo]
    np.testing.assert_allclose(np.mean(losses), expected, rtol=0.06)


def test_the_mask_leaves_tokens_out():
    net = network()
    weights = jax.tree.map(
        lambda w: w + 0.1 * jax.random.normal(jax.random.key(5), w.shape), net.init(jax.random.key(0))
    )
    tokens = jax.random.randint(jax.random.key(1), (4, 16), 0, VOCAB)
    loss_fn = jax.jit(objectives.evaluation_loss(net))
    mask = jnp.ones((4, 16)).at[:, 8:].set(0)
    everything = loss_fn(weights, {"tokens": tokens, "mask": jnp.ones((4, 16))}, jax.random.key(2), 0)[1]
    left, right = (loss_fn(weights, {"tokens": tokens, "mask": m}, jax.random.key(2), 0)[1] for m in (mask, 1 - mask))
    assert left["tokens"] == 32
    assert left["nll"] != right["nll"]
    np.testing.assert_allclose(left["nll"] + right["nll"], everything["nll"], rtol=1e-5)
    nothing, aux = loss_fn(weights, {"tokens": tokens, "mask": 0 * mask}, jax.random.key(2), 0)
    assert nothing == 0
    assert aux["tokens"] == 0


@pytest.mark.parametrize("algo", ["duo_base", "duo:full", "duo:cold", "duo:topk", "dcd", "mdlm", "sedd", "d3pm", "ar"])
def test_visiting_the_vocabulary_in_chunks_changes_no_number(algo):
    # head_mib = 0 visits one position at a time, 256 all at once.
    algo, _, kind = algo.partition(":")
    config = config_lib.default()
    config.algo.name, config.algo.curriculum.kind = algo, "topk" if kind in ("", "topk") else "full"
    # So cold a softmax is read by its largest entries; the other one whole.
    config.algo.curriculum.tau_log10_start = config.algo.curriculum.tau_log10_end = -7.0 if kind == "cold" else -1.0
    read = gaussian.Gaussian.from_config(config, VOCAB).entries(VOCAB)
    assert {"full": read is None, "cold": read == 5}.get(kind, True)
    keys = jax.random.split(jax.random.key(5), 4)
    batch = {
        "tokens": jax.random.randint(keys[0], (4, 16), 0, VOCAB - 1),
        "mask": (jax.random.uniform(keys[1], (4, 16)) < 0.8).astype(jnp.float32),
    }
    nets = [network(algo=algo, head_mib=mib, blocks=1) for mib in (0, 256)]

    @jax.jit
    def weights(key):
        return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape), nets[0].init(keys[2]))

    params, teacher = (weights(key) for key in keys[:2])

    def value_and_grad(net):
        loss_fn = objectives.training_loss(config, net)(teacher)
        return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params, batch, keys[3], jnp.int32(1))

    (pieces, aux), pieces_gradient = value_and_grad(nets[0])
    (whole, _), whole_gradient = value_and_grad(nets[1])
    np.testing.assert_allclose(pieces, whole, rtol=1e-6)
    np.testing.assert_allclose(aux["nll"], whole * batch["mask"][:, algo == "ar" :].sum(), rtol=1e-6)
    scale = max(np.abs(g).max() for g in jax.tree.leaves(whole_gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * scale), pieces_gradient, whole_gradient
    )


def test_every_row_may_get_every_time():
    """Of a batch in which one row only fills up; 5.3 standard deviations, a false alarm in 8 million a row."""
    objective = objectives.Objective(network(eps_t=0.0))
    mask = jnp.ones((5, 16)).at[3].set(0)
    keys = jax.random.split(jax.random.key(0), 4000)
    times = np.asarray(jax.jit(jax.vmap(lambda key: objective.times(key, mask)))(keys))[:, [0, 1, 2, 4]]
    # Of the four that count there is one in every quarter, at the same place in it.
    np.testing.assert_allclose(np.diff(np.sort(times, axis=1)), 0.25, atol=1e-6)
    assert times.min() >= 0
    assert times.max() <= 1
    assert (np.abs(times.mean(axis=0) - 0.5) < 5.3 * 12**-0.5 / len(keys) ** 0.5).all()


@pytest.mark.parametrize("algo", ["duo_base", "mdlm", "sedd"])
def test_evaluation_measures_the_training_objective_with_less_noise(algo):
    """The same integral, from more early times. Means of 200 batches each; five standard errors, a false alarm in 1.7e6."""
    net = network(algo=algo, blocks=1)
    keys = jax.random.split(jax.random.key(1), 402)
    weights = jax.tree.map(lambda w: w + 0.05 * jax.random.normal(keys[0], w.shape), net.init(keys[1]))
    batch = {"tokens": jax.random.randint(keys[0], (8, 16), 0, VOCAB - 1), "mask": jnp.ones((8, 16))}
    objective = objectives.Objective(net, train=True)
    loss = {"duo_base": objectives.duo_base, "mdlm": objectives.mdlm, "sedd": objectives.sedd}[algo]

    def drawn(loss_fn, some):
        return np.asarray(jax.jit(jax.vmap(lambda key: loss_fn(weights, batch, key, 0)[0]))(some))

    trained, evaluated = drawn(loss(objective), keys[2:202]), drawn(objectives.evaluation_loss(net), keys[202:])
    errors = [values.std() / 200**0.5 for values in (trained, evaluated)]
    assert abs(trained.mean() - evaluated.mean()) < 5 * np.hypot(*errors)
    assert evaluated.std() < 0.8 * trained.std()


def test_a_raw_key_does_as_a_typed_one():
    """`jax.random.PRNGKey` is what many scripts still pass to the functions of one equation each."""
    x = jnp.zeros((2, 3), jnp.int32)
    log_p = jnp.log(jnp.full((2, 3, 7), 1 / 7))
    calls = [
        lambda key: uniform.q_sample(key, x, 0.5, 7),
        lambda key: uniform.step(key, log_p, x, 0.9, 0.5),
        lambda key: absorbing.q_sample(key, x, 0.5, 6),
        lambda key: duality.gaussian_latent(key, x, -2, 7),
        lambda key: duality.tempered_topk(key, x, -2, 0.1, 2, 7),
        lambda key: sampling.generate(
            lambda z, sigma: log_p, key, (2, 3), 7, schedule=schedules.log_linear(), n_steps=2
        ),
    ]
    for call in calls:
        jax.tree.map(np.testing.assert_array_equal, call(jax.random.PRNGKey(0)), call(jax.random.key(0)))
