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
from rwkv_speech.files import json_line, printable

logger = logging.getLogger("rwkv_speech")


class BadSamples:
    """The policy for bad samples, and the record of those that were skipped.

    policy: "stop" raises at the first one, "skip" goes on without it.
    path: JSON-lines file (id, audio, reason) that lists the skipped ones. Lines are only ever appended, and
        a sample that stands there is not written again: each appears once, however many epochs, processes
        or runs meet it, and whoever reads it first: the words for what is wrong may differ.
    """

    def __init__(self, policy: Literal["stop", "skip"], path: str | Path) -> None:
        if policy not in ("stop", "skip"):
            raise UserError(f"policy for bad audio is {policy!r}; expected 'stop' or 'skip'")
        self.policy = policy
        self.path = Path(path)
        self._met: set[tuple[str, str]] = set()  # ids and audio, by this process, in this run
        self._listed: set[tuple[str, str]] = set()  # in the file, written by any process
        self._read_to = 0  # bytes

    def add(self, samples: Iterable[BadSample]) -> None:
        """Stop, or note the samples.

        Raises:
            UserError: a bad sample under "stop"; one line with its path and the reason.
        """
        new = []
        for sample in samples:
            if self.policy == "stop":
                raise UserError(
                    f"bad sample {sample.id}: {self._describe(sample)}; "
                    "put it right, or go on without such samples by --on_bad_audio skip"
                )
            if (sample.id, sample.audio) not in self._met:
                self._met.add((sample.id, sample.audio))
                new.append(sample)
                logger.warning("skipped bad sample %s: %s", sample.id, self._describe(sample))
        if new:
            self._list(new)

    @property
    def count(self) -> int:
        """How many samples this process skipped."""
        return len(self._met)

    def report(self) -> str:
        """One line for the end of the run: how many samples this process skipped, and where they stand."""
        if not self.count:
            return "no bad samples"
        return f"{self.count} bad sample{'s' * (self.count > 1)} skipped, listed in {self.path}"

    @staticmethod
    def _describe(sample: BadSample) -> str:
        return printable(sample.reason if sample.audio in sample.reason else f"{sample.audio}: {sample.reason}")

    def _list(self, samples: list[BadSample]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            with suppress(OSError):  # without locks, as on some cluster file systems, a race may double a line
                fcntl.lockf(file, fcntl.LOCK_EX)
            file.seek(self._read_to)
            whole, _, torn = file.read().rpartition(b"\n")
            if torn:  # by a process that was killed
                file.truncate(self._read_to + len(whole) + bool(whole))
            for line in whole.split(b"\n"):
                with suppress(ValueError, KeyError, TypeError):  # what others have written there
                    entry = json.loads(line)
                    self._listed.add((entry["id"], entry["audio"]))
            file.seek(0, os.SEEK_END)
            for sample in samples:
                if (sample.id, sample.audio) not in self._listed:
                    self._listed.add((sample.id, sample.audio))
                    file.write(json_line(asdict(sample)))
            self._read_to = file.tell()
