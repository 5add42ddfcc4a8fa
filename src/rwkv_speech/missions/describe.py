"""Description: audio to a sentence on what is to be heard."""

from collections.abc import Sequence

from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import CaptionScores, EvalRecord
from rwkv_speech.scoring.captions import CIDER_D

MOST_TOKENS = 200  # several times what captions have, also where tokens are bytes


class Describe(Mission):
    """Audio to a description; the highest CIDEr-D is best."""

    name = "describe"
    leading = CIDER_D

    def score(self, records: Sequence[EvalRecord]) -> CaptionScores:
        return CaptionScores(records)

    def max_new_tokens(self, seconds: float) -> int:
        return MOST_TOKENS
