"""Shared by all tests: the CPU backend, and where the reference's golden vectors lie."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

GOLDENS = Path(__file__).resolve().parents[2] / "shared" / "goldens"


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
