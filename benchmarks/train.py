"""The cost of a training step, for any config and algorithm:

    python -m benchmarks.train --config=configs/tiny.py --config.train.batch_size=8 --config.model.length=128
    python -m benchmarks.train --config=configs/tiny.py --cases=duo:full,duo:topk,mdlm --out=runs/bench
    python -m benchmarks.train --config=configs/tiny.py --sweep=batch:1,2,4,8

The step is the one that training compiles, on random tokens. Cases are algorithms, and for duo the phases `duo:full`,
`duo:topk` (the curriculum) and `duo:discrete` (after it); `--cases=all` takes them all. A sweep measures the growth with
`batch`, `length`, `vocab` or `blocks`. Each measurement has a process of its own.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks import flops, measure, programs, report, sweeps
from duo_jax import cli, gaussian
from duo_jax.errors import UserError

COLUMNS = {
    "case": "case", "batch": "B", "length": "L", "vocab": "K", "blocks": "blocks", "dtype": "dtype",
    "median_ms": "step ms", "best_ms": "best ms", "queued_ms": "queued ms", "tokens_per_s": "tokens/s",
    "mfu_percent": "MFU %", "peak_gflops": "matmul GFLOP/s", "rss_baseline_mib": "base RSS MiB",
    "rss_mib": "RSS MiB", "device_peak_mib": "device MiB", "temporary_mib": "temp MiB", "total_mib": "program MiB",
    "compile_s": "compile s", "error": "error",
}  # fmt: skip
_SAME = ("case",)


def measure_case(config: ConfigDict, case: programs.Case, vocab_size: int, steps: int) -> dict[str, Any]:
    """Returns the cost of a case; to be run in a process of its own.

    The matrix units' peak is measured before and after the timed steps, once the memory has been read.
    """
    baseline = measure.rss()
    config = case.apply(config)
    plan = programs.training(config, vocab_size)
    network = plan.network
    row: dict[str, Any] = {
        "case": str(case), "batch": config.train.batch_size, "length": network.length, "vocab": vocab_size,
        "blocks": network.blocks, "dim": network.dim, "dtype": network.dtype.name,
        "environment": measure.environment(),
    }  # fmt: skip
    try:
        # In the order of training.
        state, batch = plan.initial(None), programs.batch(config, plan)
        step, compile_s = measure.compiled(plan.lowered)
        cli.release_memory()
        row |= {"compile_s": compile_s, **measure.memory_columns(step), "rss_compiled_mib": measure.mib(measure.rss())}
        for _ in range(2):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        row |= {
            "rss_baseline_mib": measure.mib(baseline),
            "rss_mib": measure.mib(measure.rss()),
            "device_peak_mib": measure.mib(measure.device_peak()),
        }
        before = measure.matmul_peak(network.dtype)
        taken, queued = step_times(step, state, batch, steps)
        after = measure.matmul_peak(network.dtype)
    except jax.errors.JaxRuntimeError as error:
        if not measure.out_of_memory(error):
            raise
        return row | {"error": "out of memory"}
    dense = case.phase == "full" and gaussian.Gaussian.from_config(config, vocab_size).entries(vocab_size) is None
    work = config.train.batch_size * flops.train_row(network, network.length, relaxed=dense)
    tokens = config.train.batch_size * network.length
    speed = measure.speed_columns(taken, tokens, work, (before, after), plan.mesh.size)
    return row | speed | {"queued_ms": 1e3 * queued, "times_s": taken}


def step_times(step: Any, state: Any, batch: dict[str, jax.Array], steps: int) -> tuple[list[float], float]:
    """Returns the seconds of each step from dispatch to result, and of a step while the next one is always queued.

    Training always has one step queued, so that a fast device does not wait for the host's dispatch.
    """
    taken = []
    for _ in range(steps):
        start = time.perf_counter()
        state, waiting = step(state, batch)
        jax.block_until_ready((state, waiting))
        taken.append(time.perf_counter() - start)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch)
        jax.block_until_ready(waiting)
        waiting = metrics
    jax.block_until_ready(waiting)
    return taken, (time.perf_counter() - start) / steps


def run(config: ConfigDict, options: Any) -> dict[str, Any]:
    """Measures what the flags ask for; returns the report of `sweeps.measure_all`."""
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}; it must be at least 1.")
    names, sweep = options.cases, options.sweep
    chosen = programs.all_cases() if names == ["all"] else [programs.Case.parse(name) for name in names]
    variants = sweeps.variants(config, programs.vocabulary(config, options.vocab_size), sweep, "train")
    cases = [
        (variant, case, size, options.steps)
        for case, (variant, size) in itertools.product(chosen or programs.usual_cases(config), variants)
    ]
    about = {"steps": options.steps}
    return sweeps.measure_all(measure_case, cases, "B = {batch}", sweep=sweep, same=_SAME, about=about)


def text(found: dict[str, Any]) -> str:
    """Returns the report as text."""
    return sweeps.text(found, "Training", f"{found['steps']} steps", COLUMNS, _SAME)


if __name__ == "__main__":
    flags.DEFINE_list("cases", [], "What to train: duo:full,duo:topk,duo:discrete,duo_base,...; all; the config's own.")
    flags.DEFINE_integer("steps", 10, "Steps to time.")
    sweeps.define_flag()
    report.main("train", run, text)
