"""A small local text, and the shards made from it."""

import json

import pytest
from small_text import data_config, make_texts

from duo_jax.data import prepare


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
