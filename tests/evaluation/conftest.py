"""A judge of texts, and the command that asks it, as several files of tests use them."""

import contextlib
import sys

import plain_language_models as plain
import pytest

from duo_jax.evaluation import generate_quality


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
    """The folder of a tiny GPT-2."""
    bpe = plain.tokenizer()
    return plain.write_gpt2(tmp_path_factory.mktemp("judge"), plain.weights(plain.GPT2, bpe.get_vocab_size()), bpe)


@pytest.fixture
def door(monkeypatch):
    """Returns a function that runs the command in this process, where what it has compiled is kept."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["generate_quality", *map(str, args)])
        # These two change the process for good; the subprocesses below test the first.
        monkeypatch.setattr(generate_quality.cli, "one_line_errors", contextlib.nullcontext)
        monkeypatch.setattr(generate_quality.cli, "keep_memory", lambda: None)
        generate_quality.main()

    return call
