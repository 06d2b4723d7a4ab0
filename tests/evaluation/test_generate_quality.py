"""The few-step curve's command, from checkpoints and a judge in files to its table, picture and texts."""

import contextlib
import json
import math
import sys

import plain_language_models as plain
import pytest
from helpers import make_config, run, tiny_settings

from duo_jax import api
from duo_jax.evaluation import generate_quality

DOOR = [sys.executable, "-m", "duo_jax.evaluation.generate_quality"]
COLUMNS = 7


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of a tiny GPT-2."""
    bpe = plain.tokenizer()
    return plain.write_gpt2(tmp_path_factory.mktemp("judge"), plain.weights(plain.GPT2, bpe.get_vocab_size()), bpe)


@pytest.fixture(scope="module")
def autoregressive(text_folder, tmp_path_factory):
    """The workdir of an autoregressive network that has hardly been trained."""
    from duo_jax.training import loop

    workdir = tmp_path_factory.mktemp("autoregressive")
    brief = {"algo.name": "ar", "train.steps": 2, "checkpoint.every": 2, "eval.every": 0, "sample.every": 0}
    loop.train(make_config({**tiny_settings(text_folder), **brief}), str(workdir))
    return workdir


@pytest.fixture
def door(monkeypatch):
    """Returns a function that runs the command in this process, where what it has compiled is kept."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["generate_quality", *map(str, args)])
        # These two change the process for good; the subprocesses below test the first.
        monkeypatch.setattr(generate_quality.cli, "one_line_errors", contextlib.nullcontext)
        monkeypatch.setattr(generate_quality.cli, "keep_memory", lambda: None)
        generate_quality.main()

    return call


def test_the_curve_is_measured_once(trained, autoregressive, judge, tmp_path, door, monkeypatch):
    out = tmp_path / "quality"
    flags = [f"--models=duo={trained}", f"--models=left={autoregressive}", f"--judge={judge}", f"--out={out}"]
    flags += ["--num=3", "--rows_at_once=2", "--seeds=0,1"]
    door(*flags, "--steps=1,2", "--noise_removal=ancestral,greedy")
    names = ["quality.json", "quality.md", "quality.png", "texts.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "quality.png").read_bytes()[:4] == b"\x89PNG"

    rows = json.loads((out / "quality.json").read_text())
    cases = [(r["case"]["model"], r["case"].get("n_steps"), r["case"].get("noise_removal")) for r in rows]
    duo = [("duo", n, tail) for n in (1, 2) for tail in ("ancestral", "greedy") for _ in range(2)]
    # A network that writes one token after another knows nothing of steps and noise removal: once a seed.
    assert cases == [("held-out text", None, None), *duo, *[("left", 32, "ancestral")] * 2]
    assert [r["network_calls"] for r in rows] == [0, 2, 2, 2, 2, 3, 3, 3, 3, 31, 31]
    assert all(1 < r["ppl"] < math.inf and 0 <= r["entropy"] < math.log(32) and r["judged"] > 0 for r in rows)

    texts = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert len(texts) == 3 * len(rows)
    mine = [t["text"] for t in texts if t["case"] == rows[1]["case"]]
    whole = api.sample(api.load(trained), 1, seed=0, batch_size=3, rows_at_once=2)
    assert all(text.startswith(cut) for text, cut in zip(whole.text, mine, strict=True))

    table = (out / "quality.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 4 + 1, "a row for held-out text, four of the one network and one of the other"
    assert {line.count("|") for line in table} == {COLUMNS + 1}
    assert table[2].startswith("| held-out text | - | - | - |")
    mean = (rows[1]["ppl"] + rows[2]["ppl"]) / 2
    assert f"| duo | ancestral | 1 | 2 | {mean:.1f} ±" in table[3]

    before = {name: (out / name).read_bytes() for name in names}
    samples = []
    monkeypatch.setattr(api, "sample", lambda *args, sample=api.sample, **kw: samples.append(kw) or sample(*args, **kw))
    door(*flags, "--steps=1,2", "--noise_removal=ancestral,greedy")
    assert samples == []
    assert {name: (out / name).read_bytes() for name in names if name != "quality.png"} == {
        name: data for name, data in before.items() if name != "quality.png"
    }
    # What is new is sampled, and nothing else.
    door(*flags, "--steps=2,4", "--noise_removal=greedy")
    assert [(kw["n_steps"], kw["seed"]) for kw in samples] == [(4, 0), (4, 1)]
    assert len((out / "texts.jsonl").read_text().splitlines()) == len(texts) + 6
    assert len((out / "quality.md").read_text().splitlines()) == 2 + 1 + 2 + 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--models=a/run", "--models=b/run"], "two --models have one name"),
        (["--models=x=a", "--models=x=b"], "two --models have one name"),
        (["--models=x={trained}", "--steps=0"], "--steps, --num and --rows_at_once must be at least 1"),
        (["--models=x={trained}", "--num=0"], "--steps, --num and --rows_at_once must be at least 1"),
        (["--models=x={trained}", "--rows_at_once=0"], "--steps, --num and --rows_at_once must be at least 1"),
        (["--models=x={out}/nowhere"], "nowhere does not exist"),
        (["--models=x={judge}"], "is no Duo, MDLM, SEDD or AR state dict"),
        (["--models=x={trained}", "--noise_removal=gready"], "gready"),
        (["--models=x={trained}", "--top_p=0"], "top_p"),
        (["--models=x={trained}", "--temperature=-1"], "temperature"),
        (["--models=x={trained}", "--judge={out}/nowhere"], "--judge="),
    ],
)
def test_a_mistake_gets_one_clear_line(trained, judge, tmp_path, flags, expected):
    flags = [flag.format(trained=trained, judge=judge, out=tmp_path) for flag in flags]
    result = run([*DOOR, f"--judge={judge}", "--steps=1", "--num=1", f"--out={tmp_path / 'out'}", *flags])
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--steps=one"], ["--steps="], ["--models"], ["--step_count=3"]])
def test_what_is_no_flag_is_refused(tmp_path, flags):
    result = run([*DOOR, "--models=x=y", f"--out={tmp_path}", *flags])
    assert result.returncode == 2
    assert "error: " in result.stderr.splitlines()[-1]
