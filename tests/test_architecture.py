"""The rooms of the house: imports point down the list only, and the doors open quickly."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "duo_jax"

# From the ground up; a file may import its own room and those before it.
ROOMS = (
    ("errors", "files", "hardware", "progress", "results"),
    ("config", "cli"),
    ("diffusion",),
    ("models",),
    ("convert",),
    ("data",),
    ("sampling",),
    ("gaussian",),
    ("objectives",),
    ("evaluation",),
    ("training",),
    ("api",),
    ("modes",),
    ("main", "__init__"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


# Command-line doors that lie in another room; like main, they may import all below it.
DOORS = (
    "convert/__main__.py",
    "evaluation/compare.py",
    "evaluation/generate_quality.py",
    "evaluation/harness.py",
    "evaluation/harness_model.py",
    "evaluation/judged_texts.py",
)


def room(path):
    inside = path.relative_to(PACKAGE)
    return "main" if inside.as_posix() in DOORS else inside.with_suffix("").parts[0]


def imports(path):
    """Yields the rooms of duo_jax that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" if node.module == "duo_jax" else node.module for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("duo_jax."))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert room(path) in LEVEL, f"{path} is in no room of the list"
    above = [name for name in imports(path) if LEVEL.get(name, 0) > LEVEL[room(path)]]
    assert not above, f"{path} imports from above: {above}"


def test_the_mathematics_knows_nothing_of_networks_or_configs():
    for path in (PACKAGE / "diffusion").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        outside = (
            {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"jax", "numpy", "scipy", "duo_jax"}
        )
        assert not outside, f"{path} imports {outside}"
        assert set(imports(path)) <= {"diffusion", "errors"}, path


def test_import_is_light_and_starts_no_backend():
    code = (
        "import sys, duo_jax; heavy = {'jax', 'flax', 'orbax', 'grain', 'matplotlib', 'torch'} & set(sys.modules);"
        "assert not heavy, heavy; assert 'sample' in dir(duo_jax)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "name", ["diffusion.uniform.q_sample", "models.dit.DiT", "sampling.generate", "config.default"]
)
def test_what_lies_inside_is_found_by_its_name(name):
    subprocess.run([sys.executable, "-c", f"import duo_jax; duo_jax.{name}"], check=True, cwd=ROOT)


def test_no_tensorflow_no_torch_and_no_pyplot_behind_the_whole_package():
    """Pyplot would choose how a notebook shows its own pictures."""
    code = (
        "import sys, duo_jax.modes, duo_jax.evaluation.compare;"
        "heavy = {'tensorflow', 'torch', 'matplotlib.pyplot'} & set(sys.modules); assert not heavy, heavy;"
        "from jax._src import xla_bridge; assert not xla_bridge.backends_are_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
