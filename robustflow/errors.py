"""The one exception that is written for the user."""

from __future__ import annotations


class UserError(ValueError):
    """A problem that the user can mend: one line that says what is wrong and what to do.

    The command line prints the line and exits with code 2; nothing that was there before is lost.
    """
