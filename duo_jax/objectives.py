"""The training losses: for each algorithm one pure `loss_fn(params, batch, key, step) -> (loss, aux)`.

`params` are a network's weights, and `batch` holds `tokens` and `mask`, both `[B, L]`. `aux` holds the sum of the loss in
nats over the tokens that the mask keeps, and their number, from which callers compute averages over many batches. The
vocabulary is processed in chunks of tokens; nothing here holds a `[B, L, K]`.

A batch for evaluation may also hold `given`, bool `[B, L]`: tokens that are not noised, such as a prompt, so that the bound
is that of the other tokens given these; and `lengths`, `[B]`: where each row ends; the padding after it is not seen.
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
    """The settings that every algorithm's loss uses, and the parts that the losses share; static.

    Attributes:
        network: the sizes, the schedule and the range of t.
        gaussian: the Gaussian side of the duality, for `duo` and `dcd`.
        train: whether dropout acts and times are uniform.
        mesh: the devices over which the batch is split; None for one device.
    """

    network: Network
    gaussian: Gaussian | None = None
    train: bool = False
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        """Drops the mesh of a single device."""
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
        """Returns one time per row, `[B]` in [eps, 1], low-discrepancy over all rows of the batch that count.

        Which row gets which time is random as well: otherwise, if rows come in a fixed order, each would only see its own
        part of [eps, 1]. Rows that only fill up the batch (`mask [B, L]` all 0) do not count: otherwise the times of the
        other rows would not cover [eps, 1].
        """
        key_place, key_time = jax.random.split(key)
        counts = jnp.any(mask > 0, axis=1)
        place = jnp.where(counts, jax.random.uniform(key_place, counts.shape), 2.0)
        rank = jnp.argsort(jnp.argsort(place))
        eps = self.network.eps_t if eps is None else eps
        offset, n = jax.random.uniform(key_time), jnp.maximum(jnp.sum(counts), 1)
        times = schedules.stratified_times(rank, offset, n, eps)
        return jnp.minimum(times, 1.0)  # rows that do not count would get times beyond 1

    def draw_alpha(self, key: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws one time per row; returns alpha_t and its derivative in t, `[B]` each.

        Every bound is an integral over t of an integrand proportional to alpha'_t. Evaluation draws small t more often, to
        lower the variance, and multiplies alpha'_t by the importance weights.
        """
        t = self.times(key, mask)
        if self.train:
            return self.schedule.alpha(t), self.schedule.dalpha(t)
        t, weight = schedules.towards_zero(t, self.network.eps_t)
        return self.schedule.alpha(t), self.schedule.dalpha(t) * weight

    def dropout(self, key: jax.Array) -> jax.Array | None:
        """Returns the key for dropout, or None if dropout does not act."""
        return key if self.train else None

    def hidden(
        self, params: Weights, key: jax.Array, inputs: jax.Array, sigma: jax.Array | None, batch: Batch
    ) -> jax.Array:
        """Returns the head's input `[B, L, D]` for token ids `[B, L]` or embedded tokens `[B, L, D]` (float)."""
        x = inputs if jnp.issubdtype(inputs.dtype, jnp.floating) else self.embed(params, inputs)
        return self.network.hidden(params, x, sigma, self.dropout(key), batch.get("lengths"), self.by_rows)

    def by_rows(self, x: jax.Array) -> jax.Array:
        """Returns `x [B, ...]` with its rows split over the devices, as those of the batch are.

        Where weights are split, the compiler may otherwise split heads instead of rows, especially in loops and in
        recomputed values. It then sends the whole batch between devices, and cuDNN's attention rejects queries and keys
        that are split differently.
        """
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(self.mesh.axis_names)))

    def embed(self, params: Weights, ids: jax.Array) -> jax.Array:
        """Returns the embedded ids `[B, L]` as `[B, L, D]`: each device looks up its own rows in the whole table.

        If the table is split, the compiler would otherwise look up all rows in each part of it and send those around.
        """
        return head.on_rows(self.network.embed, self.mesh)({"embed": params["embed"]}, ids)

    def mixed(self, params: Weights, mix: jax.Array, ids: jax.Array) -> jax.Array:
        """Returns the mixture `[B, L, D]` of the embedding rows `ids` with the weights `mix`, both `[B, L, k]`."""
        net = self.network
        batch, length, k = ids.shape
        # A token's k rows are as large as the logits of a vocabulary of k D ids.
        chunk = head.chunk_length(-(-batch // self.shards), length, k * net.dim, net.head_budget)

        def rows(params: Weights, mix: jax.Array, ids: jax.Array) -> jax.Array:
            return head.in_chunks(lambda mix, ids: net.embed(params, ids, mix), mix, ids, chunk=chunk)

        return head.on_rows(rows, self.mesh)({"embed": params["embed"]}, mix, ids)

    def mean_over_tokens(
        self,
        params: Weights,
        hidden: jax.Array,
        mask: jax.Array,
        token_loss: Callable[..., jax.Array],
        *per_token: jax.Array,
        constants: tuple = (),
        networks: int = 1,
    ) -> tuple[jax.Array, Aux]:
        """Averages `token_loss(logits, *per_token, *constants)`, nats `[B, L]`, over the tokens that count.

        Args:
            params: the weights, of which the head is used.
            hidden: the head's input `[B, L, D]`.
            mask: `[B, L]`, 1 for the tokens that count; the loss of the others may be infinite.
            token_loss: `fn` of `head.weighted_sum`.
            *per_token: `[B, L, ...]`.
            constants: arguments that are the same for all tokens.
            networks: how many networks' logits a chunk holds.
        """
        net, mask = self.network, mask.astype(jnp.float32)
        chunk = net.chunk(*hidden.shape[:2], self.shards, networks=networks)
        total = head.weighted_sum(
            token_loss, params["head"], hidden, mask, per_token, constants, chunk=chunk, dtype=net.dtype, mesh=self.mesh
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

        `inputs` are ids `[B, L]` or embedded tokens `[B, L, D]` (float); `alphas` are alpha_t and its derivative in t,
        `[B]` each.
        """
        x = batch["tokens"]
        hidden = self.hidden(params, key, inputs, schedules.sigma(alphas[0]), batch)
        return self.mean_over_tokens(
            params, hidden, batch["mask"], uniform.nelbo_from_logits, z_t, x, *_per_token(x, *alphas)
        )

    def draw_masked(self, key_t: jax.Array, key_z: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Draws one time per row and z_t of the absorbing process; returns z_t `[B, L]`, alpha_t and alpha'_t `[B]`."""
        alpha_t, dalpha_t = self.draw_alpha(key_t, batch["mask"])
        z_t = absorbing.q_sample(key_z, batch["tokens"], alpha_t, self.network.mask_id)
        return keep_given(z_t, batch), alpha_t, dalpha_t


def keep_given(z_t: jax.Array, batch: Batch) -> jax.Array:
    """Returns z_t `[B, L]` with the batch's given tokens, if it has any, put back."""
    return jnp.where(batch["given"], batch["tokens"], z_t) if "given" in batch else z_t


def _per_token(x: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
    """Broadcasts values per row, `[B]`, to the tokens x `[B, L]`."""
    return tuple(per_token(value, x.shape) for value in values)


def _as_32(inputs: jax.Array, z_t: jax.Array, *alphas: jax.Array) -> tuple[jax.Array, ...]:
    """Casts to 32 bits: the two branches of `lax.cond` must have equal types, even if the caller enables float64."""
    return inputs.astype(jnp.float32), z_t.astype(jnp.int32), *(alpha.astype(jnp.float32) for alpha in alphas)


def duo_base(ctx: Objective) -> LossFn:
    """Returns the discrete NELBO of uniform-state diffusion (The Diffusion Duality, f_Duo).

    Each row has one time t, and z_t ~ q(z_t | x) = Cat(alpha_t x + (1 - alpha_t) / K). The loss is in nats per token.
    """

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step  # the loss is the same at every step
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x, (alpha_t, dalpha_t) = batch["tokens"], ctx.draw_alpha(key_t, batch["mask"])
        z_t = keep_given(uniform.q_sample(key_z, x, alpha_t, ctx.network.vocab_size), batch)
        return ctx.uniform_nelbo(params, key_dropout, z_t, z_t, (alpha_t, dalpha_t), batch)

    return loss_fn


def duo(ctx: Objective) -> LossFn:
    """Returns Duo's loss: until `curriculum.end` the NELBO under the Gaussian curriculum, afterwards the discrete one.

    In the curriculum z_t = argmax(w_t) of the Gaussian latent w_t, alpha_t = T(gamma_t), and the network reads the relaxed
    input softmax(w_t / tau) in place of z_t. Both phases are one program with one pass through the network: the (traced)
    step only chooses what precedes that pass.
    """
    net, gaussian, chosen = ctx.network, ctx.gaussian, ctx.gaussian.curriculum

    def relaxed(
        params: Weights, key: jax.Array, x: jax.Array, gamma: jax.Array, tau: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the embedded relaxed input `[B, L, D]` and z_t `[B, L]`."""
        if k := gaussian.entries(net.vocab_size):
            mix, ids, z_t = duality.tempered_topk(key, x, gamma, tau, k, net.vocab_size)
            return ctx.mixed(params, mix, ids), z_t

        def in_full(params: Weights, keys: jax.Array, x: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
            eps = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (net.vocab_size,))))(keys)
            w = duality.latent_from_noise(eps, x, gamma)
            return net.embed(params, w / tau), jnp.argmax(w, axis=-1).astype(jnp.int32)

        chunk = net.chunk(*x.shape, ctx.shards)

        def rows(params: Weights, keys: jax.Array, x: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
            return head.in_chunks(functools.partial(in_full, params), keys, x, gamma, chunk=chunk)

        args = params, token_keys(key, x.shape), x, per_token(gamma, x.shape)
        return head.on_rows(rows, ctx.mesh)(*args)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        t = ctx.times(key_t, batch["mask"])

        def curriculum() -> tuple[jax.Array, ...]:
            tau = duality.tau(step, chosen.start, chosen.end, chosen.tau_log10_start, chosen.tau_log10_end)
            inputs, z_t = relaxed(params, key_z, x, gaussian.gamma(t), tau)
            return _as_32(inputs, z_t, *gaussian.alpha(t, net.vocab_size))

        def discrete() -> tuple[jax.Array, ...]:
            alpha_t, dalpha_t = ctx.schedule.alpha(t), ctx.schedule.dalpha(t)
            z_t = uniform.q_sample(key_z, x, alpha_t, net.vocab_size)
            return _as_32(ctx.embed(params, z_t), z_t, alpha_t, dalpha_t)

        inputs, z_t, *alphas = jax.lax.cond(step < chosen.end, curriculum, discrete)
        return ctx.uniform_nelbo(params, key_dropout, inputs, z_t, tuple(alphas), batch)

    return loss_fn


def dcd(ctx: Objective, teacher: Weights) -> LossFn:
    """Returns the loss of discrete consistency distillation (The Diffusion Duality, algorithm 1).

    One noise eps gives z_t at t and z_s at s = t - dt. The student at (z_t, t) learns the prediction of the teacher, which
    is frozen and has no dropout, at (z_s, s). dt grows with the step.
    """
    net, gaussian, chosen = ctx.network, ctx.gaussian, ctx.gaussian.distillation
    divergence = distillation.kl_backward if chosen.kl == "backward" else distillation.kl_forward

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        if chosen.dt == "doubling":
            dt = distillation.doubling_dt(step, chosen.round_length, chosen.n_steps)
        else:
            dt = distillation.linear_dt(step, gaussian.steps, chosen.dt_start, chosen.dt_end)
        t, s = distillation.pair_times(ctx.times(key_t, batch["mask"]), dt)
        z_t, z_s = distillation.trajectory_pair(key_z, x, gaussian.gamma(t), gaussian.gamma(s), net.vocab_size)

        def hidden(weights: Weights, z: jax.Array, t: jax.Array, dropout: jax.Array | None) -> jax.Array:
            sigma = schedules.sigma(gaussian.alpha(t, net.vocab_size)[0])
            return net.hidden(weights, ctx.embed(weights, z), sigma, dropout, by_rows=ctx.by_rows)

        def token_loss(student_logits: jax.Array, teacher_hidden: jax.Array, teacher_head: head.Head) -> jax.Array:
            return divergence(student_logits, head.padded_head_logits(teacher_hidden, teacher_head))

        student_hidden = hidden(params, z_t, t, ctx.dropout(key_dropout))
        teacher_hidden = hidden(teacher, z_s, s, None)
        teacher_head = head.padded_head(teacher["head"], net.dtype)  # once for all chunks
        return ctx.mean_over_tokens(
            params, student_hidden, batch["mask"], token_loss, teacher_hidden, constants=(teacher_head,), networks=2
        )

    return loss_fn


def _masked_loss(
    ctx: Objective, token_loss: Callable[..., jax.Array], sigma: Callable[[jax.Array], jax.Array]
) -> LossFn:
    """Returns the mean of `token_loss(logits, z_t, x, alpha_t, alpha'_t)` for a network conditioned on `sigma(alpha_t)`."""

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x, (z_t, alpha_t, dalpha_t) = batch["tokens"], ctx.draw_masked(key_t, key_z, batch)
        hidden = ctx.hidden(params, key_dropout, z_t, sigma(alpha_t), batch)
        return ctx.mean_over_tokens(
            params, hidden, batch["mask"], token_loss, z_t, x, *_per_token(x, alpha_t, dalpha_t)
        )

    return loss_fn


def mdlm(ctx: Objective) -> LossFn:
    """Returns MDLM's NELBO (Sahoo et al., 2024): masked diffusion with SUBS; the network does not see the time."""
    token_loss = functools.partial(absorbing.mdlm_nelbo_from_logits, mask_id=ctx.network.mask_id)
    return _masked_loss(ctx, token_loss, sigma=jnp.zeros_like)


def sedd(ctx: Objective) -> LossFn:
    """Returns SEDD absorb's denoising score entropy (Lou et al., 2024)."""

    def token_loss(logits: jax.Array, z_t: jax.Array, x: jax.Array, alpha: jax.Array, dalpha: jax.Array) -> jax.Array:
        log_score = absorbing.sedd_log_score(logits, z_t, alpha)
        return absorbing.sedd_nelbo(log_score, z_t, x, alpha, dalpha, ctx.network.mask_id)

    return _masked_loss(ctx, token_loss, sigma=schedules.sigma)


def d3pm(ctx: Objective) -> LossFn:
    """Returns D3PM absorb's T-step bound with its reconstruction term (Austin et al., 2021); alpha_t = 1 - t."""
    net, n_steps = ctx.network, ctx.network.d3pm_steps
    token_loss = functools.partial(absorbing.d3pm_nelbo, mask_id=net.mask_id, n_steps=n_steps)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        key_t, key_z, key_chain, key_clean = jax.random.split(key, 4)
        x = batch["tokens"]
        # The chain's times are 1/T, 2/T, ..., 1.
        t = jnp.clip(jnp.ceil(ctx.times(key_t, batch["mask"], 0.0) * n_steps), 1, n_steps) / n_steps
        alpha_t = 1.0 - t
        z_t = keep_given(absorbing.q_sample(key_z, x, alpha_t, net.mask_id), batch)
        # At t = 1, alpha is 0 and sigma infinite; the network gets the sigma of alpha = eps instead.
        sigma = schedules.sigma(jnp.maximum(alpha_t, net.eps))
        hidden = ctx.hidden(params, key_chain, z_t, sigma, batch)
        chain, aux = ctx.mean_over_tokens(params, hidden, batch["mask"], token_loss, z_t, x, *_per_token(x, alpha_t))
        hidden = ctx.hidden(params, key_clean, x, jnp.zeros_like(t), batch)
        reconstruction, aux_clean = ctx.mean_over_tokens(
            params, hidden, batch["mask"], absorbing.d3pm_reconstruction, x
        )
        return chain + reconstruction, aux | {"nll": aux["nll"] + aux_clean["nll"]}

    return loss_fn


def ar(ctx: Objective) -> LossFn:
    """Returns a causal network's next-token cross-entropy, which is exact; BOS, the first token, is given."""
    token_loss = functools.partial(absorbing.ar_nll, mask_id=ctx.network.mask_id)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        x = batch["tokens"]
        # The last prediction is not used, but attention and matrix products are faster at the full, even length.
        hidden = ctx.hidden(params, key, x, None, batch)[:, :-1]
        return ctx.mean_over_tokens(params, hidden, batch["mask"][:, 1:], token_loss, x[:, 1:])

    return loss_fn


_LOSSES = {"duo_base": duo_base, "duo": duo, "mdlm": mdlm, "sedd": sedd, "d3pm": d3pm, "ar": ar}
# The bound that measures held-out likelihood, for algorithms whose training loss is another.
_BOUNDS = {"duo": duo_base, "dcd": duo_base}


def training_loss(config: ConfigDict, network: Network, *, mesh: Mesh | None = None) -> Callable[[Any], LossFn]:
    """Returns `teacher -> loss_fn` for `config.algo.name`; only `dcd` uses the teacher."""
    algo = network.algo
    gaussian = Gaussian.from_config(config, network.vocab_size) if algo in ("duo", "dcd") else None
    ctx = Objective(network, gaussian, train=True, mesh=mesh)
    if algo == "dcd":
        return lambda teacher: dcd(ctx, teacher)
    return lambda teacher: _LOSSES[algo](ctx)


def evaluation_loss(network: Network, *, mesh: Mesh | None = None) -> LossFn:
    """Returns the bound on the negative log-likelihood that the network's algorithm is evaluated with."""
    return _BOUNDS.get(network.algo, _LOSSES.get(network.algo))(Objective(network, mesh=mesh))
