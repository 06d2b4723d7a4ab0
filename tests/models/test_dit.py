"""The network against the reference's outputs, and against what can be said of it without them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import convert, hardware
from duo_jax.convert import arrays
from duo_jax.errors import UserError
from duo_jax.hardware import Hardware
from duo_jax.models import attention
from duo_jax.models.dit import DiT, time_features
from duo_jax.models.network import SIZES, Network, Params, chunk_budget, count, fastest_dtype

VOCAB = 53


def load(data):
    return convert.from_torch({k[3:]: v for k, v in data.items() if k.startswith("sd/")})


def dit(data, **kwargs):
    c = json.loads(str(data["config"]))
    return DiT(c["vocab_size"], c["hidden_size"], c["n_blocks"], c["n_heads"], c.get("cond_dim", 128), **kwargs)


def relative(a, b):
    return np.abs(np.asarray(a) - b).max() / np.abs(b).max()


def test_logits_equal_the_references(golden):
    data = golden("a_dit")
    module, params = dit(data), load(data)
    apply = jax.jit(lambda *a: module.apply({"params": params}, *a))
    sigma = jnp.asarray(data["sigma"])
    assert relative(apply(data["ids"], sigma), data["logits"]) < 2e-5
    assert relative(apply(data["ids"], jnp.zeros(3)), data["logits_sigma0"]) < 2e-5
    assert relative(apply(data["soft_x"], sigma), data["logits_soft"]) < 2e-5
    assert relative(apply(data["topk_ids"], sigma, data["topk_weights"].astype(np.float32)), data["logits_topk"]) < 2e-5
    np.testing.assert_allclose(time_features(sigma), data["t_freq"], atol=2e-6)
    np.testing.assert_allclose(attention.rotary_angles(16, 16)[0], data["rot_cos"], atol=2e-6)


def test_causal_logits_equal_the_references(golden):
    data = golden("a_dit_causal")
    module, params = dit(data, causal=True, adaln=False), load(data)
    logits = module.apply({"params": params}, jnp.asarray(data["ids"]), None)
    assert relative(logits, data["logits"]) < 2e-5


@pytest.mark.parametrize("adaln", [True, False])
def test_torch_round_trip_is_bit_exact(adaln):
    module = DiT(11, 32, 3, 4, 16, adaln=adaln, causal=not adaln)
    params = module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))["params"]
    back = convert.from_torch(convert.to_torch(params, heads=4))
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_a_torch_state_dict_of_what_load_gives_and_of_parameters_alone():
    net = network()
    weights = net.init(jax.random.key(0))
    whole = convert.to_torch(Params(weights=weights, network=net, tokenizer="gpt2"))
    bare = convert.to_torch(weights)
    assert set(whole) - set(bare) == {arrays.INVERSE_FREQUENCY}
    for state in (whole, bare, {f"backbone.{key}": value for key, value in whole.items()}):
        jax.tree.map(np.testing.assert_array_equal, convert.from_torch(state), jax.device_get(weights))


@pytest.mark.parametrize("size", SIZES)
def test_random_weights_of_every_size_go_round_bit_for_bit(size):
    """From the reference's layout to ours and back; a few ids stand for the vocabulary, whose size changes no layout."""
    dim, blocks, heads, cond = SIZES[size]
    rng = np.random.default_rng(0)
    state = {key: rng.random(shape, np.float32) for key, shape in arrays._shapes(blocks, True, 50, dim, cond).items()}
    params = convert.from_torch(state)
    shapes = jax.eval_shape(
        lambda key: DiT(50, dim, blocks, heads, cond).init(key, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1)),
        jax.random.key(0),
    )["params"]
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    back = convert.to_torch(params, heads=heads)
    assert back.pop(arrays.INVERSE_FREQUENCY).shape == (dim // heads // 2,)
    assert list(back) == list(state)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value)


def test_a_strange_state_dict_is_named():
    with pytest.raises(UserError, match=r"missing .*output_layer\.linear\.weight.*unknown foo keys"):
        convert.from_torch({"foo": np.zeros(3), "blocks.0.norm1.weight": np.zeros(3)})


def network(**kwargs):
    base = Network(
        algo="duo_base",
        vocab_size=VOCAB,
        mask_id=VOCAB - 1,
        length=12,
        dim=32,
        blocks=2,
        heads=4,
        cond_dim=16,
        dropout=0.0,
        precision="float32",
    )
    return dataclasses.replace(base, **kwargs)


@pytest.mark.parametrize(("size", "millions"), [("tiny", 34), ("small", 170), ("medium", 424)])
def test_parameter_counts(size, millions):
    dim, blocks, heads, cond = SIZES[size]
    net = network(vocab_size=50_258, dim=dim, blocks=blocks, heads=heads, cond_dim=cond)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    assert count(shapes) == pytest.approx(millions * 1e6, rel=0.02)


def test_a_fresh_network_is_uniform_and_its_dropout_acts_only_in_training():
    net = network(dropout=0.5)
    weights = net.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, VOCAB)
    sigma = jnp.array([0.1, 3.0])
    logits = net.module.apply({"params": weights}, tokens, sigma)
    np.testing.assert_array_equal(logits, 0)

    # Away from the start, where gates and head are zero.
    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(2), w.shape), weights)
    x = net.embed(weights, tokens)
    plain = net.hidden(weights, x, sigma)
    np.testing.assert_array_equal(plain, net.hidden(weights, x, sigma))
    dropped = net.hidden(weights, x, sigma, jax.random.key(3))
    assert not np.allclose(plain, dropped)
    causal = dataclasses.replace(net, dropout=0.0).module.clone(causal=True)
    changed = tokens.at[:, 6:].add(1) % VOCAB
    a, b = (causal.apply({"params": weights}, t, sigma) for t in (tokens, changed))
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert not np.allclose(a[:, 6:], b[:, 6:])


H100, T4, CPU = Hardware("gpu", 9.0, 60 * 2**30), Hardware("gpu", 7.5, 11 * 2**30), Hardware("cpu")
USUAL = {"device": H100, "dtype": jnp.bfloat16, "head_dim": 64, "length": 1024}


def test_the_choice_of_attention_is_explicit():
    assert attention.choose("auto", **USUAL)[0] == "cudnn"
    assert attention.choose("xla", **USUAL)[0] == "xla"
    for change, expected in (
        ({"device": T4}, "below 8.0"), ({"device": CPU}, "is a cpu"), ({"dtype": jnp.float32}, "float32"),
        ({"head_dim": 60}, "head size of 60"), ({"head_dim": 512}, "head size of 512"), ({"length": 1023}, "is odd"),
    ):  # fmt: skip
        name, why = attention.choose("auto", **{**USUAL, **change})
        assert name == "xla"
        assert expected in why
        with pytest.raises(UserError, match=expected):
            attention.choose("cudnn", **{**USUAL, **change})


def test_what_is_compiled_for_may_be_absent():
    here = hardware.present()
    assert here.platform == jax.default_backend()
    with hardware.compiling_for(T4):
        assert (network().dtype, network().head_budget) == (jnp.float32, 352)
        assert network(precision="auto").dtype == jnp.float16
    assert hardware.present() == here


@pytest.mark.parametrize(("remat", "scan"), [("dots", False), ("blocks", False), ("none", True), ("blocks", True)])
def test_recomputing_or_scanning_blocks_changes_no_number(remat, scan):
    nets = network(dropout=0.3), network(dropout=0.3, remat=remat, scan=scan)
    weights = nets[0].init(jax.random.key(0))
    weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(jax.random.key(2), w.shape), weights)
    x, sigma = jax.random.normal(jax.random.key(1), (2, 12, nets[0].dim)), jnp.array([0.1, 3.0])

    def loss(weights, net):
        return (net.hidden(weights, x, sigma, jax.random.key(3)) ** 2).sum()

    want, got = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(weights, net) for net in nets)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max()), want, got)


def test_the_compute_type_is_what_the_devices_matrix_units_know():
    assert fastest_dtype(Hardware("tpu")) == fastest_dtype(Hardware("gpu", 8.0)) == fastest_dtype(H100) == jnp.bfloat16
    assert fastest_dtype(T4) == fastest_dtype(Hardware("gpu", 7.0)) == jnp.float16
    assert fastest_dtype(CPU) == fastest_dtype(Hardware("gpu", 6.1)) == jnp.float32


def test_a_chunk_of_logits_has_a_thirty_second_of_the_devices_memory():
    assert chunk_budget(CPU) == chunk_budget(Hardware("cpu", memory=2**40)) == 160
    assert chunk_budget(H100) == 1920
    assert chunk_budget(Hardware("gpu", memory=2**30)) == 160
    assert chunk_budget(Hardware("tpu", memory=2**40)) == 4096
    assert chunk_budget(Hardware("gpu")) == 512  # a device that does not tell
