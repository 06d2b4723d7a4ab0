"""Samplers on networks: every algorithm, strides, batches, devices, and what is compiled."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ROOT, make_config, of_algorithm, trained_settings
from known_joint import FALSE_ALARM, p_value

import duo_jax
from duo_jax import modes, sampling
from duo_jax.diffusion import absorbing, categorical
from duo_jax.diffusion.arrays import keys_of_rows, numbered_keys
from duo_jax.models.network import Network
from duo_jax.sampling import engine

LENGTH = 12


def make(algo, vocab=40, length=LENGTH, **sizes):
    """A small network with random weights everywhere."""
    sizes = {"dim": 16, "blocks": 2, "heads": 2, "cond_dim": 8} | sizes
    network = Network(
        algo=algo, vocab_size=vocab, mask_id=vocab - 1, length=length, dropout=0.0, precision="float32", attention="xla",
        **sizes,
    )  # fmt: skip
    weights = network.init(jax.random.key(0))
    leaves, tree = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return network, jax.tree.unflatten(tree, noisy)


def test_the_cache_gives_what_the_whole_text_gives():
    network, weights = make("ar")
    tokens = jax.random.randint(jax.random.key(2), (3, LENGTH), 0, 39)
    held = jnp.arange(LENGTH)[None] < jnp.array([1, 4, 1])[:, None]
    settings = sampling.Settings.for_network(network, 1, top_p=0.9)
    keys, knobs = numbered_keys(jax.random.key(3), 3), sampling.Knobs(0.9, 0.8)
    walk = sampling.sample_tokens(
        weights, keys, sampling.Given(tokens, held), knobs, network=network, settings=settings
    )
    assert int(walk.network_calls) == LENGTH - 1

    # The same draws, each from a fresh pass over the whole text.
    token_keys = keys_of_rows(keys, LENGTH - 1)

    @jax.jit
    def following(text, i):
        logits = network.logits(weights, network.hidden(weights, network.embed(weights, text), None))
        shaped = categorical.nucleus(categorical.without(logits[:, i], 39) / 0.8, 0.9)
        return text.at[:, i + 1].set(
            jnp.where(held[:, i + 1], tokens[:, i + 1], categorical.draw(token_keys[:, i], shaped))
        )

    text = tokens
    for i in range(LENGTH - 1):
        text = following(text, i)
    np.testing.assert_array_equal(walk.tokens, text)
    np.testing.assert_array_equal(walk.tokens[1, :4], tokens[1, :4])


def test_autoregressive_texts_follow_the_networks_joint():
    network, weights = make("ar", vocab=4, length=3, dim=8, blocks=1)
    given = sampling.Given(jnp.zeros((10_000, 3), jnp.int32), jnp.broadcast_to(jnp.arange(3) == 0, (10_000, 3)))
    settings = sampling.Settings.for_network(network, 1, sampler="autoregressive")
    walk = sampling.sample_tokens(
        weights, numbered_keys(jax.random.key(4), 10_000), given, sampling.Knobs(), network=network, settings=settings
    )
    texts = jnp.array([(0, a, b) for a, b in itertools.product(range(3), repeat=2)])
    hidden = network.hidden(weights, network.embed(weights, texts), None)
    log_p = jax.nn.log_softmax(categorical.without(network.logits(weights, hidden), 3), -1)
    joint = np.exp(sum(np.asarray(log_p)[np.arange(9), i, texts[:, i + 1]] for i in range(2))).reshape(3, 3)
    assert abs(joint.sum() - 1) < 1e-5
    assert p_value(walk.tokens[:, 1:], joint) > FALSE_ALARM


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("mdlm", {"sampler": "ancestral_cache"}),
        ("mdlm", {"sampler": "psi", "noise_removal": "greedy"}),
        ("sedd", {"sampler": "analytic", "top_p": 0.9}),
        ("d3pm", {}),
        ("ar", {"temperature": 0.7}),
        ("duo_base", {"sampler": "psi", "psi": "constant-0.9", "early_stop": 2}),
        ("duo_base", {"guidance": 2.0, "negative_prompt": "no"}),
        ("mdlm", {"guidance": 1.5, "top_p": 0.9}),
    ],
)
def test_every_algorithm_samples_with_a_prompt(params, algo, settings):
    result = duo_jax.sample(
        of_algorithm(params, algo), n_steps=5, prompt="The town of", batch_size=2, length=20, **settings
    )
    assert result.tokens.shape == (2, 20)
    assert all(text.startswith("The town of") for text in result.text)
    vocab = params.network.vocab_size
    assert 0 <= result.tokens.min() <= result.tokens.max() < (vocab if algo.startswith("duo") else vocab - 1)
    assert not np.array_equal(*result.tokens)
    calls = {"ar": 19}.get(algo, 12 if "guidance" in settings else 6)
    skips = "early_stop" in settings or settings.get("sampler") == "ancestral_cache"
    assert result.network_calls <= calls if skips else result.network_calls == calls


@pytest.mark.parametrize(
    ("algo", "settings", "share"),
    [
        ("duo_base", {}, 0.6),
        ("duo_base", {"sampler": "psi", "psi": sampling.Psi.throughout("constant-0.9")}, 0.75),
        ("duo_base", {"noise_removal": "greedy"}, 0.6),
        ("mdlm", {}, 0.1),
        ("mdlm", {"sampler": "psi", "psi": sampling.Psi.throughout("constant-0.9")}, 0.25),
        ("mdlm", {"noise_removal": "greedy"}, 0.1),
        ("d3pm", {}, 0.1),
        ("sedd", {"sampler": "analytic"}, 0.65),
        ("sedd", {}, 0.1),
    ],
)
def test_predictions_are_made_where_they_are_asked_for_and_the_text_is_that_of_the_whole_table(algo, settings, share):
    """Chunks of 64 of the asked tokens against a denoiser that gives all logits: the same draws, far fewer predictions."""
    network, weights = make(algo)
    shape = (16, LENGTH)  # three chunks, if all were asked for
    plan = sampling.Settings.for_network(network, 10, **settings)
    held = jnp.zeros(shape, bool).at[:, :2].set(True)
    given = sampling.Given(jnp.full(shape, 3), held)
    args = numbered_keys(jax.random.key(0), 16), given, network.vocab_size, plan, sampling.Knobs(1.0, 0.9)

    def whole(states, sigma, visitor, needs_prediction, *per_token):
        (z,) = states
        told = {"mdlm": jnp.zeros_like(sigma), "d3pm": jnp.minimum(sigma, -jnp.log(network.eps))}.get(algo, sigma)
        logits = network.logits(weights, network.hidden(weights, network.embed(weights, z), told))
        if algo == "sedd":
            logits = absorbing.sedd_log_score(logits, z, jnp.exp(-sigma))
        return visitor((logits,), *per_token)

    expected = jax.jit(lambda: engine.run(whole, *args))()
    found = jax.jit(lambda: engine.run(sampling.denoiser(network, weights), *args))()
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    assert len(np.unique(found.tokens[:, 2:])) > 10
    assert 0 < found.predictions / (16 * (LENGTH - 2) * plan.network_calls) < share


def test_neither_prompt_nor_seed_nor_temperature_compiles_anew(params):
    def sample(**settings):
        return duo_jax.sample(params, n_steps=2, top_p=0.9, length=20, batch_size=2, **settings)

    sample()
    before = sampling.sample_tokens._cache_size()
    sample(prompt="A town", seed=3, temperature=0.7)
    sample(infill="The ___ end")
    sample(prompt=["One", "Another one"])
    sample(temperature=2)
    sample(temperature=np.float32(0.5))
    assert sampling.sample_tokens._cache_size() == before
    sample(sampler="psi")
    assert sampling.sample_tokens._cache_size() == before + 1


def test_what_an_autoregressive_network_does_not_use_compiles_nothing(params):
    first = duo_jax.sample(of_algorithm(params, "ar"), n_steps=2, length=20)
    before = sampling.sample_tokens._cache_size()
    again = duo_jax.sample(of_algorithm(params, "ar"), n_steps=8, length=20, sampler="autoregressive")
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert sampling.sample_tokens._cache_size() == before


def test_an_autoregressive_row_of_which_nothing_is_held_begins_with_bos(params):
    given = [[5, 6, 0], [77, 8, 9]], [[1, 1, 0], [0, 0, 0]]
    tokens = duo_jax.sample(of_algorithm(params, "ar"), infill=given, batch_size=2, length=20).tokens
    assert tokens[0, :2].tolist() == [5, 6]
    assert tokens[1, 0] == duo_jax.sample(of_algorithm(params, "ar"), length=20).tokens[0, 0]


def test_guidance_does_not_lead_away_from_what_neither_text_holds(params):
    """Only one place in the middle is held: the unconditional text holds no BOS either, and the two are one where g = 1."""
    given = np.zeros(20, int), np.arange(20) == 9
    seen = []
    draw = sampling.networks.sample_tokens

    def spy(weights, keys, given, knobs, free, **kwargs):
        seen.append((np.asarray(given.held), np.asarray(free.held)))
        return draw(weights, keys, given, knobs, free, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling.networks, "sample_tokens", spy)
        duo_jax.sample(params, n_steps=2, infill=given, guidance=2.0, length=20)
        duo_jax.sample(params, n_steps=2, prompt="The", guidance=2, length=20)
    (held, free), (prompted, bos) = seen
    assert held[0].tolist() == given[1].tolist()
    assert not free.any()
    assert prompted[0, 0]
    assert bos[0].tolist() == [True] + 19 * [False]


def test_batches_come_as_they_are_finished(params):
    batches = []
    result = duo_jax.sample(params, n_steps=2, length=20, batch_size=5, rows_at_once=2, each=batches.append)
    assert [len(batch.text) for batch in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([batch.tokens for batch in batches]), result.tokens)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 2.0}, "n_steps is 2.0; it must be a whole number"),
        ({"length": 24.0}, "length is 24.0"),
        ({"batch_size": 1.5}, "batch_size is 1.5"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"seed": 2**40}, "from 0 to"),
        ({"seed": [1, "a"]}, "seed is 'a'"),
        ({"seed": [1, 2**40]}, "from 0 to"),
        ({"seed": []}, "the number of seeds is 0"),
        ({"seed": [1, 2], "batch_size": 3}, "batch_size is 3, but the number of seeds is 2; give one for each text"),
        ({"seed": [[1], [1, 2]]}, "seed is [1]"),
        ({"seed": b"3"}, "seed is b'3'"),
        ({"seed": jax.random.PRNGKey(3)}, "it must be a whole number"),
        ({"top_p": "x"}, "top_p is 'x'; it must be a number"),
        ({"temperature": None}, "temperature is None"),
        ({"guidance": float("nan"), "prompt": "The"}, "guidance is nan; it must be a finite number"),
        ({"guidance": float("inf"), "prompt": "The"}, "guidance is inf; it must be a finite number"),
        ({"prompt": 5}, "prompt is 5; give text"),
        ({"prompt": [5]}, "a prompt is not text"),
        ({"infill": 5}, "infill is 5; give text"),
        ({"infill": ([[1], [1, 2]], [[1], [1, 1]])}, "differ in length"),
        ({"infill": ([1, 2], [1.0, 0.5])}, "other values than true and false"),
        ({"infill": ([1.5, 2], [True, False])}, "give whole numbers"),
        ({"infill": ([1], [True], [1])}, "infill is neither text nor a pair of arrays"),
        ({"infill": ([-1, 0], [True, False])}, "held token ids must lie in"),
        ({"infill": ([2**33 + 5, 0], [True, False])}, "held token ids must lie in"),
        ({"sampler": "psi", "psi": 5}, "psi is 5; give one kappa mode"),
    ],
)
def test_wrong_kinds_of_values_are_told(params, kwargs, message):
    with pytest.raises(duo_jax.UserError, match=re.escape(message)):
        duo_jax.sample(params, **kwargs)


def test_an_autoregressive_text_has_two_tokens_at_least(params):
    with pytest.raises(duo_jax.UserError, match="at least 1 and 2"):
        duo_jax.sample(of_algorithm(params, "ar"), length=1)


def test_a_trajectory(params):
    """Of texts as long as the network's, which are no longer ones."""
    result = duo_jax.sample(params, n_steps=3, batch_size=3, rows_at_once=2, trajectory=True)
    assert result.trajectory.shape == (4, 3, 32)
    np.testing.assert_array_equal(result.trajectory[-1], result.tokens)
    assert duo_jax.sample(params, n_steps=3, length=20).trajectory is None


@pytest.mark.parametrize("algo", ["duo_base", "ar"])
def test_long_texts_grow_in_strides(params, algo):
    assert sampling.texts.window(params.network, 75, None) == (32, 16), (
        "half the network's length, unless said otherwise"
    )
    before = sampling.sample_tokens._cache_size()
    result = duo_jax.sample(
        of_algorithm(params, algo), n_steps=3, length=75, stride=20, batch_size=2, prompt="The river is"
    )
    assert result.tokens.shape == (2, 75)
    assert sampling.sample_tokens._cache_size() == before + 1
    assert all(text.startswith("The river is") for text in result.text)
    # 31 tokens, then 20 and 20, then the rest.
    assert result.network_calls == 4 * (31 if algo == "ar" else 4)


def test_a_window_sees_the_end_of_what_was_written():
    seen, numbers = [], []

    def draw(number, part):
        seen.append([x.copy() for x in part])
        numbers.append(number)
        tokens = np.where(part[1], part[0], 100 * len(seen) + np.arange(part[0].shape[1]))
        return sampling.Walk(tokens, np.int32(1), np.int32(part[1].size - part[1].sum()))

    length, window, stride = 19, 8, 4
    known = np.zeros((1, length), np.int32), np.arange(length)[None] < 2
    known[0][0, :2] = 1, 77
    places = sampling.texts._windows(length, window, stride)
    walk = sampling.texts._in_strides(draw, known, places, bos_id=1)
    text = walk.tokens[0]
    np.testing.assert_array_equal(text[:7], [1, 77, 102, 103, 104, 105, 106])
    tokens, held = seen[1]
    # BOS, the two last tokens, four new ones and one that is dropped.
    assert tokens[0, :3].tolist() == [1, 105, 106]
    assert held[0].tolist() == [True] * 3 + [False] * 5
    np.testing.assert_array_equal(text[7:11], [203, 204, 205, 206])
    assert walk.network_calls == len(seen) == 4
    assert numbers == [0, 1, 2, 3]
    assert walk.predictions == sum((~held).sum() for _, held in seen)
    assert text[-1] == 407  # the last window's last token stays
    assert (text > 0).all()


def test_each_batch_is_given_its_own_rows(params, monkeypatch):
    """Also of what guidance leads away from; the batches are no larger than they must be, and may differ in calls."""
    seen = []

    def draw(weights, keys, given, knobs, free, **_):
        seen.append([np.asarray(given.held), None if free is None else np.asarray(free.held)])
        return sampling.Walk(given.tokens, jnp.int32(10 - len(seen)), jnp.int32(0))

    monkeypatch.setattr(sampling.networks, "sample_tokens", draw)
    tokens, mask = np.arange(60).reshape(3, 20), np.zeros((3, 20), bool)
    mask[:2, 0] = mask[2, 5] = True
    result = duo_jax.sample(params, infill=(tokens, mask), guidance=2.0, batch_size=3, rows_at_once=2, length=20)
    (first, free), (last, none) = seen
    np.testing.assert_array_equal(first, mask[:2])
    np.testing.assert_array_equal(free, mask[:2])
    np.testing.assert_array_equal(last, mask[[2, 2]])
    assert not none.any()
    np.testing.assert_array_equal(result.tokens, tokens)
    assert result.network_calls == 9
    duo_jax.sample(params, length=20, batch_size=3)
    assert seen[-1][0].shape == (3, 20)


def test_batches_are_split_and_joined(params):
    assert (
        len({tuple(row) for row in duo_jax.sample(params, length=20, batch_size=5, rows_at_once=2).tokens.tolist()})
        == 5
    )
    done = []
    settings = sampling.Settings.for_network(params.network, 2)
    known = np.zeros((5, 20), np.int32), np.zeros((5, 20), bool)
    texts = sampling.texts.sample(
        params.weights, params.network, settings, sampling.texts.origins_of(0, 5), known, knobs=sampling.Knobs(), bos_id=0,
        rows_at_once=2,
        done=done.append,
    )  # fmt: skip
    assert [len(batch.tokens) for batch in done] == [2, 2, 1]
    assert texts.tokens.shape == (5, 20)


def test_two_devices_share_the_rows_and_give_the_same_texts(trained, params):
    code = (
        "import duo_jax, jax, json, sys; assert jax.device_count() == 2;"
        "p = duo_jax.load(sys.argv[1]); kw = dict(n_steps=3, length=20, prompt='The town');"
        "print(json.dumps([duo_jax.sample(p, batch_size=b, **kw).tokens.tolist() for b in (4, 3)]))"
    )
    xla_flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    result = subprocess.run(
        [sys.executable, "-c", code, str(trained)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    four, three = json.loads(result.stdout.splitlines()[-1])
    here = duo_jax.sample(params, n_steps=3, length=20, prompt="The town", batch_size=4)
    np.testing.assert_array_equal(four, here.tokens)
    assert four[:3] == three


def test_the_sample_mode_writes_what_was_asked(trained, text_folder, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(trained, workdir)
    chosen = {"n_steps": 3, "prompt": "The town", "num": 5, "batch_size": 2, "sampler": "psi", "psi.low": "pure-pc"}
    config = make_config(trained_settings(text_folder) | {f"sample.{name}": value for name, value in chosen.items()})
    modes.sample(config, str(workdir))
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 5
    printed = capsys.readouterr().out
    for i, row in enumerate(rows):
        assert row["text"].startswith("The town")
        assert (f"--- {i + 1} (" in printed) == (i < 4)
        assert len(row["tokens"]) == 32
        np.testing.assert_allclose(row["entropy"], sampling.unigram_entropy([row["tokens"]])[0])
    fixed = {name: rows[0][name] for name in ("network_calls", "n_steps", "sampler", "seed", "prompt", "rows_at_once")}
    assert fixed == {
        "network_calls": 4, "n_steps": 3, "sampler": "psi", "seed": 0, "prompt": "The town", "rows_at_once": 2,
    }  # fmt: skip
    assert rows[0]["psi"]["low"] == "pure-pc"


@pytest.mark.parametrize(
    ("algo", "kwargs", "message"),
    [
        ("duo_base", {"prompt": "word " * 40}, "BOS and the prompt are .* more than the length 32"),
        ("duo_base", {"infill": "word " * 40 + "___"}, "more than the length 32"),
        ("duo_base", {"infill": "no gap"}, "has no gap"),
        ("duo_base", {"infill": ([1] * 40, [True] * 40)}, "more than the length 32"),
        ("duo_base", {"infill": ([1, 2], [True])}, "a mask of the same shape"),
        ("duo_base", {"infill": ([300], [True])}, "must lie in"),
        ("duo_base", {"infill": ([[1], [2]], [[True], [True]])}, "2 rows for 1 texts"),
        ("duo_base", {"prompt": "a", "infill": "b ___"}, "both given"),
        ("duo_base", {"prompt": "a \ud800 b"}, "cannot encode"),
        ("duo_base", {"prompt": ["a", "b"]}, "2 prompts or infill texts were given for 1 texts"),
        ("duo_base", {"prompt": ["a", "b"], "batch_size": 3}, "2 prompts or infill texts were given for 3 texts"),
        ("duo_base", {"sampler": "autoregressive"}, "does not fit a network of the uniform process"),
        ("duo_base", {"guidance": 2.0}, "no prompt or infill to be guided by"),
        ("duo_base", {"negative_prompt": "x"}, "guidance is 1"),
        ("duo_base", {"stride": 4}, "stride is for texts longer"),
        ("duo_base", {"length": 60, "stride": 31}, "from 1 to 30"),
        ("duo_base", {"length": 60, "stride": 0}, "from 1 to 30"),
        ("duo_base", {"length": 60, "trajectory": True}, "within the network's length"),
        ("duo_base", {"length": 60, "prompt": "x", "guidance": 2.0}, "within the network's length"),
        ("duo_base", {"rows_at_once": 0}, "rows_at_once is 0"),
        ("duo_base", {"temperature": -1.0}, "temperature is -1"),
        ("ar", {"noise_removal": "greedy"}, "noise_removal is for diffusion networks"),
        ("ar", {"trajectory": True}, "trajectory is for diffusion networks"),
        ("ar", {"n_steps": 0}, "at least 1 step"),
        ("ar", {"sampler": "psi"}, "does not fit a network of the autoregressive process"),
        ("ar", {"infill": "The ___ end"}, "cannot look ahead"),
        ("ar", {"prompt": "x", "guidance": 2.0}, "guidance is for diffusion networks"),
        ("mdlm", {"infill": ([299], [True])}, "the mask itself"),
        ("sedd", {"infill": ([299], [True])}, "the mask itself"),
        ("mdlm", {"sampler": "analytic"}, "needs log-scores"),
        ("sedd", {"sampler": "analytic", "prompt": "x", "guidance": 2.0}, "mixes posteriors"),
    ],
)
def test_impossible_requests_get_one_line(params, algo, kwargs, message):
    with pytest.raises(duo_jax.UserError, match=message) as error:
        duo_jax.sample(of_algorithm(params, algo), **kwargs)
    assert "\n" not in str(error.value)
