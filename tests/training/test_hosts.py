"""Several hosts, as two processes on this machine: training, evaluation, sampling, and starting from a checkpoint."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, make_config, tiny_settings

from duo_jax import hardware, modes
from duo_jax.training import run

HOST = """
import json, sys
import jax
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from duo_jax import hardware, modes
from helpers import make_config
settings, workdir = json.loads(sys.argv[3]), sys.argv[4]
modes.run(make_config(settings), workdir + "/first")
modes.run(make_config({**settings, "mode": "eval"}), workdir + "/first")
modes.run(make_config({**settings, "mode": "sample"}), workdir + "/first")
modes.run(make_config({**settings, "algo.name": "dcd", "init_from": workdir + "/first"}), workdir + "/second")
print(json.dumps({"processes": jax.process_count(), "devices": jax.device_count()}))
"""


def test_the_others_are_told_of_any_error_of_the_host_that_prepares_the_data(monkeypatch):
    told = []
    monkeypatch.setattr(run.jax, "process_count", lambda: 2)
    monkeypatch.setattr(run.multihost_utils, "broadcast_one_to_all", lambda value: told.append(bool(value)) or value)
    monkeypatch.setattr(run.prepare, "prepare", lambda data: {}["nowhere"])
    with pytest.raises(KeyError):
        run.prepared(make_config({}))
    assert told == [True]


def test_all_do_what_the_first_process_sees(monkeypatch):
    """Whether a step was evaluated, say, of which a shared disk may show the others an older state."""
    assert run._first_says(True)
    monkeypatch.setattr(run.jax, "process_count", lambda: 2)
    monkeypatch.setattr(run.multihost_utils, "broadcast_one_to_all", lambda mine: np.logical_not(mine))
    assert (run._first_says(True), run._first_says(False)) == (False, True)


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [
        (80 * 2**30, 79 * 2**30, 79 * 2**30),
        (79 * 2**30, 80 * 2**30, 79 * 2**30),
        (None, 2**30, None),
        (2**30, None, None),
    ],
)
def test_all_compile_for_the_least_memory(monkeypatch, own, others, expected):
    def gather(mine):
        assert mine.dtype == np.int32, "JAX has no wider integers here"
        return np.array([mine, -1 if others is None else others // 2**20])

    monkeypatch.setattr(hardware, "_agreed", None)
    monkeypatch.setattr(hardware, "_own", lambda: hardware.Hardware("gpu", 9.0, own))
    monkeypatch.setattr(hardware.multihost_utils, "process_allgather", gather)
    hardware.agree()
    assert hardware.present().memory == own, "one process has nobody to agree with"
    monkeypatch.setattr(hardware.jax, "process_count", lambda: 2)
    hardware.agree()
    assert hardware.present() == hardware.Hardware("gpu", 9.0, expected)
    monkeypatch.setattr(hardware.multihost_utils, "process_allgather", lambda mine: pytest.fail("asked again"))
    hardware.agree()  # as a run does after the command has: others may be at another point by then


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def losses(workdir):
    """Training losses by step, and the held-out one."""
    rows = read_jsonl(workdir / "metrics.jsonl")
    return [row[name] for name in ("train/loss", "heldout/nll") for row in rows if name in row]


def test_two_processes_train_evaluate_sample_and_distil_together(text_folder, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    settings = {
        **tiny_settings(text_folder),
        "train.steps": 4,
        "train.log_every": 1,
        "eval.every": 0,
        "sample.every": 0,
    }
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, address, str(index), json.dumps(settings), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    try:
        results = [host.communicate(timeout=300) for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    for host, (out, err) in zip(hosts, results, strict=True):
        assert host.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == {"processes": 2, "devices": 2}
    assert "Done: 4 steps" in results[0][0]
    assert "Done:" not in results[1][0], "one process speaks for all"
    evaluated = json.loads((tmp_path / "first" / "eval.json").read_text())
    rows = read_jsonl(tmp_path / "first" / "metrics.jsonl")
    assert evaluated["ppl"] == pytest.approx(rows[-1]["heldout/ppl"], rel=1e-6)
    assert [path.name for path in (tmp_path / "first").glob("samples*.jsonl")] == ["samples.jsonl"]
    assert [len(row["tokens"]) for row in read_jsonl(tmp_path / "first" / "samples.jsonl")] == [32, 32]
    assert (tmp_path / "second" / "checkpoints" / "4").is_dir()
    # One process sees the same batches with the same noise.
    modes.run(make_config(settings), str(tmp_path / "alone"))
    together, alone = losses(tmp_path / "first"), losses(tmp_path / "alone")
    assert len(alone) > 3
    np.testing.assert_allclose(together, alone, rtol=1e-5)
