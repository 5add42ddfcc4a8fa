"""Transcription: speech to its words, in its own language."""

from collections.abc import Sequence

from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import WER, EvalRecord, TranscriptScores


class Transcribe(Mission):
    """Audio to its transcript; the lowest word error rate is best, or character error rate where words aren't spaced."""

    name = "transcribe"
    leading = WER

    def score(self, records: Sequence[EvalRecord]) -> TranscriptScores:
        return TranscriptScores(records)
