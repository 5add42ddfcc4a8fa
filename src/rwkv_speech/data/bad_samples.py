"""What happens to samples that can't be used: the run stops, or they are counted, listed and reported."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rwkv_speech.data.sample import BadSample
from rwkv_speech.errors import UserError

logger = logging.getLogger("rwkv_speech")


class BadSamples:
    """The policy for bad samples, and the record of those that were skipped.

    policy: "stop" raises at the first one, "skip" goes on without it.
    path: JSON-lines file (id, audio, reason) that lists the skipped ones. Lines are only ever appended, and
        one that stands there is not written again: each sample appears once, however many epochs, processes
        or runs meet it.
    """

    def __init__(self, policy: Literal["stop", "skip"], path: str | Path) -> None:
        if policy not in ("stop", "skip"):
            raise UserError(f"policy for bad audio is {policy!r}; expected 'stop' or 'skip'")
        self.policy = policy
        self.path = Path(path)
        self._met: set[str] = set()  # by this process, in this run
        self._listed: set[str] = set()  # in the file, written by any process
        self._read_to = 0  # bytes

    def add(self, samples: Iterable[BadSample]) -> None:
        """Stop, or note the samples.

        Raises:
            UserError: a bad sample under "stop"; one line with its path and the reason.
        """
        new = []
        for sample in samples:
            line = json.dumps(asdict(sample), ensure_ascii=False) + "\n"
            if self.policy == "stop":
                raise UserError(
                    f"bad sample {sample.id}: {self._describe(sample)}; "
                    "put it right, or go on without such samples by --on_bad_audio skip"
                )
            if line not in self._met:
                self._met.add(line)
                new.append(line)
                logger.warning("skipped bad sample %s: %s", sample.id, self._describe(sample))
        if new:
            self._list(new)

    def report(self) -> str:
        """One line for the end of the run: how many samples this process skipped, and where they stand."""
        if not self._met:
            return "no bad samples"
        return f"{len(self._met)} bad sample{'s' * (len(self._met) > 1)} skipped, listed in {self.path}"

    @staticmethod
    def _describe(sample: BadSample) -> str:
        return sample.reason if sample.audio in sample.reason else f"{sample.audio}: {sample.reason}"

    def _list(self, lines: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            with suppress(OSError):  # without locks, as on some cluster file systems, a race may double a line
                fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(self._read_to)
            whole, _, torn = file.read().rpartition(b"\n")
            if torn:  # by a process that was killed
                file.truncate(self._read_to + len(whole) + bool(whole))
            self._listed.update(f"{line}\n" for line in whole.decode(errors="replace").split("\n"))
            file.seek(0, os.SEEK_END)
            file.write("".join(line for line in lines if line not in self._listed).encode())
            self._read_to = file.tell()
            self._listed.update(lines)
