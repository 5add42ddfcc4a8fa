"""A project's locks: one training and one evaluation at a time, each beside the other if need be."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from rwkv_speech.errors import UserError

log = logging.getLogger("rwkv_speech")

_HELD = (errno.EACCES, errno.EAGAIN)
_RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")


def is_first_process() -> bool:
    """Whether this is, of a run's processes, the first one, by what their launcher says in the environment."""
    return not any(int(os.environ.get(rank) or 0) for rank in _RANKS)


@contextlib.contextmanager
def project_lock(project: Path, operation: str) -> Iterator[None]:
    """Holds the lock of an operation, "training" or "evaluation", in a project's folder, which is made if need be.

    The first of several processes holds it for all. The kernel drops it with the process that holds it, however that
    ends; processes that it forks or starts don't hold it. What the lock made, file and folders, is removed again, where
    nothing else has come into it. Where the file system knows no locks, a line of the log says so.

    Raises:
        UserError: another process holds it, or the folder can't be written to.
    """
    if not is_first_process():
        yield
        return
    made = [folder for folder in (project, *project.parents) if not folder.exists()]
    path = project / f".{operation}.lock"
    file = None
    try:
        file = _lock(path, operation)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # while it is held: whoever waits for this file sees that it is gone
            file.close()
        with contextlib.suppress(OSError):
            for folder in made:
                folder.rmdir()


def _lock(path: Path, operation: str) -> BinaryIO:
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab+")
        except OSError as error:
            raise UserError(f"--proj_dir {path.parent}: {error.strerror}; expected a folder to write to") from error
        try:
            # A lock of this kind belongs to the process; one by flock would live on in the loader's workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                file.close()
                raise UserError(f"{path.parent} is in use: {_holder(path, operation)}; wait for it, stop it, or give "
                                "another --proj_dir") from None  # fmt: skip
            log.warning("%s can't be locked (%s): see to it that nothing else runs in this folder", path, error)
            return file
        if _is_still(path, file):
            break
        file.close()  # its holder removed it as we opened it
    since = datetime.now().astimezone().isoformat(" ", "seconds")
    holder = {"operation": operation, "pid": os.getpid(), "host": socket.gethostname(), "since": since}
    file.truncate(0)
    file.write(json.dumps(holder).encode() + b"\n")
    file.flush()
    return file


def _is_still(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _holder(path: Path, operation: str) -> str:
    time.sleep(0.1)  # for one that locked it in this moment, and is about to write who it is
    try:
        holder = json.loads(path.read_bytes())
        return "{operation} by process {pid} on {host}, since {since}".format(**holder)
    except (OSError, ValueError, TypeError, KeyError):
        return f"{operation} by another process"
