"""The modes that `config.mode` chooses from: train, eval, sample."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from duo_jax import api, cli, files, hardware, progress, sampling
from duo_jax import config as config_lib
from duo_jax.data import prepare, text_sets
from duo_jax.data.packing import Store
from duo_jax.data.tokenizer import Tokenizer
from duo_jax.errors import UserError, first_line
from duo_jax.models.network import Network, Params
from duo_jax.training import checkpoint, loop, partition
from duo_jax.training import run as run_lib

# Settings of `config.sample` that `api.sample` takes under the same name.
_SAMPLE_SETTINGS = (
    "n_steps",
    "seed",
    "sampler",
    "noise_removal",
    "top_p",
    "temperature",
    "guidance",
    "early_stop",
    "trajectory",
)
_SHOWN = 4  # texts are printed and replayed

# Fields that only change how the network is computed, or at which times it is evaluated: the config's may differ from the
# checkpoint's.
_COMPUTATION_ONLY = ("precision", "attention", "head_mib", "dropout", "remat", "scan", "eps_t")


def _load(config: ConfigDict, workdir: str) -> tuple[Params, Path, int, dict[str, Any]]:
    """Returns the newest network of a workdir, set to compute as the config says, its run's folder, its step and record.

    Raises:
        UserError: the config describes another network than the checkpoint's.
    """
    home, step = checkpoint.find(workdir)
    params, record = checkpoint.read(checkpoint.folder_of(home, step))
    wanted = Network.from_config(config, params.network.vocab_size, params.network.mask_id)
    same = dataclasses.replace(wanted, **{name: getattr(params.network, name) for name in _COMPUTATION_ONLY})
    if same != params.network:
        have, want = dataclasses.asdict(params.network), dataclasses.asdict(same)
        different = [
            f"{name} is {want[name]}, in the checkpoint {have[name]}" for name in have if have[name] != want[name]
        ]
        was, now = config_lib.flatten(record.get("config", {})), config_lib.flatten(config)
        flags = [
            f"--config.{key}={was[key]}"
            for key in was
            if key.split(".")[0] in ("model", "algo")
            and key.split(".")[-1] not in _COMPUTATION_ONLY
            and was[key] != now.get(key)
        ]
        hint = f" It was trained with {' '.join(flags)}." if flags else ""
        raise UserError(f"the config is not that of the network in {workdir}: {'; '.join(different)}.{hint}")
    return params.replace(network=wanted), home, step, record


def _own_data(config: ConfigDict, record: dict[str, Any]) -> ConfigDict:
    """Returns the config with the data that the run was trained on, unless the command line names other data.

    A recipe may name other data than the run's, and nobody wants to repeat the run's flags. From Python, where there are no
    flags to show what was meant, the config is used as it is.
    """
    overridden = cli.given()
    if overridden is None or "config" not in record:
        return config
    named = {name.removeprefix("data.") for name in overridden if name.startswith("data.")}
    if named - {"workers", "dir"}:  # these say how the data are read, not which data
        return config
    own = config.copy_and_resolve_references().unlock()
    own.data.update({name: value for name, value in record["config"]["data"].items() if name not in named})
    return own.lock()


def _heldout_folder(config: ConfigDict, workdir: str, tokenizer: Tokenizer) -> Path:
    """Returns the folder of shards that a network with this tokenizer is evaluated on.

    Raises:
        UserError: it was made with another tokenizer.
    """
    folder = run_lib.prepared(config)
    if not tokenizer.same_as(prepare.load_tokenizer(folder)):
        raise UserError(
            f"{folder} was made with another tokenizer than the network in {workdir}, so its ids mean other texts; evaluate "
            "with the tokenizer and, for a trained BPE, the data that it was trained with, or give any text as "
            "config.eval.path."
        )
    return folder


def evaluate(config: ConfigDict, workdir: str) -> None:
    """Measures the likelihood of text under the newest checkpoint.

    That of the held-out split is written to `WORKDIR/eval.json`; that of the text at `config.eval.path` is appended to
    `WORKDIR/zero_shot.jsonl`. If the workdir is the folder of a checkpoint, its run's folder is written to.
    """
    params, home, step, record = _load(config, workdir)
    if not config.eval.path:
        config = _own_data(config, record)
    path = home / ("zero_shot.jsonl" if config.eval.path else "eval.json")
    files.check_file(path)
    mesh = partition.create_mesh(config.mesh)
    partition.check_batch(mesh, "eval.batch_size", config.eval.batch_size)
    tokenizer = api.tokenizer_of(params.tokenizer)
    if config.eval.path:
        text: Path | Store = text_sets.read(config.eval, tokenizer, verbose=not jax.process_index())
        levels = {"uniform": float(tokenizer.vocab_size)}
    else:
        text = _heldout_folder(config, workdir, tokenizer)
        levels = run_lib.levels(config, text, tokenizer.vocab_size)
    batches = run_lib.heldout(config, text)
    weights = partition.replicate(params.weights, mesh)
    result = run_lib.measure(weights, params.network, batches, mesh, config.eval.draws)
    if jax.process_index():
        return
    what = f"tokens of {config.eval.path}" if config.eval.path else f"held-out tokens of {config.data.source}"
    progress.say(f"{workdir} at step {step:,}, {result.tokens:,} {what}:")
    progress.say(f"  {run_lib.describe(result, levels)}")
    report = {"step": step} | result.figures() | {f"{name}_ppl": level for name, level in levels.items()}
    report |= {"batch_size": config.eval.batch_size, "draws": config.eval.draws, "eps_t": config.algo.eps_t}
    with files.written(path):
        if config.eval.path:
            about = {key: config.eval[key] for key in ("path", "field", "detokenizer", "document_ends")}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(about | {"packing": config.data.packing} | report) + "\n")
        else:
            report |= {"batches": config.eval.batches}
            report |= {name: config.data[name] for name in ("source", "path", "packing")}
            path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    progress.say(f"  written to {path}")


def _new(folder: Path, stem: str, suffix: str) -> Path:
    """Creates and returns an empty file: the first of STEM.SUFFIX, STEM-2.SUFFIX, ... that does not exist yet.

    Raises:
        UserError: it cannot be written.
    """
    names = itertools.chain([f"{stem}{suffix}"], (f"{stem}-{i}{suffix}" for i in itertools.count(2)))
    while True:
        path = folder / next(names)
        try:
            with files.written(path):
                path.open("x").close()  # so that no other job takes the same
        except UserError as error:
            if not isinstance(error.__cause__, FileExistsError):
                raise
        else:
            return path


def sample(config: ConfigDict, workdir: str) -> None:
    """Samples texts from the newest checkpoint, prints the first few, and writes them to `WORKDIR/samples.jsonl`.

    If that exists, to `samples-2.jsonl` and so on: samples may be hours of work. With `config.sample.trajectory`,
    `samples.html` replays the first few. If the workdir is the folder of a checkpoint, its run's folder is written to.
    """
    params, home, *_ = _load(config, workdir)
    files.check_folder(home)
    sample_config = config.sample
    psi = sampling.Psi.from_config(sample_config)
    number = sample_config.num or sample_config.batch_size
    settings = {name: sample_config[name] for name in _SAMPLE_SETTINGS} | {
        "length": params.network.length if sample_config.length is None else sample_config.length,
        "prompt": sample_config.prompt or None,
        "negative_prompt": sample_config.negative_prompt or None,
        "infill": sample_config.infill or None,
        "stride": sample_config.stride or None,
        "rows_at_once": min(sample_config.batch_size, number),
    }
    mesh = None
    if jax.process_count() > 1:
        mesh = partition.create_mesh(config.mesh)
        params = params.replace(weights=partition.replicate(params.weights, mesh))
    about = settings | {"psi": psi and dataclasses.asdict(psi)}
    path = home / "samples.jsonl" if jax.process_index() else _new(home, "samples", ".jsonl")
    done = 0

    def show_and_write(batch: api.Samples) -> None:
        """Prints the first texts and appends each batch to the file, so that a killed job keeps what it had."""
        nonlocal done
        if jax.process_index():
            return
        for text, entropy in itertools.islice(zip(batch.text, batch.entropy, strict=True), max(_SHOWN - done, 0)):
            done += 1
            progress.say(f"--- {done} (unigram entropy {entropy:.2f} nats) ---\n{text}\n")
        with files.written(path), path.open("a", encoding="utf-8") as file:
            for i, (text, entropy) in enumerate(zip(batch.text, batch.entropy, strict=True)):
                row = {"text": text, "entropy": float(entropy), "network_calls": batch.network_calls, **about}
                row["tokens"] = batch.tokens[i].tolist()
                if batch.trajectory is not None:
                    row["trajectory"] = batch.trajectory[:, i].tolist()
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    try:
        result = api.sample(
            params,
            batch_size=number,
            psi=psi,
            progress=not jax.process_index(),
            mesh=mesh,
            each=show_and_write,
            **settings,
        )
    finally:
        if not jax.process_index() and not path.stat().st_size:
            path.unlink()  # no text was sampled
    if jax.process_index():
        return
    shown = f" (the first {_SHOWN} above)" if len(result.text) > _SHOWN else ""
    progress.say(f"{len(result.text)} texts{shown} in {result.network_calls} network calls a batch; written to {path}.")
    if result.trajectory is not None:
        page = _new(home, path.stem, ".html")
        api.replay(params, dataclasses.replace(result, trajectory=result.trajectory[:, :_SHOWN]), page)
        progress.say(f"Open {page} in a browser to see how they came about.")


MODES = {"train": loop.train, "eval": evaluate, "sample": sample}


def _place() -> dict[str, int]:
    """Returns the number of processes and the index of this one, where the environment gives them.

    JAX finds both by itself under SLURM, Open MPI and on TPU pods, and needs them elsewhere; it reads the coordinator's
    address itself.

    Raises:
        UserError: a value is not a whole number.
    """
    place = {}
    for name in ("num_processes", "process_id"):
        variable = f"JAX_{name.upper()}"
        if (value := os.environ.get(variable)) is not None:
            if not value.isdecimal():
                raise UserError(f"{variable} is {value!r}; it must be a whole number.")
            place[name] = int(value)
    return place


def run(config: ConfigDict, workdir: str) -> int | None:
    """Does what `config.mode` says, on all hosts if `config.distributed`.

    Returns:
        the number of the signal that stopped a training run, or None if it finished.
    """
    if config.distributed:
        place = _place()
        try:
            jax.distributed.initialize(**place)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"config.distributed is set, but the hosts did not find each other: {first_line(error)} Start it "
                "under SLURM, Open MPI or on a TPU pod, or set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID; or leave it out on a single host."
            ) from error
    hardware.agree()
    return MODES[config.mode](config, str(Path(workdir).expanduser()))
