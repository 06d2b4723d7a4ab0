"""The model card of an exported network."""

from __future__ import annotations

from duo_jax.models.network import Network

_ALGORITHMS = {
    "duo": "a uniform-state diffusion language model, trained with Duo's curriculum",
    "duo_base": "a uniform-state diffusion language model, trained with its likelihood bound",
    "dcd": "a uniform-state diffusion language model, distilled to few steps with discrete consistency distillation",
    "mdlm": "an absorbing-state (masked) diffusion language model, MDLM",
    "sedd": "an absorbing-state diffusion language model, SEDD",
    "d3pm": "an absorbing-state diffusion language model, D3PM",
    "ar": "an autoregressive language model",
}


def text(net: Network, name: str, step: int) -> str:
    """Returns the card as Markdown; `step` is the training step of the weights, 0 if unknown."""
    article = "a" if net.process == "uniform" else "an"
    about = _ALGORITHMS.get(net.algo, f"{article} {net.process} language model trained with {net.algo}")
    trained = f"\n| training steps | {step:,} |" if step else ""
    return f"""---
library_name: duo_jax
pipeline_tag: text-generation
tags: [diffusion, language-model, {net.algo}]
---

# {name}

This is {about}, in [duo_jax](https://arxiv.org/abs/2506.10892) (The Diffusion Duality).

| | |
|---|---|
| algorithm | `{net.algo}` |
| width, blocks, heads | {net.dim}, {net.blocks}, {net.heads} |
| length | {net.length} tokens |
| vocabulary | {net.vocab_size:,} ids, including the special ones; the tokenizer is in `tokenizer/` |
| noise schedule | `{net.schedule}`, eps {net.eps} |{trained}

```python
import duo_jax
params = duo_jax.load("{name}")
print(duo_jax.sample(params, n_steps=8).text[0])
```

`model.safetensors` holds the parameters with the names and layouts of the PyTorch reference implementation.
To be added by the author: the training data, the scores and the licence.
"""
