"""Runs beside one another, from the files that they leave."""

import json
import math
import subprocess
import sys

import pytest

from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.evaluation import compare, plots


@pytest.fixture
def run(tmp_path):
    """Returns a function that writes the files of a run and returns its folder."""

    def write(name, evaluations, **settings):
        config, algo = config_lib.default(), settings.get("algo.name")
        config.update_from_flattened_dict({"model.length": 8, "train.batch_size": 4} | settings)
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        rows = [{"step": 5, "train/tokens_per_s": rate} for rate in (100.0, 900.0, 200.0)]
        rows += [
            {"step": step, "heldout/nll": nll, "heldout/tokens": tokens, "heldout/unigram_ppl": 60.0,
             "heldout/uniform_ppl": 300.0, **({"heldout/stderr": 0.05} if algo == "mdlm" else {})}
            for step, nll, tokens in evaluations
        ]  # fmt: skip
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return write


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_the_last_figures_of_each_run(run, tmp_path):
    runs = {
        "a": run("a", [(10, 4.0, 80), (20, math.log(20), 80)], **{"algo.name": "duo"}),
        # Measured twice at a step, as after a resume: the last counts.
        "b": run("b", [(30, 9.0, 80), (30, 3.5, 80)], **{"algo.name": "mdlm", "train.batch_size": 2}),
    }
    compare.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text()
    nll = math.log(20)
    assert cells(text, "a") == [
        "a",
        "duo (full)",
        "20",
        "640",
        f"{nll:.4f}",
        f"{nll / math.log(2):.4f}",
        "20.00",
        "200",
    ]
    assert cells(text, "b")[1:5] == ["mdlm", "30", "480", "3.5000 ± 0.0500"]
    assert "80 held-out tokens" in text
    assert "autoregressive" not in text
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_count_whole_beside_an_autoregressive_run(run, tmp_path, monkeypatch):
    """Ten rows of 8: a run that predicts 7 of each has the same nats a row as one that spreads them over 8."""
    drawn = []
    monkeypatch.setattr(plots, "compared", lambda path, *told: drawn.append(told))
    runs = {
        "duo": run("duo", [(2, 3.5, 80), (1, 4.2, 80)]),
        "ar": run("ar", [(1, 4.0, 70)], **{"algo.name": "ar"}),
        "mdlm": run("mdlm", [(1, 3.5, 80)], **{"algo.name": "mdlm"}),
    }
    compare.report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert cells(text, "duo")[4] == cells(text, "ar")[4] == "4.0000"
    assert cells(text, "mdlm")[4] == "4.0000 ± 0.0571", "the error is of the same tokens"
    assert "70 held-out tokens" in text
    assert "BOS" in text
    ((lines, levels, _),) = drawn
    assert {name: [step for step, _ in line] for name, line in lines.items()} == {"duo": [1, 2], "ar": [1], "mdlm": [1]}
    assert [ppl for line in lines.values() for _, ppl in line] == pytest.approx([math.exp(4.8), *[math.exp(4)] * 3])
    assert levels == {"unigram": 60.0}
    compare.report({"ar": runs["ar"]}, tmp_path / "alone")
    assert "BOS" not in (tmp_path / "alone" / "compare.md").read_text()


def test_a_run_of_an_older_version_that_logged_no_rate(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    older = tmp_path / run("older", [(1, 3.0, 80)])
    settings = json.loads((older / "config.json").read_text())
    del settings["eval"]["batches"], settings["data"]["packing"]
    (older / "config.json").write_text(json.dumps(settings))
    rows = (older / "metrics.jsonl").read_text().splitlines()
    (older / "metrics.jsonl").write_text("".join(row + "\n" for row in rows if "tokens_per_s" not in row))
    compare.report({"older": "~/older", "newer": run("newer", [(1, 3.0, 80)])}, tmp_path / "out")
    assert cells((tmp_path / "out" / "compare.md").read_text(), "older")[-1] == "-"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"data.tokenizer": "bpe"}, "data.tokenizer"),
        ({"model.length": 16}, "model.length"),
        ({"eval.batches": 3}, "eval.batches"),
    ],
)
def test_runs_of_other_tokens_are_refused(run, tmp_path, settings, named):
    runs = {"a": run("a", [(1, 3.0, 80)]), "b": run("b", [(1, 3.0, 80)], **settings)}
    with pytest.raises(UserError, match=rf"a and b were measured on different tokens: config.{named} is"):
        compare.report(runs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_runs_that_read_the_same_data_otherwise_are_compared(run, tmp_path):
    runs = {
        "a": run("a", [(1, 3.0, 80)]),
        "b": run("b", [(1, 3.0, 80)], **{"data.workers": 2, "data.dir": "elsewhere"}),
    }
    compare.report(runs, tmp_path / "out")


def test_what_is_no_run_is_one_line(run, tmp_path):
    with pytest.raises(UserError, match="is not a run's folder"):
        compare.read("x", tmp_path)
    folder = tmp_path / run("new", [])
    for metrics in ("", "[1, 2]\n", '{"step": 1, "heldout/nll": 3.0}\n'):
        (folder / "metrics.jsonl").write_text(metrics)
        with pytest.raises(UserError, match="no evaluation yet"):
            compare.read("x", folder)


def test_from_the_command_line(run, tmp_path):
    command = [sys.executable, "-m", "duo_jax.evaluation.compare", "--out", str(tmp_path / "out")]
    twice = subprocess.run([*command, "--runs", "a=x", "--runs", "a=y"], capture_output=True, text=True)
    assert twice.returncode == 2
    assert twice.stderr.splitlines() == [
        "error: two --runs have the same name; rename one, as in --runs before=... --runs after=...."
    ]
    done = subprocess.run([*command, "--runs", run("a", [(1, 3.0, 80)])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "a")[2] == "1"
