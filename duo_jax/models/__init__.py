"""The networks: the DiT, its attention, the chunked vocabulary head, and the bundle of weights that users hold."""

import importlib
from types import ModuleType

_FILES = ("attention", "dit", "head", "language_model", "layers", "network")


def __getattr__(name: str) -> ModuleType:
    """Imports a file of this folder where it is first named, as in `duo_jax.models.dit`."""
    if name in _FILES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
