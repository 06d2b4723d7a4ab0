"""The one exception for what a user can put right: a wrong flag, a missing file, a batch that does not divide."""


class UserError(ValueError):
    """A mistake in the input, told in one sentence: what is wrong and what to do.

    Library code raises it; the command line prints its text as one line, without a traceback, and exits with status 2.
    """
