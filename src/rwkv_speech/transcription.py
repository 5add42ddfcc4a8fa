"""Recordings of any length -> transcripts: cut, decoded in batches that reach across recordings, put together again.

All of it goes piece by piece, so that what is in memory is one batch of segments, however long and many the recordings.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rwkv_speech.speech.audio import AudioError, audio_blocks, check_waveform
from rwkv_speech.speech.segments import Segment, cut
from rwkv_speech.transcript import Passage, Reading, Transcript

Say = Callable[[Sequence[Tensor]], Sequence[Sequence[Reading]]]


def transcripts(
    audio: Iterable[str | Path | Tensor],
    say: Say,
    *,
    batch_size: int,
    max_seconds: float,
) -> Iterator[Transcript | AudioError]:
    """The transcript of each recording, or what is wrong with it, in their order and as soon as it is complete.

    Args:
        audio: paths, or 1-D float arrays at 16 kHz.
        say: gives what is said in each waveform (samples,) of a batch, the best reading first.
        batch_size: segments in a batch; only the last has fewer.
        max_seconds: the longest segment; longer recordings are cut in pauses, see `segments.cut`.
    """
    passages: list[Passage] = []
    for piece in _decoded(_cut_all(audio, max_seconds), say, batch_size):
        if isinstance(piece, Passage):
            passages.append(piece)
        else:
            yield piece.error or Transcript(name=piece.name, passages=tuple(passages))
            passages = []


@dataclass(frozen=True)
class _End:
    """Of a recording."""

    name: str
    error: AudioError | None


def _cut_all(audio: Iterable[str | Path | Tensor], max_seconds: float) -> Iterator[Segment | _End]:
    for index, source in enumerate(audio):
        is_path = isinstance(source, str | Path)
        name = str(source) if is_path else f"audio {index}"
        error = None
        try:
            yield from cut(audio_blocks(source) if is_path else [check_waveform(source, name)], max_seconds=max_seconds)
        except AudioError as caught:
            error = caught
        yield _End(name, error)


def _decoded(pieces: Iterable[Segment | _End], say: Say, batch_size: int) -> Iterator[Passage | _End]:
    """The same, with what is said in the segments in their place."""

    def decoded() -> Iterator[Passage | _End]:
        said = iter(say([segment.waveform for segment in batch]) if batch else [])
        for piece in waiting:
            if isinstance(piece, _End):
                yield piece
            else:
                best, *others = next(said)
                yield Passage(
                    start=round(piece.start, 3),
                    end=round(piece.end, 3),
                    text=best.text,
                    average_log_prob=best.average_log_prob,
                    alternatives=tuple(others),
                )

    waiting: list[Segment | _End] = []
    batch: list[Segment] = []
    for piece in pieces:
        waiting.append(piece)
        if isinstance(piece, Segment):
            batch.append(piece)
        if len(batch) in (0, batch_size):
            yield from decoded()
            waiting, batch = [], []
    yield from decoded()
