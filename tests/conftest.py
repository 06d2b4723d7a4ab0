"""Shared by all tests: the CPU backend, and where the reference's golden vectors lie."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDENS = ROOT.parent / "shared" / "goldens"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many tests, and the commands that they start, compile the same programs: most of the time that the tests take.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# And half of the rest; a program that runs once on a tiny network gains nothing from being optimized. Set it to false to
# test what users compile.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")


@pytest.fixture(scope="session")
def golden():
    """Returns a function that loads one file of golden vectors; skips where the folder is absent."""
    import numpy as np

    def load(name: str) -> dict:
        path = GOLDENS / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"no golden vectors at {path}")
        with np.load(path, allow_pickle=False) as file:
            return dict(file)

    return load


@pytest.fixture
def optimized():
    """For a test that runs long what it compiles once: what it compiles is optimized."""
    import jax

    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """A folder with `text.jsonl`, some real paragraphs, in which shards are made once for all tests."""
    import helpers

    folder = tmp_path_factory.mktemp("text")
    helpers.write_text(folder)
    return folder


@pytest.fixture(scope="session")
def trained(text_folder, tmp_path_factory):
    """The workdir of a tiny run of 20 steps, trained through the loop; tests must not change it."""
    import helpers

    from duo_jax.training import loop

    workdir = tmp_path_factory.mktemp("trained")
    loop.train(helpers.make_config(helpers.trained_settings(text_folder)), str(workdir))
    return workdir
