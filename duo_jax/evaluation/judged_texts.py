"""The texts that `generate_quality` judges: their networks, the text to compare with, and sets that exist already."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from duo_jax import progress
from duo_jax.errors import UserError

NONE = "none"  # of --heldout: compare with no text
HELDOUT = "held-out text"  # the name of the set to compare with


class Model(NamedTuple):
    """A network whose texts are judged.

    Attributes:
        params: the network.
        checkpoint: its place and step, which identify it.
        settings: the config of its run; None if it belongs to no run.
    """

    params: Any
    checkpoint: str
    settings: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class TextSet:
    """A set of texts that is not sampled here.

    Attributes:
        about: what identifies it in the results.
        load: returns its rows `[B, L]` and their tokenizer.
    """

    about: dict[str, Any]
    load: Callable[[], tuple[Any, Any]]


def opened(path_or_name: str) -> Model:
    """Returns the network of anything that `duo_jax.load` takes."""
    from duo_jax import api, convert
    from duo_jax.training import checkpoint

    path = convert.place(path_or_name)
    if path.is_dir() and checkpoint.is_run(path):
        run, step = checkpoint.find(path)
        # Read the step that was found, even if the run adds a newer one in the meantime.
        params, record = checkpoint.read(checkpoint.folder_of(run, step))
        return Model(params, f"{run} at step {step:,}", record.get("config"))
    params = api.load(path_or_name)
    if path.is_dir():
        return Model(params, f"{path.resolve()} at step {convert.step(path):,}", None)
    return Model(params, identity(path) if path.is_file() else path_or_name, None)


def identity(path: Path) -> str:
    """Returns a file's or folder's path and a hash of what it holds."""
    from duo_jax.data import text_files

    path = path.resolve()
    files = [path] if path.is_file() else text_files.list_files(path)
    return f"{path} ({text_files.fingerprint(files, path)[:12]})"


def own_length(args: argparse.Namespace, network: Any) -> int | None:
    """Returns `--length`, or None if it is not given or is the network's own."""
    return None if args.length == network.length else args.length


def heldout(settings: dict[str, Any], num: int, length: int | None = None) -> tuple[Any, Any]:
    """Returns `num` held-out rows of the data that a run with these settings uses, `[B, L]`, and their tokenizer.

    They are as long as the run's rows, or as `length` says.
    """
    from ml_collections import ConfigDict

    from duo_jax.data import prepare
    from duo_jax.training import run as run_lib

    config = ConfigDict(settings)
    config.eval.batch_size, config.eval.batches = num, 1
    config.model.length = length or config.model.length
    folder = run_lib.prepared(config)
    return first_rows(run_lib.heldout(config, folder), folder, num), prepare.load_tokenizer(folder)


def heldout_of(path: Path, field: str, tokenizer: Any, packing: str, num: int, length: int) -> tuple[Any, Any]:
    """Returns the first `num` rows of a text, `[B, L]`, cut by a tokenizer, and the tokenizer."""
    from duo_jax import config as config_lib
    from duo_jax.data import pipeline, text_sets

    text = config_lib.default().eval
    text.path, text.field = str(path), field
    batches = pipeline.heldout_batches(
        text_sets.read(text, tokenizer),
        length=length,
        batch_size=num,
        packing=packing,
        max_batches=1,
    )
    return first_rows(batches, path, num), tokenizer


def first_rows(batches: Iterable[dict[str, Any]], source: Path, num: int) -> Any:
    """Returns the tokens of the first batch's rows that are not padding; says if they are fewer than `num`."""
    batch = next(iter(batches))
    whole = batch["mask"].any(axis=1)
    if whole.sum() < num:
        progress.say(
            f"{source} has {whole.sum()} held-out rows, so the figures of real text are of these, not of {num}."
        )
    return batch["tokens"][whole]


def written(path: Path, models: dict[str, Model], num: int) -> tuple[Any, Any]:
    """Returns the first `num` rows of a file as `mode=sample` writes it, `[B, L]`, and their tokenizer.

    The tokenizer is the one beside the file or a network's: the first that decodes the tokens to the file's texts.

    Raises:
        UserError: the file is of another kind, or no tokenizer fits.
    """
    import numpy as np

    from duo_jax import api
    from duo_jax.training import checkpoint

    try:
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in itertools.islice(lines, num)]
        texts, tokens = [row["text"] for row in rows], np.array([row["tokens"] for row in rows], np.int32)
        if tokens.ndim != 2:
            raise ValueError("it is empty, or tokens is not a list")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        reason = f"there is no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"--texts: {path} is not a samples.jsonl as mode=sample writes it, with `text` and equally many `tokens` in "
            f"each row: {reason}."
        ) from error
    if len(rows) < num:
        progress.say(f"{path} has {len(rows)} texts, so its figures are of these, not of {num}.")

    def fits(tokenizer: Any) -> bool:
        try:
            return all(tokenizer.decode(row) == text for row, text in zip(tokens, texts, strict=True))
        except UserError:  # an id is not in its vocabulary
            return False

    beside = path.resolve().parent / checkpoint.TOKENIZER
    places = [str(beside)] if beside.is_dir() else []
    for place in [*places, *(model.params.tokenizer for model in models.values())]:
        if fits(tokenizer := api.tokenizer_of(place)):
            return tokens, tokenizer
    raise UserError(
        f"--texts: no tokenizer at hand decodes the tokens of {path} to its texts; leave it in the folder that "
        f"mode=sample wrote it to, beside {checkpoint.TOKENIZER}/, or name that network among --models."
    )


def already_written(args: argparse.Namespace, models: dict[str, Model]) -> dict[str, TextSet]:
    """Returns the sets of `--texts`, by name."""
    text_sets = {}
    for name, file in args.texts.items():
        path = Path(file).expanduser()
        found = written(path, models, args.num)
        about = {"checkpoint": identity(path), "length": found[0].shape[1], "num": len(found[0])}
        text_sets[name] = TextSet(about, lambda found=found: found)
    return text_sets


def reference(args: argparse.Namespace, models: dict[str, Model], text_sets: dict[str, TextSet]) -> TextSet | None:
    """Returns the set of texts to compare with; None if none is wanted.

    Raises:
        UserError: no text is given, and no network belongs to a run whose data could be used.
    """
    from duo_jax import api
    from duo_jax.data import text_files

    if args.heldout == NONE:
        return None
    if args.heldout is None:
        run = next((model for model in models.values() if model.settings is not None), None)
        if run is None:
            raise UserError(
                "the text to compare with is by default a run's held-out data, but none of --models is a run: add one, or "
                "give a text file or folder as --heldout, or --heldout=none to do without."
            )
        about = {"checkpoint": run.checkpoint, "length": own_length(args, run.params.network)}
        return TextSet(about, functools.partial(heldout, run.settings, args.num, args.length))
    path, packing = Path(args.heldout).expanduser(), "packed"
    if models:
        first = next(iter(models.values()))
        about = {"checkpoint": first.checkpoint, "length": own_length(args, first.params.network)}
        tokenizer, length = api.tokenizer_of(first.params.tokenizer), first.params.network.length
        packing = first.settings["data"]["packing"] if first.settings else packing
    else:
        like = next(iter(text_sets.values()))
        (_, tokenizer), length = like.load(), like.about["length"]
        about = {"checkpoint": like.about["checkpoint"], "length": args.length or length}
    load = functools.partial(heldout_of, path, args.field, tokenizer, packing, args.num, args.length or length)
    field = {} if args.field == text_files.FIELD else {"field": args.field}
    return TextSet(about | {"text": identity(path)} | field, load)
