"""Measurements: time, memory, compilation, and the matrix units' peak."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from duo_jax import cli
from duo_jax.errors import UserError, out_of_memory

# The side of the matrices whose product measures a device's peak, and how many products are queued at a time: large enough
# to keep the matrix units busy, small enough for seconds. Without a queue, a fast device would wait for the host.
_PEAK = {"cpu": (2048, 1)}
_PEAK_ELSEWHERE = (8192, 4)
_STATUS = Path("/proc/self/status")
MIB = 2**20


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)` from a process of its own, whose memory no earlier case has touched.

    Raises:
        UserError: the function raised it; or the device ran out of memory; or the process died, as happens when the machine
            runs out of memory.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_as_in_training, function, *args).result()
        except BrokenProcessPool as error:
            raise UserError(
                "the process of a case was killed, which is what happens when memory runs out; make the batch smaller."
            ) from error


def _as_in_training(function: Callable[..., Any], *args: Any) -> Any:
    cli.keep_memory()
    try:
        return function(*args)
    except jax.errors.JaxRuntimeError as error:
        if not out_of_memory(error):
            raise
        raise UserError("a case ran out of the device's memory; make the batch smaller.") from error


def rss(name: str = "VmHWM") -> int | None:
    """Returns this process's largest resident memory so far, or its current one (`VmRSS`), in bytes; None without /proc.

    Not `ru_maxrss`, which starts from the resident memory of the parent process.
    """
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0]) * 1024


def device_peak() -> int | None:
    """Returns the most memory the default device's allocator has given out, in bytes; None if it does not count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def environment(devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Returns what describes all devices, or the given ones that a program was compiled for."""
    devices = jax.devices() if devices is None else devices
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "jax": jax.__version__,
        "cpu_cores": multiprocessing.cpu_count(),
    }


def restart_peak() -> None:
    """Makes VmHWM count from what is in use now, on Linux; elsewhere the peak stays that of the process."""
    cli.release_memory()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
    """Returns the program and how many seconds XLA took for it."""
    start = time.perf_counter()
    program = lowered.compile()
    return program, time.perf_counter() - start


def memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Returns the compiler's memory analysis of a program on one device, in bytes.

    `total` is what it needs while it runs: arguments, results that do not reuse an argument's memory, temporaries and code.
    """
    stats = program.memory_analysis()
    if stats is None:
        raise UserError(f"the compiler for {jax.devices()[0].platform} gives no memory analysis.")
    sizes = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliases": stats.alias_size_in_bytes,
        "temporary": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sizes["arguments"] + sizes["outputs"] - sizes["aliases"] + sizes["temporary"] + sizes["code"]
    return sizes | {"total": total}


def seconds(call: Callable[[], Any], times: int) -> list[float]:
    """Returns the seconds of each of some calls, until its result is ready."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return taken


def matmul_peak(dtype: jnp.dtype, *, times: int = 5) -> float:
    """Returns the FLOP/s of the default device on products of large square matrices of a type: the best of some tries.

    In JAX's default precision for the type, which is also the network's.
    """
    size, queued = _PEAK.get(jax.devices()[0].platform, _PEAK_ELSEWHERE)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in keys)
    product = jax.jit(jnp.matmul)

    def products() -> jax.Array:
        for _ in range(queued - 1):
            product(a, b)
        return product(a, b)

    jax.block_until_ready(products())
    return queued * 2 * size**3 / min(seconds(products, times))


def mib(size: int | None) -> float | None:
    """Returns bytes as MiB."""
    return None if size is None else size / MIB


def memory_columns(program: jax.stages.Compiled) -> dict[str, float]:
    """Returns the compiler's memory analysis in MiB."""
    return {f"{name}_mib": size / MIB for name, size in memory(program).items()}


def speed_columns(
    taken: Sequence[float], tokens: int, work: float, peaks: tuple[float, float], devices: int
) -> dict[str, float]:
    """Returns the columns of time, for `tokens` and `work` (FLOPs) per call, against the peak of `devices` devices."""
    if jax.devices()[0].platform == "cpu":
        devices = 1  # several CPU devices share one processor
    median = statistics.median(taken)
    return {
        "median_ms": 1e3 * median,
        "best_ms": 1e3 * min(taken),
        "tokens_per_s": tokens / median,
        "gflops": work / median / 1e9,
        "model_gflop": work / 1e9,
        "peak_gflops": max(peaks) * devices / 1e9,
        "peaks_before_after_gflops": [peak * devices / 1e9 for peak in peaks],
        "mfu_percent": 100 * work / median / (max(peaks) * devices),
    }
