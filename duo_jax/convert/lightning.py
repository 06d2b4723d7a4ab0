"""Writes a Lightning checkpoint that the PyTorch reference loads for evaluation, sampling and distillation."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from duo_jax.convert import arrays
from duo_jax.errors import UserError, first_line
from duo_jax.models.network import Params

# Lightning upgrades files of older versions by this number; the reference was written for 2.2.
_VERSION = "2.2.1"
_DECAY = 0.9999


def write_lightning(params: Params, path: str | Path, *, step: int = 0) -> None:
    """Writes a checkpoint in which both the last and the averaged weights are those of `params`.

    It holds what the reference reads to load a network (`load_from_checkpoint`) and no optimizer state: training can start
    from it, but not resume.

    Args:
        params: the network.
        path: a file that does not exist yet.
        step: the training step of the weights, if known.

    Raises:
        UserError: PyTorch is not installed, or the file exists or cannot be written.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError("writing a .ckpt needs PyTorch: run `pip install -e '.[torch]'`.") from error
    path = Path(path).expanduser().absolute()
    if path.exists():
        raise UserError(f"{path} exists; give a new file.")
    state = arrays.to_torch(params)
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in state.items()}
    done = {"total": {"completed": step}, "current": {"completed": 0}}
    whole = {
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": _VERSION,
        "state_dict": {f"backbone.{key}": value for key, value in tensors.items()},
        "ema": {
            "decay": _DECAY,
            "num_updates": step,
            "shadow_params": [value for key, value in tensors.items() if key != arrays.INVERSE_FREQUENCY],
        },
        # The reference reads how much of an epoch was done, to continue at that point of the data.
        "loops": {"fit_loop": {"epoch_progress": done, "epoch_loop.batch_progress": done}},
    }
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save(whole, file)
        aside.rename(path)
    except (OSError, RuntimeError) as error:  # PyTorch raises a RuntimeError if the disk is full
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path} cannot be written: {reason}.") from error
    finally:
        aside.unlink(missing_ok=True)
