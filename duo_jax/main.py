"""The command line: `python -m duo_jax.main --config=configs/quickstart.py --workdir=DIR [--config.name=value ...]`."""

from __future__ import annotations

from ml_collections import ConfigDict

from duo_jax import cli


def main(config: ConfigDict, workdir: str) -> int | None:
    """Does what `config.mode` says; returns the number of the signal that stopped it, or None."""
    from duo_jax import modes  # the libraries behind it take seconds, which a mistyped flag need not wait for

    return modes.run(config, workdir)


if __name__ == "__main__":
    cli.run(main, workdir=True)
