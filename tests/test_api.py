"""The Python door, on a trained network."""

import copy
import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import command, make_config, run, trained_settings

import duo_jax
from duo_jax import modes, results, sampling
from duo_jax.evaluation import likelihood, rows
from duo_jax.training import run as run_lib


@pytest.fixture(scope="module")
def params(trained):
    return duo_jax.load(trained)


def test_load_finds_what_a_path_means(trained, params):
    assert params.network.vocab_size == 300
    newest = duo_jax.load(str(trained / "checkpoints" / "20"))
    older = duo_jax.load(trained / "checkpoints" / "15")
    raw = duo_jax.load(trained, ema=False)
    kernel = lambda p: np.asarray(p.weights["head"]["kernel"])  # noqa: E731
    np.testing.assert_array_equal(kernel(newest), kernel(params))
    assert not np.array_equal(kernel(older), kernel(params))
    assert not np.array_equal(kernel(raw), kernel(params))
    assert len(jax.tree.leaves(params)) == len(jax.tree.leaves(params.weights))


def test_the_network_that_comes_with_the_package(tmp_path, monkeypatch):
    """It has learnt English letters, far below the nats of knowing nothing, and is found from any folder."""
    monkeypatch.chdir(tmp_path)
    params = duo_jax.load("quickstart")
    assert params.averaged
    assert params.network.vocab_size == 300
    score = duo_jax.score(
        params, "The history of the town begins in the early years of the century. " * 20, n_samples=4
    )
    assert score.nll + 5 * score.stderr < 0.75 * np.log(300)
    assert duo_jax.sample(params, n_steps=2).tokens.shape == (1, 64)


def test_a_path_without_a_checkpoint_is_named(tmp_path):
    with pytest.raises(duo_jax.UserError, match="does not exist"):
        duo_jax.load(tmp_path / "nothing")
    with pytest.raises(duo_jax.UserError, match="holds no checkpoint"):
        duo_jax.load(tmp_path)
    (tmp_path / "checkpoints" / "5").mkdir(parents=True)
    with pytest.raises(duo_jax.UserError, match="is not a checkpoint"):
        duo_jax.load(tmp_path / "checkpoints" / "5")


def test_a_damaged_checkpoint_is_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "30").mkdir()
    assert duo_jax.load(tmp_path / "run").network.vocab_size == 300, "an empty folder is no checkpoint"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20" / "ema")
    with pytest.raises(duo_jax.UserError, match="20 is damaged"):
        duo_jax.load(tmp_path / "run")


def test_sample(params):
    result = duo_jax.sample(params, n_steps=4, batch_size=3, seed=1)
    assert result.tokens.shape == (3, 32)
    assert result.tokens.dtype == np.int32
    assert 0 <= result.tokens.min() <= result.tokens.max() < 300
    assert len(result.text) == 3
    assert all(isinstance(text, str) and text for text in result.text)
    np.testing.assert_allclose(result.entropy, sampling.unigram_entropy(result.tokens))
    assert result.network_calls == 5
    again = duo_jax.sample(params, n_steps=4, batch_size=3, seed=1)
    np.testing.assert_array_equal(again.tokens, result.tokens)
    other = duo_jax.sample(params, n_steps=4, batch_size=3, seed=2)
    assert not np.array_equal(other.tokens, result.tokens)
    assert duo_jax.sample(params, length=20, noise_removal="greedy", top_p=0.9).tokens.shape == (1, 20)


def test_fewer_texts_than_are_sampled_at_once_share_their_program(params):
    duo_jax.sample(params, 2, batch_size=4, rows_at_once=4, noise_removal="greedy")
    compiled = sampling.networks.sample_tokens._cache_size()
    for number in (1, 3, 4, 6):
        result = duo_jax.sample(params, 2, batch_size=number, rows_at_once=4, noise_removal="greedy")
        assert len(result.tokens) == len(result.text) == number
    assert sampling.networks.sample_tokens._cache_size() == compiled
    shown = repr(result)
    assert shown.startswith("Samples(6 texts of 32 tokens, entropy ")
    assert len(shown) < 400


def test_only_the_beginnings_of_some_texts_are_shown():
    texts = ["short", "x" * 60, "y" * 61, "fourth", "fifth"]
    samples = results.Samples(np.zeros((5, 8), np.int32), texts, np.full(5, 1.25), 3)
    shown = f"['short', '{'x' * 60}', '{'y' * 60}...', 'fourth', ...]"
    assert repr(samples) == f"Samples(5 texts of 8 tokens, entropy 1.25, 3 network calls: {shown})"


def test_neither_a_seed_nor_top_p_compiles_anew(params):
    duo_jax.sample(params, n_steps=2, top_p=0.9, batch_size=2)
    before = sampling.sample_tokens._cache_size()
    duo_jax.sample(params, n_steps=2, top_p=0.8, batch_size=2, seed=7)
    assert sampling.sample_tokens._cache_size() == before


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [({"n_steps": 3}, 4), ({"n_steps": 3, "noise_removal": "none", "batch_size": 3, "rows_at_once": 2}, 2 * 3),
     ({"n_steps": 2, "length": 100, "stride": 30}, 4 * 3), ({"n_steps": 250}, 251)],
)  # fmt: skip
def test_progress_counts_steps(params, kwargs, steps, monkeypatch, capsys):
    bars = []
    plain = duo_jax.api.progress_lib.bar
    monkeypatch.setattr(duo_jax.api.progress_lib, "bar", lambda **given: bars.append(plain(**given)) or bars[-1])
    told = duo_jax.sample(params, progress=True, **kwargs)
    (bar,) = bars
    assert (bar.n, bar.total, bar.unit) == (steps, steps, " steps")
    assert "sampling" in capsys.readouterr().err
    np.testing.assert_array_equal(told.tokens, duo_jax.sample(params, **kwargs).tokens)


def test_progress_of_an_autoregressive_network_counts_tokens(params, monkeypatch):
    bars = []
    plain = duo_jax.api.progress_lib.bar
    monkeypatch.setattr(duo_jax.api.progress_lib, "bar", lambda **given: bars.append(plain(**given)) or bars[-1])
    causal = params.replace(network=dataclasses.replace(params.network, algo="ar"))
    duo_jax.sample(causal, length=20, batch_size=3, rows_at_once=2, progress=True)
    (bar,) = bars
    assert (bar.n, bar.total) == (2 * 19, 2 * 19)


def test_all_that_is_asked_reaches_the_sampler(params, monkeypatch):
    seen = []

    def draw(weights, key, given, knobs, free, **static):
        seen.append((jax.random.key_data(key).tolist(), given, knobs, free, static["settings"]))
        return sampling.Walk(given.tokens, np.int32(1), np.int32(1))

    monkeypatch.setattr(sampling.networks, "sample_tokens", draw)
    monkeypatch.setattr(sampling.texts, "fetch", lambda x: x)
    asked = {"sampler": "psi", "psi": "pure-pc", "noise_removal": "greedy", "early_stop": 3, "trajectory": False}
    knobs = {"top_p": 0.9, "temperature": 0.7, "guidance": 1.5}
    for seed in (0, 1):
        duo_jax.sample(params, 7, seed=seed, prompt="The river", negative_prompt="A town", length=20, **asked, **knobs)
    (first, given, told, free, settings), (second, *_) = seen
    assert first != second
    assert {name: float(getattr(told, name)) for name in knobs} == pytest.approx(knobs)
    psi = sampling.Psi.throughout(asked.pop("psi"))
    assert settings == sampling.Settings.for_network(params.network, 7, top_p=0.9, guided=True, psi=psi, **asked)
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    for part, text in ((given, "The river"), (free, "A town")):
        assert np.asarray(part.tokens)[np.asarray(part.held)].tolist() == [tokenizer.bos_id, *tokenizer.encode(text)]


def test_progress_of_samplers_within_and_beside_each_other(params, monkeypatch):
    """Each bar comes to its own end: the first counts its steps, those that begin before it has ended count texts."""
    bars = []
    plain = duo_jax.api.progress_lib.bar
    monkeypatch.setattr(duo_jax.api.progress_lib, "bar", lambda **given: bars.append(plain(**given)) or bars[-1])
    inner = {"n_steps": 2, "progress": True}
    duo_jax.sample(
        params, 3, batch_size=2, rows_at_once=1, progress=True, each=lambda _: duo_jax.sample(params, **inner)
    )
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda seed: duo_jax.sample(params, seed=seed, **inner), range(4)))
    assert [(bar.n, bar.total, bar.unit) for bar in bars[:3]] == [(8, 8, " steps"), *[(1, 1, " texts")] * 2]
    assert all(bar.n == bar.total == (3 if bar.unit == " steps" else 1) for bar in bars[3:])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"n_steps": 0}, "at least 1 step"), ({"top_p": 0}, "top_p is 0"), ({"batch_size": 0}, "at least 1"),
     ({"sampler": "x"}, "choose one of"), ({"noise_removal": "x"}, "choose one of")],
)  # fmt: skip
def test_impossible_requests_are_refused(params, kwargs, message):
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.sample(params, **kwargs)


def test_score_estimates_the_bound(params):
    text = "The river is long and the town lies on its bank. " * 5
    few = duo_jax.score(params, text, n_samples=8)
    many = duo_jax.score(params, text, n_samples=64, seed=3)
    assert few.tokens == many.tokens > 50
    assert 0 < many.stderr < few.stderr * 1.5
    assert abs(few.nll - many.nll) < 6 * np.hypot(few.stderr, many.stderr)
    assert duo_jax.score(params, text, n_samples=8) == few
    # A text of random tokens is less probable than English.
    noise = np.random.default_rng(0).integers(0, 300, (8, 32))
    assert duo_jax.score(params, noise, n_samples=64).nll > many.nll + 3 * many.stderr
    assert np.isnan(duo_jax.score(params, text, n_samples=1).stderr)


def test_the_error_of_a_score_is_that_of_the_mean_of_its_estimates(params, monkeypatch):
    told = iter((10.0, 20.0, 60.0))
    monkeypatch.setattr(likelihood, "nll_sum", lambda *_, **__: {"nll": next(told), "tokens": 10})
    score = duo_jax.score(params, "The town", n_samples=3)
    assert tuple(score) == pytest.approx((3, ((2**2 + 1**2 + 3**2) / 2 / 3) ** 0.5))


def test_seeds_and_blocks_of_rows_have_noise_of_their_own(params):
    row = [5] * 32
    one, other = (duo_jax.score(params, [row] * 32, n_samples=1, seed=seed).nll for seed in (0, 1))
    assert one != pytest.approx(other, rel=1e-6)
    assert duo_jax.score(params, [row] * 64, n_samples=1).nll != pytest.approx(one, rel=1e-6)


def test_a_text_may_end_where_its_document_does():
    params = duo_jax.load("quickstart")
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    eos = tokenizer.eos_id
    whole, ended = (duo_jax.sample(params, 8, batch_size=64, seed=1, until_eos=until) for until in (False, True))
    np.testing.assert_array_equal(whole.tokens, ended.tokens)
    inside = (whole.tokens[:, 1:-1] == eos).any(axis=1)
    assert 0 < inside.sum() < 64
    for row, text, shorter in zip(whole.tokens, whole.text, ended.text, strict=True):
        assert text.startswith(shorter)
        end = 1 + np.argmax(np.append(row[1:], eos) == eos)
        assert (len(shorter) < len(text)) == bool(tokenizer.decode(row[end:]).strip())


def test_a_score_is_a_pair(params):
    score = duo_jax.score(params, "The river is long", n_samples=2)
    nll, stderr = score
    assert (nll, stderr) == (score.nll, score.stderr)
    assert float(score) == nll
    assert copy.deepcopy(score).tokens == score.tokens
    assert jax.tree.map(lambda x: 2 * x, score) == (2 * nll, 2 * stderr)
    assert score._replace(nll=1.0).nll == 1.0
    assert "tokens=" in repr(score)
    assert jax.tree.map(lambda x: 2 * x, score).tokens == score._replace(nll=1.0).tokens == 0, (
        "they are no texts' scores"
    )


def test_what_is_no_network_is_told(params):
    with pytest.raises(duo_jax.UserError, match="path_or_name is None; give a path or a name"):
        duo_jax.load(None)
    for call in (duo_jax.sample, lambda p: duo_jax.score(p, "text"), lambda p: duo_jax.export(p, "somewhere")):
        for wrong in ("quickstart", None, params.weights):
            with pytest.raises(duo_jax.UserError, match=r"give what duo_jax\.load returns"):
                call(wrong)
    with pytest.raises(duo_jax.UserError, match="score takes one text"):
        duo_jax.score(params, ["a", "b"])
    assert repr(params).startswith("Params(duo_base, ")
    assert len(repr(params)) < 300


def test_an_autoregressive_score_counts_what_is_predicted(params):
    net = dataclasses.replace(params.network, algo="ar")
    untrained = params.replace(network=net, weights=net.init(jax.random.key(0)))
    # All logits are equal, and PAD is never predicted.
    for length in (2, 5, 30):
        score = duo_jax.score(untrained, np.arange(length), n_samples=2)
        assert score.nll == pytest.approx(np.log(299), rel=1e-5)
        assert score.tokens == length - 1
    with pytest.raises(duo_jax.UserError, match="nothing to score"):
        duo_jax.score(untrained, [5])
    with pytest.raises(duo_jax.UserError, match="a token id is 299, the mask, which no text holds"):
        duo_jax.score(untrained, [5, 299])
    assert np.isfinite(duo_jax.score(params, [5, 299]).nll), "uniform-state networks know no mask"


def test_a_score_after_a_prompt_is_that_of_the_rest(params):
    # Of an autoregressive network, exactly: the whole is its beginning and what follows it.
    net = dataclasses.replace(params.network, algo="ar")
    weights = net.init(jax.random.key(0))
    weights["head"]["kernel"] = 0.3 * jax.random.normal(jax.random.key(1), weights["head"]["kernel"].shape)
    causal = params.replace(network=net, weights=weights)
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    beginning, end = "The town lies", " on the bank"
    whole, rest = duo_jax.score(causal, beginning + end), duo_jax.score(causal, end, prompt=beginning)
    first = duo_jax.score(causal, [tokenizer.bos_id, *tokenizer.encode(beginning)])
    assert (whole.tokens, rest.stderr) == (first.tokens + rest.tokens, 0)
    assert whole.nll * whole.tokens == pytest.approx(first.nll * first.tokens + rest.nll * rest.tokens, rel=1e-5)
    # Of a diffusion network the same tokens are scored, and those alone.
    assert duo_jax.score(params, end, prompt=beginning).tokens == len(tokenizer.encode(beginning + end)) + 1 - (
        len(tokenizer.encode(beginning))
    )
    for wrong, message in (
        ({"prompt": "a" * 100}, "with BOS and EOS, and the network reads 32"),
        ({"prompt": 5}, "give text"),
        ({"prompt": "a", "text_or_tokens": [1, 2]}, "a prompt was given with token ids"),
    ):
        with pytest.raises(duo_jax.UserError, match=message):
            duo_jax.score(params, **{"text_or_tokens": "text", **wrong})


def test_short_texts_share_a_program(params):
    duo_jax.score(params, "The town")
    compiled = likelihood.nll_sum._cache_size()
    for text in ("A", "The river lies", "It is a city"):
        duo_jax.score(params, text)
    assert likelihood.nll_sum._cache_size() == compiled
    sizes = [len(next(rows.batches([[5] * 30] * n, 0, 32))["tokens"]) for n in range(1, 33)]
    assert sorted(set(sizes)) == [1, 2, 4, 8, 16, 32]


def test_scores_that_cannot_be_are_refused(params):
    with pytest.raises(duo_jax.UserError, match="at least 1 estimate"):
        duo_jax.score(params, "text", n_samples=0)
    with pytest.raises(duo_jax.UserError, match="token ids must lie in"):
        duo_jax.score(params, [1, 2, 300])
    with pytest.raises(duo_jax.UserError, match="token ids must lie in"):
        duo_jax.score(params, [1, 2, -1])
    with pytest.raises(duo_jax.UserError, match="differ in length"):
        duo_jax.score(params, [[1, 2], [3]])
    with pytest.raises(duo_jax.UserError, match="must be from 0 to"):
        duo_jax.score(params, "text", seed=-1)
    with pytest.raises(duo_jax.UserError, match="whole numbers of shape"):
        duo_jax.score(params, np.zeros((0, 3), int))
    with pytest.raises(duo_jax.UserError, match="whole numbers"):
        duo_jax.score(params, np.zeros((2, 3)))
    with pytest.raises(duo_jax.UserError, match="the text is empty"):
        duo_jax.score(params, "")
    with pytest.raises(duo_jax.UserError, match="the rows have 500 tokens, and the network reads 32"):
        duo_jax.score(params, [5] * 500)
    for wrong in ({"n_samples": 2.5}, {"n_samples": "2"}, {"seed": "x"}):
        with pytest.raises(duo_jax.UserError, match="must be a whole number"):
            duo_jax.score(params, "text", **wrong)


def test_a_score_does_not_depend_on_the_order_of_its_rows(params):
    """Each row is seen at all noise levels, whatever its place. Within 5.3 standard errors: a false alarm in 8 million."""
    easy, hard = [5] * 32, list(range(40, 72))
    one, other = (duo_jax.score(params, rows, n_samples=400) for rows in ([easy, hard], [hard, easy]))
    assert abs(one.nll - other.nll) < 5.3 * (one.stderr**2 + other.stderr**2) ** 0.5


def test_eval_and_sample_from_the_command_line(trained, text_folder, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    settings = trained_settings(text_folder)
    first = run(command("configs/quickstart.py", workdir, {**settings, "mode": "eval"}))
    assert first.returncode == 0, first.stderr
    assert "held-out tokens of text" in first.stdout
    report = (workdir / "eval.json").read_text()
    assert f"PPL {json.loads(report)['ppl']:.2f}" in first.stdout

    second = run(command("configs/quickstart.py", workdir, {**settings, "mode": "sample"}))
    assert second.returncode == 0, second.stderr
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["text"] in second.stdout
    assert rows[0]["n_steps"] == 4
    assert len(rows[0]["tokens"]) == 32

    (tmp_path / "other.txt").write_text(
        "\n\n".join(f"Ein ganz anderer Text, Absatz {i}, über nichts." for i in range(400))
    )
    changed = {"data.path": str(tmp_path / "other.txt"), "data.dir": str(tmp_path / "shards"), "mode": "eval"}
    third = run(command("configs/quickstart.py", workdir, {**settings, **changed}))
    assert third.returncode == 2
    assert "another tokenizer" in third.stderr

    other = run(command("configs/quickstart.py", workdir, {**settings, "mode": "sample", "model.dim": 64}))
    assert other.returncode == 2
    assert "dim is 64, in the checkpoint 32" in other.stderr
    assert "Traceback" not in other.stderr


def test_evaluations_compare(params):
    batches = [{"tokens": np.full((4, 32), 7, np.int32), "mask": np.ones((4, 32), np.float32)}] * 3
    first, second = (likelihood.evaluate(params.weights, params.network, batches) for _ in range(2))
    assert first == second
    assert first.tokens == 3 * 4 * 32


def test_more_draws_of_noise_make_a_bound_surer(params):
    """Of 40 equal batches nothing but the noise differs; 9 draws divide its error by 3 (chance: 10% of each error)."""
    batches = [{"tokens": np.full((4, 32), 7, np.int32), "mask": np.ones((4, 32), np.float32)}] * 40
    once, often = (likelihood.evaluate(params.weights, params.network, batches, draws=draws) for draws in (1, 9))
    assert once.tokens == often.tokens == 40 * 4 * 32
    assert 2.0 < once.stderr / often.stderr < 4.5
    assert 0.6 < often.noise / often.stderr < 1.6  # equal texts: all of it is noise
    assert abs(once.nll - often.nll) < 5 * once.stderr
    assert f"± {often.stderr:.4f} nats/token, {often.noise:.4f} by the noise" in run_lib.describe(
        often, {"uniform": 300.0}
    )


def test_evaluate_measures_what_the_command_does(trained, params, text_folder, tmp_path, monkeypatch):
    copied = shutil.copytree(trained, tmp_path / "run")
    wanted = {"mode": "eval", "eval.path": str(text_folder / "text.jsonl"), "eval.draws": 2, "eval.batch_size": 16}
    modes.run(make_config({**trained_settings(text_folder), **wanted}), str(copied))
    told = json.loads((copied / "zero_shot.jsonl").read_text())
    found = duo_jax.evaluate(params, text_folder / "text.jsonl", draws=2)
    assert found.figures() == pytest.approx({name: told[name] for name in found.figures()}, rel=1e-6)
    padded = duo_jax.evaluate(params, text_folder / "text.jsonl", packing="padded", document_ends=True)
    assert padded.tokens != found.tokens
    for wrong, message in (
        ({"path": tmp_path / "nothing"}, "does not exist|nothing"),
        ({"path": None}, "path is None; give a text file"),
        ({"draws": 0}, "draws 0; both must be at least 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; it must be a whole number"),
        ({"detokenizer": "x"}, "x"),
        ({"packing": "x"}, "x"),
        ({"params": "quickstart"}, r"give what duo_jax\.load returns"),
    ):
        with pytest.raises(duo_jax.UserError, match=message):
            duo_jax.evaluate(**{"params": params, "path": text_folder / "text.jsonl"} | wrong)
