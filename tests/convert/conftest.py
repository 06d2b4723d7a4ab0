"""Shared by the tests of converting: a trained network, and its weights in the reference's layout."""

import jax
import pytest

import duo_jax
from duo_jax import convert
from duo_jax.training import checkpoint


@pytest.fixture(scope="module")
def tokenizer(trained):
    return str(trained / checkpoint.TOKENIZER)


@pytest.fixture(scope="module")
def params(trained):
    return duo_jax.load(trained)


@pytest.fixture(scope="module")
def state(params):
    """The reference's state dict of the averaged weights."""
    return convert.to_torch(jax.device_get(params.weights), heads=2)


@pytest.fixture
def asked(tokenizer):
    return {"algo": "duo_base", "length": 32, "tokenizer": tokenizer}
