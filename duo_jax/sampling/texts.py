"""Texts of any number and length: in batches split over the devices, and in strides beyond the network's length."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.sampling import engine, networks
from duo_jax.sampling.prompts import Known
from duo_jax.sampling.settings import Settings

# Keeps the keys of texts apart from those of training and of `score` with the same seed.
_STREAM = 7


@dataclasses.dataclass(frozen=True)
class Texts:
    """What `sample` returns: tokens int32 `[B, L]`, the network calls for a batch (the most, where batches differ, summed
    over strides), and the trajectory int32 `[n, B, L]` or None."""

    tokens: np.ndarray
    network_calls: int
    trajectory: np.ndarray | None


def check_known(tokens: np.ndarray, held: np.ndarray, network: Network) -> None:
    """Raises UserError if the network cannot write texts with these held tokens."""
    if not held.any():
        return
    fixed = tokens[held]
    if fixed.min() < 0 or fixed.max() >= network.vocab_size:
        raise UserError(
            f"held token ids must lie in [0, {network.vocab_size}); these reach {fixed.min()} to {fixed.max()}."
        )
    if network.process == "absorbing" and (fixed == network.mask_id).any():
        raise UserError(f"a held token is {network.mask_id}, the mask itself; leave such positions out of the mask.")
    if network.algo == "ar" and (held[:, 1:] > held[:, :-1]).any():
        raise UserError(
            "infill holds tokens after a gap, which an autoregressive network cannot look ahead to; give a prompt, or "
            "use a diffusion network."
        )


def window(network: Network, length: int, stride: int | None) -> tuple[int, int | None]:
    """Returns the length of a window and its number of new tokens, None where one window is the whole text.

    Raises:
        UserError: a stride that does not fit.
    """
    if length <= network.length:
        if stride is not None:
            raise UserError(f"stride is for texts longer than the network's {network.length} tokens, not {length}.")
        return length, None
    stride = network.length // 2 if stride is None else stride
    if not 1 <= stride <= network.length - 2:
        raise UserError(
            f"stride is {stride}; it must be from 1 to {network.length - 2}, to leave room for BOS and a last token."
        )
    return network.length, stride


def origins_of(seeds: int | Sequence[int], rows: int) -> np.ndarray:
    """Returns what decides the draws of each text, uint32 `[rows, 2]`: a seed, and which of that seed's texts it is.

    From one seed come the texts 0, 1, ...; if every text has a seed of its own, each is that seed's text 0.
    """
    one = isinstance(seeds, int)
    pairs = np.full(rows, seeds) if one else np.asarray(seeds), np.arange(rows) if one else np.zeros(rows)
    return np.stack(pairs, axis=1).astype(np.uint32)


@jax.jit
def _keys(origins: jax.Array, window: jax.typing.ArrayLike) -> jax.Array:
    """Returns typed PRNG keys `[B]` for a window of the texts with these `origins`, `[B, 2]`."""

    def key(origin: jax.Array) -> jax.Array:
        # Always threefry: of a batch of rbg's keys JAX uses the first only, and a text would depend on the one before it.
        seed = jax.random.key(origin[0], impl="threefry2x32")
        text = jax.random.fold_in(jax.random.fold_in(seed, _STREAM), origin[1])
        return jax.random.fold_in(text, window)

    return jax.vmap(key)(origins)


def sample(
    weights: Any,
    network: Network,
    settings: Settings,
    origins: np.ndarray,
    known: Known,
    *,
    knobs: engine.Knobs,
    bos_id: int,
    unconditional: Known | None = None,
    stride: int | None = None,
    rows_at_once: int | None = None,
    mesh: Mesh | None = None,
    planned: Callable[[int], Any] = lambda steps: None,
    done: Callable[[Texts], None] = lambda texts: None,
) -> Texts:
    """Returns texts of the shape of `known`; one compiled program samples all batches and strides.

    A batch has `rows_at_once` rows (as many as there are if None), rounded up to a multiple of the devices. Texts longer
    than the network's length are sampled in windows: each begins with BOS and the end of the text so far, and adds `stride`
    tokens (half the network's length if None).

    Args:
        weights: the network's parameters; with a `mesh`, already on it.
        network: their network.
        settings: static.
        origins: what decides each text's draws, whatever the other texts are; see `origins_of`.
        known: tokens and where they are held, `[B, L]`; see `prompts.known`.
        knobs: traced settings.
        bos_id: begins each window after the first.
        unconditional: like `known`, for the unconditional prediction of guidance.
        stride: new tokens per window.
        rows_at_once: rows of a batch.
        mesh: whose devices share the rows; this process's devices if None.
        planned: called first, with the number of steps over all batches and strides.
        done: called with each batch when it is finished.

    Raises:
        UserError: invalid held tokens, or a stride that does not fit.
    """
    check_known(*known, network)
    rows, length = known[0].shape
    width, stride = window(network, length, stride)
    if stride is not None and (settings.trajectory or settings.guided):
        raise UserError(
            "trajectory and guidance are for texts within the network's length; leave out one or the other."
        )
    if mesh is None:
        mesh = Mesh(np.asarray(jax.local_devices()), ("rows",))
        if mesh.size > 1:
            weights = jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))
    split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    size = -(-(rows_at_once or rows) // mesh.size) * mesh.size

    def put(x: np.ndarray) -> jax.Array:
        # The last batch is padded with copies of its last row, so that the same program runs it.
        return jax.device_put(np.concatenate([x, np.repeat(x[-1:], size - len(x), axis=0)]), split)

    def draw(window: int, origins: np.ndarray, part: Known, other: Known | None) -> engine.Walk:
        keys = _keys(put(origins), np.uint32(window))
        given, free = (pair and engine.Given(*map(put, pair)) for pair in (part, other))
        walk = networks.sample_tokens(weights, keys, given, knobs, free, network=network, settings=settings, mesh=mesh)
        return jax.tree.map(fetch, walk)

    places = _windows(length, width, stride)
    steps = width - 1 if settings.process == "autoregressive" else settings.network_calls
    planned(-(-rows // size) * len(places) * steps)
    blocks = []
    for start in range(0, rows, size):
        block = slice(start, start + size)
        part, other = (pair and tuple(x[block] for x in pair) for pair in (known, unconditional))
        draw_window = functools.partial(draw, origins=origins[block], other=other)
        walk = draw_window(0, part=part) if stride is None else _in_strides(draw_window, part, places, bos_id)
        n = len(part[0])
        trajectory = None if walk.trajectory is None else walk.trajectory[:, :n]
        blocks.append(Texts(np.asarray(walk.tokens)[:n], int(walk.network_calls), trajectory))
        done(blocks[-1])
    return Texts(
        np.concatenate([block.tokens for block in blocks]),
        max(block.network_calls for block in blocks),
        np.concatenate([block.trajectory for block in blocks], axis=1) if settings.trajectory else None,
    )


def fetch(x: jax.Array) -> np.ndarray:
    """Returns a whole array, even if some of its rows are on other hosts."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def _windows(length: int, window: int, stride: int | None) -> list[tuple[int, int, int]]:
    """Returns for each window of a text its beginning, and the end of the written text before and after it."""
    places, written = [], 0
    while written < length:
        begin = 0 if stride is None else max(0, min(written - (window - 2 - stride) - 1, length - window))
        # Each window but the last drops its last token: in training that is a row's EOS.
        end = length if begin + window == length else begin + window - 1
        places.append((begin, written, end))
        written = end
    return places


def _in_strides(
    draw: Callable[..., engine.Walk],
    known: Known,
    places: list[tuple[int, int, int]],
    bos_id: int,
) -> engine.Walk:
    """Samples texts longer than a window, in the windows `places` of `_windows`; `draw(i, part=...)` draws the i-th."""
    tokens, held = (np.array(part) for part in known)
    window = places[0][2] + 1
    calls, predictions = 0, 0
    for index, (begin, written, end) in enumerate(places):
        piece, fixed = tokens[:, begin : begin + window].copy(), held[:, begin : begin + window].copy()
        if index:
            # BOS stands before the context, as at the beginning of a row in training.
            piece[:, 0] = bos_id
            fixed[:, : written - begin] = True
        walk = draw(index, part=(piece, fixed))
        calls, predictions = calls + int(walk.network_calls), predictions + int(walk.predictions)
        tokens[:, written:end] = walk.tokens[: len(tokens), written - begin : end - begin]
    return engine.Walk(tokens, np.asarray(calls), np.asarray(predictions))
