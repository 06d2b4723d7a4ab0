"""Duo on OpenWebText: the paper's main run (170M parameters, 1M steps of 512 x 1024 tokens).

    python -m duo_jax.main --config=configs/owt.py --workdir=runs/owt

Needs the text: `pip install -e .[hub]` and the data set's download, or a local copy at --config.data.path.
Hardware: the paper used 8 H100. Score to expect after 1M steps: held-out PPL 25.2, as published; not run here.
"""

from ml_collections import ConfigDict

from duo_jax import config as base


def get_config() -> ConfigDict:
    """Returns the paper's recipe, which is `default()`, on OpenWebText."""
    config = base.default()
    config.data.source = "openwebtext"
    config.data.tokenizer = "gpt2"
    # For GPT-2's 50,258 ids, gamma from -3.55 to -1.85, the paper's range; for other tokenizers, the same range of alpha.
    config.algo.alpha_max, config.algo.alpha_min = 0.94547, 0.049317
    return config
