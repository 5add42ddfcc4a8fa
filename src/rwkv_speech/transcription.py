"""Recordings of any length -> transcripts: cut, decoded in batches that reach across recordings, put together again.

All of it goes piece by piece, so that what is in memory is one batch of segments and a few that were cut ahead of it,
however long and many the recordings.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_speech.errors import UserError
from rwkv_speech.files import UNPRINTABLE, printable
from rwkv_speech.read_ahead import THREADS, read_ahead
from rwkv_speech.speech.audio import SAMPLE_RATE, AudioError, Longest, audio_blocks, check_waveform
from rwkv_speech.speech.recording import Recording
from rwkv_speech.speech.segments import AudioSegment, cut
from rwkv_speech.subtitles import Cue, cues, joined

HELD = 8  # segments of a recording that wait to be decoded


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
    seconds: float
    """Length of the recording."""
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        return joined(segment.text for segment in self.segments if segment.text)

    @property
    def empty(self) -> int:
        """Segments in which there is speech, and for which the model has no text."""
        return sum(not segment.text for segment in self.segments)


DecodeFn = Callable[[Sequence[Tensor]], Sequence[Sequence[Alternative]]]


def transcripts(
    audio: Iterable[str | Path | Recording | Tensor],
    decode: DecodeFn,
    *,
    batch_size: int,
    max_seconds: float,
    cut_longer: bool = True,
) -> Iterator[Transcript | AudioError]:
    """The transcript of each recording, or what is wrong with it, in their order and as soon as it is complete.

    Args:
        audio: paths, recordings, or 1-D float arrays at 16 kHz. Of a list, a few are read at a time, by threads.
        decode: gives what is said in each waveform (samples,) of a batch, the best reading first.
        batch_size: segments in a batch; only the last has fewer.
        max_seconds: the longest segment; longer recordings are cut in pauses, see `segments.cut`.
        cut_longer: without, each recording is one segment, whatever is in it, and longer ones are errors.
    """
    segments: list[Segment] = []
    longest = Longest(max_seconds, "are answered in one go")
    for piece in _decoded(_cut_all(audio, longest, cut_longer), decode, batch_size):
        if isinstance(piece, Segment):
            segments.append(piece)
        else:
            yield piece.error or Transcript(name=piece.name, seconds=piece.seconds, segments=tuple(segments))
            segments = []


@dataclass(frozen=True)
class _End:
    """Of a recording."""

    name: str
    seconds: float
    error: AudioError | None


def _cut_all(
    audio: Iterable[str | Path | Recording | Tensor], longest: Longest, cut_longer: bool
) -> Iterator[AudioSegment | _End]:
    def recordings() -> Iterator[Iterator[AudioSegment | _End]]:
        for index, source in enumerate(audio):
            is_encoded = isinstance(source, str | Path | Recording)
            yield _cut(source, str(source) if is_encoded else f"audio {index}", longest, cut_longer)

    # Of what may still be on its way, such as the clips of a microphone, nothing is asked for before its turn.
    return read_ahead(recordings(), held=HELD, threads=THREADS if isinstance(audio, Sequence) else 1)


def _cut(
    source: str | Path | Recording | Tensor, name: str, longest: Longest, cut_longer: bool
) -> Iterator[AudioSegment | _End]:
    samples, error = 0, None

    def blocks() -> Iterator[Tensor]:
        nonlocal samples
        for block in _blocks(source, name, None if cut_longer else longest):
            samples += len(block)
            yield block

    try:
        if cut_longer:
            yield from cut(blocks(), max_seconds=longest.seconds)
        else:
            yield AudioSegment(0.0, torch.cat(list(blocks())))
    except AudioError as caught:
        error = caught
    yield _End(name, samples / SAMPLE_RATE, error)


def _blocks(source: str | Path | Recording | Tensor, name: str, longest: Longest | None) -> Iterable[Tensor]:
    if isinstance(source, Recording):
        return source.blocks(longest)
    if isinstance(source, str | Path):
        return audio_blocks(source, longest=longest)
    return [check_waveform(source, name, longest)]


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


def json_line(content: dict[str, Any]) -> str:
    """One object on one line that a terminal can be shown."""
    line = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"


def as_text(transcript: Transcript) -> str:
    """One line, empty where nothing is said."""
    return _line(transcript.text) + "\n"


def as_json(transcript: Transcript) -> str:
    """One object on one line: `name`, `text`, and `segments` with the fields of `Segment` that are known."""

    def known(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in fields if value is not None}

    segments = [asdict(segment, dict_factory=known) for segment in transcript.segments]
    content = {"name": transcript.name, "text": transcript.text, "segments": segments}
    return json_line(content)


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues with times like 00:01:02,345; segments without text have none."""
    shown = [f"{_times(cue, ',')}\n" + "\n".join(cue.lines) for cue in _cues(transcript)]
    return "\n".join(f"{number}\n{cue}\n" for number, cue in enumerate(shown, 1))


def as_vtt(transcript: Transcript) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1/): times like 00:01:02.345, `&`, `<` and `>` escaped."""
    shown = [f"{_times(cue, '.')}\n{escape(chr(10).join(cue.lines), quote=False)}\n" for cue in _cues(transcript)]
    return "\n".join(["WEBVTT\n", *shown])


FORMATS: dict[str, Callable[[Transcript], str]] = {"text": as_text, "json": as_json, "srt": as_srt, "vtt": as_vtt}
_SUFFIXES = {"text": ".txt", "json": ".json", "srt": ".srt", "vtt": ".vtt"}


def output_files(recordings: Sequence[str | Path], folder: Path, format: str) -> list[Path]:
    """Where the transcript of each recording goes: into the folder, under the recording's name.

    Raises:
        UserError: two recordings of one name, or a name that gets too long.
    """
    taken: dict[Path, str | Path] = {}
    for recording in recordings:
        file = folder / f"{Path(recording).stem}{_SUFFIXES[format]}"
        if len(os.fsencode(file.name)) > 255:
            raise UserError(f"{recording}: the name of its transcript would be longer than 255 bytes: rename it")
        if file in taken:
            raise UserError(f"{taken[file]} and {recording} would both go to {file}: do them one by one, or rename one")
        taken[file] = recording
    return list(taken)


def _line(text: str) -> str:
    """A line break would end the line that a text is, and an empty line would end a cue."""
    return printable(" ".join(text.split()))


def _cues(transcript: Transcript) -> list[Cue]:
    return [cue for passage in transcript.segments for cue in cues(_line(passage.text), passage.start, passage.end)]


def _times(cue: Cue, point: str) -> str:
    return f"{_clock(cue.start, point)} --> {_clock(cue.end, point)}"


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
