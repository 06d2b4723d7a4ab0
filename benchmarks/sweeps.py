"""Measurements of many cases, and how cost grows: a sweep varies one setting, and powers are fitted to the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import measure, programs, report
from duo_jax.errors import UserError

NAMES = ("batch", "length", "vocab", "blocks")
# What grows, and its heading.
GROWING = {
    "median_ms": "time", "model_gflop": "model FLOPs", "temporary_mib": "temp memory", "total_mib": "program memory",
    "rss_mib": "RSS", "compile_s": "compile",
}  # fmt: skip


def define_flag() -> None:
    """Defines `--sweep`."""
    flags.DEFINE_string("sweep", None, "Growth with batch, length, vocab or blocks, as in batch:1,2,4.")


def parse(text: str) -> tuple[str, list[int]]:
    """Returns what `batch:1,2,4` varies, and its values.

    Raises:
        UserError: an unknown setting, or a value that is not a positive number.
    """
    name, _, values = text.partition(":")
    if name not in NAMES or not all(value.isdigit() and int(value) for value in values.split(",")):
        raise UserError(
            f"--sweep is {text!r}; give one of {', '.join(NAMES)} with positive numbers, as in batch:1,2,4."
        )
    return name, [int(value) for value in values.split(",")]


def variants(config: ConfigDict, vocab_size: int, sweep: str | None, group: str) -> list[tuple[ConfigDict, int]]:
    """Returns the configs and vocabulary sizes of a sweep; without one, only those given.

    Args:
        config: the config to vary.
        vocab_size: K, unless it is varied.
        sweep: such as `batch:1,2,4`.
        group: whose batch is varied: `train` or `sample`.
    """
    if not sweep:
        return [(config, vocab_size)]
    name, values = parse(sweep)
    if name == "vocab":
        return [(config, programs.vocabulary(config, value)) for value in values]
    setting = f"{group}.batch_size" if name == "batch" else f"model.{name}"
    return [(programs.changed(config, {setting: value}), vocab_size) for value in values]


def growth(rows: Sequence[report.Row], sweep: str, same: Sequence[str]) -> list[dict[str, Any]]:
    """Returns p of x^p for every growing column, where x was swept, for each group of rows that agree in `same`."""
    name, _ = parse(sweep)
    groups: dict[tuple, list[report.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in same), []).append(row)
    return [
        dict(zip(same, group, strict=True))
        | {"with": name}
        | {
            column: report.exponent([(row[name], row[column]) for row in members if row.get(column)])
            for column in GROWING
        }
        for group, members in groups.items()
    ]


def table(found: Sequence[report.Row], same: Sequence[str]) -> str:
    """Returns `growth` as a table."""
    columns = {name: name for name in same} | {"with": "x"}
    return report.table(found, columns | {name: f"{title} ~ x^" for name, title in GROWING.items()})


def measure_all(
    function: Callable[..., dict[str, Any]],
    cases: Sequence[tuple],
    line: str,
    *,
    sweep: str | None,
    same: Sequence[str],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Measures all cases, each in a process of its own, and prints a line for each; returns the report.

    Args:
        function: returns a row; its arguments are a case.
        cases: the arguments.
        line: what identifies a row, beside its case; a format string of its columns.
        sweep: such as `batch:1,2,4`; adds the growth to the report.
        same: the columns that identify what grows.
        about: further entries of the report.
    """
    rows = []
    for case in cases:
        rows.append(row := measure.in_fresh_process(function, *case))
        speed = f"{{case}}, {line}: {{median_ms:,.1f}} ms, {{tokens_per_s:,.0f}} tokens/s"
        shown = ("{case}: {error}" if "error" in row else speed).format(**row)
        print(f"{len(rows)} of {len(cases)}: {shown}", flush=True)
    found = {"environment": rows[0]["environment"], **about, "rows": rows}
    return found | ({"growth": growth(rows, sweep, same)} if sweep else {})


def text(found: dict[str, Any], what: str, timed: str, columns: Mapping[str, str], same: Sequence[str]) -> str:
    """Returns the report of `measure_all` as text: `what` was measured, by the median of `timed`."""
    parts = [
        f"{what} on {report.where(found['environment'])}, median of {timed}; MFU is model FLOPs against the matmul peak of "
        "the same process.",
        report.table(found["rows"], columns),
    ]
    if "growth" in found:
        parts.append(table(found["growth"], same))
    return "\n\n".join(parts)
