"""How `benchmarks` measures: in processes of their own, in bytes and FLOPs."""

import os

import jax
import jax.numpy as jnp
import pytest

from benchmarks import measure
from duo_jax.errors import UserError


def test_a_killed_process_is_told_in_a_sentence():
    with pytest.raises(UserError, match="was killed"):
        measure.in_fresh_process(os._exit, 9)


def test_a_fresh_process_has_not_this_ones_memory():
    ballast = bytearray(os.urandom(1)) * (400 * measure.MIB)
    here, there = measure.rss(), measure.in_fresh_process(measure.rss)
    assert len(ballast) < here
    assert there < here - 300 * measure.MIB


def test_the_memory_of_a_program_is_that_of_its_arrays():
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    program, seconds = measure.compiled(jax.jit(lambda x: x + 1).lower(x))
    sizes = measure.memory(program)
    assert sizes["arguments"] == sizes["outputs"] == measure.MIB
    assert sizes["total"] >= 2 * measure.MIB
    reused, _ = measure.compiled(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x))
    assert measure.memory(reused)["total"] == sizes["total"] - measure.MIB
    assert seconds > 0


def test_speed_is_work_over_the_median():
    columns = measure.speed_columns([0.1, 0.2, 9.0], 100, 1e9, (9e9, 10e9), 1)
    assert columns["tokens_per_s"] == pytest.approx(500)
    assert columns["best_ms"] == pytest.approx(100)
    assert columns["mfu_percent"] == pytest.approx(50)
    assert columns["peak_gflops"] == pytest.approx(10)


def test_the_peak_is_more_than_a_small_product_reaches():
    peak = measure.matmul_peak(jnp.dtype(jnp.float32), times=2)
    a = jnp.ones((16, 16))
    small = 2 * 16**3 / min(measure.seconds(lambda: a @ a, 5))
    assert small < peak < 1e16


def test_a_case_without_room_on_the_device_is_told():
    with pytest.raises(UserError, match="out of the device's memory; make the batch smaller"):
        measure.in_fresh_process(fail, "RESOURCE_EXHAUSTED: 3 GiB")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        measure.in_fresh_process(fail, "INTERNAL: something else")


def fail(message):
    raise jax.errors.JaxRuntimeError(message)
