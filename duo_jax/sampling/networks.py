"""A network's sampler, compiled: the engine's denoiser made from weights, which reads the head where it is asked to."""

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

# Of a batch's tokens a quarter at a time, so that little is computed that was not asked for; but not too few for a product.
_FEWEST = 64


def denoiser(
    network: Network, weights: Any, *, mesh: Mesh | None = None, lengths: jax.Array | None = None
) -> engine.Denoise:
    """Returns a network as the engine calls it, told the noise as its algorithm tells it in training.

    MDLM's network does not know the time; D3PM's is told at most the sigma of its schedule's eps; SEDD's output is scaled
    to its log-score. `mesh` holds the devices over which the rows are split; None for one. `lengths [B]` tell where
    rows end before L.
    """
    algo = network.algo
    reader = head.transposed(weights["head"], network.dtype)  # once for all steps

    def told(sigma: jax.Array) -> jax.Array:
        if algo == "mdlm":
            return jnp.zeros_like(sigma)
        return jnp.minimum(sigma, schedules.sigma(network.eps)) if algo == "d3pm" else sigma

    def denoise(
        states: tuple[jax.Array, ...], sigma: jax.Array, visitor: Callable, needs_prediction: jax.Array, *per_token: Any
    ) -> Any:
        hidden = tuple(network.hidden(weights, network.embed(weights, z), told(sigma), lengths=lengths) for z in states)

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
    key: jax.Array,
    given: Given,
    knobs: Knobs,
    unconditional: Given | None = None,
    *,
    network: Network,
    settings: Settings,
    mesh: Mesh | None = None,
) -> Walk:
    """Returns texts from a network, diffusion or autoregressive.

    Compiled once for each shape and settings, not for a key, known tokens, `top_p`, temperature or guidance weight.
    """
    if settings.process == "autoregressive":
        tokens = autoregressive.run(
            network, weights, key, given.tokens, given.held, settings, knobs.top_p, knobs.temperature
        )
        calls = given.tokens.shape[1] - 1
        return Walk(tokens, jnp.asarray(calls, jnp.int32), jnp.asarray(calls * given.tokens.shape[0], jnp.int32))
    denoise = denoiser(network, weights, mesh=mesh if mesh is not None and mesh.size > 1 else None)
    return engine.run(denoise, key, given, network.vocab_size, settings, knobs, unconditional)
