"""Converts checkpoints: `python -m duo_jax.convert --from X --to DIR`.

X is a run's workdir, a Lightning `.ckpt`, a state dict (`.pt`, `.bin`, `.safetensors`), a folder from the hub or a hub id.
DIR is created, with model.safetensors, config.json, tokenizer and model card, for `duo_jax.load(DIR)` or `--workdir=DIR`.
`--to FILE.ckpt` writes a Lightning checkpoint for the PyTorch reference instead; this needs PyTorch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from duo_jax import cli, convert


def parser() -> argparse.ArgumentParser:
    """Returns the command's arguments."""
    lines = argparse.RawDescriptionHelpFormatter
    made = cli.Parser(prog="python -m duo_jax.convert", description=__doc__, formatter_class=lines, allow_abbrev=False)
    made.add_argument("--from", dest="source", required=True, metavar="X", help="file, folder, workdir or hub id")
    made.add_argument("--to", required=True, metavar="DIR", help="a new folder, or a new file .ckpt")
    made.add_argument("--algo", help="duo, duo_base, dcd, mdlm, sedd, d3pm or ar, if the file does not say")
    made.add_argument("--heads", type=int, help="attention heads, if the file does not say")
    made.add_argument("--length", type=int, help="length in tokens of the training rows, if the file does not say")
    made.add_argument("--tokenizer", help="gpt2, bert-base-uncased or a tokenizer's folder, if it is not a known one")
    made.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, default=True, help="averaged weights, or the last ones"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, and prints the network's sizes.

    Raises:
        UserError: see `api.load` and `api.export`.
    """
    args = parser().parse_args(argv)

    from duo_jax import api, progress  # imported late: their libraries take seconds to load, and --help should not wait
    from duo_jax.training import checkpoint

    if Path(args.to).suffix != ".ckpt":
        convert.check_new(args.to)  # before minutes of reading
    asked = {name: getattr(args, name) for name in ("algo", "heads", "length", "tokenizer")}
    source, step = args.source, 0
    if (folder := convert.place(source)).is_dir() and checkpoint.is_run(folder):
        run, step = checkpoint.find(folder)
        source = checkpoint.folder_of(run, step)
    elif folder.is_dir():
        step = convert.step(folder)
    params = api.load(source, ema=args.ema, **asked)
    api.export(params, args.to, step=step)
    net = params.network
    progress.say(
        f"{args.to}: {net.algo}, {net.blocks} blocks of width {net.dim} with {net.heads} heads, {net.length} tokens, "
        f"{net.vocab_size} ids."
    )


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
