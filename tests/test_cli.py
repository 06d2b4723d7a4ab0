"""Mistakes on the command line get one line, the nearest name, and exit status 2."""

import logging
import sys
from types import SimpleNamespace

import pytest
from absl import flags
from helpers import ROOT, run

from duo_jax import cli, errors

MAIN = [sys.executable, "-m", "duo_jax.main"]
QUICK = [*MAIN, "--config=configs/quickstart.py", "--workdir=unused"]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([*QUICK, "--config.train.stepz=3"], "did you mean --config.train.steps?"),
        ([*QUICK, "--config.trian.steps=3"], "did you mean --config.train.steps?"),
        ([*QUICK, "--config.steps=3"], "did you mean --config.train.steps?"),
        ([*QUICK, "--config.train.steps=abc"], "a whole number is needed, not 'abc'"),
        ([*QUICK, "--config.train.steps=1.5"], "a whole number is needed, not '1.5'"),
        ([*QUICK, "--config.train.lr=fast"], "a number is needed, not 'fast'"),
        ([*QUICK, "--confg.train.steps=3"], "did you mean --config.train.steps?"),
        ([*QUICK, "--config.nodistributed"], "give --config.distributed=False"),
        ([*QUICK, "--config.model.noscan"], "give --config.model.scan=False"),
        ([*QUICK, "--config.train=3"], "is a group of settings"),
        ([*QUICK, "--config.mode=trian"], "choose one of train, eval, sample"),
        ([*QUICK, "--workdri=x"], "Did you mean: workdir"),
        ([*QUICK, "--mode=eval"], "give it as --config.mode=eval"),
        ([*QUICK, "--train.steps=3"], "give it as --config.train.steps=3"),
        ([*QUICK, "train"], "'train' is not a flag"),
        ([*MAIN, "--workdir=x"], "--config is missing"),
        ([*MAIN, "--config=configs/quickstart.py"], "--workdir is missing"),
        ([*MAIN, "--config", "configs/quickstart.py"], "--workdir is missing"),
        ([*MAIN, "--config=configs/nothing.py", "--workdir=x"], "configs/lm1b.py, configs/owt.py"),
        ([*MAIN, "--config=README.md", "--workdir=x"], "is not a Python file"),
        ([*MAIN, "--config=setup.cfg", "--workdir=x"], "no such file"),
    ],
)
def test_a_mistake_gets_one_clear_line(args, expected):
    result = run(args)
    assert result.returncode == 2, result.stderr
    assert expected in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (ROOT / "unused").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("def get_config(): return None", "lacks"),
        ("x = 1", "get_config"),
        (
            "from duo_jax import config\ndef get_config():\n    c = config.default()\n    c.train.stpes = 3\n    return c",
            "sets train.stpes, which is no setting; did you mean train.steps?",
        ),
    ],
)
def test_a_config_file_that_cannot_be_read(tmp_path, text, expected):
    (tmp_path / "bad.py").write_text(text)
    result = run([*MAIN, f"--config={tmp_path / 'bad.py'}", "--workdir=x"])
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_recipe_may_use_another_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    folder = tmp_path / "my_recipes"
    folder.mkdir()
    (folder / "first.py").write_text(
        "from duo_jax import config\ndef get_config():\n    c = config.default()\n    c.train.steps = 7\n    return c"
    )
    (folder / "second.py").write_text("from my_recipes import first\nget_config = first.get_config")
    assert cli._load(str(folder / "second.py")).train.steps == 7


def test_the_log_is_printed_plainly_and_once(monkeypatch, capsys):
    """Though absl, too, prints what reaches the root of all logs."""
    root, ours = logging.getLogger(), logging.getLogger("duo_jax")
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(sys.stderr)])
    monkeypatch.setattr(ours, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    with cli.one_line_errors():
        logging.getLogger("duo_jax.files").info("the disk has no locks")
    assert capsys.readouterr().err == "the disk has no locks\n"


def test_help_is_help():
    result = run([*MAIN, "--helpshort"])
    assert "--config" in result.stdout + result.stderr
    assert "  train.steps = 1000000\n" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr


def test_memory_that_runs_out_is_told_with_what_to_do(capsys):
    for says in ("RESOURCE_EXHAUSTED: failed to allocate", "Out of memory allocating"):
        with pytest.raises(SystemExit) as stopped, cli.one_line_errors():
            raise RuntimeError(f"{says} 26905054768 bytes.")
        assert stopped.value.code == 2
        told = capsys.readouterr().err
        assert told.startswith("error: the device's memory is full; 25.1 GiB more")
        assert "config.train.accumulate" in told
    with pytest.raises(RuntimeError, match="another"), cli.one_line_errors():
        raise RuntimeError("another")


def test_another_programs_command_line_gives_no_settings(monkeypatch):
    """As of a script that parses its own flags with absl and then calls this package."""
    theirs = flags.FlagValues()
    flags.DEFINE_string("theirs", "", "A flag.", flag_values=theirs)
    monkeypatch.setattr(cli.flags, "FLAGS", theirs)
    assert cli.given() is None
    theirs(["program", "--theirs=x"])
    assert cli.given() is None


def test_the_first_line_of_an_error_tells_something():
    assert errors.first_line(ValueError("\nthe first\nthe second")) == "the first"
    assert errors.first_line(ValueError("")) == "ValueError"


def test_ctrl_c_ends_a_command_in_a_word(capsys):
    with pytest.raises(SystemExit) as stopped, cli.one_line_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_jax_that_has_read_its_environment_is_told(monkeypatch):
    told = []
    config = SimpleNamespace(update=lambda *setting: told.append(setting))
    monkeypatch.setitem(sys.modules, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(cli.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "true")
    cli.keep_memory()
    assert told == [("jax_cpu_enable_async_dispatch", False)]


@pytest.mark.parametrize(
    ("platforms", "installed", "expected"),
    [
        (None, (), True),
        (None, ("jax_plugins",), False),
        (None, ("libtpu",), False),
        ("cuda,cpu", ("jax_plugins",), False),
        ("cpu", ("jax_plugins",), True),
    ],
)
def test_glibc_keeps_freed_memory_on_a_cpu_alone(monkeypatch, platforms, installed, expected):
    told = []
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *option: told.append(option)))
    monkeypatch.setattr(cli.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: name in installed or None)
    monkeypatch.delitem(sys.modules, "jax", raising=False)  # the tests' own JAX stays as it is
    monkeypatch.setenv("JAX_CPU_ENABLE_ASYNC_DISPATCH", "true")
    monkeypatch.setenv("JAX_PLATFORMS", platforms or "")
    cli.keep_memory()
    assert bool(told) == expected
    assert cli.os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] == "false"
