"""Ctrl-C and SIGTERM: a run saves before it stops."""

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
    """Raised between two batches of an evaluation, to end it after a signal."""


class Interrupt:
    """Records SIGINT and SIGTERM, so that the loop can save and stop between two steps.

    Attributes:
        number: the signal's number; None before any signal.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def _note(self, number: int, _: Any) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt  # Ctrl-C after a signal stops at once
        self.number = number

    def agreed(self, step: int, every: int) -> bool:
        """Whether to stop after this step, because any process got a signal; several processes agree every `every` steps."""
        if jax.process_count() == 1:
            return self.alone()
        if step % every:
            return False
        numbers = multihost_utils.process_allgather(np.asarray(self.number or 0))
        self.number = self.number or int(numbers.max()) or None
        return bool(numbers.any())

    def alone(self) -> bool:
        """Whether this process got a signal and is the only one, so that it may stop without asking others."""
        return jax.process_count() == 1 and self.number is not None

    def between(self, items: Iterable[Any]) -> Iterator[Any]:
        """Yields the items until a signal stops this process.

        Raises:
            Stopped: `alone` is true before an item.
        """
        for item in items:
            if self.alone():
                raise Stopped
            yield item

    @contextlib.contextmanager
    def watch(self) -> Iterator[Interrupt]:
        """Handles the signals while the block runs, then restores the old handlers.

        Does nothing outside the main thread, where Python allows no signal handlers.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        thread = threading.Thread(target=_announce, args=(receiver,), daemon=True)
        thread.start()
        old = {number: signal.signal(number, self._note) for number in _SIGNALS}
        fd = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield self
        finally:
            signal.set_wakeup_fd(fd)
            for number, handler in old.items():
                signal.signal(number, handler)
            sender.close()
            thread.join()
            receiver.close()


def _announce(receiver: socket.socket) -> None:
    """Prints a line at the first signal, from a thread: Python's own handlers run only between two operations, and one
    operation may be minutes of sampling."""
    announced = False
    while numbers := receiver.recv(1):
        if not announced and numbers[0] in _SIGNALS:
            announced = True
            name = signal.Signals(numbers[0]).name
            progress.say(
                f"{name}: saves when the current computation is done, then stops. Ctrl-C from now on stops without saving."
            )
