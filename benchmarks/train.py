"""What a training step costs, of any config and algorithm:

    python -m benchmarks.train --config=configs/tiny.py --config.train.batch_size=8 --config.model.length=128
    python -m benchmarks.train --config=configs/tiny.py --cases=duo:full,duo:topk,mdlm --out=runs/bench
    python -m benchmarks.train --config=configs/tiny.py --sweep=batch:1,2,4,8

The step is the one that training compiles, on random tokens. Cases are algorithms, and of duo the phases `duo:full`,
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


def measure_case(config: ConfigDict, case: programs.Case, vocab_size: int, steps: int) -> dict[str, Any]:
    """Returns what a case costs; of a process that does nothing else.

    The matrix units' peak is taken before and after the steps that are timed, and after the memory is read.
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
    """Returns the seconds of each step, from asking to result, and those a step takes with the next one queued.

    Training has one step queued always, which hides from a fast device the host's work of asking.
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
    """Returns what the flags ask for: where, and a row a measurement, and with a sweep the growth."""
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}; it must be at least 1.")
    names, sweep = options.cases, options.sweep
    chosen = programs.all_cases() if names == ["all"] else [programs.Case.parse(name) for name in names]
    variants = sweeps.variants(config, programs.vocabulary(config, options.vocab_size), sweep, "train")
    todo = list(itertools.product(chosen or programs.usual_cases(config), variants))
    rows = []
    for case, (variant, size) in todo:
        rows.append(measure.in_fresh_process(measure_case, variant, case, size, options.steps))
        print(f"{len(rows)} of {len(todo)}: {describe(rows[-1])}", flush=True)
    found = {"environment": rows[0]["environment"], "steps": options.steps, "rows": rows}
    return found | ({"growth": sweeps.growth(rows, sweep, ["case"])} if sweep else {})


def describe(row: report.Row) -> str:
    """Returns a line to read while the others are being measured."""
    if "error" in row:
        return f"{row['case']}: {row['error']}"
    return f"{row['case']}, B = {row['batch']}: {row['median_ms']:,.1f} ms, {row['tokens_per_s']:,.0f} tokens/s"


def text(found: dict[str, Any]) -> str:
    """Returns the report to read."""
    parts = [
        f"Training on {report.where(found['environment'])}, median of {found['steps']} steps; MFU is model FLOPs against "
        "the matmul peak of the same process.",
        report.table(found["rows"], COLUMNS),
    ]
    if "growth" in found:
        parts.append(sweeps.table(found["growth"], ["case"]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    flags.DEFINE_list("cases", [], "What to train: duo:full,duo:topk,duo:discrete,duo_base,...; all; the config's own.")
    flags.DEFINE_integer("steps", 10, "Steps to time.")
    sweeps.define_flag()
    report.main("train", run, text)
