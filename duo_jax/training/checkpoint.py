"""Orbax checkpoints of a run's whole state, read back to resume the run or as a network alone.

A checkpoint `WORKDIR/checkpoints/STEP/` holds the items `params`, `ema`, `rest` (step, optimizer, key), `data` (position in
the data) and `record` (format, config and network). A background thread writes it under a temporary name and renames it at
the end, so a kill at any moment leaves the earlier checkpoints whole. The tokenizer is in `WORKDIR/tokenizer/`.
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
from flax.training.dynamic_scale import DynamicScale
from ml_collections import ConfigDict

from duo_jax import convert, files
from duo_jax.errors import UserError
from duo_jax.models.network import Network, Params
from duo_jax.training import orbax_noise
from duo_jax.training.state import TrainState, new_loss_scale

FOLDER = "checkpoints"
TOKENIZER = "tokenizer"
FORMAT = 1

# Errors of a disk that may be readable at another time, or by another user.
_PASSING = (
    errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE
)  # fmt: skip


def _full_disk(error: BaseException) -> bool:
    """Whether an error, or one that it wraps, says that the disk is full."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) == errno.ENOSPC or "No space left on device" in str(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _size(state: Any) -> int:
    """Bytes of a state, or of its shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))


def _rest(state: TrainState) -> dict[str, Any]:
    """The parts of the state that a checkpoint keeps besides the weights."""
    names = ("step", "opt_state", "key", "teacher", "loss_scale")
    return {name: getattr(state, name) for name in names}


def _of_orbax(error: BaseException) -> bool:
    """Whether an error is one that Orbax raises when it cannot read a file; some are a bare Exception."""
    return isinstance(error, OSError | KeyError | ValueError) or type(error) is Exception


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turns what Orbax raises when it cannot read a checkpoint into a UserError of one sentence."""
    try:
        with orbax_noise.muted_on_error():
            yield
    except Exception as error:
        if not _of_orbax(error):
            raise
        reason = " ".join(str(error.__cause__ or error).split())[:120]
        if any(getattr(seen, "errno", None) in _PASSING for seen in (error, error.__cause__)):
            raise UserError(
                f"{folder} cannot be read: {reason}; put that right, and run the same command again."
            ) from error
        raise UserError(
            f"{folder} is damaged ({reason}); remove it: the checkpoint before it is then used, if there is one."
        ) from error


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each array by its path, spelled alike for a state and for Orbax's metadata of a saved one."""
    flat = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in flat}


def _check_arrays(folder: Path, item: str, like: Any, *, but: str = "") -> dict[str, tuple[int, ...]]:
    """Returns the shapes of an item's arrays.

    Raises:
        UserError: they differ from those of `like`, not counting arrays under the name `but`; or they cannot be read.
    """
    with _readable(folder):
        have = _shapes(ocp.StandardCheckpointHandler().metadata(folder / item).tree)
    different = sorted(dict(have.items() ^ _shapes(like).items()))
    if different := [name for name in different if not but or name.split(".")[0] != but]:
        raise UserError(
            f"{folder} holds other arrays than this version of duo_jax needs for its config ({item}: {different[0]}); go on "
            "with the version that wrote it, or use another --workdir."
        )
    return have


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str | Path, keep: int) -> None:
        """Opens, or creates, the folder.

        Raises:
            UserError: the folder cannot be written.
        """
        self.folder = Path(workdir).resolve() / FOLDER
        files.check_folder(self.folder)
        if jax.process_index() == 0:
            # Remove what a killed run was writing. Orbax would do it in a thread, which fails if the program ends at once.
            for leftover in self.folder.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
                shutil.rmtree(leftover, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def check_space(self, state: Any, number: int) -> None:
        """Raises UserError if the disk has no room for `number` more checkpoints of `state`."""
        need = number * _size(state)
        free = shutil.disk_usage(self.folder).free
        if free < need:
            raise UserError(
                f"{self.folder} has {free / 2**20:,.0f} MiB free, but checkpoints of this run, {number} at a time, take "
                f"{need / 2**20:,.0f} MiB; free some space or give another --workdir."
            )

    def save(self, state: TrainState, data: dict[str, Any], record: dict[str, Any]) -> None:
        """Starts to write a checkpoint; returns once `state` may be changed.

        Args:
            state: saved under its step.
            data: the data iterator's position, JSON.
            record: the description of the run, JSON; see `record`.

        Raises:
            UserError: the disk is full (now, or while the last checkpoint was written).
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
        self.wait()
        # Checked here because Orbax reports a full disk in hundreds of lines; not with several hosts, because none may stop
        # alone.
        if jax.process_count() == 1 and shutil.disk_usage(self.folder).free < _size(state):
            raise self._full()
        self._guard(lambda: self._manager.save(step, args=items))

    def record(self, step: int) -> dict[str, Any]:
        """Returns the record that was saved with a step."""
        with _readable(self.folder / str(step)):
            return self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state, with the shapes and shardings of `like`, and the data position.

        A checkpoint of another compute type may lack the loss scale, and gets a fresh one; or it may have one that is not
        needed, and is dropped.

        Raises:
            UserError: the checkpoint is damaged, or of another version.
        """
        folder, rest = self.folder / str(step), _rest(like)
        for item, tree in (("params", like.params), ("ema", like.ema)):
            _check_arrays(folder, item, tree)
        saved = _check_arrays(folder, "rest", rest, but="loss_scale")
        has_scale = any(name.startswith("loss_scale.") for name in saved)
        wants_scale = isinstance(like.loss_scale, DynamicScale)
        if has_scale != wants_scale:
            place = like.step.sharding
            rest["loss_scale"] = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                jax.eval_shape(new_loss_scale) if has_scale else {},
            )
        items = ocp.args.Composite(
            params=ocp.args.StandardRestore(like.params),
            ema=ocp.args.StandardRestore(like.ema),
            rest=ocp.args.StandardRestore(rest),
            data=ocp.args.JsonRestore(),
        )
        with _readable(folder):
            got = self._manager.restore(step, args=items)
        if has_scale != wants_scale:
            got["rest"]["loss_scale"] = jax.device_put(new_loss_scale(), place) if wants_scale else {}
        return TrainState(params=got["params"], ema=got["ema"], **got["rest"]), got["data"]

    def wait(self) -> None:
        """Waits until all checkpoints are on the disk, and raises any error from writing them."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits as `wait` does, then closes the folder, also after an error."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _guard(self, call: Any) -> None:
        try:
            call()
        except Exception as error:
            if not _full_disk(error):
                raise
            orbax_noise.mute()
            raise self._full() from error

    def _full(self) -> UserError:
        return UserError(
            f"the disk of {self.folder} is full; the newest whole checkpoint is step {self.latest()}. Free some space "
            "and run the same command again to go on from there."
        )


def record(config: ConfigDict, network: Network) -> dict[str, Any]:
    """Returns the description of a run that its checkpoints keep, as JSON."""
    return {"format": FORMAT, "config": config.to_dict(), "network": dataclasses.asdict(network)}


def is_converted(path: Path) -> bool:
    """Whether a path is a folder of converted weights and not also a run's folder."""
    return not (path / FOLDER).is_dir() and convert.is_folder(path)


def run_of(path: Path) -> Path | None:
    """Returns the run's folder if a path is, by its name, `RUN/checkpoints` or `RUN/checkpoints/STEP`; otherwise None."""
    if path.parent.name == FOLDER and path.name.isdigit():
        return path.parent.parent
    return path.parent if path.name == FOLDER else None


def is_run(path: Path) -> bool:
    """Whether a path is a run's workdir, or by its name a folder `checkpoints` or `checkpoints/STEP`."""
    path = path.resolve()
    return run_of(path) is not None or (path / FOLDER).is_dir()


def steps(workdir: Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a run's folder."""
    folder = workdir / FOLDER
    found = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    return [step for step in found if (folder / str(step) / "record").is_dir()]


def find(path: str | Path) -> tuple[Path, int]:
    """Returns the run's folder and the step for a path: a workdir (its newest step) or the folder of one step.

    A folder of converted weights is returned itself, with the step that its config states.

    Raises:
        UserError: there is no checkpoint at the path.
    """
    path = Path(path).expanduser().resolve()
    run = run_of(path)
    if run and path.name != FOLDER and path.is_dir():
        return run, int(path.name)
    if is_converted(path):
        return path, convert.step(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a run's workdir or one of its folders {FOLDER}/STEP.")
    found = steps(run or path)
    if not found:
        raise UserError(f"{path} holds no checkpoint; give a run's workdir or one of its folders {FOLDER}/STEP.")
    return run or path, max(found)


def load(path_or_name: str | Path, *, ema: bool = True, **asked: Any) -> Params:
    """Returns the network at a path or of a name; the arguments are those of `duo_jax.load`.

    Raises:
        UserError: there is none, it cannot be read, or `asked` is given for a run, whose record has those facts.
    """
    path = convert.local(path_or_name)
    if not path.is_dir() or not is_run(path):
        return convert.read(path_or_name, ema=ema, **asked)
    if given := [name for name, value in asked.items() if value is not None]:
        raise UserError(f"{path} is a run of duo_jax, which records its network; leave out {', '.join(given)}.")
    return read(path, ema=ema)[0]


def folder_of(run: Path, step: int) -> Path:
    """Returns the folder of the checkpoint or weights that `find` returned, even if the run has saved newer ones since."""
    return run if is_converted(run) else run / FOLDER / str(step)


def read(path: str | Path, *, ema: bool = True) -> tuple[Params, dict[str, Any]]:
    """Returns the network of a checkpoint on the default device, and the checkpoint's record.

    Args:
        path: a workdir, the folder of one step, or a folder of converted weights, which has no record.
        ema: the averaged weights rather than the last ones.

    Raises:
        UserError: there is no checkpoint, or this version cannot read it.
    """
    workdir, step = find(path)
    if is_converted(workdir):
        return convert.read(workdir, ema=ema), {}
    folder = workdir / FOLDER / str(step)
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            about = reader.restore(folder / "record")
        if about["format"] != FORMAT:
            raise UserError(f"{folder} has format {about['format']}; this version of duo_jax reads format {FORMAT}.")
        network = Network(**about["network"])
    except (KeyError, TypeError, FileNotFoundError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not a checkpoint of duo_jax, or a damaged one: {error}.") from error
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(network.init, jax.random.key(0)),
    )
    item = "ema" if ema else "params"
    _check_arrays(folder, item, like)
    with _readable(folder), ocp.StandardCheckpointer() as reader:
        weights = reader.restore(folder / item, like)
    return Params(weights=weights, network=network, tokenizer=str(workdir / TOKENIZER), averaged=ema), about
