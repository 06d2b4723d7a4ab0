"""What is measured and how: time, memory, compilation, and the matrix units' peak."""

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

# Sides of the matrices whose product tells a device's peak, and products asked for at a time: large enough for the matrix
# units to be busy, small enough for seconds. A fast device would otherwise wait for the next request.
_PEAK = {"cpu": (2048, 1)}
_PEAK_ELSEWHERE = (8192, 4)
_STATUS = Path("/proc/self/status")
MIB = 2**20


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args)` from a process of its own, whose memory no earlier case has touched.

    Raises:
        UserError: as the function does; or the device has no memory left for it; or the process died, as it does when the
            machine has none left.
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
    """Returns this process's largest resident memory so far, or `VmRSS`, that of now, in bytes; None where no /proc tells.

    Not `ru_maxrss`: a process begins that with the resident memory of the one that started it.
    """
    if not _STATUS.exists():
        return None
    lines = dict(line.split(":", 1) for line in _STATUS.read_text(encoding="utf-8").splitlines())
    return int(lines[name].split()[0]) * 1024


def device_peak() -> int | None:
    """Returns the most memory the default device's allocator has given out, in bytes; None where it does not count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def environment(devices: Sequence[jax.Device] | None = None) -> dict[str, Any]:
    """Returns where this was measured: on all devices, or compiled for the given ones."""
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

    `total` is what it needs while it runs: arguments and results, less the results that take their arguments' place,
    and what is in use between them.
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
    """Returns how long each of some calls took, until its result was there."""
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
    """Returns the columns of time: of `tokens` and `work` (FLOPs) a call, against the peak of `devices` devices."""
    if jax.devices()[0].platform == "cpu":
        devices = 1  # several are one processor under several names
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
