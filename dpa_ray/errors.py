"""The one exception that means: tell the user, without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message says what was expected, what was found and what to do; exit code 1."""
