"""Checkpoints that are damaged, of other hardware, or of another version."""

import dataclasses
import errno
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import ROOT, command, make_config, run, tiny_settings, trained_settings

from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.training import checkpoint, loop, optimizer, orbax_noise, partition
from duo_jax.training import state as state_lib


@pytest.fixture
def states():
    """A function that gives the state of a tiny network in a compute type, and its shapes with their shardings."""
    config = make_config(tiny_settings(ROOT))
    mesh = partition.create_mesh(config.mesh)

    def make(precision):
        network = dataclasses.replace(Network.from_config(config, 53), precision=precision)
        state = state_lib.create(network, optimizer.create(config.train), 3)
        place = partition.state_shardings(mesh, state)
        state = jax.device_put(state, place)
        return state, jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, place)

    return make


@pytest.fixture
def save(tmp_path):
    """A function that saves a state and gives the checkpoints it lies in."""
    opened = []

    def write(state):
        opened.append(checkpoint.Checkpoints(tmp_path / "run", keep=1))
        opened[-1].save(state, {"batches": 7}, {})
        opened[-1].wait()
        return opened[-1]

    yield write
    for checkpoints in opened:
        checkpoints.close()


@pytest.mark.parametrize(("before", "after"), [("float16", "float32"), ("float32", "float16"), ("float16", "float16")])
def test_the_loss_scale_comes_and_goes_with_the_hardware(states, save, before, after):
    (state, _), (fresh, like) = states(before), states(after)
    state = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    if before == "float16":
        scale = state.loss_scale
        state = state.replace(loss_scale=scale.replace(scale=scale.scale / 4))
    got, data = save(state).restore(0, like)
    assert data == {"batches": 7}
    wanted = state if before == after else state.replace(loss_scale=fresh.loss_scale)
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert all(x.sharding == y.sharding for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(like), strict=True))


def test_other_arrays_are_not_called_damage(states, save):
    state, like = states("float32")
    checkpoints = save(state)
    longer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((2, *x.shape), x.dtype, sharding=x.sharding), like.params["head"]
    )
    for other, name in (
        (like.replace(teacher={"w": like.step}), "rest: teacher.w"),
        (like.replace(ema={**like.ema, "head": {}}), "ema: head"),
        (like.replace(params={**like.params, "head": longer}), "params: head"),
    ):
        with pytest.raises(UserError, match=f"holds other arrays than .*{name}"):
            checkpoints.restore(0, other)


def test_a_step_is_saved_once(states, save):
    state, like = states("float32")
    checkpoints = save(state)
    checkpoints.save(state, {"batches": 8}, {})
    assert checkpoints.restore(0, like)[1] == {"batches": 7}


def test_what_writing_raised_is_told(states, save, monkeypatch):
    """In the background, where it ends nothing by itself: by the next checkpoint, and at the end."""
    state, _ = states("float32")
    checkpoints = save(state)
    failed = [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("another error")]
    errors = iter(failed * 3)

    def wait(_):
        raise next(errors)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp.CheckpointManager, "wait_until_finished", wait)
        closed = []
        patch.setattr(checkpoint.ocp.CheckpointManager, "close", lambda manager: closed.append(manager))
        for call in (
            checkpoints.wait,
            checkpoints.close,
            lambda: checkpoints.save(state.replace(step=state.step + 1), {}, {}),
        ):
            with pytest.raises(UserError, match=r"is full; the newest whole checkpoint is step 0\."):
                call()
            with pytest.raises(RuntimeError, match="another error"):
                call()
    assert len(closed) == 2, "the folder is let go of nevertheless"
    assert checkpoints.latest() == 0


def test_the_disk_must_hold_so_many_checkpoints(states, save, monkeypatch):
    state, _ = states("float32")
    checkpoints = save(state)
    need = 2 * sum(np.asarray(x).nbytes for x in jax.tree.leaves(state))
    free = types.SimpleNamespace(free=need)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: free)
    checkpoints.check_space(state, 2)
    free.free -= 1
    with pytest.raises(UserError, match="2 at a time"):
        checkpoints.check_space(state, 2)


def test_a_full_disk_is_seen_behind_other_errors():
    full = OSError(errno.ENOSPC, "x")
    chained, during = ValueError("outer"), KeyError("outer")
    chained.__cause__ = during.__context__ = full
    outermost = RuntimeError("outermost")
    outermost.__cause__ = during
    for error in (full, chained, during, outermost, Exception("RESOURCE_EXHAUSTED: No space left on device")):
        assert checkpoint._full_disk(error)
    assert not checkpoint._full_disk(OSError(errno.EACCES, "x"))


def test_only_what_abandoned_reads_say_is_left_out(trained, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    checkpoint.read(trained)
    assert sys.unraisablehook is sys.__unraisablehook__, "none were abandoned"
    for said in ("Event loop is closed", "Error while reading array index x", "something else"):
        orbax_noise._report_others(told.append, types.SimpleNamespace(exc_value=RuntimeError(said)))
    assert [str(unraisable.exc_value) for unraisable in told] == ["something else"]


def test_of_tasks_that_failed_only_orbaxs_are_left_out():
    def record(module):
        space = {"__name__": module}
        exec("def fail(): raise OSError('x')", space)
        with pytest.raises(OSError, match="x") as raised:
            space["fail"]()
        about = (raised.type, raised.value, raised.tb)
        return logging.LogRecord("asyncio", logging.ERROR, "", 0, "Task exception was never retrieved", (), about)

    assert not orbax_noise._is_of_others(record("orbax.checkpoint.x"))
    assert orbax_noise._is_of_others(record("somebody.elses"))
    assert orbax_noise._is_of_others(logging.LogRecord("asyncio", logging.ERROR, "", 0, "another message", (), None))


def change_record(workdir, change):
    path = workdir / "checkpoints" / "20" / "record" / "metadata"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.update(format=2), "has format 2; this version of duo_jax reads format 1"),
        (
            lambda about: about["network"].update(rotary="none"),
            "is not a checkpoint of duo_jax, or a damaged one.*rotary",
        ),
        (lambda about: about.pop("network"), "is not a checkpoint of duo_jax, or a damaged one"),
    ],
)
def test_the_record_of_another_version_is_refused(trained, tmp_path, change, message):
    shutil.copytree(trained / "checkpoints" / "20", tmp_path / "checkpoints" / "20")
    change_record(tmp_path, change)
    with pytest.raises(UserError, match=message):
        checkpoint.read(tmp_path)


def test_a_run_of_another_version_is_not_gone_on_with(trained, text_folder, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    change_record(tmp_path / "run", lambda about: about.update(format=2))
    with pytest.raises(UserError, match="has format 2, not 1; use another --workdir"):
        loop.train(make_config(trained_settings(text_folder)), str(tmp_path / "run"))


def test_what_a_path_means(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.parent))
    assert checkpoint.find(f"~/{trained.name}") == (trained, 20)
    monkeypatch.chdir(trained / "checkpoints" / "15")
    for path, step in ((".", 15), ("..", 20), ("../..", 20)):
        assert checkpoint.find(path) == (trained, step)
        assert checkpoint.is_run(Path(path))
    last = checkpoint.load(".", ema=False)
    assert last.averaged is False
    with pytest.raises(UserError, match="is a run of duo_jax, which records its network; leave out algo, heads"):
        checkpoint.load(trained, algo="duo", heads=2)
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "ema").mkdir(parents=True)  # of which the record was lost
    for path in (tmp_path, tmp_path / "checkpoints" / "best"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoint.find(path)
    with pytest.raises(UserError, match="checkpoints/99 does not exist"):
        checkpoint.find(trained / "checkpoints" / "99")
    monkeypatch.setattr(checkpoint.ocp.utils, "checkpoint_steps", lambda _: [20, 15])  # as a disk may list them
    assert checkpoint.find(trained) == (trained, 20)


def test_a_run_is_no_converted_folder_whatever_lies_in_it(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    assert checkpoint.load(tmp_path / "run").network.vocab_size == 300


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    leftover = tmp_path / "checkpoints" / "5.orbax-checkpoint-tmp-17"
    (leftover / "ema").mkdir(parents=True)
    checkpoint.Checkpoints(tmp_path, keep=1).close()
    assert not leftover.exists()


# The files of all arrays, of which the first that is missing ends the reading; and what was written of them at first.
@pytest.mark.parametrize("lost", [("d", "ocdbt.process_0"), ("ocdbt.process_0/d",)])
def test_a_damaged_checkpoint_gets_one_line(trained, text_folder, tmp_path, lost):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for name in lost:
        shutil.rmtree(copy / "checkpoints" / "20" / "ema" / name)
    recipe = tmp_path / "recipe.py"
    recipe.write_text("from duo_jax.config import default as get_config")  # what the fixture's settings come on top of
    result = run(command(str(recipe), copy, {**trained_settings(text_folder), "train.steps": 30}))
    assert result.returncode == 2
    (line,) = (line for line in result.stderr.splitlines() if not line.startswith("attention: "))
    assert line.startswith(f"error: {copy / 'checkpoints' / '20'} is damaged (")


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.EACCES, "cannot be read: .*put that right"),
        (errno.ESTALE, "cannot be read"),
        (errno.EINVAL, "is damaged"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_may_be_read_another_time_is_not_called_damaged(trained, number, expected, wrapped, monkeypatch):
    def fail(*_, **__):
        error = OSError(number, "the disk says so")
        if wrapped:
            raise ValueError("an array cannot be read") from error
        raise error

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "metadata", fail)
    with pytest.raises(UserError, match=expected) as told:
        checkpoint.read(trained)
    assert ("remove it" in str(told.value)) == (number == errno.EINVAL)


def test_a_fault_of_the_program_is_not_called_damage(trained, monkeypatch):
    def fail(*_, **__):
        raise TypeError("an argument is missing")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "metadata", fail)
    with pytest.raises(TypeError, match="an argument is missing"):
        checkpoint.read(trained)


def test_a_mistake_on_starting_gets_one_line(text_folder, tmp_path):
    settings = {**tiny_settings(text_folder), "init_from": str(tmp_path / "nothing")}
    result = run(command("configs/quickstart.py", tmp_path / "run", settings))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
