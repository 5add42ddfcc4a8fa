"""What is said in a recording and when, and the forms that it is written in: a line of text, JSON, SRT, WebVTT."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from rwkv_speech.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What may have been said in a segment."""

    text: str
    average_log_prob: float
    """Natural logarithm, per token."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """The transcript of one segment of a recording."""

    start: float
    """Seconds from the beginning of the recording, to the millisecond."""
    end: float
    text: str
    average_log_prob: float
    """Natural logarithm, per token."""
    alternatives: tuple[Reading, ...] = ()
    """Other readings that a beam search found, best first."""


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """The transcript of a recording; without passages where nobody speaks."""

    name: str
    """The recording's path, or whatever else it is called."""
    passages: tuple[Passage, ...]

    @property
    def text(self) -> str:
        return " ".join(passage.text for passage in self.passages if passage.text)


def as_text(transcript: Transcript) -> str:
    """One line, empty where nothing is said."""
    return _line(transcript.text) + "\n"


def as_json(transcript: Transcript) -> str:
    """One object on one line: `name`, `text`, and `passages` with the fields of `Passage`."""
    content = {"name": transcript.name, "text": transcript.text, "passages": [asdict(p) for p in transcript.passages]}
    return json.dumps(content, ensure_ascii=False) + "\n"


def as_srt(transcript: Transcript) -> str:
    """SubRip: numbered cues with times like 00:01:02,345; passages without text have none."""
    cues = [(_times(passage, ","), _line(passage.text)) for passage in transcript.passages if passage.text]
    return "\n".join(f"{number}\n{times}\n{text}\n" for number, (times, text) in enumerate(cues, 1))


def as_vtt(transcript: Transcript) -> str:
    """WebVTT (https://www.w3.org/TR/webvtt1/): times like 00:01:02.345, `&`, `<` and `>` escaped."""
    cues = [
        f"{_times(passage, '.')}\n{escape(_line(passage.text), quote=False)}\n"
        for passage in transcript.passages
        if passage.text
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


def _times(passage: Passage, point: str) -> str:
    return f"{_clock(passage.start, point)} --> {_clock(passage.end, point)}"


def _clock(seconds: float, point: str) -> str:
    minutes, milliseconds = divmod(round(seconds * 1000), 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{milliseconds // 1000:02}{point}{milliseconds % 1000:03}"
