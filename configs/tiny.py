"""A 34M-parameter Duo for one T4 or another small GPU: tiny, length 512, batch 8, lr 5e-4, on OpenWebText.

    python -m duo_jax.main --config=configs/tiny.py --workdir=runs/tiny

Any text will do: `--config.data.source=wiki` needs no download, and `--config.data.source=text
--config.data.path=FOLDER` takes your own files.
Score to expect: a run of this size and recipe on a subset of OpenWebText was reported at BPD 7.57, NLL 5.24, PPL 189 in
another implementation; not run here.
"""

from ml_collections import ConfigDict

from configs import owt


def get_config() -> ConfigDict:
    """Returns the reduced recipe."""
    config = owt.get_config()
    config.model.size = "tiny"
    config.model.length = 512
    config.algo.curriculum.end = 25_000
    config.train.steps = 50_000
    config.train.batch_size = 8
    config.train.lr = 5e-4
    config.eval.every = 2_500
    config.eval.batch_size = 8
    config.eval.batches = 128
    config.sample.every = 5_000
    config.checkpoint.every = 1_000
    return config
