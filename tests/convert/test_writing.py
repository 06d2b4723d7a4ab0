"""What is written reads back, here and in PyTorch."""

import contextlib
import dataclasses
import json
import sys
import types

import numpy as np
import pytest
import torch_files
from helpers import command, make_config, run, trained_settings
from safetensors import SafetensorError, safe_open
from torch_files import equal, lightning

import duo_jax
from duo_jax import convert
from duo_jax.config import ALGORITHMS
from duo_jax.convert import __main__ as door
from duo_jax.convert import card, infer, pickled
from duo_jax.data import tokenizers
from duo_jax.models import network as network_lib
from duo_jax.training import checkpoint, loop


def test_export_reads_back_bit_for_bit(tmp_path, params, trained):
    duo_jax.export(params, tmp_path / "out", step=20)
    read = duo_jax.load(tmp_path / "out")
    equal(read.weights, params.weights)
    assert read.network == params.network
    assert tokenizers.load(read.tokenizer).same_as(tokenizers.load(params.tokenizer))
    assert checkpoint.find(tmp_path / "out") == (tmp_path / "out", 20)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer",
    ]  # fmt: skip
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}, "transformers refuses files without it"
        assert all(key.startswith("backbone.") for key in file.keys())  # noqa: SIM118
    assert len({p.stat().st_mode for p in (tmp_path / "out").iterdir() if p.is_file()}) == 1, "readable alike"
    a, b = (duo_jax.sample(p, n_steps=4, seed=3).tokens for p in (params, read))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(duo_jax.UserError, match="not empty"):
        duo_jax.export(params, tmp_path / "out")
    with pytest.raises(duo_jax.UserError, match="leave out algo"):
        duo_jax.load(tmp_path / "out", algo="duo")
    with pytest.raises(duo_jax.UserError, match="averaged weights only"):
        duo_jax.load(tmp_path / "out", ema=False)


def test_whether_weights_are_averaged_is_kept_and_told(tmp_path, params, caplog):
    for averaged in (True, False, None):
        folder = tmp_path / str(averaged)
        caplog.clear()
        duo_jax.export(params.replace(averaged=averaged), folder)
        assert duo_jax.load(folder).averaged is averaged
        assert ("holds the last weights" in caplog.text) == (averaged is False)
        duo_jax.export(duo_jax.load(folder), tmp_path / f"{averaged} again")
        assert duo_jax.load(tmp_path / f"{averaged} again").averaged is averaged
    assert duo_jax.load(tmp_path / "False", ema=False).averaged is False


def test_a_full_disk_is_told_in_one_line(tmp_path, params, monkeypatch):
    def full(*_):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(duo_jax.UserError, match=r"cannot be written: .*No space left"):
        duo_jax.export(params, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_name_of_a_file_is_no_folder(tmp_path, params):
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(duo_jax.UserError, match="is the name of a file; give a folder"):
            duo_jax.export(params, tmp_path / name)


def test_what_is_there_is_not_written_over(tmp_path, params, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("kept")
    (tmp_path / "empty").mkdir()
    with pytest.raises(duo_jax.UserError, match="exists and is not empty"):
        duo_jax.export(params, "~/file")
    assert (tmp_path / "file").read_text() == "kept"
    duo_jax.export(params, "~/empty")
    equal(duo_jax.load(tmp_path / "empty").weights, params.weights)


def test_a_failed_export_leaves_nothing(tmp_path, params):
    def fail(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(duo_jax.UserError, match="No space left"):
        convert.write(params, tmp_path / "out", fail)
    assert not list(tmp_path.iterdir())


def test_the_command_then_sampling_and_evaluation(tmp_path, state, text_folder, trained):
    """A file in the reference's layout goes in, and the folder that comes out is used like a workdir."""
    torch_files.save(lightning(state), tmp_path / "duo.ckpt")
    out = tmp_path / "out"
    flags = ["--algo", "duo_base", "--length", "32", "--tokenizer", str(trained / checkpoint.TOKENIZER)]
    args = ["-m", "duo_jax.convert", "--from", str(tmp_path / "duo.ckpt"), "--to", str(out)]
    python = command("", out, {})[0]
    done = run([python, *args])
    assert done.returncode == 2
    assert done.stderr.startswith("error: the file does not name its algorithm; give --algo")
    assert len(done.stderr.splitlines()) == 1
    done = run([python, *args, *flags])
    assert done.returncode == 0, done.stderr
    assert "duo_base, 2 blocks of width 32 with 2 heads, 32 tokens, 300 ids" in done.stdout
    settings = {**trained_settings(text_folder), "mode": "eval"}
    done = run(command("configs/quickstart.py", out, settings))
    assert done.returncode == 0, done.stderr
    figures = json.loads((out / "eval.json").read_text())
    done = run(command("configs/quickstart.py", trained, settings))
    assert figures["nll"] == json.loads((trained / "eval.json").read_text())["nll"]
    (trained / "eval.json").unlink()
    done = run(command("configs/quickstart.py", out, {**settings, "mode": "sample", "sample.num": 2}))
    assert done.returncode == 0, done.stderr
    assert len((out / "samples.jsonl").read_text().splitlines()) == 2


def test_a_runs_checkpoint_and_its_step_are_converted(tmp_path, trained, monkeypatch):
    """That which was found, whatever a run that goes on adds in the meantime; then that which was converted."""
    read, load = [], duo_jax.api.load
    monkeypatch.setattr(duo_jax.api, "load", lambda source, **asked: read.append(source) or load(source, **asked))
    older, again, newest = (tmp_path / name for name in ("older", "again", "newest"))
    door.main(["--from", str(trained / "checkpoints" / "15"), "--to", str(older), "--no-ema"])
    door.main(["--from", str(older), "--to", str(again), "--no-ema"])
    door.main(["--from", str(trained), "--to", str(newest)])
    assert [convert.step(folder) for folder in (older, again, newest)] == [15, 15, 20]
    last = duo_jax.load(trained / "checkpoints" / "15", ema=False)
    for folder in (older, again):
        equal(duo_jax.load(folder, ema=False).weights, last.weights)
    assert read[:3] == [trained / "checkpoints" / "15", str(older), trained / "checkpoints" / "20"]


def test_an_exported_folder_tells_the_hubs_readers_what_it_tells_us(tmp_path, params):
    for algo in ALGORITHMS:
        network = dataclasses.replace(params.network, algo=algo, length=48)
        duo_jax.export(params.replace(network=network), tmp_path / algo, step=1234)
        told = infer.facts(json.loads((tmp_path / algo / "config.json").read_text()))
        assert told == {"algo": algo, "heads": 2, "length": 48, "dropout": 0.1}
        assert "| training steps | 1,234 |" in (tmp_path / algo / "README.md").read_text()
    duo_jax.export(params, tmp_path / "unknown")
    assert "training steps" not in (tmp_path / "unknown" / "README.md").read_text()


def test_every_algorithm_has_a_card_also_a_new_one(params, monkeypatch):
    for algo in ALGORITHMS:
        assert "language model trained with" not in card.text(dataclasses.replace(params.network, algo=algo), "x", 0)
    monkeypatch.setitem(network_lib.PROCESS_OF, "mine", "absorbing")
    told = card.text(dataclasses.replace(params.network, algo="mine"), "x", 0)
    assert "This is an absorbing language model trained with mine, in [duo_jax]" in told


def test_training_starts_from_a_converted_folder(tmp_path, text_folder, params):
    duo_jax.export(params, tmp_path / "out")
    assert checkpoint.read(tmp_path / "out")[1] == {}
    settings = {
        **trained_settings(text_folder),
        "init_from": str(tmp_path / "out"),
        "train.steps": 1,
        "train.lr": 1e-30,
    }
    loop.train(make_config({**settings, "sample.every": 0, "eval.every": 0}), str(tmp_path / "run"))
    equal(duo_jax.load(tmp_path / "run", ema=False).weights, params.weights)


def test_a_ckpt_for_the_reference(tmp_path, state, params, asked):
    torch = pytest.importorskip("torch")
    path = tmp_path / "out.ckpt"
    duo_jax.export(params, path, step=20)
    equal(duo_jax.load(path, **asked).weights, params.weights)
    equal(duo_jax.load(path, ema=False, **asked).weights, params.weights)
    whole = torch.load(path, weights_only=True)
    assert whole["state_dict"].keys() == {f"backbone.{key}" for key in state}
    # what the reference's on_load_checkpoint asks for
    loops = whole["loops"]["fit_loop"]
    assert loops["epoch_progress"]["current"]["completed"] == 0
    assert loops["epoch_loop.batch_progress"]["current"]["completed"] == 0
    assert whole["ema"].keys() == {"decay", "num_updates", "shadow_params"}
    names = [key for key in state if key != "rotary_emb.inv_freq"]
    for name, value in zip(names, whole["ema"]["shadow_params"], strict=True):
        np.testing.assert_array_equal(value.numpy(), state[name])
    with pytest.raises(duo_jax.UserError, match="exists; give a new file"):
        duo_jax.export(params, path)


def test_what_pytorch_is_given_to_write(tmp_path, params, asked, monkeypatch):
    """As the test above, where there is no PyTorch: the last and the averaged weights are both there, and alike."""
    stand_in = types.SimpleNamespace(from_numpy=lambda x: x, save=torch_files.save)
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    path = tmp_path / "new" / "out.ckpt"
    duo_jax.export(params, path, step=20)
    monkeypatch.undo()
    for ema in (True, False):
        equal(duo_jax.load(path, ema=ema, **asked).weights, params.weights)
    with contextlib.closing(pickled.Archive(path)) as archive:
        assert (archive.root["global_step"], archive.root["ema"]["num_updates"]) == (20, 20)
        assert all(key.startswith("backbone.") for key in archive.root["state_dict"])

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:595] . unexpected pos 64\nmore")

    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(from_numpy=lambda x: x, save=full))
    with pytest.raises(duo_jax.UserError, match=r"other\.ckpt cannot be written: .* unexpected pos 64\.$"):
        duo_jax.export(params, path.with_name("other.ckpt"))
    with pytest.raises(duo_jax.UserError, match="exists; give a new file"):
        duo_jax.export(params, path)
    assert [found.name for found in path.parent.iterdir()] == ["out.ckpt"]


def test_a_ckpt_without_pytorch_is_refused(tmp_path, params, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(duo_jax.UserError, match=r"needs PyTorch: run `pip install -e '\.\[torch\]'`"):
        duo_jax.export(params, tmp_path / "out.ckpt")
