"""The hardware that programs are compiled for: the present device, or an absent one for which they are only compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The properties of a device that a program's settings depend on.

    Attributes:
        platform: `cpu`, `gpu` or `tpu`, as JAX names them.
        compute_capability: of an NVIDIA GPU, such as 7.5 for a T4; 0 for anything else.
        memory: bytes that JAX may use; None if it does not report them.
    """

    platform: str
    compute_capability: float = 0.0
    memory: int | None = None


_absent: Hardware | None = None  # set by `compiling_for`
_agreed: Hardware | None = None  # set by `agree`
_UNKNOWN = -1


def present() -> Hardware:
    """Returns the hardware set by `compiling_for`, else what the processes have agreed on, else the default device."""
    if _absent is not None:
        return _absent
    return _agreed or _own()


def agree() -> None:
    """Makes all processes compile for the least memory among them. All must call it at the same point.

    Programs depend on the device's memory (`models.network.chunk_budget`), and processes whose programs differ would wait
    for each other for ever. Only the first call has an effect.
    """
    global _agreed
    if jax.process_count() == 1 or _agreed is not None:
        return
    own = _own()
    mib = multihost_utils.process_allgather(np.int32(_UNKNOWN if own.memory is None else own.memory // _MIB))
    _agreed = dataclasses.replace(own, memory=None if _UNKNOWN in mib else int(mib.min()) * _MIB)


def _own() -> Hardware:
    device = jax.local_devices()[0]
    named = str(getattr(device, "compute_capability", ""))
    capability = float(named) if re.fullmatch(r"\d+(\.\d+)?", named) else 0.0  # AMD's are names, such as gfx942
    return Hardware(device.platform, capability, (device.memory_stats() or {}).get("bytes_limit"))


@contextlib.contextmanager
def compiling_for(hardware: Hardware) -> Iterator[None]:
    """While the block runs, programs are made for the given hardware: they can be compiled, but not run.

    JAX does not retrace what it has already traced, so use this in a process that has not traced these programs before.
    """
    global _absent
    before, _absent = _absent, hardware
    try:
        yield
    finally:
        _absent = before
