"""The command line of each measurement, and its report: tables for people and JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from duo_jax import cli
from duo_jax.files import check_folder

Row = Mapping[str, Any]


def table(rows: Iterable[Row], columns: Mapping[str, str]) -> str:
    """Returns a Markdown table, aligned; a row that lacks a column has a dash there.

    Args:
        rows: one mapping a line.
        columns: each column's name in the rows, and its heading; those that no row has are left out.
    """
    rows = list(rows)
    columns = {name: title for name, title in columns.items() if any(row.get(name) is not None for row in rows)}
    cells = [list(columns.values())] + [[show(row.get(name)) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def show(value: Any) -> str:
    """Returns a cell: three digits of a fraction, whole numbers with their thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def where(environment: Row) -> str:
    """Returns what a measurement was made on."""
    return "{devices} x {device} ({platform}), jax {jax}".format(**environment)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Returns p of y ~ x^p by least squares on the logarithms; None for fewer than two different x."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(part) / len(logs) for part in zip(*logs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / sum((x - mean_x) ** 2 for x, _ in logs)


def save(folder: Path | None, name: str, report: Mapping[str, Any], text: str) -> None:
    """Writes NAME.json and NAME.md to the folder, if there is one, and says so."""
    if folder is None:
        return
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"written to {folder / name}.json and .md")


def main(
    name: str,
    measure: Callable[[ConfigDict, Any], dict[str, Any]],
    text: Callable[[dict[str, Any]], str],
    check: Callable[[dict[str, Any]], None] = lambda found: None,
) -> None:
    """Runs `python -m benchmarks.NAME`: measures as the flags say, prints the report, and keeps it where `--out` says.

    Args:
        name: the measurement's; its own flags are defined already.
        measure: returns the report; takes the config, and an object whose attributes are the values of all flags.
        text: returns the report to read.
        check: raises UserError, once all is printed and kept, where what was found is not as it must be.
    """
    flags.DEFINE_integer("vocab_size", None, "K; the size of the config's tokenizer if not given.")
    flags.DEFINE_string("out", None, f"A folder for {name}.json and {name}.md.")

    def call(config: ConfigDict) -> None:
        folder = check_folder(flags.FLAGS.out, flag="--out") if flags.FLAGS.out else None
        found = measure(config, flags.FLAGS)
        told = text(found)
        print(f"\n{told}\n")
        save(folder, name, found, told)
        check(found)

    cli.run(call)
