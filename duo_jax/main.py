"""The command line: `python -m duo_jax.main --config=configs/quickstart.py --workdir=DIR [--config.name=value ...]`."""

from __future__ import annotations

from ml_collections import ConfigDict

from duo_jax import cli


def main(config: ConfigDict, workdir: str) -> int | None:
    """Runs the mode `config.mode`; returns the number of the signal that stopped it, or None."""
    from duo_jax import modes  # imported late: its libraries take seconds to load, and a mistyped flag should not wait

    return modes.run(config, workdir)


if __name__ == "__main__":
    cli.run(main, workdir=True)
