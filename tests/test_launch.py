"""What the scripts under launch/ ask the commands for, with a stand-in for Python that only notes it."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

NOTE = """#!/bin/sh
echo "$*" >>"$NOTES"
"""


@pytest.fixture
def launch(tmp_path):
    """Returns a function that runs a script of a copied clone and returns the commands that it gave to its Python."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(NOTE)
    python.chmod(0o755)
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("setup.py", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def call(script, *args, python=sys.executable):
        environment = {**os.environ, "NOTES": str(tmp_path / "notes"), "PYTHON": str(python)}
        environment.pop("WORKDIR", None)
        subprocess.run(["bash", f"launch/{script}", *args], cwd=tmp_path, env=environment, check=True, timeout=60)
        return (tmp_path / "notes").read_text().splitlines()

    return call


def test_settings_of_the_quickstart_reach_every_command(launch):
    flags = ["--config.data.source=text", "--config.data.path=my.txt"]
    commands = [line for line in launch("quickstart.sh", *flags) if line.startswith("-m duo_jax")]
    assert [line.split()[1] for line in commands] == ["duo_jax.data.prepare", *["duo_jax.main"] * 3]
    assert all(" ".join(flags) in line for line in commands)


@pytest.mark.parametrize("flag", [["--workdir=x"], ["--workdir", "x"]], ids="".join)
def test_a_workdir_of_the_quickstart_is_not_for_its_data(launch, flag):
    commands = launch("quickstart.sh", *flag, "--config.seed=3")
    prepare, *others = [line for line in commands if line.startswith("-m duo_jax")]
    assert prepare.split()[2:] == ["--config=configs/quickstart.py", "--config.seed=3"]
    assert all(" ".join([*flag, "--config.seed=3"]) in line for line in others)


def test_the_comparison_trains_each_algorithm_and_draws_them_all(launch):
    commands = launch("compare.sh", "--config.train.steps=10")
    trained = [line.split() for line in commands if line.startswith("-m duo_jax.main")]
    names = ["ar", "mdlm", "duo", "duo_base", "sedd", "d3pm"]
    assert [next(word for word in line if word.startswith("--config.algo")) for line in trained] == [
        f"--config.algo.name={name}" for name in names
    ]
    assert all(line[-1] == "--config.train.steps=10" for line in trained)
    asked = " ".join(f"--runs {name}=runs/compare/{name}" for name in names)
    assert commands[-1] == f"-m duo_jax.evaluation.compare {asked} --out runs/compare"


def test_an_environment_without_pip_is_made_anew(launch, tmp_path):
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")  # what is left where the venv module could not finish
    maker = tmp_path / "maker"
    maker.write_text(f"#!/bin/sh\n[ $2 = venv ] || exit 0\nprintf '%s' '{NOTE}' >.venv/bin/python\n")
    maker.chmod(0o755)
    commands = launch("quickstart.sh", python=maker)
    assert any(line.startswith("-m pip install") for line in commands)
    assert commands[-1].startswith("-m duo_jax.main")
