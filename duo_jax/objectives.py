"""What is minimised: for each algorithm one pure `loss_fn(params, batch, key, step) -> (loss, aux)`.

`params` are a network's weights, `batch` holds `tokens` and `mask`, both `[B, L]`, and `aux` the sum of the loss over the
tokens that the mask keeps (nats) and their number, from which averages over many batches are made. The vocabulary is
visited in chunks of tokens; nothing here holds a `[B, L, K]`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from duo_jax.diffusion import absorbing, distillation, duality, operators, schedules, uniform
from duo_jax.diffusion.arrays import per_token, token_keys
from duo_jax.errors import UserError
from duo_jax.models import head
from duo_jax.models.network import Network, Weights

Batch = dict[str, jax.Array]
Aux = dict[str, jax.Array]
LossFn = Callable[[Weights, Batch, jax.Array, jax.Array], tuple[jax.Array, Aux]]


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The Gaussian side of the duality, for `duo` and `dcd`; static.

    Attributes:
        gamma_min, gamma_max: the range of gamma_t; alpha_t = T(gamma_t) falls from one end to the other.
        operator: the form of T, one of `operators.NAMES`.
        curriculum: `full` (the whole softmax) or `topk` (the efficient curriculum of paper II).
        start, end: the steps between which tau anneals; from `end` on, the loss is the discrete one.
        tau_log10_start, tau_log10_end: log10 of the softmax temperature tau there.
        k: how many tokens `topk` keeps.
        dt: `doubling` or `linear`: how the distillation's step grows.
        round_length: steps after which the teacher becomes the student and, if doubling, dt doubles.
        n_steps: T; the first dt is 1/T.
        dt_start, dt_end: of the linear growth, over `max_steps` steps.
        kl: `backward`, KL(student || teacher), or `forward`.
    """

    gamma_min: float
    gamma_max: float
    operator: str
    curriculum: str
    start: int
    end: int
    tau_log10_start: float
    tau_log10_end: float
    k: int
    dt: str
    round_length: int
    n_steps: int
    dt_start: float
    dt_end: float
    max_steps: int
    kl: str

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> Gaussian:
        """Returns the settings of `config.algo`; a range of gamma that is not given is found for the vocabulary."""
        algo = config.algo
        low, high = (
            operators.inverse(alpha, vocab_size) if given is None else given
            for given, alpha in ((algo.gamma_min, algo.alpha_max), (algo.gamma_max, algo.alpha_min))
        )
        if not low < high:
            raise UserError(f"config.algo.gamma_min = {low:.3f} must lie below config.algo.gamma_max = {high:.3f}.")
        curriculum, distil = algo.curriculum, algo.distillation
        return cls(
            gamma_min=low,
            gamma_max=high,
            operator=algo.operator,
            curriculum=curriculum.kind,
            start=curriculum.start,
            end=curriculum.end,
            tau_log10_start=curriculum.tau_log10_start,
            tau_log10_end=curriculum.tau_log10_end,
            k=curriculum.k,
            dt=distil.dt,
            round_length=distil.round_length,
            n_steps=distil.n_steps,
            dt_start=distil.dt_start,
            dt_end=distil.dt_end,
            max_steps=config.train.steps,
            kl=distil.kl,
        )

    def gamma(self, t: jax.Array) -> jax.Array:
        """Returns gamma_t."""
        return duality.gamma(t, self.gamma_min, self.gamma_max)

    def alpha(self, t: jax.Array, vocab_size: int) -> tuple[jax.Array, jax.Array]:
        """Returns alpha_t = T(gamma_t) and its derivative in t."""
        operator = operators.by_name(self.operator, vocab_size, self.gamma_min, self.gamma_max)
        gamma = self.gamma(t)
        return operator.alpha(gamma), operator.dalpha(gamma) * (self.gamma_max - self.gamma_min)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What every algorithm's loss is made from; static.

    Attributes:
        network: the sizes, the schedule and the range of t.
        gaussian: used by `duo` and `dcd`.
        train: whether dropout acts.
        shards: how many devices the batch is split over.
    """

    network: Network
    gaussian: Gaussian | None = None
    train: bool = False
    shards: int = 1

    @property
    def schedule(self) -> schedules.Schedule:
        """The noise schedule of the discrete process."""
        return schedules.by_name(self.network.schedule, self.network.eps)

    def times(self, key: jax.Array, mask: jax.Array, eps: float | None = None) -> jax.Array:
        """Returns one time a row `[B]` in [eps, 1], low-discrepancy over the rows of the whole batch that count.

        Rows that only fill up a batch, whose `mask [B, L]` is 0, take no share of the times: those of the others would
        otherwise not cover [eps, 1].
        """
        counts = jnp.any(mask > 0, axis=1)
        rank = jnp.cumsum(counts) - counts
        share = (rank + jax.random.uniform(key)) / jnp.maximum(jnp.sum(counts), 1)
        eps = self.network.eps_t if eps is None else eps
        return eps + (1.0 - eps) * jnp.minimum(share, 1.0)

    def dropout(self, key: jax.Array) -> jax.Array | None:
        """Returns the key for dropout, or None where it does not act."""
        return key if self.train else None

    def nll(
        self,
        params: Weights,
        key: jax.Array,
        inputs: jax.Array,
        sigma: jax.Array | None,
        visitor: Callable[..., jax.Array],
        *per_token: jax.Array,
    ) -> jax.Array:
        """Returns `visitor(logits, *per_token)`, `[B, L]`, of the network on `inputs`."""
        predict = self.network.predict(params, dropout_key=self.dropout(key), shards=self.shards)
        return predict(inputs, sigma, visitor, *per_token)


def _mean(nll: jax.Array, mask: jax.Array) -> tuple[jax.Array, Aux]:
    """Averages nats per token `[B, L]` over the tokens that count."""
    mask = mask.astype(nll.dtype)
    # A token that is left out may cost infinitely much, as PAD does where it cannot be predicted; 0 times that is NaN.
    total, tokens = jnp.sum(jnp.where(mask > 0, nll * mask, 0.0)), jnp.sum(mask)
    return total / jnp.maximum(tokens, 1), {"nll": total, "tokens": tokens}


def _spread(x: jax.Array, *values: jax.Array) -> tuple[jax.Array, ...]:
    """Gives each token its row's value."""
    return tuple(per_token(value, x.shape) for value in values)


def duo_base(this: Objective) -> LossFn:
    """Returns the discrete NELBO of uniform-state diffusion (The Diffusion Duality, f_Duo).

    Each row has one time t; z_t ~ q(z_t | x) = Cat(alpha_t x + (1 - alpha_t) / K); the loss is in nats per token.
    """

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step  # the same objective from the first step to the last
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        t = this.times(key_t, batch["mask"])
        alpha_t, dalpha_t = this.schedule.alpha(t), this.schedule.dalpha(t)
        z_t = uniform.q_sample(key_z, x, alpha_t, this.network.vocab_size)
        nll = this.nll(
            params,
            key_dropout,
            z_t,
            schedules.sigma(alpha_t),
            uniform.nelbo_from_logits,
            z_t,
            x,
            *_spread(x, alpha_t, dalpha_t),
        )
        return _mean(nll, batch["mask"])

    return loss_fn


def duo(this: Objective) -> LossFn:
    """Returns Duo's loss: until `curriculum.end` the NELBO under the Gaussian curriculum, afterwards the discrete one.

    In the curriculum z_t = argmax(w_t) of the Gaussian latent w_t, alpha_t = T(gamma_t), and the network reads the relaxed
    input softmax(w_t / tau) in place of z_t. Both phases are one program with one pass through the network: only what
    precedes it is chosen by the (traced) step.
    """
    net, gaussian = this.network, this.gaussian

    def relaxed(
        params: Weights, key: jax.Array, x: jax.Array, gamma: jax.Array, tau: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Returns the embedded relaxed input `[B, L, D]` and z_t `[B, L]`."""
        if gaussian.curriculum == "topk":
            mix, ids, z_t = duality.tempered_topk(key, x, gamma, tau, gaussian.k, net.vocab_size)
            return net.embed(params, ids, mix), z_t

        def piece(keys: jax.Array, x: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
            eps = jax.vmap(jax.vmap(lambda k: jax.random.normal(k, (net.vocab_size,))))(keys)
            w = duality.latent_from_noise(eps, x, gamma)
            return net.embed(params, w / tau), jnp.argmax(w, axis=-1).astype(jnp.int32)

        chunk = net.chunk(x.shape[0], this.shards)
        return head.in_chunks(piece, token_keys(key, x.shape), x, per_token(gamma, x.shape), chunk=chunk)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        t = this.times(key_t, batch["mask"])

        def curriculum() -> tuple[jax.Array, ...]:
            tau = duality.tau(step, gaussian.start, gaussian.end, gaussian.tau_log10_start, gaussian.tau_log10_end)
            inputs, z_t = relaxed(params, key_z, x, gaussian.gamma(t), tau)
            return inputs, z_t, *gaussian.alpha(t, net.vocab_size)

        def discrete() -> tuple[jax.Array, ...]:
            alpha_t, dalpha_t = this.schedule.alpha(t), this.schedule.dalpha(t)
            z_t = uniform.q_sample(key_z, x, alpha_t, net.vocab_size)
            return net.embed(params, z_t), z_t, alpha_t, dalpha_t

        inputs, z_t, alpha_t, dalpha_t = jax.lax.cond(step < gaussian.end, curriculum, discrete)
        nll = this.nll(
            params,
            key_dropout,
            inputs,
            schedules.sigma(alpha_t),
            uniform.nelbo_from_logits,
            z_t,
            x,
            *_spread(x, alpha_t, dalpha_t),
        )
        return _mean(nll, batch["mask"])

    return loss_fn


def dcd(this: Objective, teacher: Weights) -> LossFn:
    """Returns the loss of discrete consistency distillation (The Diffusion Duality, algorithm 1).

    One noise eps gives z_t at t and z_s at s = t - dt; the student at (z_t, t) learns what the teacher, frozen and without
    dropout, predicts at (z_s, s). dt grows with the step.
    """
    net, gaussian = this.network, this.gaussian
    divergence = distillation.kl_backward if gaussian.kl == "backward" else distillation.kl_forward

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        if gaussian.dt == "doubling":
            dt = distillation.doubling_dt(step, gaussian.round_length, gaussian.n_steps)
        else:
            dt = distillation.linear_dt(step, gaussian.max_steps, gaussian.dt_start, gaussian.dt_end)
        t, s = distillation.pair_times(this.times(key_t, batch["mask"]), dt)
        z_t, z_s = distillation.trajectory_pair(key_z, x, gaussian.gamma(t), gaussian.gamma(s), net.vocab_size)

        def hidden(weights: Weights, z: jax.Array, t: jax.Array, dropout: jax.Array | None) -> jax.Array:
            sigma = schedules.sigma(gaussian.alpha(t, net.vocab_size)[0])
            return net.hidden(weights, net.embed(weights, z), sigma, dropout)

        def compare(student: jax.Array, theirs: jax.Array) -> jax.Array:
            return divergence(net.logits(params, student), jax.lax.stop_gradient(net.logits(teacher, theirs)))

        student = hidden(params, z_t, t, this.dropout(key_dropout))
        theirs = jax.lax.stop_gradient(hidden(teacher, z_s, s, None))
        chunk = net.chunk(x.shape[0], this.shards, networks=2)
        return _mean(head.in_chunks(compare, student, theirs, chunk=chunk), batch["mask"])

    return loss_fn


def mdlm(this: Objective) -> LossFn:
    """Returns MDLM's NELBO (Sahoo et al., 2024): masked diffusion with SUBS; the network is not told the time."""
    net = this.network
    visitor = functools.partial(absorbing.mdlm_nelbo_from_logits, mask_id=net.mask_id)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        key_t, key_z, key_dropout = jax.random.split(key, 3)
        x = batch["tokens"]
        t = this.times(key_t, batch["mask"])
        alpha_t, dalpha_t = this.schedule.alpha(t), this.schedule.dalpha(t)
        z_t = absorbing.q_sample(key_z, x, alpha_t, net.mask_id)
        spread = _spread(x, alpha_t, dalpha_t)
        return _mean(this.nll(params, key_dropout, z_t, jnp.zeros_like(t), visitor, z_t, x, *spread), batch["mask"])

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
        x = batch["tokens"]
        t = this.times(key_t, batch["mask"])
        alpha_t, dalpha_t = this.schedule.alpha(t), this.schedule.dalpha(t)
        z_t = absorbing.q_sample(key_z, x, alpha_t, net.mask_id)
        spread = _spread(x, alpha_t, dalpha_t)
        nll = this.nll(params, key_dropout, z_t, schedules.sigma(alpha_t), visitor, z_t, x, *spread)
        return _mean(nll, batch["mask"])

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
        z_t = absorbing.q_sample(key_z, x, alpha_t, net.mask_id)
        # At t = 1 alpha is 0 and its sigma infinite; the network is told the last finite one.
        sigma = schedules.sigma(jnp.maximum(alpha_t, net.eps))
        nll = this.nll(params, key_dropout[0], z_t, sigma, visitor, z_t, x, *_spread(x, alpha_t))
        clean = this.nll(params, key_dropout[1], x, jnp.zeros_like(t), absorbing.d3pm_reconstruction, x)
        return _mean(nll + clean, batch["mask"])

    return loss_fn


def ar(this: Objective) -> LossFn:
    """Returns the cross-entropy of the next token, exact, of a causal network; BOS, the first token, is given."""
    visitor = functools.partial(absorbing.ar_nll, mask_id=this.network.mask_id)

    def loss_fn(params: Weights, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Aux]:
        del step
        x = batch["tokens"]
        return _mean(this.nll(params, key, x[:, :-1], None, visitor, x[:, 1:]), batch["mask"][:, 1:])

    return loss_fn


_LOSSES = {"duo_base": duo_base, "duo": duo, "mdlm": mdlm, "sedd": sedd, "d3pm": d3pm, "ar": ar}
# The bound that held-out likelihood is measured with, where it is not the training loss.
_BOUNDS = {"duo": duo_base, "dcd": duo_base}


def training_loss(config: ConfigDict, network: Network, *, shards: int = 1) -> Callable[[Any], LossFn]:
    """Returns `teacher -> loss_fn` for `config.algo.name`; the teacher is used by `dcd` alone."""
    algo = network.algo
    gaussian = Gaussian.from_config(config, network.vocab_size) if algo in ("duo", "dcd") else None
    this = Objective(network, gaussian, train=True, shards=shards)
    if algo == "dcd":
        return lambda teacher: dcd(this, teacher)
    return lambda teacher: _LOSSES[algo](this)


def evaluation_loss(network: Network, *, shards: int = 1) -> LossFn:
    """Returns the bound on the negative log-likelihood that the network's algorithm is evaluated with."""
    return _BOUNDS.get(network.algo, _LOSSES.get(network.algo))(Objective(network, shards=shards))
