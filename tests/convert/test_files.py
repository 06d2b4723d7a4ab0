"""Files in the reference's layouts are read, and ours read back; mistakes get one line."""

import json
import os
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from helpers import command, run, tiny_settings
from safetensors.numpy import save_file

import duo_jax
from duo_jax import convert
from duo_jax.convert import files, infer
from duo_jax.data import tokenizers
from duo_jax.models.network import Network, Params
from duo_jax.training import checkpoint


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def tokenizer(trained):
    return str(trained / checkpoint.TOKENIZER)


@pytest.fixture(scope="module")
def params(trained):
    return duo_jax.load(trained)


@pytest.fixture(scope="module")
def state(params):
    """The reference's state dict of the averaged weights."""
    return convert.to_torch(jax.device_get(params.weights), heads=2)


@pytest.fixture
def asked(tokenizer):
    return {"algo": "duo_base", "length": 32, "tokenizer": tokenizer}


def lightning(state, shift=1.0, **more):
    """A checkpoint as Lightning writes it: raw weights that differ by `shift` from the averaged ones."""
    raw = OrderedDict((f"backbone.{key}", value + np.float32(shift)) for key, value in state.items())
    raw["backbone.rotary_emb.inv_freq"] = state["rotary_emb.inv_freq"]
    shadow = [value for key, value in state.items() if key != "rotary_emb.inv_freq"]
    ema = {"decay": 0.9999, "num_updates": 20, "shadow_params": shadow}
    optimizer = [{"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": []}]
    return {"epoch": 0, "state_dict": raw, "optimizer_states": optimizer, "ema": ema, **more}


def test_a_lightning_checkpoint_gives_its_averaged_or_its_last_weights(tmp_path, state, params, asked):
    path = tmp_path / "duo.ckpt"
    torch_files.save(lightning(state), path)
    read = duo_jax.load(path, **asked)
    equal(read.weights, params.weights)
    assert read.network.heads == 2, "as the rotary buffer shows"
    assert (read.network.dim, read.network.blocks, read.network.cond_dim, read.network.vocab_size) == (32, 2, 16, 300)
    raw = duo_jax.load(path, ema=False, **asked)
    equal(raw.weights, jax.tree.map(lambda x: np.asarray(x) + np.float32(1), params.weights))


def test_the_averaged_weights_are_in_the_order_of_the_references_parameters(golden):
    """The reference's list has no names: ours must go through the state dict in PyTorch's own order."""
    data = golden("a_dit")
    theirs = json.loads(str(data["e2e_grad_names"]))
    keys = [key[3:] for key in data if key.startswith("sd/") and "inv_freq" not in key]
    assert keys == theirs


def test_nothing_that_a_file_names_is_run(tmp_path, state, asked):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    path = tmp_path / "evil.ckpt"
    torch_files.save(lightning(state, callbacks=Evil()), path)
    duo_jax.load(path, **asked)
    assert not marker.exists()


def test_the_config_in_a_lightning_checkpoint_is_read_and_its_tokenizer_skipped(tmp_path, state, tokenizer):
    """As OmegaConf pickles its containers: `_content` of nodes with a `_val`."""
    names = ["omegaconf.dictconfig:DictConfig", "omegaconf.nodes:AnyNode", "transformers.gpt2:GPT2Tokenizer"]
    with torch_files.modules(*names) as made:

        def node(value):
            kind = made["DictConfig" if isinstance(value, dict) else "AnyNode"]()
            inside = {k: node(v) for k, v in value.items()} if isinstance(value, dict) else value
            kind.__dict__ = {"_content": inside} if isinstance(value, dict) else {"_val": inside, "_parent": None}
            return kind

        config = node(
            {
                "algo": {"name": "distillation"},
                "model": {"length": 48, "n_heads": 2, "dropout": 0.25},
                "noise": {"type": "cosine", "eps": 0.002},
            }
        )
        hyper = {"config": config, "tokenizer": made["GPT2Tokenizer"]()}
        torch_files.save(lightning(state, hyper_parameters=hyper), tmp_path / "a.ckpt")
    network = duo_jax.load(tmp_path / "a.ckpt", tokenizer=tokenizer).network
    assert (network.algo, network.length, network.dropout) == ("dcd", 48, 0.25)
    assert (network.schedule, network.eps) == ("cosine", 0.002)


def test_views_and_half_precision_are_read(tmp_path, state, params, asked):
    keys = [key for key in state if key.endswith("attn_qkv.weight")]
    torch_files.save(state, tmp_path / "a.pt", transposed=keys)
    equal(duo_jax.load(tmp_path / "a.pt", **asked).weights, params.weights)
    half = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
    torch_files.save(half, tmp_path / "half.pt")
    save_file({f"backbone.{k}": v for k, v in half.items()}, tmp_path / "half.safetensors")
    a, b = (duo_jax.load(tmp_path / name, **asked).weights for name in ("half.pt", "half.safetensors"))
    equal(a, b)
    equal(a, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params.weights))


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"model_type": "duo", "n_heads": 2, "model_length": 64}, "duo", ("duo", 64)),
        ({"model_type": "duo", "n_heads": 2, "model_length": 64}, "duo-distilled", ("dcd", 64)),
        ({"model_type": "mdlm", "n_heads": 2, "model_length": 64, "time_conditioning": False}, "x", ("mdlm", 64)),
        ({"graph": {"type": "absorb"}, "model": {"n_heads": 2, "length": 16}, "tokens": 299}, "x", ("sedd", 16)),
    ],
)
def test_hub_folders(tmp_path, state, params, tokenizer, config, name, expected):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"backbone.{key}": value for key, value in state.items()}, folder / "model.safetensors")
    read = duo_jax.load(folder, tokenizer=tokenizer)
    assert (read.network.algo, read.network.length) == expected
    equal(read.weights, params.weights)


def test_an_autoregressive_network_is_known_by_its_layout(tmp_path, tokenizer):
    net = Network("ar", 300, 299, 16, 32, 2, 4, 128, 0.1)
    weights = net.init(jax.random.key(0))
    torch_files.save(convert.to_torch(weights, heads=4), tmp_path / "ar.pt")
    read = duo_jax.load(tmp_path / "ar.pt", length=16, tokenizer=tokenizer)
    assert read.network == net
    equal(read.weights, weights)
    with pytest.raises(duo_jax.UserError, match="no noise level"):
        duo_jax.load(tmp_path / "ar.pt", length=16, tokenizer=tokenizer, algo="duo")


def test_export_reads_back_bit_for_bit(tmp_path, params, trained):
    duo_jax.export(params, tmp_path / "out", step=20)
    read = duo_jax.load(tmp_path / "out")
    equal(read.weights, params.weights)
    assert read.network == params.network
    assert tokenizers.load(read.tokenizer).same_as(tokenizers.load(params.tokenizer))
    assert checkpoint.find(tmp_path / "out") == (tmp_path / "out", 20)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer",
    ]  # fmt: skip
    a, b = (duo_jax.sample(p, n_steps=4, seed=3).tokens for p in (params, read))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(duo_jax.UserError, match="not empty"):
        duo_jax.export(params, tmp_path / "out")
    with pytest.raises(duo_jax.UserError, match="leave out algo"):
        duo_jax.load(tmp_path / "out", algo="duo")
    with pytest.raises(duo_jax.UserError, match="averaged weights only"):
        duo_jax.load(tmp_path / "out", ema=False)


def test_a_failed_export_leaves_nothing(tmp_path, params):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(duo_jax.UserError, match="No space left"):
        convert.write(params, tmp_path / "out", fail)
    assert not list(tmp_path.iterdir())


def test_the_command_then_sampling_and_evaluation(tmp_path, state, text_folder, trained):
    """A file in the reference's layout goes in, and the folder that comes out is used like a workdir."""
    torch_files.save(lightning(state), tmp_path / "duo.ckpt")
    out = tmp_path / "out"
    flags = ["--algo", "duo_base", "--length", "32", "--tokenizer", str(trained / checkpoint.TOKENIZER)]
    args = ["-m", "duo_jax.convert", "--from", str(tmp_path / "duo.ckpt"), "--to", str(out)]
    python = command("", out, {})[0]
    done = run([python, *args])
    assert done.returncode == 2
    assert done.stderr.startswith("error: the file does not tell its algorithm; give --algo")
    assert len(done.stderr.splitlines()) == 1
    done = run([python, *args, *flags])
    assert done.returncode == 0, done.stderr
    assert "duo_base, 2 blocks of width 32 with 2 heads, 32 tokens, 300 ids" in done.stdout
    settings = {**tiny_settings(text_folder), "mode": "eval"}
    done = run(command("configs/quickstart.py", out, settings))
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "eval.json").read_text())
    done = run(command("configs/quickstart.py", trained, settings))
    assert figures["nll"] == json.loads((trained / "eval.json").read_text())["nll"]
    (trained / "eval.json").unlink()
    done = run(command("configs/quickstart.py", out, {**settings, "mode": "sample", "sample.num": 2}))
    assert done.returncode == 0, done.stderr
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2


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


def test_released_sizes_need_no_flags():
    state = {
        "vocab_embed.embedding": np.empty((50258, 768), np.float16),
        "sigma_map.mlp.0.weight": np.empty((128, 256)),
    } | {f"blocks.{i}.norm1.weight": np.empty(768) for i in range(12)}
    net, tokenizer = infer.network(state, {"algo": "duo", "length": 1024}, {})
    assert (net.heads, net.mask_id, tokenizer) == (12, 50257, "gpt2")
    state["vocab_embed.embedding"] = np.empty((30522, 768), np.float16)
    net, tokenizer = infer.network(state, {"algo": "mdlm", "length": 128}, {})
    assert (net.mask_id, tokenizer) == (103, "bert-base-uncased")


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
    import zipfile

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


def test_training_starts_from_a_converted_folder(tmp_path, params):
    duo_jax.export(params, tmp_path / "out")
    read, about = checkpoint.read(tmp_path / "out")
    assert about == {}
    assert isinstance(read, Params)
    assert files.is_folder(tmp_path / "out")


def test_real_pytorch_writes_what_is_read(tmp_path, state, params, asked):
    torch = pytest.importorskip("torch")
    tensors = OrderedDict((key, torch.from_numpy(np.array(value))) for key, value in state.items())
    whole = lightning(state)
    whole["state_dict"] = OrderedDict((f"backbone.{key}", value + 1) for key, value in tensors.items())
    whole["ema"]["shadow_params"] = [value for key, value in tensors.items() if "inv_freq" not in key]
    whole["optimizer_states"] = []
    torch.save(whole, tmp_path / "a.ckpt")
    equal(duo_jax.load(tmp_path / "a.ckpt", **asked).weights, params.weights)
    torch.save(
        {key: value.bfloat16().T.contiguous().T for key, value in tensors.items() if value.ndim == 2}
        | {key: torch.nn.Parameter(value) for key, value in tensors.items() if value.ndim != 2},
        tmp_path / "b.pt",
    )
    read = duo_jax.load(tmp_path / "b.pt", **asked)
    kernel = np.asarray(params.weights["head"]["kernel"]).astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(read.weights["head"]["kernel"]), kernel)
    np.testing.assert_array_equal(read.weights["head"]["bias"], params.weights["head"]["bias"])
