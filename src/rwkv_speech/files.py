"""Files that are there whole or not at all, and one clear line when the disk is full."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from rwkv_speech.errors import UserError

PARTIAL = ".part"  # ends the names of what is still being written

_NO_ROOM = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file too large"}


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[None]:
    """For the time of writing `path`: a disk without room becomes one line that says so.

    Raises:
        UserError: the disk, the quota or the limit of a file's size is exhausted.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise UserError(
            f"cannot write {path}: {_NO_ROOM[error.errno]}; what was written before is whole: make room, "
            "and give the same command again"
        ) from error


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes under a temporary name, to the disk, and renames.

    Raises:
        UserError: there is no room; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    with replacing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a crash of the machine may leave the new name and no content
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
