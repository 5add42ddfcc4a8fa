"""Stamps: what stands for the content of a file for as long as nobody writes to it."""

import time
from pathlib import Path

SETTLED = 2.0  # s; no file system's clock ticks more slowly


def file_stamp(path: Path) -> str | None:
    """Path, size and times of a file, links followed; whoever changes the content changes the stamp.

    The time of the inode's change is part of it: unlike that of the content, it can't be set back.

    Returns:
        None where there is no such file, or where it changed so recently that one more change could leave the same
        times.
    """
    try:
        path = path.resolve()
        found = path.stat()
    except OSError:
        return None
    if time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) < SETTLED * 1e9:
        return None
    return f"{path} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
