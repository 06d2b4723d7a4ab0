"""Mutes the tracebacks that Orbax's background work prints after one of its errors was already raised.

Orbax reads and writes many arrays at once. The first one that fails raises, and ends the work on the others; each of these
then prints a traceback of its own, through `sys.unraisablehook` or asyncio's log. The user should see the first error only.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any


def mute() -> None:
    """Mutes those tracebacks from now on, and nothing else; further calls change nothing."""
    _mute_threads()
    _mute_tasks()


@contextlib.contextmanager
def muted_on_error() -> Iterator[None]:
    """Mutes while the block runs and, if it raises, from then on: abandoned reads may end after the error."""
    before = sys.unraisablehook
    _mute_threads()
    try:
        yield
    except Exception:
        _mute_tasks()
        raise
    sys.unraisablehook = before


def _mute_threads() -> None:
    if getattr(sys.unraisablehook, "func", None) is not _report_others:
        sys.unraisablehook = functools.partial(_report_others, sys.unraisablehook)


def _mute_tasks() -> None:
    logging.getLogger("asyncio").addFilter(_is_of_others)  # adding the same function again does nothing


def _report_others(report: Callable[[Any], None], unraisable: Any) -> None:
    """Calls `report`, the hook that was there before, unless the exception comes from one of Orbax's abandoned reads."""
    text = str(unraisable.exc_value)
    if "Event loop is closed" not in text and "while reading array index" not in text:
        report(unraisable)


def _is_of_others(record: logging.LogRecord) -> bool:
    """False for an asyncio log record about an unretrieved exception that was raised inside Orbax."""
    if not record.getMessage().startswith("Task exception was never retrieved"):
        return True
    frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    return not any(str(frame.f_globals.get("__name__")).startswith("orbax.") for frame, _ in frames)
