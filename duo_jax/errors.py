"""The one exception for mistakes that a user can correct: a wrong flag, a missing file, a batch that does not divide."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input; its message is one sentence that says what is wrong and what to do.

    Library code raises it; the command line prints its text as one line, without a traceback, and exits with status 2.
    """


def out_of_memory(error: BaseException) -> bool:
    """Whether JAX raised an error because a device's memory is full."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def first_line(error: BaseException) -> str:
    """Returns the first line of an exception's message, or its class name if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
