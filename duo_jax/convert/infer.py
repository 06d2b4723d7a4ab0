"""Infers a network from its file: sizes from the arrays' shapes, the rest from its config or from the caller."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from duo_jax.config import ALGORITHMS
from duo_jax.convert.arrays import INVERSE_FREQUENCY
from duo_jax.errors import UserError
from duo_jax.models.network import SIZES, Network

# Number of ids, including the special ones -> the tokenizer of the released models and its mask id.
_TOKENIZERS = {50258: ("gpt2", 50257), 30522: ("bert-base-uncased", 103)}
# The reference's and the hub's names for algorithms -> ours.
_ALGORITHMS = {name: name for name in ALGORITHMS} | {
    "distillation": "dcd",
    "duo-distilled": "dcd",
    "d3pm-absorb": "d3pm",
}
# Whether our networks are conditioned on the noise level, for kinds whose files state it.
_TIME_CONDITIONING = {"mdlm": False, "duo": True, "duo-distilled": True, "distillation": True, "duo_base": True}
_SCHEDULES = {"log-linear": "log_linear", "loglinear": "log_linear", "cosine": "cosine"}


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def facts(config: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Returns the facts that a `config.json` or the reference's config states; others are absent.

    Args:
        config: in the flat layout of MDLM and Duo (`n_heads`, `model_length`) or the nested one of the reference and SEDD.
        name: the hub id or the file's name, which distinguishes a distilled Duo from a plain one.

    Raises:
        UserError: it describes a network or process that is not implemented here.
    """
    inside = {key: value if isinstance(value, Mapping) else {} for key, value in config.items()}
    model, algo, graph, noise = (inside.get(key, {}) for key in ("model", "algo", "graph", "noise"))
    if graph.get("type") == "uniform":
        raise UserError("this is a SEDD with a uniform graph; only absorbing ones can be used here.")
    kind = _first(algo.get("name"), config.get("model_type"), "sedd" if graph.get("type") == "absorb" else None)
    kind = str(kind).lower() if kind is not None else None  # the released Duo says DUO
    if kind == "duo" and "distil" in name.lower():
        kind = "duo-distilled"
    if noise.get("type") is not None and str(noise["type"]) not in _SCHEDULES:
        raise UserError(f"the file's noise schedule is {noise['type']}; only log-linear and cosine can be used here.")
    if model.get("scale_by_sigma") is False and kind == "sedd":
        raise UserError("this SEDD does not scale its score by sigma; only those that do can be used here.")
    timed = _first(config.get("time_conditioning"), algo.get("time_conditioning"))
    if isinstance(timed, bool) and kind in _TIME_CONDITIONING and timed != _TIME_CONDITIONING[kind]:
        raise UserError(
            f"this {kind} has time_conditioning={timed}; only networks with time_conditioning={not timed} can be used here."
        )
    found = {
        "algo": _ALGORITHMS.get(kind),
        "unknown_algo": kind if kind not in _ALGORITHMS else None,
        "heads": _first(config.get("n_heads"), model.get("n_heads")),
        "length": _first(config.get("model_length"), model.get("length")),
        "dropout": _first(config.get("dropout"), model.get("dropout")),
        "schedule": _SCHEDULES.get(str(noise.get("type"))),
        "eps": noise.get("eps"),
    }
    numbers = {"heads": int, "length": int, "dropout": (int, float), "eps": (int, float)}
    return {
        key: value
        for key, value in found.items()
        if value is not None and (key not in numbers or isinstance(value, numbers[key]))
    }


def _tokenizer(vocab_size: int, asked: str | None) -> tuple[str, int]:
    """Returns the tokenizer's name or folder, and its mask id."""
    if asked is None:
        if vocab_size not in _TOKENIZERS:
            raise UserError(
                f"the network has {vocab_size} ids, which fits no known tokenizer; give its folder as --tokenizer (in "
                "Python: tokenizer=)."
            )
        return _TOKENIZERS[vocab_size]
    sizes = {name: (size, mask_id) for size, (name, mask_id) in _TOKENIZERS.items()}
    if asked in sizes:
        size, mask_id = sizes[asked]
    else:
        try:
            folder = Path(asked).expanduser()
            about = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            size, mask_id = int(about["vocab_size"]), int(about["mask_id"])
        except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"there is no tokenizer {asked!r}; give {', '.join(sizes)}, or the folder `tokenizer` of a workdir."
            ) from error
    if size != vocab_size:
        raise UserError(f"the tokenizer {asked} has {size} ids, but the network {vocab_size}.")
    return asked if asked in sizes else str(folder), mask_id


def _heads(state: Mapping[str, Any], dim: int, blocks: int, stated: int | None, asked: int | None) -> int:
    """Returns the number of heads: from the rotary buffer, else the caller, the file's config or the usual sizes."""
    buffer = state.get(INVERSE_FREQUENCY)
    if buffer is not None and buffer.size and dim % (2 * buffer.size):
        raise UserError(f"the file's {buffer.size} rotary frequencies do not fit a network of width {dim}.")
    usual = next((size[2] for size in SIZES.values() if size[:2] == (dim, blocks)), None)
    heads = _first(dim // (2 * buffer.size) if buffer is not None and buffer.size else None, asked, stated, usual)
    if heads is None:
        raise UserError(f"{blocks} blocks of width {dim} are not a usual size; give the number of --heads.")
    if asked is not None and asked != heads:
        raise UserError(f"--heads is {asked}, but the file's rotary frequencies belong to {heads} heads.")
    if heads < 1 or dim % (2 * heads):
        raise UserError(f"a width of {dim} cannot be split into {heads} heads of an even size; give the right --heads.")
    return heads


def network(state: Mapping[str, Any], stated: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[Network, str]:
    """Returns the network of a state dict in the reference's layout, and its tokenizer.

    Args:
        state: {the reference's key, without prefix: array}, known to be complete (see `arrays.from_torch`).
        stated: what `facts` returned.
        asked: what the caller gave: `algo`, `heads`, `length`, `tokenizer`, each of which may be None.

    Raises:
        UserError: a fact can neither be inferred nor was given, or a given one is impossible.
    """
    vocab_size, dim = state["vocab_embed.embedding"].shape
    blocks = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    causal = "sigma_map.mlp.0.weight" not in state
    algo = _first(asked.get("algo"), stated.get("algo"), "ar" if causal else None)
    if algo is None:
        unknown = stated.get("unknown_algo")
        which = f"names an unknown algorithm, {unknown!r}" if unknown else "does not name its algorithm"
        raise UserError(
            f"the file {which}; give --algo (in Python: algo=), one of "
            f"{', '.join(name for name in ALGORITHMS if name != 'ar')}."
        )
    if algo not in ALGORITHMS:
        raise UserError(f"--algo is {algo!r}; choose one of {', '.join(ALGORITHMS)}.")
    if (algo == "ar") != causal:
        has = "no noise level among its inputs, so it is autoregressive" if causal else "a noise level among its inputs"
        raise UserError(f"the algorithm was given as {algo}, but the network has {has}; give the right --algo.")
    length = _first(asked.get("length"), stated.get("length"))
    if length is not None and length < 3:
        raise UserError(f"a length of {length} tokens is too small; give the right --length (in Python: length=).")
    if length is None:
        raise UserError("the file does not state the network's length in tokens; give --length (in Python: length=).")
    tokenizer, mask_id = _tokenizer(vocab_size, asked.get("tokenizer"))
    more = {key: stated[key] for key in ("schedule", "eps") if key in stated}
    return Network(
        algo=algo,
        vocab_size=vocab_size,
        mask_id=mask_id,
        length=length,
        dim=dim,
        blocks=blocks,
        heads=_heads(state, dim, blocks, stated.get("heads"), asked.get("heads")),
        cond_dim=SIZES["small"][3] if causal else state["sigma_map.mlp.0.weight"].shape[0],
        dropout=stated.get("dropout", 0.1),
        **more,
    ), tokenizer
