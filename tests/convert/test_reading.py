"""Files in the reference's layouts are read."""

import dataclasses
import json
import os
from collections import OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_files
from safetensors.numpy import save_file
from torch_files import equal, lightning

import duo_jax
from configs import distill_owt, owt
from duo_jax import convert
from duo_jax.convert import infer
from duo_jax.models.network import Network


def test_a_lightning_checkpoint_gives_its_averaged_or_its_last_weights(tmp_path, state, params, asked):
    path = tmp_path / "duo.ckpt"
    torch_files.save(lightning(state), path)
    read = duo_jax.load(path, **asked)
    equal(read.weights, params.weights)
    assert read.network.heads == 2, "as the rotary buffer shows"
    assert (read.network.dim, read.network.blocks, read.network.cond_dim, read.network.vocab_size) == (32, 2, 16, 300)
    raw = duo_jax.load(path, ema=False, **asked)
    assert (read.averaged, raw.averaged) == (True, False)
    equal(raw.weights, jax.tree.map(lambda x: np.asarray(x) + np.float32(1), params.weights))


@pytest.mark.parametrize("name", ["a_dit", "a_dit_causal"])
def test_the_averaged_weights_are_in_the_order_of_the_references_parameters(golden, name):
    """The list has no names: what is written, too, must go through the parameters as PyTorch does."""
    theirs = {key[3:]: value for key, value in golden(name).items() if key.startswith("sd/")}
    ours = convert.to_torch(convert.from_torch(theirs), heads=4)
    buffer = "rotary_emb.inv_freq"
    assert [key for key in ours if key != buffer] == [key for key in theirs if key != buffer]
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_an_autoregressive_checkpoint_scores_as_the_reference_does(tmp_path, golden):
    data = golden("a_dit_causal")
    state = {f"backbone.{key[3:]}": value for key, value in data.items() if key.startswith("sd/")}
    torch_files.save({"state_dict": state}, tmp_path / "ar.ckpt")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_size": 53, "mask_id": 52}))
    params = duo_jax.load(tmp_path / "ar.ckpt", ema=False, length=17, tokenizer=str(tmp_path))
    assert params.network.algo == "ar"
    params = params.replace(network=dataclasses.replace(params.network, precision="float32"))
    score = duo_jax.score(params, data["x0"], n_samples=1)
    assert score.tokens == data["nll"].size
    np.testing.assert_allclose(score.nll, data["nll"].mean(), rtol=2e-6)


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


def test_views_parameters_and_half_precision_are_read(tmp_path, state, params, asked):
    keys = [key for key in state if key.endswith("attn_qkv.weight")]
    torch_files.save(state, tmp_path / "a.pt", transposed=keys, parameters=["vocab_embed.embedding"])
    read = duo_jax.load(tmp_path / "a.pt", **asked)
    equal(read.weights, params.weights)
    assert read.averaged is None, "a state dict does not tell"
    half = {key: value.astype(jnp.bfloat16) for key, value in state.items()}
    torch_files.save(half, tmp_path / "half.pt")
    save_file({f"backbone.{k}": v for k, v in half.items()}, tmp_path / "half.safetensors")
    a, b = (duo_jax.load(tmp_path / name, **asked).weights for name in ("half.pt", "half.safetensors"))
    equal(a, b)
    equal(a, jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params.weights))


def test_what_training_put_around_a_network_is_left_out(tmp_path, state, params, asked):
    wrapped = {f"module._orig_mod.backbone.{key}": value for key, value in state.items()}
    more = {name: np.ones(2, np.float32) for name in ("teacher.norm.weight", "noise.rate", "metrics.nlls.weight")}
    torch_files.save({"state_dict": wrapped | more}, tmp_path / "a.ckpt")
    equal(duo_jax.load(tmp_path / "a.ckpt", ema=False, **asked).weights, params.weights)


def test_a_part_of_a_larger_array_is_read(tmp_path, state, params, asked):
    """Two tensors of one storage, of which the second begins where the first ends."""
    pair = [f"sigma_map.mlp.{i}.bias" for i in (0, 2)]
    torch_files.save(state, tmp_path / "a.pt", together=pair)
    equal(duo_jax.load(tmp_path / "a.pt", **asked).weights, params.weights)


def test_what_is_asked_for_goes_before_what_a_file_tells(state, asked, tokenizer):
    without = {key: value for key, value in state.items() if key != "rotary_emb.inv_freq"}
    told = {"algo": "duo", "length": 64, "heads": 2}
    nothing = {"tokenizer": tokenizer}
    as_told, _ = infer.network(without, told, nothing)
    assert (as_told.algo, as_told.length, as_told.heads) == ("duo", 64, 2)
    as_asked, _ = infer.network(without, told, {"algo": "dcd", "length": 48, "heads": 4, **nothing})
    assert (as_asked.algo, as_asked.length, as_asked.heads) == ("dcd", 48, 4)


def test_a_mask_need_not_be_the_last_id(tmp_path, state):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_size": 300, "mask_id": 103}))
    asked = {"algo": "mdlm", "length": 32, "tokenizer": str(tmp_path)}
    assert infer.network(state, {}, asked)[0].mask_id == 103


def test_a_config_beside_a_lone_file_may_be_another_models(tmp_path, state, tokenizer):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mdlm", "n_heads": 2, "model_length": 64}))
    torch_files.save(state, tmp_path / "a.pt")
    with pytest.raises(duo_jax.UserError, match="give --algo"):
        duo_jax.load(tmp_path / "a.pt", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("config", "name", "expected"),
    [
        ({"model_type": "duo", "n_heads": 2, "model_length": 64}, "duo", ("duo", 64)),
        ({"model_type": "DUO", "n_heads": 2, "model_length": 64}, "duo-distilled", ("dcd", 64)),
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


def test_of_two_files_in_a_folder_the_safe_one_is_read(tmp_path, state, params, asked):
    save_file(dict(state), tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"nonsense")
    equal(duo_jax.load(tmp_path, **asked).weights, params.weights)


@pytest.mark.parametrize(
    ("config", "step"), [({"duo_jax": {"step": 7}}, 7), ({"duo_jax": {"step": "7"}}, 0), ({"duo_jax": 7}, 0), ({}, 0)]
)
def test_the_step_of_a_folder(tmp_path, config, step):
    assert convert.step(tmp_path) == 0
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert convert.step(tmp_path) == step


def test_what_is_no_number_is_not_told():
    told = {"n_heads": "twelve", "model_length": 64, "dropout": None, "noise": {"type": "loglinear", "eps": "small"}}
    assert infer.facts(told) == {"length": 64, "schedule": "log_linear"}


def test_an_autoregressive_network_is_known_by_its_layout(tmp_path, tokenizer):
    net = Network("ar", 300, 299, 16, 32, 2, 4, 128, 0.1)
    weights = net.init(jax.random.key(0))
    torch_files.save(convert.to_torch(weights, heads=4), tmp_path / "ar.pt")
    read = duo_jax.load(tmp_path / "ar.pt", length=16, tokenizer=tokenizer)
    assert read.network == net
    equal(read.weights, weights)
    with pytest.raises(duo_jax.UserError, match="no noise level"):
        duo_jax.load(tmp_path / "ar.pt", length=16, tokenizer=tokenizer, algo="duo")


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


SEDD = {
    "graph": {"type": "absorb"},
    "model": {"n_heads": 16, "length": 1024, "dropout": 0.1},
    "noise": {"type": "loglinear"},
}
FLAT = {"n_heads": 12, "model_length": 1024, "dropout": 0.1}


@pytest.mark.parametrize(
    ("recipe", "changes", "name", "told", "size"),
    [
        (owt, {}, "duo", FLAT | {"model_type": "DUO"}, (768, 12)),
        (distill_owt, {}, "duo-distilled", FLAT | {"model_type": "DUO"}, (768, 12)),
        (owt, {"algo.name": "mdlm"}, "mdlm-owt", FLAT | {"model_type": "mdlm"}, (768, 12)),
        (owt, {"algo.name": "sedd", "model.size": "medium"}, "sedd-medium", SEDD, (1024, 24)),
        (owt, {"algo.name": "ar"}, "ar.ckpt", {"model": {"length": 1024, "n_heads": 12}}, (768, 12)),
    ],
)
def test_the_recipes_that_the_documentation_names_fit_the_released_layouts(recipe, changes, name, told, size):
    """docs/checkpoints.md: `mode=eval` refuses a config of another network."""
    config = recipe.get_config()
    config.update_from_flattened_dict(changes)
    state = {"vocab_embed.embedding": np.empty((50258, size[0]), np.int8)}
    state |= {f"blocks.{i}.norm1.weight": np.empty(size[0]) for i in range(size[1])}
    if name != "ar.ckpt":
        state["sigma_map.mlp.0.weight"] = np.empty((128, 256))
    net, tokenizer = infer.network(state, infer.facts(told, name), {})
    assert net == Network.from_config(config, 50258)
    assert tokenizer == config.data.tokenizer
