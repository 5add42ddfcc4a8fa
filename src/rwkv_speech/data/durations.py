"""How long recordings are, kept: batches by length need it at every start, and 280,000 headers take minutes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from rwkv_speech.data.sample import Row
from rwkv_speech.files import write_whole
from rwkv_speech.progress import Progress
from rwkv_speech.speech.audio import AudioError
from rwkv_speech.speech.recording import Recording

logger = logging.getLogger("rwkv_speech")

_THREADS = 8  # what they wait for is the disk, or the network behind it
_PIECE = 256  # utterances to a task


def read_durations(rows: Sequence[Row], cache: Path, *, log_every: float = 30.0, first: bool = True) -> np.ndarray:
    """Lengths in seconds: from the source where it gives them, else from `cache`, else from the file's header.

    cache: a JSON file of lengths by the stamps of their files (see `file_stamp`), so that a file that was written to
        is read again. It is made where it is absent or can't be read, and added to; it holds the lengths of other
        utterances, too.
    log_every: see `Progress`.
    first: whether this is, of a run's processes, the one that writes the cache and shows progress.

    Returns:
        (rows,) float64, of a conversation the sum; 0 where a recording can't be opened. Loading it will say why, and
        make it a bad sample.
    """
    known: dict[str, float] = {}
    with suppress(OSError, ValueError, AttributeError):
        content = json.loads(cache.read_text(encoding="utf-8")).items()
        known = {stamp: x for stamp, x in content if isinstance(x, float) and 0 < x < math.inf}
    found: dict[str, float] = {}
    seconds, unread = np.zeros(len(rows)), np.zeros(len(rows), bool)

    def read(start: int) -> int:
        piece = rows[start : start + _PIECE]
        for index, row in enumerate(piece, start):
            lengths = [_seconds(recording, known, found) for recording in row.recordings]
            seconds[index] = sum(lengths) if all(lengths) else 0.0
            unread[index] = not all(lengths)
        return len(piece)

    pool = ThreadPoolExecutor(_THREADS)
    try:
        with Progress(
            "lengths of recordings", len(rows), "recordings", log_every=log_every, visible=first, transient=True
        ) as progress:
            for done in pool.map(read, range(0, len(rows), _PIECE)):
                progress.advance(done)
    finally:  # an interrupted run has not read for nothing
        pool.shutdown(cancel_futures=True)
        if found and first:
            write_whole(cache, json.dumps(known | found, ensure_ascii=False, indent=0).encode())
    if unread.any():
        logger.warning("%d of %d recordings have no readable length", unread.sum(), len(rows))
    return seconds


def _seconds(recording: Recording, known: dict[str, float], found: dict[str, float]) -> float:
    if recording.duration:
        return recording.duration
    stamp = recording.stamp()
    if stamp in known:
        return known[stamp]
    try:
        seconds = recording.seconds()
    except (AudioError, OSError):
        return 0.0
    if stamp is not None:
        found[stamp] = seconds
    return seconds
