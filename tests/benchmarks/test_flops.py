"""The formula for model FLOPs against XLA's own count of what a network without shortcuts computes."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops
from duo_jax.models.network import Network

LENGTH, BATCH = 64, 2


def network(algo="duo_base", **changes):
    # Wide enough that the matrix products are nearly all there is.
    sizes = {"vocab_size": 4096, "length": LENGTH, "dim": 256, "blocks": 2, "heads": 4, "cond_dim": 64}
    return Network(algo=algo, mask_id=4095, dropout=0.0, precision="float32", attention="xla", **(sizes | changes))


def counted(function, *args):
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def shapes(net, length):
    weights = jax.eval_shape(net.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)
    return weights, tokens, jax.ShapeDtypeStruct((BATCH,), jnp.float32)


def logits(net):
    return lambda weights, tokens, sigma: net.module.apply({"params": weights}, tokens, sigma)


@pytest.mark.parametrize(
    "changes", [{}, {"length": 256}, {"vocab_size": 512}, {"blocks": 3}, {"dim": 384}], ids=lambda x: str(x)
)
def test_the_forward_pass(changes):
    net = network(**changes)
    count = counted(logits(net), *shapes(net, net.length))
    assert BATCH * flops.forward(net, net.length) == pytest.approx(count, rel=0.03)


def test_the_gradient_takes_three_forward_passes():
    net = network()

    def loss(*args):
        return jnp.sum(logits(net)(*args) ** 2)

    count = counted(jax.grad(loss), *shapes(net, LENGTH))
    assert BATCH * flops.train_row(net, LENGTH) == pytest.approx(count, rel=0.03)


def test_a_relaxed_input_costs_a_product_more():
    net = network(vocab_size=2048)
    weights, _, sigma = shapes(net, LENGTH)
    relaxed = jax.ShapeDtypeStruct((BATCH, LENGTH, net.vocab_size), jnp.float32)

    def loss(weights, inputs, sigma):
        return jnp.sum(logits(net)(weights, inputs, sigma) ** 2)

    count = counted(jax.grad(loss), weights, relaxed, sigma)
    assert BATCH * flops.train_row(net, LENGTH, relaxed=True) == pytest.approx(count, rel=0.03)


def test_a_causal_network_needs_half_of_the_attention():
    net = network("ar", length=1024, vocab_size=256)
    weights, tokens, _ = shapes(net, net.length)
    count = counted(lambda weights, tokens: net.module.apply({"params": weights}, tokens, None), weights, tokens)
    masked = BATCH * net.length * net.blocks * 4 * net.dim * (net.length - 1) / 2
    assert BATCH * flops.forward(net, net.length) + masked == pytest.approx(count, rel=0.05)


def test_passes_of_algorithms():
    once = flops.forward(network("mdlm"), LENGTH)
    passes = {algo: flops.train_row(network(algo), LENGTH) / once for algo in ("mdlm", "sedd", "duo", "d3pm", "dcd")}
    assert passes == {"mdlm": 3, "sedd": 3, "duo": 3, "d3pm": 6, "dcd": 4}


def test_sampling_reads_the_head_where_it_is_asked_to():
    net = network("mdlm")
    row = flops.forward(net, LENGTH)
    assert flops.sample(net, 3, LENGTH, 5, 3 * 5 * LENGTH) == pytest.approx(15 * row)
    spared = flops.sample(net, 3, LENGTH, 5, 3 * LENGTH)
    assert 15 * row - spared == pytest.approx(3 * 4 * LENGTH * 2 * net.dim * net.vocab_size)
    ar = network("ar")
    assert flops.sample(ar, 2, LENGTH, LENGTH - 1, 2 * (LENGTH - 1)) == pytest.approx(2 * flops.forward(ar, LENGTH - 1))
