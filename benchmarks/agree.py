"""Checks whether this device computes what a CPU does, for any config:

    python -m benchmarks.agree --config=configs/owt.py --config.train.batch_size=4
    python -m benchmarks.agree --config=configs/tiny.py --cases=duo:topk,mdlm --samplers=duo:ancestral

A training step of every algorithm, as training compiles it, runs here, with the type and the attention that the config
chooses on this device, and on a CPU in float32, from the same weights, text and noise. The loss, the gradient, and the bound
of texts of several lengths must agree within the type's rounding. Then the samplers draw from a network whose predictions
are known, and a chi-squared test checks their draws. If anything disagrees, the exit status is 2.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import ConfigDict
from scipy import stats

from benchmarks import measure, programs, report
from benchmarks import sample as samplers
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood
from duo_jax.sampling import Settings, engine

# The relative rounding error of an element of a product, by type. A GPU multiplies float32 in TF32, which keeps as many
# digits as float16.
_ROUNDING = {"float32": 2.0**-11, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# The error that is allowed, in roundings: of a loss or bound, where they average out, and of a part of the gradient. This is
# ten times and twice the error of networks of 8 and 12 blocks.
_SCALAR, _GRADIENT = 0.25, 8
PARTS = ("embed", "blocks", "head", "rest")
# The loss scale in float16, small enough for the gradient not to overflow with untrained weights.
_LOSS_SCALE = 2.0**14
# One in a million correct samplers is called wrong.
_FALSE_ALARM = 1e-6
_FEWEST = 20  # draws expected in a bin of the chi-squared test

STEP_COLUMNS = {
    "case": "case", "dtype": "dtype", "loss": "loss", "loss_error": "loss off by", "bound_error": "bound",
    "scalar_allowed": "allowed", "embed_error": "gradient: embedding", "blocks_error": "blocks", "head_error": "head",
    "rest_error": "the rest", "gradient_allowed": "allowed", "agrees": "agrees",
}  # fmt: skip
DRAW_COLUMNS = {
    "case": "case", "top_p": "top_p", "draws": "draws", "bins": "bins", "chi_squared": "chi squared",
    "p_value": "p value", "agrees": "agrees",
}  # fmt: skip


def step_of(config: ConfigDict, case: programs.Case, vocab_size: int) -> dict[str, Any]:
    """Returns the loss and gradient of a first step of training, and the bound of ragged texts, on the default devices.

    The gradient is returned as the optimizer's first moment, which is proportional to it.
    """
    config = programs.changed(case.apply(config), {"train.clip": 1e9, "train.ema": 0.5})
    plan = programs.training(config, vocab_size)
    weights, batch = programs.random_weights(plan.network), programs.batch(config, plan)
    bound = likelihood.nll_sum(weights, _ragged(batch), jax.random.key(1), network=plan.network)
    state = plan.initial(weights)
    if case.algo == "dcd":  # a student that equals its teacher has hardly any gradient beside rounding
        state = state.replace(teacher=programs.random_weights(plan.network, seed=1))
    if scale := state.loss_scale:
        state = state.replace(loss_scale=scale.replace(scale=jnp.float32(_LOSS_SCALE)))
    state, metrics = plan.lowered.compile()(state, batch)
    gradient = {part: [] for part in PARTS}
    for name, tree in optax.tree.get(state.opt_state, "mu").items():
        gradient[_part(name)] += [np.ravel(x) for x in jax.tree.leaves(tree)]
    return {
        "dtype": plan.network.dtype.name,
        "environment": measure.environment(),
        "loss": float(metrics["loss"]),
        "bound": float(bound["nll"] / bound["tokens"]),
        "gradient": {part: np.concatenate(arrays) for part, arrays in gradient.items() if arrays},
    }


def _part(name: str) -> str:
    """Returns the part of `PARTS` that a group of weights belongs to; there may be several groups of blocks."""
    return name if name in PARTS else "blocks" if name.startswith("block") else "rest"


def _ragged(batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Returns texts whose first half is given, each row shorter than the one before."""
    tokens = np.asarray(batch["tokens"])
    rows, length = tokens.shape
    lengths = length - np.arange(rows) * (length // 2) // rows
    place = np.arange(length)
    counted = (place >= length // 2) & (place < np.maximum(lengths, length // 2 + 1)[:, None])
    return {"tokens": tokens, "mask": counted.astype(np.float32), "given": ~counted, "lengths": lengths}


def compare(here: dict[str, Any], there: dict[str, Any]) -> dict[str, Any]:
    """Returns a row: how far the step `here` is from the one `there`, and whether rounding explains that."""

    def off(ours: Any, theirs: Any) -> float:
        ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
        return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

    scalars = {name: off(here[name], there[name]) for name in ("loss", "bound")}
    parts = {part: off(here["gradient"][part], theirs) for part, theirs in there["gradient"].items()}
    rounding = _ROUNDING[here["dtype"]]
    scalar_allowed, gradient_allowed = _SCALAR * rounding, _GRADIENT * rounding
    return {
        "dtype": here["dtype"],
        "loss": there["loss"],
        **{f"{name}_error": error for name, error in (scalars | parts).items()},
        "scalar_allowed": scalar_allowed,
        "gradient_error": max(parts.values()),
        "gradient_allowed": gradient_allowed,
        # False for NaN.
        "agrees": all(error <= scalar_allowed for error in scalars.values())
        and all(error <= gradient_allowed for error in parts.values()),
    }


def draws_of(config: ConfigDict, vocab_size: int, least: int) -> dict[str, Any]:
    """Returns a row: whether a sampler's tokens, `least` or more, are distributed as they should be, on the default devices.

    The network's head is zero except for its bias, so that it predicts the same known p everywhere.
    """
    plan, sample_config = programs.sampler(config, vocab_size), config.sample
    network, given = plan.network, programs.nothing_given(config, plan)
    bias = 2.0 * np.random.default_rng(0).standard_normal(vocab_size).astype(np.float32)
    weights = jax.jit(network.init, out_shardings=plan.whole)(programs.key())
    weights["head"] = jax.device_put({"kernel": jnp.zeros_like(weights["head"]["kernel"]), "bias": bias}, plan.whole)
    program, knobs = plan.lowered.compile(), programs.knobs(config)
    free = ~np.asarray(given.held)
    counts, drawn = np.zeros(vocab_size, np.int64), 0
    while drawn < least:
        keys = programs.keys(config, plan, drawn)
        tokens = np.asarray(program(weights, keys, given, knobs, None).tokens)[free]
        counts, drawn = counts + np.bincount(tokens, minlength=vocab_size), drawn + tokens.size
    expected = drawn * _distribution(bias.astype(np.float64), network, plan.settings, sample_config.top_p)
    found = chi_squared(counts, expected)
    return found | {
        "case": f"{network.algo}:{sample_config.sampler}", "top_p": sample_config.top_p, "draws": drawn,
        "agrees": found["p_value"] >= _FALSE_ALARM, "environment": measure.environment(),
    }  # fmt: skip


def _distribution(logits: np.ndarray, network: Any, settings: Settings, top_p: float) -> np.ndarray:
    """Returns the probabilities `[K]` of a sampled token if every prediction has these logits, in float64."""
    if network.process != "uniform":
        logits = np.where(np.arange(logits.size) == network.mask_id, -np.inf, logits)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p)
    above = np.cumsum(p[order]) - p[order]
    p[order] = np.where(above <= top_p, p[order], 0.0)
    p /= p.sum()
    if network.process != "uniform":
        return p
    grid, q = engine.steps(settings), np.full(p.size, 1.0 / p.size)
    for alpha_t, alpha_s, kappa in np.asarray([grid.alpha_t, grid.alpha_s, grid.kappa], np.float64).T:
        again = alpha_s * _posterior(q, p, alpha_t, 1.0) + (1.0 - alpha_s) / p.size
        q = kappa * _posterior(q, p, alpha_t, alpha_s) + (1.0 - kappa) * again
    return q


def _posterior(q: np.ndarray, p: np.ndarray, alpha_t: float, alpha_s: float) -> np.ndarray:
    """Returns the distribution of z_s `[K]` after a step of the uniform-state posterior, from the distribution q of z_t.

    Computed in float64 and without the package's code, which it checks.
    q(z_s | z_t) is proportional to (stay [z_s = z_t] + jump) marginal.
    """
    stay, jump = alpha_t / alpha_s, (1.0 - alpha_t / alpha_s) / p.size
    marginal = alpha_s * p + (1.0 - alpha_s) / p.size
    weight = q / (stay * marginal + jump)
    return marginal * (stay * weight + jump * weight.sum())


def chi_squared(counts: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Returns the test of counts `[K]` against those expected; entries with few expected draws share a bin.

    The statistic is infinite if something impossible was drawn.
    """
    possible = expected > 0
    order = np.argsort(-expected[possible])
    bins = np.floor(np.cumsum(expected[possible][order]) / _FEWEST).astype(int)
    bins = np.unique(bins, return_inverse=True)[1]
    found, wanted = (np.bincount(bins, weights=x[possible][order]) for x in (counts, expected))
    # The last bin may expect too few draws; then it joins the one before.
    if wanted.size > 1 and wanted[-1] < _FEWEST:
        found, wanted = (np.append(x[:-2], x[-2:].sum()) for x in (found, wanted))
    statistic = float(np.sum((found - wanted) ** 2 / wanted))
    if counts[~possible].any():
        statistic = np.inf
    return {"bins": wanted.size, "chi_squared": statistic, "p_value": float(stats.chi2.sf(statistic, wanted.size - 1))}


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """Makes the CPU the only device of processes that are started inside."""
    before = os.environ.get("JAX_PLATFORMS")
    os.environ["JAX_PLATFORMS"] = "cpu"
    try:
        yield
    finally:
        os.environ.pop("JAX_PLATFORMS")
        if before is not None:
            os.environ["JAX_PLATFORMS"] = before


def run(config: ConfigDict, options: Any) -> dict[str, Any]:
    """Runs what the flags ask for; returns the environment, a row per training case and a row per draw."""
    if options.draws < 1:
        raise UserError(f"--draws is {options.draws}; it must be at least 1.")
    cases = [programs.Case.parse(name) for name in options.cases] or programs.all_cases()
    size = programs.vocabulary(config, options.vocab_size)
    one_cpu = {"precision": "float32", "model.attention": "xla", "mesh.data": -1, "mesh.fsdp": 1}
    exact = programs.changed(config, one_cpu)
    drawing = [
        programs.changed(
            config, {"algo.name": named.algo, "sample.sampler": named.sampler, "sample.top_p": top_p,
                     "sample.n_steps": 4, "sample.noise_removal": "ancestral", "model.blocks": 1}
        )
        for named in (samplers.parse_case(name, config.algo.name) for name in options.samplers)
        for top_p in (1.0, 0.9)
    ]  # fmt: skip
    steps, draws = [], []
    for case in cases:
        here = measure.in_fresh_process(step_of, config, case, size)
        with on_a_cpu():
            there = measure.in_fresh_process(step_of, exact, case, size)
        steps.append({"case": str(case), "environment": here["environment"], **compare(here, there)})
        print(f"{case}: gradient off by {steps[-1]['gradient_error']:.2g}", flush=True)
    for variant in drawing:
        draws.append(measure.in_fresh_process(draws_of, variant, size, options.draws))
        print(f"{draws[-1]['case']}, top_p = {draws[-1]['top_p']}: p value {draws[-1]['p_value']:.2g}", flush=True)
    rows = steps + draws
    return {"environment": rows[0]["environment"], "steps": steps, "draws": draws}


def text(found: dict[str, Any]) -> str:
    """Returns the report as text."""
    parts = [f"What {report.where(found['environment'])} computes, against float32 on a CPU; errors relative to that."]
    tables = (found["steps"], STEP_COLUMNS), (found["draws"], DRAW_COLUMNS)
    parts += [report.table(rows, columns) for rows, columns in tables if rows]
    return "\n\n".join(parts)


def check(found: dict[str, Any]) -> None:
    """Raises UserError if anything disagrees."""
    rows = found["steps"] + found["draws"]
    if wrong := [row["case"] for row in rows if not row["agrees"]]:
        raise UserError(f"{len(wrong)} of {len(rows)} disagree with a CPU: {', '.join(wrong)}; see the table.")


if __name__ == "__main__":
    flags.DEFINE_list("cases", [], "What to train, as for benchmarks.train; every algorithm if not given.")
    flags.DEFINE_list("samplers", ["duo:ancestral", "mdlm:ancestral", "ar:autoregressive"], "What to draw with.")
    flags.DEFINE_integer("draws", 20_000, "Tokens to draw with each sampler, at least.")
    report.main("agree", run, text, check)
