"""What programs are made for: the device that is here, or one that is not and is only compiled for."""

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
    """What a program's settings depend on.

    Attributes:
        platform: `cpu`, `gpu`, `tpu`, as JAX names them.
        compute_capability: of an NVIDIA GPU, such as 7.5 for a T4; 0 for anything else.
        memory: bytes that JAX may take; None where it does not tell.
    """

    platform: str
    compute_capability: float = 0.0
    memory: int | None = None


_absent: Hardware | None = None
_agreed: Hardware | None = None
_UNTOLD = -1


def present() -> Hardware:
    """Returns what the default device is, or what `compiling_for` says that it be, or what processes have agreed on."""
    if _absent is not None:
        return _absent
    return _agreed or _own()


def agree() -> None:
    """Makes all processes compile for the least memory that one of them has; to be called by all of them at one point.

    They agree once; another call changes nothing.

    Programs are made for a device's memory (`models.network.chunk_budget`). Processes whose programs differ would wait for
    each other for ever.
    """
    global _agreed
    if jax.process_count() == 1 or _agreed is not None:
        return
    own = _own()
    told = multihost_utils.process_allgather(np.int32(_UNTOLD if own.memory is None else own.memory // _MIB))
    _agreed = dataclasses.replace(own, memory=None if _UNTOLD in told else int(told.min()) * _MIB)


def _own() -> Hardware:
    device = jax.local_devices()[0]
    named = str(getattr(device, "compute_capability", ""))
    capability = float(named) if re.fullmatch(r"\d+(\.\d+)?", named) else 0.0  # AMD's have names, as gfx942
    return Hardware(device.platform, capability, (device.memory_stats() or {}).get("bytes_limit"))


@contextlib.contextmanager
def compiling_for(hardware: Hardware) -> Iterator[None]:
    """Makes programs for hardware that is not here, as long as the block runs: they can be compiled, not run.

    What JAX has traced before it does not trace anew, so this belongs in a process that has made no program yet.
    """
    global _absent
    before, _absent = _absent, hardware
    try:
        yield
    finally:
        _absent = before
