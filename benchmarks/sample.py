"""The cost of sampling, for any config and every sampler:

    python -m benchmarks.sample --config=configs/tiny.py --config.sample.batch_size=4 --config.model.length=128
    python -m benchmarks.sample --config=configs/tiny.py --samplers=all --n_steps=8,64 --out=runs/bench
    python -m benchmarks.sample --config=configs/owt.py --samplers=psi,mdlm:ancestral_cache --top_p=1.0,0.9

The program is the one that `duo_jax.sample` compiles, with random weights and a batch of `config.sample.batch_size`
texts. A sampler is used with the config's algorithm or, if that does not have it, with its usual one: `ancestral_cache`
with mdlm, `analytic` with sedd, `autoregressive` with ar; `mdlm:psi` names both. Steps, noise removals and top_p may be
lists, and `--sweep=length:64,128` varies batch, length, vocab or blocks. Each measurement has a process of its own.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks import flops, measure, programs, report, sweeps
from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.sampling.settings import SAMPLERS, Settings

COLUMNS = {
    "case": "case", "n_steps": "steps", "noise_removal": "removal", "top_p": "top_p", "batch": "B", "length": "L",
    "vocab": "K", "dtype": "dtype", "calls": "calls",
    "predictions_percent": "asked %", "seconds_per_text": "s/text", "median_ms": "batch ms",
    "call_ms": "call ms", "tokens_per_s": "tokens/s", "mfu_percent": "MFU %", "peak_gflops": "matmul GFLOP/s",
    "rss_baseline_mib": "base RSS MiB", "rss_mib": "RSS MiB", "device_peak_mib": "device MiB",
    "temporary_mib": "temp MiB", "total_mib": "program MiB", "compile_s": "compile s", "error": "error",
}  # fmt: skip
_SAME = ("case", "n_steps", "noise_removal", "top_p")
# The algorithm to use a sampler with if the config's own does not have it.
_USUAL = {"ancestral": "duo", "psi": "duo", "ancestral_cache": "mdlm", "analytic": "sedd", "autoregressive": "ar"}


@dataclasses.dataclass(frozen=True)
class Case:
    """An algorithm's network with one of its samplers."""

    algo: str
    sampler: str

    def __str__(self) -> str:
        return f"{self.algo}:{self.sampler}"


def fits(algo: str, sampler: str) -> bool:
    """Returns whether a network of the algorithm can use the sampler."""
    network = Network(algo, 3, 2, 3, 2, 1, 1, 1, 0.0)
    try:
        Settings.for_network(network, 1, sampler=sampler)
    except UserError:
        return False
    return True


def all_cases() -> list[Case]:
    """Returns every algorithm with every sampler that fits it; duo stands for all networks that are sampled as it is."""
    algos = [algo for algo in config_lib.ALGORITHMS if algo not in ("duo_base", "dcd")]
    cases = [Case(algo, sampler) for algo in algos for sampler in SAMPLERS if fits(algo, sampler)]
    return [case for case in cases if case != Case("ar", "ancestral")]  # the same as autoregressive


def parse_case(text: str, algo: str) -> Case:
    """Returns the case that `psi` or `mdlm:psi` names, where `algo` is the config's.

    Raises:
        UserError: there is no such sampler, or it does not fit the algorithm.
    """
    named, colon, sampler = text.rpartition(":")
    if sampler not in SAMPLERS or (colon and not (named in config_lib.ALGORITHMS and fits(named, sampler))):
        names = ", ".join(map(str, all_cases()))
        raise UserError(
            f"--samplers: there is no sampler {text!r}; choose from {', '.join(SAMPLERS)}, {names}, or all."
        )
    return Case(named or (algo if fits(algo, sampler) else _USUAL[sampler]), sampler)


def settings_of(
    cases: Sequence[Case], n_steps: Sequence[int], removals: Sequence[str], top_ps: Sequence[float]
) -> list[dict[str, Any]]:
    """Returns the config's settings for every measurement.

    An autoregressive network takes one call per token and has no noise to remove: its steps and removals are not varied.
    """
    found = []
    for case, n, removal, top_p in itertools.product(cases, n_steps, removals, top_ps):
        settings = {"sample.n_steps": n, "sample.noise_removal": removal}
        if case.algo == "ar":
            settings = {"sample.n_steps": n_steps[0], "sample.noise_removal": "ancestral"}
        settings |= {"algo.name": case.algo, "sample.sampler": case.sampler, "sample.top_p": top_p}
        if settings not in found:
            found.append(settings)
    return found


def measure_case(config: ConfigDict, vocab_size: int, repeats: int) -> dict[str, Any]:
    """Returns the cost of sampling as `config.sample` says; to be run in a process of its own."""
    baseline = measure.rss()
    plan = programs.sampler(config, vocab_size)
    network, sample_config = plan.network, config.sample
    given = programs.nothing_given(config, plan)
    rows, length = given.tokens.shape
    row: dict[str, Any] = {
        "case": str(Case(network.algo, sample_config.sampler)),
        "n_steps": None if network.algo == "ar" else sample_config.n_steps,
        "noise_removal": sample_config.noise_removal, "top_p": sample_config.top_p, "batch": rows, "length": length,
        "vocab": vocab_size, "blocks": network.blocks, "dim": network.dim, "dtype": network.dtype.name,
        "environment": measure.environment(),
    }  # fmt: skip
    try:
        weights, keys = programs.random_weights(plan.network, plan.whole), programs.keys(config, plan)
        args = weights, keys, given, programs.knobs(config), None
        jax.block_until_ready(args[0])
        measure.restart_peak()  # a user's weights come from a file; drawing random ones takes more memory than sampling
        sampler, compile_s = measure.compiled(plan.lowered)
        row |= {"compile_s": compile_s, **measure.memory_columns(sampler)}
        walk = sampler(*args)
        calls, predictions = int(walk.network_calls), int(walk.predictions)
        row |= {
            "rss_baseline_mib": measure.mib(baseline),
            "rss_mib": measure.mib(measure.rss()),
            "device_peak_mib": measure.mib(measure.device_peak()),
            "calls": calls,
            "predictions_percent": None if network.algo == "ar" else 100 * predictions / (calls * rows * length),
        }
        before = measure.matmul_peak(network.dtype)
        taken = measure.seconds(lambda: sampler(*args), repeats)
        after = measure.matmul_peak(network.dtype)
    except jax.errors.JaxRuntimeError as error:
        if not measure.out_of_memory(error):
            raise
        return row | {"error": "out of memory"}
    work = flops.sample(network, rows, length, calls, predictions)
    speed = measure.speed_columns(taken, rows * length, work, (before, after), plan.devices)
    per_call = {"call_ms": speed["median_ms"] / calls, "seconds_per_text": speed["median_ms"] / 1e3 / rows}
    return row | speed | per_call | {"times_s": taken}


def run(config: ConfigDict, options: Any) -> dict[str, Any]:
    """Measures what the flags ask for; returns the report of `sweeps.measure_all`."""
    if options.repeats < 1:
        raise UserError(f"--repeats is {options.repeats}; it must be at least 1.")
    sample_config, sweep = config.sample, options.sweep
    names = options.samplers or [sample_config.sampler]
    cases = all_cases() if names == ["all"] else [parse_case(name, config.algo.name) for name in names]
    settings = settings_of(
        cases,
        numbers("n_steps", options.n_steps, int) or [sample_config.n_steps],
        options.noise_removal or [sample_config.noise_removal],
        numbers("top_p", options.top_p, float) or [sample_config.top_p],
    )
    size = programs.vocabulary(config, options.vocab_size)
    cases = [
        (programs.changed(variant, changes), k, options.repeats)  # a mistake in any shows before the first is measured
        for changes in settings
        for variant, k in sweeps.variants(config, size, sweep, "sample")
    ]
    about = {"repeats": options.repeats}
    return sweeps.measure_all(measure_case, cases, "{calls} calls", sweep=sweep, same=_SAME, about=about)


def text(found: dict[str, Any]) -> str:
    """Returns the report as text."""
    return sweeps.text(found, "Sampling", f"{found['repeats']} batches", COLUMNS, _SAME)


def numbers(name: str, values: Sequence[str], kind: type) -> list[Any]:
    """Returns a flag's list as numbers.

    Raises:
        UserError: one of them is not a number.
    """
    try:
        return [kind(value) for value in values]
    except ValueError as error:
        raise UserError(f"--{name}={','.join(values)}: {error}.") from error


if __name__ == "__main__":
    flags.DEFINE_list("samplers", [], "Samplers, algorithm:sampler, or all; config.sample.sampler if not given.")
    flags.DEFINE_list("n_steps", [], "Steps, a list; config.sample.n_steps if not given.")
    flags.DEFINE_list("noise_removal", [], "Noise removals, a list; config.sample.noise_removal if not given.")
    flags.DEFINE_list("top_p", [], "Values of top_p, a list; config.sample.top_p if not given.")
    flags.DEFINE_integer("repeats", 5, "Batches to time.")
    sweeps.define_flag()
    report.main("sample", run, text)
