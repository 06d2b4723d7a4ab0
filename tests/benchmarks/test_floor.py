"""The least time that a GPU's program takes."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import cuda_compiler, make_config, run

from benchmarks import absent, floor
from benchmarks.hlo import Kernel
from duo_jax.errors import UserError

COMPILER = cuda_compiler()
FOUND = {
    "environment": {"devices": 1, "device": "NVIDIA H100", "platform": "gpu", "jax": "0.0"},
    "program": "train duo:topk", "batch": 2, "length": 32, "vocab": 500, "blocks": 1, "dtype": "bfloat16",
    "gbs": 1000.0, "tflops": 100.0, "gb": 3.0, "tflop": 0.2, "ms": 4.0, "tokens_per_s": 16_000.0, "mfu": 50.0,
    "unknown_loops": 0, "trips": 1,
    "rows": [
        {"part": name, "kernels": 1, "gb": 1.0, "tflop": 0.1, "ms": ms, "share": 25 * ms}
        for name, ms in (("forward a/b", 2.0), ("backward c/d", 1.5), ("add", 0.5))
    ],
}  # fmt: skip


def test_a_kernel_waits_for_memory_or_for_products():
    rates = floor.Rates(bytes=100.0, flops=1000.0)
    assert rates.seconds(Kernel("a", "", times=3, bytes=200.0, flops=1000.0)) == 3 * 2.0
    assert rates.seconds(Kernel("b", "", times=3, bytes=50.0, flops=1000.0)) == 3 * 1.0


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (
            "jit(train_step)/jvp(DiT.hidden)/DiT._through_blocks/Block/Block._update/qkv/dot_general",
            "forward qkv/dot_general",
        ),
        (
            "jit(train_step)/transpose(jvp(DiT.hidden))/DiT._through_blocks/Block/norm1/add_any",
            "backward norm1/add_any",
        ),
        ("jit(train_step)/jvp()/while/body/closed_call/dot_general", "forward while/dot_general"),
        ("jit(train_step)/add", "add"),
        ("", "other"),
    ],
)
def test_where_a_kernel_comes_from(source, expected):
    assert floor.part(source) == expected


def test_the_text_adds_up():
    told = floor.text(FOUND, top=1)
    assert "train duo:topk, B = 2, L = 32, K = 500, bfloat16" in told
    assert "at least 4.0 ms: at most 16,000 tokens/s, MFU 50%." in told
    more = next(line for line in told.splitlines() if "2 more" in line)
    assert [cell.strip() for cell in more.split("|")[2:-1]] == ["2", "2", "0.2", "2", "50"]
    assert "loops" not in told
    assert "3 loops of unknown length count 7 times" in floor.text(FOUND | {"unknown_loops": 3, "trips": 7}, top=1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": None}, "--device is missing; give one of t4"),
        ({"device": "t5"}, "there is no such GPU"),
        ({"gbs": 0.0}, "must be above 0"),
        ({"trips": 0}, "must be above 0"),
        ({"cases": ["duo:cold"]}, "there is no case 'duo:cold'"),
        ({"programs": ["draw"]}, "there is no program 'draw'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_compiled(change, expected):
    usual = {
        "device": "t4", "vocab_size": 500, "programs": ["train"], "cases": [], "gbs": None, "tflops": None, "trips": 1
    }  # fmt: skip
    with pytest.raises(UserError, match=expected):
        floor.run(make_config({}), SimpleNamespace(**usual | change))


@pytest.mark.skipif(not COMPILER, reason="needs the compiler for CUDA: pip install -e .[cuda]")
def test_its_compiler_answers(tmp_path):
    command = [
        sys.executable, "-m", "benchmarks.floor", "--config=configs/quickstart.py", "--vocab_size=500", "--device=h100",
        "--config.model.dim=64", "--config.model.blocks=1", "--config.model.heads=1", "--config.model.length=64",
        "--programs=train,sample", "--cases=duo_base", "--trips=2", f"--out={tmp_path}",
    ]  # fmt: skip
    result = run(command)
    assert result.returncode == 0, result.stderr
    train, sample = json.loads((tmp_path / "floor.json").read_text())["programs"]
    assert train["environment"]["device"] == absent.GPUS["h100"].name
    assert train["dtype"] == sample["dtype"] == "bfloat16"
    assert sample["unknown_loops"] > 0
    by_formula = train["mfu"] / 100 * train["ms"] * train["tflops"] / 1e3
    assert 0.95 < train["tflop"] / by_formula < 1.1  # the program multiplies what it must
    assert abs(sum(row["ms"] for row in train["rows"]) - train["ms"]) < 1e-6
