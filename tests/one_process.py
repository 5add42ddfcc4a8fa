"""Runs train.py again and again in one process, each time with what it printed, its status, time and memory.

A process of its own takes seconds to start, which thousands of runs can't have. One that hangs or dies is named and
replaced.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """Of one run: its exit status (None: it was killed after its time, or died), what it printed, seconds."""

    status: int | None
    stdout: str
    stderr: str
    seconds: float


class OneProcess:
    """`run(*flags)` in a child that lives on; `peak` is the largest resident memory of any child, in bytes.

    limit_s: seconds after which a run counts as hanging.
    """

    def __init__(self, *, limit_s: float = 20.0) -> None:
        self.limit_s = limit_s
        self.peak = 0
        self._child: subprocess.Popen | None = None

    def run(self, *flags: str) -> Outcome:
        child = self._child = self._child or self._start()
        late = threading.Timer(self.limit_s, child.kill)
        child.stdin.write(json.dumps(flags) + "\n")
        child.stdin.flush()
        late.start()
        answer = child.stdout.readline()
        late.cancel()
        if not answer:
            self.close()
            return Outcome(None, "", "", self.limit_s)
        found = json.loads(answer)
        self.peak = max(self.peak, found.pop("peak"))
        return Outcome(**found)

    def close(self) -> None:
        if self._child:
            self._child.stdin.close()
            self._child.wait()
            self._child = None

    def _start(self) -> subprocess.Popen:
        pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "errors": "surrogateescape"}
        child = subprocess.Popen([sys.executable, "-m", "tests.one_process"], cwd=ROOT, **pipe)
        child.stdout.readline()  # it has imported everything
        return child


def _serve() -> None:
    import logging
    import time

    # The first import of these, and of what they import when they are first used, isn't any run's time.
    import rwkv_speech.ops  # noqa: F401
    import train

    answers = os.fdopen(os.dup(1), "w", errors="surrogateescape")
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        with _captured() as (stdout, stderr):
            logging.getLogger().handlers.clear()
            sys.argv = ["train.py", *json.loads(line)]
            began = time.perf_counter()
            try:
                status = train.main()
            except SystemExit as exit:
                status = exit.code
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 1
            seconds = time.perf_counter() - began
        found = {"status": status, "stdout": stdout(), "stderr": stderr(), "seconds": seconds, "peak": _peak()}
        print(json.dumps(found), file=answers, flush=True)


@contextlib.contextmanager
def _captured() -> Iterator[tuple[Any, Any]]:
    """Standard output and error into files, those of C libraries and of child processes too; readers of them."""
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    files = [tempfile.TemporaryFile() for _ in kept]  # noqa: SIM115

    def reader(file: Any) -> Any:
        def read() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        return read

    try:
        for (fd, _), file in zip(kept, files, strict=True):
            os.dup2(file.fileno(), fd)
        yield reader(files[0]), reader(files[1])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)


def _peak() -> int:
    """Bytes of resident memory at most so far; 0 where the system doesn't say."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


if __name__ == "__main__":
    _serve()
