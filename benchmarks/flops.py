"""Model FLOPs by formula: the multiplications and additions of the matrix products that a network cannot do without.

What an implementation computes on top does not count, so that utilisation compares implementations honestly: neither the
second pass through blocks or head that saves memory, nor the half of a causal attention matrix that is masked, nor
elementwise work. Multiply and add are two FLOPs.
"""

from __future__ import annotations

from duo_jax.models.dit import TIME_FEATURES
from duo_jax.models.network import Network


def forward(network: Network, length: int) -> float:
    """Returns the FLOPs of one row of `length` tokens through the network and its vocabulary head."""
    return _blocks(network, length) + length * _head(network)


def _head(network: Network) -> float:
    """One token's logits."""
    return 2 * network.dim * network.vocab_size


def _blocks(network: Network, length: int) -> float:
    """One row, up to what the head reads."""
    dim, causal = network.dim, network.algo == "ar"
    dense = 2 * (3 * dim * dim + dim * dim + 2 * 4 * dim * dim)  # qkv, output, the MLP's two layers
    keys = (length + 1) / 2 if causal else length  # that a token attends to, on average
    attention = 2 * 2 * keys * dim  # scores, and the sum of values
    return length * network.blocks * (dense + attention) + (0 if causal else _conditioning(network))


def _conditioning(network: Network) -> float:
    """The layers from the noise level to every block's shift, scale and gate: once per row, whatever its length."""
    cond = network.cond_dim
    return 2 * cond * (TIME_FEATURES + cond + 6 * network.dim * network.blocks + 2 * network.dim)


def train_row(network: Network, length: int, *, relaxed: bool = False) -> float:
    """Returns the FLOPs of one row of a training step.

    A backward pass takes the gradients of both factors of every product: three forward passes in all.

    Args:
        network: the sizes, and the algorithm, which decides the number of passes.
        length: tokens in the row.
        relaxed: whether the input is a dense mixture of all embeddings, as in Duo's full curriculum at a warm tau.
    """
    if network.algo == "ar":
        return 3 * forward(network, length - 1)  # the last token is only predicted
    once = forward(network, length)
    passes = {"d3pm": 6, "dcd": 4}.get(network.algo, 3)  # d3pm reads noisy and clean texts; dcd's teacher only predicts
    # The mixture's weights have no gradient: a product forward and one backward.
    mixture = 2 * (2 * length * network.dim * network.vocab_size) if relaxed else 0
    return passes * once + mixture


def sample(network: Network, rows: int, length: int, calls: int, predictions: int) -> float:
    """Returns the FLOPs of a batch of sampled texts.

    An autoregressive network keeps the keys and values of the past: all of its calls together are one forward pass.

    Args:
        network: the sizes.
        rows: texts.
        length: tokens in each.
        calls: evaluations of the network for all rows.
        predictions: the number of tokens whose logits were computed, over all rows and calls.
    """
    if network.algo == "ar":
        calls, length = 1, length - 1
    return rows * calls * _blocks(network, length) + predictions * _head(network)
