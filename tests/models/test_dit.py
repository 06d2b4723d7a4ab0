"""The network against the reference's outputs, and against what can be said of it without them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import stats

from duo_jax import config as config_lib
from duo_jax import convert, hardware
from duo_jax.convert import arrays
from duo_jax.errors import UserError
from duo_jax.hardware import Hardware
from duo_jax.models import attention
from duo_jax.models.dit import Block, DiT, time_features
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
    jax.tree.map(np.testing.assert_array_equal, convert.to_torch({"params": weights}), bare)
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
    with pytest.raises(UserError, match=r"missing keys: .*output_layer\.linear\.weight.*unknown keys: foo"):
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
    apply = jax.jit(functools.partial(net.module.apply, train=True))
    whole = apply({"params": weights}, tokens, sigma, rngs={"dropout": jax.random.key(3)})
    np.testing.assert_allclose(whole, net.logits(weights, dropped), rtol=1e-5, atol=1e-5)
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
    ampere = Hardware("gpu", 8.0)
    for change in ({"device": ampere, "head_dim": 128}, {"dtype": jnp.float16}, {"head_dim": 256}):
        assert attention.choose("auto", **{**USUAL, **change})[0] == "cudnn"
    for change, expected in (
        ({"device": T4}, "below 8.0"), ({"device": CPU}, "is a cpu"), ({"dtype": jnp.float32}, "float32"),
        ({"head_dim": 60}, "head size of 60"), ({"head_dim": 512}, "head size of 512"), ({"length": 1023}, "is odd"),
        ({"device": ampere, "head_dim": 136}, "head size of 136"),
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


def equations(jaxpr):
    """Every equation of a program, those within others included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def made_of(net, transform=lambda fn: fn):
    """The types of what a text's pass through the network multiplies with weights, and how many norms it takes."""
    weights, x = jax.eval_shape(net.init, jax.random.key(0)), jax.ShapeDtypeStruct((2, 12, net.dim), jnp.float32)
    fn = transform(lambda weights, x: net.hidden(weights, x, jnp.array([0.1, 3.0])).sum())
    found = list(equations(jax.make_jaxpr(fn)(weights, x).jaxpr))
    products = [eqn for eqn in found if eqn.primitive.name == "dot_general"]
    by_weights = [eqn for eqn in products if not any(eqn.params["dimension_numbers"][1])]
    types = [tuple(var.aval.dtype for var in eqn.invars) for eqn in by_weights]
    return types, sum(eqn.primitive.name == "rsqrt" for eqn in found)


def test_the_blocks_products_are_in_the_compute_type():
    types, _ = made_of(network(precision="bfloat16"))
    # Four and the modulation in each of the two blocks, and the last modulation; what the noise level becomes is float32.
    assert types.count((jnp.bfloat16,) * 2) == 11
    assert types.count((jnp.float32,) * 2) == len(types) - 11 == 2


def test_what_is_computed_anew_is_all_but_what_is_kept():
    (none, norms), (dots, norms_dots), (blocks, norms_blocks) = (
        made_of(network(remat=remat), jax.grad) for remat in ("none", "dots", "blocks")
    )
    assert len(none) == len(dots) < len(blocks)
    assert norms < norms_dots == norms_blocks


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_cache_gives_what_the_whole_text_gives(precision):
    net = network(algo="ar", precision=precision, blocks=1)
    tokens = jax.random.randint(jax.random.key(1), (2, 6), 0, VOCAB)

    @jax.jit
    def start(key):
        weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape), net.init(key))
        return weights, net.hidden(weights, net.embed(weights, tokens), None)

    @jax.jit
    def follow(weights, token, cache, position):
        return net.module.apply({"params": weights}, token, cache, position, method="next_hidden")

    weights, whole = start(jax.random.key(0))
    cache = net.module.empty_cache(2, 6)
    for i in range(6):
        found, cache = follow(weights, tokens[:, i : i + 1], cache, i)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[:, 0], whole[:, i], atol={"float32": 1e-5, "float16": 0.01}[precision])


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


def test_a_chunk_holds_one_devices_rows_and_every_networks_logits():
    net = network(head_mib=1, vocab_size=512)  # 128 tokens, or 16 positions of 8 rows
    assert [net.chunk(8, 128, shards) for shards in (1, 2, 3, 8, 16)] == [16, 32, 32, 128, 128]
    assert [net.chunk(8, 128, 2, networks=n) for n in (1, 2)] == [32, 16]
    nothing = network(head_mib=0)
    assert (nothing.head_budget, nothing.chunk(8, 128)) == (0, 1)


def test_half_precision_stays_within_the_blocks():
    net = network(precision="bfloat16", blocks=1)
    relaxed = jax.random.normal(jax.random.key(1), (2, 12, VOCAB), jnp.bfloat16)

    @jax.jit
    def visit(key):
        weights = jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape), net.init(key))
        x = net.embed(weights, relaxed)
        hidden = net.hidden(weights, x, jnp.array([0.1, 3.0]))
        return weights, x, hidden, net.logits(weights, hidden)

    weights, x, hidden, logits = visit(jax.random.key(0))
    assert x.dtype == hidden.dtype == logits.dtype == jnp.float32
    mix = jax.nn.softmax(relaxed.astype(jnp.float32))
    np.testing.assert_allclose(x, mix @ weights["embed"]["embedding"], rtol=1e-5, atol=1e-6)
    assert (hidden != hidden.astype(jnp.bfloat16)).mean() > 0.9, "nor is it rounded on its way"
    head = {name: np.asarray(value, np.float64) for name, value in weights["head"].items()}
    # Each of the two factors is rounded by 2^-9 at most.
    slack = np.abs(hidden) @ np.abs(head["kernel"]) * 2**-8
    error = np.abs(logits - (hidden @ head["kernel"] + head["bias"]))
    assert (error <= slack + 1e-6).all()
    assert error.max() > 1e-4, "the products are in the compute type"


def within(values, mean, deviation):
    """A false alarm in 16 million: 5.3 standard deviations."""
    return abs(np.mean(values) - mean) <= 5.3 * deviation / np.size(values) ** 0.5


def test_dropout_acts_on_each_branch_at_its_rate_and_keeps_the_mean():
    """A block of one token whose attention adds norm1(x) and whose MLP adds 1."""
    rate, dim = 0.3, 128
    block = Block(dim, 1, rate, False, False, jnp.float32, "xla")
    x = jax.random.normal(jax.random.key(0), (64, 1, dim))
    angles = attention.rotary_angles(1, dim)
    fresh = block.init(jax.random.key(1), x, None, *angles, False)["params"]
    weights = jax.tree.map(jnp.zeros_like, fresh)
    weights["norm1"] = fresh["norm1"]
    weights["qkv"]["kernel"] = weights["qkv"]["kernel"].at[:, 2 * dim :].set(jnp.eye(dim))
    weights["attn_out"]["kernel"] = jnp.eye(dim)
    weights["mlp_out"]["bias"] = jnp.ones(dim)
    added = [
        np.asarray(block.apply({"params": weights}, x, None, *angles, train, rngs={"dropout": jax.random.key(2)}) - x)
        for train in (False, True)
    ]
    norm = added[0] - 1
    np.testing.assert_allclose(norm, (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True), rtol=1e-3, atol=1e-4)
    # Which of the two came through, from what came out.
    choices = np.array([(a, m) for a in (0, 1) for m in (0, 1)])
    distance = np.abs(added[1][..., None] - (norm[..., None] * choices[:, 0] + choices[:, 1]) / (1 - rate))
    assert distance.min(-1).max() < 1e-3
    known = np.sort(distance, axis=-1)[..., 1] > 0.05  # near ties, of norms near 0 or -1, tell nothing
    assert known.mean() > 0.8
    attended, mlp = np.moveaxis(choices[distance.argmin(-1)], -1, 0)
    deviation = (rate * (1 - rate)) ** 0.5
    assert within(attended[known], 1 - rate, deviation)
    assert within(mlp[known], 1 - rate, deviation)
    both = (1 - rate) ** 2
    assert within((attended * mlp)[known], both, (both * (1 - both)) ** 0.5)
    assert (mlp[0] != mlp[1]).any(), "rows have masks of their own"


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_do_not_share_their_dropout(scan):
    """Two blocks that add 1 to a stream of zeros: of each entry both, one or none comes through."""
    rate, net = 0.5, network(dropout=0.5, scan=scan, algo="ar", dim=128, heads=1, length=1)
    weights = jax.tree.map(jnp.zeros_like, net.init(jax.random.key(0)))
    for name in ("block_0", "block_1"):
        weights[name]["mlp_out"]["bias"] = jnp.ones(net.dim)
    weights["norm_final"]["norm"]["scale"] = jnp.ones(net.dim)
    found = np.asarray(net.hidden(weights, jnp.zeros((64, 1, net.dim)), None, jax.random.key(1)))
    # The last norm keeps the three levels apart.
    lowest, highest = found.min(-1, keepdims=True), found.max(-1, keepdims=True)
    passed = np.round(2 * (found - lowest) / (highest - lowest))
    assert within(passed == 1, 2 * rate * (1 - rate), 0.5)
    assert within(passed == 2, (1 - rate) ** 2, 0.75**0.5 / 2)


def test_fresh_weights_are_as_the_reference_draws_them():
    """Uniform in +-1/sqrt(fan_in), biases too, and +-1/sqrt(D) for the embedding; zero where a block starts as identity."""
    net = network(dim=64, heads=4, cond_dim=32, vocab_size=500)
    weights = net.init(jax.random.key(0))
    block = weights["block_1"]
    bounds = {
        "embedding": (weights["embed"]["embedding"], 64), "time_in": (weights["time_in"]["kernel"], 256),
        "time_in bias": (weights["time_in"]["bias"], 256), "time_out": (weights["time_out"]["kernel"], 32),
        "time_out bias": (weights["time_out"]["bias"], 32), "qkv": (block["qkv"]["kernel"], 64),
        "attn_out": (block["attn_out"]["kernel"], 64), "mlp_in": (block["mlp_in"]["kernel"], 64),
        "mlp_in bias": (block["mlp_in"]["bias"], 64), "mlp_out": (block["mlp_out"]["kernel"], 256),
        "mlp_out bias": (block["mlp_out"]["bias"], 256),
    }  # fmt: skip
    for name, (values, fan_in) in bounds.items():
        u = np.asarray(values).ravel() * fan_in**0.5
        assert np.abs(u).max() <= 1 + 1e-6, name
        assert stats.kstest(u, stats.uniform(-1, 2).cdf).pvalue > 1e-5, name
    zeros = block["modulation"], weights["modulation_final"], weights["head"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(zeros))
    assert all((np.asarray(norm["norm"]["scale"]) == 1).all() for norm in (block["norm1"], weights["norm_final"]))


def test_a_network_is_what_its_config_says():
    """Each field, set to what is not its default, arrives."""
    config = config_lib.default()
    changes = {
        "algo.name": "d3pm", "algo.schedule": "cosine", "algo.eps": 0.01, "algo.eps_t": 0.02, "algo.d3pm_steps": 17,
        "model.length": 48, "model.dim": 24, "model.blocks": 5, "model.heads": 3, "model.cond_dim": 7,
        "model.dropout": 0.25, "model.attention": "xla", "model.head_mib": 3, "model.remat": "dots", "model.scan": True,
        "precision": "float32",
    }  # fmt: skip
    config.update_from_flattened_dict(changes)
    found = dataclasses.asdict(Network.from_config(config, 99, 42))
    wanted = {name.split(".")[-1]: value for name, value in changes.items()}
    wanted["algo"] = wanted.pop("name")
    assert found == {**wanted, "vocab_size": 99, "mask_id": 42}
    assert Network.from_config(config, 99).mask_id == 98
    module = Network.from_config(config, 99).module
    for name in ("vocab_size", "dim", "blocks", "heads", "cond_dim", "dropout", "attention", "remat", "scan"):
        assert getattr(module, name) == found[name], name
    assert (module.causal, module.adaln) == (False, True)
    causal = dataclasses.replace(Network.from_config(config, 99), algo="ar").module
    assert (causal.causal, causal.adaln) == (True, False)
