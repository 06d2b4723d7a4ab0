"""Maps the reference's PyTorch parameters to ours and back: the same numbers, under other names and layouts.

PyTorch stores a linear layer's weight as `[out, in]`, Flax its kernel as `[in, out]`. Nothing else changes, so a round trip
is exact. All functions here take and return arrays; files are read elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from duo_jax.errors import UserError
from duo_jax.models.network import Params

# Our names -> the reference's, in the order of its parameters, in which it also lists its averaged weights. "kernel" leaves
# are transposed.
_BEFORE = {
    "embed/embedding": "vocab_embed.embedding",
    "time_in/kernel": "sigma_map.mlp.0.weight",
    "time_in/bias": "sigma_map.mlp.0.bias",
    "time_out/kernel": "sigma_map.mlp.2.weight",
    "time_out/bias": "sigma_map.mlp.2.bias",
}
_BLOCK = {
    "norm1/norm/scale": "norm1.weight",
    "qkv/kernel": "attn_qkv.weight",
    "attn_out/kernel": "attn_out.weight",
    "norm2/norm/scale": "norm2.weight",
    "mlp_in/kernel": "mlp.0.weight",
    "mlp_in/bias": "mlp.0.bias",
    "mlp_out/kernel": "mlp.2.weight",
    "mlp_out/bias": "mlp.2.bias",
    "modulation/linear/kernel": "adaLN_modulation.weight",
    "modulation/linear/bias": "adaLN_modulation.bias",
}
_AFTER = {
    "norm_final/norm/scale": "output_layer.norm_final.weight",
    "head/kernel": "output_layer.linear.weight",
    "head/bias": "output_layer.linear.bias",
    "modulation_final/linear/kernel": "output_layer.adaLN_modulation.weight",
    "modulation_final/linear/bias": "output_layer.adaLN_modulation.bias",
}
# A buffer of the reference, not a parameter: the rotary frequencies, which follow from the head size alone.
INVERSE_FREQUENCY = "rotary_emb.inv_freq"
_TIME_FEATURES = 256
_LISTED = 24


def _pairs(blocks: int, adaln: bool) -> dict[str, str]:
    """Returns {our path: the reference's key} for a whole network, in the order of the reference's parameters."""
    pairs = dict(_BEFORE)
    for i in range(blocks):
        pairs |= {f"block_{i}/{ours}": f"blocks.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
    pairs |= _AFTER
    if not adaln:
        pairs = {ours: theirs for ours, theirs in pairs.items() if "modulation" not in ours and "time_" not in ours}
    return pairs


_PREFIX = re.compile(r"^(?:_orig_mod\.|module\.|model\.|backbone\.)+")
# Entries of the reference's training state that do not belong to the network.
_IGNORED = ("teacher.", "noise.", "metrics.")


def _shapes(blocks: int, adaln: bool, vocab: int, dim: int, cond: int) -> dict[str, tuple[int, ...]]:
    """Returns {the reference's key: shape} for a whole network; sizes may be 0, as those of a damaged state dict."""
    ends = {
        "vocab_embed.embedding": (vocab, dim),
        "sigma_map.mlp.0.weight": (cond, _TIME_FEATURES),
        "sigma_map.mlp.0.bias": (cond,),
        "sigma_map.mlp.2.weight": (cond, cond),
        "sigma_map.mlp.2.bias": (cond,),
        "output_layer.norm_final.weight": (dim,),
        "output_layer.adaLN_modulation.weight": (2 * dim, cond),
        "output_layer.adaLN_modulation.bias": (2 * dim,),
        "output_layer.linear.weight": (vocab, dim),
        "output_layer.linear.bias": (vocab,),
        "norm1.weight": (dim,),
        "norm2.weight": (dim,),
        "attn_qkv.weight": (3 * dim, dim),
        "attn_out.weight": (dim, dim),
        "mlp.0.weight": (4 * dim, dim),
        "mlp.0.bias": (4 * dim,),
        "mlp.2.weight": (dim, 4 * dim),
        "mlp.2.bias": (dim,),
        "adaLN_modulation.weight": (6 * dim, cond),
        "adaLN_modulation.bias": (6 * dim,),
    }
    keys = _pairs(blocks, adaln).values()
    return {key: ends[key.split(".", 2)[2] if key.startswith("blocks.") else key] for key in keys}


def _listed(names: list[str]) -> str:
    """Returns the first few names, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def unprefixed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the network's entries without their prefixes, in the same order."""
    bare: dict[str, Any] = {}
    for key, value in state.items():
        name = _PREFIX.sub("", str(key))
        if str(key).startswith(_IGNORED):
            continue
        if name in bare:
            raise UserError(f"the state dict holds {name} twice, under different prefixes; it mixes two networks.")
        bare[name] = value
    return bare


def check(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns {our path: the reference's key} for a state dict with these shapes, without the rotary buffer.

    Raises:
        UserError: keys are missing or unknown, or arrays have wrong shapes; the message lists them.
    """
    shapes = {key: tuple(shape) for key, shape in shapes.items() if key != INVERSE_FREQUENCY}
    blocks = len({key.split(".")[1] for key in shapes if key.startswith("blocks.")})
    adaln = any("sigma_map." in key or "adaLN" in key for key in shapes)
    pairs = _pairs(blocks, adaln)
    missing, extra = sorted(set(pairs.values()) - shapes.keys()), sorted(shapes.keys() - set(pairs.values()))
    if not blocks or missing or extra:
        raise UserError(
            "this is not a state dict of Duo, MDLM, SEDD or AR: "
            f"missing keys: {_listed(missing) or 'none'}; unknown keys: {_listed(extra) or 'none'}."
        )
    vocab, dim = (*shapes["vocab_embed.embedding"], 0, 0)[:2]
    cond = (*shapes["sigma_map.mlp.0.weight"], 0)[0] if adaln else 0
    wanted = _shapes(blocks, adaln, vocab, dim, cond)
    wrong = [
        f"{key} {list(shapes[key])} instead of {list(shape)}" for key, shape in wanted.items() if shapes[key] != shape
    ]
    if wrong:
        raise UserError(f"arrays of this state dict have wrong shapes: {_listed(wrong)}.")
    return pairs


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our nested parameters for the reference's state dict (numpy arrays or CPU tensors), prefixed or not.

    Raises:
        UserError: keys are missing or unknown, or arrays have wrong shapes; the message lists them.
    """
    state = {key: np.asarray(value) for key, value in unprefixed(state_dict).items()}
    pairs = check({key: value.shape for key, value in state.items()})
    params: dict[str, Any] = {}
    for ours, theirs in pairs.items():
        *path, leaf = ours.split("/")
        node = params
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = state[theirs].T if leaf == "kernel" else state[theirs]
    return params


def to_torch(params: Mapping[str, Any] | Params, *, heads: int | None = None) -> dict[str, np.ndarray]:
    """Returns the reference's state dict, as contiguous numpy arrays, for our nested parameters.

    The parameters are in the reference's order; its rotary buffer comes last.

    Args:
        params: what `from_torch` or `duo_jax.load` returns, or `{"params": ...}` with the former.
        heads: number of attention heads, which nested parameters alone do not show; without it, the rotary buffer, which
            depends on it, is left out.
    """
    if isinstance(params, Params):
        params, heads = jax.device_get(params.weights), params.network.heads
    elif set(params) == {"params"}:
        params = params["params"]
    blocks = sum(key.startswith("block_") for key in params)
    state = {}
    for ours, theirs in _pairs(blocks, adaln="time_in" in params).items():
        value: Any = params
        for name in ours.split("/"):
            value = value[name]
        value = np.asarray(value)
        state[theirs] = np.ascontiguousarray(value.T if ours.endswith("/kernel") else value)
    if heads is not None:
        head_dim = state["vocab_embed.embedding"].shape[1] // heads
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        state[INVERSE_FREQUENCY] = (
            np.float32(1.0) / np.float32(10_000.0) ** exponents
        )  # in float32, as the reference does
    return state
