"""Recordings of any length -> transcripts: cut, decoded in batches that reach across recordings, put together again.

All of it goes piece by piece, so that what is in memory is one batch of segments, however long and many the recordings.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.speech.audio import AudioError, audio_blocks, check_waveform
from rwkv_speech.speech.segments import AudioSegment, cut


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """What may have been said in a segment."""

    text: str
    average_log_prob: float
    """Natural logarithm, per token."""
    probability: float | None = None
    """Among the labels that the text was chosen from."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The transcript of one segment of a recording."""

    start: float
    """Seconds from the beginning of the recording, to the millisecond."""
    end: float
    text: str
    average_log_prob: float
    """Natural logarithm, per token."""
    probability: float | None = None
    """Among the labels that the text was chosen from."""
    alternatives: tuple[Alternative, ...] = ()
    """Other readings that a beam search found, best first."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The transcript of a recording; without segments where there is no speech."""

    name: str
    """The recording's path, or whatever else it is called."""
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return " ".join(segment.text for segment in self.segments if segment.text)


DecodeFn = Callable[[Sequence[Tensor]], Sequence[Sequence[Alternative]]]


def transcripts(
    audio: Iterable[str | Path | Tensor],
    decode: DecodeFn,
    *,
    batch_size: int,
    max_seconds: float,
) -> Iterator[Transcript | AudioError]:
    """The transcript of each recording, or what is wrong with it, in their order and as soon as it is complete.

    Args:
        audio: paths, or 1-D float arrays at 16 kHz.
        decode: gives what is said in each waveform (samples,) of a batch, the best reading first.
        batch_size: segments in a batch; only the last has fewer.
        max_seconds: the longest segment; longer recordings are cut in pauses, see `segments.cut`.
    """
    segments: list[Segment] = []
    for piece in _decoded(_cut_all(audio, max_seconds), decode, batch_size):
        if isinstance(piece, Segment):
            segments.append(piece)
        else:
            yield piece.error or Transcript(name=piece.name, segments=tuple(segments))
            segments = []


@dataclass(frozen=True)
class _End:
    """Of a recording."""

    name: str
    error: AudioError | None


def _cut_all(audio: Iterable[str | Path | Tensor], max_seconds: float) -> Iterator[AudioSegment | _End]:
    for index, source in enumerate(audio):
        is_path = isinstance(source, str | Path)
        name = str(source) if is_path else f"audio {index}"
        error = None
        try:
            yield from cut(audio_blocks(source) if is_path else [check_waveform(source, name)], max_seconds=max_seconds)
        except AudioError as caught:
            error = caught
        yield _End(name, error)


def _decoded(pieces: Iterable[AudioSegment | _End], decode: DecodeFn, batch_size: int) -> Iterator[Segment | _End]:
    """The same, with what is said in the segments in their place."""

    def decoded() -> Iterator[Segment | _End]:
        answers = iter(decode([segment.waveform for segment in batch]) if batch else [])
        for piece in waiting:
            if isinstance(piece, _End):
                yield piece
            else:
                best, *others = next(answers)
                yield Segment(
                    start=round(piece.start, 3),
                    end=round(piece.end, 3),
                    text=best.text,
                    average_log_prob=best.average_log_prob,
                    probability=best.probability,
                    alternatives=tuple(others),
                )

    waiting: list[AudioSegment | _End] = []
    batch: list[AudioSegment] = []
    for piece in pieces:
        waiting.append(piece)
        if isinstance(piece, AudioSegment):
            batch.append(piece)
        if len(batch) in (0, batch_size):
            yield from decoded()
            waiting, batch = [], []
    yield from decoded()


def as_text(transcript: Transcript) -> str:
    """One line, empty where nothing is said."""
    return _line(transcript.text) + "\n"


def as_json(transcript: Transcript) -> str:
    """One object on one line: `name`, `text`, and `segments` with the fields of `Segment` that are known."""

    def known(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields if value is not None}

    segments = [asdict(segment, dict_factory=known) for segment in transcript.segments]
    content = {"name": transcript.name, "text": transcript.text, "segments": segments}
    return json.dumps(content, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues with times like 00:01:02,345; segments without text have none."""
    cues = [(_times(segment, ","), _line(segment.text)) for segment in transcript.segments if segment.text]
    return "\n".join(f"{number}\n{times}\n{text}\n" for number, (times, text) in enumerate(cues, 1))


def as_vtt(transcript: Transcript) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1/): times like 00:01:02.345, `&`, `<` and `>` escaped."""
    cues = [
        f"{_times(segment, '.')}\n{escape(_line(segment.text), quote=False)}\n"
        for segment in transcript.segments
        if segment.text
    ]
    return "\n".join(["WEBVTT\n", *cues])


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
_SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def output_files(recordings: Sequence[str | Path], folder: Path, format: str) -> list[Path]:
    """Where the transcript of each recording goes: into the folder, under the recording's name.

    Raises:
        UserError: two recordings of one name.
    """
    taken: dict[Path, str | Path] = {}
    for recording in recordings:
        file = folder / f"{Path(recording).stem}{_SUFFIXES[format]}"
        if file in taken:
            raise UserError(f"{taken[file]} and {recording} would both go to {file}: do them one by one, or rename one")
        taken[file] = recording
    return list(taken)


def _line(text: str) -> str:
    """A line break would end the line that a text is, and an empty line would end a cue."""
    return " ".join(text.split())


def _times(segment: Segment, point: str) -> str:
    return f"{_clock(segment.start, point)} --> {_clock(segment.end, point)}"


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
