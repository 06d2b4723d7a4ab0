"""What cannot be read gets one line that says why and what to do."""

import zipfile

import numpy as np
import pytest
import torch_files
from torch_files import equal, lightning

import duo_jax
from duo_jax.convert import infer


def broken(state, **changes):
    return {key: value for key, value in (state | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks.1.mlp.0.bias": None}, r"missing blocks\.1\.mlp\.0\.bias keys, unknown no keys"),
        ({"lora.weight": np.ones(2, np.float32)}, r"missing no keys, unknown lora\.weight keys"),
        (
            {"blocks.0.attn_out.weight": np.ones((32, 31), np.float32)},
            r"attn_out\.weight \[32, 31\] instead of \[32, 32\]",
        ),
        ({"vocab_embed.embedding": np.ones(3, np.float32)}, r"vocab_embed\.embedding \[3\] instead of"),
        ({"output_layer.linear.bias": np.ones(5, np.float32)}, r"linear\.bias \[5\] instead of \[300\]"),
    ],
)
def test_keys_and_shapes_are_checked(tmp_path, state, asked, changes, message):
    torch_files.save(broken(state, **changes), tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.load(tmp_path / "a.pt", **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo": None}, "give --algo"),
        ({"algo": "gpt"}, "choose one of"),
        ({"algo": "ar"}, "give the right --algo"),
        ({"length": None}, "give --length"),
        ({"heads": 4}, "are those of 2 heads"),
        ({"tokenizer": None}, "300 ids, which is no known tokenizer's"),
        ({"tokenizer": "gpt2"}, "has 50258 ids, but the network 300"),
        ({"tokenizer": "nowhere"}, "there is no tokenizer 'nowhere'"),
    ],
)
def test_what_cannot_be_inferred_is_asked_for(tmp_path, state, asked, changes, message):
    torch_files.save(state, tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.load(tmp_path / "a.pt", **(asked | changes))


def test_heads_without_a_rotary_buffer(tmp_path, state, asked):
    torch_files.save(broken(state, **{"rotary_emb.inv_freq": None}), tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match="give the number of --heads"):
        duo_jax.load(tmp_path / "a.pt", **asked)
    with pytest.raises(duo_jax.UserError, match="cannot be split into 3 heads"):
        duo_jax.load(tmp_path / "a.pt", heads=3, **asked)
    assert duo_jax.load(tmp_path / "a.pt", heads=4, **asked).network.heads == 4


def test_a_uniform_sedd_is_refused():
    with pytest.raises(duo_jax.UserError, match="uniform graph"):
        infer.facts({"graph": {"type": "uniform"}})


def test_damaged_and_missing_files(tmp_path, state, asked, monkeypatch):
    (tmp_path / "a.ckpt").write_bytes(b"nonsense")
    with pytest.raises(duo_jax.UserError, match=r"no file that torch\.save wrote"):
        duo_jax.load(tmp_path / "a.ckpt", **asked)
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(duo_jax.UserError, match="no safetensors file"):
        duo_jax.load(tmp_path / "a.safetensors", **asked)
    torch_files.save({"state_dict": state}, tmp_path / "raw.ckpt")
    with pytest.raises(duo_jax.UserError, match="give --no-ema"):
        duo_jax.load(tmp_path / "raw.ckpt", **asked)
    assert duo_jax.load(tmp_path / "raw.ckpt", ema=False, **asked).network.dim == 32
    short = lightning(state)
    short["ema"]["shadow_params"].pop()
    torch_files.save(short, tmp_path / "short.ckpt")
    with pytest.raises(duo_jax.UserError, match="are not those of its"):
        duo_jax.load(tmp_path / "short.ckpt", **asked)
    torch_files.save({"a": 1}, tmp_path / "none.pt")
    with pytest.raises(duo_jax.UserError, match="a are no tensors"):
        duo_jax.load(tmp_path / "none.pt", **asked)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(duo_jax.UserError, match="no known kind"):
        duo_jax.load(tmp_path / "a.txt")


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path, state, asked):
    torch_files.save(state, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:-4] if name == "archive/data/0" else data)
    with pytest.raises(duo_jax.UserError, match="reaches beyond its numbers"):
        duo_jax.load(tmp_path / "b.pt", **asked)


def test_a_hub_id_is_fetched_or_refused_in_one_line(tmp_path, params, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    duo_jax.export(params, tmp_path / "out")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "out"))
    equal(duo_jax.load("somebody/something").weights, params.weights)

    def fail(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(duo_jax.UserError, match=r"the hub does not give it: cannot find it$"):
        duo_jax.load("somebody/something")
