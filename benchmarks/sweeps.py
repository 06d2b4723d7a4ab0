"""How cost grows: one setting is varied, and powers are fitted to what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from benchmarks import programs, report
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
        UserError: it varies nothing known, or a value is no positive number.
    """
    name, _, values = text.partition(":")
    if name not in NAMES or not all(value.isdigit() and int(value) for value in values.split(",")):
        raise UserError(
            f"--sweep is {text!r}; give one of {', '.join(NAMES)} with positive numbers, as in batch:1,2,4."
        )
    return name, [int(value) for value in values.split(",")]


def variants(config: ConfigDict, vocab_size: int, sweep: str | None, group: str) -> list[tuple[ConfigDict, int]]:
    """Returns the configs and vocabularies that a sweep goes through; the given ones alone without it.

    Args:
        config: what is not varied.
        vocab_size: K, where that is not varied.
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
    """Returns the p of x^p of every column that grows, x being what was swept, for rows that agree in the columns `same`."""
    name, _ = parse(sweep)
    groups: dict[tuple, list[report.Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in same), []).append(row)
    return [
        dict(zip(same, group, strict=True))
        | {"with": name}
        | {column: report.exponent([(row[name], row[column]) for row in of if row.get(column)]) for column in GROWING}
        for group, of in groups.items()
    ]


def table(found: Sequence[report.Row], same: Sequence[str]) -> str:
    """Returns `growth` to read."""
    columns = {name: name for name in same} | {"with": "x"}
    return report.table(found, columns | {name: f"{title} ~ x^" for name, title in GROWING.items()})
