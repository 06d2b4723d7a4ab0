"""Sharding: the rule, the mesh, and the same numbers on one device and on four."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, trained_settings

from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.training import partition

# Takes three train steps of each run, and prints the losses and what the largest arrays look like on the first device.
STEPS = """
import json, sys
import jax, numpy as np
from duo_jax.training import loop, partition
from duo_jax.training.run import Run
from helpers import make_config

partition._SMALLEST_SPLIT = 2**11  # so that a tiny network's arrays are split as a large one's are

def steps(settings):
    config = make_config(settings)
    with Run.open(config, sys.argv[2]) as run:
        initial, step, _ = loop.compile_step(config, run.network, run.mesh)
        state, losses = initial(run.start_from()), []
        for _ in range(3):
            state, metrics = step(state, partition.put(next(run.batches), run.mesh))
            losses.append(float(metrics["loss"]))
        trees = state.params, state.opt_state[1][0].mu, state.teacher or state.ema
        kernels = [jax.tree.leaves(tree["block_0"]["mlp_in"]["kernel"])[0] for tree in trees]
        return {
            "losses": losses,
            "devices": run.mesh.size,
            "compiled": step._cache_size(),
            "share": [x.addressable_shards[0].data.size / x.size for x in kernels],
            "sum": float(sum(np.abs(np.asarray(x)).sum() for x in jax.tree.leaves(state.ema))),
        }

print(json.dumps([steps(settings) for settings in json.loads(sys.argv[1])]))
"""


# Compiles a train step of each run, and prints the shapes that it gathers from all devices.
GATHERED = """
import json, re, sys
import jax
from benchmarks import programs
from helpers import make_config

def gathered(settings):
    text = programs.training(make_config(settings), 300, jax.devices()).lowered.compile().as_text()
    results = re.findall(r"= (.*?) all-gather(?:-start)?\\(", text)
    return [[int(n) for n in shape.split(",") if n] for one in results for shape in re.findall(r"\\[([0-9,]*)\\]", one)]

print(json.dumps([gathered(settings) for settings in json.loads(sys.argv[1])]))
"""


def on_devices(devices, script, settings, *args):
    """What a script prints of some settings, on so many devices."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
    }
    command = [sys.executable, "-c", script, json.dumps(settings), *args]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def steps(workdir, *settings, devices):
    return on_devices(devices, STEPS, settings, str(workdir))


def test_four_devices_compute_what_one_does(trained, text_folder, tmp_path):
    tiny = trained_settings(text_folder)
    settings = {**tiny, "algo.name": "duo", "algo.curriculum.kind": "full", "model.blocks": 1, "model.head_mib": 1}
    distil = {**tiny, "algo.name": "dcd", "init_from": str(trained)}
    one, one_distilled = steps(tmp_path, settings, distil, devices=1)
    split = {"mesh.fsdp": 2}
    data, fsdp, distilled = steps(tmp_path, settings, {**settings, **split}, {**distil, **split}, devices=4)
    assert (one["devices"], data["devices"], fsdp["devices"], distilled["devices"]) == (1, 4, 4, 4)
    for other, alone in ((data, one), (fsdp, one), (distilled, one_distilled)):
        np.testing.assert_allclose(other["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(other["sum"], alone["sum"], rtol=1e-5)
        assert other["compiled"] == 1
    # Weights, first moments, and the average or, in distillation, the teacher.
    assert one["share"] == data["share"] == [1.0, 1.0, 1.0]
    assert fsdp["share"] == distilled["share"] == [0.5, 0.5, 0.5]


def test_rows_stay_where_they_are(text_folder):
    settings = {
        **trained_settings(text_folder),
        "algo.name": "ar", "model.scan": True, "mesh.fsdp": 8,
        "train.batch_size": 16, "model.length": 128, "model.dim": 256, "model.heads": 4,
    }  # fmt: skip
    kinds = [{**settings, "model.remat": remat} for remat in ("dots", "blocks")]
    for shapes in on_devices(8, GATHERED, kinds):
        assert [256, 768] in shapes, "weights are gathered where they are used"
        assert not [shape for shape in shapes if {16, 16 * 128} & set(shape)], "what is computed of texts is not"


def test_a_batch_or_mesh_that_does_not_divide_is_refused():
    config = config_lib.default().mesh
    mesh = partition.create_mesh(config)
    partition.check_batch(mesh, "train.batch_size", mesh.size)
    config.fsdp = 3
    with pytest.raises(UserError, match="but there are"):
        partition.create_mesh(config, jax.devices() * 4)
    config.fsdp = 1
    for data in (3, 5):
        config.data = data
        with pytest.raises(UserError, match=rf"data x fsdp = {data} x 1 devices, but there are 4"):
            partition.create_mesh(config, jax.devices() * 4)
    config.data, config.fsdp = -1, 2
    wide = partition.create_mesh(config, jax.devices() * 4)
    with pytest.raises(UserError, match="is 6, which cannot be split evenly over 4 devices; set it to 8"):
        partition.check_batch(wide, "train.batch_size", 6)
    partition.check_batch(wide, "train.batch_size", 8 * wide.size, 8)
    with pytest.raises(UserError, match="in 2 parts"):
        partition.check_batch(wide, "train.batch_size", wide.size, 2)


def test_only_large_arrays_are_split():
    config = config_lib.default().mesh
    config.fsdp = 2
    mesh = partition.create_mesh(config, jax.devices() * 4)
    shapes = {
        "big": np.zeros((512, 1024)),
        "odd": np.zeros((511, 1023)),
        "small": np.zeros((2, 4)),
        "step": np.zeros(()),
    }
    specs = {name: sharding.spec for name, sharding in partition.state_shardings(mesh, shapes).items()}
    assert tuple(specs["big"]) == (None, "fsdp")
    assert all(not any(specs[name]) for name in ("odd", "small", "step"))


def test_each_device_has_rows_of_its_own():
    config = config_lib.default().mesh
    config.fsdp = 2
    mesh = partition.create_mesh(config, jax.devices() * 4)
    assert partition.batch_sharding(mesh).shard_shape((8, 3)) == (2, 3)
    assert partition.replicated(mesh).shard_shape((8, 3)) == (8, 3)
