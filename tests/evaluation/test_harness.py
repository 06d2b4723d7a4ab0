"""The lm-evaluation-harness on a network: its requests answered, and the command line."""

import importlib
import json
import sys
import types

import jax
import numpy as np
import pytest
from helpers import run as run_command

import duo_jax
from duo_jax.evaluation import likelihood

pytest.importorskip("lm_eval")
from duo_jax.evaluation import harness_model

TASK = """
task: spelling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
# Words of the quickstart's text, and the same letters in an order that English does not have.
WORDS = ["station", "national", "located", "government", "university", "between"]
JUMBLED = ["toatnsi", "nlnaaoit", "lcdeoat", "vgtnmeonre", "vyusntriei", "wbteeen"]


@pytest.fixture(scope="module")
def params():
    return duo_jax.load("quickstart")


@pytest.fixture
def model(params):
    return harness_model.Model(params, n_samples=32, n_steps=4)


def request(*args):
    return types.SimpleNamespace(args=args)


def test_words_are_likelier_than_their_letters(model):
    context = "It is the largest in the country and"
    found = model.loglikelihood(
        [request(context, " " + word) for pair in zip(WORDS, JUMBLED, strict=True) for word in pair]
    )
    values = np.array([value for value, _ in found]).reshape(-1, 2)
    assert (values[:, 0] > values[:, 1] + 5).all()


def test_a_text_is_scored_as_what_it_is_made_of(model, params):
    # The space between context and continuation is the continuation's, wherever it was written.
    context, end = "The history of the town", " begins in 1204."
    (one,), (other,) = (
        model.loglikelihood([request(*args)]) for args in ((context, end), (context + " ", end.removeprefix(" ")))
    )
    assert one == other
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    before, after = tokenizer.encode(context), tokenizer.encode(context + end)
    tokens = [tokenizer.bos_id, *after]
    row = np.pad(np.array(tokens, np.int32), (0, 64 - len(tokens)))
    key = jax.random.key(0)
    nll, _ = likelihood.continuation(
        params.weights, row, 1 + len(before), len(tokens), key, network=params.network, n_samples=32
    )
    # In another row of another length the draws are others: a loose check that the same tokens are scored.
    assert -one[0] == pytest.approx(float(nll), rel=0.25)


def test_order_and_company_change_nothing(model):
    texts = [("The town", " is"), ("", "In the north of the country there is a small river"), ("A", " b" * 100)]
    together = model.loglikelihood([request(*text) for text in texts])
    assert together == model.loglikelihood([request(*text) for text in texts[::-1]])[::-1]
    assert together[0] == model.loglikelihood([request(*texts[0])])[0]
    assert all(np.isfinite(value) and value < 0 for value, _ in together)


def test_a_text_beyond_the_network_is_scored_in_pieces(model, params):
    rows = list(model._rows(list(range(10, 30)), list(range(100, 240))))
    room = params.network.length - 1
    assert [token for tokens, first in rows for token in tokens[first:]] == list(range(100, 240))
    assert all(len(tokens) <= params.network.length and tokens[0] == rows[0][0][0] for tokens, _ in rows)
    everything = [*range(10, 30), *range(100, 240)]
    for tokens, first in rows[1:]:
        at = everything.index(tokens[first])
        assert tokens[1:first] == everything[max(at - (first - 1), 0) : at]
        assert len(tokens) == room + 1
    assert list(model._rows([1], [])) == []


def test_rolling_likelihoods_count_every_token_once(model, params):
    text = "The station is located in the centre of the town. " * 12
    tokens = duo_jax.api.tokenizer_of(params.tokenizer).encode(text)
    assert len(tokens) > 2 * params.network.length
    nats = -model.loglikelihood_rolling([request(text)])[0] / len(tokens)
    score = duo_jax.score(params, text, n_samples=32)
    assert nats == pytest.approx(score.nll, abs=0.5)  # the same rows; two estimates
    assert model.loglikelihood_rolling([request("")]) == [0.0]


def test_generation_stops_where_it_is_told(model):
    context = "It is the largest in"
    (free,) = model.generate_until([request(context, {"until": [], "max_gen_toks": 20})])
    assert free
    stop = free[len(free) // 2]
    (cut,) = model.generate_until([request(context, {"until": [stop, ""], "max_gen_toks": 20})])
    assert cut == free.split(stop)[0]
    assert model.generate_until([]) == []
    with pytest.raises(duo_jax.UserError, match="asks for 64 tokens"):
        model.generate_until([request(context, {"max_gen_toks": 64})])


def test_a_task_from_the_command_line(tmp_path, monkeypatch):
    data = tmp_path / "words.jsonl"
    rows = [
        {"text": "It is the", "choices": [jumbled, word], "label": 1}
        for word, jumbled in zip(WORDS, JUMBLED, strict=True)
    ]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "spelling.yaml").write_text(TASK.format(path=data), encoding="utf-8")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    command = ["-m", "duo_jax.evaluation.harness", "--model=quickstart", "--n_samples=8", f"--include_path={tmp_path}"]
    done = run_command([sys.executable, *command, "--tasks=spelling", f"--out={tmp_path / 'out'}"])
    assert done.returncode == 0, done.stderr
    assert "spelling" in done.stdout
    found = json.loads((tmp_path / "out" / "harness.json").read_text())
    assert found["results"]["spelling"]["acc,none"] == 1.0
    assert found["settings"]["n_samples"] == 8
    for flags, told in (
        (["--tasks=speling"], "the harness knows no task 'speling'"),
        (["--tasks=spelling", "--n_samples=0"], "--n_samples must be at least 1"),
        (["--tasks=spelling", f"--include_path={data}"], "is not a folder"),
    ):
        done = run_command([sys.executable, *command, *flags])
        assert done.returncode == 2, done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr


def test_the_harness_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "duo_jax.evaluation.harness_model")
    with pytest.raises(duo_jax.UserError, match=r"pip install -e '\.\[harness\]'"):
        importlib.import_module("duo_jax.evaluation.harness_model")


@pytest.fixture
def told(monkeypatch):
    """What likelihoods are asked for: of each its length, and that of the place `told.wrong` is not what is greedy."""
    kept = types.SimpleNamespace(rows=[], firsts=[], keys=set(), n_samples=set(), wrong=None)

    def continuation(weights, row, first, length, key, *, network, n_samples):
        greedy = len(kept.rows) != kept.wrong
        kept.rows.append(row[:length].tolist())
        kept.firsts.append(first)
        kept.keys.add(tuple(jax.random.key_data(key).tolist()))
        kept.n_samples.add(n_samples)
        return np.float32(length), np.bool_(greedy)

    monkeypatch.setattr(likelihood, "continuation", continuation)
    return kept


def test_pieces_are_summed_and_greedy_where_all_are(params, told):
    model = harness_model.Model(params, n_samples=5, seed=3)
    text = "A", " b" * 100
    pieces = list(model._rows(*model._split(*text)))
    assert len(pieces) > 2
    for told.wrong in (None, 0, len(pieces) - 1):
        told.rows, told.firsts = [], []
        ((value, greedy),) = model.loglikelihood([request(*text)])
        assert value == -sum(len(row) for row, _ in pieces)
        assert greedy == (told.wrong is None)
        assert sorted(zip(told.rows, told.firsts, strict=True)) == sorted(pieces)
    assert told.keys == {tuple(jax.random.key_data(jax.random.key(3)).tolist())}
    assert told.n_samples == {5}


def test_a_rolling_likelihood_is_given_bos_alone(model, params, told):
    text = "The station is located in the centre of the town. " * 4
    tokenizer = duo_jax.api.tokenizer_of(params.tokenizer)
    model.loglikelihood_rolling([request(text)])
    assert set(told.firsts) == {1}
    written = [token for row in sorted(told.rows, key=len, reverse=True) for token in row[1:-1]]
    assert written == tokenizer.encode(text)
    assert {(row[0], row[-1]) for row in told.rows} == {(tokenizer.bos_id, tokenizer.eos_id)}


def test_what_was_answered_is_kept_for_the_next_time(model, told, monkeypatch):
    kept = []
    model.set_cache_hook(types.SimpleNamespace(add_partial=lambda *what: kept.append(what)))
    monkeypatch.setattr(
        harness_model.api, "sample", lambda *_, infill, **__: types.SimpleNamespace(tokens=infill[0] + 5)
    )
    pair, text, generation = ("The", " town"), ("The town",), ("The", {"until": []})
    found = model.loglikelihood([request(*pair)])
    rolling = model.loglikelihood_rolling([request(*text)])
    written = model.generate_until([request(*generation)])
    assert kept == [
        ("loglikelihood", pair, found[0]),
        ("loglikelihood_rolling", text, rolling[0]),
        ("generate_until", generation, written[0]),
    ]


def test_a_text_ends_before_the_first_of_its_stops():
    text = "one, two. three"
    assert harness_model._until(text, "two") == "one, "
    assert harness_model._until(text, ["three", "", "two"]) == harness_model._until(text, ["two", "three"]) == "one, "
    assert harness_model._until(text, []) == text


def test_a_context_is_cut_from_the_left_and_an_answer_at_its_end(params, monkeypatch):
    model = harness_model.Model(params, n_steps=5, seed=3)
    tokenizer, length = duo_jax.api.tokenizer_of(params.tokenizer), params.network.length
    written = tokenizer.encode("the station is in the north of the country, and the river")
    asked = []

    def sample(params, n_steps, *, seed, infill, each, **kwargs):
        assert (n_steps, seed) == (5, 3)
        asked.append([np.array(part) for part in infill])
        tokens = asked[-1][0].copy()
        for row, held in zip(tokens, asked[-1][1], strict=True):
            free = np.flatnonzero(~held)
            row[free] = np.resize(written, len(free))
        tokens[1, np.flatnonzero(~asked[-1][1][1])[4]] = tokenizer.eos_id
        return types.SimpleNamespace(tokens=tokens)

    monkeypatch.setattr(harness_model.api, "sample", sample)
    long, short = "A town lies on the bank of a river, and its history is long. " * 9, "The town"
    texts = model.generate_until([request(long, {"max_gen_toks": 10}), request(short, {})])
    ((tokens, held),) = asked
    room = length - 1 - 10
    assert tokens[0][held[0]].tolist() == [tokenizer.bos_id, *tokenizer.encode(long)[-room:]]
    assert tokens[1][held[1]].tolist() == [tokenizer.bos_id, *tokenizer.encode(short)]
    for row in held:
        assert row[: row.sum()].all()
    assert texts == [tokenizer.decode(written[:10]), tokenizer.decode(written[:4])]
    assert len(model.generate_until([request(long, {}), request(short, {"max_gen_toks": 3})])) == 2
    assert asked[-1][1][0].sum() == length - length // 2, (
        "half the network's length is for the answer, unless asked otherwise"
    )
