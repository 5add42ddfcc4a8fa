"""One line of JSON per utterance evaluated: the memory of an evaluation that may be interrupted."""

import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from rwkv_speech.errors import UserError

logger = logging.getLogger("rwkv_speech")


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """The answer to one utterance beside its reference, and what it took.

    id: name of the utterance, unique within its split.
    reference: the answer, as the data set has it.
    hypothesis: the answer, as the model has it.
    seconds: length of the audio.
    heard: what stands for the row and for what was done to its recording; with another, the answer may be another.
    speaker, language: where the data set has them.
    mission: by which it is scored.
    score: mean log-probability of the hypothesis's tokens, end of text included (natural logarithm).
    probability: of the hypothesis among the labels that it was chosen from.
    loop: the decoder saw itself repeating.
    wall_seconds: time the utterance took in encoder, adapter and language model: that of its batch, divided by the
            utterances in it. Reading audio and extracting features, done ahead by workers, are not in it. Kept per
        utterance, so that speed adds up over interruptions and processes.
    details: whatever else the mission needs in order to score: `answers`, all references, where there are several;
        `target_language`, and the `transcript` of what was translated.
    """

    id: str
    reference: str
    hypothesis: str
    seconds: float
    heard: str | None = None
    speaker: str | None = None
    language: str | None = None
    mission: str | None = None
    score: float | None = None
    probability: float | None = None
    loop: bool = False
    wall_seconds: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> list[str]:
        """All references, each once, `reference` first."""
        return list(dict.fromkeys([self.reference, *self.details.get("answers", ())]))

    def line(self) -> bytes:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False).encode() + b"\n"


class RecordWriter:
    """Appends records to a file, each handed to the operating system before `write` returns.

    It goes on behind the records already there. A process killed half-way through a line leaves it without its
    newline; that tail is cut off before anything is appended. One writer per file.

    path: the `.jsonl` file; its folder is made where it is missing.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = len(_whole_lines(path))
        self._file = path.open("ab")
        self._file.truncate(whole)

    def write(self, record: EvalRecord) -> None:
        """Append one record and flush."""
        self._file.write(record.line())
        self._file.flush()

    def close(self) -> None:
        """Close the file; also done on leaving the `with` block."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_records(path: str | os.PathLike) -> list[EvalRecord]:
    """The records of a file, in its order; none where there is no file.

    A last line without its newline was being written when the process died: it is left out, and its utterance
    is to be decoded again. What was heard twice counts once, as first written.

    Raises:
        UserError: a whole line is not a record.
    """
    records: dict[tuple[str, str | None], EvalRecord] = {}
    lines = _whole_lines(Path(path)).split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        record = _parse(line, where=f"{path}, line {number}")
        records.setdefault((record.id, record.heard), record)
    if len(records) < len(lines):
        logger.warning("%s: %d records repeat an utterance; the first counts", path, len(lines) - len(records))
    return list(records.values())


def _whole_lines(path: Path) -> bytes:
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def _parse(line: bytes, *, where: str) -> EvalRecord:
    try:
        record = EvalRecord(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{where}: not a record of an evaluation ({error}); expected a JSON object with id, reference, "
            "hypothesis and seconds; remove the file, or evaluate without --resume"
        ) from None
    for name, kind in {"id": str, "reference": str, "hypothesis": str, "seconds": int | float}.items():
        value = getattr(record, name)
        if not isinstance(value, kind):
            raise UserError(f"{where}: {name} is {value!r}; expected text, or a number of seconds")
    return record
