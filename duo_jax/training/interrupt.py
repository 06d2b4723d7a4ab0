"""Ctrl-C and SIGTERM: a run saves before it leaves."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from duo_jax import progress

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """Raised between two batches of an evaluation, which a signal ends."""


class Interrupt:
    """Notes SIGINT and SIGTERM, so that the loop can save and leave between two steps.

    Attributes:
        number: the signal's number; None as long as there was none.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def _note(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self.number = number

    def agreed(self, step: int, every: int) -> bool:
        """Whether to stop after this step: any process was told to. Several processes ask each other every so many steps."""
        if jax.process_count() == 1:
            return self.alone()
        if step % every:
            return False
        told = multihost_utils.process_allgather(np.asarray(self.number or 0))
        self.number = self.number or int(told.max()) or None
        return bool(told.any())

    def alone(self) -> bool:
        """Whether this process was told to stop and need ask no other, which may be in the middle of something."""
        return jax.process_count() == 1 and self.number is not None

    def between(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields items as long as this process may go on.

        Raises:
            Stopped: it was told to stop, and is the only one.
        """
        for item in items:
            if self.alone():
                raise Stopped
            yield item

    @contextlib.contextmanager
    def watch(self) -> Iterator[Interrupt]:
        """Handles the signals while the block runs, and puts the old handlers back.

        Off the main thread, where Python lets nobody handle signals, they are left to whoever does.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        ear, mouth = socket.socketpair()
        mouth.setblocking(False)
        thread = threading.Thread(target=_tell, args=(ear,), daemon=True)
        thread.start()
        old = {number: signal.signal(number, self._note) for number in _SIGNALS}
        fd = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in old.items():
                signal.signal(number, handler)
            mouth.close()
            thread.join()
            ear.close()


def _tell(ear: socket.socket) -> None:
    """Says that a signal came, the first time. Python handles signals between two operations only, and one may be minutes
    of a sampler's work: a thread is told of them at once."""
    told = False
    while numbers := ear.recv(1):
        if not told and numbers[0] in _SIGNALS:
            told = True
            name = signal.Signals(numbers[0]).name
            progress.say(
                f"{name}: saves after what is being computed, and stops. Ctrl-C from now on stops without saving."
            )
