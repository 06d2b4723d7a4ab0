"""Exact denoisers of a known joint distribution `[K] * L`, and a chi-square test against it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

# A correct sampler fails one such test in ten thousand keys; the keys are fixed, so a failure is a change of the code.
FALSE_ALARM = 1e-4


def random_joint(vocab, length, seed):
    joint = np.random.default_rng(seed).gamma(0.7, size=(vocab,) * length) + 0.02
    return joint / joint.sum()


def texts_of(vocab, length):
    return np.array(list(itertools.product(range(vocab), repeat=length)))


def index_of(tokens, vocab):
    return tokens @ (vocab ** jnp.arange(tokens.shape[-1] - 1, -1, -1))


def leave_one_out(joint):
    """The denoiser p(x_l | z_{-l}) of uniform-state diffusion, whose every row has one sigma."""
    vocab, length = joint.shape[0], joint.ndim
    texts = jnp.asarray(texts_of(vocab, length))
    log_joint = jnp.log(jnp.asarray(joint.reshape(-1), jnp.float32))
    hot = jax.nn.one_hot(texts, vocab)  # [texts, L, K]

    def denoise(z_t, sigma):
        alpha = jnp.exp(-sigma[0])
        same = texts[None] == texts[:, None]  # [z, x, L]
        log_q = jnp.log(alpha * same + (1 - alpha) / vocab)
        others = log_joint[None, :, None] + log_q.sum(-1, keepdims=True) - log_q
        table = jax.nn.logsumexp(others[..., None] + jnp.log(hot)[None], axis=1)  # [z, L, K]
        return jax.nn.log_softmax(table, -1)[index_of(z_t, vocab)]

    return denoise


def given_revealed(joint):
    """The denoiser p(x_l | revealed tokens) of absorbing-state diffusion over K + 1 ids, the mask being the last."""
    vocab, length = joint.shape[0], joint.ndim
    texts = texts_of(vocab, length)
    states = texts_of(vocab + 1, length)
    fits = ((states[:, None] == texts[None]) | (states[:, None] == vocab)).all(-1)
    table = np.einsum("zx,xlk->zlk", fits * joint.reshape(-1), np.eye(vocab + 1)[texts])
    with np.errstate(divide="ignore"):
        table = jnp.asarray(np.log(table / table.sum(-1, keepdims=True)), jnp.float32)
    return lambda z_t, sigma: table[index_of(z_t, vocab + 1)]


def score_given_revealed(joint):
    """The log-score of the same: p alpha / (1 - alpha)."""
    denoise = given_revealed(joint)
    return lambda z_t, sigma: denoise(z_t, sigma) - jnp.log(jnp.expm1(sigma))[:, None, None]


def p_value(tokens, joint):
    counts = np.bincount(np.ravel_multi_index(np.asarray(tokens).T, joint.shape), minlength=joint.size)
    expected = np.float64(joint.reshape(-1))
    return stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue


def distance(tokens, joint):
    """Total variation between the sampled and the exact distribution."""
    counts = np.bincount(np.ravel_multi_index(np.asarray(tokens).T, joint.shape), minlength=joint.size)
    return 0.5 * np.abs(counts / counts.sum() - joint.reshape(-1)).sum()
