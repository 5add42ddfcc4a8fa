"""Progress on standard error: a bar in a terminal; elsewhere, in the log of a cluster, a line now and then."""

import logging
import time
from collections.abc import Callable
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger("rwkv_speech")

NOTE_SECONDS = 2.0  # between two looks at what a bar says besides, which may take a while


class Progress:
    """How much of something is done; a context, entered before the first `advance`.

    name: what is being done.
    total: how many there are of
    unit: what is counted.
    done: how many of them were done before.
    log_every: seconds between lines, where standard error is no terminal.
    visible: whether this process shows it; of several, one should.
    transient: whether the bar goes away at the end.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str = "utterances",
        *,
        done: int = 0,
        log_every: float,
        visible: bool = True,
        transient: bool = False,
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        console = Console(stderr=True)
        self._in_lines = not console.is_terminal
        self._visible, self._every = visible, log_every if self._in_lines else NOTE_SECONDS
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = RichProgress(
            *(*columns, TextColumn("{task.fields[note]}")),
            console=console,
            transient=transient,
            redirect_stdout=False,  # else what is printed meanwhile would go to standard error, too
            disable=self._in_lines or not visible,
        )
        self._task = self._bar.add_task(name, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        self._first, self._begun = self.done, time.monotonic()
        self._shown = self._begun if self._in_lines else self._begun - NOTE_SECONDS
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int, note: Callable[[], str] = str) -> None:
        """So many more are done. `note` gives what else is to be shown, and is called only where that is due."""
        self.done += count
        self._bar.update(self._task, completed=self.done)
        now = time.monotonic()
        if not self._visible or now - self._shown < self._every:
            return
        self._shown = now
        if not self._in_lines:
            self._bar.update(self._task, note=note())
        elif self.done > self._first:
            speed = (self.done - self._first) / (now - self._begun)
            left = hours((self.total - self.done) / speed)
            text = f"{self.name}: {self.done} of {self.total} {self.unit}, {speed:.3g} a second, {left} left"
            log.info("%s", ", ".join(filter(None, (text, note()))))


def hours(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
