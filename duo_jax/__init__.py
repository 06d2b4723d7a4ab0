"""duo_jax: The Diffusion Duality in JAX. Uniform-state diffusion language models that write all tokens at once.

    params = duo_jax.load("runs/quickstart")
    print(duo_jax.sample(params, n_steps=4).text[0])
    print(duo_jax.score(params, "The history of the town begins in 1204."))

Names are loaded at first use, so that `import duo_jax` is quick and starts no device.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["UserError", "evaluate", "export", "load", "replay", "sample", "score", "train"]

_PARTS = ("api", "config", "convert", "data", "diffusion", "evaluation", "models", "objectives", "sampling", "training")
_MODULE_OF = dict.fromkeys(("evaluate", "export", "load", "replay", "sample", "score", "train"), "duo_jax.api") | {
    "UserError": "duo_jax.errors"
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    if name in _PARTS:
        return importlib.import_module(f"duo_jax.{name}")
    raise AttributeError(f"module 'duo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
