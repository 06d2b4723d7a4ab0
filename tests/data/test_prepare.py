import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_text import data_config, make_texts

from duo_jax import config as config_lib
from duo_jax import files
from duo_jax.data import prepare, shards, sources
from duo_jax.errors import UserError


def copy(data, **values):
    config = data.copy_and_resolve_references()
    config.update(values)
    return config


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def run_python(program, *, data, **kwargs):
    """Runs a program with `data` defined, in a fresh process."""
    head = f"from ml_collections import ConfigDict\ndata = ConfigDict({data.to_dict()!r})\n"
    return subprocess.Popen([sys.executable, "-c", head + program], env={**os.environ, "PYTHONPATH": "."}, **kwargs)


def test_what_is_written(folder, data, texts):
    metadata = shards.read_metadata(folder)
    assert metadata["source"]["name"] == "text"
    assert metadata["tokenizer"] == {
        "name": "bpe", "vocab_size": 300, "bos_id": 0, "eos_id": 1, "pad_id": 299, "mask_id": 299,
    }  # fmt: skip
    assert sum(split["documents"] for split in metadata["splits"].values()) == len(texts)
    assert sum(split["characters"] for split in metadata["splits"].values()) == sum(map(len, texts))
    store = shards.TokenStore(folder, "train")
    assert metadata["dtype"] == "<u2"
    assert store.read(0, store.tokens).dtype == np.uint16
    assert store.read(store.tokens - 1, 1)[0] == 1
    assert int(store.read(0, store.tokens).max()) < 300
    assert not [path for path in Path(data.dir).iterdir() if path.name.startswith(".")]
    assert shards.verify(folder) == metadata


def test_is_done_once(folder, data, monkeypatch):
    monkeypatch.setattr(prepare, "_make", None)
    assert prepare.prepare(data) == folder


def test_same_text_same_bytes(folder, data, tmp_path):
    again = prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    assert snapshot(again) == snapshot(folder)


def test_small_batches_change_nothing(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "_BATCH_CHARACTERS", 1000)
    assert snapshot(prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)) == snapshot(folder)


def test_the_bpe_never_sees_the_heldout_split(data, tmp_path, monkeypatch, folder):
    seen = []
    monkeypatch.setattr(
        prepare.tokenizers, "train_bpe", lambda texts, size: seen.extend(texts) or prepare.load_tokenizer(folder)
    )
    prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    assert seen
    assert {sources.split_by_hash(text) for text in seen} == {"train"}


def test_large_vocabularies_take_four_bytes():
    assert shards.token_dtype(65536) == np.uint16
    assert shards.token_dtype(65537) == np.uint32


def test_folder_names(tmp_path):
    def name(**values):
        return prepare.shards_folder(data_config(tmp_path, **values)).name

    assert name(source="wiki", bpe_size=512) == "wiki-bpe512"
    assert name(source="wiki", tokenizer="gpt2") == "wiki-gpt2"
    assert name(source="lm1b", tokenizer="bert-base-uncased") == "lm1b-bert-base-uncased"
    assert name(path="a") != name(path="b")
    assert name(path="a") == name(path="./x/../a")
    assert len({name(path="a"), name(path="a", field="body"), name(path="b", field="body")}) == 3
    assert prepare.shards_folder(data_config(tmp_path)).parent == tmp_path / "shards"


def test_another_field(data, texts, tmp_path):
    rows = [{"text": "wrong", "body": text} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = copy(data, dir=str(tmp_path / "shards"), path=str(path), field="body")
    folder = prepare.prepare(config, verbose=False)
    store = shards.TokenStore(folder, "heldout")
    found = [prepare.load_tokenizer(folder).decode(store.document(i)) for i in range(store.documents)]
    assert found == [text for text in texts if sources.split_by_hash(text) == "heldout"]
    assert prepare.prepare(config) == folder
    with pytest.raises(UserError, match=r"no text in the field `story` of line 1 .*; set config\.data\.field"):
        prepare.prepare(copy(config, field="story"), verbose=False)


def test_a_config_of_before_there_was_a_field(folder, data):
    old = copy(data)
    del old.field
    assert prepare.prepare(old) == folder


def test_a_field_of_no_text():
    config = config_lib.default()
    config.data.field = "body"
    with pytest.raises(UserError, match=r"config\.data\.field is set, but config\.data\.path is empty"):
        config_lib.check(config)
    config.data.path = "text.jsonl"
    config_lib.check(config)


def test_a_vocabulary_by_its_path(data, tmp_path):
    vocab = tmp_path / "vocab.txt"
    letters = {letter for text in make_texts(400) for letter in text.lower()} - {" "}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(letters | {f"##{letter}" for letter in letters})]
    vocab.write_text("\n".join(words) + "\n", encoding="utf-8")
    config = copy(data, dir=str(tmp_path), tokenizer=str(vocab))
    folder = prepare.prepare(config, verbose=False)
    assert folder.parent == tmp_path
    assert prepare.prepare(config, verbose=False) == folder
    assert shards.read_metadata(folder)["tokenizer"]["vocab_size"] == len(words)
    assert prepare.load_tokenizer(folder).same_as(prepare.tokenizers.load(vocab))


@pytest.fixture
def borrowing(folder, tmp_path):
    """A block for another text, cut by a copy of the tokenizer of `folder` that lies in a run's workdir."""
    shutil.copytree(folder / "tokenizer", tmp_path / "a" / "tokenizer")
    (tmp_path / "other.txt").write_text("\n\n".join(make_texts(300, seed=1)))
    return data_config(tmp_path, path=str(tmp_path / "other.txt"), tokenizer=str(tmp_path / "a" / "tokenizer"))


class TestATokenizerOfAnotherRun:
    def test_cuts_the_text(self, folder, borrowing):
        made = prepare.prepare(borrowing, verbose=False)
        assert prepare.load_tokenizer(made).same_as(prepare.load_tokenizer(folder))
        text = (Path(borrowing.dir).parent / "other.txt").read_text().split("\n\n")[0]
        assert prepare.load_tokenizer(made).decode(shards.TokenStore(made, "train").document(0)) == text
        assert prepare.prepare(borrowing) == made

    def test_counts_by_its_content(self, borrowing, tmp_path, texts):
        made = prepare.shards_folder(borrowing)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert prepare.shards_folder(copy(borrowing, tokenizer=str(tmp_path / "b" / "tokenizer"))) == made
        assert prepare.shards_folder(copy(borrowing, tokenizer=str(tmp_path / "b"))) == made
        prepare.tokenizers.train_bpe(texts[:100], 300).save(tmp_path / "a" / "tokenizer")
        assert prepare.shards_folder(borrowing) != made

    def test_may_go_when_the_shards_are_made(self, borrowing, tmp_path):
        made = prepare.prepare(borrowing, verbose=False)
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        second = copy(borrowing, tokenizer=str(tmp_path / "b" / "tokenizer"))
        assert prepare.prepare(second) == made
        shutil.rmtree(tmp_path / "a")
        shutil.rmtree(tmp_path / "b")
        assert prepare.prepare(borrowing) == prepare.prepare(second) == made
        assert shards.verify(made)
        for other in ({"tokenizer": str(tmp_path / "c")}, {"field": "body"}, {"dir": str(tmp_path / "nowhere")}):
            with pytest.raises(UserError, match="There is no tokenizer"):
                prepare.prepare(copy(borrowing, **other))

    def test_two_that_lay_at_one_path(self, borrowing, tmp_path, texts):
        first = prepare.prepare(borrowing, verbose=False)
        prepare.tokenizers.train_bpe(texts[:100], 300).save(tmp_path / "a" / "tokenizer")
        second = prepare.prepare(borrowing, verbose=False)
        shutil.rmtree(tmp_path / "a")
        with pytest.raises(
            UserError, match=r"is gone, and .* and .* were made with different tokenizers.*; copy the right"
        ) as told:
            prepare.prepare(borrowing)
        assert str(first) in str(told.value)
        assert str(second) in str(told.value)
        shutil.copytree(first / "tokenizer", tmp_path / "a" / "tokenizer")
        assert prepare.prepare(borrowing) == first

    def test_shards_that_are_only_to_be_read(self, borrowing, tmp_path, monkeypatch):
        def fail(*_):
            raise PermissionError(errno.EACCES, "no")

        made = prepare.prepare(borrowing, verbose=False)
        monkeypatch.setattr(prepare, "_note_path", fail)
        assert prepare.prepare(borrowing) == made

    def test_a_vocabulary_may_go_too(self, data, tmp_path):
        vocab = tmp_path / "vocab.txt"
        vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat"]) + "\n")
        config = copy(data, dir=str(tmp_path / "shards"), tokenizer=str(vocab))
        made = prepare.prepare(config, verbose=False)
        vocab.unlink()
        assert prepare.prepare(config) == made


def test_a_missing_library_is_told_before_a_vocabulary_is_fetched(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    monkeypatch.setattr(prepare.tokenizers, "load", lambda name: pytest.fail("nothing is fetched in vain"))
    with pytest.raises(UserError, match=r"lm1b is fetched with the library datasets; run `pip install -e \.\[hub\]`"):
        prepare.prepare(data_config(tmp_path, source="lm1b", tokenizer="bert-base-uncased"))


def test_home_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("\n\n".join(make_texts(200)))
    folder = prepare.prepare(data_config(tmp_path, path="~/a.txt", dir="~/shards", bpe_size=260), verbose=False)
    assert folder.parent == tmp_path / "shards"
    assert prepare.prepare(data_config(tmp_path, path=str(tmp_path / "a.txt"), bpe_size=260), verbose=False) == folder


def test_a_text_file_without_text(tmp_path):
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(UserError, match="holds only white space"):
        prepare.prepare(data_config(tmp_path, path=str(tmp_path / "a.txt")), verbose=False)


def test_progress_and_summary(data, tmp_path, capfd):
    folder = prepare.prepare(copy(data, dir=str(tmp_path)))
    shown = capfd.readouterr().err
    # A log file has no cursor to send back: no state of a bar overwrites the one before.
    assert "\r" not in shown
    assert shown.count("400/400") >= 2, "the BPE's reading and the tokenizing"
    assert shown.index("reading for the BPE: 100%") < shown.index("learning a BPE of 300 ids from ")
    assert shown.index("learning a BPE of 300 ids") < shown.index("tokenizing: ")
    assert prepare.summary(folder) in shown
    assert "tokenizer bpe (K = 300)" in shown
    prepare.prepare(copy(data, dir=str(tmp_path / "quiet")), verbose=False)
    assert capfd.readouterr().err == ""


def test_files_of_a_folder_are_counted(data, tmp_path, capfd):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.jsonl").write_bytes(Path(data.path).read_bytes())
    (text / "a.pdf").write_text("")
    config = copy(data, path=str(text), dir=str(tmp_path / "shards"))
    prepare.prepare(config)
    assert f"reading 1 file in {text}; 1 file of other kinds skipped (.pdf)\n" in capfd.readouterr().err
    prepare.prepare(copy(config, dir=str(tmp_path / "quiet")), verbose=False)
    assert capfd.readouterr().err == ""


def test_changed_text_is_noticed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(make_texts(200)))
    data = data_config(tmp_path, path=str(path), bpe_size=260)
    folder = prepare.prepare(data, verbose=False)
    path.write_text("\n\n".join(make_texts(201)))
    with pytest.raises(UserError, match="has changed since"):
        prepare.prepare(data)
    path.unlink()  # the shards stand on their own
    assert prepare.prepare(data) == folder


def test_folder_of_another_tokenizer(folder, data, tmp_path):
    other = copy(data, dir=str(tmp_path), bpe_size=310)
    target = prepare.shards_folder(other)
    target.mkdir()
    for name, content in snapshot(folder).items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer bpe \(300 ids\), not from text with bpe \(310 ids\)"):
        prepare.prepare(other)


@pytest.mark.parametrize("damage", ["short", "gone", "metadata", "version", "bits"])
def test_damaged_shards(folder, data, tmp_path, damage):
    folder = prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    tokens, metadata = folder / "train-00000.tokens", folder / "metadata.json"
    content = tokens.read_bytes()
    if damage == "short":
        tokens.write_bytes(content[:-2])
    elif damage == "gone":
        tokens.unlink()
    elif damage == "metadata":
        metadata.write_text(metadata.read_text()[:-20])
    elif damage == "version":
        metadata.write_text(metadata.read_text().replace('"format_version": 1', '"format_version": 99'))
    else:
        tokens.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
        assert prepare.prepare(copy(data, dir=str(tmp_path))) == folder  # only the hash can tell
    with pytest.raises(UserError, match="remove the folder and prepare"):
        shards.verify(folder)


def test_no_shards(tmp_path):
    with pytest.raises(UserError, match=r"python -m duo_jax\.data\.prepare"):
        shards.TokenStore(tmp_path, "train")


@pytest.mark.parametrize("tokenizer", ["bpe", "gpt2"])
def test_too_few_documents(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare.tokenizers, "train_bpe", lambda *_: pytest.fail("no BPE is learnt in vain"))
    monkeypatch.setattr(prepare.tokenizers.Tokenizer, "encode_batch", lambda *_: pytest.fail("nothing is tokenized"))
    (tmp_path / "a.txt").write_text(" ".join(make_texts(50)))
    data = data_config(tmp_path, path=str(tmp_path / "a.txt"), tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"holds 1 document, too few .* heldout split is empty\); put blank lines"):
        prepare.prepare(data, verbose=False)
    assert os.listdir(data.dir) == []


def test_a_copy_without_a_split(tmp_path):
    for split, text in (("train", "one ."), ("test", "")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(UserError, match="heldout split is empty"):
        prepare.prepare(data_config(tmp_path, source="lm1b", path=str(tmp_path), tokenizer="gpt2"), verbose=False)


def test_folder_that_cannot_be_made(data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"is not writable .*set config\.data\.dir"):
        prepare.prepare(copy(data, dir=str(tmp_path / "file" / "deeper")), verbose=False)


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_disk_errors(data, tmp_path, monkeypatch, code, message):
    def fail(file):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shards, "sync_and_close", fail)
    with pytest.raises(UserError, match=message):
        prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    assert os.listdir(tmp_path) == []


KILLED_AT = {
    "writing": "shards.ShardWriter.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "between shards": "shards.ShardWriter.close = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
    "before the rename": "Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_kill(folder, data, tmp_path, moment):
    data = copy(data, dir=str(tmp_path))
    program = "import os, signal\nfrom pathlib import Path\nfrom duo_jax.data import prepare, shards\n"
    process = run_python(f"{program}{KILLED_AT[moment]}\nprepare.prepare(data, verbose=False)", data=data)
    assert process.wait(60) == -signal.SIGKILL
    assert os.listdir(tmp_path)  # it left something,
    assert not prepare.shards_folder(data).exists()  # but no shards,
    again = prepare.prepare(data, verbose=False)
    assert os.listdir(tmp_path) == [again.name]  # and the next call cleans up.
    assert snapshot(again) == snapshot(folder)


def test_leftovers_of_other_preparations(data, tmp_path):
    dead, alive = tmp_path / ".wiki-bpe999.partial", tmp_path / ".wiki-bpe888.partial"
    dead.mkdir()
    alive.mkdir()
    lock = files.acquire(tmp_path / ".wiki-bpe888.lock", block=False)
    folder = prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    lock.close()
    assert sorted(os.listdir(tmp_path)) == [".wiki-bpe888.lock", alive.name, folder.name]


def test_what_may_be_at_work_on_a_disk_without_locks_stays(data, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", fails)
    other = tmp_path / ".wiki-bpe999.partial"
    other.mkdir()
    folder = prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    assert sorted(os.listdir(tmp_path)) == [other.name, folder.name]


def test_interrupt_leaves_nothing(data, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.ShardWriter, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(copy(data, dir=str(tmp_path)), verbose=False)
    assert os.listdir(tmp_path) == []


def test_two_processes_at_once(folder, data, tmp_path):
    data = copy(data, dir=str(tmp_path))
    program = """
import time
from duo_jax.data import prepare
make = prepare._make
def slow(*args):
    print("making", flush=True)
    time.sleep(0.5)
    make(*args)
prepare._make = slow
prepare.prepare(data, verbose=False)
"""
    processes = [run_python(program, data=data, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert b"".join(outputs).count(b"making") == 1
    assert os.listdir(tmp_path) == [folder.name]
    assert snapshot(tmp_path / folder.name) == snapshot(folder)


def test_wiki_is_quick(tmp_path):
    start = time.monotonic()
    folder = prepare.prepare(data_config(tmp_path, source="wiki", bpe_size=512), verbose=False)
    assert time.monotonic() - start < 30
    assert folder.name == "wiki-bpe512"
    metadata = json.loads((folder / "metadata.json").read_text())
    assert {name: split["documents"] for name, split in metadata["splits"].items()} == {"train": 9528, "heldout": 505}


def test_command_line(data, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("from duo_jax.config import default as get_config\n")
    command = [sys.executable, "-m", "duo_jax.data.prepare", f"--config={config}", "--config.data.source=text"]
    command += [f"--config.data.path={data.path}", "--config.data.tokenizer=bpe", "--config.data.bpe_size=300"]
    command += [f"--config.data.dir={tmp_path / 'out'}"]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "tokenizer bpe (K = 300)" in first.stderr
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "all hashes are right" in second.stderr
    wrong = subprocess.run([*command, "--config.data.source=web"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "choose one of wiki, text" in wrong.stderr
    assert "Traceback" not in wrong.stderr
