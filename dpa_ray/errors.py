"""Which exceptions mean: tell the user, without a traceback?"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message says what was expected, what was found and what to do; exit code 1."""


class Unreachable(UserError):
    """A server that cannot be asked from here, for want of a network or of credentials; what it has is not known."""


class NoAnswer(Unreachable):
    """A server that cannot be reached now, or is too busy: the same call may succeed later."""


class LeaseTaken(UserError):
    """Another process that lives is at work on the same."""


class BrokenJson(UserError):
    """A file that should be JSON and is not."""
