"""The modes eval and sample: where their results lie, and that nothing is computed which cannot be kept."""

import json
import shutil
import types

import pytest
from helpers import make_config, trained_settings

from duo_jax import api, cli, files, modes
from duo_jax import config as config_lib
from duo_jax.errors import UserError
from duo_jax.training import checkpoint
from duo_jax.training import run as run_lib


@pytest.fixture
def copy(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    return tmp_path / "copy"


def work(*_, **__):
    raise AssertionError("the work was begun")


def test_a_checkpoints_evaluation_lies_in_its_runs_folder(copy, text_folder):
    config = make_config({**trained_settings(text_folder), "mode": "eval", "eval.batches": 3})
    before = sorted((copy / "checkpoints").rglob("*"))
    modes.run(config, str(copy / "checkpoints" / "15"))
    report = json.loads((copy / "eval.json").read_text())
    assert (report["step"], report["batches"], report["batch_size"]) == (15, 3, 16)
    assert sorted((copy / "checkpoints").rglob("*")) == before


def test_an_evaluation_is_of_the_step_that_it_tells(copy, text_folder, monkeypatch):
    """Of a run that goes on: a checkpoint appears while the one before it is read."""
    newest = copy / "checkpoints" / "20"
    newest.rename(copy / "later")
    read = checkpoint.read

    def while_read(*args, **kwargs):
        (copy / "later").rename(newest)
        return read(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "read", while_read)
    config = make_config({**trained_settings(text_folder), "mode": "eval", "eval.batches": 1})
    modes.run(config, str(copy))
    first = json.loads((copy / "eval.json").read_text())
    monkeypatch.undo()
    modes.run(config, str(copy / "checkpoints" / "15"))
    again = json.loads((copy / "eval.json").read_text())
    assert first["step"] == 15
    assert first == again


def test_an_evaluation_is_of_the_runs_own_data_unless_others_are_given(copy, text_folder, monkeypatch):
    """As from the command line, whose recipe is of other data."""
    settings = {**trained_settings(text_folder), "mode": "eval", "eval.batches": 1}
    recipe = {name: value for name, value in settings.items() if not name.startswith("data.")}
    monkeypatch.setattr(cli, "given", lambda: {"eval.batches", "mode"})
    modes.run(make_config(recipe), str(copy))
    report = json.loads((copy / "eval.json").read_text())
    assert (report["source"], report["path"]) == ("text", str(text_folder / "text.jsonl"))
    monkeypatch.setattr(cli, "given", lambda: {"data.workers", "data.dir"})  # how they are read, not which they are
    modes.run(make_config({**recipe, "data.dir": settings["data.dir"]}), str(copy))
    assert json.loads((copy / "eval.json").read_text())["source"] == "text"
    monkeypatch.setattr(cli, "given", lambda: {"data.source", "data.path"})
    with pytest.raises(UserError, match="nowhere"):
        modes.run(make_config({**settings, "data.path": "nowhere", "data.dir": str(copy / "none")}), str(copy))


def test_an_evaluation_may_see_earlier_times_than_training(copy, text_folder):
    reports = []
    for eps_t in (1e-3, 0.5):
        modes.run(make_config({**trained_settings(text_folder), "mode": "eval", "algo.eps_t": eps_t}), str(copy))
        reports.append(json.loads((copy / "eval.json").read_text()))
    assert [report["eps_t"] for report in reports] == [1e-3, 0.5]
    assert abs(reports[0]["nll"] - reports[1]["nll"]) > 0.01


def test_the_settings_that_a_network_was_trained_with_are_told(copy, text_folder):
    config = make_config({**trained_settings(text_folder), "mode": "sample", "model.length": 64, "model.dim": 64})
    with pytest.raises(UserError, match=r"It was trained with --config\.model\.dim=32 --config\.model\.length=32\.$"):
        modes.run(config, str(copy))


def test_the_first_texts_can_be_replayed(copy, text_folder, capsys):
    asked = {"mode": "sample", "sample.trajectory": True, "sample.num": 5, "sample.batch_size": 3, "sample.n_steps": 2}
    for name in ("samples.html", "samples-2.html"):
        modes.run(make_config(trained_settings(text_folder) | asked), str(copy))
        assert f"Open {copy / name} in a browser" in capsys.readouterr().out
        page = (copy / name).read_text(encoding="utf-8")
        assert page.count('{"first":[') == 4
    rows = [json.loads(line) for line in (copy / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [len(row["trajectory"]) for row in rows] == 5 * [3]


@pytest.mark.parametrize(("number", "at_once"), [(0, 3), (2, 2), (7, 3)])
def test_all_that_is_asked_reaches_the_sampler(copy, text_folder, monkeypatch, number, at_once):
    asked = {
        "n_steps": 5, "seed": 6, "sampler": "psi", "noise_removal": "greedy", "top_p": 0.9, "temperature": 0.7,
        "guidance": 1.5, "early_stop": 2, "trajectory": True, "length": 50, "prompt": "The", "negative_prompt": "A",
        "stride": 8,
    }  # fmt: skip
    seen = []

    def sample(params, **settings):
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "sample", sample)
    flags = {f"sample.{name}": value for name, value in asked.items()}
    flags |= {"mode": "sample", "sample.psi.low": "max-capped-0.1", "sample.num": number, "sample.batch_size": 3}
    with pytest.raises(KeyboardInterrupt):
        modes.run(make_config({**trained_settings(text_folder), **flags}), str(copy))
    (settings,) = seen
    assert {name: settings[name] for name in asked} == asked
    assert (settings["batch_size"], settings["rows_at_once"]) == (number or 3, at_once)
    assert settings["psi"].low == "max-capped-0.1"
    assert settings["infill"] is None


def test_each_text_has_the_tokens_after_every_step_beside_it(copy, text_folder, capsys):
    settings = {"mode": "sample", "sample.trajectory": True, "sample.num": 6, "sample.batch_size": 3}
    modes.run(make_config({**trained_settings(text_folder), **settings}), str(copy))
    rows = [json.loads(line) for line in (copy / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert [len(tokens) for tokens in row["trajectory"]] == [32] * len(row["trajectory"])
        assert len(row["trajectory"]) >= 4
        assert row["trajectory"][-1] == row["tokens"]
    printed = capsys.readouterr().out
    assert printed.count("(unigram entropy") == 4, "of all batches together"
    assert "6 texts (the first 4 above) in " in printed


def test_samples_are_not_overwritten(copy, text_folder, capsys):
    first, second = (
        make_config({**trained_settings(text_folder), "mode": "sample", "sample.seed": seed}) for seed in (1, 2)
    )
    modes.run(first, str(copy))
    kept = (copy / "samples.jsonl").read_bytes()
    for number in (2, 3):
        modes.run(second, str(copy / "checkpoints" / "20"))
        assert f"written to {copy / f'samples-{number}.jsonl'}." in capsys.readouterr().out
    assert (copy / "samples.jsonl").read_bytes() == kept
    assert len((copy / "samples-3.jsonl").read_text().splitlines()) == 2


def test_samples_of_two_jobs_that_start_together(tmp_path):
    names = [modes._new(tmp_path, "samples", ".jsonl").name for _ in range(3)]
    assert names == ["samples.jsonl", "samples-2.jsonl", "samples-3.jsonl"]


def test_samples_that_were_refused_leave_nothing(copy, text_folder):
    for wrong in ({"sample.prompt": "a" * 500}, {"sample.sampler": "psi", "sample.psi.high": "oops"}):
        with pytest.raises(UserError):
            modes.run(make_config({**trained_settings(text_folder), "mode": "sample", **wrong}), str(copy))
        assert not list(copy.glob("samples*.jsonl"))


def test_a_report_that_cannot_be_written_is_refused_before_the_work(copy, text_folder, monkeypatch):
    (copy / "eval.json").mkdir()
    monkeypatch.setattr(run_lib, "measure", work)
    with pytest.raises(UserError, match=r"eval\.json cannot be written: Is a directory"):
        modes.run(make_config({**trained_settings(text_folder), "mode": "eval"}), str(copy))


def test_samples_that_cannot_be_written_are_refused_before_the_work(copy, text_folder, monkeypatch):
    def fails(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fails)
    monkeypatch.setattr(api, "sample", work)
    with pytest.raises(UserError, match="cannot be written: Permission denied"):
        modes.run(make_config({**trained_settings(text_folder), "mode": "sample"}), str(copy))


def test_figures_are_printed_before_they_are_written(copy, text_folder, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(modes, "json", types.SimpleNamespace(dumps=full))
    for mode, printed in (("eval", "PPL "), ("sample", "--- 1 (unigram entropy")):
        with pytest.raises(UserError, match="cannot be written: No space left"):
            modes.run(make_config({**trained_settings(text_folder), "mode": mode}), str(copy))
        assert printed in capsys.readouterr().out


def test_hosts_that_no_scheduler_started_are_told_their_place(monkeypatch):
    told = []
    monkeypatch.setattr(modes.jax.distributed, "initialize", lambda **place: told.append(place))
    monkeypatch.setitem(modes.MODES, "train", lambda config, workdir: None)
    config = config_lib.default()
    config.distributed = True
    modes.run(config, "x")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    modes.run(config, "x")
    assert told == [{}, {"num_processes": 2, "process_id": 1}]
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    with pytest.raises(UserError, match="JAX_PROCESS_ID is 'one'"):
        modes.run(config, "x")
