"""The reference's PyTorch parameters and ours: the same numbers, under other names and layouts.

PyTorch keeps a linear layer's weight as `[out, in]`, Flax its kernel as `[in, out]`. Nothing else is changed, so a round
trip is exact. Arrays in, arrays out: reading files is left to the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from duo_jax.errors import UserError

# Ours -> the reference's, for one block; "kernel" leaves are transposed on the way.
_BLOCK = {
    "norm1/norm/scale": "norm1.weight",
    "norm2/norm/scale": "norm2.weight",
    "qkv/kernel": "attn_qkv.weight",
    "attn_out/kernel": "attn_out.weight",
    "mlp_in/kernel": "mlp.0.weight",
    "mlp_in/bias": "mlp.0.bias",
    "mlp_out/kernel": "mlp.2.weight",
    "mlp_out/bias": "mlp.2.bias",
    "modulation/linear/kernel": "adaLN_modulation.weight",
    "modulation/linear/bias": "adaLN_modulation.bias",
}
_OUTSIDE = {
    "embed/embedding": "vocab_embed.embedding",
    "time_in/kernel": "sigma_map.mlp.0.weight",
    "time_in/bias": "sigma_map.mlp.0.bias",
    "time_out/kernel": "sigma_map.mlp.2.weight",
    "time_out/bias": "sigma_map.mlp.2.bias",
    "norm_final/norm/scale": "output_layer.norm_final.weight",
    "modulation_final/linear/kernel": "output_layer.adaLN_modulation.weight",
    "modulation_final/linear/bias": "output_layer.adaLN_modulation.bias",
    "head/kernel": "output_layer.linear.weight",
    "head/bias": "output_layer.linear.bias",
}
# A buffer of the reference's, not a parameter: rotary frequencies, which follow from the head size alone.
_INVERSE_FREQUENCY = "rotary_emb.inv_freq"


def _pairs(blocks: int, adaln: bool) -> dict[str, str]:
    """Returns our path -> the reference's key for a whole network."""
    pairs = dict(_OUTSIDE)
    for i in range(blocks):
        pairs |= {f"block_{i}/{ours}": f"blocks.{i}.{theirs}" for ours, theirs in _BLOCK.items()}
    if not adaln:
        pairs = {ours: theirs for ours, theirs in pairs.items() if "modulation" not in ours and "time_" not in ours}
    return pairs


def from_torch(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our nested parameters for the reference's state dict (numpy arrays or CPU tensors).

    Raises:
        UserError: keys that are missing or that no part of the network owns, listed.
    """
    state = {key: np.asarray(value) for key, value in state_dict.items() if key != _INVERSE_FREQUENCY}
    blocks = 1 + max((int(key.split(".")[1]) for key in state if key.startswith("blocks.")), default=-1)
    pairs = _pairs(blocks, adaln="sigma_map.mlp.0.weight" in state)
    missing, extra = sorted(set(pairs.values()) - state.keys()), sorted(state.keys() - set(pairs.values()))
    if not blocks or missing or extra:
        raise UserError(
            f"this is no Duo, MDLM, SEDD or AR state dict: missing {', '.join(missing) or 'no'} keys, "
            f"unknown {', '.join(extra) or 'no'} keys."
        )
    params: dict[str, Any] = {}
    for ours, theirs in pairs.items():
        *path, leaf = ours.split("/")
        node = params
        for name in path:
            node = node.setdefault(name, {})
        node[leaf] = state[theirs].T if leaf == "kernel" else state[theirs]
    return params


def to_torch(params: Mapping[str, Any], *, heads: int) -> dict[str, np.ndarray]:
    """Returns the reference's state dict, as contiguous numpy arrays, for our nested parameters.

    Args:
        params: as `from_torch` returns.
        heads: attention heads, on which the reference's rotary buffer depends.
    """
    blocks = sum(key.startswith("block_") for key in params)
    state = {}
    for ours, theirs in _pairs(blocks, adaln="time_in" in params).items():
        value: Any = params
        for name in ours.split("/"):
            value = value[name]
        value = np.asarray(value)
        state[theirs] = np.ascontiguousarray(value.T if ours.endswith("/kernel") else value)
    head_dim = state["vocab_embed.embedding"].shape[1] // heads
    state[_INVERSE_FREQUENCY] = (10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)).astype(np.float32)
    return state
