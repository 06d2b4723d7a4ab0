"""The largest batch that fits in a memory, found by compiling alone: nothing runs and no weights are allocated.

    python -m benchmarks.memory --config=configs/owt.py --gib=15
    python -m benchmarks.memory --config=configs/tiny.py --gib=15 --programs=train --cases=duo:full,duo:topk --out=runs/bench
    python -m benchmarks.memory --config=configs/tiny.py --gib=11 --device=t4
    python -m benchmarks.memory --config=configs/owt.py --gib=59 --device=h100 --devices=8 --config.mesh.fsdp=8

The answer is the compiler's memory analysis (arguments + results - what is reused + temporaries + code, of one device) for
the default platform, `--platform`, or the GPUs of `--device`, which need not be present. A CPU's analysis is only a rough
guide to a GPU, whose compiler fuses and keeps other things. Only the program is counted: the runtime takes some hundred MiB
more, and on a GPU JAX leaves a quarter of the memory to others unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. For an
absent GPU the compiler cannot try which of several implementations is the fastest, and takes its default.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from benchmarks import absent, measure, programs, report
from duo_jax.errors import UserError

COLUMNS = {
    "program": "program", "batch": "B", "length": "L", "vocab": "K", "blocks": "blocks", "dtype": "dtype",
    "arguments_gib": "arguments", "temporary_gib": "temporary", "total_gib": "GiB in all", "fits": "fits",
    "compile_s": "compile s",
}  # fmt: skip
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Found:
    """The answer of a search.

    Attributes:
        largest: the largest batch known to fit; None if not even the smallest does.
        too_large: the smallest batch known not to fit; None if the largest that was tried fits.
    """

    largest: int | None
    too_large: int | None


def largest_fitting(size: Callable[[int], int], limit: float, *, unit: int, most: int, refine: int) -> Found:
    """Returns the largest batch with `size(batch)` of at most `limit`, in few calls, since each is a compilation.

    Goes through the batches unit, 2 unit, 4 unit, ..., but leaps to where a straight line through the last two sizes reaches
    the limit, until one batch fits and the next does not; then halves the interval between them.

    Args:
        size: bytes, growing with the batch.
        limit: bytes.
        unit: batches are multiples of it, and the first is itself.
        most: the largest batch to try.
        refine: how often the last interval is halved.
    """
    sizes: dict[int, int] = {}

    def fits(batch: int) -> bool:
        sizes[batch] = size(batch)
        return sizes[batch] <= limit

    if not fits(unit):
        return Found(None, unit)
    low, high, before = unit, None, None
    while (2 * low <= most) if high is None else (high > 2 * low):
        other = before if high is None else high
        guess = 0 if other is None else _doubled(unit, _crossing((low, sizes[low]), (other, sizes[other]), limit, most))
        batch = max(2 * low, min(guess, _doubled(unit, most) if high is None else high // 2))
        if fits(batch):
            low, before = batch, low
        else:
            high = batch
    for _ in range(refine if high else 0):
        middle = (low + high) // 2 // unit * unit
        if middle == low:
            break
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Found(low, high)


def _crossing(a: tuple[int, int], b: tuple[int, int], limit: float, most: int) -> int:
    """The batch, at most `most`, where the line through two (batch, size) reaches the limit."""
    (x0, y0), (x1, y1) = a, b
    return most if y0 == y1 else min(most, int(x0 + (limit - y0) * (x1 - x0) / (y1 - y0)))


def _doubled(unit: int, most: int) -> int:
    """The largest of unit, 2 unit, 4 unit, ... that is at most `most`, which is at least `unit`."""
    return unit << ((most // unit).bit_length() - 1)


def lower(
    config: ConfigDict, vocab_size: int, case: programs.Case | None, devices: Sequence[jax.Device]
) -> Callable[[int], tuple[Any, Any]]:
    """Returns a function from batch size to network and program: a case's train step, or the sampler if it is None."""
    setting = "sample.batch_size" if case is None else "train.batch_size"
    config = config if case is None else case.apply(config)

    def at(batch: int) -> tuple[Any, Any]:
        variant = programs.changed(config, {setting: batch})
        make = programs.sampler if case is None else programs.training
        plan = make(variant, vocab_size, devices)
        return plan.network, plan.lowered

    return at


def search(
    config: ConfigDict,
    vocab_size: int,
    case: programs.Case | None,
    gib: float,
    most: int,
    refine: int,
    platform: str | None,
    device: str | None,
    count: int = 1,
) -> dict[str, Any]:
    """Returns a row per compiled batch size, and the answer; to be run in a process of its own."""
    with target(platform, device, count) as devices:
        rows: dict[int, dict[str, Any]] = {}
        at = lower(config, vocab_size, case, devices)
        name = "sample" if case is None else f"train {case}"

        def size(batch: int) -> int:
            network, lowered = at(batch)
            program, seconds = measure.compiled(lowered)
            sizes = measure.memory(program)
            rows[batch] = {
                "program": name, "batch": batch, "length": network.length, "vocab": vocab_size, "blocks": network.blocks,
                "dtype": network.dtype.name, **{f"{part}_gib": n / GIB for part, n in sizes.items()},
                "fits": "yes" if sizes["total"] <= gib * GIB else "no", "compile_s": seconds,
            }  # fmt: skip
            print(f"{name}, B = {batch}: {sizes['total'] / GIB:.2f} GiB", flush=True)
            return sizes["total"]

        unit = len(devices) * (1 if case is None else config.train.accumulate)
        if most < unit:
            raise UserError(f"--most is {most}, less than one row for each of {unit} devices and parts of a step.")
        found = largest_fitting(size, gib * GIB, unit=unit, most=most, refine=refine)
        return {
            "environment": measure.environment(devices),
            "rows": [rows[batch] for batch in sorted(rows)],
            "answer": {"program": name, "gib": gib, **dataclasses.asdict(found)},
        }


@contextlib.contextmanager
def target(platform: str | None, device: str | None, count: int = 1) -> Iterator[Sequence[jax.Device]]:
    """Yields the devices to compile for: `count` absent GPUs, a platform's, or JAX's default ones.

    Raises:
        UserError: the platform has no device here; see also `absent.compiling_for`.
    """
    if device is not None:
        with absent.compiling_for(device, count) as devices:
            yield devices
        return
    if platform is not None:
        jax.config.update("jax_platforms", platform)
        try:
            jax.devices()
        except RuntimeError as error:
            raise UserError(
                f"--platform={platform}: JAX finds no such device here; leave it out, or give cpu."
            ) from error
    yield jax.devices()


def run(config: ConfigDict, options: Any) -> dict[str, Any]:
    """Returns the environment, what was compiled, and the largest batch that fits, for each program of the flags."""
    if not options.gib or options.gib <= 0:
        raise UserError("--gib must be given and positive: the memory of one device in GiB, as in --gib=15.")
    if options.most < 1 or options.refine < 0:
        raise UserError(f"--most is {options.most} and --refine {options.refine}; give at least 1 and 0.")
    if options.platform and options.device:
        raise UserError(
            f"--platform={options.platform} and --device={options.device} both say what to compile for; give one of them."
        )
    if options.device:
        absent.find(options.device)
    if options.devices < 1 or (options.devices > 1 and not options.device):
        raise UserError(
            f"--devices is {options.devices}; it is the number of GPUs of the kind that --device names, at least 1."
        )
    todo = programs.chosen(config, options.programs, options.cases)
    size = programs.vocabulary(config, options.vocab_size)
    how = options.gib, options.most, options.refine, options.platform, options.device, options.devices
    parts = [measure.in_fresh_process(search, config, size, case, *how) for case in todo]
    return {
        "environment": parts[0]["environment"],
        "gib": options.gib,
        "rows": [row for part in parts for row in part["rows"]],
        "answers": [part["answer"] for part in parts],
    }


def describe(answer: report.Row) -> str:
    """Returns an answer as a sentence."""
    name, gib = answer["program"], f"{answer['gib']:g} GiB"
    if answer["largest"] is None:
        return f"{name}: not even a batch of {answer['too_large']} fits in {gib}."
    if answer["too_large"] is None:
        return f"{name}: a batch of {answer['largest']}, the largest that was tried, fits in {gib}."
    return f"{name}: a batch of {answer['largest']} fits in {gib}; one of {answer['too_large']} does not."


def text(found: dict[str, Any]) -> str:
    """Returns the report as text."""
    where = found["environment"]
    parts = [
        f"The compiler's memory analysis for {report.where(where)}, of one device; nothing was run.",
        report.table(found["rows"], COLUMNS),
        "\n".join(map(describe, found["answers"])),
    ]
    if where["platform"] == "cpu":
        parts.append(
            "This is the CPU compiler's analysis, only a rough guide to a GPU, whose compiler fuses and keeps other things."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    flags.DEFINE_float("gib", None, "The memory of one device, GiB.")
    programs.define_flags(["train", "sample"])
    flags.DEFINE_integer("most", 4096, "The largest batch to try.")
    flags.DEFINE_integer("refine", 2, "How often the interval of the answer is halved, after doubling has found it.")
    flags.DEFINE_string("platform", None, "What to compile for: cpu, cuda, tpu; JAX's default if not given.")
    flags.DEFINE_string("device", None, f"Instead, a GPU that need not be present: {', '.join(absent.GPUS)}.")
    flags.DEFINE_integer("devices", 1, "How many of these, in one host.")
    report.main("memory", run, text)
