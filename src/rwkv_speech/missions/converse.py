"""Conversation: what is said or typed to an answer, round after round, with all that was said before in the state."""

from collections.abc import Sequence

from rwkv_speech.data.sample import Row, Sample, one_round
from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import ConversationScores, EvalRecord
from rwkv_speech.scoring.answers import EXACT_MATCH

MOST_TOKENS = 200  # of one answer: some 150 words, and where tokens are bytes, 35


class Converse(Mission):
    """The row's `messages`, or its audio to its text as a conversation of one round; most exact matches are best."""

    name = "converse"
    leading = EXACT_MATCH
    rounds = True

    def score(self, records: Sequence[EvalRecord]) -> ConversationScores:
        return ConversationScores(records)

    def sample(self, row: Row) -> Sample:
        return Sample(row.id, row.messages) if row.messages else one_round(row.id, (row.audio,), row.text)

    def max_new_tokens(self, seconds: float) -> int:
        return MOST_TOKENS
