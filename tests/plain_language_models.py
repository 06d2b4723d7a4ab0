"""GPT-2 and Llama written out in float64 NumPy from their published definitions, and tiny ones kept in files."""

import json
import math

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from duo_jax.models.language_model import Spec

DIM, BLOCKS, INNER = 24, 2, 20
END = "<|endoftext|>"
GPT2 = Spec("gpt2", heads=4, kv_heads=4, eps=1e-5, context=80)
LLAMA = Spec("llama", heads=4, kv_heads=2, eps=1e-5, context=80, rope_base=500.0)


def weights(spec, vocab, seed=0, head=False):
    """Draws weights in the package's layout, large enough that each part tells in the outcome."""
    rng = np.random.default_rng(seed)

    def normal(*shape, around=0.0):
        return (around + 0.3 * rng.standard_normal(shape)).astype(np.float32)

    def dense(n_in, n_out):
        bias = {"bias": normal(BLOCKS, n_out)} if spec.family == "gpt2" else {}
        return {"kernel": normal(BLOCKS, n_in, n_out), **bias}

    def norm(*shape):
        bias = {"bias": normal(*shape)} if spec.family == "gpt2" else {}
        return {"scale": normal(*shape, around=1.0), **bias}

    kv = DIM * spec.kv_heads // spec.heads
    block = {"norm1": norm(BLOCKS, DIM), "out": dense(DIM, DIM), "norm2": norm(BLOCKS, DIM)}
    if spec.family == "gpt2":
        block |= {"qkv": dense(DIM, 3 * DIM), "mlp_in": dense(DIM, 4 * DIM), "mlp_out": dense(4 * DIM, DIM)}
    else:
        block |= {"q": dense(DIM, DIM), "k": dense(DIM, kv), "v": dense(DIM, kv)}
        block |= {"gate": dense(DIM, INNER), "up": dense(DIM, INNER), "down": dense(INNER, DIM)}
    out = {"embed": normal(vocab, DIM), "blocks": block, "norm": norm(DIM)}
    if spec.family == "gpt2":
        out["positions"] = normal(spec.context, DIM)
    if head:
        out["head"] = normal(vocab, DIM)
    return out


def _dense(x, layer):
    return x @ layer["kernel"] + layer.get("bias", 0.0)


def _layer_norm(x, norm, eps):
    return np.stack([(row - row.mean()) / math.sqrt(row.var() + eps) for row in x]) * norm["scale"] + norm["bias"]


def _rms_norm(x, norm, eps):
    return np.stack([row / math.sqrt(np.mean(row**2) + eps) for row in x]) * norm["scale"]


def _softmax(scores):
    shares = np.exp(scores - scores.max())
    return shares / shares.sum()


def _head(q, k, v):
    """One head: each position looks at itself and those before it."""
    rows = [_softmax(k[: i + 1] @ q[i] / math.sqrt(len(q[i]))) @ v[: i + 1] for i in range(len(q))]
    return np.stack(rows)


def _turned(x, base):
    """Rotary positions: element i and its partner half a head on are one complex number, turned by m * base^(-2i/d)."""
    half = x.shape[1] // 2
    numbers = x[:, :half] + 1j * x[:, half:]
    for m in range(len(x)):
        for i in range(half):
            numbers[m, i] *= np.exp(1j * m * base ** (-2 * i / x.shape[1]))
    return np.concatenate([numbers.real, numbers.imag], axis=1)


def plain_nll(spec, weights, tokens):
    """Returns -log p of each of one text's tokens but the first, `[L-1]`, float64."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), weights)
    x = np.stack([w["embed"][token] for token in tokens])
    size = DIM // spec.heads
    if spec.family == "gpt2":
        x = x + w["positions"][: len(tokens)]
    for n in range(BLOCKS):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], w["blocks"])
        outs = []
        if spec.family == "gpt2":
            qkv = _dense(_layer_norm(x, block["norm1"], spec.eps), block["qkv"])
            for h in range(spec.heads):
                outs.append(_head(*(qkv[:, part * DIM + h * size :][:, :size] for part in range(3))))
            x = x + _dense(np.concatenate(outs, axis=1), block["out"])
            y = _dense(_layer_norm(x, block["norm2"], spec.eps), block["mlp_in"])
            # GELU as GPT-2 has it, with the tanh.
            y = 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + _dense(y, block["mlp_out"])
        else:
            y = _rms_norm(x, block["norm1"], spec.eps)
            q, k, v = (_dense(y, block[name]) for name in ("q", "k", "v"))
            for h in range(spec.heads):
                shared = h // (spec.heads // spec.kv_heads)  # consecutive query heads share a key and a value head
                mine, theirs = slice(h * size, (h + 1) * size), slice(shared * size, (shared + 1) * size)
                turned = _turned(q[:, mine], spec.rope_base), _turned(k[:, theirs], spec.rope_base)
                outs.append(_head(*turned, v[:, theirs]))
            x = x + _dense(np.concatenate(outs, axis=1), block["out"])
            y = _rms_norm(x, block["norm2"], spec.eps)
            gate = _dense(y, block["gate"])
            x = x + _dense(gate / (1 + np.exp(-gate)) * _dense(y, block["up"]), block["down"])
    x = (_layer_norm if spec.family == "gpt2" else _rms_norm)(x, w["norm"], spec.eps)
    logits = x @ w.get("head", w["embed"]).T
    return np.array([-np.log(_softmax(row)[token]) for row, token in zip(logits[:-1], tokens[1:], strict=True)])


def tokenizer():
    """Returns a byte-level BPE of some 300 tokens; 2024 is one of them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["in 2024 the red house by the river was the old house of the town"] * 9, trainer)
    return bpe


def write_gpt2(folder, w, bpe, prefix="", **config):
    """Writes weights as Hugging Face keeps a GPT-2; a Conv1D's weight is `[in, out]`."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    names = {"norm1": "ln_1", "qkv": "attn.c_attn", "out": "attn.c_proj", "norm2": "ln_2"}
    names |= {"mlp_in": "mlp.c_fc", "mlp_out": "mlp.c_proj"}
    tensors = {"wte.weight": w["embed"], "wpe.weight": w["positions"]}
    tensors |= {"ln_f.weight": w["norm"]["scale"], "ln_f.bias": w["norm"]["bias"]}
    for part, name in names.items():
        layer = w["blocks"][part]
        for n in range(BLOCKS):
            tensors[f"h.{n}.{name}.weight"] = layer["kernel" if "kernel" in layer else "scale"][n]
            tensors[f"h.{n}.{name}.bias"] = layer["bias"][n]
    # The files of the hub's GPT-2 hold the causal mask too.
    tensors |= {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 8, 8), np.float32)) for n in range(BLOCKS)}
    save_file({prefix + name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "model.safetensors")
    settings = {"model_type": "gpt2", "n_layer": BLOCKS, "n_head": GPT2.heads, "n_embd": DIM}
    settings |= {"layer_norm_epsilon": GPT2.eps, "n_positions": GPT2.context, **config}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    bpe.save(str(folder / "tokenizer.json"))
    return folder


def write_llama(path, w, bpe, spec=LLAMA, pre="gpt-2", architecture="llama", without=(), extra=(), fields=()):
    """Writes weights as llama.cpp's converter does: `[out, in]`, the two rows of a rotary pair brought side by side.

    What is so without being told is not told: as many key and value heads as others, and the rotary base 10,000.
    """
    import gguf

    def permuted(rows, heads):
        return rows.reshape(heads, 2, rows.shape[0] // heads // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(DIM)
    writer.add_block_count(BLOCKS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(spec.heads)
    if spec.kv_heads != spec.heads:
        writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.eps)
    if spec.rope_base != 10_000:
        writer.add_rope_freq_base(spec.rope_base)
    for key, value in dict(fields).items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
    model = json.loads(bpe.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].get))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    tensors = {"token_embd": w["embed"], "output_norm": w["norm"]["scale"]}
    if "head" in w:
        tensors["output"] = w["head"]
    names = {"v": "attn_v", "out": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for n in range(BLOCKS):
        block = jax.tree.map(lambda leaf, n=n: leaf[n], w["blocks"])
        tensors |= {f"blk.{n}.{name}": block[part]["kernel"].T for part, name in names.items()}
        tensors[f"blk.{n}.attn_q"] = permuted(block["q"]["kernel"].T, spec.heads)
        tensors[f"blk.{n}.attn_k"] = permuted(block["k"]["kernel"].T, spec.kv_heads)
        tensors[f"blk.{n}.attn_norm"] = block["norm1"]["scale"]
        tensors[f"blk.{n}.ffn_norm"] = block["norm2"]["scale"]
    for name, x in tensors.items():
        if name not in without:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(x, np.float32))
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
