"""Classification: audio to one of a set of labels: events, emotions, languages, speakers, keywords."""

from collections.abc import Sequence

from rwkv_speech.missions.mission import Mission
from rwkv_speech.scoring import EvalRecord, LabelScores
from rwkv_speech.scoring.labels import ACCURACY


class Label(Mission):
    """Audio to the likeliest label; the highest accuracy is best."""

    name = "label"
    leading = ACCURACY
    chooses = True

    def score(self, records: Sequence[EvalRecord]) -> LabelScores:
        return LabelScores(records)
