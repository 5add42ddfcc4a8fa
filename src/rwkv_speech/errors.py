"""The one exception that is shown to the user as a single line."""


class UserError(Exception):
    """Something the user can put right: what was wrong, what was expected, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
