"""Progress bars that also read well in a log file."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
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
    # All at one position: to draw a bar below another, tqdm would send the cursor up and down.
    return tqdm(file=_Lines(sys.stderr), mininterval=15, maxinterval=15, ncols=100, ascii=True, position=0, **kwargs)


def passing(items: Iterable[Any], total: int, what: str, *, unit: str, show: bool) -> tqdm:
    """Returns the items with a bar that is gone when they are: for what may be quick, also while another bar is shown.

    Args:
        items: what to go through.
        total: how many they are.
        what: is done with them.
        unit: their name in the plural, after a space.
        show: whether this process shows bars.
    """
    return bar(iterable=items, total=total, desc=what, unit=unit, leave=False, delay=1, disable=not show)


_turn = threading.Lock()
_listener: Callable[[int], Any] | None = None


@contextlib.contextmanager
def turn(wanted: bool) -> Iterator[bool]:
    """Gives whether this block's programs may tell of their steps, if that is wanted: those of one block at a time may.

    All of them call the same function, which could not say whose step it was.
    """
    global _listener
    mine = wanted and _turn.acquire(blocking=False)
    try:
        yield mine
    finally:
        if mine:
            _listener = None
            _turn.release()


def hear(listener: Callable[[int], Any]) -> None:
    """Has the listener called with numbers of steps, as they are taken, from now on; of the block whose turn it is."""
    global _listener
    _listener = listener


def hear_of(steps: Any, _: Any) -> None:
    """What a program calls back that tells of its steps: how many they are, and something that they made."""
    if (listener := _listener) is not None:
        listener(int(steps))


def say(text: str = "") -> None:
    """Prints a line without cutting through a bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
