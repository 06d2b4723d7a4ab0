"""NVIDIA GPUs that need not be present: XLA compiles for them from a description alone."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from duo_jax import hardware
from duo_jax.errors import UserError, first_line

# JAX's share of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What the compiler needs to know about a GPU, from its data sheet.

    Attributes:
        name: as the driver gives it.
        capability: the compute capability, major and minor.
        memory: bytes on the card that programs may use, before JAX's share.
        bandwidth: bytes per second of the memory.
        flops: FLOP/s of dense matrix products in half precision.
        clock: GHz.
        l2_cache: bytes.
        cores: streaming multiprocessors.
        fpus: float32 units per multiprocessor.
        threads: threads per multiprocessor.
        shared: bytes of shared memory per multiprocessor.
        shared_by_block: bytes of shared memory that one block may use.
        features: name of the instruction extension that the compiler may use.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    flops: float
    clock: float
    l2_cache: int
    cores: int
    fpus: int
    threads: int
    shared: int
    shared_by_block: int
    features: str = "NONE"

    @property
    def hardware(self) -> hardware.Hardware:
        """What the package's own choices depend on."""
        major, minor = self.capability
        return hardware.Hardware("gpu", major + minor / 10, int(_SHARE * self.memory))

    def description(self) -> str:
        """Returns XLA's GpuTargetConfigProto in its text form."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads}
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared_by_block}
              core_count: {self.cores} fpus_per_core: {self.fpus} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_cache} device_memory_size: {self.memory}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {self.features} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            runtime_version {{ major: 12 minor: 9 }}
            device_description_str: "{self.name}"
        """


_KIB, _MIB, _GIB = 2**10, 2**20, 2**30
GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), int(14.6 * _GIB), 320e9, 65e12, 1.59, 4 * _MIB, 40, 64, 1024, 64 * _KIB, 64 * _KIB),
    "v100": Gpu("Tesla V100", (7, 0), int(15.8 * _GIB), 898e9, 125e12, 1.53, 6 * _MIB, 80, 64, 2048, 96 * _KIB, 96 * _KIB),
    "a100": Gpu(
        "NVIDIA A100", (8, 0), int(79.2 * _GIB), 2039e9, 312e12, 1.41, 40 * _MIB, 108, 64, 2048, 164 * _KIB, 163 * _KIB,
    ),
    "h100": Gpu(
        "NVIDIA H100", (9, 0), int(79.1 * _GIB), 3352e9, 989e12, 1.98, 50 * _MIB, 132, 128, 2048, 228 * _KIB, 227 * _KIB,
        features="ACCELERATED_FEATURES",
    ),
}  # fmt: skip


def find(name: str) -> Gpu:
    """Returns a GPU of `GPUS`.

    Raises:
        UserError: there is no GPU of that name.
    """
    if name not in GPUS:
        raise UserError(f"--device={name}: there is no such GPU; choose from {', '.join(GPUS)}.")
    return GPUS[name]


@contextlib.contextmanager
def compiling_for(name: str, count: int = 1) -> Iterator[list[jax.Device]]:
    """Yields absent GPUs of one host to compile for within the block; the process must not have compiled anything before.

    Raises:
        UserError: there is no GPU of that name, or the compiler for CUDA is not installed.
    """
    gpu = find(name)
    jax.config.update("jax_platforms", "cpu")  # a GPU that is present is not used
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=gpu.description(), topology=f"1x1x{count}"
        )
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"--device={name} needs the compiler for CUDA, though no GPU: pip install -e .[cuda]. JAX says: "
            + first_line(error)
        ) from error
    with hardware.compiling_for(gpu.hardware):
        yield list(topology.devices)
