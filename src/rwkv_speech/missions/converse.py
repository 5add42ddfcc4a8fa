"""Conversation: what is said or typed to an answer, round after round, with all that was said before in the state."""

from collections.abc import Sequence

from rwkv_speech.data.sample import Row, Sample
from rwkv_speech.missions.answer import Answer
from rwkv_speech.scoring import ConversationScores, EvalRecord


class Converse(Answer):
    """The row's `messages`; of a row without, what `answer` makes of it: one round. Most exact matches are best."""

    name = "converse"
    rounds = True

    def score(self, records: Sequence[EvalRecord]) -> ConversationScores:
        return ConversationScores(records)

    def sample(self, row: Row) -> Sample:
        return Sample(row.id, row.messages) if row.messages else super().sample(row)
