"""Runs train.py again and again in one process, each time with what it printed, its status, time and memory.

A process of its own takes seconds to start, which thousands of runs can't have. One that hangs, takes too much memory
or dies is named and replaced.
"""

import contextlib
import faulthandler
import functools
import json
import os
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Outcome:
    """Of one run.

    status: its exit status; None where it was killed or died, as `end` says.
    peak: the largest resident memory in bytes; 0 where the system doesn't say.
    learnt: ids of the samples of all training steps.
    """

    status: int | None
    stdout: str
    stderr: str
    seconds: float
    peak: int
    learnt: tuple[str, ...] = ()
    end: str = ""


class OneProcess:
    """`run(*flags)` in a child that lives on.

    limit_s: seconds after which a run is killed, and
    limit_bytes: resident memory at which it is.
    """

    def __init__(self, *, limit_s: float, limit_bytes: float) -> None:
        self.limit_s, self.limit_bytes = limit_s, limit_bytes
        self._child: subprocess.Popen | None = None
        self._folder = tempfile.TemporaryDirectory()
        # Files, which outlive a child; what C libraries and child processes print goes there, too.
        self._printed = [Path(self._folder.name, name) for name in ("stdout", "stderr")]

    def run(self, *flags: str) -> Outcome:
        child = self._child = self._child or self._start()
        child.stdin.write(json.dumps(flags) + "\n")
        child.stdin.flush()
        began, peak, end = time.perf_counter(), 0, ""
        while not end and not select.select([child.stdout], [], [], 0.1)[0]:
            peak = max(peak, _peak(child.pid))
            if time.perf_counter() - began > self.limit_s:
                end = f"takes more than {self.limit_s:g} s"
            elif peak > self.limit_bytes:
                end = f"takes more than {self.limit_bytes / 1e9:g} GB"
        if end:
            child.kill()
        answer = child.stdout.readline()
        seconds = time.perf_counter() - began
        if end or not answer:
            self._child = None
            child.stdin.close()
            status = child.wait()
            end = end or f"dies, status {status}"
        stdout, stderr = (path.read_bytes().decode(errors="replace") for path in self._printed)
        found = {"status": None, "peak": 0, "learnt": ()} if end else json.loads(answer)
        return Outcome(
            stdout=stdout, stderr=stderr, seconds=seconds, end=end, **found | {"peak": max(peak, found["peak"])}
        )

    def close(self) -> None:
        if self._child:
            self._child.stdin.close()
            self._child.wait()
        self._folder.cleanup()

    def _start(self) -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-m", "tests.one_process", str(self.limit_s), *map(str, self._printed)]
        child = subprocess.Popen(command, cwd=ROOT, **pipes)
        if not child.stdout.readline():  # by then it has imported everything
            raise RuntimeError("it does not start")
        return child


def _serve(limit_s: float, *printed: str) -> None:
    # The first import of these, and of what they import when they are first used, isn't any run's time.
    import logging

    import rwkv_speech.ops  # noqa: F401
    import train
    from rwkv_speech import terminal

    terminal.prepare()
    answers = os.fdopen(os.dup(1), "w")
    print("ready", file=answers, flush=True)
    learnt = _note_learnt()
    for line in sys.stdin:
        learnt.clear()
        with contextlib.suppress(OSError):  # where the system has no such thing, the peak is that of all runs so far
            Path("/proc/self/clear_refs").write_text("5")
        with _redirected(printed):
            logging.getLogger().handlers.clear()
            sys.argv = ["train.py", *json.loads(line)]
            faulthandler.dump_traceback_later(0.95 * limit_s, file=2)  # where it hangs
            try:
                status = train.main()
            except SystemExit as exit:
                status = exit.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
                status = 1
            faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"status": status, "peak": _peak("self"), "learnt": learnt}), file=answers, flush=True)


def _note_learnt() -> list[str]:
    """Takes the ids of the samples of all training steps from now on."""
    from rwkv_speech.engine.module import TrainingModule

    learnt: list[str] = []
    step = TrainingModule.training_step

    @functools.wraps(step)
    def noting(self, batch, index):
        learnt.extend(batch.names)
        return step(self, batch, index)

    TrainingModule.training_step = noting
    return learnt


@contextlib.contextmanager
def _redirected(paths: tuple[str, ...]) -> Iterator[None]:
    """Standard output and error into files."""
    kept = [(fd, os.dup(fd)) for fd in (1, 2)]
    try:
        for (fd, _), path in zip(kept, paths, strict=True):
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(file, fd)
            os.close(file)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, copy in kept:
            os.dup2(copy, fd)
            os.close(copy)


def _peak(process: int | str) -> int:
    """Bytes of resident memory at most so far; 0 where the system doesn't say."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    return 0


if __name__ == "__main__":
    _serve(float(sys.argv[1]), *sys.argv[2:])
