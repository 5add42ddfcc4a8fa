"""Question answering: a spoken question, or speech and a typed question before it, to the answer."""

from collections.abc import Sequence

from rwkv_speech.data.sample import Row, Sample, one_round
from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import AnswerScores, EvalRecord
from rwkv_speech.scoring.answers import EXACT_MATCH

MOST_TOKENS = 200  # some 150 words, and where tokens are bytes, 35


class Answer(Mission):
    """The row's `prompt`, where it has one, and its audio to an answer; the most exact matches are best."""

    name = "answer"
    leading = EXACT_MATCH

    def score(self, records: Sequence[EvalRecord]) -> AnswerScores:
        return AnswerScores(records)

    def sample(self, row: Row) -> Sample:
        return one_round(row.id, (row.prompt, row.audio) if row.prompt else (row.audio,), row.text)

    def max_new_tokens(self, seconds: float) -> int:
        return MOST_TOKENS
