"""What cannot be read gets one line that says why and what to do."""

import contextlib
import fnmatch
import json
import zipfile

import numpy as np
import pytest
import torch_files
from safetensors.numpy import save_file
from torch_files import equal, lightning

import duo_jax
from duo_jax.convert import infer, pickled
from duo_jax.data import tokenizers


def broken(state, **changes):
    return {key: value for key, value in (state | changes).items() if value is not None}


@pytest.mark.parametrize("layout", ["state dict", "lightning"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma_map.mlp.0.weight": None}, r"missing keys: sigma_map\.mlp\.0\.weight; unknown keys: none"),
        ({"blocks.1.mlp.0.bias": None}, r"missing keys: blocks\.1\.mlp\.0\.bias; unknown keys: none"),
        ({"lora.weight": np.ones(2, np.float32)}, r"missing keys: none; unknown keys: lora\.weight"),
        (
            {"blocks.0.attn_out.weight": np.ones((32, 31), np.float32)},
            r"attn_out\.weight \[32, 31\] instead of \[32, 32\]",
        ),
        ({"vocab_embed.embedding": np.ones(3, np.float32)}, r"vocab_embed\.embedding \[3\] instead of"),
        ({"output_layer.linear.bias": np.ones(5, np.float32)}, r"linear\.bias \[5\] instead of \[300\]"),
    ],
)
def test_keys_and_shapes_are_checked(tmp_path, state, asked, changes, message, layout):
    wrong = broken(state, **changes)
    torch_files.save(wrong if layout == "state dict" else lightning(wrong), tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.load(tmp_path / "a.pt", **asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algo": None}, "give --algo"),
        ({"algo": "gpt"}, "choose one of"),
        ({"algo": "ar"}, "give the right --algo"),
        ({"length": None}, "give --length"),
        ({"length": 2}, "a length of 2 tokens is too small"),
        ({"heads": 4}, "belong to 2 heads"),
        ({"tokenizer": None}, "300 ids, which fits no known tokenizer"),
        ({"tokenizer": "gpt2"}, "has 50258 ids, but the network 300"),
        ({"tokenizer": "nowhere"}, "there is no tokenizer 'nowhere'"),
    ],
)
def test_what_cannot_be_inferred_is_asked_for(tmp_path, state, asked, changes, message):
    torch_files.save(state, tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.load(tmp_path / "a.pt", **(asked | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_layer.linear.bias": np.zeros(300, np.int64)}, r"output_layer\.linear\.bias are not of a floating"),
        ({"output_layer.linear.bias": np.full(300, np.nan, np.float32)}, r"linear\.bias are not finite"),
        ({"rotary_emb.inv_freq": np.ones(7, np.float32)}, "7 rotary frequencies do not fit a network"),
        ({"model.output_layer.linear.bias": np.zeros(300, np.float32)}, r"holds output_layer\.linear\.bias twice"),
    ],
)
def test_odd_arrays_are_refused(tmp_path, state, asked, changes, message):
    torch_files.save(state | changes, tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.load(tmp_path / "a.pt", **asked)


def test_heads_without_a_rotary_buffer(tmp_path, state, asked):
    torch_files.save(broken(state, **{"rotary_emb.inv_freq": None}), tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match="give the number of --heads"):
        duo_jax.load(tmp_path / "a.pt", **asked)
    for heads in (3, 32):
        with pytest.raises(duo_jax.UserError, match=f"cannot be split into {heads} heads"):
            duo_jax.load(tmp_path / "a.pt", heads=heads, **asked)
    assert duo_jax.load(tmp_path / "a.pt", heads=4, **asked).network.heads == 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"graph": {"type": "uniform"}}, "uniform graph"),
        ({"noise": {"type": "geometric"}}, "noise schedule is geometric"),
        ({"graph": {"type": "absorb"}, "model": {"scale_by_sigma": False}}, "does not scale its score"),
        (
            {"model_type": "mdlm", "time_conditioning": True},
            "mdlm has time_conditioning=True; only .*=False",
        ),
        (
            {"algo": {"name": "duo", "time_conditioning": False}},
            "duo has time_conditioning=False; only .*=True",
        ),
    ],
)
def test_what_is_not_built_here_is_refused(config, message):
    with pytest.raises(duo_jax.UserError, match=message):
        infer.facts(config)


def test_an_unknown_algorithm_is_named(state, asked):
    told = infer.facts({"model_type": "udlm", "n_heads": 2, "model_length": 32})
    with pytest.raises(duo_jax.UserError, match="names an unknown algorithm, 'udlm'; give --algo"):
        infer.network(state, told, {"tokenizer": asked["tokenizer"]})
    assert infer.network(state, told, {"algo": "duo", "tokenizer": asked["tokenizer"]})[0].algo == "duo"


def test_damaged_and_missing_files(tmp_path, state, asked, monkeypatch):
    (tmp_path / "a.ckpt").write_bytes(b"nonsense")
    with pytest.raises(duo_jax.UserError, match=r"not a file of torch\.save"):
        duo_jax.load(tmp_path / "a.ckpt", **asked)
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(duo_jax.UserError, match="not a safetensors file"):
        duo_jax.load(tmp_path / "a.safetensors", **asked)
    torch_files.save({"state_dict": state}, tmp_path / "raw.ckpt")
    with pytest.raises(duo_jax.UserError, match="give --no-ema"):
        duo_jax.load(tmp_path / "raw.ckpt", **asked)
    assert duo_jax.load(tmp_path / "raw.ckpt", ema=False, **asked).network.dim == 32
    short = lightning(state)
    short["ema"]["shadow_params"].pop()
    torch_files.save(short, tmp_path / "short.ckpt")
    with pytest.raises(duo_jax.UserError, match="do not match its"):
        duo_jax.load(tmp_path / "short.ckpt", **asked)
    torch_files.save({"a": 1}, tmp_path / "none.pt")
    with pytest.raises(duo_jax.UserError, match="a are not tensors"):
        duo_jax.load(tmp_path / "none.pt", **asked)
    with zipfile.ZipFile(tmp_path / "other.ckpt", "w") as file:
        file.writestr("x", "y")
    with pytest.raises(duo_jax.UserError, match=r"a zip, but not one that torch\.save wrote"):
        duo_jax.load(tmp_path / "other.ckpt", **asked)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(duo_jax.UserError, match="of an unknown kind"):
        duo_jax.load(tmp_path / "a.txt")


def test_a_tensor_that_reaches_beyond_its_numbers_is_refused(tmp_path, state, asked):
    torch_files.save(state, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, data[:-4] if name == "archive/data/0" else data)
    with pytest.raises(duo_jax.UserError, match="extends beyond its stored numbers"):
        duo_jax.load(tmp_path / "b.pt", **asked)


def test_a_tensor_that_begins_before_its_numbers_is_refused(tmp_path):
    torch_files.save({"a": np.ones(4, np.float32)}, tmp_path / "a.pt")
    with contextlib.closing(pickled.Archive(tmp_path / "a.pt")) as archive:
        tensor = archive.root["a"]
        assert archive.array(tensor).tolist() == [1.0] * 4
        for wrong in ({"offset": -1}, {"offset": 3, "strides": (-1,)}, {"shape": (-4,)}):
            with pytest.raises(duo_jax.UserError, match="extends beyond its stored numbers"):
                archive.array(tensor._replace(**wrong))


@pytest.mark.parametrize(
    "change", [{"storage": None}, {"offset": 0.0}, {"shape": (2.0, 3)}, {"strides": (3,)}, {"strides": 3}]
)
def test_a_tensor_that_is_none_is_refused(tmp_path, monkeypatch, change):
    real = torch_files._Tensor.__reduce__

    def reduced(tensor):
        vars(tensor).update(change)
        return real(tensor)

    monkeypatch.setattr(torch_files._Tensor, "__reduce__", reduced)
    torch_files.save({"a": np.ones((2, 3), np.float32)}, tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match=r"a\.pt cannot be read: "):
        pickled.Archive(tmp_path / "a.pt")


def test_a_file_of_another_byte_order_is_refused(tmp_path, state, asked):
    torch_files.save(state, tmp_path / "a.pt", byteorder="big")
    with pytest.raises(duo_jax.UserError, match="written on a big-endian machine"):
        duo_jax.load(tmp_path / "a.pt", **asked)


def test_what_is_here_goes_before_what_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(duo_jax.UserError, match="quickstart holds no checkpoint"):
        duo_jax.load("quickstart")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about["duo_jax"].update(format=2), "has format 2; this version of duo_jax reads format 1"),
        (lambda about: about["duo_jax"].pop("ema"), "is damaged: 'ema'; export the network again"),
        (lambda about: [about], "holds no settings"),
    ],
)
def test_a_config_of_another_version_or_kind_is_refused(tmp_path, params, change, message):
    duo_jax.export(params, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    about = json.loads(path.read_text())
    changed = change(about)
    path.write_text(json.dumps(changed if isinstance(changed, list) else about))
    with pytest.raises(duo_jax.UserError, match=message):
        duo_jax.load(tmp_path / "out")


def test_a_slip_of_the_pen_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/quickstar", "zoo/duo.ckpt", "x" * 300):
        with pytest.raises(duo_jax.UserError, match=r"does not exist|cannot be read: File name too long"):
            duo_jax.load(name)


def test_folders_that_hold_no_network(tmp_path, state, asked):
    with pytest.raises(duo_jax.UserError, match="holds no checkpoint of a run, and none of"):
        duo_jax.load(tmp_path, **asked)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(duo_jax.UserError, match="split over several files"):
        duo_jax.load(tmp_path, **asked)
    # Without a config it may still be told what it lacks.
    save_file(dict(state), tmp_path / "model.safetensors")
    with pytest.raises(duo_jax.UserError, match="give --algo"):
        duo_jax.load(tmp_path)
    assert duo_jax.load(tmp_path, **asked).network.algo == "duo_base"


@pytest.mark.parametrize("change", [{"blocks": 1}, {"dim": 64}, {"heads": 4}, {"algo": "gpt"}, {"dim": "x"}])
def test_a_config_of_another_network_is_refused(tmp_path, params, change):
    duo_jax.export(params, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    about = json.loads(path.read_text())
    about["duo_jax"]["network"] |= change
    path.write_text(json.dumps(about))
    with pytest.raises(duo_jax.UserError, match=r"describes (another|no) network"):
        duo_jax.load(tmp_path / "out")


def test_a_pickle_changes_nothing_of_its_readers(tmp_path, state):
    """GLOBAL of a function that is known here, and BUILD to set its defaults."""
    root = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__(K\x09tstb."
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("archive/data.pkl", root)
    with pytest.raises(duo_jax.UserError, match="cannot be read"):
        duo_jax.load(tmp_path / "a.pt")
    torch_files.save(state, tmp_path / "b.pt")
    with pytest.raises(duo_jax.UserError, match="give --algo"):
        duo_jax.load(tmp_path / "b.pt")


def test_a_hub_id_is_fetched_or_refused_in_one_line(tmp_path, params, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    duo_jax.export(params, tmp_path / "out")

    def fetch(name, allow_patterns):
        """As the hub's client does: what is not asked for is not there."""
        for path in [path for path in (tmp_path / "out").rglob("*") if path.is_file()]:
            if not any(fnmatch.fnmatch(str(path.relative_to(tmp_path / "out")), wanted) for wanted in allow_patterns):
                path.unlink()
        return str(tmp_path / "out")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    fetched = duo_jax.load("somebody/something")
    equal(fetched.weights, params.weights)
    assert tokenizers.load(fetched.tokenizer).same_as(tokenizers.load(params.tokenizer))

    def fail(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find it\nmore")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(duo_jax.UserError, match=r"the hub does not give it: cannot find it$"):
        duo_jax.load("somebody/something")

    def wait(name, **_):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", wait)
    with pytest.raises(duo_jax.UserError, match=r"the hub does not give it: TimeoutError$"):
        duo_jax.load("somebody/something")
