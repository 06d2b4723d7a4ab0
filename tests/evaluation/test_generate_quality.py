"""The few-step curve's command, from checkpoints and a judge in files to its table, picture and texts."""

import json
import math
import sys
import types

import pytest
from helpers import make_config, run, tiny_settings

from duo_jax import api
from duo_jax.errors import UserError
from duo_jax.evaluation import generate_quality, generative, judged_texts, judges
from duo_jax.files import check_folder
from duo_jax.training import checkpoint

DOOR = [sys.executable, "-m", "duo_jax.evaluation.generate_quality"]
COLUMNS = 9


@pytest.fixture(scope="module")
def autoregressive(text_folder, tmp_path_factory):
    """The workdir of an autoregressive network that has hardly been trained."""
    from duo_jax.training import loop

    workdir = tmp_path_factory.mktemp("autoregressive")
    brief = {"algo.name": "ar", "train.steps": 2, "checkpoint.every": 2, "eval.every": 0, "sample.every": 0}
    loop.train(make_config({**tiny_settings(text_folder), **brief}), str(workdir))
    return workdir


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

    *table, gap, told = (out / "quality.md").read_text().splitlines()
    assert not gap
    assert told.startswith("3 texts a set, top_p 1, temperature 1; ")
    assert len(table) == 2 + 1 + 4 + 1, "a row for held-out text, four of the one network and one of the other"
    assert {line.count("|") for line in table} == {COLUMNS + 1}
    assert table[2].startswith("| held-out text | - | - | - | - |")
    assert "±" not in table[2], "real text has no seeds"
    mean = (rows[1]["ppl"] + rows[2]["ppl"]) / 2
    assert f"| duo | ancestral | ancestral | 1 | 2 | {mean:.1f} ±" in table[3]

    before = {name: (out / name).read_bytes() for name in names}
    samples = []
    monkeypatch.setattr(api, "sample", lambda *args, sample=api.sample, **kw: samples.append(kw) or sample(*args, **kw))
    door(*flags, "--steps=1,2", "--noise_removal=ancestral,greedy")
    assert samples == []
    assert {name: (out / name).read_bytes() for name in names if name != "quality.png"} == {
        name: data for name, data in before.items() if name != "quality.png"
    }
    # What is new, or has not all figures, is sampled, and nothing else.
    lacking = next(row for row in rows if row["case"].get("noise_removal") == "greedy" and row["case"]["n_steps"] == 2)
    del lacking["bits"]
    (out / "quality.json").write_text(json.dumps(rows))
    door(*flags, "--steps=2,4", "--noise_removal=greedy")
    assert [(kw["n_steps"], kw["seed"]) for kw in samples] == [(2, 0), (4, 0), (4, 1)]
    assert len((out / "texts.jsonl").read_text().splitlines()) == len(texts) + 9
    assert len((out / "quality.md").read_text().splitlines()) == 2 + 1 + 2 + 1 + 2


def test_samplers_are_compared(trained, autoregressive, judge, tmp_path, door, monkeypatch):
    out, drawn = tmp_path / "quality", {}
    from duo_jax.evaluation import plots

    monkeypatch.setattr(plots, "few_steps", lambda path, curves, *_: drawn.update(curves))
    flags = [f"--models=duo={trained}", f"--models=left={autoregressive}", f"--judge={judge}", f"--out={out}"]
    flags += ["--num=2", "--steps=2", "--noise_removal=greedy", "--seeds=0"]
    door(*flags, "--sampler=ancestral,psi", "--psi=constant-0.5,pure-pc")
    rows = {(r["case"]["model"], r["case"].get("psi")): r for r in json.loads((out / "quality.json").read_text())}
    assert list(rows) == [
        ("held-out text", None), ("duo", ""), ("duo", "constant-0.5"), ("duo", "pure-pc"), ("left", "")
    ]  # fmt: skip
    table = (out / "quality.md").read_text().splitlines()[3:7]
    starts = ["duo | ancestral", "duo | psi constant-0.5", "duo | psi pure-pc"]
    assert [line.rsplit(" | ", 6)[0] for line in table] == [
        *(f"| {start} | greedy" for start in starts), "| left | ancestral | ancestral"
    ]  # fmt: skip
    assert list(drawn) == [
        ("duo", "greedy"), ("duo, psi constant-0.5", "greedy"), ("duo, psi pure-pc", "greedy"), ("left", "ancestral")
    ]  # fmt: skip

    params = api.load(trained)
    for mode in ("constant-0.5", "pure-pc"):
        how = {"sampler": "psi", "psi": mode, "noise_removal": "greedy", "seed": 0, "batch_size": 2}
        quality, _ = generative.quality(
            api.sample(params, 2, **how).tokens, api.tokenizer_of(params.tokenizer), judges.load(str(judge))
        )
        assert quality.ppl == pytest.approx(rows["duo", mode]["ppl"], rel=1e-6)
    assert len({row["ppl"] for row in rows.values()}) == 5

    # As the file was before there was a choice; and what psi does by default is asked for by name.
    older = list(rows.values())
    for row in older:
        for name in ("sampler", "psi", "length"):
            row["case"].pop(name, None)
    (out / "quality.json").write_text(json.dumps([row for row in older if row["case"]["model"] != "duo"] + older[1:2]))
    samples = []
    monkeypatch.setattr(api, "sample", lambda *args, sample=api.sample, **kw: samples.append(kw) or sample(*args, **kw))
    door(*flags)
    assert samples == []
    door(*flags, "--sampler=psi")
    door(*flags, "--sampler=psi", "--psi=max-capped-0.02")
    assert [(kw["sampler"], kw["psi"]) for kw in samples] == [("psi", "max-capped-0.02")]


def test_texts_of_another_length(trained, autoregressive, judge, tmp_path, door, monkeypatch):
    out, samples, judged = tmp_path / "quality", [], []

    def sample(*args, sample=api.sample, **kw):
        samples.append((kw["length"], sample(*args, **kw)))
        return samples[-1][1]

    def quality(tokens, *args, quality=generative.quality, **kw):
        judged.append(tokens.shape)
        return quality(tokens, *args, **kw)

    monkeypatch.setattr(api, "sample", sample)
    monkeypatch.setattr(generative, "quality", quality)
    flags = [f"--models=duo={trained}", f"--models=left={autoregressive}", f"--judge={judge}", f"--out={out}"]
    flags += ["--num=2", "--steps=1", "--noise_removal=greedy", "--seeds=0"]
    door(*flags, "--length=40")
    assert judged == [(2, 40)] * 3, "held-out text is cut as the texts are, or they could not be compared"
    assert [(length, result.network_calls) for length, result in samples] == [(40, 2 * 2), (40, 31 + 31)]
    rows = json.loads((out / "quality.json").read_text())
    assert [(row["case"]["length"], row["case"].get("n_steps")) for row in rows] == [(40, None), (40, 1), (40, 40)]
    assert (out / "quality.md").read_text().splitlines()[-1].startswith("2 texts of 40 tokens a set, ")
    # The networks' own length is the same whether it is asked for or not.
    door(*flags, "--length=32")
    assert judged[3:] == [(2, 32)] * 3
    door(*flags)
    assert len(judged) == 6


@pytest.mark.parametrize(
    ("sampler", "tail", "told"),
    [("psi,ancestral_cache", "greedy", "'ancestral_cache', which does not fit a network of the uniform process"),
     ("autoregressive", "greedy", "'autoregressive', which does not fit a network of the uniform process")],
)  # fmt: skip
def test_a_sampler_that_does_not_fit_is_told_first(
    trained, autoregressive, tmp_path, door, monkeypatch, sampler, tail, told
):
    monkeypatch.setattr(judges, "load", lambda name: pytest.fail("the judge is loaded after what is quickly checked"))
    flags = [f"--models=left={autoregressive}", f"--models=duo={trained}", f"--out={tmp_path}"]
    with pytest.raises(UserError, match=f"the network duo cannot be sampled with these flags: sampler is {told}"):
        door(*flags, f"--sampler={sampler}", f"--noise_removal={tail}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--models=a/run", "--models=b/run"], "two --models have the same name"),
        (["--models=x=a", "--models=x=b"], "two --models have the same name"),
        (["--models=x={trained}", "--steps=0"], "--steps: 0 is not allowed; it must be at least 1"),
        (["--models=x={trained}", "--num=0"], "--num: 0 is not allowed; it must be at least 1"),
        (["--models=x={trained}", "--rows_at_once=0"], "--rows_at_once: 0 is not allowed; it must be at least 1"),
        (["--models=x={trained}", "--seeds=-1"], "--seeds: -1 is not allowed; it must be from 0 to 4294967295"),
        (["--models=x={trained}", "--seeds=1,4294967296"], "--seeds: 4294967296 is not allowed; it must be from 0"),
        (["--models=x={trained}", "--seeds=0,1,0"], "--seeds: 0 is given twice"),
        (["--models=x={trained}", "--steps=2,2"], "--steps: 2 is given twice"),
        (
            ["--models=x={trained}", "--sampler=ancestral,psy"],
            "--sampler: 'psy' is unknown; choose from ancestral, psi, ",
        ),
        (["--models=x={trained}", "--sampler=psi,psi"], "--sampler: psi is given twice"),
        (["--models=x={trained}", "--psi=pure-pc"], "--psi is of the sampler psi, which --sampler does not have"),
        (["--models=x={trained}", "--sampler=psi", "--psi=constant"], "constant needs a number in [0, 1]"),
        (["--models=x={trained}", "--sampler=psi", "--psi=pure-pc,pure-pc"], "--psi: pure-pc is given twice"),
        (["--models=x={trained}", "--length=2"], "--length: 2 is not allowed; it must be at least 3"),
        (["--models=x={trained}", "--heldout={out}/nowhere"], "nowhere; set --heldout to a file or folder"),
        (["--models=x={trained}", "--heldout="], "--heldout is empty"),
        (["--models=x={trained}", "--heldout={out}"], "holds no text; it needs files that end in"),
        (["--texts=x=a", "--texts=x=b"], "two --texts have the same name"),
        (["--models=x=a", "--texts=x=b"], "--models and --texts both have x"),
        (["--texts=x={out}/nowhere", "--heldout=none"], "nowhere is not a samples.jsonl as mode=sample writes it"),
        (["--models=held-out text={trained}"], "the name of the text to compare with"),
        (["--models=x={trained}", "--protocol=theirs"], "--protocol: invalid choice: 'theirs' (choose from "),
        (["--models=x={out}/nowhere"], "nowhere does not exist"),
        (["--models=x={out}"], "holds no checkpoint"),
        (["--models=x={judge}"], "is not a state dict of Duo, MDLM, SEDD or AR"),
        (
            ["--models=x={trained}", "--noise_removal=gready"],
            "'gready' is unknown; choose from ancestral, greedy, none",
        ),
        (["--models=x={trained}", "--top_p=0"], "top_p"),
        (["--models=x={trained}", "--temperature=-1"], "temperature"),
        (["--models=x={trained}", "--stepz=3"], "--stepz=3"),
        (["--models=x={trained}", "--mod=y={trained}"], "--mod="),
        (["--models=x={trained}", "--steps=1,a"], "--steps: 'a' is not a whole number"),
        (["--models=x={trained}", "--steps="], "--steps: '' is not a whole number"),
        (["--models=x={trained}", "stray"], "stray"),
        ([], "--models"),
        (["--models"], "--models"),
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


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        ("{tmp}/file", "is a file, not a folder"),
        ("{tmp}/file/deeper", "cannot be written: Not a directory"),
        ("/proc/nowhere", "cannot be written"),
        ("/proc", "cannot be written"),
    ],
)
def test_a_folder_that_takes_no_results_is_told_first(trained, tmp_path, door, monkeypatch, out, expected):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(judges, "load", lambda name: pytest.fail("the judge is loaded after what is quickly checked"))
    with pytest.raises(UserError, match=expected):
        door(f"--models=x={trained}", f"--out={out.format(tmp=tmp_path)}")


def test_a_judge_that_is_not_there_is_told_before_a_folder_is_made(trained, tmp_path, door):
    with pytest.raises(UserError, match=r"--judge=\./nowhere is neither"):
        door(f"--models=x={trained}", "--judge=./nowhere", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_folder("~/a/b", flag="--out", keep=False) == tmp_path / "a" / "b"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d").write_text("kept")
    assert check_folder(str(tmp_path / "c"), flag="--out", keep=False) == tmp_path / "c"
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["c", "c/d"]


def test_progress_counts_passes(trained, judge, tmp_path, door, monkeypatch):
    """A text takes one pass a step and one of the judge, so a rate is known long before a set is done."""
    seen = []

    class Bar:
        def __init__(self, total, unit):
            seen.append((total, unit))
            self.update = lambda n: seen.append(n)
            self.set_description = seen.append

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(generate_quality, "progress", types.SimpleNamespace(bar=Bar, say=print))
    flags = [f"--models=duo={trained}", f"--judge={judge}", f"--out={tmp_path / 'quality'}", "--num=3", "--seeds=0"]
    door(*flags, "--steps=4", "--rows_at_once=2", "--noise_removal=greedy")
    assert seen == [(3 + 3 * 5, " passes"), "held-out text", 3, "duo, 4 steps, greedy, seed 0", 8, 4, 3]


def test_the_published_protocol_beside_ours(trained, judge, tmp_path, door):
    out = tmp_path / "quality"
    flags = [f"--models=duo={trained}", f"--judge={judge}", f"--out={out}", "--num=2", "--steps=1", "--seeds=0"]
    flags += ["--noise_removal=greedy"]
    door(*flags)
    # As the file was before there were two.
    rows = json.loads((out / "quality.json").read_text())
    for row in rows:
        assert row["case"].pop("protocol") == "ours"
    (out / "quality.json").write_text(json.dumps(rows))
    door(*flags, "--protocol=reference")
    assert f"| PPL ({judge.name}, reference protocol) |" in (out / "quality.md").read_text()
    ours, theirs = (json.loads((out / "quality.json").read_text())[i : i + 2] for i in (0, 2))
    assert [row["case"]["protocol"] for row in (*ours, *theirs)] == ["ours"] * 2 + ["reference"] * 2
    for mine, published in zip(ours, theirs, strict=True):
        assert mine["entropy"] == published["entropy"]
        assert mine["ppl"] != published["ppl"]
    params = api.load(trained)
    tokens = api.sample(params, 1, seed=0, batch_size=2, noise_removal="greedy").tokens
    again, _ = generative.quality(
        tokens, api.tokenizer_of(params.tokenizer), judges.load(str(judge)), protocol="reference"
    )
    assert again.ppl == pytest.approx(theirs[1]["ppl"], rel=1e-6)
    door(*flags)
    assert len(json.loads((out / "quality.json").read_text())) == 4, "the earlier entries are known"


@pytest.mark.parametrize("content", ["", "[{", '[{"x": 1}]', '{"case": 1}', "5"])
def test_damaged_results_are_not_overwritten(trained, judge, tmp_path, door, content):
    path = tmp_path / "quality.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"quality\.json cannot be read"):
        door(f"--models=x={trained}", f"--judge={judge}", f"--out={tmp_path}", "--num=1", "--steps=1")
    assert path.read_text(encoding="utf-8") == content


def test_fewer_heldout_rows_than_texts_are_said(trained, capsys):
    settings = checkpoint.read(trained)[1]["config"]
    some, _ = judged_texts.heldout(settings, 2)
    assert capsys.readouterr().out == ""
    every, _ = judged_texts.heldout(settings, 5000)
    assert f"has {len(every)} held-out rows" in capsys.readouterr().out
    assert (every[:2] == some).all()


def test_help_tells_the_defaults(capsys, door):
    with pytest.raises(SystemExit):
        door("--help")
    told = " ".join(capsys.readouterr().out.split())
    for default in ("1,2,4,8,16,32,64,128", "ancestral,greedy", "0,1,2", "64", "smollm2", "ours"):
        assert f"(default: {default})" in told
    assert "None" not in told


def test_the_pictures_lines_can_be_told_apart(tmp_path, monkeypatch):
    from duo_jax.evaluation import plots

    figures = []
    monkeypatch.setattr(
        plots, "_save", lambda figure, path, save=plots._save: figures.append(figure) or save(figure, path)
    )
    tails = ("ancestral", "greedy")
    curves = {
        (f"network {i}", tail): [(2, 100.0 + i, 1.0, 3.0), (3, 90.0, 1.0, 3.1)] for i in range(11) for tail in tails
    }
    for levels in ({}, {"held-out text": (50.0, 4.0), "other text": (60.0, 4.1)}):
        plots.few_steps(tmp_path / "quality.png", curves, levels, "judge")
        assert (tmp_path / "quality.png").read_bytes()[:4] == b"\x89PNG"
        lines = figures[-1].axes[1].lines
        styles = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}
        assert len(styles) == len(lines) == len(curves) + len(levels)
