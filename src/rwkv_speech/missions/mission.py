"""What a mission defines: how a row becomes a sample, how long an answer may get, and how answers are scored."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from rwkv_speech.data.sample import Row, Sample, one_round
from rwkv_speech.scoring import Cost, EvalRecord, MetricKind, SplitResult, TaskScores

# Several times what fast speech needs, so that only a run-away meets the limit.
LEAST_TOKENS = 100
TOKENS_PER_SECOND = 50


class Mission(ABC):
    """One kind of task. It has no state: one instance serves all.

    name: in manifests, options and files.
    leading: the metric by which "best" is decided, that of `score(records).leading`, unless `leading_of` says another.
    chooses: an answer is one of a set of labels.
    cut: its audio is speech, and the answers to pieces of a recording make its answer together. Then silence has none,
        and long recordings are cut in pauses; otherwise they are refused.
    rounds: a sample has several, each with an answer that is scored.
    """

    name: ClassVar[str]
    leading: ClassVar[MetricKind]
    chooses: ClassVar[bool] = False
    cut: ClassVar[bool] = False
    rounds: ClassVar[bool] = False

    @abstractmethod
    def score(self, records: Sequence[EvalRecord]) -> TaskScores:
        """The scores of some records; undefined ones are nan. Also called on part of a split, while it is decoded."""

    def leading_of(self, rows: Sequence[Row]) -> MetricKind:
        """The metric that leads the scores of these rows."""
        return self.leading

    def sample(self, row: Row) -> Sample:
        """What the model reads, and what it is to answer: here the audio, and the row's text.

        Raises:
            SampleError: the row lacks what the mission needs; the message names it.
        """
        return one_round(row.id, (row.audio,), row.text)

    def max_new_tokens(self, seconds: float) -> int:
        """The longest answer to so many seconds of audio, in tokens."""
        return max(LEAST_TOKENS, math.ceil(TOKENS_PER_SECOND * seconds))

    def labels(self, rows: Sequence[Row]) -> list[str]:
        """The labels that training rows have, of a mission that chooses among them."""
        return sorted({row.text.strip() for row in rows if row.text and row.text.strip()})

    def record(self, row: Row, hypothesis: str, *, seconds: float, **measured: Any) -> EvalRecord:
        """The record of an answer.

        seconds: length of the audio.
        measured: of the answer: the record's score, probability, loop and wall_seconds.
        """
        details = {
            "answers": row.answers and list(row.answers),
            "target_language": row.target_language,
            "transcript": row.transcript,
        }
        return EvalRecord(
            id=row.id,
            reference=row.text or "",
            hypothesis=hypothesis,
            seconds=seconds,
            speaker=row.speaker,
            language=row.language,
            mission=self.name,
            details={name: value for name, value in details.items() if value},
            **measured,
        )

    def result(
        self, records: Sequence[EvalRecord], *, left_out: int = 0, peak_memory: int | None = None, **how: Any
    ) -> SplitResult:
        """What is reported of a whole split.

        left_out: rows of the split that could not be used.
        peak_memory: bytes that decoding took at most.
        how: to score, where the mission's `score` takes anything besides the records.

        Raises:
            UserError: no records, or an id that occurs twice.
        """
        cost = Cost.of(records, left_out=left_out, peak_memory=peak_memory)
        return SplitResult(self.name, self.score(records, **how), cost)
