import pytest

import duo_jax


@pytest.fixture(scope="module")
def params(trained):
    return duo_jax.load(trained)
