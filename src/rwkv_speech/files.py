"""Files that are there whole or not at all, lines of text, and names that anything may be in."""

import contextlib
import errno
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_speech.errors import UserError

PARTIAL = ".part"  # ends the name of what is still being written

_NO_ROOM = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than allowed here",
}

# Control characters, ends of lines, those that reverse the direction of writing, and bytes that are no UTF-8.
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Around the writing of `path`: a disk without room becomes one line.

    Raises:
        UserError: the disk, the quota or the limit of a file's size is exhausted.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"cannot write {path}: {_NO_ROOM[error.errno]}; what was written before is whole: "
            "make room and give the same command again (an evaluation with --resume)"
        ) from error


def check_folder(path: Path, flag: str) -> None:
    """Tries to write into the folder that a flag names, or where it would be made, before hours of work.

    Raises:
        UserError: it can't be made or written to.
    """
    try:
        nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise UserError(f"--{flag} {path}: {error.strerror}; expected a folder to write to") from None


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes under another name, down to the disk, and renames.

    Raises:
        UserError: there is no room; `path` is as it was.
    """
    # Not all of its name, which may be as long as a name can be.
    partial = path.with_name(f".{path.name[:50]}.{os.getpid()}{PARTIAL}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else the machine's end could leave the new name without its content
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 text file, without what ends them: `\n`, `\r\n`, or `\r` where no `\n` is in the file.

    What else Unicode takes for the end of a line (U+2028, U+0085) is part of a text, unlike to `str.splitlines`.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: {'is no file' if os.path.lexists(path) else 'no such file'}; expected a text file")
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}: line {line}: can't be read as UTF-8 text ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error
    return [line.removesuffix("\r") for line in text.split("\n")] if "\n" in text else text.split("\r")


def json_line(content: dict[str, Any]) -> bytes:
    r"""One line of JSON in UTF-8; what UTF-8 can't hold, as in a file's name of other bytes, as JSON's `\udcff`."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def printable(text: str | os.PathLike) -> str:
    r"""On one line, in UTF-8, and nothing that a terminal would obey: `\n`, `\x1b`, `\udcff` in the place of such."""
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))
