"""What the tests compare with: the published formulas in extended precision, enumeration, and chi-square."""

import numpy as np
from scipy import special, stats

# A correct sampler fails one such test in ten thousand seeds; the seeds are fixed.
FALSE_ALARM = 1e-4


def softmax(logits):
    logits = np.asarray(logits, np.longdouble)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def published_nelbo(p, z_t, x, alpha, dalpha):
    """The integrand of The Diffusion Duality as printed: p [..., K], the rest [...], in long double."""
    p, alpha, dalpha = (np.asarray(v, np.longdouble) for v in (p, alpha, dalpha))
    k = p.shape[-1]
    noise = 1 - alpha
    pbar = k * alpha[..., None] * p + noise[..., None]
    pbar_i = np.take_along_axis(pbar, z_t[..., None], -1)[..., 0]
    pbar_m = np.take_along_axis(pbar, x[..., None], -1)[..., 0]
    eq = (z_t == x).astype(np.longdouble)
    ne = 1 - eq
    xbar_i = k * alpha * eq + noise
    zeta = noise / (k * alpha + noise)
    log_sum = k * np.log(pbar_i) - np.log(pbar).sum(-1)
    braces = (
        k * (1 / xbar_i - 1 / pbar_i)
        - (zeta * eq + ne) * log_sum
        - k * alpha / noise * np.log(pbar_i / pbar_m) * ne
        - ((k - 1) * zeta * eq - ne / zeta) * np.log(zeta)
    )
    return dalpha / (k * alpha) * braces


def exact_operator(gamma, k):
    """T and d T / d gamma [n] by a fine trapezoid rule in float64, in the variables of the definition."""
    mu = np.exp(-0.5 * np.asarray(gamma, np.float64))[:, None]
    z = np.arange(-12.0, 36.0, 1 / 128)
    phi = np.exp(-0.5 * (z - mu) ** 2) / np.sqrt(2 * np.pi) / 128
    others = np.exp((k - 1) * special.log_ndtr(z))
    plain = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi) / 128
    win_minus_chance = ((phi - plain) * others).sum(-1)
    # d P / d mu under the integral of the definition: E[(K-1) Phi(z)^(K-2) phi(z)] at z = mu + u.
    slope = (phi * (k - 1) * np.exp((k - 2) * special.log_ndtr(z) - 0.5 * z**2) / np.sqrt(2 * np.pi)).sum(-1)
    return k / (k - 1) * win_minus_chance, -0.5 * mu[:, 0] * k / (k - 1) * slope


def uniform_marginal(alpha, x, k):
    """q(z | x) [K] of the uniform-state process."""
    return alpha * np.eye(k)[x] + (1 - alpha) / k


def assert_distributed(counts, probabilities):
    """Chi-square of counts [n] against probabilities [n], rare cells pooled; impossible cells must be empty."""
    counts, probabilities = np.ravel(counts).astype(float), np.ravel(probabilities).astype(float)
    assert abs(probabilities.sum() - 1) < 1e-5
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities / probabilities.sum() * counts.sum()
    rare = expected < 8
    if rare.any() and expected[rare].sum() > 0:
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    else:
        counts, expected = counts[~rare], expected[~rare]
    statistic = ((counts - expected) ** 2 / expected).sum()
    p_value = stats.chi2.sf(statistic, max(len(counts) - 1, 1))
    assert p_value > FALSE_ALARM, f"p = {p_value:.2e}; counts {counts[:9]}, expected {expected[:9]}"


def histogram(ids, k):
    return np.bincount(np.ravel(ids), minlength=k)


def unit_interval(n=64, power=4):
    """Nodes and weights [n] on (0, 1) for integrands with a logarithm at 0: Gauss's rule in v, u = v^power."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    v, w = 0.5 * (nodes + 1), 0.5 * weights
    return v**power, w * power * v ** (power - 1)
