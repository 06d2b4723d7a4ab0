"""Compares runs: `python -m duo_jax.evaluation.compare --runs NAME=WORKDIR ... --out DIR`.

Reads what runs, finished or not, measured on the same held-out tokens while they trained, and writes

DIR/compare.md     the last figures, one row per run
DIR/compare.png    held-out perplexity against steps
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from duo_jax import cli, progress
from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.files import check_folder
from duo_jax.training import workdir as workdir_lib
from duo_jax.training.writers import read_jsonl

# Settings that decide, beside those of the data, which tokens are held out and how they are cut into rows.
_ROWS = ("model.length", "eval.batch_size", "eval.batches")
_HOW_READ = ("data.workers", "data.dir")  # settings that do not change which data are read
# The metrics of an evaluation that are read here.
_FIGURES = {"step", "heldout/nll", "heldout/tokens", "heldout/unigram_ppl", "heldout/uniform_ppl"}


class Curve(NamedTuple):
    """What one run measured.

    Attributes:
        name: in the table and the picture.
        settings: of the run, flat.
        heldout: `heldout/...` figures by step, in order.
        rate: tokens trained on per second, the median of the logged values; None if there are none.
    """

    name: str
    settings: dict[str, Any]
    heldout: dict[int, dict[str, float]]
    rate: float | None

    @property
    def tokens(self) -> int:
        """How many held-out tokens were predicted."""
        return int(self.last["heldout/tokens"])

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last evaluation."""
        return self.heldout[max(self.heldout)]

    def row_settings(self) -> dict[str, Any]:
        """Returns the settings that two runs must share to have the same held-out rows."""
        data = {key: value for key, value in self.settings.items() if key.startswith("data.") and key not in _HOW_READ}
        return data | {key: self.settings[key] for key in _ROWS}


def read(name: str, folder: Path) -> Curve:
    """Returns what the run in a folder measured.

    Raises:
        UserError: the folder is not a run's, or nothing was evaluated yet.
    """
    try:
        settings = config_lib.flatten(json.loads((folder / workdir_lib.CONFIG).read_text(encoding="utf-8")))
        settings = config_lib.flatten(config_lib.default()) | settings  # settings that its version lacked are defaults
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--runs: {folder} is not a run's folder with {workdir_lib.CONFIG}: {error}.") from error
    rows = [row for row in read_jsonl(folder / workdir_lib.METRICS) if isinstance(row, dict)]
    heldout = {row["step"]: row for row in rows if row.keys() >= _FIGURES}
    if not heldout:
        raise UserError(f"--runs: {folder} has no evaluation yet; train on, or give mode=train a config.eval.every.")
    rates = [row["train/tokens_per_s"] for row in rows if "train/tokens_per_s" in row]
    return Curve(name, settings, dict(sorted(heldout.items())), statistics.median(rates) if rates else None)


def check(curves: Sequence[Curve]) -> None:
    """Raises UserError unless all figures are of the same held-out rows."""
    first = curves[0]
    for other in curves[1:]:
        ours, theirs = first.row_settings(), other.row_settings()
        if different := [key for key in ours if ours[key] != theirs[key]]:
            key = different[0]
            raise UserError(
                f"--runs: {first.name} and {other.name} were measured on different tokens: config.{key} is {ours[key]!r} "
                f"and {theirs[key]!r}. Compare runs of one tokenizer, one held-out set and one length."
            )


def per_token(curve: Curve, step: int, tokens: int) -> float:
    """Returns the nats of all held-out rows at a step, divided by `tokens`."""
    row = curve.heldout[step]
    return row["heldout/nll"] * row["heldout/tokens"] / tokens


def table(curves: Sequence[Curve], tokens: int) -> str:
    """Returns the last figures as a Markdown table."""
    lines = [
        "| run | algorithm | steps | tokens trained on | NLL (nats/token) | BPD | PPL | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in curves:
        step = max(curve.heldout)
        seen = step * curve.settings["train.batch_size"] * curve.settings["model.length"]
        nll, error = per_token(curve, step, tokens), curve.last.get("heldout/stderr")
        margin = f" ± {error * curve.tokens / tokens:.4f}" if error else ""  # per token of the same number
        figures = f"{nll:.4f}{margin} | {nll / math.log(2):.4f} | {math.exp(nll):.2f}"
        algo = curve.settings["algo.name"]
        if algo == "duo":
            algo += f" ({curve.settings['algo.curriculum.kind']})"
        rate = f"{curve.rate:,.0f}" if curve.rate else "-"
        lines.append(f"| {curve.name} | {algo} | {step:,} | {seen:,} | {figures} | {rate} |")
    return "\n".join(lines) + "\n"


def provenance(curves: Sequence[Curve], tokens: int) -> str:
    """Returns a note on what the figures measure."""
    like = min(curves, key=lambda curve: curve.tokens)
    unigram, uniform = (like.last[f"heldout/{name}_ppl"] for name in ("unigram", "uniform"))
    note = (
        f"Of {tokens:,} held-out tokens, with EMA weights; ± is the standard error over batches. Token frequencies alone "
        f"have PPL {unigram:,.1f}, no knowledge {uniform:,.0f}."
    )
    if {curve.settings["algo.name"] == "ar" for curve in curves} == {True, False}:
        note += (
            " The autoregressive figure is exact, the others are upper bounds. All are per token other than BOS, which an "
            "autoregressive network is given; the nats that the others need for BOS are included."
        )
    return note


def report(runs: dict[str, str], out: Path) -> None:
    """Reads the runs, and writes the table and the picture."""
    from duo_jax.evaluation import plots

    curves = [read(name, Path(folder).expanduser()) for name, folder in runs.items()]
    check(curves)
    like = min(curves, key=lambda curve: curve.tokens)
    lines = {
        curve.name: [(step, math.exp(per_token(curve, step, like.tokens))) for step in curve.heldout]
        for curve in curves
    }
    text = f"{table(curves, like.tokens)}\n{provenance(curves, like.tokens)}\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.md").write_text(text, encoding="utf-8")
    levels = {"unigram": like.last["heldout/unigram_ppl"]}
    plots.compared(out / "compare.png", lines, levels, f"held-out, {like.settings['data.source']}")
    progress.say(text)
    progress.say(f"Written to {out}.")


def main() -> None:
    """Reads the command line."""
    name = "python -m duo_jax.evaluation.compare"
    parser = cli.Parser(prog=name, description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--runs", action="append", metavar="NAME=WORKDIR", required=True, help="a run, and what to call it"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the table and the picture")
    with cli.one_line_errors():
        args = parser.parse_args()
        runs = cli.named("--runs", args.runs)
        report(runs, check_folder(args.out, flag="--out", keep=False))


if __name__ == "__main__":
    main()
