"""GPUs that are not here: what the package makes of them, and what their compiler says."""

import json
import sys

import jax.numpy as jnp
import pytest
from helpers import cuda_compiler, run

from benchmarks import absent
from duo_jax.errors import UserError
from duo_jax.models.network import chunk_budget, fastest_dtype

# As installed by the extra `cuda`; the environment of the tests on a CPU is without it.
COMPILER = cuda_compiler()
MEMORY = [
    sys.executable, "-m", "benchmarks.memory", "--config=configs/quickstart.py", "--vocab_size=500",
    "--config.model.dim=64", "--config.model.blocks=1", "--config.model.heads=1", "--config.model.length=64",
    "--gib=0.01", "--most=1", "--refine=0", "--programs=train", "--cases=duo_base",
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype", "budget"),
    [("t4", jnp.float16, 350), ("v100", jnp.float16, 379), ("a100", jnp.bfloat16, 1900), ("h100", jnp.bfloat16, 1898)],
)
def test_what_the_package_makes_of_a_gpu(name, dtype, budget):
    gpu = absent.GPUS[name]
    assert fastest_dtype(gpu.hardware) == dtype
    assert chunk_budget(gpu.hardware) == budget
    assert str(gpu.memory) in gpu.description()


def test_an_unknown_gpu():
    with pytest.raises(UserError, match="choose from t4, v100, a100, h100"), absent.compiling_for("t5"):
        pass


@pytest.mark.skipif(bool(COMPILER), reason="the compiler is here")
def test_the_compiler_is_asked_for():
    result = run([*MEMORY, "--device=t4"])
    assert result.returncode == 2
    assert "pip install -e .[cuda]" in result.stderr


@pytest.mark.skipif(not COMPILER, reason="needs the compiler for CUDA: pip install -e .[cuda]")
@pytest.mark.parametrize(("name", "dtype"), [("t4", "float16"), ("h100", "bfloat16")])
def test_its_compiler_answers(name, dtype, tmp_path):
    result = run([*MEMORY, f"--device={name}", f"--out={tmp_path}"])
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["environment"]["device"] == absent.GPUS[name].name
    assert {row["dtype"] for row in found["rows"]} == {dtype}
    assert "stands in" not in result.stdout


@pytest.mark.skipif(not COMPILER, reason="needs the compiler for CUDA: pip install -e .[cuda]")
def test_two_gpus_split_the_weights_of_a_causal_network(tmp_path):
    """Left to itself the compiler splits heads in place of rows there, which cuDNN's attention refuses."""
    split = ["--devices=2", "--config.mesh.fsdp=2", "--config.model.scan=True", "--config.model.remat=blocks"]
    wide = ["--config.model.dim=256", "--config.model.heads=4", "--config.model.blocks=2", "--cases=ar", "--most=2"]
    result = run([*MEMORY, "--device=h100", *split, *wide, f"--out={tmp_path}"])
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["environment"]["devices"] == 2
    assert [row["batch"] for row in found["rows"]] == [2]
