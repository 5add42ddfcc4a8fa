"""The one exception that is shown to the user as a single line, and other libraries' errors in a few words."""

import re


class UserError(Exception):
    """Something the user can put right: what was wrong, what was expected, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def reason(error: Exception) -> str:
    """The first sentence of an error's text, or its class where it has none.

    Not torch's own beginning and advice, which is to run the code that a weight file brings.
    """
    text = str(error).split("WeightsUnpickler error:")[-1].strip()
    return re.split(r"\. |\n", text)[0][:150].rstrip(". ") or type(error).__name__
