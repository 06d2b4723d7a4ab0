"""Progress bars that also read well in a log file."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """A stream for a log file, which has no cursor to move back: each state of the bar becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Writes a bar's state as a line, unless it is blank."""
        text = text.strip("\r\n ")
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        """Flushes the stream."""
        self._stream.flush()


def bar(**kwargs: Any) -> tqdm:
    """Returns a `tqdm` bar with rate and ETA: drawn in place on a terminal or in a notebook, else a line every 15 s."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:  # a notebook redraws a line, too
        return tqdm(dynamic_ncols=True, **kwargs)
    # All bars share position 0: otherwise tqdm would move the cursor to draw one bar below another.
    return tqdm(file=_Lines(sys.stderr), mininterval=15, maxinterval=15, ncols=100, ascii=True, position=0, **kwargs)


def passing(items: Iterable[Any], total: int, what: str, *, unit: str, show: bool) -> tqdm:
    """Returns an iterator over the items with a bar that appears after a second and disappears at the end.

    It may run while another bar is shown.

    Args:
        items: to iterate over.
        total: the number of items.
        what: the bar's label.
        unit: the items' name in the plural, after a space.
        show: whether this process shows bars.
    """
    return bar(iterable=items, total=total, desc=what, unit=unit, leave=False, delay=1, disable=not show)


_owned = threading.Lock()
_listener: Callable[[int], Any] | None = None


@contextlib.contextmanager
def own_step_reports(wanted: bool) -> Iterator[bool]:
    """Yields True if `wanted` and no other block owns the step reports; this block then owns them until it ends.

    One block at a time, because all compiled programs call the same `report_steps`, which cannot tell them apart.
    """
    global _listener
    owner = wanted and _owned.acquire(blocking=False)
    try:
        yield owner
    finally:
        if owner:
            _listener = None
            _owned.release()


def listen(listener: Callable[[int], Any]) -> None:
    """From now on calls `listener(n)` whenever a program reports n more steps; for the owner of the reports."""
    global _listener
    _listener = listener


def report_steps(steps: Any, _: Any) -> None:
    """The callback of compiled programs: the number of steps taken, and a value computed in them, which is ignored."""
    if (listener := _listener) is not None:
        listener(int(steps))


def say(text: str = "") -> None:
    """Prints a line without breaking a bar."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()
