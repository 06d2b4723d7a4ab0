"""A network's compiled sampler: the engine's denoiser from its weights, which computes logits only where asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from duo_jax.diffusion import absorbing, schedules
from duo_jax.diffusion.arrays import per_token as spread
from duo_jax.models import head
from duo_jax.models.network import Network
from duo_jax.sampling import autoregressive, engine
from duo_jax.sampling.engine import Given, Knobs, Walk
from duo_jax.sampling.settings import Settings

# The head visits a quarter of a batch's tokens at a time, so that few are computed that were not asked for; but at least
# this many, since smaller matrix products are inefficient.
_FEWEST = 64


def denoiser(
    network: Network, weights: Any, *, mesh: Mesh | None = None, lengths: jax.Array | None = None
) -> engine.Denoise:
    """Returns a network as a denoiser of the engine; its input sigma is that of its algorithm's training.

    MDLM's network gets no time (sigma = 0); D3PM's sigma is at most that of its schedule's eps; SEDD's output is scaled to
    its log-score. `mesh` holds the devices over which the rows are split; None for one device. `lengths [B]` says where
    rows end before L.
    """
    algo = network.algo
    reader = head.transposed(weights["head"], network.dtype)  # once for all steps

    def input_sigma(sigma: jax.Array) -> jax.Array:
        if algo == "mdlm":
            return jnp.zeros_like(sigma)
        return jnp.minimum(sigma, schedules.sigma(network.eps)) if algo == "d3pm" else sigma

    def denoise(
        states: tuple[jax.Array, ...], sigma: jax.Array, visitor: Callable, needs_prediction: jax.Array, *per_token: Any
    ) -> Any:
        seen = input_sigma(sigma)
        hidden = tuple(network.hidden(weights, network.embed(weights, z), seen, lengths=lengths) for z in states)

        def visit(reader: head.Transposed, hidden: tuple, states: tuple, alpha: jax.Array, *per_token: Any) -> Any:
            logits = tuple(head.logits_of_transposed(h, reader) for h in hidden)
            if algo == "sedd":
                logits = tuple(
                    absorbing.sedd_log_score(values, z, alpha) for values, z in zip(logits, states, strict=True)
                )
            return visitor(logits, *per_token)

        def on_device(reader: head.Transposed, needs_prediction: jax.Array, *per_token: Any) -> Any:
            fits = head.tokens_at_once(len(states) * network.vocab_size, network.head_budget)
            chunk = min(fits, max(_FEWEST, -(-needs_prediction.size // 4)))
            return head.map_selected_tokens(functools.partial(visit, reader), needs_prediction, *per_token, chunk=chunk)

        alpha = spread(jnp.exp(-sigma), needs_prediction.shape)
        args = reader, needs_prediction, hidden, states, alpha, *per_token
        return head.on_rows(on_device, mesh)(*args)

    return denoise


@functools.partial(jax.jit, static_argnames=("network", "settings", "mesh"))
def sample_tokens(
    weights: Any,
    keys: jax.Array,
    given: Given,
    knobs: Knobs,
    unconditional: Given | None = None,
    *,
    network: Network,
    settings: Settings,
    mesh: Mesh | None = None,
) -> Walk:
    """Returns texts from a network, diffusion or autoregressive, each drawn with its own of the typed `keys [B]`.

    Compiled once per shape and settings; the keys, known tokens, `top_p`, temperature and guidance weight may change.
    """
    if settings.process == "autoregressive":
        tokens = autoregressive.run(
            network, weights, keys, given.tokens, given.held, settings, knobs.top_p, knobs.temperature
        )
        calls = given.tokens.shape[1] - 1
        return Walk(tokens, jnp.asarray(calls, jnp.int32), jnp.asarray(calls * given.tokens.shape[0], jnp.int32))
    denoise = denoiser(network, weights, mesh=mesh if mesh is not None and mesh.size > 1 else None)
    return engine.run(denoise, keys, given, network.vocab_size, settings, knobs, unconditional)
