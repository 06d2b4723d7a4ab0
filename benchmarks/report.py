"""The command line of each measurement, and its report: tables for people and JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    """Returns a cell: fractions with three digits, whole numbers with thousands separated."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def where(environment: Row) -> str:
    """Returns the devices of a measurement as text."""
    return "{devices} x {device} ({platform}), jax {jax}".format(**environment)


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Returns p of y ~ x^p by least squares on the logarithms; None for fewer than two different x."""
    positive = [(x, y) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in positive}) < 2:
        return None
    return float(np.polyfit(*np.log(positive).T, deg=1)[0])


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
    """Runs `python -m benchmarks.NAME`: measures as the flags say, prints the report, and writes it to `--out`.

    Args:
        name: the measurement's name; its own flags are already defined.
        measure: returns the report; takes the config, and an object whose attributes are the values of all flags.
        text: returns the report as text.
        check: raises UserError if the results are wrong; called after all is printed and written.
    """
    flags.DEFINE_integer("vocab_size", None, "K; the size of the config's tokenizer if not given.")
    flags.DEFINE_string("out", None, f"A folder for {name}.json and {name}.md.")

    def call(config: ConfigDict) -> None:
        folder = check_folder(flags.FLAGS.out, flag="--out") if flags.FLAGS.out else None
        found = measure(config, flags.FLAGS)
        shown = text(found)
        print(f"\n{shown}\n")
        save(folder, name, found, shown)
        check(found)

    cli.run(call)
