"""Checkpoints that are damaged, of other hardware, or of another version."""

import dataclasses
import errno
import shutil

import jax
import numpy as np
import pytest
from helpers import ROOT, command, make_config, run, tiny_settings, trained_settings

from duo_jax.errors import UserError
from duo_jax.models.network import Network
from duo_jax.training import checkpoint, optimizer, partition
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
    for other, name in (
        (like.replace(teacher={"w": like.step}), "rest: teacher.w"),
        (like.replace(ema={**like.ema, "head": {}}), "ema: head"),
    ):
        with pytest.raises(UserError, match=f"holds other arrays than .*{name}"):
            checkpoints.restore(0, other)


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
def test_what_may_be_read_another_time_is_not_called_damaged(trained, number, expected, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, "the disk says so")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointHandler, "metadata", fail)
    with pytest.raises(UserError, match=expected) as told:
        checkpoint.read(trained)
    assert ("remove it" in str(told.value)) == (number == errno.EINVAL)


def test_a_mistake_on_starting_gets_one_line(text_folder, tmp_path):
    settings = {**tiny_settings(text_folder), "init_from": str(tmp_path / "nothing")}
    result = run(command("configs/quickstart.py", tmp_path / "run", settings))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
