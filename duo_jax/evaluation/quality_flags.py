"""The command line of `generate_quality`: its flags, and the checks that are made before anything is read."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from duo_jax import cli, sampling
from duo_jax.data import text_files
from duo_jax.errors import UserError
from duo_jax.evaluation import generative
from duo_jax.evaluation.judged_texts import HELDOUT, NONE
from duo_jax.files import check_folder


def parse(prog: str, description: str) -> argparse.Namespace:
    """Returns the flags of the command line.

    Raises:
        UserError: a network cannot be sampled with them, or results cannot be written.
    """
    parser = cli.Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
    parser.add_argument(
        "--models",
        action="append",
        metavar="NAME=DIR",
        help="a network: a run's workdir, an exported folder, or anything else that duo_jax.load takes, such as quickstart",
    )
    parser.add_argument(
        "--texts",
        action="append",
        metavar="NAME=FILE",
        help="existing texts: a samples.jsonl that mode=sample wrote",
    )
    parser.add_argument(
        "--sampler",
        type=_list(_one_of(sampling.SAMPLERS)),
        default="ancestral",
        help="as duo_jax.sample takes them, comma-separated",
    )
    parser.add_argument(
        "--psi",
        type=_list(str),
        help="kappa modes of the sampler psi, such as constant-0.9; its own default if not given",
    )
    parser.add_argument("--steps", type=_list(_whole(1)), default="1,2,4,8,16,32,64,128", help="steps of the samplers")
    parser.add_argument(
        "--noise_removal",
        type=_list(_one_of(sampling.NOISE_REMOVALS)),
        default="ancestral,greedy",
        help="kinds of the last call",
    )
    parser.add_argument(
        "--seeds", type=_list(_whole(0, 2**32 - 1)), default="0,1,2", help="a set of texts is sampled for each"
    )
    parser.add_argument("--num", type=_whole(1), default=64, help="texts per set")
    parser.add_argument(
        "--length", type=_whole(3), help="tokens per text, BOS and EOS included; the network's own length if not given"
    )
    parser.add_argument("--rows_at_once", type=_whole(1), default=64, help="texts sampled together; bounds the memory")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus; 1 keeps every token")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the predictions")
    parser.add_argument(
        "--heldout",
        metavar="FILE",
        help="text to compare with, a file or folder, or none; the first run's held-out data if not given",
    )
    parser.add_argument(
        "--field", default="text", help="the field of the text in .jsonl and .parquet files of --heldout"
    )
    parser.add_argument("--judge", default="smollm2", help="smollm2, a .gguf file, or GPT-2's folder or hub id")
    parser.add_argument(
        "--protocol",
        choices=generative.PROTOCOLS,
        default=generative.OURS,
        help="reference is that of published figures",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    args = parser.parse_args()
    args.models, args.texts = _named("--models", args.models or []), _named("--texts", args.texts or [])
    _check(args)
    args.out = check_folder(args.out, flag="--out", keep=False)
    return args


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together, or have values that no network can be sampled with."""
    if not args.models and not args.texts:
        raise UserError(
            "--models is missing; name a network, as in --models NAME=DIR, or give texts as --texts NAME=FILE."
        )
    if both := [name for name in args.texts if name in args.models]:
        raise UserError(f"--models and --texts both have {both[0]}; name them apart.")
    if args.psi and "psi" not in args.sampler:
        raise UserError("--psi is of the sampler psi, which --sampler does not have; add it, or leave --psi out.")
    for mode in args.psi or []:
        sampling.as_psi(mode, "psi")
    sampling.check_temperature(args.temperature)
    sampling.uses_nucleus(args.top_p)
    if args.heldout == "":
        raise UserError("--heldout is empty; give a text file or folder, or none.")
    if args.heldout not in (None, NONE):
        path = Path(args.heldout).expanduser()
        files = text_files.list_files(path, setting="--heldout")
        # Read all of them, so that a mistake in the last row shows now, too.
        if not sum(len(text) for file in files for text in text_files.read_rows(file, args.field, setting="--field")):
            raise UserError(f"--heldout={args.heldout} holds no text but white space; give another.")


def _named(flag: str, values: list[str]) -> dict[str, str]:
    named = cli.named(flag, values)
    if HELDOUT in named:
        raise UserError(f"{flag} has {HELDOUT!r}, the name of the text to compare with; give another.")
    return named


def _list(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Returns a reader of comma-separated values, each read by `read`, that refuses duplicates."""

    def read_list(text: str) -> list[Any]:
        values = [read(part) for part in text.split(",")]
        if twice := [value for i, value in enumerate(values) if value in values[:i]]:
            raise argparse.ArgumentTypeError(f"{twice[0]} is given twice; the same texts would count twice")
        return values

    return read_list


def _one_of(choices: Sequence[str]) -> Callable[[str], str]:
    """Returns a reader of one of the choices."""

    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} is unknown; choose from {', '.join(choices)}")
        return text

    return read


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a reader of a whole number from `least` to `most`."""
    allowed = f"at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{value} is not allowed; it must be {allowed}")
        return value

    return read


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults of flags that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
