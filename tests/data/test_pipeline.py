import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from small_text import data_config, process_and_backends

from duo_jax.data import packing, pipeline, prepare, shards
from duo_jax.errors import UserError

LENGTH, BATCH = 32, 8


def train(folder, **values):
    return pipeline.train_iterator(folder, **{"length": LENGTH, "batch_size": BATCH, "seed": 0} | values)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_same(one, two):
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() == {"tokens", "mask"}
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope="module")
def all_rows(folder):
    store = shards.TokenStore(folder, "train")
    rows = packing.open_rows(store, LENGTH, "packed")
    return [row.tobytes() for row in rows.take(range(len(rows)))["tokens"]]


@pytest.fixture(scope="module")
def epoch(all_rows):
    """Batches in an epoch."""
    assert len(all_rows) % BATCH  # so that the tests see a remainder dropped
    return len(all_rows) // BATCH


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch["tokens"]]


def test_batches(folder):
    batch = next(train(folder))
    assert batch["tokens"].shape == batch["mask"].shape == (BATCH, LENGTH)
    assert (batch["tokens"].dtype, batch["mask"].dtype) == (np.int32, np.float32)
    assert (batch["tokens"][:, 0] == 0).all()
    assert (batch["tokens"][:, -1] == 1).all()
    assert (batch["mask"] == 1).all()


def test_padded_batches(folder):
    batch = next(train(folder, packing="padded", length=64))
    lengths = batch["mask"].sum(1).astype(int)
    assert len(set(lengths)) > 1
    for row, mask, length in zip(batch["tokens"], batch["mask"], lengths, strict=True):
        assert (mask[:length] == 1).all()
        assert row[length - 1] == 1
        assert (row[length:] == 299).all()


def test_every_epoch_is_another_permutation(folder, all_rows, epoch):
    iterator = train(folder)
    epochs = [rows_of(take(iterator, epoch)) for _ in range(3)]
    for rows in epochs:
        assert len(set(rows)) == len(rows) == epoch * BATCH
        assert set(rows) <= set(all_rows)
        assert rows != all_rows[: len(rows)]
    assert len({tuple(rows) for rows in epochs}) == 3
    assert set().union(*epochs) == set(all_rows)  # each epoch drops other rows


def test_seeds(folder, epoch):
    assert_same(take(train(folder, seed=5), 3), take(train(folder, seed=5), 3))
    one, two = train(folder, seed=5), train(folder, seed=6)
    first, second = rows_of(take(one, 2 * epoch)), rows_of(take(two, epoch))
    assert second not in (first[: len(second)], first[len(second) :])  # nor is a seed another's next epoch


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(folder, count):
    whole = take(train(folder), 5)
    parts = [take(train(folder, process_index=i, process_count=count), 5) for i in range(count)]
    joined = [{k: np.concatenate([p[k] for p in batch]) for k in batch[0]} for batch in zip(*parts, strict=True)]
    assert_same(joined, whole)


@pytest.mark.parametrize("prefetch", [0, 1, 16])
@pytest.mark.parametrize("stop", [0, 3, "epoch", "epoch+1"])
def test_resumes_bit_for_bit(folder, epoch, prefetch, stop):
    stop = {"epoch": epoch, "epoch+1": epoch + 1}.get(stop, stop)
    iterator = train(folder, prefetch=prefetch)
    take(iterator, stop)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, epoch + 2)
    resumed = train(folder, prefetch=prefetch)
    take(resumed, 2)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert_same(take(resumed, epoch + 2), expected)


def test_state_is_what_was_yielded(folder):
    iterator = train(folder, prefetch=16)
    iterator.start_prefetch()
    assert iterator.get_state()["batches"] == 0
    take(iterator, 3)
    assert iterator.get_state()["batches"] == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes(folder, epoch, workers):
    plain = train(folder)
    expected = take(plain, epoch + 3)
    iterator = train(folder, workers=workers)
    assert_same(take(iterator, 4), expected[:4])
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    resumed = train(folder, workers=workers)
    resumed.set_state(state)
    batches = take(resumed, epoch - 1)
    resumed.close()
    assert_same(batches, expected[4:])  # arrays outlive the workers
    assert type(batches[0]["tokens"]) is np.ndarray


def test_workers_do_not_start_jax(folder):
    iterator = train(folder, workers=1)
    iterator._batches = iterator._batches.map(process_and_backends)
    batch = next(iterator)
    iterator.close()
    assert batch["process"] != os.getpid()
    assert batch["backends"] == 0


def test_grain_checkpoints_it(folder, tmp_path):
    import grain

    iterator = train(folder)
    assert isinstance(iterator, grain.DatasetIterator)
    take(iterator, 3)
    handler = grain.checkpoint.CheckpointHandler()
    handler.save(tmp_path, iterator)
    resumed = train(folder)
    handler.restore(tmp_path, resumed)
    assert_same(take(resumed, 2), take(iterator, 2))


def test_closed(folder):
    iterator = train(folder)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 4}, {"length": 16}, {"packing": "padded"}], ids=lambda c: next(iter(c))
)
def test_state_of_other_settings(folder, change):
    state = train(folder).get_state()
    with pytest.raises(UserError, match=f"{next(iter(change))} was"):
        train(folder, **change).set_state(state)


def test_state_of_other_data(folder, data, tmp_path):
    other = data_config(tmp_path, path=data.path, bpe_size=280)
    shards_of_other = prepare.prepare(other, verbose=False)
    with pytest.raises(
        UserError, match=rf"shards in {shards_of_other} differ from .*text, its tokenizer or a setting"
    ) as told:
        train(shards_of_other).set_state(train(folder).get_state())
    assert "hash" not in str(told.value)


def test_state_of_the_same_documents_in_another_order(folder, texts, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in reversed(texts)), encoding="utf-8")
    other = prepare.prepare(data_config(tmp_path, path=str(path), tokenizer=str(folder / "tokenizer")), verbose=False)
    stores = [shards.TokenStore(place, "train") for place in (folder, other)]
    assert stores[0].tokens == stores[1].tokens
    with pytest.raises(UserError, match="differ from"):
        train(other).set_state(train(folder).get_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 100_000}, "fewer than one batch"),
        ({"process_count": 3}, "use a multiple of 3"),
        ({"process_index": 1}, "no process 1 among 1"),
        ({"batch_size": 0}, "does not divide"),
        ({"seed": -1}, "out of range"),
        ({"workers": -1}, "must be 0 or more"),
        ({"length": 2}, "3 or more"),
    ],
)
def test_settings_out_of_range(folder, change, message):
    with pytest.raises(UserError, match=message):
        train(folder, **change)


def test_rows_pickle_without_their_maps(folder):
    rows = packing.open_rows(shards.TokenStore(folder, "train"), LENGTH, "packed")
    before = rows.take([5, 3])
    data = pickle.dumps(rows)
    assert len(data) < 10_000
    assert_same([pickle.loads(data).take([5, 3])], [before])


def test_jax_is_not_started(folder):
    program = f"""
from duo_jax.data import packing, pipeline, prepare, shards, sources, tokenizers
next(pipeline.train_iterator({str(folder)!r}, length=32, batch_size=8, seed=0))
from jax._src import xla_bridge
assert not xla_bridge._backends
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    alone = "import sys; from duo_jax.data import packing, prepare, shards, sources, tokenizers;"
    alone += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", alone], check=True)


class TestHeldout:
    def test_every_row_once(self, folder):
        store = shards.TokenStore(folder, "heldout")
        rows = packing.open_rows(store, LENGTH, "packed")
        assert len(rows) % BATCH
        batches = pipeline.heldout_batches(folder, length=LENGTH, batch_size=BATCH)
        assert len(batches) == len(list(batches)) == -(-len(rows) // BATCH)
        assert {batch["tokens"].shape for batch in batches} == {(BATCH, LENGTH)}
        tokens = np.concatenate([batch["tokens"] for batch in batches])
        mask = np.concatenate([batch["mask"] for batch in batches])
        np.testing.assert_array_equal(tokens[: len(rows)], rows.take(range(len(rows)))["tokens"])
        assert (mask[: len(rows)] == 1).all()
        assert (mask[len(rows) :] == 0).all()
        assert (tokens[len(rows) :] == 299).all()
        assert_same(list(batches), list(batches))

    def test_max_batches(self, folder):
        whole = list(pipeline.heldout_batches(folder, length=LENGTH, batch_size=BATCH))
        assert_same(list(pipeline.heldout_batches(folder, length=LENGTH, batch_size=BATCH, max_batches=2)), whole[:2])
        assert len(pipeline.heldout_batches(folder, length=LENGTH, batch_size=BATCH, max_batches=10**6)) == len(whole)

    @pytest.mark.parametrize("batch_size", [8, 512])
    def test_processes_share_the_global_batch(self, folder, batch_size):
        """With 512 rows a batch, some processes have nothing but filling."""
        whole = list(pipeline.heldout_batches(folder, length=LENGTH, batch_size=batch_size))
        parts = [
            list(
                pipeline.heldout_batches(folder, length=LENGTH, batch_size=batch_size, process_index=i, process_count=4)
            )
            for i in range(4)
        ]
        joined = [{k: np.concatenate([p[k] for p in batch]) for k in batch[0]} for batch in zip(*parts, strict=True)]
        assert_same(joined, whole)

    def test_too_little_text(self, folder):
        with pytest.raises(UserError, match="too few for one row"):
            pipeline.heldout_batches(folder, length=1_000_000, batch_size=1)
        with pytest.raises(UserError, match="use 1 or more"):
            pipeline.heldout_batches(folder, length=LENGTH, batch_size=1, max_batches=0)


@pytest.mark.parametrize("packing_name", ["packed", "padded"])
def test_unigram_counts_are_of_the_rows_that_training_sees(folder, packing_name, texts):
    rows = packing.open_rows(shards.TokenStore(folder, "train"), LENGTH, packing_name)
    expected = np.zeros(300, int)
    for i in range(len(rows)):
        row = rows.take([i])
        np.add.at(expected, row["tokens"][row["mask"] > 0], 1)
    counts = pipeline.unigram_counts(folder, LENGTH, packing_name)
    np.testing.assert_array_equal(counts, expected)
    assert counts[0] == len(rows)
    sampled = pipeline.unigram_counts(folder, LENGTH, packing_name, max_rows=50)
    assert 40 < sampled[0] <= 50


def test_an_id_that_no_tokenizer_has_is_told(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    shard = next(copy.glob("train-*.tokens"))
    content = bytearray(shard.read_bytes())
    content[-200:] = b"\xfe" * 200
    shard.write_bytes(content)
    with pytest.raises(UserError, match="are damaged: they hold the id 65278, and there are 300; remove the folder"):
        pipeline.unigram_counts(copy, LENGTH)
