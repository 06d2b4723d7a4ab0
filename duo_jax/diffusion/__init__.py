"""The mathematics: schedules, uniform-state and absorbing diffusion, the duality. Arrays in, arrays out."""

import importlib
from types import ModuleType

_FILES = ("absorbing", "arrays", "categorical", "distillation", "duality", "operators", "schedules", "uniform")


def __getattr__(name: str) -> ModuleType:
    """Imports a file of this folder where it is first named, as in `duo_jax.diffusion.uniform`."""
    if name in _FILES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
