"""What is judged: networks from any file, held-out text, and texts that are there already."""

import json
import shutil
import types

import numpy as np
import pytest

from duo_jax import api
from duo_jax.errors import UserError
from duo_jax.evaluation import generative, judged_texts, judges
from duo_jax.training import checkpoint


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
        text_set = judged_texts.reference(args, {"x": model}, {})
        assert (text_set.about["checkpoint"], text_set.about["length"]) == ("x at step 20", None)
        tokens, found = text_set.load()
        assert found.same_as(tokenizer)
        firsts.append(tokenizer.decode(tokens[0]))
    assert firsts[0] == "A town."
    assert firsts[1].startswith("A town.\n\nA river")


def test_the_rows_of_a_text_may_call_it_anything(trained, tmp_path, door):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        '{"text": "A road.", "body": "A town."}\n{"body": "A river and its long banks."}\n', encoding="utf-8"
    )
    model = {"x": judged_texts.Model(api.load(trained), "x at step 20", None)}
    with pytest.raises(UserError, match=r"field `text` of line 2 of .*; set --field to the field that holds the text"):
        door(f"--models=x={trained}", f"--heldout={file}", f"--out={tmp_path}")
    args = types.SimpleNamespace(heldout=str(file), field="body", num=1, length=16)
    text_set = judged_texts.reference(args, model, {})
    assert text_set.about["field"] == "body"
    tokens, tokenizer = text_set.load()
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
        assert old["texts"] == old["case"]["num"] == 3
        assert "4 texts a set. Of old there are only 3. The texts" in (out / "quality.md").read_text()
        known = (out / "quality.json").read_bytes()
        door(*flags, "--num=4", f"--heldout={text}")
        assert (out / "quality.json").read_bytes() == known
    # And beside a network that is sampled.
    door(
        *flags, f"--models=duo={trained}", "--num=3", "--steps=1", "--noise_removal=greedy", "--seeds=0", "--length=24"
    )
    names = [line.split(" | ")[0] for line in (out / "quality.md").read_text().splitlines()[2:5]]
    assert names == ["| held-out text", "| old", "| duo"]
    rows = {row["case"]["model"]: row for row in json.loads((out / "quality.json").read_text())[2:]}
    assert rows["old"]["ppl"] == pytest.approx(rows["duo"]["ppl"], rel=1e-6), "the file holds the very texts"
    assert (out / "quality.png").exists()


def test_files_of_texts_are_told_apart(samples, tmp_path):
    file, result = samples
    other = file.with_name("other.jsonl")
    other.write_text("".join(reversed(file.read_text(encoding="utf-8").splitlines(keepends=True))), encoding="utf-8")
    args = types.SimpleNamespace(texts={"a": str(file), "b": str(other)}, num=3)
    a, b = judged_texts.already_written(args, {}).values()
    np.testing.assert_array_equal(a.load()[0], result.tokens)
    np.testing.assert_array_equal(b.load()[0], result.tokens[::-1])
    # Another content under the same name is another set of texts.
    file.write_bytes(other.read_bytes())
    assert judged_texts.already_written(args, {})["a"].about != a.about
    assert a.about["checkpoint"] != b.about["checkpoint"]


def test_a_text_beside_texts_alone_is_as_long_as_they_are_or_as_is_asked(samples, tmp_path):
    file, _ = samples
    (tmp_path / "text.txt").write_text("The town lies on the river's bank, and is old.\n\n" * 20, encoding="utf-8")
    for asked, length in ((None, 24), (16, 16)):
        args = types.SimpleNamespace(
            heldout=str(tmp_path / "text.txt"), field="text", num=2, length=asked, texts={"old": str(file)}
        )
        text_set = judged_texts.reference(args, {}, judged_texts.already_written(args, {}))
        assert text_set.about["length"] == length
        assert text_set.load()[0].shape == (2, length)


def test_a_tokenizer_must_make_every_text_of_its_tokens(samples):
    file, _ = samples
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows[-1]["text"] += "!"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert len(judged_texts.written(file, {}, 2)[0]) == 2
    with pytest.raises(UserError, match="no tokenizer at hand decodes the tokens of"):
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
    with pytest.raises(UserError, match="no tokenizer at hand decodes the tokens of"):
        door(*flags)
    door(*flags, f"--models=duo={trained}", "--noise_removal=none")
    assert [row["case"]["model"] for row in json.loads((out / "quality.json").read_text())] == ["samples.jsonl", "duo"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}', "there is no 'tokens'"),
        ('{"tokens": [1]}', "there is no 'text'"),
        ('{"text": "a", "tokens": [1]}\n{"text": "a", "tokens": [1, 2]}', "inhomogeneous"),
        ('{"text": "a", "tokens": 5}', "tokens is not a list"),
        ('{"text": "a", "tokens": [99999999999]}', ""),
        ('["a"]', ""),
        ("text", "Expecting value"),
        ("", "it is empty"),
    ],
)
def test_other_files_are_no_texts(tmp_path, content, reason):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=rf"other\.jsonl is not a samples\.jsonl as mode=sample writes it, .*{reason}"):
        judged_texts.written(path, {}, 5)
