"""Orbax checkpoints of everything a run is, and reading them back, whole or as a network alone.

A checkpoint `WORKDIR/checkpoints/STEP/` holds the items `params`, `ema`, `rest` (step, optimizer, key), `data` (position in
the data) and `record` (config, network, and what else describes the run). It is written aside by a background thread and
marked complete at the end, so a kill at any moment leaves the ones before it whole. The tokenizer lies in
`WORKDIR/tokenizer/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from duo_jax import convert
from duo_jax.errors import UserError
from duo_jax.models.network import Network, Params
from duo_jax.training.state import TrainState

FOLDER = "checkpoints"
TOKENIZER = "tokenizer"
FORMAT = 1


def _full_disk(error: BaseException) -> bool:
    """Whether an error, or one that it wraps, says that the disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) == errno.ENOSPC or "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _rest(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps beside the weights."""
    names = ("step", "opt_state", "key", "teacher", "loss_scale")
    return {name: getattr(state, name) for name in names}


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns what Orbax raises on a damaged checkpoint into one sentence."""
    try:
        yield
    except (OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"{folder} is damaged ({reason}); remove it, and the checkpoint before it will be used."
        ) from error


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | Path, keep: int) -> None:
        """Opens, or creates, the folder.

        Raises:
            UserError: the folder cannot be written.
        """
        self.folder = Path(workdir).resolve() / FOLDER
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--workdir={workdir} cannot be written: {error.strerror}.") from error
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def check_space(self, state: Any) -> None:
        """Raises UserError if two more checkpoints of `state` would not fit on the disk."""
        need = 2 * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(
                f"{self.folder} has {free / 2**20:,.0f} MiB free, but two checkpoints of this run take {need / 2**20:,.0f} "
                "MiB; free some space or give another --workdir."
            )

    def save(self, state: TrainState, data: dict[str, Any], record: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once `state` may be changed.

        Args:
            state: saved under its step.
            data: the data iterator's position, JSON.
            record: what describes the run, JSON; see `record`.

        Raises:
            UserError: the disk is full (now, or when the last checkpoint was written).
        """
        step = int(state.step)
        if step == self.latest():
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            ema=ocp.args.StandardSave(state.ema),
            rest=ocp.args.StandardSave(_rest(state)),
            data=ocp.args.JsonSave(data),
            record=ocp.args.JsonSave(record),
        )
        self._guard(lambda: self._manager.save(step, args=items))

    def record(self, step: int) -> dict[str, Any]:
        """Returns the record that was saved with a step."""
        with _readable(self.folder / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state, placed as the shapes and shardings of `like` say, and the data position."""
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            ema=ocp.args.StandardRestore(like.ema),
            rest=ocp.args.StandardRestore(_rest(like)),
            data=ocp.args.JsonRestore(),
        )
        with _readable(self.folder / str(step)):
            got = self._manager.restore(step, args=items)
        return TrainState(params=got["params"], ema=got["ema"], **got["rest"]), got["data"]

    def wait(self) -> None:
        """Returns when all that was saved is on the disk; raises what writing it raised."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, then lets go of the folder."""
        self.wait()
        self._manager.close()

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            if not _full_disk(error):
                raise
            raise UserError(
                f"the disk of {self.folder} is full; the newest whole checkpoint is step {self.latest()}. Free some space "
                "and run the same command again to go on from there."
            ) from error


def record(config: ConfigDict, network: Network) -> dict[str, Any]:
    """Returns what a checkpoint says of the run that wrote it, as JSON."""
    return {"format": FORMAT, "config": config.to_dict(), "network": dataclasses.asdict(network)}


def is_run(path: Path) -> bool:
    """Whether a folder is a run's workdir, the folder of its checkpoints, or that of one of them."""
    path = path.resolve()
    step = path.parent.name == FOLDER and path.name.isdigit()
    return step or path.name == FOLDER or (path / FOLDER).is_dir()


def _converted(path: Path) -> bool:
    """Whether a path is a folder of converted weights, in which no run keeps its checkpoints."""
    return not (path / FOLDER).is_dir() and convert.is_folder(path)


def find(path: str | Path) -> tuple[Path, int]:
    """Returns the run's folder and the step that a path means: a workdir (its newest step) or a step's own folder.

    A folder of weights as `duo_jax.convert` writes it stands for itself, at the step that it tells.

    Raises:
        UserError: there is no checkpoint at the path.
    """
    path = Path(path).expanduser().resolve()
    if path.parent.name == FOLDER and path.name.isdigit() and path.is_dir():
        return path.parent.parent, int(path.name)
    if _converted(path):
        return path, convert.step(path)
    folder = path if path.name == FOLDER else path / FOLDER
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run's workdir or one of its folders {FOLDER}/STEP.")
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    steps = [step for step in steps if (folder / str(step) / "record").is_dir()]
    if not steps:
        raise UserError(f"{path} holds no checkpoint; give a run's workdir or one of its folders {FOLDER}/STEP.")
    return folder.parent, max(steps)


def read(path: str | Path, *, ema: bool = True) -> tuple[Params, dict[str, Any]]:
    """Returns the network of a checkpoint on the default device, and the checkpoint's record.

    Args:
        path: a workdir, the folder of one step, or a folder of converted weights, which has no record.
        ema: the averaged weights rather than the last ones.

    Raises:
        UserError: no checkpoint, or one that this version cannot read.
    """
    workdir, step = find(path)
    if _converted(workdir):
        return convert.read(workdir, ema=ema), {}
    folder = workdir / FOLDER / str(step)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            about = reader.restore(folder / "record")
        if about["format"] != FORMAT:
            raise UserError(f"{folder} has format {about['format']}; this version of duo_jax reads format {FORMAT}.")
        network = Network(**about["network"])
    except (KeyError, TypeError, FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is no checkpoint of duo_jax, or a damaged one: {error}.") from error
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    with _readable(folder), ocp.StandardCheckpointer() as reader:
        weights = reader.restore(folder / ("ema" if ema else "params"), like)
    return Params(weights=weights, network=network, tokenizer=str(workdir / TOKENIZER), averaged=ema), about
