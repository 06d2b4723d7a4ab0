"""A run's folder: what is no place for a run is refused before any work, and two processes do not share one."""

import errno
import fcntl
import os
import shutil
from pathlib import Path

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
        with pytest.raises(UserError, match="is named like a checkpoint folder; give the run's own folder"):
            loop.train(make_config(settings), str(place))


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "perplexity.png"])
def test_a_file_that_cannot_be_written_is_named_before_the_work(settings, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{name} cannot be written: Is a directory"):
        loop.train(make_config(settings), str(tmp_path / "run"))
    assert not (tmp_path / "shards").exists()


def test_a_run_may_itself_be_named_like_a_folder_of_checkpoints(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "checkpoints")
    assert workdir.check(tmp_path / "checkpoints") == tmp_path / "checkpoints"


def test_a_file_is_no_workdir(settings, tmp_path):
    (tmp_path / "run").write_text("somebody's")
    with pytest.raises(UserError, match="run cannot be written: it is a file, not a folder"):
        loop.train(make_config(settings), str(tmp_path / "run"))
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer", "samples", "tensorboard"])
def test_a_folder_that_cannot_be_written_is_named_before_the_work(trained, settings, tmp_path, monkeypatch, name):
    shutil.copytree(trained, tmp_path / "run")
    real = files.tempfile.TemporaryFile

    def fails(dir):
        if dir == tmp_path / "run" / name:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)

    monkeypatch.setattr(files.tempfile, "TemporaryFile", fails)
    with pytest.raises(UserError, match=f"run/{name} cannot be written: Permission denied"):
        loop.train(make_config(settings), str(tmp_path / "run"))
    assert not (tmp_path / "shards").exists()


def test_a_file_is_tried_and_left_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    files.check_file(file)
    assert not list(tmp_path.iterdir())
    file.write_text("kept")
    files.check_file(file)
    assert file.read_text() == "kept"
    real = Path.open

    def fails(path, mode="r", *args, **kwargs):  # as for a user who may read it only
        if path == file and set(mode) & set("+wax"):
            raise PermissionError(13, "Permission denied")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Permission denied"):
        files.check_file(file)


@pytest.mark.parametrize("made_anew", [False, True])
def test_a_lock_is_on_the_file_that_is_there(tmp_path, monkeypatch, made_anew):
    """Another process, which had it before, may remove the file between its opening here and its lock."""
    path, flock, calls = tmp_path / "lock", fcntl.flock, []

    def late(file, how):
        calls.append(how)
        if len(calls) == 1:
            path.unlink()
            if made_anew:
                path.touch()
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    lock = files.acquire(path, block=True)
    assert lock.exclusive
    assert os.path.samestat(os.fstat(lock.file.fileno()), path.stat())
    assert len(calls) == 2
    assert files.acquire(path, block=False) is None
    lock.close()


def test_a_disk_that_knows_no_locks_is_used_without(tmp_path, monkeypatch, caplog):
    code = errno.ENOLCK

    def fails(*_):
        raise OSError(code, "the disk says so")

    monkeypatch.setattr(files.fcntl, "flock", fails)
    with files.locked(tmp_path / "lock", lambda: pytest.fail("nobody has it")):
        assert (tmp_path / "lock").exists()
    assert not list(tmp_path.iterdir())
    assert f"{tmp_path} has no locks" in caplog.text
    code = errno.EIO
    with pytest.raises(OSError, match="the disk says so"):
        files.acquire(tmp_path / "lock", block=True)


def test_a_lock_is_waited_for_where_that_is_wanted(tmp_path):
    path, told = tmp_path / "lock", []
    first = files.acquire(path, block=False)

    def busy():
        told.append("busy")
        path.unlink()
        first.close()

    with files.locked(path, busy):
        assert told == ["busy"]
        assert files.acquire(path, block=False) is None
    assert not path.exists()


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "with_data").mkdir()
    (tmp_path / "with_data" / "__init__.py").write_text("raise ImportError('a dependency is missing')")
    (tmp_path / "a_folder_of_this_name").mkdir()
    assert files.package_folder("with_data") == tmp_path / "with_data"
    assert files.package_folder("a_folder_of_this_name") is None
    assert files.package_folder("no_such_package") is None


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
