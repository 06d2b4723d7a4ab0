"""A run small enough for tests: a 20k-parameter network on a few hundred paragraphs of real text."""

import dataclasses
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

from duo_jax import config as config_lib
from duo_jax.data import sources

ROOT = Path(__file__).resolve().parents[1]


def cuda_compiler() -> bool:
    """Whether JAX's compiler for NVIDIA GPUs, of whatever version of CUDA, is installed; the devices need not be here."""
    package = importlib.util.find_spec("jax_plugins")
    places = package.submodule_search_locations if package else []
    return any(found.name.startswith("xla_cuda") for found in pkgutil.iter_modules(places))


def write_text(folder: Path, documents: int = 400) -> Path:
    """Writes some of the wiki's paragraphs as a text source."""
    path = folder / "text.jsonl"
    rows = []
    for _, text in sources.open_source("wiki").documents():
        rows.append(json.dumps({"text": text}))
        if len(rows) == documents:
            break
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def tiny_settings(folder: Path) -> dict:
    """Returns the settings that make a run tiny; `folder` holds `text.jsonl` and takes the shards."""
    return {
        "precision": "float32", "algo.name": "duo_base",
        "model.size": "nano", "model.dim": 32, "model.blocks": 1, "model.heads": 2, "model.cond_dim": 16,
        "model.length": 32, "model.dropout": 0.1,
        "data.source": "text", "data.path": str(folder / "text.jsonl"), "data.dir": str(folder / "shards"),
        "data.tokenizer": "bpe", "data.bpe_size": 300,
        "train.steps": 20, "train.batch_size": 8, "train.lr": 3e-3, "train.warmup": 5, "train.ema": 0.9,
        "train.log_every": 5,
        "eval.every": 10, "eval.batch_size": 16, "eval.batches": 4,
        "sample.every": 10, "sample.n_steps": 4, "sample.batch_size": 2,
        "checkpoint.every": 5,
    }  # fmt: skip


def trained_settings(folder: Path) -> dict:
    """Returns the settings of the fixture `trained`, whose network has two blocks to be told apart."""
    return {**tiny_settings(folder), "model.blocks": 2}


def make_config(settings: dict):
    """Returns a locked config, as the command line would make it."""
    config = config_lib.default()
    config.update_from_flattened_dict(settings)
    return config.lock()


def command(config_file: str, workdir: Path, settings: dict) -> list[str]:
    """Returns the command line of a run."""
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "duo_jax.main", f"--config={config_file}", f"--workdir={workdir}", *flags]


def run(args: list[str], **kwargs) -> subprocess.CompletedProcess:
    """Runs a command in the project's folder, on one CPU device, and returns what it printed."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **kwargs)


def of_algorithm(params, algo):
    """The trained network read as one of another algorithm; an autoregressive one does not look at adaLN's weights."""
    network = params.network
    return params.replace(network=dataclasses.replace(network, algo=algo, mask_id=network.vocab_size - 1))
