"""The page that replays how texts were sampled."""

import dataclasses
import json
import re

import numpy as np
import pytest

import duo_jax
from duo_jax.data import tokenizers
from duo_jax.data.tokenizer import Tokenizer
from duo_jax.results import Samples
from duo_jax.sampling import replay


class Letters(Tokenizer):
    """Id 0 is special; the others decode to what they are given."""

    def __init__(self, texts):
        super().__init__(
            "letters", 1 + len(texts), dict.fromkeys(("bos_id", "eos_id", "pad_id", "mask_id"), 0), {0: "[X]"}
        )
        self.texts = texts

    def _encode_batch(self, texts):
        raise NotImplementedError

    def _decode(self, ids):
        return "".join(self.texts[i - 1] for i in ids)

    def _files(self):
        return {}


def data_of(page):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_the_page_holds_every_step_of_every_text():
    trajectory = np.random.default_rng(0).integers(0, 4, (6, 3, 5))
    trajectory[3] = trajectory[2]
    data = data_of(replay.page(Letters("abc"), trajectory))
    assert data["pieces"] == {"0": "[X]", "1": "a", "2": "b", "3": "c"}
    assert data["special"] == [0]
    assert len(data["texts"]) == 3
    for i, text in enumerate(data["texts"]):
        tokens, steps = list(text["first"]), [text["first"]]
        for changes in text["changes"]:
            for position, token in changes:
                assert tokens[position] != token
                tokens[position] = token
            steps.append(list(tokens))
        assert steps == trajectory[:, i].tolist()
        assert text["changes"][2] == []


def test_a_text_cannot_end_the_pages_data():
    pieces = ["</script>", "<!-- <script>", '"', "\\", "é\u2028"]
    page = replay.page(Letters(pieces), np.arange(6).reshape(1, 1, 6))
    assert data_of(page)["pieces"] == {"0": "[X]"} | {str(i + 1): piece for i, piece in enumerate(pieces)}
    assert page.count("<script") == page.count("</script>") == 2


def test_replaying_sampled_texts(params, tmp_path):
    result = duo_jax.sample(params, n_steps=2, batch_size=2, length=20, trajectory=True)
    path = tmp_path / "replay.html"
    path.write_text("old", encoding="utf-8")
    duo_jax.replay(params, result, path)
    data = data_of(path.read_text(encoding="utf-8"))
    assert [len(text["changes"]) for text in data["texts"]] == [2, 2]
    with pytest.raises(duo_jax.UserError, match="there are no steps to replay"):
        duo_jax.replay(params, duo_jax.sample(params, n_steps=2, length=20), path)
    with pytest.raises(duo_jax.UserError, match=r"nowhere.* cannot be written: .*; give another path\.$"):
        duo_jax.replay(params, result, tmp_path / "nowhere" / "replay.html")
    with pytest.raises(duo_jax.UserError, match="path is None; give a file"):
        duo_jax.replay(params, result, None)


def test_pieces_join_to_the_text(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s"]), encoding="utf-8")
    words, pairs = tokenizers.load(str(path)), duo_jax.api.tokenizer_of(duo_jax.load("quickstart").tokenizer)
    for tokenizer in (words, pairs):
        ids = [tokenizer.bos_id, *tokenizer.encode("the dogs the dog")]
        pieces = data_of(replay.page(tokenizer, np.array(ids).reshape(1, 1, -1)))["pieces"]
        text = "".join(pieces[str(i)] for i in ids)
        assert text == tokenizer.special_names[tokenizer.bos_id] + (tokenizer is words) * " " + "the dogs the dog"


def test_a_mask_is_shown_as_one(params, tmp_path):
    """Though tokenizers may call the same id by another name; for a uniform-state network it is not a mask."""
    masked = params.replace(network=dataclasses.replace(params.network, algo="mdlm", mask_id=0))
    tokens = np.zeros((1, 4), np.int32)
    samples = Samples(tokens, [""], np.zeros(1), 1, tokens[None])
    for network, shown in ((masked, True), (params, False)):
        duo_jax.replay(network, samples, tmp_path / "page.html")
        (piece,) = data_of((tmp_path / "page.html").read_text(encoding="utf-8"))["pieces"].values()
        assert (piece == "▒") == shown
