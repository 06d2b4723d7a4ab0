"""Averages over held-out tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax.evaluation import likelihood, plots
from duo_jax.models.network import Network


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
    got = likelihood._mean(nats[:, None], tokens)
    without = (nats.sum() - nats) / (tokens.sum() - tokens)
    jackknife = np.sqrt(59 / 60 * np.square(without - without.mean()).sum())
    assert got.nll == pytest.approx(nats.sum() / tokens.sum())
    assert got.stderr == pytest.approx(jackknife, rel=0.02)
    assert got.figures()["stderr"] == got.stderr
    for n in (1, 3):
        assert "stderr" not in likelihood._mean(nats[:n, None], tokens[:n]).figures()
    assert "stderr" in likelihood._mean(nats[:4, None], tokens[:4]).figures()


def test_the_noise_is_how_much_other_draws_would_change_the_mean():
    """Against 4,000 means that are drawn anew; an estimate of 420 degrees of freedom is off by 3.5%; four times that."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(50, 200, 60).astype(float)
    text, spread = rng.normal(4.0, 2.0, (60, 1)), rng.uniform(0.1, 1.0, (60, 1))
    drawn = (text + spread * rng.normal(size=(60, 4000 * 8))) * tokens[:, None]
    means = drawn.reshape(60, 4000, 8).mean(axis=2).sum(axis=0) / tokens.sum()
    got = likelihood._mean(drawn[:, :8], tokens)
    assert got.noise == pytest.approx(means.std(), rel=0.14)
    assert got.stderr > 5 * got.noise
    assert "noise" not in likelihood._mean(drawn[:, :1], tokens).figures()


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


def small(algo):
    net = Network(
        algo=algo, vocab_size=7, mask_id=6, length=5, dim=16, blocks=1, heads=2, cond_dim=8, dropout=0.0,
        precision="float32",
    )  # fmt: skip
    leaves, tree = jax.tree.flatten(net.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return net, tree.unflatten([x + 0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def test_an_average_is_over_tokens_however_the_batches_are_filled():
    """Of an autoregressive network, whose likelihood is exact: the sum over all tokens after the first, by their number."""
    net, weights = small("ar")
    rng = np.random.default_rng(0)
    batches = [{"tokens": rng.integers(0, 6, (3, 5)), "mask": np.ones((3, 5), np.float32)} for _ in range(3)]
    batches[1]["mask"][1:, 3:] = 0
    batches[2]["mask"][1:] = 0  # the last one is filled up
    nats, count = 0.0, 0
    for batch in batches:
        hidden = net.hidden(weights, net.embed(weights, jnp.asarray(batch["tokens"])), None)
        logits = np.float64(net.logits(weights, hidden))[..., :6]  # the mask, id 6, is never predicted
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        own = np.take_along_axis(p[:, :-1], batch["tokens"][:, 1:, None], -1)[..., 0]
        nats += np.sum(batch["mask"][:, 1:] * -np.log(own))
        count += int(batch["mask"][:, 1:].sum())
    got = likelihood.evaluate(weights, net, batches)
    assert got.tokens == count == 3 * 4 + 4 + 2 * 2 + 4
    assert got.nll == pytest.approx(nats / count, rel=1e-5)
    assert likelihood.evaluate(weights, net, batches, draws=3).figures() == got.figures(), "there is nothing to draw"


def test_a_perplexity_beyond_all_numbers_is_a_number():
    assert np.isfinite(likelihood.Likelihood(1e6, 1).ppl)


def test_each_batch_has_noise_of_its_own_and_the_same_every_time():
    net, weights = small("duo_base")
    batch = {"tokens": np.random.default_rng(0).integers(0, 7, (8, 5)), "mask": np.ones((8, 5), np.float32)}
    one, two, again = (likelihood.evaluate(weights, net, [batch] * n).nll for n in (1, 2, 2))
    assert two == again
    assert one != two
    assert likelihood.evaluate(weights, net, [batch]).nll == one


def test_tokens_that_are_given_are_not_predicted_by_frequency():
    batch = {"tokens": np.array([[0, 1, 1], [0, 2, 0]]), "mask": np.array([[1, 1, 1], [1, 1, 0]])}
    counts = np.array([9, 2, 1])
    share = (counts + 1) / (counts + 1).sum()
    got = likelihood.unigram(counts, [batch], given=1)
    assert got.tokens == 3
    assert got.nll == pytest.approx(-np.log(share[[1, 1, 2]]).mean())
