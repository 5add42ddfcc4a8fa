"""The one exception that is shown to the user as a single line."""


class UserError(Exception):
    """Something the user can put right: what was wrong, what was expected, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
