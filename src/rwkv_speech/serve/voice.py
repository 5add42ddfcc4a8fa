"""Spoken answers: text, as it comes, to sentences, and these to samples, by the package hibari-tts."""

import asyncio
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

SENTENCE = re.compile(r".*?[.!?;:\u2026]+(?=\s)\s*", re.DOTALL)


def sentences(text: str) -> tuple[list[str], str]:
    """The sentences that are over in a text that goes on, and what is left of it."""
    found = SENTENCE.findall(text)
    return [sentence.strip() for sentence in found], text[sum(map(len, found)) :]


class Voice:
    """Speaks one sentence after the other, of whatever session, in a thread of its own.

    rate: samples in a second.
    """

    def __init__(self) -> None:
        from hibari import Hibari

        self._speak: Any = Hibari(threads=1)
        self.rate = int(self._speak.sample_rate)
        self._thread = ThreadPoolExecutor(1, "voice")

    async def pcm(self, sentence: str) -> bytes:
        """16-bit little-endian samples of a sentence; none of one without a letter or digit."""
        if not any(map(str.isalnum, sentence)):
            return b""
        wave = await asyncio.get_running_loop().run_in_executor(self._thread, self._speak, sentence)
        return np.rint(np.clip(np.asarray(wave, np.float32), -1, 1) * 32767).astype("<i2").tobytes()
