"""The network against the reference's outputs, and against what can be said of it without them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from duo_jax import convert
from duo_jax.errors import UserError
from duo_jax.models import attention, head
from duo_jax.models.dit import DiT, time_features
from duo_jax.models.network import SIZES, Network, count

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
    plain = net.predict(weights)(tokens, sigma, lambda logits: logits)
    np.testing.assert_array_equal(plain, net.predict(weights)(tokens, sigma, lambda logits: logits))
    dropped = net.predict(weights, dropout_key=jax.random.key(3))(tokens, sigma, lambda logits: logits)
    assert not np.allclose(plain, dropped)
    causal = dataclasses.replace(net, dropout=0.0).module.clone(causal=True)
    changed = tokens.at[:, 6:].add(1) % VOCAB
    a, b = (causal.apply({"params": weights}, t, sigma) for t in (tokens, changed))
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-6)
    assert not np.allclose(a[:, 6:], b[:, 6:])


@pytest.mark.parametrize("chunk", [1, 4, 5, 7, 12])
def test_the_chunked_head_equals_the_dense_one(chunk):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (3, 12, 8))
    weights = {"kernel": jax.random.normal(keys[1], (8, VOCAB)), "bias": jax.random.normal(keys[2], (VOCAB,))}
    targets = jax.random.randint(keys[3], (3, 12), 0, VOCAB)

    def nll(logits, x):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), x[..., None], -1)[..., 0]

    def loss(hidden, weights, chunk):
        per_token = head.in_chunks(
            lambda hidden, x: nll(head.logits(hidden, weights, jnp.dtype("float32")), x), hidden, targets, chunk=chunk
        )
        return (per_token * jnp.arange(12)).sum(), per_token

    grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
    (gradient, value), (dense_gradient, dense_value) = grad(hidden, weights, chunk), grad(hidden, weights, 12)
    np.testing.assert_allclose(value, dense_value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-4), gradient, dense_gradient)


def test_the_chunked_head_holds_no_batch_of_logits():
    batch, length, vocab = 4, 256, 20_000
    chunk = head.chunk_length(batch, length, vocab, mib=16)
    weights = {"kernel": jnp.zeros((8, vocab)), "bias": jnp.zeros(vocab)}

    def log_normaliser(hidden):
        return jax.nn.logsumexp(head.logits(hidden, weights, jnp.dtype("float32")), axis=-1)

    def loss(hidden):
        return head.in_chunks(log_normaliser, hidden, chunk=chunk).sum()

    compiled = jax.jit(jax.grad(loss)).lower(jnp.zeros((batch, length, 8))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32 * 2**20 < batch * length * vocab * 4


def test_chunk_length_covers_and_fits():
    for batch, length, vocab, mib in [(32, 1024, 50_258, 256), (8, 127, 512, 1), (1, 1, 2, 1), (512, 1024, 50_258, 1)]:
        chunk = head.chunk_length(batch, length, vocab, mib)
        assert 1 <= chunk <= length
        assert chunk == 1 or batch * chunk * vocab * 16 <= mib * 2**20


H100 = {"platform": "gpu", "compute_capability": 9.0, "dtype": jnp.bfloat16, "head_dim": 64}


def test_the_choice_of_attention_is_explicit():
    assert attention.choose("auto", **H100)[0] == "cudnn"
    assert attention.choose("xla", **H100)[0] == "xla"
    for change in (
        {"compute_capability": 7.5}, {"dtype": jnp.float32}, {"head_dim": 60}, {"head_dim": 512}, {"platform": "cpu"}
    ):  # fmt: skip
        name, why = attention.choose("auto", **{**H100, **change})
        assert name == "xla"
        with pytest.raises(UserError, match="cudnn"):
            attention.choose("cudnn", **{**H100, **change})
        assert why
