"""`benchmarks.sample`: its report, which samplers it knows, and its words for mistakes."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import run

from benchmarks import sample
from duo_jax import config as config_lib
from duo_jax.errors import UserError

SAMPLE = [
    sys.executable, "-m", "benchmarks.sample", "--config=configs/quickstart.py", "--vocab_size=64",
    "--config.model.dim=16", "--config.model.blocks=1", "--config.model.heads=2", "--config.model.length=16",
    "--config.sample.batch_size=2",
]  # fmt: skip


def test_the_report(tmp_path):
    args = ["--samplers=psi,autoregressive", "--n_steps=3", "--top_p=0.9", "--repeats=2", f"--out={tmp_path}"]
    result = run([*SAMPLE, *args])
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "sample.json").read_text())
    psi, ar = found["rows"]
    assert (psi["case"], psi["calls"], psi["n_steps"]) == ("duo:psi", 4, 3)
    assert (ar["case"], ar["calls"], ar["n_steps"]) == ("ar:autoregressive", 15, None)
    assert 0 < psi["predictions_percent"] < 100
    assert ar["predictions_percent"] is None  # it reads one position a call
    for row in found["rows"]:
        assert row["top_p"] == 0.9
        assert len(row["times_s"]) == 2
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["median_ms"] * 1e3)
        assert row["seconds_per_text"] == pytest.approx(row["median_ms"] / 2e3)
        assert row["call_ms"] == pytest.approx(row["median_ms"] / row["calls"])
        assert 0 < row["mfu_percent"] < 100
        assert row["rss_baseline_mib"] < row["rss_mib"]
        assert row["compile_s"] > 0
    assert (tmp_path / "sample.md").read_text().strip() in result.stdout


def test_all_samplers_with_the_algorithms_they_belong_to():
    absorbing = {
        f"{algo}:{name}" for algo in ("mdlm", "sedd", "d3pm") for name in ("ancestral", "psi", "ancestral_cache")
    }
    expected = {"duo:ancestral", "duo:psi", "sedd:analytic", "ar:autoregressive"} | absorbing
    assert set(map(str, sample.all_cases())) == expected


def test_a_sampler_goes_with_the_configs_algorithm_where_it_can():
    named = {
        name: str(sample.parse_case(name, "dcd")) for name in ("ancestral", "ancestral_cache", "analytic", "d3pm:psi")
    }
    assert named == {
        "ancestral": "dcd:ancestral",
        "ancestral_cache": "mdlm:ancestral_cache",
        "analytic": "sedd:analytic",
        "d3pm:psi": "d3pm:psi",
    }
    assert str(sample.parse_case("psi", "sedd")) == "sedd:psi"
    assert str(sample.parse_case("psi", "ar")) == "duo:psi"


def test_lists_are_combined_but_not_for_an_autoregressive_network():
    cases = [sample.Case("duo", "psi"), sample.Case("ar", "autoregressive")]
    found = sample.settings_of(cases, [4, 8], ["ancestral", "greedy"], [1.0])
    assert sum(given["algo.name"] == "duo" for given in found) == 4
    assert sum(given["algo.name"] == "ar" for given in found) == 1


@pytest.mark.parametrize("name", ["duo:analytic", "x:psi", ":psi", "fast", "ar:psi"])
def test_a_sampler_that_does_not_exist(name):
    with pytest.raises(UserError, match="choose from ancestral"):
        sample.parse_case(name, "duo")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"samplers": ["fast"]}, "there is no sampler 'fast'"),
        ({"n_steps": ["8", "0"]}, r"config\.sample\.n_steps is 0"),
        ({"top_p": ["0.9", "2"]}, r"config\.sample\.top_p is 2"),
        ({"repeats": 0}, "--repeats is 0"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(change, expected):
    usual = {
        "vocab_size": 64,
        "samplers": [],
        "n_steps": [],
        "noise_removal": [],
        "top_p": [],
        "repeats": 2,
        "sweep": None,
    }
    with pytest.raises(UserError, match=expected):
        sample.run(config_lib.default(), SimpleNamespace(**usual | change))


def test_a_mistake_gets_one_clear_line():
    result = run([*SAMPLE, "--n_steps=two"])
    assert result.returncode == 2, result.stderr
    assert "--n_steps=two: invalid literal" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
