"""Sharding: a mesh of devices with named axes, and the rule that splits state and batches over it.

The batch is split over both axes, `data` and `fsdp`. Parameters, EMA and optimizer state are also split over `fsdp`, each
along its largest axis that divides; XLA gathers a layer's weights where they are used. It gathers the vocabulary head too:
each device computes the logits of its own rows with the whole head, and only the gradient is summed over the devices, once
per part of a step (`config.train.accumulate`; see `models.head.weighted_sum`). One device is a mesh of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from duo_jax.errors import UserError

BATCH_AXES = ("data", "fsdp")
# Splitting small arrays costs more in latency than it saves in memory.
_SMALLEST_SPLIT = 2**16


def create_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of `config.mesh`: `data` x `fsdp` devices.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    fsdp = config.fsdp
    data = len(devices) // fsdp if config.data == -1 else config.data
    if data * fsdp != len(devices):
        raise UserError(
            f"config.mesh asks for data x fsdp = {config.data} x {fsdp} devices, but there are {len(devices)}; "
            "leave config.mesh.data at -1 and let config.mesh.fsdp divide that number."
        )
    return Mesh(np.asarray(devices).reshape(data, fsdp), BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its rows are split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns a sharding for each array (or shape) in `state`: split along its largest axis that `fsdp` divides."""
    fsdp = mesh.shape["fsdp"]

    def rule(x: Any) -> NamedSharding:
        axes = [i for i, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or not axes or np.prod(x.shape) < _SMALLEST_SPLIT:
            return replicated(mesh)
        spec: list[str | None] = [None] * len(x.shape)
        spec[max(axes, key=lambda i: x.shape[i])] = "fsdp"
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(rule, state)


def check_batch(mesh: Mesh, name: str, batch_size: int, parts: int = 1) -> None:
    """Raises UserError if the number of devices does not divide a batch, or each of the equal parts it is computed in."""
    if batch_size // parts % mesh.size:
        if parts > 1:
            raise UserError(
                f"config.{name} is {batch_size}, in {parts} parts (config.train.accumulate) of {batch_size // parts} rows, "
                f"which cannot be split evenly over {mesh.size} devices; set fewer parts, or a larger batch."
            )
        raise UserError(
            f"config.{name} is {batch_size}, which cannot be split evenly over {mesh.size} devices; "
            f"set it to {-(-batch_size // mesh.size) * mesh.size}, for example."
        )


def put(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch on the mesh, to which this process contributes the rows that it has read."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Returns a copy of a pytree on every device of the mesh; all processes must pass the same values."""
    return jax.device_put(jax.tree.map(np.asarray, tree), replicated(mesh))
