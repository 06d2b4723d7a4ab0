"""Progress bars that also read well in a log file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """A log file has no cursor to send back: each state of the bar is a line of its own there."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Writes a bar's state, if it is not just blanks, as a line."""
        text = text.strip("\r\n ")
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()


def bar(**kwargs: Any) -> tqdm:
    """Returns a `tqdm` bar with rate and ETA: drawn in place on a terminal, a line every 15 seconds elsewhere."""
    if sys.stderr.isatty():
        return tqdm(dynamic_ncols=True, **kwargs)
    return tqdm(file=_Lines(sys.stderr), mininterval=15, maxinterval=15, ncols=100, ascii=True, **kwargs)


_listeners: list[Callable[[], Any]] = []


@contextlib.contextmanager
def listening(listener: Callable[[], Any]) -> Iterator[None]:
    """Calls the listener at each step of the programs that run in this block, if they were compiled to tell of them."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell_of_step(*_: Any) -> None:
    """What a program that tells of its steps calls back, with an array that the step has made."""
    for listener in _listeners:
        listener()


def say(text: str = "") -> None:
    """Prints a line without cutting through a bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
