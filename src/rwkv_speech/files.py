"""Files that are there whole or not at all, and one clear line where the disk is full."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rwkv_speech.errors import UserError

PARTIAL = ".part"  # ends the name of what is still being written

_NO_ROOM = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "the file would be larger than allowed here",
}


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
