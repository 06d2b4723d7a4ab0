"""Averages over held-out tokens."""

import numpy as np
import pytest

from duo_jax.evaluation import likelihood, plots


def test_metrics_equal_the_references(golden):
    data = golden("l_metrics")
    got = likelihood.Likelihood(float(data["nll_sums"].sum() / data["num_tokens"].sum()), int(data["num_tokens"].sum()))
    assert got.nll == pytest.approx(float(data["val_nll"]), rel=1e-6)
    assert got.bpd == pytest.approx(float(data["val_bpd"]), rel=1e-6)
    assert got.ppl == pytest.approx(float(data["val_ppl"]), rel=1e-6)


def test_the_standard_error_is_that_of_leaving_batches_out():
    """The jackknife, which knows nothing of ratios; an average over batches of unequal size differs from it by 1/n."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(50, 200, 60).astype(float)
    nats = tokens * rng.normal(4.0, 0.5, 60)
    got = likelihood._mean(nats, tokens)
    without = (nats.sum() - nats) / (tokens.sum() - tokens)
    jackknife = np.sqrt(59 / 60 * np.square(without - without.mean()).sum())
    assert got.nll == pytest.approx(nats.sum() / tokens.sum())
    assert got.stderr == pytest.approx(jackknife, rel=0.02)
    assert got.figures()["stderr"] == got.stderr
    assert "stderr" not in likelihood._mean(nats[:1], tokens[:1]).figures()


def test_unigram_is_the_cross_entropy_of_the_counts():
    counts = np.array([7, 1, 0, 4])
    batches = [
        {"tokens": np.array([[0, 0, 1, 2]]), "mask": np.array([[1, 1, 1, 1]])},
        {"tokens": np.array([[3, 3, 0, 0]]), "mask": np.array([[1, 0, 0, 0]])},
    ]
    share = (counts + 1) / (counts + 1).sum()
    got = likelihood.unigram(counts, batches)
    assert got.tokens == 5
    assert got.nll == pytest.approx(-np.log(share[[0, 0, 1, 2, 3]]).mean())


def test_the_plot_is_a_picture(tmp_path):
    path = tmp_path / "plot.png"
    plots.perplexity(
        path, [(10, 90.0), (20, 60.0)], [(5, 100.0)], {"unigram": 80.0, "uniform": 300.0}, "a run", {"end": 15}
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    plots.perplexity(path, [], [], {"uniform": 300.0}, "an empty run")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
