"""What a program's text says of its cost, against sums by hand."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import hlo

# A loop of five turns, each with a product and a fusion that reads one row of a table and writes one row of a result in
# place; then a branch, a product by cuBLAS, attention by cuDNN, and a loop of unknown length.
TEXT = """
HloModule jit_f, is_scheduled=true

%fused_row (p0: f32[100,8], p1: s32[], p2: bf16[5,8]) -> bf16[5,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = bf16[5,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %bitcast.1 = f32[100,8]{1,0:T(8,128)} bitcast(%p0)
  %half = bf16[100,8]{1,0} convert(%bitcast.1)
  %row = bf16[1,8]{1,0} dynamic-slice(%half, %p1, %zero), dynamic_slice_sizes={1,8}
  ROOT %put = bf16[5,8]{1,0} dynamic-update-slice(%p2, %row, %p1, %zero)
}

%body (state: (s32[], f32[100,8], bf16[5,8], f32[4,8])) -> (s32[], f32[100,8], bf16[5,8], f32[4,8]) {
  %state = (s32[], f32[100,8]{1,0}, bf16[5,8]{1,0}, /*index=3*/f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %table = f32[100,8]{1,0} get-tuple-element(%state), index=1
  %out = bf16[5,8]{1,0} get-tuple-element(%state), index=2
  %x = f32[4,8]{1,0} get-tuple-element(%state), index=3
  %fusion.1 = bf16[5,8]{1,0} fusion(%table, %i, %out), kind=kLoop, calls=%fused_row, metadata={op_name="jit(f)/row"}
  %dot.1 = f32[4,4]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/dot"}
  ROOT %next = (s32[], f32[100,8]{1,0}, bf16[5,8]{1,0}, f32[4,8]{1,0}) tuple(%i, %table, %fusion.1, %x)
}

%small (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  ROOT %negate.1 = f32[4]{0} negate(%a)
}

%large (b: f32[1000]) -> f32[4] {
  %b = f32[1000]{0} parameter(0)
  ROOT %reduce.1 = f32[4]{0} custom-call(%b), custom_call_target="sum"
}

%again (c: f32[16]) -> f32[16] {
  %c = f32[16]{0} parameter(0)
  ROOT %copy.1 = f32[16]{0} copy(%c)
}

ENTRY %main (arg: f32[100,8]) -> f32[4] {
  %arg = f32[100,8]{1,0} parameter(0)
  %loop = (s32[], f32[100,8]{1,0}) while(%start), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %either = f32[4]{0} conditional(%i, %u, %v), branch_computations={%small, %large}
  %q = bf16[2,3,16,8]{3,2,1,0} constant({...})
  %m = bf16[10,20]{1,0} constant({...})
  %n = bf16[20,30]{1,0} constant({...})
  %gemm = (bf16[10,30]{1,0}, s8[64]{0}) custom-call(%m, %n), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %attention = (bf16[2,3,16,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", \
backend_config={"fmha": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "16", "16"]}}}
  %forever = f32[16]{0} while(%s), condition=%c, body=%again
  ROOT %done = f32[4]{0} bitcast(%either)
}
"""


def test_a_programs_kernels():
    program = hlo.Program(TEXT.replace("\\\n", ""), unknown_trips=7)
    found = {kernel.name: kernel for kernel in program.kernels()}
    assert set(found) == {"fusion.1", "dot.1", "reduce.1", "gemm", "attention", "copy.1"}
    cost = {name: (kernel.times, kernel.bytes, kernel.flops) for name, kernel in found.items()}
    assert cost["fusion.1"] == (5, 8 * 4 + 4 + 8 * 2, 0)  # a row, the index, a row of half its size
    assert cost["dot.1"] == (5, 2 * 4 * 8 * 4 + 4 * 4 * 4, 2 * 4 * 4 * 8)
    assert cost["reduce.1"] == (1, 1000 * 4 + 4 * 4, 0)  # the dearer side
    assert cost["gemm"] == (1, 2 * (200 + 600 + 300), 2 * 10 * 20 * 30)
    assert cost["attention"] == (1, 4 * 2 * 3 * 16 * 8 * 2, 2 * 2 * 2 * 3 * 16 * 16 * 8)
    assert cost["copy.1"] == (7, 2 * 16 * 4, 0)
    assert program.unknown == {"forever"}
    assert found["fusion.1"].source == "jit(f)/row"


def test_a_compiled_loops_products():
    """Seven turns of a product of 16 by 32 and 32 by 32."""

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=7)[0]

    text = jax.jit(loop).lower(jnp.ones((16, 32)), jnp.ones((32, 32))).compile().as_text()
    kernels = hlo.Program(text).kernels()
    assert sum(kernel.times * kernel.flops for kernel in kernels) == 7 * 2 * 16 * 32 * 32
    least = 7 * 4 * (16 * 32 + 32 * 32 + 16 * 32)
    assert least <= sum(kernel.times * kernel.bytes for kernel in kernels) < 3 * least


@pytest.mark.parametrize(
    ("type_", "size"),
    [("f32[2,3]{1,0}", 24), ("pred[8]", 8), ("bf16[]", 2), ("(s8[4]{0:S(5)}, f8e4m3fn[2,2])", 8), ("token[]", 0)],
)
def test_the_bytes_of_a_type(type_, size):
    assert hlo.size(type_) == size
