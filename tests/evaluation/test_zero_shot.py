"""`mode=eval` on a text of any origin: zero-shot perplexity."""

import json
import math
import shutil

import numpy as np
import pytest
from helpers import make_config, trained_settings

from duo_jax import api, modes
from duo_jax.data import pipeline
from duo_jax.data.shards import MemoryStore
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood

SENTENCES = [f"the club 's {n} players were n't N years old , it <unk> ." for n in ("first", "second", "third")] * 40


@pytest.fixture
def evaluate(trained, text_folder, tmp_path):
    """Returns a function that evaluates the trained network on a text; nothing prepares shards for it."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)

    def call(**settings):
        everything = {**trained_settings(text_folder), "mode": "eval", "data.dir": str(tmp_path / "nowhere")}
        everything |= {f"eval.{name}": value for name, value in settings.items()}
        modes.run(make_config({**everything, "eval.batches": 1}), str(workdir))
        assert not (tmp_path / "nowhere").exists()
        lines = (workdir / "zero_shot.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    return call


def test_a_text_that_the_run_never_saw(evaluate, trained, tmp_path, capsys):
    path = tmp_path / "ptb.jsonl"
    path.write_text("".join(json.dumps({"sentence": text}) + "\n" for text in SENTENCES), encoding="utf-8")
    about = {"path": str(path), "field": "sentence", "detokenizer": "ptb"}
    evaluate(**about)
    joined, run_on = evaluate(**about, document_ends=False)
    assert f"tokens of {path}" in capsys.readouterr().out
    assert (joined["path"], joined["detokenizer"], joined["document_ends"]) == (str(path), "ptb", True)
    assert (run_on["document_ends"], run_on["step"], run_on["packing"]) == (False, 20, "packed")

    params = api.load(trained)
    tokenizer = api.tokenizer_of(params.tokenizer)
    texts = [text.replace(" 's", "'s").replace(" n't", "n't").replace(" N ", " 1 ") for text in SENTENCES]
    ids = tokenizer.encode_batch([text.replace("<unk>", "?") for text in texts])
    length = params.network.length
    for report, end in ((joined, 1), (run_on, 0)):
        rows = sum(len(i) + end for i in ids) // (length - 2)
        assert report["tokens"] == rows * length, "the whole set, but for the last piece of a row"
        assert report["ppl"] == pytest.approx(math.exp(report["nll"]))
        assert report["uniform_ppl"] == tokenizer.vocab_size
    # What the file says is the likelihood of those rows.
    store = MemoryStore("", [np.array([*i, tokenizer.eos_id]) for i in ids], tokenizer.facts(), ended=True)
    batches = pipeline.heldout_batches(store, length=length, batch_size=16)
    assert likelihood.evaluate(params.weights, params.network, batches).nll == pytest.approx(joined["nll"], rel=1e-5)


def test_what_does_not_fit_is_told(evaluate, tmp_path):
    with pytest.raises(UserError, match="There is no text at"):
        evaluate(path=str(tmp_path / "missing.txt"))
