"""Whole text sets in memory: nothing is held back, and documents are joined as asked."""

import json

import numpy as np
import pyarrow
import pytest
from ml_collections import ConfigDict
from pyarrow import parquet

from duo_jax.data import pipeline, prepare, text_sets
from duo_jax.errors import UserError


def settings(path, **values):
    return ConfigDict({"path": str(path), "field": "text", "detokenizer": "none", "document_ends": True} | values)


def write(path, texts, field):
    if path.suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pyarrow.table({field: texts}), path)
    else:
        path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return prepare.load_tokenizer(folder)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_every_document_counts(suffix, tokenizer, texts, tmp_path):
    path = tmp_path / f"set{suffix}"
    write(path, texts, "sentence")
    store = text_sets.read(settings(path, field="sentence"), tokenizer, verbose=False)
    assert store.documents == len(texts)
    assert [tokenizer.decode(store.document(i)) for i in (0, 7, 399)] == [texts[i] for i in (0, 7, 399)]
    stream = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert store.tokens == len(stream)
    batches = pipeline.heldout_batches(store, length=16, batch_size=8)
    rows = np.concatenate([batch["tokens"][batch["mask"].any(axis=1)] for batch in batches])
    assert (rows[:, 0] == tokenizer.bos_id).all()
    assert (rows[:, -1] == tokenizer.eos_id).all()
    assert rows[:, 1:-1].ravel().tolist() == stream[: len(stream) // 14 * 14]


def test_without_ends_documents_run_on_as_they_stand(tokenizer, tmp_path):
    write(tmp_path / "set.jsonl", [" = One = \n", "", " two 's \n"], "text")
    store = text_sets.read(
        settings(tmp_path / "set.jsonl", document_ends=False, detokenizer="wikitext"), tokenizer, verbose=False
    )
    ids = store.read(0, store.tokens)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == " = One =\n two's\n"
    assert tokenizer.decode(store.document(1)) == " two's\n"
    padded = next(iter(pipeline.heldout_batches(store, length=16, batch_size=2, packing="padded")))
    assert tokenizer.decode(padded["tokens"][1][padded["mask"][1] > 0]) == " two's\n"


def test_a_text_file_without_ends_keeps_its_lines(tokenizer, tmp_path):
    (tmp_path / "wiki.txt").write_text(" = One = \n \n Two . \n Three . \n", encoding="utf-8")
    store = text_sets.read(settings(tmp_path, document_ends=False), tokenizer, verbose=False)
    assert tokenizer.decode(store.read(0, store.tokens)) == " = One = \n Two . \n Three . \n"


def test_files_of_a_folder_are_counted(tokenizer, tmp_path, capfd):
    write(tmp_path / "a.txt", ["a cat"], "")
    write(tmp_path / ".b.txt", ["stale"], "")
    assert text_sets.read(settings(tmp_path), tokenizer).documents == 1
    assert f"reading 1 file in {tmp_path}\n" in capfd.readouterr().err
    text_sets.read(settings(tmp_path), tokenizer, verbose=False)
    assert capfd.readouterr().err == ""


def test_home_is_known(tokenizer, tmp_path, monkeypatch):
    write(tmp_path / "set.txt", ["a cat"], "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert text_sets.read(settings("~/set.txt"), tokenizer, verbose=False).documents == 1


def test_mistakes(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"There is no text at .*nowhere; set config\.eval\.path"):
        text_sets.read(settings(tmp_path / "nowhere"), tokenizer)
    write(tmp_path / "set.jsonl", [" ", ""], "text")
    with pytest.raises(UserError, match=r"holds no text; set config\.eval\.path"):
        text_sets.read(settings(tmp_path), tokenizer)
    with pytest.raises(
        UserError, match=r"`article` of line 1 of .*, which is an object with text; set config\.eval\.field"
    ):
        text_sets.read(settings(tmp_path, field="article"), tokenizer)
    with pytest.raises(UserError, match="detokenizer is 'wiki'"):
        text_sets.read(settings(tmp_path, detokenizer="wiki"), tokenizer)
    write(tmp_path / "set.jsonl", ["a cat"], "text")
    store = text_sets.read(settings(tmp_path), tokenizer)
    with pytest.raises(UserError, match="too few for one row of length 64"):
        pipeline.heldout_batches(store, length=64, batch_size=8)
