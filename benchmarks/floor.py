"""The least time that a program takes on a GPU, which need not be present, and its parts, found by compiling alone.

    python -m benchmarks.floor --config=configs/owt.py --config.train.batch_size=64 --device=h100
    python -m benchmarks.floor --config=configs/owt.py --config.sample.batch_size=32 --config.sample.n_steps=8 \\
        --device=h100 --programs=sample --trips=5

Each kernel of the compiled program takes at least as long as the memory needs for the bytes that it reads and writes, and
the matrix units for its products. The sum over all kernels is a floor, not a measurement: nothing runs. It shows what a
change to the program would gain, and which kernels to change. The rates are those of the GPU's data sheet, unless `--gbs`
and `--tflops` give others. Not counted are launches, arithmetic outside of products, and what the GPU's own choice between
kernels would change. A loop of unknown length, as over a sampler's asked tokens, is counted `--trips` times.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import absent, flops, hlo, measure, programs, report
from duo_jax.errors import UserError

COLUMNS = {"part": "part", "kernels": "kernels", "gb": "GB", "tflop": "TFLOP", "ms": "floor ms", "share": "%"}


@dataclasses.dataclass(frozen=True)
class Rates:
    """The rates of a GPU: bytes per second, and FLOP/s of half-precision products."""

    bytes: float
    flops: float

    def seconds(self, kernel: hlo.Kernel) -> float:
        """Returns the least that all runs of a kernel take."""
        return kernel.times * max(kernel.bytes / self.bytes, kernel.flops / self.flops)


def part(source: str) -> str:
    """Returns in short where in the source a kernel comes from: its pass, and the last two names of its path.

    Kernels of a loop outside any module are the vocabulary head's in training, and the draws of a sampler.
    """
    way = "backward " if "transpose(" in source else "forward " if "jvp(" in source else ""
    names = [re.sub(r"transpose\(|jvp\(|\)", "", name) for name in source.split("/") if not name.startswith("jit(")]
    named = [name for name in names if name not in ("", "body", "closed_call", "checkpoint") and "branch_" not in name]
    return way + "/".join(named[-2:]) or "other"


def floor(
    config: ConfigDict, vocab_size: int, case: programs.Case | None, device: str, rates: Rates, trips: int
) -> dict[str, Any]:
    """Returns a program's floor and its parts, the most expensive first; to be run in a process of its own.

    Args:
        config: the run's config.
        vocab_size: K.
        case: what is trained; None for sampling.
        device: see `absent.GPUS`.
        rates: its rates.
        trips: how often to count a loop of unknown length.
    """
    with absent.compiling_for(device) as devices:
        make = programs.sampler if case is None else programs.training
        plan = make(config if case is None else case.apply(config), vocab_size, devices)
        compiled, seconds = measure.compiled(plan.lowered)
        program = hlo.Program(compiled.as_text(), trips)
        kernels = program.kernels()
        environment, dtype = measure.environment(devices), plan.network.dtype.name
    network, total = plan.network, sum(map(rates.seconds, kernels))
    batch = config.sample.batch_size if case is None else config.train.batch_size
    parts: dict[str, list[hlo.Kernel]] = defaultdict(list)
    for kernel in kernels:
        parts[part(kernel.source)].append(kernel)
    rows = [
        {
            "part": name,
            "kernels": sum(kernel.times for kernel in members),
            "gb": sum(kernel.times * kernel.bytes for kernel in members) / 1e9,
            "tflop": sum(kernel.times * kernel.flops for kernel in members) / 1e12,
            "ms": 1e3 * sum(map(rates.seconds, members)),
            "share": 100 * sum(map(rates.seconds, members)) / total,
        }
        for name, members in parts.items()
    ]
    return {
        "environment": environment,
        "program": "sample" if case is None else f"train {case}",
        "batch": batch, "length": network.length, "vocab": vocab_size, "blocks": network.blocks,
        "dtype": dtype, "compile_s": seconds,
        "gbs": rates.bytes / 1e9, "tflops": rates.flops / 1e12,
        "gb": sum(row["gb"] for row in rows), "tflop": sum(row["tflop"] for row in rows),
        "ms": 1e3 * total, "tokens_per_s": batch * network.length / total,
        "mfu": None if case is None else 100 * model_flops(network, case, batch) / (total * rates.flops),
        "unknown_loops": len(program.unknown), "trips": trips,
        "rows": sorted(rows, key=lambda row: -row["ms"]),
    }  # fmt: skip


def model_flops(network: Any, case: programs.Case, batch: int) -> float:
    """Returns a train step's FLOPs by formula."""
    return batch * flops.train_row(network, network.length, relaxed=case.phase == "full")


def text(found: dict[str, Any], top: int) -> str:
    """Returns a program's floor as text."""
    shown, rest = found["rows"][:top], found["rows"][top:]
    if rest:
        names = ("kernels", "gb", "tflop", "ms", "share")
        shown = [*shown, {"part": f"{len(rest)} more", **{name: sum(row[name] for row in rest) for name in names}}]
    shown = [*shown, {"part": "in all", **{name: found[name] for name in ("gb", "tflop", "ms")}}]
    loops = (
        f" {found['unknown_loops']} loops of unknown length count {found['trips']} times."
        if found["unknown_loops"]
        else ""
    )
    used = "" if found["mfu"] is None else f", MFU {found['mfu']:.0f}%"
    return "\n\n".join(
        [
            f"{found['program']}, B = {found['batch']}, L = {found['length']:,}, K = {found['vocab']:,}, {found['dtype']}, "
            f"compiled for {report.where(found['environment'])}; nothing was run.{loops}",
            report.table(shown, COLUMNS),
            f"At {found['gbs']:,.0f} GB/s and {found['tflops']:,.0f} TFLOP/s it takes at least {found['ms']:.1f} ms: "
            f"at most {found['tokens_per_s']:,.0f} tokens/s{used}.",
        ]
    )


def run(config: ConfigDict, options: Any) -> dict[str, Any]:
    """Returns the floor and the parts of each program that the flags ask for."""
    if options.device is None:
        raise UserError(f"--device is missing; give one of {', '.join(absent.GPUS)}.")
    gpu = absent.find(options.device)
    rates = Rates(
        gpu.bandwidth if options.gbs is None else options.gbs * 1e9,
        gpu.flops if options.tflops is None else options.tflops * 1e12,
    )
    if min(rates.bytes, rates.flops) <= 0 or options.trips < 1:
        raise UserError(
            f"--gbs is {options.gbs}, --tflops {options.tflops}, --trips {options.trips}; they must be above 0."
        )
    size = programs.vocabulary(config, options.vocab_size)
    how = options.device, rates, options.trips
    todo = programs.chosen(config, options.programs, options.cases)
    return {"programs": [measure.in_fresh_process(floor, config, size, case, *how) for case in todo]}


if __name__ == "__main__":
    flags.DEFINE_string("device", None, f"The GPU, which need not be present: {', '.join(absent.GPUS)}.")
    programs.define_flags(["train"])
    flags.DEFINE_float("gbs", None, "The memory's rate, GB/s; the data sheet's figure if not given.")
    flags.DEFINE_float("tflops", None, "The rate of matrix products, TFLOP/s; the data sheet's figure if not given.")
    flags.DEFINE_integer("trips", 1, "How often to count a loop of unknown length.")
    flags.DEFINE_integer("top", 30, "How many parts are shown.")
    report.main("floor", run, lambda found: "\n\n".join(text(part, flags.FLAGS.top) for part in found["programs"]))
