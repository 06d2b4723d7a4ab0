"""The few-step curve's command, from checkpoints and a judge in files to its table, picture and texts."""

import contextlib
import json
import math
import shutil
import sys
import types

import numpy as np
import plain_language_models as plain
import pytest
from helpers import make_config, run, tiny_settings

from duo_jax import api, cli
from duo_jax.errors import UserError
from duo_jax.evaluation import generate_quality, generative, judged_texts, judges
from duo_jax.training import checkpoint

DOOR = [sys.executable, "-m", "duo_jax.evaluation.generate_quality"]
COLUMNS = 9


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
    with pytest.raises(UserError, match=f"the network duo cannot be sampled so: sampler is {told}"):
        door(*flags, f"--sampler={sampler}", f"--noise_removal={tail}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--models=a/run", "--models=b/run"], "two --models have one name"),
        (["--models=x=a", "--models=x=b"], "two --models have one name"),
        (["--models=x={trained}", "--steps=0"], "--steps, --num and --rows_at_once must be at least 1"),
        (["--models=x={trained}", "--num=0"], "--steps, --num and --rows_at_once must be at least 1"),
        (["--models=x={trained}", "--rows_at_once=0"], "--steps, --num and --rows_at_once must be at least 1"),
        (["--models=x={trained}", "--seeds=-1"], "--seeds has -1; a seed must be from 0"),
        (["--models=x={trained}", "--seeds=1,4294967296"], "--seeds has 4294967296"),
        (["--models=x={trained}", "--seeds=0,1,0"], "--seeds has 0 twice"),
        (["--models=x={trained}", "--steps=2,2"], "--steps has 2 twice"),
        (["--models=x={trained}", "--sampler=ancestral,psy"], "--sampler has 'psy'; choose from ancestral, psi, "),
        (["--models=x={trained}", "--sampler=psi,psi"], "--sampler has psi twice"),
        (["--models=x={trained}", "--psi=pure-pc"], "--psi is of the sampler psi, which --sampler does not have"),
        (["--models=x={trained}", "--sampler=psi", "--psi=constant"], "constant needs a number in [0, 1]"),
        (["--models=x={trained}", "--sampler=psi", "--psi=pure-pc,pure-pc"], "--psi has pure-pc twice"),
        (["--models=x={trained}", "--length=2"], "--length=2 leaves no room"),
        (["--models=x={trained}", "--heldout={out}/nowhere"], "nowhere; set --heldout to a file or folder"),
        (["--models=x={trained}", "--heldout="], "--heldout is empty"),
        (["--models=x={trained}", "--heldout={out}"], "holds no text; it needs files that end in"),
        (["--texts=x=a", "--texts=x=b"], "two --texts have one name"),
        (["--models=x=a", "--texts=x=b"], "--models and --texts both have x"),
        (["--texts=x={out}/nowhere", "--heldout=none"], "nowhere is no samples.jsonl as mode=sample writes it"),
        (["--models=held-out text={trained}"], "the name of the text to compare with"),
        (["--models=x={trained}", "--protocol=theirs"], "--protocol=theirs; choose one of ours, reference"),
        (["--models=x={out}/nowhere"], "nowhere does not exist"),
        (["--models=x={out}"], "holds no checkpoint"),
        (["--models=x={judge}"], "is no Duo, MDLM, SEDD or AR state dict"),
        (["--models=x={trained}", "--noise_removal=gready"], "gready"),
        (["--models=x={trained}", "--top_p=0"], "top_p"),
        (["--models=x={trained}", "--temperature=-1"], "temperature"),
        (["--models=x={trained}", "--stepz=3"], "--stepz=3"),
        (["--models=x={trained}", "--mod=y={trained}"], "--mod="),
        (["--models=x={trained}", "--steps=1,a"], "--steps"),
        (["--models=x={trained}", "--steps="], "--steps"),
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
        ("{tmp}/file/deeper", "cannot be made a folder and written to: Not a directory"),
        ("/proc/nowhere", "cannot be made a folder and written to"),
        ("/proc", "cannot be made a folder and written to"),
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
    assert cli.results_folder("--out", "~/a/b") == tmp_path / "a" / "b"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d").write_text("kept")
    assert cli.results_folder("--out", str(tmp_path / "c")) == tmp_path / "c"
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


@pytest.fixture
def exported(trained, tmp_path):
    """A folder of the network of `trained`."""
    api.export(api.load(trained), tmp_path / "exported", step=20)
    return tmp_path / "exported"


def test_an_exported_network_beside_its_run(trained, exported, judge, tmp_path, door):
    out = tmp_path / "quality"
    flags = [f"--judge={judge}", f"--out={out}", "--num=2", "--steps=1", "--noise_removal=ancestral", "--seeds=0"]
    door(f"--models=a={exported}", f"--models=b={trained}", *flags)
    real, a, b = json.loads((out / "quality.json").read_text())
    assert real["case"]["checkpoint"] == b["case"]["checkpoint"] == f"{trained} at step 20"
    assert a["case"]["checkpoint"] == f"{exported} at step 20"
    assert {**a, "case": 0} == {**b, "case": 0}


def test_networks_of_no_run_are_judged_beside_any_text(exported, judge, tmp_path, door, monkeypatch):
    out, text, drawn = tmp_path / "quality", tmp_path / "text.txt", []
    from duo_jax.evaluation import plots

    monkeypatch.setattr(plots, "few_steps", lambda path, curves, levels, judge: drawn.append(levels))
    text.write_text("The river is long.\n\nThe town lies on its bank, and is old.\n\n" * 20, encoding="utf-8")
    flags = ["--models=shipped=quickstart", f"--models=mine={exported}", f"--judge={judge}", f"--out={out}", "--num=2"]
    flags += ["--steps=1", "--noise_removal=greedy", "--seeds=0"]
    with pytest.raises(UserError, match="give a text file or folder as --heldout, or"):
        door(*flags)
    assert not out.exists()

    door(*flags, f"--heldout={text}", "--length=24")
    real, shipped, mine = json.loads((out / "quality.json").read_text())
    assert [r["case"]["model"] for r in (real, shipped, mine)] == ["held-out text", "shipped", "mine"]
    assert mine["case"]["checkpoint"] == f"{exported} at step 20"
    assert drawn == [{"held-out text": (real["ppl"], real["entropy"])}]
    assert (out / "quality.md").read_text().splitlines()[-1].endswith(f"; one seed. The held-out text is {text}.")
    # The rows are the text's beginning by the first network's tokenizer, each document followed by EOS.
    tokenizer = api.tokenizer_of(api.load("quickstart").tokenizer)
    documents = ["The river is long.", "The town lies on its bank, and is old."] * 3
    ids = [i for document in documents for i in (*tokenizer.encode(document), tokenizer.eos_id)]
    rows = [[tokenizer.bos_id, *ids[i : i + 22], tokenizer.eos_id] for i in (0, 22)]
    expected, _ = generative.quality(np.array(rows), tokenizer, judges.load(str(judge)))
    assert real["ppl"] == pytest.approx(expected.ppl, rel=1e-6)
    assert real["entropy"] == pytest.approx(expected.entropy)

    # Another text under the same name is another text.
    text.write_text(text.read_text(encoding="utf-8").replace("river", "road"), encoding="utf-8")
    door(*flags, f"--heldout={text}", "--length=24")
    assert len(json.loads((out / "quality.json").read_text())) == 4

    door(*flags, "--heldout=none", "--length=24")
    assert drawn[-1] == {}
    *table, _, told = (out / "quality.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| shipped", "| mine"]
    assert told.endswith("; one seed. There is no held-out text to compare with.")


def test_a_text_is_cut_as_the_first_network_is_used_to(trained, tmp_path):
    (tmp_path / "text.txt").write_text("A town.\n\nA river and its long banks.\n\nA road.", encoding="utf-8")
    params = api.load(trained)
    tokenizer = api.tokenizer_of(params.tokenizer)
    args = types.SimpleNamespace(heldout=str(tmp_path / "text.txt"), field="text", num=2, length=None)
    firsts = []
    for packing in ("padded", "packed"):
        model = judged_texts.Model(params, "x at step 20", {"data": {"packing": packing}})
        about, read = judged_texts.reference(args, {"x": model}, {})
        assert (about["checkpoint"], about["length"]) == ("x at step 20", None)
        tokens, given = read()
        assert given.same_as(tokenizer)
        firsts.append(tokenizer.decode(tokens[0]))
    assert firsts[0] == "A town."
    assert firsts[1].startswith("A town.\n\nA river")


def test_the_rows_of_a_text_may_call_it_anything(trained, tmp_path, door):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": "A road.", "body": "A town."}\n{"body": "A river and its long banks."}\n', encoding="utf-8"
    )
    model = {"x": judged_texts.Model(api.load(trained), "x at step 20", None)}
    with pytest.raises(UserError, match=r"field `text` of line 2 of .*; set --field to what the rows call their text"):
        door(f"--models=x={trained}", f"--heldout={file}", f"--out={tmp_path}")
    args = types.SimpleNamespace(heldout=str(file), field="body", num=1, length=16)
    about, read = judged_texts.reference(args, model, {})
    assert about["field"] == "body"
    tokens, tokenizer = read()
    assert tokenizer.decode(tokens[0]).startswith("A town.\n\nA ")


def test_any_file_of_weights_is_judged(exported, judge, tmp_path, door, monkeypatch):
    """What it holds is part of the key: such files are overwritten."""
    monkeypatch.setattr(api, "load", lambda name, load=api.load: load(exported))
    seen = []
    monkeypatch.setattr(api, "sample", lambda *args, sample=api.sample, **kw: seen.append(kw) or sample(*args, **kw))
    file, out = tmp_path / "last.ckpt", tmp_path / "quality"
    flags = [f"--judge={judge}", f"--out={out}", "--num=1", "--steps=1", "--noise_removal=none", "--seeds=0"]
    for content, samples in (("a", 1), ("a", 1), ("b", 2)):
        file.write_text(content)
        door(f"--models={file}", "--heldout=none", *flags)
        assert len(seen) == samples
    door("--models=owner/name", "--heldout=none", *flags)
    assert [row["case"]["model"] for row in json.loads((out / "quality.json").read_text())] == ["last.ckpt"] * 2 + [
        "name"
    ]


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


@pytest.fixture
def samples(trained, tmp_path):
    """A file as `mode=sample` writes it, in a folder like the run's, and what it holds."""
    params, home = api.load(trained), tmp_path / "home"
    shutil.copytree(params.tokenizer, home / "tokenizer")
    result = api.sample(params, 1, batch_size=3, length=24, noise_removal="greedy")
    rows = [{"text": text, "tokens": row.tolist()} for text, row in zip(result.text, result.tokens, strict=True)]
    (home / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return home / "samples.jsonl", result


def test_texts_that_are_there_are_judged_as_they_are(samples, trained, judge, tmp_path, door, monkeypatch, capsys):
    file, result = samples
    out = tmp_path / "quality"
    flags = [f"--texts=old={file}", f"--judge={judge}", f"--out={out}"]
    with monkeypatch.context() as patch:
        patch.setattr(api, "sample", lambda *_, **__: pytest.fail("there is nothing to sample"))
        door(*flags, "--num=2", "--heldout=none")
        (old,) = json.loads((out / "quality.json").read_text())
        tokenizer = api.tokenizer_of(api.load(trained).tokenizer)
        expected, texts = generative.quality(result.tokens[:2], tokenizer, judges.load(str(judge)))
        assert (old["ppl"], old["entropy"]) == pytest.approx((expected.ppl, expected.entropy), rel=1e-6)
        assert [json.loads(line)["text"] for line in (out / "texts.jsonl").read_text().splitlines()] == texts
        told = (out / "quality.md").read_text().splitlines()
        assert told[2].startswith("| old | - | - | - | - | ")
        assert (
            told[-1]
            == f"2 texts a set. The texts of old are those of {file}. There is no held-out text to compare with."
        )
        assert not (out / "quality.png").exists(), "there is no curve"

        # Beside a text, which is cut by their tokenizer into rows of their length; fewer of them are said.
        text = tmp_path / "text.txt"
        text.write_text("The town lies on the river's bank, and is old.\n\n" * 20, encoding="utf-8")
        capsys.readouterr()
        door(*flags, "--num=4", f"--heldout={text}")
        assert f"{file} has 3 texts, so its figures are of these, not of 4." in capsys.readouterr().out
        real, old = json.loads((out / "quality.json").read_text())[1:]
        assert (real["case"]["model"], real["case"]["length"]) == ("held-out text", 24)
        assert real["judged"] > 0
        known = (out / "quality.json").read_bytes()
        door(*flags, "--num=4", f"--heldout={text}")
        assert (out / "quality.json").read_bytes() == known
    # And beside a network that is sampled.
    door(
        *flags, f"--models=duo={trained}", "--num=3", "--steps=1", "--noise_removal=greedy", "--seeds=0", "--length=24"
    )
    names = [line.split(" | ")[0] for line in (out / "quality.md").read_text().splitlines()[2:5]]
    assert names == ["| held-out text", "| old", "| duo"]
    rows = {row["case"]["model"]: row for row in json.loads((out / "quality.json").read_text())[3:]}
    assert rows["old"]["ppl"] == pytest.approx(rows["duo"]["ppl"], rel=1e-6), "the file holds the very texts"
    assert (out / "quality.png").exists()


def test_files_of_texts_are_told_apart(samples, tmp_path):
    file, result = samples
    other = file.with_name("other.jsonl")
    other.write_text("".join(reversed(file.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    args = types.SimpleNamespace(texts={"a": str(file), "b": str(other)}, num=3)
    (about_a, a), (about_b, b) = judged_texts.already_written(args, {}).values()
    np.testing.assert_array_equal(a()[0], result.tokens)
    np.testing.assert_array_equal(b()[0], result.tokens[::-1])
    # Another content under the same name is another set of texts.
    file.write_bytes(other.read_bytes())
    assert judged_texts.already_written(args, {})["a"][0] != about_a
    assert about_a["checkpoint"] != about_b["checkpoint"]


def test_a_text_beside_texts_alone_is_as_long_as_they_are_or_as_is_asked(samples, tmp_path):
    file, _ = samples
    (tmp_path / "text.txt").write_text("The town lies on the river's bank, and is old.\n\n" * 20, encoding="utf-8")
    for asked, length in ((None, 24), (16, 16)):
        args = types.SimpleNamespace(
            heldout=str(tmp_path / "text.txt"), field="text", num=2, length=asked, texts={"old": str(file)}
        )
        about, read = judged_texts.reference(args, {}, judged_texts.already_written(args, {}))
        assert about["length"] == length
        assert read()[0].shape == (2, length)


def test_a_tokenizer_must_make_every_text_of_its_tokens(samples):
    file, _ = samples
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[-1]["text"] += "!"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(judged_texts.written(file, {}, 2)[0]) == 2
    with pytest.raises(UserError, match="holds tokens that no tokenizer at hand makes its texts of"):
        judged_texts.written(file, {}, 3)


def test_a_network_is_of_the_step_that_it_tells(trained, monkeypatch):
    """Of a run that goes on, which may have a newer checkpoint by the time that it is read."""
    asked = []
    monkeypatch.setattr(checkpoint, "read", lambda path, read=checkpoint.read: asked.append(path) or read(path))
    assert judged_texts.opened(str(trained)).checkpoint == f"{trained} at step 20"
    assert asked == [trained / "checkpoints" / "20"]


def test_texts_away_from_their_folder_need_their_network(samples, trained, judge, tmp_path, door):
    file, out = samples[0].rename(tmp_path / "samples.jsonl"), tmp_path / "quality"
    flags = [
        f"--texts={file}",
        f"--judge={judge}",
        f"--out={out}",
        "--num=2",
        "--steps=1",
        "--seeds=0",
        "--heldout=none",
    ]
    with pytest.raises(UserError, match="holds tokens that no tokenizer at hand makes its texts of"):
        door(*flags)
    door(*flags, f"--models=duo={trained}", "--noise_removal=none")
    assert [row["case"]["model"] for row in json.loads((out / "quality.json").read_text())] == ["samples.jsonl", "duo"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}', "there is no 'tokens'"),
        ('{"tokens": [1]}', "there is no 'text'"),
        ('{"text": "a", "tokens": [1]}\n{"text": "a", "tokens": [1, 2]}', "inhomogeneous"),
        ('{"text": "a", "tokens": 5}', "tokens is no list"),
        ('{"text": "a", "tokens": [99999999999]}', ""),
        ('["a"]', ""),
        ("text", "Expecting value"),
        ("", "it is empty"),
    ],
)
def test_other_files_are_no_texts(tmp_path, content, reason):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"other\.jsonl is no samples\.jsonl as mode=sample writes it, .*{reason}"):
        judged_texts.written(path, {}, 5)
