"""`benchmarks.agree`: what it accepts, and that it tells what it must not accept."""

import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run
from scipy import stats

from benchmarks import agree, programs
from duo_jax import config as config_lib
from duo_jax.errors import UserError

SMALL = [
    "--config=configs/quickstart.py", "--vocab_size=64", "--config.model.dim=16", "--config.model.blocks=1",
    "--config.model.heads=2", "--config.model.length=16", "--config.train.batch_size=2", "--config.sample.batch_size=64",
]  # fmt: skip
SIZES = {"model.size": "nano", "model.blocks": 1, "model.length": 16, "train.batch_size": 2}


def step(**changes):
    gradient = {part: np.random.default_rng(0).standard_normal(1000) for part in ("blocks", "embed", "head")}
    return {"dtype": "bfloat16", "loss": 4.0, "bound": 5.0, "gradient": gradient} | changes


def scaled(part, factor):
    gradient = step()["gradient"]
    return step(gradient=gradient | {part: gradient[part] * factor})


def test_half_precision_agrees(tmp_path):
    command = [sys.executable, "-m", "benchmarks.agree", *SMALL, "--config.precision=bfloat16", f"--out={tmp_path}"]
    result = run([*command, "--cases=duo:topk", "--samplers="])
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "agree.json").read_text())
    (row,) = found["steps"]
    assert (row["case"], row["dtype"]) == ("duo:topk", "bfloat16")
    assert 1e-4 < row["gradient_error"] < row["gradient_allowed"]  # the two did not compute the same
    assert row["loss_error"] > 0
    assert "| duo:topk | bfloat16 |" in result.stdout
    assert "yes |" in result.stdout


@pytest.mark.parametrize(
    ("sampler", "top_p"),
    [
        ("duo:ancestral", 1.0),
        ("duo:psi", 0.9),
        ("mdlm:ancestral", 0.9),
        ("sedd:ancestral", 1.0),
        ("ar:autoregressive", 1.0),
    ],
)
def test_samplers_draw_what_they_should(sampler, top_p):
    algo, name = sampler.split(":")
    changes = {
        "algo.name": algo,
        "sample.sampler": name,
        "sample.batch_size": 64,
        "sample.n_steps": 4,
        "sample.top_p": top_p,
    }
    row = agree.draws_of(programs.changed(config_lib.default(), SIZES | changes), 64, 4000)
    assert (row["case"], row["top_p"]) == (sampler, top_p)
    assert row["draws"] >= 4000
    assert row["bins"] > 10
    assert row["agrees"]


@pytest.mark.parametrize(
    "wrong",
    [
        step(loss=4.01),
        step(bound=5.01),
        step(loss=np.nan),
        scaled("blocks", 1.1),
        scaled("head", -1.0),
        scaled("embed", 0.0),
    ],
)
def test_a_step_that_is_wrong_is_told(wrong):
    assert agree.compare(step(), step())["agrees"]
    assert not agree.compare(wrong, step())["agrees"]


def test_what_is_wrong_in_a_small_part_is_told():
    """The embedding's gradient is a hundredth of the whole, and would be lost in it."""
    small = step()["gradient"] | {"embed": 0.01 * step()["gradient"]["embed"]}
    wrong = small | {"embed": -small["embed"]}
    assert not agree.compare(step(gradient=wrong), step(gradient=small))["agrees"]


def test_the_chi_squared_test_has_its_false_alarm_rate():
    rng = np.random.default_rng(0)
    p = rng.gamma(0.1, size=2000)
    p /= p.sum()
    values = [agree.chi_squared(rng.multinomial(20_000, p), 20_000 * p)["p_value"] for _ in range(300)]
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_draws_of_another_distribution_are_told():
    p = np.arange(1.0, 101.0)
    p /= p.sum()
    counts = np.random.default_rng(0).multinomial(20_000, p)
    assert agree.chi_squared(counts, 20_000 * p)["p_value"] > 1e-3
    assert agree.chi_squared(np.roll(counts, 10), 20_000 * p)["p_value"] < 1e-6
    impossible = np.where(np.arange(100) < 3, 0.0, p)
    assert agree.chi_squared(counts, 20_000 * impossible / impossible.sum())["p_value"] == 0


def test_what_disagrees_is_named():
    rows = [{"case": "duo:topk", "agrees": False}, {"case": "ar", "agrees": True}]
    with pytest.raises(UserError, match="1 of 2 disagree with a CPU: duo:topk"):
        agree.check({"steps": rows, "draws": []})
    agree.check({"steps": rows[1:], "draws": []})


def test_processes_started_for_comparison_see_the_cpu_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with agree.on_a_cpu():
        assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["JAX_PLATFORMS"] == "cuda"
    monkeypatch.delenv("JAX_PLATFORMS")
    with agree.on_a_cpu():
        pass
    assert "JAX_PLATFORMS" not in os.environ


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"draws": 0}, "--draws is 0"), ({"cases": ["mdlm:full"]}, "no case"), ({"samplers": ["best"]}, "no sampler")],
)
def test_a_mistake_is_told_before_anything_is_computed(change, expected):
    usual = {"cases": ["ar"], "samplers": [], "draws": 10, "vocab_size": 64}
    with pytest.raises(UserError, match=expected):
        agree.run(config_lib.default(), SimpleNamespace(**usual | change))


def test_float16_takes_a_step_whose_gradient_is_finite():
    config = programs.changed(config_lib.default(), SIZES | {"precision": "float16"})
    found = agree.step_of(config, programs.Case("dcd"), 64)
    assert found["dtype"] == "float16"
    assert sorted(found["gradient"]) == sorted(agree.PARTS)
    assert all(np.linalg.norm(gradient) > 0 for gradient in found["gradient"].values())
