"""What is minimised: for each algorithm one pure `loss_fn(params, batch, key, step) -> (loss, aux)`.

`params` are a network's weights, `batch` holds `tokens` and `mask`, both `[B, L]`, and `aux` the sum of the loss over the
tokens that the mask keeps (nats) and their number, from which averages over many batches are made. The vocabulary is
visited in chunks of tokens; nothing here holds a `[B, L, K]`.

A batch that is evaluated may also hold `given`, bool `[B, L]`: tokens that stay as they are, as a prompt does, so that the
bound is that of the others given them; and `lengths`, `[B]`: where each row ends, what fills it up behind not being seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from duo_jax.diffusion import absorbing, distillation, duality, schedules, uniform
from duo_jax.diffusion.arrays import per_token, token_keys
from duo_jax.gaussian import Gaussian
from duo_jax.models import head
from duo_jax.models.network import Network, Weights

Batch = dict[str, jax.Array]
Aux = dict[str, jax.Array]
LossFn = Callable[[Weights, Batch, jax.Array, jax.Array], tuple[jax.Array, Aux]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """What every algorithm's loss is made from; static.

    Attributes:
        network: the sizes, the schedule and the range of t.
        gaussian: used by `duo` and `dcd`.
        train: whether dropout acts and times are even.
        mesh: the devices over which the batch is split; None for one device.
    """

    network: Network
    gaussian: Gaussian | None = None
    train: bool = False
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """One device needs no mesh."""
        if self.mesh is not None and self.mesh.size == 1:
            object.__setattr__(self, "mesh", None)

    @property
    def shards(self) -> int:
        """How many devices the batch is split over."""
        return self.mesh.size if self.mesh else 1

    @property
    def schedule(self) -> schedules.Schedule:
        """The noise schedule of the discrete process."""
        return schedules.by_name(self.network.schedule, self.network.eps)

    def times(self, key: jax.Array, mask: jax.Array, eps: float | None = None) -> jax.Array:
        """Returns one time a row `[B]` in [eps, 1], low-discrepancy over the rows of the whole batch that count.

        Which row gets which time is drawn too: rows that come in some order would otherwise each see its own part of them.
        Rows that only fill up a batch, whose `mask [B, L]` is 0, take no share of the times: those of the others would
        otherwise not cover [eps, 1].
        """
        key_place, key_time = jax.random.split(key)
        counts = jnp.any(mask > 0, axis=1)
        place = jnp.where(counts, jax.random.uniform(key_place, counts.shape), 2.0)
        rank = jnp.argsort(jnp.argsort(place))
        eps = self.network.eps_t if eps is None else eps
        times = schedules.spread(rank, jax.random.uniform(key_time), jnp.maximum(jnp.sum(counts), 1), eps)
        return jnp.minimum(times, 1.0)  # rows that do not count lie beyond

    def levels(self, key: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns alpha_t and its derivative in t, `[B]` each, at one time a row.

        The bounds are integrals over t of alpha'_t times something. In evaluation there are more early times than late ones,
        for less variance, and the derivative comes with their weights.
        """
        t = self.times(key, mask)
        if self.train:
            return self.schedule.alpha(t), self.schedule.dalpha(t)
        t, weight = schedules.towards_zero(t, self.network.eps_t)
        return self.schedule.alpha(t), self.schedule.dalpha(t) * weight

    def dropout(self, key: jax.Array) -> jax.Array | None:
        """Returns the key for dropout, or None where it does not act."""
        return key if self.train else None

    def hidden(
        self, params: Weights, key: jax.Array, inputs: jax.Array, sigma: jax.Array | None, batch: Batch
    ) -> jax.Array:
        """Returns what the head reads, `[B, L, D]`, of token ids `[B, L]` or an embedded `[B, L, D]` (float)."""
        x = inputs if jnp.issubdtype(inputs.dtype, jnp.floating) else self.embed(params, inputs)
        return self.network.hidden(params, x, sigma, self.dropout(key), batch.get("lengths"), self.by_rows)

    def by_rows(self, x: jax.Array) -> jax.Array:
        """Returns `x [B, ...]`, its rows split over the devices as the batch's are.

        Where weights are split, the compiler, left to itself, may split heads in place of rows, above all in loops and in
        what is computed anew: it then sends the whole batch around, and cuDNN's attention refuses queries that are split
        otherwise than their keys.
        """
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))

    def embed(self, params: Weights, ids: jax.Array) -> jax.Array:
        """Returns the embedded ids, `[B, L, D]` of `[B, L]`: each device looks its own rows up in all of the table.

        Where the table is split, the compiler would look all rows up in each part of it, and send those around.
        """
        return head.on_rows(self.network.embed, self.mesh, whole=1, rows=1)({"embed": params["embed"]}, ids)

    def mixed(self, params: Weights, mix: jax.Array, ids: jax.Array) -> jax.Array:
        """Returns the embedded mixture `[B, L, D]` of the rows `ids` with the weights `mix`, `[B, L, k]` both."""
        net = self.network
        batch, length, k = ids.shape
        # The k rows of a token are as large as the logits of k D ids.
        chunk = head.chunk_length(-(-batch // self.shards), length, k * net.dim, net.head_budget)

        def rows(params: Weights, mix: jax.Array, ids: jax.Array) -> jax.Array:
            return head.in_chunks(lambda mix, ids: net.embed(params, ids, mix), mix, ids, chunk=chunk)

        return head.on_rows(rows, self.mesh, whole=1, rows=2)({"embed": params["embed"]}, mix, ids)

    def mean(
        self,
        params: Weights,
        hidden: jax.Array,
        mask: jax.Array,
        visitor: Callable[..., jax.Array],
        *per_token: jax.Array,
        constants: tuple = (),
        networks: int = 1,
    ) -> tuple[jax.Array, Aux]:
        """Averages `visitor(logits, *per_token, *constants)`, nats `[B, L]`, over the tokens that count.

        Args:
            params: the head is among them.
            hidden: `[B, L, D]`.
            mask: `[B, L]`, 1 for the tokens that count; what the others cost may be infinite.
            visitor: see `head.weighted_sum`.
            *per_token: `[B, L, ...]`.
            constants: what every token sees whole.
            networks: how many networks' logits a chunk holds.
        """
        net, mask = self.network, mask.astype(jnp.float32)
        chunk = net.chunk(*hidden.shape[:2], self.shards, networks=networks)
        total = head.weighted_sum(
            visitor, params["head"], hidden, mask, per_token, constants, chunk=chunk, dtype=net.dtype, mesh=self.mesh
        )
        tokens = jnp.sum(mask)
        return total / jnp.maximum(tokens, 1), {"nll": total, "tokens": tokens}

    def uniform_nelbo(
        self,
        params: Weights,
        key: jax.Array,
        inputs: jax.Array,
        z_t: jax.Array,
        alphas: tuple[jax.Array, jax.Array],
        batch: Batch,
    ) -> tuple[jax.Array, Aux]:
        """Returns the mean of f_Duo, a scalar in nats, for a network that reads `inputs` in place of z_t int `[B, L]`.

        `inputs` are ids `[B, L]` or embedded `[B, L, D]` (float); `alphas` are alpha_t and its derivative in t, `[B]` each.
        """
        x, visitor = batch["tokens"], uniform.nelbo_from_logits
        hidden = self.hidden(params, key, inputs, schedules.sigma(alphas[0]), batch)
        return self.mean(params, hidden, batch["mask"], visitor, z_t, x, *_spread(x, *alphas))

    def absorbed(self, key_t: jax.Array, key_z: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
        """Returns z_t `[B, L]` of the absorbing process at a time a row, with alpha_t and its derivative in t, `[B]`."""
        alpha_t, dalpha_t = self.levels(key_t, batch["mask"])
        z_t = absorbing.q_sample(key_z, batch["tokens"], alpha_t, self.network.mask_id)
        return _but_given(z_t, batch), alpha_t, dalpha_t


def _but_given(z_t: jax.Array, batch: Batch) -> jax.Array:
    """Returns z_t `[B, L]` with the tokens that the batch gives as they are."""
    return jnp.where(batch["given"], batch["tokens"], z_t) if "given" in batch else z_t


def _spread(x: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
    """Gives each token its row's value."""
    return tuple(per_token(value, x.shape) for value in values)


def _as_32(inputs: jax.Array, z_t: jax.Array, *alphas: jax.Array) -> tuple[jax.Array, ...]:
    """Two phases of one program give the same types, also where the caller computes in float64."""
    return inputs.astype(jnp.float32), z_t.astype(jnp.int32), *(alpha.astype(jnp.float32) for alpha in alphas)


def duo_base(this: Objective) -> LossFn:
    """Returns the discrete NELBO of uniform-state diffusion (The Diffusion Duality, f_Duo).

    Each row has one time t; z_t ~ q(z_t | x) = Cat(alpha_t x + (1 - alpha_t) / K); the loss is in nats per token.
    """

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step  # the same objective from the first step to the last
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x, (alpha_t, dalpha_t) = batch["tokens"], this.levels(key_t, batch["mask"])
        z_t = _but_given(uniform.q_sample(key_z, x, alpha_t, this.network.vocab_size), batch)
        return this.uniform_nelbo(params, key_dropout, z_t, z_t, (alpha_t, dalpha_t), batch)

    return loss_fn


def duo(this: Objective) -> LossFn:
    """Returns Duo's loss: until `curriculum.end` the NELBO under the Gaussian curriculum, afterwards the discrete one.

    In the curriculum z_t = argmax(w_t) of the Gaussian latent w_t, alpha_t = T(gamma_t), and the network reads the relaxed
    input softmax(w_t / tau) in place of z_t. Both phases are one program with one pass through the network: only what
    precedes it is chosen by the (traced) step.
    """
    net, gaussian, chosen = this.network, this.gaussian, this.gaussian.curriculum

    def relaxed(
        params: Weights, key: jax.Array, x: jax.Array, gamma: jax.Array, tau: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Returns the embedded relaxed input `[B, L, D]` and z_t `[B, L]`."""
        if k := gaussian.entries(net.vocab_size):
            mix, ids, z_t = duality.tempered_topk(key, x, gamma, tau, k, net.vocab_size)
            return this.mixed(params, mix, ids), z_t

        def piece(params: Weights, keys: jax.Array, x: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
            eps = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (net.vocab_size,))))(keys)
            w = duality.latent_from_noise(eps, x, gamma)
            return net.embed(params, w / tau), jnp.argmax(w, axis=-1).astype(jnp.int32)

        chunk = net.chunk(*x.shape, this.shards)

        def rows(params: Weights, keys: jax.Array, x: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
            return head.in_chunks(functools.partial(piece, params), keys, x, gamma, chunk=chunk)

        args = params, token_keys(key, x.shape), x, per_token(gamma, x.shape)
        return head.on_rows(rows, this.mesh, whole=1, rows=3)(*args)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        t = this.times(key_t, batch["mask"])

        def curriculum() -> tuple[jax.Array, ...]:
            tau = duality.tau(step, chosen.start, chosen.end, chosen.tau_log10_start, chosen.tau_log10_end)
            inputs, z_t = relaxed(params, key_z, x, gaussian.gamma(t), tau)
            return _as_32(inputs, z_t, *gaussian.alpha(t, net.vocab_size))

        def discrete() -> tuple[jax.Array, ...]:
            alpha_t, dalpha_t = this.schedule.alpha(t), this.schedule.dalpha(t)
            z_t = uniform.q_sample(key_z, x, alpha_t, net.vocab_size)
            return _as_32(this.embed(params, z_t), z_t, alpha_t, dalpha_t)

        inputs, z_t, *alphas = jax.lax.cond(step < chosen.end, curriculum, discrete)
        return this.uniform_nelbo(params, key_dropout, inputs, z_t, tuple(alphas), batch)

    return loss_fn


def dcd(this: Objective, teacher: Weights) -> LossFn:
    """Returns the loss of discrete consistency distillation (The Diffusion Duality, algorithm 1).

    One noise eps gives z_t at t and z_s at s = t - dt; the student at (z_t, t) learns what the teacher, frozen and without
    dropout, predicts at (z_s, s). dt grows with the step.
    """
    net, gaussian, chosen = this.network, this.gaussian, this.gaussian.distillation
    divergence = distillation.kl_backward if chosen.kl == "backward" else distillation.kl_forward

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        if chosen.dt == "doubling":
            dt = distillation.doubling_dt(step, chosen.round_length, chosen.n_steps)
        else:
            dt = distillation.linear_dt(step, gaussian.steps, chosen.dt_start, chosen.dt_end)
        t, s = distillation.pair_times(this.times(key_t, batch["mask"]), dt)
        z_t, z_s = distillation.trajectory_pair(key_z, x, gaussian.gamma(t), gaussian.gamma(s), net.vocab_size)

        def hidden(weights: Weights, z: jax.Array, t: jax.Array, dropout: jax.Array | None) -> jax.Array:
            sigma = schedules.sigma(gaussian.alpha(t, net.vocab_size)[0])
            return net.hidden(weights, this.embed(weights, z), sigma, dropout, by_rows=this.by_rows)

        def compare(student: jax.Array, theirs: jax.Array, reader: head.Head) -> jax.Array:
            return divergence(student, head.readable_logits(theirs, reader))

        student = hidden(params, z_t, t, this.dropout(key_dropout))
        theirs = hidden(teacher, z_s, s, None)
        reader = head.readable(teacher["head"], net.dtype)  # once for all chunks
        return this.mean(params, student, batch["mask"], compare, theirs, constants=(reader,), networks=2)

    return loss_fn


def mdlm(this: Objective) -> LossFn:
    """Returns MDLM's NELBO (Sahoo et al., 2024): masked diffusion with SUBS; the network is not told the time."""
    net = this.network
    visitor = functools.partial(absorbing.mdlm_nelbo_from_logits, mask_id=net.mask_id)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x, (z_t, *alphas) = batch["tokens"], this.absorbed(key_t, key_z, batch)
        hidden = this.hidden(params, key_dropout, z_t, jnp.zeros_like(alphas[0]), batch)
        return this.mean(params, hidden, batch["mask"], visitor, z_t, x, *_spread(x, *alphas))

    return loss_fn


def sedd(this: Objective) -> LossFn:
    """Returns SEDD absorb's denoising score entropy (Lou et al., 2024)."""
    net = this.network

    def visitor(logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array, dalpha: jax.Array) -> jax.Array:
        log_score = absorbing.sedd_log_score(logits, z_t, alpha)
        return absorbing.sedd_nelbo(log_score, z_t, x, alpha, dalpha, net.mask_id)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x, (z_t, *alphas) = batch["tokens"], this.absorbed(key_t, key_z, batch)
        hidden = this.hidden(params, key_dropout, z_t, schedules.sigma(alphas[0]), batch)
        return this.mean(params, hidden, batch["mask"], visitor, z_t, x, *_spread(x, *alphas))

    return loss_fn


def d3pm(this: Objective) -> LossFn:
    """Returns D3PM absorb's T-step bound with its reconstruction term (Austin et al., 2021); alpha_t = 1 - t."""
    net, n_steps = this.network, this.network.d3pm_steps
    visitor = functools.partial(absorbing.d3pm_nelbo, mask_id=net.mask_id, n_steps=n_steps)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        key_t, key_z, *key_dropout = jax.random.split(key, 4)
        x = batch["tokens"]
        # The chain's times are 1/T, 2/T, ..., 1.
        t = jnp.clip(jnp.ceil(this.times(key_t, batch["mask"], 0.0) * n_steps), 1, n_steps) / n_steps
        alpha_t = 1.0 - t
        z_t = _but_given(absorbing.q_sample(key_z, x, alpha_t, net.mask_id), batch)
        # At t = 1 alpha is 0 and its sigma infinite; the network is told the last finite one.
        sigma = schedules.sigma(jnp.maximum(alpha_t, net.eps))
        hidden = this.hidden(params, key_dropout[0], z_t, sigma, batch)
        chain = this.mean(params, hidden, batch["mask"], visitor, z_t, x, *_spread(x, alpha_t))
        hidden = this.hidden(params, key_dropout[1], x, jnp.zeros_like(t), batch)
        clean = this.mean(params, hidden, batch["mask"], absorbing.d3pm_reconstruction, x)
        return chain[0] + clean[0], chain[1] | {"nll": chain[1]["nll"] + clean[1]["nll"]}

    return loss_fn


def ar(this: Objective) -> LossFn:
    """Returns the cross-entropy of the next token, exact, of a causal network; BOS, the first token, is given."""
    visitor = functools.partial(absorbing.ar_nll, mask_id=this.network.mask_id)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        x = batch["tokens"]
        # All of x, though the last prediction is of no use: attention and products are made for even lengths.
        hidden = this.hidden(params, key, x, None, batch)[:, :-1]
        return this.mean(params, hidden, batch["mask"][:, 1:], visitor, x[:, 1:])

    return loss_fn


_LOSSES = {"duo_base": duo_base, "duo": duo, "mdlm": mdlm, "sedd": sedd, "d3pm": d3pm, "ar": ar}
# The bound that held-out likelihood is measured with, where it is not the training loss.
_BOUNDS = {"duo": duo_base, "dcd": duo_base}


def training_loss(config: ConfigDict, network: Network, *, mesh: Mesh | None = None) -> Callable[[Any], LossFn]:
    """Returns `teacher -> loss_fn` for `config.algo.name`; the teacher is used by `dcd` alone."""
    algo = network.algo
    gaussian = Gaussian.from_config(config, network.vocab_size) if algo in ("duo", "dcd") else None
    this = Objective(network, gaussian, train=True, mesh=mesh)
    if algo == "dcd":
        return lambda teacher: dcd(this, teacher)
    return lambda teacher: _LOSSES[algo](this)


def evaluation_loss(network: Network, *, mesh: Mesh | None = None) -> LossFn:
    """Returns the bound on the negative log-likelihood that the network's algorithm is evaluated with."""
    return _BOUNDS.get(network.algo, _LOSSES.get(network.algo))(Objective(network, mesh=mesh))
