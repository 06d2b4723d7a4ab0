"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only; a machine without a screen is the usual case

from matplotlib import pyplot as plt


def perplexity(
    path: Path,
    heldout: list[tuple[int, float]],
    train: list[tuple[int, float]],
    levels: dict[str, float],
    title: str,
) -> None:
    """Writes a PNG of held-out perplexity against steps, on a logarithmic scale.

    Args:
        path: the file.
        heldout: (step, perplexity), with EMA weights.
        train: (step, perplexity) of training batches, noisier.
        levels: horizontal lines to compare with, such as the unigram perplexity, by name.
        title: above the picture.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    if train:
        axes.plot(*zip(*train, strict=True), color="0.75", linewidth=1, label="training batches")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="C0", markersize=4, label="held-out (EMA)")
        step, ppl = heldout[-1]
        axes.annotate(f"{ppl:.1f}", (step, ppl), textcoords="offset points", xytext=(0, -14), ha="center", color="C0")
    for (name, level), style in zip(levels.items(), ("--", ":", "-."), strict=False):
        axes.axhline(level, color="0.35", linestyle=style, linewidth=1, label=f"{name} ({level:.1f})")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.tight_layout()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(path)
