import numpy as np
import pytest

from duo_jax.data import packing, prepare, shards
from duo_jax.errors import UserError


@pytest.mark.parametrize("length", [16, 9])
def test_packing_is_the_reference(golden, length):
    k = golden("k_data")
    batch = packing.pack(k["docs_flat"], length, bos_id=0, eos_id=1)
    np.testing.assert_array_equal(batch["tokens"], k[f"packed_{length}"])
    np.testing.assert_array_equal(batch["mask"], k[f"mask_{length}"])
    assert batch["tokens"].dtype == np.int32
    assert batch["mask"].dtype == np.float32


def test_text_shorter_than_a_row(golden):
    k = golden("k_data")
    assert len(packing.pack(k["docs_flat"][:10], 16, bos_id=0, eos_id=1)["tokens"]) == k["packed_short_n"] == 0


def test_padding():
    documents = [np.array([5, 6]), np.array([], int), np.arange(5, 9), np.arange(5, 50)]
    batch = packing.pad(documents, 6, bos_id=0, eos_id=1, pad_id=9)
    np.testing.assert_array_equal(
        batch["tokens"], [[0, 5, 6, 1, 9, 9], [0, 1, 9, 9, 9, 9], [0, 5, 6, 7, 8, 1], [0, 5, 6, 7, 8, 1]]
    )
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1] * 6, [1] * 6])


def test_pad_id_that_is_a_token_of_the_text_keeps_its_mask():
    batch = packing.pad([np.array([9, 9])], 6, bos_id=0, eos_id=1, pad_id=9)
    np.testing.assert_array_equal(batch["mask"], [[1, 1, 1, 1, 0, 0]])


@pytest.fixture
def many_shards(data, tmp_path, monkeypatch):
    """The small text in shards of about 300 tokens."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 300)
    with data.copy_and_resolve_references().unlocked() as config:
        config.dir = str(tmp_path)
    return prepare.prepare(config, verbose=False)


@pytest.mark.parametrize("length", [3, 17, 700])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rows_over_many_shards(many_shards, folder, length, split):
    store, single = shards.TokenStore(many_shards, split), shards.TokenStore(folder, split)
    assert len(store.metadata["splits"][split]["shards"]) > 1
    assert len(single.metadata["splits"][split]["shards"]) == 1
    assert shards.verify(many_shards) == store.metadata  # the hashes of every shard
    stream = single.read(0, single.tokens)
    np.testing.assert_array_equal(store.read(0, store.tokens), stream)

    rows = packing.open_rows(store, length, "packed")
    special = {key: store.metadata["tokenizer"][key] for key in ("bos_id", "eos_id")}
    expected = packing.pack(stream, length, **special)
    assert len(rows) == len(expected["tokens"])
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(rows.take(order)["tokens"], expected["tokens"][order])

    rows, others = packing.open_rows(store, length, "padded"), packing.open_rows(single, length, "padded")
    assert len(rows) == store.documents
    for key in ("tokens", "mask"):
        np.testing.assert_array_equal(rows.take(range(len(rows)))[key], others.take(range(len(rows)))[key])


def test_reading_stops_at_the_end(folder):
    store = shards.TokenStore(folder, "heldout")
    assert len(store.read(store.tokens - 3, 10)) == 3
    assert len(store.read(store.tokens, 10)) == 0


def test_documents_come_back_as_text(folder, texts):
    from duo_jax.data import sources

    tokenizer = prepare.load_tokenizer(folder)
    for split in sources.SPLITS:
        expected = [text for text in texts if sources.split_by_hash(text) == split]
        store = shards.TokenStore(folder, split)
        assert [tokenizer.decode(store.document(i)) for i in range(store.documents)] == expected
        assert tokenizer.decode(store.read(0, store.tokens)) == "\n\n".join(expected)


def test_settings_out_of_range(folder):
    store = shards.TokenStore(folder, "train")
    with pytest.raises(UserError, match="use a length of 3 or more"):
        packing.open_rows(store, 2, "packed")
    with pytest.raises(UserError, match="choose one of packed, padded"):
        packing.open_rows(store, 16, "wrapped")


def test_any_shard_that_changes_changes_the_hash_of_all():
    entry = {"tokens_sha256": "a", "ends_sha256": "b"}
    splits = {split: {"shards": [dict(entry), dict(entry)]} for split in ("train", "heldout")}
    hashes = {shards.content_hash(splits)}
    for split in splits:
        for place in range(2):
            for key in entry:
                splits[split]["shards"][place][key] = "c"
                hashes.add(shards.content_hash(splits))
                splits[split]["shards"][place][key] = entry[key]
    assert len(hashes) == 1 + 2 * 2 * 2


@pytest.mark.parametrize("ended", [True, False])
def test_documents_in_memory_come_back_without_their_end(ended):
    documents = [np.array([5, 6, 1]), np.array([1]), np.array([7, 1])]
    texts = documents if ended else [document[:-1] for document in documents]
    store = shards.MemoryStore("some", texts, {}, ended=ended)
    assert [store.document(i).tolist() for i in range(3)] == [[5, 6], [], [7]]
    assert store.read(0, 10).tolist() == np.concatenate(texts).tolist()


@pytest.mark.parametrize("change", [b"", b"xx"])
def test_a_shard_of_another_size_is_noticed(many_shards, change):
    path = sorted(many_shards.glob("train-*.tokens"))[-1]
    path.write_bytes(path.read_bytes() + change if change else path.read_bytes()[:-2])
    with pytest.raises(UserError, match="are damaged"):
        shards.read_metadata(many_shards)
