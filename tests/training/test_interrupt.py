"""Signals: told at once, and an evaluation or a sample is not in their way."""

import hashlib
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from helpers import make_config, trained_settings

from duo_jax import progress
from duo_jax.evaluation import likelihood
from duo_jax.sampling import texts
from duo_jax.training import checkpoint, interrupt, loop, writers


def test_a_signal_is_told_while_something_is_computed(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "say", lambda text: said.append((time.monotonic(), text)))
    with interrupt.Interrupt().watch() as watched:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000)  # no Python, and so no handler of a signal, before its end
        ended = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
    ((told, text),) = said
    assert told < ended
    assert text.startswith("SIGTERM: saves")
    assert watched.number == signal.SIGTERM
    assert watched.alone()


def test_a_second_ctrl_c_means_now():
    with interrupt.Interrupt().watch():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_signals_mean_afterwards_what_they_meant_before():
    def meant():
        wakes = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(wakes)
        return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], wakes

    before = meant()
    with interrupt.Interrupt().watch():
        assert meant() != before
    assert meant() == before


@pytest.mark.parametrize(
    ("own", "others", "expected"),
    [(None, 0, None), (None, signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM, signal.SIGINT)],
)
def test_several_processes_stop_at_one_step(monkeypatch, own, others, expected):
    """Whichever of them got the signal; they ask each other at the same steps, or one would wait for ever."""
    asked = []
    monkeypatch.setattr(interrupt.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        interrupt.multihost_utils, "process_allgather", lambda mine: asked.append(int(mine)) or np.array([mine, others])
    )
    stop = interrupt.Interrupt()
    stop.number = own
    assert [stop.agreed(step, 5) for step in range(1, 5)] == [False] * 4
    assert not asked
    assert stop.agreed(5, 5) == (expected is not None)
    assert asked == [own or 0]
    assert stop.number == expected
    assert not stop.alone(), "a process that has others never stops by itself"


def test_a_signal_after_the_last_step_is_heeded(trained, text_folder, tmp_path, monkeypatch, capsys):
    """While the last checkpoint is written, which may take minutes: what is due at the end is left to the next start."""
    copy, close = tmp_path / "copy", checkpoint.Checkpoints.close
    shutil.copytree(trained, copy)

    def signalled(checkpoints):
        os.kill(os.getpid(), signal.SIGTERM)
        close(checkpoints)

    monkeypatch.setattr(checkpoint.Checkpoints, "close", signalled)
    assert loop.train(make_config(trained_settings(text_folder)), str(copy)) == signal.SIGTERM
    printed = capsys.readouterr().out
    assert "Stopped by SIGTERM at step 20 and saved." in printed
    assert "Done:" not in printed


@pytest.mark.parametrize(("module", "name", "calls"), [(likelihood, "nll_sum", 2), (texts, "sample", 1)])
def test_an_evaluation_or_sample_gives_way(trained, text_folder, tmp_path, monkeypatch, capsys, module, name, calls):
    copy, count, real = tmp_path / "copy", 0, getattr(module, name)
    shutil.copytree(trained, copy)
    rows = len(writers.read_jsonl(copy / "metrics.jsonl"))

    def signalled(*args, **kwargs):
        nonlocal count
        count += 1
        if count == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    settings = {**trained_settings(text_folder), "train.steps": 26, "checkpoint.every": 1000}
    settings |= {"eval.every": 24, "sample.every": 24}
    with monkeypatch.context() as patch:
        patch.setattr(module, name, signalled)
        assert loop.train(make_config(settings), str(copy)) == signal.SIGTERM
    assert count == calls, "the evaluation has four batches"
    assert checkpoint.find(copy)[1] == 24, "saved where it was, not a step further"
    printed = capsys.readouterr().out
    assert printed.count("SIGTERM: saves") == 1
    assert "Stopped by SIGTERM at step 24 and saved." in printed
    evaluated = [row["step"] for row in writers.read_jsonl(copy / "metrics.jsonl")[rows:] if "heldout/ppl" in row]
    assert evaluated == ([] if name == "nll_sum" else [24])
    assert (copy / "samples" / "00000024.txt").exists() == (name == "sample")

    assert loop.train(make_config(settings), str(copy)) is None
    evaluated = [row["step"] for row in writers.read_jsonl(copy / "metrics.jsonl")[rows:] if "heldout/ppl" in row]
    assert evaluated == [24, 26]
    assert capsys.readouterr().out.count("step 24: 4-step sample") == (name == "nll_sum")
    assert (copy / "samples" / "00000024.txt").exists()
