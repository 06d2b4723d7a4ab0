"""A small local text, and the shards made from it."""

import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from duo_jax.data import prepare

WORDS = "the a cat dog sees runs over under small old red house river and then slowly naïve 北京 😀 12 7 , .".split()


def make_texts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, 60))) for _ in range(count)]


def data_config(directory, **values):
    default = {"source": "text", "path": "", "tokenizer": "bpe", "bpe_size": 300, "dir": str(directory / "shards")}
    return ConfigDict(default | {"packing": "packed", "workers": 0} | values)


@pytest.fixture(scope="session")
def texts():
    return make_texts(400)


@pytest.fixture(scope="session")
def data(tmp_path_factory, texts):
    """A config block for a text of 400 documents in one .jsonl file."""
    directory = tmp_path_factory.mktemp("text")
    path = directory / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return data_config(directory, path=str(path))


@pytest.fixture(scope="session")
def folder(data):
    return prepare.prepare(data, verbose=False)
