"""Audio of one session on its way to the model: 16-bit samples of any rate, resampled, in pieces, at a bounded pace."""

import asyncio
import time
from collections.abc import AsyncIterator

import numpy as np
import soxr

from rwkv_speech.serve.errors import ApiError
from rwkv_speech.speech.audio import SAMPLE_RATE
from rwkv_speech.speech.decoders import RATES

PIECE = 0.32  # s that are heard at a time; between two pieces it is the turn of others
AHEAD = 10.0  # s of audio that may come at once; after that
PACE = 2.0  # s of it in a second: a session that sends without a pause takes no more of the server than two


class Pace:
    """How far ahead of a clock a session is."""

    def __init__(self) -> None:
        self._began, self._taken = time.monotonic(), 0.0

    async def take(self, seconds: float) -> None:
        """Waits until so much more audio may come."""
        now = (time.monotonic() - self._began) * PACE
        self._taken = max(self._taken, now) + seconds  # silence saves nothing up
        await asyncio.sleep(max(0.0, (self._taken - now - AHEAD) / PACE))


class Samples:
    """What comes in, as it is heard: (samples,) float32 at 16 kHz.

    Raises:
        ApiError: a rate that can't be.
    """

    def __init__(self, rate: object, pace: Pace) -> None:
        if not isinstance(rate, int) or isinstance(rate, bool) or not RATES[0] <= rate <= RATES[1]:
            raise ApiError(400, f"rate: expected Hz, from {RATES[0]} to {RATES[1]}", param="rate")
        self.rate, self._pace = rate, pace
        self._stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1)

    async def pieces(self, pcm: bytes, *, last: bool = False) -> AsyncIterator[np.ndarray]:
        """Of 16-bit little-endian samples.

        last: they are the end, after which others begin anew.
        """
        if len(pcm) % 2:
            raise ApiError(400, "audio: an odd number of bytes; expected 16-bit samples")
        samples = np.frombuffer(pcm, "<i2").astype(np.float32) / 32768
        size = max(1, round(PIECE * self.rate))
        for start in range(0, len(samples), size):
            piece = samples[start : start + size]
            await self._pace.take(len(piece) / self.rate)
            if len(heard := self._resampled(piece)):
                yield heard
        if last:
            if len(heard := self._resampled(samples[:0], last=True)):
                yield heard
            self._stream.clear()

    def _resampled(self, samples: np.ndarray, *, last: bool = False) -> np.ndarray:
        return samples if self.rate == SAMPLE_RATE else self._stream.resample_chunk(samples, last=last)
