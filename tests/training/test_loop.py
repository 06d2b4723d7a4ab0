"""The loop: what a run leaves behind, and that a killed run ends where one that was never killed does, bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT, command, make_config, run, tiny_settings, trained_settings

import duo_jax
from duo_jax import progress
from duo_jax.data import pipeline, prepare
from duo_jax.errors import UserError
from duo_jax.evaluation import likelihood, plots
from duo_jax.training import checkpoint, loop, writers
from duo_jax.training import run as run_lib


def leaves(workdir, step):
    """Every array of a checkpoint."""
    items = []
    for item in ("params", "ema", "rest"):
        with ocp.StandardCheckpointer() as reader:
            items.append(reader.restore(workdir / "checkpoints" / str(step) / item))
    return jax.tree.leaves_with_path(items)


def assert_same_state(a, b, step):
    first, second = leaves(a, step), leaves(b, step)
    assert len(first) == len(second) > 50
    for (path, x), (_, y) in zip(first, second, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=str(path))


def test_a_run_leaves_what_it_promises(trained):
    rows = writers.read_jsonl(trained / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[-1] < losses[0]
    assert {row["step"] for row in rows if "heldout/ppl" in row} == {10, 20}
    last = rows[-1]
    assert last["heldout/uniform_ppl"] == 300
    assert last["heldout/ppl"] == pytest.approx(np.exp(last["heldout/nll"]))
    assert last["heldout/bpd"] == pytest.approx(last["heldout/nll"] / np.log(2))
    assert 20 < last["heldout/unigram_ppl"] < 250
    assert {path.name for path in (trained / "samples").iterdir()} == {"00000010.txt", "00000020.txt"}
    assert (trained / "perplexity.png").read_bytes()[:4] == b"\x89PNG"
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    assert json.loads((trained / "config.json").read_text())["train"]["steps"] == 20
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["15", "20"]
    record = checkpoint.read(trained)[1]
    assert record["network"]["vocab_size"] == 300


@pytest.mark.parametrize(("algo", "given"), [("duo_base", 0), ("ar", 1)])
def test_token_frequencies_are_judged_on_the_tokens_that_a_network_predicts(trained, text_folder, algo, given):
    config = make_config({**trained_settings(text_folder), "algo.name": algo})
    folder = prepare.shards_folder(config.data)
    share = np.log1p(pipeline.unigram_counts(folder, 32)) - np.log(np.sum(1 + pipeline.unigram_counts(folder, 32)))
    asked = {"length": 32, "batch_size": config.eval.batch_size, "max_batches": config.eval.batches}
    tokens = np.concatenate([batch["tokens"][:, given:].ravel() for batch in pipeline.heldout_batches(folder, **asked)])
    expected = {"unigram": np.exp(-np.mean(share[tokens])), "uniform": 300}
    assert run_lib.levels(config, folder, 300) == pytest.approx(expected, rel=1e-6)


def test_one_compilation_and_a_falling_loss(text_folder, tmp_path):
    config = make_config({**tiny_settings(text_folder), "train.steps": 60, "eval.every": 0, "sample.every": 0})
    with loop.Run.open(config, str(tmp_path)) as run_:
        initial, step, _ = loop.compile_step(config, run_.network, run_.mesh)
        state = initial()
        donated = state.params["head"]["kernel"]
        losses = []
        for _ in range(60):
            state, metrics = step(state, loop.partition.put(next(run_.batches), run_.mesh))
            losses.append(float(metrics["loss"]))
    assert step._cache_size() == 1
    assert donated.is_deleted()
    assert np.mean(losses[-10:]) < 0.97 * np.mean(losses[:10])


def test_killed_in_the_middle_a_run_ends_as_if_it_never_was(text_folder, tmp_path):
    # The prefix of the longer run equals the shorter one, as nothing but the end depends on the number of steps.
    settings = {
        **tiny_settings(text_folder),
        "eval.every": 0,
        "sample.every": 0,
        "train.steps": 300,
        "checkpoint.every": 20,
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    loop.train(make_config(settings), str(whole))

    args = command("configs/quickstart.py", killed, settings)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints").is_dir() or not ocp.utils.checkpoint_steps(killed / "checkpoints"):
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(ocp.utils.checkpoint_steps(killed / "checkpoints"))
    assert reached < 300, "the run had ended before it could be killed"

    result = run(args)
    assert result.returncode == 0, result.stderr
    assert f"Resuming from the checkpoint of step {reached}" in result.stdout
    assert_same_state(whole, killed, 300)
    steps = [row["step"] for row in writers.read_jsonl(killed / "metrics.jsonl") if "train/loss" in row]
    assert steps == sorted(set(steps)), "steps that were taken twice are recorded once"


def test_sigterm_saves_and_leaves_in_good_order(text_folder, tmp_path):
    settings = {**tiny_settings(text_folder), "train.steps": 100_000, "checkpoint.every": 100_000, "eval.every": 0}
    args = command("configs/quickstart.py", tmp_path, {**settings, "sample.every": 0, "train.log_every": 1})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        args, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(writers.read_jsonl(tmp_path / "metrics.jsonl")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "Stopped by SIGTERM at step" in out
    assert out.count("SIGTERM: saves") == 1
    assert "Traceback" not in err
    assert not re.search(r"^I\d{4} ", err, re.MULTILINE), "Orbax's notes on every file that it writes are not shown"
    saved = checkpoint.find(tmp_path)[1]
    assert f"step {saved:,}" in out
    # The last step that was logged is at most the one before the one saved.
    assert max(row["step"] for row in writers.read_jsonl(tmp_path / "metrics.jsonl")) <= saved


def test_another_runs_checkpoint_is_refused(trained, text_folder):
    settings = {**tiny_settings(text_folder), "model.dim": 64, "train.ema": 0.5}
    with pytest.raises(UserError, match=r"model\.dim was 32, is 64; config\.train\.ema was 0\.9, is 0\.5"):
        loop.train(make_config(settings), str(trained))


def test_a_finished_run_reports_again_and_changes_nothing(trained, text_folder, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    # It saves nothing, so that it needs no room on the disk.
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    loop.train(make_config(trained_settings(text_folder)), str(copy))
    out = capsys.readouterr().out
    assert "No steps are left: the run is at step 20, and config.train.steps is 20." in out
    assert "Done: 20 steps, 0 of them now" in out
    assert "tokens/s" not in out, "no steps have no rate"
    assert_same_state(trained, copy, 20)
    assert (copy / "metrics.jsonl").read_text() == (trained / "metrics.jsonl").read_text()


def test_a_finished_run_evaluated_on_other_batches_records_it(trained, text_folder, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "perplexity", lambda path, heldout, *_: drawn.append(heldout))
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    for _ in range(2):  # the second time nothing is new
        loop.train(make_config({**trained_settings(text_folder), "eval.batches": 2}), str(copy))
    rows = [row for row in writers.read_jsonl(copy / "metrics.jsonl") if "heldout/ppl" in row]
    assert [row["step"] for row in rows] == [10, 20, 20]
    assert rows[2]["heldout/tokens"] < rows[1]["heldout/tokens"]
    assert f"PPL {rows[2]['heldout/ppl']:.2f}" in capsys.readouterr().out
    assert drawn == [[(10, rows[0]["heldout/ppl"]), (20, rows[2]["heldout/ppl"])]] * 2


def test_the_learning_rate_may_change_on_resuming(trained, text_folder, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    settings = {**trained_settings(text_folder), "train.steps": 22, "train.lr": 1e-3, "train.warmup": 2}
    loop.train(make_config(settings), str(copy))
    printed = capsys.readouterr().out
    assert "config.train.lr changes from 0.003 to 0.001 at this step." in printed
    assert "config.train.warmup changes from 5 to 2 at this step." in printed
    loop.train(make_config({**settings, "train.steps": 23}), str(copy))
    assert "changes from" not in capsys.readouterr().out


def test_texts_that_cannot_be_sampled_are_refused_before_training(text_folder, tmp_path):
    settings = {**tiny_settings(text_folder), "sample.length": 40, "sample.stride": 31}
    with pytest.raises(UserError, match="stride is 31; it must be from 1 to 30"):
        loop.train(make_config(settings), str(tmp_path))
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="stride is for texts longer than"):
        loop.train(make_config({**settings, "sample.length": 20}), str(tmp_path))


def test_how_an_autoregressive_run_samples(text_folder, tmp_path):
    settings = {**tiny_settings(text_folder), "algo.name": "ar"}
    with pytest.raises(UserError, match=r"config\.sample\.length is 1, .* set it to 2 or more"):
        loop.train(make_config({**settings, "sample.length": 1}), str(tmp_path))
    with pytest.raises(UserError, match="infill holds tokens after a gap"):
        loop.train(make_config({**settings, "sample.infill": "The ___"}), str(tmp_path))
    for prompt in ("", "The"):
        with loop.Run.open(make_config({**settings, "sample.prompt": prompt}), str(tmp_path)) as run_:
            tokens, held = run_.sampler()[1]
        assert tokens[held].tolist() == [run_.tokenizer.bos_id, *run_.tokenizer.encode(prompt)] * len(tokens)


def test_all_that_is_asked_reaches_the_sampler_of_a_run(text_folder, tmp_path, monkeypatch):
    asked = {"sample.top_p": 0.9, "sample.temperature": 0.7, "sample.seed": 5, "sample.stride": 8, "sample.length": 50}
    seen = []

    def sample(ema, network, settings, origins, known, **others):
        seen.append((settings.nucleus, origins.tolist(), known[0].shape, others))
        raise KeyboardInterrupt

    monkeypatch.setattr(run_lib.sampling.texts, "sample", sample)
    config = make_config({**tiny_settings(text_folder), **asked})
    with loop.Run.open(config, str(tmp_path)) as run_, pytest.raises(KeyboardInterrupt):
        run_.sample(1, {})
    ((nucleus, origins, shape, others),) = seen
    assert (nucleus, origins, shape) == (True, [[5, 0], [5, 1]], (2, 50))
    assert (others["knobs"].top_p, others["knobs"].temperature, others["stride"]) == (0.9, 0.7, 8)
    assert others["bos_id"] == run_.tokenizer.bos_id


def test_the_end_of_a_curriculum_is_marked_where_there_is_one(text_folder, tmp_path, monkeypatch):
    marks = []
    monkeypatch.setattr(plots, "perplexity", lambda *args: marks.append(args[-1]))
    for name in ("duo", "mdlm"):
        settings = {**tiny_settings(text_folder), "algo.name": name, "algo.curriculum.end": 1, "train.steps": 2}
        loop.train(make_config({**settings, "eval.every": 0, "sample.every": 0}), str(tmp_path / name))
    assert marks == [{"end of the curriculum": 1}, {}]


def test_what_takes_long_is_shown(trained, text_folder, tmp_path, monkeypatch):
    shown, passing = [], progress.passing
    monkeypatch.setattr(progress, "passing", lambda *args, **kwargs: shown.append(args[2]) or passing(*args, **kwargs))
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    loop.train(make_config(trained_settings(text_folder)), str(copy))
    assert shown == ["counting tokens", "reading held-out rows", "evaluating"]


def test_what_was_due_with_the_last_checkpoint_is_done_on_resuming(trained, text_folder, tmp_path):
    # As if the run had been killed after the checkpoint of step 20, before the evaluation due then.
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    rows = writers.read_jsonl(copy / "metrics.jsonl")
    kept = [row for row in rows if not (row["step"] == 20 and "heldout/ppl" in row)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    lost = copy / "samples" / "00000024.txt"  # of steps after that checkpoint, which are taken anew
    lost.write_text("other weights wrote this")
    notes = copy / "samples" / "notes.txt"
    notes.write_text("somebody's own")
    loop.train(make_config({**trained_settings(text_folder), "train.steps": 25}), str(copy))
    assert not lost.exists()
    assert notes.exists()
    assert [row["step"] for row in writers.read_jsonl(copy / "metrics.jsonl") if "heldout/ppl" in row] == [10, 20, 25]


def test_figures_whose_error_is_unknown_are_told_without_one():
    told = run_lib.describe(likelihood.Likelihood(np.log(50), 1000), {"uniform": 300.0})
    assert told == "PPL 50.00 (NLL 3.9120 nats/token, BPD 5.6439; uniform 300.0)"


class Loss:
    """A metric on a device, which notes when it is waited for."""

    def __init__(self, value, waited_for):
        self.value, self.waited_for = value, waited_for

    def block_until_ready(self):
        self.waited_for.append(self.value)

    def __float__(self):
        return float(self.value)


def test_the_device_has_one_step_queued_while_metrics_are_read():
    meter, waited_for = loop.Meter(tokens_per_step=1), []
    means = []
    for step in range(1, 9):
        meter.add({"loss": Loss(step, waited_for)})
        assert waited_for == list(range(1, step)), "no step is queued behind two others, and the last is not waited for"
        if step % 4 == 0:
            means.append(meter.read(step)["loss"])
    assert means == [(1 + 2 + 3) / 3, (4 + 5 + 6 + 7) / 4], "the last step is left for the next reading"
    assert meter.read(8, late=False)["loss"] == 8
    assert meter.read(8, late=False) == {}


def test_the_rate_is_of_the_steps_alone(text_folder, tmp_path, monkeypatch):
    """On a clock on which a step takes a second, and all else a thousand."""
    seconds = 0.0

    def taking(more, real):
        def call(*args, **kwargs):
            nonlocal seconds
            seconds += more
            return real(*args, **kwargs)

        return call

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: seconds))
    monkeypatch.setattr(loop.Meter, "add", taking(1, loop.Meter.add))
    monkeypatch.setattr(jax.stages.Lowered, "compile", taking(1000, jax.stages.Lowered.compile))
    for where, name in ((checkpoint.Checkpoints, "save"), (loop.Run, "evaluate"), (loop.Run, "sample")):
        monkeypatch.setattr(where, name, taking(1000, lambda *_, **__: None))
    monkeypatch.setattr(loop.Run, "finish", lambda *_: None)
    settings = {**trained_settings(text_folder), "train.log_every": 2, "checkpoint.every": 9, "sample.every": 7}
    loop.train(make_config(settings), str(tmp_path))
    rates = {
        row["step"]: (row["train/steps_per_s"], row["train/tokens_per_s"])
        for row in writers.read_jsonl(tmp_path / "metrics.jsonl")
        if "train/steps_per_s" in row
    }
    assert set(rates) == {2, 4, 6, 8, 9, 12, 14, 16, 18, 20}
    assert set(rates.values()) == {(1.0, 8 * 32.0)}


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(text_folder, tmp_path):
    settings = {**tiny_settings(text_folder), "train.lr": 1e30, "train.warmup": 0}
    with pytest.raises(UserError, match="not finite"):
        loop.train(make_config(settings), str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.read(tmp_path)


def test_a_full_disk_is_named(text_folder, tmp_path, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"disk of .* is full; .* Free some space"):
        loop.train(make_config(tiny_settings(text_folder)), str(tmp_path))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match=r"MiB free, but checkpoints of this run, 2 at a time"):
        loop.train(make_config(tiny_settings(text_folder)), str(tmp_path / "other"))


def test_a_disk_that_fills_up_is_told_before_a_checkpoint_is_begun(text_folder, tmp_path, monkeypatch):
    usage = checkpoint.shutil.disk_usage
    saved = []

    def room(folder):
        saved.append(folder)
        return usage(folder) if len(saved) < 3 else type("Usage", (), {"free": 1000})()

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", room)
    with pytest.raises(UserError, match=r"disk of .* is full; the newest whole checkpoint is step 5\. Free some space"):
        loop.train(make_config(tiny_settings(text_folder)), str(tmp_path))
    monkeypatch.undo()
    loop.train(make_config(tiny_settings(text_folder)), str(tmp_path))
    assert checkpoint.find(tmp_path)[1] == 20


class Memory:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.rows, self.closed = [], 0

    def write_scalars(self, step, scalars):
        self.rows.append((step, dict(scalars)))

    def write_texts(self, step, texts):
        self.rows.append((step, dict(texts)))

    def write_hparams(self, hparams):
        self.rows.append((0, dict(hparams)))

    def flush(self):
        pass

    def close(self):
        self.closed += 1


def test_training_from_python_in_a_thread_with_a_writer_and_in_parts(text_folder, tmp_path):
    config = make_config({**tiny_settings(text_folder), "train.accumulate": 4})
    memory = Memory()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(duo_jax.train, config, tmp_path, writers=[memory]).result() is None
    assert duo_jax.load(tmp_path).network.dim == 32
    assert {step for step, row in memory.rows if "train/loss" in row} == {5, 10, 15, 20}
    assert any("heldout/nll" in row for _, row in memory.rows)
    assert any("samples" in row for _, row in memory.rows)
    assert [row["train.accumulate"] for _, row in memory.rows if "train.accumulate" in row] == [4]
    assert memory.closed == 1
    with pytest.raises(UserError, match=r"config\.train\.steps is 0"):
        duo_jax.train(make_config({**tiny_settings(text_folder), "train.steps": 0}), tmp_path, writers=[memory])
    assert memory.closed == 2, "also after an error"
    with pytest.raises(UserError, match=r"the config lacks .*; start from duo_jax\.config\.default"):
        duo_jax.train({}, tmp_path)
    with pytest.raises(UserError, match="workdir is None"):
        duo_jax.train(make_config(tiny_settings(text_folder)), None)
    with pytest.raises(UserError, match=r"config\.mode is 'eval', and duo_jax\.train trains"):
        duo_jax.train(make_config({**tiny_settings(text_folder), "mode": "eval"}), tmp_path)
    for wrong, message in ((memory, "give a list of writers"), ([object()], r"has no write_scalars\(\)")):
        with pytest.raises(UserError, match=message):
            duo_jax.train(config, tmp_path, writers=wrong)


@pytest.mark.parametrize("name", ["train.batch_size", "eval.batch_size"])
def test_batches_that_do_not_divide_show_before_the_data_are_prepared(tmp_path, text_folder, monkeypatch, name):
    def check(mesh, checked, batch_size, parts=1):
        if checked == name:
            raise UserError(f"{name} is {batch_size}")

    monkeypatch.setattr(run_lib.partition, "check_batch", check)
    monkeypatch.setattr(prepare, "prepare", lambda *_: pytest.fail("nothing is prepared"))
    with pytest.raises(UserError, match=f"{name} is 24"):
        loop.train(make_config({**tiny_settings(text_folder), name: 24}), str(tmp_path))


def test_another_seed_is_another_order_of_the_data(trained, text_folder, tmp_path):
    batches = []
    for seed in (1, 1, 2):
        config = make_config({**trained_settings(text_folder), "seed": seed})
        with loop.Run.open(config, str(tmp_path / str(len(batches)))) as run_:
            batches.append(next(run_.batches)["tokens"])
    assert np.array_equal(batches[0], batches[1])
    assert not np.array_equal(batches[0], batches[2])


def test_a_wrong_size_shows_before_the_data_are_prepared(tmp_path, text_folder, monkeypatch):
    monkeypatch.setattr(prepare, "prepare", lambda *_: pytest.fail("nothing is prepared"))
    for wrong, message in (
        ({"model.size": "huge"}, "model.size is 'huge'"),
        ({"model.heads": 3}, "must be a multiple of twice"),
    ):
        with pytest.raises(UserError, match=message):
            loop.train(make_config({**tiny_settings(text_folder), **wrong}), str(tmp_path))


def test_what_is_measured_on_the_way_is_the_average(text_folder, tmp_path, capsys):
    """The held-out figure of a step, anew from that step's checkpoint: of its averaged weights, not of its last ones."""
    settings = {**trained_settings(text_folder), "train.steps": 10, "eval.every": 5, "sample.every": 5}
    loop.train(make_config(settings), str(tmp_path))
    printed = capsys.readouterr().out
    for what in ("held-out PPL", "4-step sample"):
        assert [printed.count(f"step {step}: {what}") for step in (5, 10)] == [1, 1], "the last is not done twice"
    rows = {
        row["step"]: row["heldout/nll"]
        for row in writers.read_jsonl(tmp_path / "metrics.jsonl")
        if "heldout/nll" in row
    }
    assert set(rows) == {5, 10}
    heldout = pipeline.heldout_batches(
        prepare.shards_folder(make_config(settings).data), length=32, batch_size=16, max_batches=4
    )
    for step, told in rows.items():
        average, last = (checkpoint.read(tmp_path / "checkpoints" / str(step), ema=ema)[0] for ema in (True, False))
        assert likelihood.evaluate(average.weights, average.network, heldout).nll == pytest.approx(told, rel=1e-5)
        assert likelihood.evaluate(last.weights, last.network, heldout).nll != pytest.approx(told, rel=1e-5)
