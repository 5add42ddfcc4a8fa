"""Translation: speech to its meaning in another language."""

from collections.abc import Sequence

from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import EvalRecord, TranslationScores
from rwkv_speech.scoring.translations import BLEU


class Translate(Mission):
    """Audio to a text in the row's `target_language`; the highest BLEU is best. It may get as long as a transcript."""

    name = "translate"
    leading = BLEU
    cut = True

    def score(self, records: Sequence[EvalRecord]) -> TranslationScores:
        return TranslationScores(records)
