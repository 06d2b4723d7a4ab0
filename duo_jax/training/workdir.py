"""The folder of a run: checks that it can be one, and a lock so that only one process trains in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from duo_jax import files
from duo_jax.errors import UserError
from duo_jax.training import checkpoint

METRICS = "metrics.jsonl"
CONFIG = "config.json"
PARAMETERS = "parameters.txt"
PICTURE = "perplexity.png"
SAMPLES = "samples"
TENSORBOARD = "tensorboard"
_LOCK = ".lock"


def check(path: str | Path) -> Path:
    """Returns the absolute path of a folder to train in, without creating or changing it.

    Raises:
        UserError: it is a folder of converted weights, which a run would spoil, or it is named like a checkpoint folder.
    """
    folder = Path(path).expanduser().resolve()
    if checkpoint.is_converted(folder):
        raise UserError(
            f"{path} holds converted weights; give another --workdir (and --config.init_from={path} to start from them)."
        )
    if (run := checkpoint.run_of(folder)) and not checkpoint.steps(folder):
        raise UserError(
            f"{path} is named like a checkpoint folder; give the run's own folder, --workdir={run}, or another name."
        )
    return folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Creates the folder if it is missing, and locks out other processes that would train in it while the block runs.

    Raises:
        UserError: it cannot be written, or another process trains in it.
    """

    def busy() -> None:
        raise UserError(f"another process trains in {folder}; wait until it ends, or give another --workdir.")

    files.check_folder(folder)
    for name in (checkpoint.FOLDER, checkpoint.TOKENIZER, SAMPLES, TENSORBOARD):
        if (folder / name).exists():
            files.check_folder(folder / name)
    for name in (METRICS, CONFIG, PARAMETERS, PICTURE):
        files.check_file(folder / name)
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            with files.written(folder):
                stack.enter_context(files.locked(folder / _LOCK, busy))
        yield
