"""Transcription: speech to its words, in its own language."""

from collections.abc import Sequence

from rwkv_speech.data.sample import Row
from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import WER, EvalRecord, MetricKind, TranscriptScores, leading_kind


class Transcribe(Mission):
    """Audio to its transcript; the lowest word error rate is best, or what suits the languages of the rows."""

    name = "transcribe"
    leading = WER
    cut = True

    def score(self, records: Sequence[EvalRecord], normalizer: str = "language") -> TranscriptScores:
        return TranscriptScores(records, normalizer)

    def leading_of(self, rows: Sequence[Row]) -> MetricKind:
        return leading_kind((row.language, row.text or "") for row in rows)
