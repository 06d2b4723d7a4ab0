"""A run's folder: what is no place for a run is refused before any work, and two processes do not share one."""

import shutil

import pytest
from helpers import make_config, tiny_settings, trained_settings

import duo_jax
from duo_jax import files
from duo_jax.errors import UserError
from duo_jax.training import loop, workdir


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def settings(text_folder, tmp_path):
    """Of a run whose data are not prepared: whether that was begun tells whether there was work."""
    return {**tiny_settings(text_folder), "data.dir": str(tmp_path / "shards")}


def test_converted_weights_are_not_trained_over(trained, settings, tmp_path):
    out = tmp_path / "out"
    duo_jax.export(duo_jax.load(trained), out)
    before = contents(out)
    with pytest.raises(UserError, match=r"holds converted weights; give another --workdir \(and --config\.init_from="):
        loop.train(make_config(settings), str(out))
    assert contents(out) == before
    assert not (tmp_path / "shards").exists()


def test_a_checkpoint_is_no_workdir(trained, settings):
    for place in (trained / "checkpoints" / "20", trained / "checkpoints"):
        with pytest.raises(UserError, match="name of a place of checkpoints; give their run's own folder"):
            loop.train(make_config(settings), str(place))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "perplexity.png"])
def test_a_file_that_cannot_be_written_is_named_before_the_work(settings, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name} cannot be written: Is a directory"):
        loop.train(make_config(settings), str(tmp_path / "run"))
    assert not (tmp_path / "shards").exists()


def test_a_folder_that_cannot_be_written_is_named_before_the_work(trained, settings, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    real = files.tempfile.TemporaryFile

    def fails(dir):
        if dir == tmp_path / "run" / "checkpoints":
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fails)
    with pytest.raises(UserError, match="run/checkpoints cannot be written: Permission denied"):
        loop.train(make_config(settings), str(tmp_path / "run"))
    assert not (tmp_path / "shards").exists()


def test_a_second_process_is_refused(settings, text_folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    lock = files.acquire(run / ".lock", block=False)
    with pytest.raises(UserError, match=f"another process trains in {run}"):
        loop.train(make_config(settings), str(run))
    assert not (tmp_path / "shards").exists()
    lock.close()  # as when its process dies, which leaves the file
    with (
        loop.Run.open(make_config(trained_settings(text_folder)), str(run)),
        pytest.raises(UserError, match="another process trains in"),
        workdir.held(run),
    ):
        pass
    assert not list(run.iterdir())


def test_a_mistyped_start_is_told_before_the_work(settings, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        loop.train(make_config({**settings, "init_from": str(tmp_path / "nothing")}), str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_a_start_that_is_gone_does_not_keep_a_run_from_going_on(trained, text_folder, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    gone = {**trained_settings(text_folder), "init_from": str(tmp_path / "nothing")}
    with loop.Run.open(make_config(gone), str(tmp_path / "run")):
        pass
