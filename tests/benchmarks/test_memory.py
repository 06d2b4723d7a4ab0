"""`benchmarks.memory`: the search finds what fits, and the analysis grows with the batch."""

import json
import sys
from types import SimpleNamespace

import helpers
import pytest
from helpers import run

from benchmarks import memory
from duo_jax import config as config_lib
from duo_jax.errors import UserError

MEMORY = [
    sys.executable, "-m", "benchmarks.memory", "--config=configs/quickstart.py", "--vocab_size=64",
    "--config.model.dim=16", "--config.model.blocks=1", "--config.model.heads=2", "--config.model.length=32",
    "--config.sample.n_steps=2",
]  # fmt: skip


def search(size, limit, **options):
    """Returns the answer and the batches that were compiled."""
    tried = []

    def counted(batch):
        tried.append(batch)
        return size(batch)

    return memory.largest_fitting(counted, limit, **({"unit": 1, "most": 4096, "refine": 2} | options)), tried


@pytest.mark.parametrize("limit", [100, 137, 500, 5_000, 300_000])
@pytest.mark.parametrize("unit", [1, 4, 6])
@pytest.mark.parametrize(
    "size", [lambda b: 90 + b, lambda b: 40 + 7 * b, lambda b: 10 * b + b * b // 50 + 300 * (b > 40)]
)
def test_the_search_is_right_and_short(size, unit, limit):
    found, tried = search(size, limit, unit=unit)
    assert len(tried) == len(set(tried)) <= 15
    assert all(batch % unit == 0 and batch <= 4096 for batch in tried)
    largest, too_large = found.largest, found.too_large
    assert (largest is None) == (size(unit) > limit)
    assert largest is None or size(largest) <= limit
    assert too_large is None or size(too_large) > limit
    if largest and too_large:
        assert too_large - largest <= max(unit, largest / 3)
    if too_large is None:
        assert 2 * largest > 4096


def test_the_whole_interval_can_be_closed():
    found, _ = search(lambda b: 1000 * b, 77_500, refine=20)
    assert found == memory.Found(77, 78)


def test_a_leap_saves_compilations():
    _, tried = search(lambda b: 1000 + b, 3100, refine=0)
    assert tried == [1, 2, 2048, 4096]


def test_what_fits_in_a_little(tmp_path):
    result = run([*MEMORY, "--gib=0.002", "--refine=0", "--programs=train", "--cases=duo_base", f"--out={tmp_path}"])
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "memory.json").read_text())
    (answer,), rows = found["answers"], found["rows"]
    batches, sizes = [row["batch"] for row in rows], [row["total_gib"] for row in rows]
    assert answer["program"] == "train duo_base"
    assert batches == sorted(batches)
    assert sizes == sorted(sizes)
    fitting = [batch for batch, size in zip(batches, sizes, strict=True) if size <= 0.002]
    assert answer["largest"] == max(fitting)
    assert answer["too_large"] == min(set(batches) - set(fitting))
    assert answer["too_large"] == 2 * answer["largest"]
    parts = {"arguments": 1, "outputs": 1, "aliases": -1, "temporary": 1, "code": 1}
    for row in rows:
        assert row["total_gib"] == pytest.approx(sum(sign * row[f"{part}_gib"] for part, sign in parts.items()))
    assert "only a rough guide to a GPU" in result.stdout


def test_sampling_more_texts_takes_more_memory():
    config = helpers.make_config({"model.size": "nano", "model.dim": 16, "model.blocks": 1, "model.length": 32})
    found = memory.search(config, 64, None, gib=1e-3, most=8, refine=0, platform=None, device=None)
    rows = found["rows"]
    assert [row["total_gib"] for row in rows] == sorted({row["total_gib"] for row in rows})
    assert found["answer"]["largest"] == max(row["batch"] for row in rows if row["total_gib"] <= 1e-3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gib": None}, "--gib must be given and positive"),
        ({"gib": -1}, "--gib must be given and positive"),
        ({"programs": ["eval"]}, "choose from train, sample"),
        ({"most": 0}, "--most is 0"),
        ({"refine": -1}, "--refine -1"),
        ({"cases": ["mdlm:full"]}, "there is no case 'mdlm:full'"),
        ({"platform": "cpu", "device": "t4"}, "give one of them"),
        ({"device": "t5"}, "choose from t4, v100, a100, h100"),
        ({"devices": 2}, "--devices is 2"),
        ({"device": "t4", "devices": 0}, "--devices is 0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_compiled(change, expected):
    usual = {"gib": 1, "vocab_size": 64, "programs": ["train"], "cases": [], "most": 8, "refine": 0, "platform": None,
             "device": None, "devices": 1}  # fmt: skip
    with pytest.raises(UserError, match=expected):
        memory.run(config_lib.default(), SimpleNamespace(**usual | change))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--platform=abacus"], "JAX finds no such device"),
        (["--config.sample.sampler=analytic"], "does not fit a network"),
    ],
)
def test_a_mistake_gets_one_clear_line(args, expected):
    result = run([*MEMORY, "--gib=1", "--programs=sample", *args])
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
