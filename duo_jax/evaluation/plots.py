"""Plots of runs and samples as files, without pyplot, so that a notebook's own figures are not affected."""

from __future__ import annotations

import itertools
from pathlib import Path

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def perplexity(
    path: Path,
    heldout: list[tuple[int, float]],
    train: list[tuple[int, float]],
    levels: dict[str, float],
    title: str,
    marks: dict[str, int] | None = None,
) -> None:
    """Writes a PNG of held-out perplexity against steps, on a logarithmic scale.

    Args:
        path: the file.
        heldout: (step, perplexity), with EMA weights.
        train: (step, exp(loss)) of training batches, under the objective at that step.
        levels: horizontal lines to compare with, such as the unigram perplexity, by name.
        title: above the picture.
        marks: vertical lines at steps, such as the end of a curriculum, by name.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    if train:
        axes.plot(
            *zip(*train, strict=True), color="0.75", linewidth=1, label="exp(training loss) of that step's objective"
        )
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="C0", markersize=4, label="held-out (EMA)")
        step, ppl = heldout[-1]
        axes.annotate(f"{ppl:.1f}", (step, ppl), textcoords="offset points", xytext=(0, -14), ha="center", color="C0")
    for (name, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color="0.35", linestyle=style, linewidth=1, label=f"{name} ({level:.1f})")
    for name, step in (marks or {}).items():
        axes.axvline(step, color="C1", linestyle=":", linewidth=1, label=name)
    _against_steps(axes, title)
    _save(figure, path)


def compared(path: Path, curves: dict[str, list[tuple[int, float]]], levels: dict[str, float], title: str) -> None:
    """Writes a PNG of several runs' held-out perplexity against steps, on a logarithmic scale.

    Args:
        path: the file.
        curves: (step, perplexity) by the run's name.
        levels: horizontal lines to compare with, by name.
        title: above the picture.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120)
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves.items()):
        label = f"{name} ({points[-1][1]:.1f})"
        axes.plot(*zip(*points, strict=True), f"{'os^D'[index // 10 % 4]}-", markersize=4, label=label)
    for name, level in levels.items():
        axes.axhline(level, color="0.35", linestyle="--", linewidth=1, label=f"{name} ({level:.1f})")
    _against_steps(axes, title)
    # Beside the curves, which may lie anywhere.
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, path)


def few_steps(
    path: Path,
    curves: dict[tuple[str, str], list[tuple[int, float, float, float]]],
    levels: dict[str, tuple[float, float]],
    judge: str,
) -> None:
    """Writes a PNG of generative perplexity and unigram entropy against network calls.

    Args:
        path: the file.
        curves: by network, or network and sampler, and by noise removal: (network calls, perplexity, its standard deviation
            over seeds, entropy).
        levels: horizontal lines to compare with, (perplexity, entropy) of held-out text, by name.
        judge: the language model that judged.
    """
    figure = Figure(figsize=(11, 4.5), dpi=120)
    left, right = figure.subplots(1, 2)
    networks = list(dict.fromkeys(network for network, _ in curves))
    lines = {"ancestral": "-", "greedy": "--", "none": ":"}
    for (network, removal), rows in curves.items():
        calls, ppl, spread, entropy = zip(*sorted(rows), strict=True)
        index = networks.index(network)
        name, color, marker = f"{network}, {removal}", f"C{index}", "os^D"[index // 10 % 4]  # there are ten colours
        style = {"marker": marker, "markersize": 4, "color": color, "linestyle": lines[removal]}
        left.errorbar(calls, ppl, yerr=spread, capsize=2, label=name, **style)
        right.plot(calls, entropy, label=name, **style)
    for (name, (ppl, entropy)), style in zip(levels.items(), itertools.cycle((":", "--", "-.", "-"))):
        left.axhline(ppl, color="0.35", linestyle=style, label=f"{name} ({ppl:.0f})")
        right.axhline(entropy, color="0.35", linestyle=style, label=f"{name} ({entropy:.2f})")
    _logarithmic(left)
    left.set_ylabel(f"perplexity under {judge}")
    right.set_ylabel("unigram entropy (nats)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.set_xlabel("network calls")
        axes.grid(alpha=0.3, which="both")
    left.legend(framealpha=0.9, fontsize=8)
    _save(figure, path)


def _logarithmic(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _against_steps(axes: Axes, title: str) -> None:
    """Finishes a picture of perplexity against steps."""
    _logarithmic(axes)
    axes.set_xlabel("step")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(framealpha=0.9)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    temporary.replace(path)
