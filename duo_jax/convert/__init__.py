"""Reads and writes weights, in the reference's files and in ours.

`python -m duo_jax.convert --from X --to DIR` is the command; docs/checkpoints.md lists the released models.
"""

from duo_jax.convert.arrays import from_torch, to_torch
from duo_jax.convert.files import check_new, is_folder, local, place, read, step, write
from duo_jax.convert.lightning import write_lightning

__all__ = [
    "check_new",
    "from_torch",
    "is_folder",
    "local",
    "place",
    "read",
    "step",
    "to_torch",
    "write",
    "write_lightning",
]
