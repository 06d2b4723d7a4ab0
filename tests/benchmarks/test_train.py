"""`benchmarks.train`: its report, its sweep, and its words for mistakes."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import run

from benchmarks import programs, report, sweeps, train
from duo_jax import config as config_lib
from duo_jax.errors import UserError

SMALL = [
    "--config=configs/quickstart.py", "--vocab_size=64", "--config.model.dim=16", "--config.model.blocks=1",
    "--config.model.heads=2", "--config.model.length=16", "--config.train.batch_size=2",
]  # fmt: skip
TRAIN = [sys.executable, "-m", "benchmarks.train", *SMALL]


def test_the_report_of_a_sweep(tmp_path):
    result = run([*TRAIN, "--cases=duo_base", "--steps=2", "--sweep=batch:2,32", f"--out={tmp_path}"])
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "train.json").read_text())
    assert found["environment"]["platform"] == "cpu"
    assert [row["batch"] for row in found["rows"]] == [2, 32]
    for row in found["rows"]:
        assert len(row["times_s"]) == 2
        assert row["best_ms"] <= row["median_ms"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] * 16 / row["median_ms"] * 1e3)
        assert row["queued_ms"] > 0
        assert 0 < row["mfu_percent"] < 100
        assert row["compile_s"] > 0
        assert row["rss_baseline_mib"] < row["rss_mib"]
        assert row["total_mib"] >= row["temporary_mib"] > 0
    first, second = found["rows"]
    assert second["temporary_mib"] > first["temporary_mib"]
    assert found["growth"][0]["model_gflop"] == pytest.approx(1.0)
    table = (tmp_path / "train.md").read_text()
    assert "tokens/s" in table
    assert table.strip() in result.stdout


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"cases": ["duo:sideways"]}, "choose from duo:full"),
        ({"cases": ["mdlm:full"]}, "there is no case 'mdlm:full'"),
        ({"sweep": "width:1,2"}, "--sweep is 'width:1,2'"),
        ({"steps": 0}, "--steps is 0"),
        ({"vocab_size": 2}, "--vocab_size is 2"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(change, expected):
    usual = {"vocab_size": 64, "cases": ["duo_base"], "steps": 2, "sweep": None}
    with pytest.raises(UserError, match=expected):
        train.run(config_lib.default(), SimpleNamespace(**usual | change))


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--config.model.heads=3"], "config.model.dim = 16 must be a multiple"),
        (["--out=setup.py/x"], "cannot be written: Not a directory"),
    ],
)
def test_a_mistake_gets_one_clear_line(args, expected):
    result = run([*TRAIN, *args])
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("case", programs.all_cases(), ids=str)
def test_every_case_has_a_config(case):
    config = case.apply(config_lib.default().lock())
    assert config.algo.name == case.algo
    in_curriculum = config.algo.curriculum.end > 0
    assert case.algo != "duo" or in_curriculum == (case.phase != "discrete")
    assert programs.Case.parse(str(case)) == case


def test_the_usual_cases_are_what_a_run_goes_through():
    config = config_lib.default()
    config.algo.curriculum.kind = "topk"
    assert list(map(str, programs.usual_cases(config))) == ["duo:topk", "duo:discrete"]


def test_a_sweep_of_each_kind():
    config = config_lib.default().lock()
    for name, setting in (("batch", "train.batch_size"), ("length", "model.length"), ("blocks", "model.blocks")):
        variants = sweeps.variants(config, 100, f"{name}:5,7", "train")
        assert [config_lib.flatten(variant)[setting] for variant, _ in variants] == [5, 7]
    assert [size for _, size in sweeps.variants(config, 100, "vocab:5,7", "train")] == [5, 7]
    with pytest.raises(UserError, match=r"model\.length is 2"):
        sweeps.variants(config, 100, "length:2", "train")


def test_an_exponent_is_found():
    assert report.exponent([(x, 3 * x**1.5) for x in (1, 2, 4)]) == pytest.approx(1.5)
    assert report.exponent([(2, 1), (2, 3)]) is None


def test_a_table_is_aligned():
    lines = report.table([{"a": 1, "b": 1234.5}, {"a": None}], {"a": "A", "b": "B"}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2:] == ["| 1 | 1,234 |", "| - |     - |"]
