"""A recording that was sent -> its transcript, piece by piece: cut as prediction cuts, answered as others are."""

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from anyio import CapacityLimiter, to_thread
from torch import Tensor

from rwkv_speech.data.sample import Row
from rwkv_speech.options import DecodingOptions
from rwkv_speech.serve.engine import Answer, Engine
from rwkv_speech.serve.errors import ApiError
from rwkv_speech.speech.audio import SAMPLE_RATE, Longest, TooLongError, audio_blocks
from rwkv_speech.speech.segments import AudioSegment, cut
from rwkv_speech.subtitles import joined
from rwkv_speech.transcription import Segment, Transcript

AHEAD = 4  # segments of a recording that are with the engine at a time: what a long one may take from others
READERS = 2  # recordings that are decoded at a time


class Reader:
    """Decodes recordings in threads of its own.

    longest: seconds of audio in a request.
    """

    def __init__(self, longest: float) -> None:
        self.longest = Longest(longest, "a request may have")
        self._limiter = CapacityLimiter(READERS)

    async def waveform(self, encoded: bytes, name: str, longest: Longest) -> Tensor:
        """All of it, (samples,) float32 at 16 kHz.

        Raises:
            AudioError: it can't be used.
        """
        segments = [segment async for segment in self.segments(encoded, name, longest, cut_longer=False)]
        return segments[0].waveform

    async def segments(
        self, encoded: bytes, name: str, longest: Longest, *, cut_longer: bool
    ) -> AsyncIterator[AudioSegment | float]:
        """The segments of a recording as prediction makes them, then its length in seconds.

        Raises:
            AudioError: it can't be used.
        """
        found = _segments(encoded, name, self.longest, longest, cut_longer)
        while (segment := await to_thread.run_sync(next, found, None, limiter=self._limiter)) is not None:
            yield segment


def _segments(
    encoded: bytes, name: str, most: Longest, longest: Longest, cut_longer: bool
) -> Iterator[AudioSegment | float]:
    samples = 0
    if not cut_longer and longest.seconds < most.seconds:
        most = longest

    def blocks() -> Iterator[Tensor]:
        nonlocal samples
        for block in audio_blocks(encoded, name=name, longest=most):
            samples += len(block)
            yield block

    try:
        if cut_longer:
            yield from cut(blocks(), max_seconds=longest.seconds)
        else:
            yield AudioSegment(0.0, torch.cat(list(blocks())))
    except TooLongError as error:
        raise ApiError(400, str(error), param="file", code="audio_too_long") from None
    yield samples / SAMPLE_RATE


class Transcribing:
    """The transcript of a recording while it is made; iterating gives its text in pieces that stand.

    transcript: once all pieces are there.
    tokens: of all that was asked, and of the answers.
    finished: no answer was cut.
    """

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        encoded: bytes,
        *,
        mission: str,
        longest: float,
        options: DecodingOptions,
        prompt: str | None = None,
    ) -> None:
        self._engine, self._options = engine, options
        self._task = engine.model.task(mission)
        self._row = Row("", None, None, prompt=prompt, mission=mission)
        name, cut_longer = "the file", self._task.mission.cut
        piece = Longest(longest, "are answered in one go")
        self._segments = reader.segments(encoded, name, piece, cut_longer=cut_longer)
        self._name = name
        self.transcript: Transcript | None = None
        self.tokens = 0, 0
        self.finished = True

    async def __aiter__(self) -> AsyncIterator[str]:
        done: list[Segment] = []
        ahead: deque[tuple[AudioSegment, Answer]] = deque()
        seconds, count, is_read = 0.0, 0, False
        with ExitStack() as stack:
            while ahead or not is_read:
                while not is_read and len(ahead) < AHEAD:
                    segment = await anext(self._segments)
                    if isinstance(segment, float):
                        seconds, is_read = segment, True
                        break
                    row = replace(self._row, id=str(count), audio=segment.waveform)
                    sample = self._engine.model.sample(row)
                    ahead.append((segment, stack.enter_context(self._engine.answer(sample, self._options))))
                    count += 1
                if ahead:
                    segment, answer = ahead.popleft()
                    before, text = joined(x.text for x in done if x.text), ""
                    async for piece in answer:
                        new = joined([before, piece])[len(before) :] if before and not text else piece
                        text += piece
                        yield new
                    best = self._engine.model.alternatives(answer.result)[0]
                    done.append(
                        Segment(
                            start=round(segment.start, 3),
                            end=round(segment.end, 3),
                            text=best.text,
                            average_log_prob=best.average_log_prob,
                            probability=best.probability,
                        )
                    )
                    asked, said = self.tokens
                    self.tokens = asked + answer.prompt_tokens, said + answer.result.n_scored
                    self.finished = self.finished and answer.result.finished
        self.transcript = Transcript(name=self._name, seconds=seconds, segments=tuple(done))
