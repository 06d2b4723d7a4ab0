"""The command line: flags `--config=FILE --config.name=value`, one clear line per mistake, and memory settings."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import importlib.util
import itertools
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from duo_jax import config as config_lib
from duo_jax.errors import UserError, out_of_memory


def _load(path: str) -> ConfigDict:
    """Returns what `get_config()` in a file returns."""
    if not Path(path).is_file():
        found = sorted(str(p) for p in Path("configs").glob("*.py"))
        hint = f"there are {', '.join(found)}" if found else "give the path of a file like configs/quickstart.py"
        raise UserError(f"--config={path}: no such file; {hint}.")
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(
            f"--config={path} is not a Python file; give one with get_config(), like configs/quickstart.py."
        )
    module = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(path).resolve().parent.parent))  # so that a recipe can import another one of its folder
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise UserError(f"--config={path} cannot be read: {type(error).__name__}: {error}.") from error
    try:
        config_lib.check_names(config)
    except UserError as error:
        raise UserError(f"--config={path}: {error}") from error
    return config


def _check_names(argv: list[str], config: ConfigDict) -> None:
    """Raises UserError for `--config.a.b=...` if the config lacks a.b, naming the nearest setting, and for `--a.b=...`."""
    known = config_lib.flatten(config)
    for arg in argv:
        name = arg.lstrip("-").split("=", 1)[0]
        if arg.startswith("--") and name in known and name not in flags.FLAGS:
            raise UserError(f"--{name} is a setting of the config; give it as --config.{arg.lstrip('-')}.")
        group, dot, _ = name.partition(".")
        if arg.startswith("--") and dot and group != "config" and group not in flags.FLAGS:
            near = difflib.get_close_matches(name, [f"config.{key}" for key in known], n=1)
            meant = (
                f"did you mean --{near[0]}" if near else "settings are given as --config.name=value; --help lists them"
            )
            raise UserError(f"--{name}: no such flag; {meant}{'?' if near else '.'}")
        if not arg.startswith("-") or not name.startswith("config."):
            continue
        key = name.removeprefix("config.")
        if key in known:
            continue
        inside = [k for k in known if k.startswith(key + ".")]
        if inside:
            raise UserError(f"--{name} is a group of settings; name one of them, such as --config.{inside[0]}.")
        positive = re.sub(r"(^|\.)no([^.]*)$", r"\1\2", key)
        if isinstance(known.get(positive), bool):
            raise UserError(f"--{name}: no such setting; give --config.{positive}=False.")
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        last = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
        raise UserError(f"--{name}: no such setting; did you mean --config.{(last or near)[0]}?")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags that `run` defines.

    Raises:
        UserError: an unknown flag (the message has the nearest name), a value of the wrong type, a stray word, or a missing
            file.
    """
    paths = [arg.split("=", 1)[1] for arg in argv if arg.lstrip("-").startswith("config=")]
    paths += [b for a, b in itertools.pairwise(argv) if a.lstrip("-") == "config"]
    helping = any(arg.lstrip("-") in ("help", "helpshort", "helpfull") for arg in argv)
    if helping:
        settings = config_lib.flatten(_load(paths[-1]) if paths else config_lib.default())
        print("Settings, given as --config.NAME=VALUE; duo_jax/config.py describes each.\n")
        print("\n".join(f"  {name} = {value!r}" for name, value in settings.items()), end="\n\n")
    elif paths:
        _check_names(argv, _load(paths[-1]))
    else:
        raise UserError("--config is missing; give a file, such as --config=configs/quickstart.py.")
    try:
        rest = flags.FLAGS(argv)
    except (flags.Error, TypeError, ValueError) as error:
        message = " ".join(str(error).split())
        for python, plain in (("invalid literal for int() with base 10:", "a whole number is needed, not"),
                              ("could not convert string to float:", "a number is needed, not")):  # fmt: skip
            message = message.replace(python, plain)
        raise UserError(message) from error
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = absl_logging.WARNING  # at absl's default, INFO, Orbax logs every file that it writes
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; settings are given as --config.name=value.")
    return rest


def given() -> set[str] | None:
    """Returns the names of the settings on the command line, such as `train.steps`; None without a command line."""
    if not flags.FLAGS.is_parsed() or "config" not in flags.FLAGS:
        return None
    return set(config_flags.get_override_values(flags.FLAGS["config"]))


def keep_memory() -> None:
    """Makes JAX use less memory on a CPU, and no more time. Call it before JAX starts its backend.

    Turns off asynchronous dispatch on a CPU: a queued step holds its scratch memory while it waits, and finishes no sooner.
    Accelerators keep asynchronous dispatch.

    With glibc, keeps freed memory in one arena instead of returning it to the kernel. XLA allocates its scratch memory
    anew at every call, and glibc would map blocks of that size again each time: a training step of 76 MB took 21,000 page
    faults, a quarter of its time. This is left out if there may be an accelerator: its memory is not glibc's, and the many
    threads that compile for it would wait for that one arena.
    """
    os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "false"
    if "jax" in sys.modules:  # then it has already read its environment
        sys.modules["jax"].config.update("jax_cpu_enable_async_dispatch", False)
    if platform.libc_ver()[0] != "glibc" or _may_be_accelerated():
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # of <malloc.h>
    libc = ctypes.CDLL(None)
    for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (top_pad, 2**26), (arena_max, 1)):
        libc.mallopt(option, value)


def _may_be_accelerated() -> bool:
    """Whether JAX may find an accelerator: support for one is installed and JAX_PLATFORMS does not rule it out."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    return any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def release_memory() -> None:
    """Returns freed memory to the kernel, as after compiling; does nothing without glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def named(flag: str, values: list[str]) -> dict[str, str]:
    """Returns `{NAME: PLACE}` for a flag's values `NAME=PLACE`; a value `PLACE` gets its last part as the name.

    Raises:
        UserError: two values have the same name.
    """
    places = dict(value.split("=", 1) if "=" in value else (Path(value).name, value) for value in values)
    if len(places) < len(values):
        raise UserError(f"two {flag} have the same name; rename one, as in {flag} before=... {flag} after=....")
    return places


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raises UserError."""
        raise UserError(f"{message}; --help lists the flags.")


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints the package's log without time stamps, and turns a `UserError` inside into one line and exit status 2."""
    plain = logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("duo_jax")
    ours.setLevel(logging.INFO)
    ours.addHandler(plain)
    ours.propagate = False  # absl would print each line again, with a time stamp
    try:
        yield
    except UserError as error:
        _fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # the base class of JAX's own errors
        if not out_of_memory(error):
            raise
        _fail(_memory_advice(error))


def _memory_advice(error: RuntimeError) -> UserError:
    """Returns the error to print when the device's memory is full: how much was asked for, and what to change."""
    asked = re.search(r"allocat\w+ (\d+) bytes", str(error))
    size = f"; {int(asked[1]) / 2**30:.1f} GiB more were asked for" if asked else ""
    return UserError(
        f"the device's memory is full{size}. For training, set config.train.accumulate=2 or more, config.model.remat=blocks "
        "with config.model.scan=True, or a smaller config.model.head_mib, with any of which a run resumes from its last "
        "checkpoint; for a new run also a smaller config.train.batch_size. Otherwise set a smaller config.eval.batch_size "
        "or config.sample.batch_size. python -m benchmarks.memory computes which batch fits."
    )


def run(main: Callable[..., int | None], *, workdir: bool = False) -> None:
    """Parses the command line and calls `main(config)`, or `main(config, workdir)` if `workdir` is set.

    A `UserError` anywhere below becomes one line on standard error and exit status 2. If `main` returns the number of a
    signal that stopped it, the exit status is 128 plus that number, as if the signal had ended the process.
    """
    config_flags.DEFINE_config_file("config", None, "The recipe: a Python file with get_config().", lock_config=True)
    if workdir:
        flags.DEFINE_string("workdir", None, "The folder for checkpoints, logs, plots and samples of this run.")

    def parse_or_exit(argv: list[str]) -> list[str]:
        try:
            return parse(argv)
        except UserError as error:
            _fail(error)

    def call(_: list[str]) -> int:
        with one_line_errors():
            config = flags.FLAGS.config
            config_lib.check(config)
            if workdir and not flags.FLAGS.workdir:
                raise UserError("--workdir is missing; give a folder for the run, such as --workdir=runs/quickstart.")
            stopped_by = main(config, flags.FLAGS.workdir) if workdir else main(config)
        return 128 + stopped_by if stopped_by else 0

    keep_memory()
    app.run(call, flags_parser=parse_or_exit)


def _fail(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
