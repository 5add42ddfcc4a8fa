"""What goes to standard output and standard error: nothing that a terminal obeys, in any encoding, closed or full."""

import codecs
import contextlib
import json
import logging
import os
import signal
import sys
from typing import Any

from rwkv_speech.errors import UserError
from rwkv_speech.files import printable

log = logging.getLogger("rwkv_speech")

ESCAPED = "rwkv_speech.escaped"  # what is done about a character that an encoding lacks

READER_GONE = 128 + signal.SIGPIPE  # the exit status of a program that SIGPIPE ended


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """As JSON writes them, so that JSON stays what it is."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escaped)


class LogFormatter(logging.Formatter):
    """Messages in one printable line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        return printable(super().formatMessage(record))


def say(text: str) -> None:
    """Prints to standard output, at once.

    Raises:
        UserError: it is closed or full.
        SystemExit: who read it has gone, as `head` does.
    """
    try:
        print(text, end="", flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):  # or Python would try to write the rest at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            log.error("standard output is closed by what was reading it; stopping here")
            raise SystemExit(READER_GONE) from None
        raise UserError(f"cannot write to standard output: {error.strerror}") from None


def complain(message: str) -> None:
    """Prints a mistake of the user's as one line on standard error."""
    print(f"train.py: {printable(message)}", file=sys.stderr)


class _Patient:
    """Standard error, as far as it can be written: progress and remarks must not stop the work."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Makes standard output and standard error fit for anything. Called once, before the program opens a file."""
    # A closed one's number would be that of the next file that is opened, and what is printed would go into that.
    while (number := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    os.close(number)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)  # can't be written, and says so
    if sys.stderr is None:
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if not sys.stderr.isatty():  # in a log the hub's bars would be a thousand lines; both read this when imported
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    sys.stdout.reconfigure(errors=ESCAPED)
    sys.stderr = _Patient(sys.stderr)
