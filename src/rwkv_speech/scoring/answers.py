"""Scores of answers to questions: exact match, token F1 and containment, after SQuAD's normalisation."""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

from rwkv_speech.scoring.formats import number
from rwkv_speech.scoring.languages import units
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import EXAMPLES, Metric, MetricKind, TaskScores, example_table, mean_metric

EXACT_MATCH = MetricKind("exact_match", "Exact match", higher_is_better=True)
TOKEN_F1 = MetricKind("token_f1", "Token F1", higher_is_better=True)
CONTAINED = MetricKind("contained", "Contained", higher_is_better=True)


def answer_tokens(text: str) -> list[str]:
    """The tokens of an answer as SQuAD compares them: lower case, no punctuation, no English article.

    After the evaluation scripts of SQuAD (Rajpurkar et al. 2016) and, for other languages, MLQA (Lewis et al. 2019):
    that drops the punctuation of any script, and takes characters for tokens where a script has no spaces.
    """
    kept = (c for c in text.lower() if c not in string.punctuation and unicodedata.category(c)[0] != "P")
    return units(re.sub(r"\b(a|an|the)\b", " ", "".join(kept)))


def token_f1(reference: Sequence[str], hypothesis: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of tokens; where one has none, whether both are the same."""
    if not reference or not hypothesis:
        return float(reference == hypothesis)
    common = sum((Counter(reference) & Counter(hypothesis)).values())
    return 2 * common / (len(reference) + len(hypothesis))


class AnswerScores(TaskScores):
    """Each answer against the reference that suits it best."""

    title = "Answers"
    caption = "Exact match, token F1, and answers that contain a reference, in percent"

    def __init__(self, records: Iterable[EvalRecord]) -> None:
        self.records = sorted(records, key=lambda record: record.id)

    @cached_property
    def leading(self) -> Metric:
        return mean_metric(EXACT_MATCH, self.exact)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.leading, mean_metric(TOKEN_F1, self.f1), mean_metric(CONTAINED, self.contained)

    @property
    def exact(self) -> list[bool]:
        """Of each record, whether the answer is a reference."""
        return [hypothesis in references for references, hypothesis in self._tokens]

    @property
    def contained(self) -> list[bool]:
        """Of each record, whether the answer contains a reference."""
        return [any(_within(r, hypothesis) for r in references) for references, hypothesis in self._tokens]

    @cached_property
    def f1(self) -> list[float]:
        """The token F1 of each record."""
        return [max(token_f1(r, hypothesis) for r in references) for references, hypothesis in self._tokens]

    @cached_property
    def _tokens(self) -> list[tuple[list[list[str]], list[str]]]:
        return [
            ([answer_tokens(reference) for reference in record.references], answer_tokens(record.hypothesis))
            for record in self.records
        ]

    def sections(self, name: str) -> str:
        """The scores, and the answers that have least in common with a reference."""
        f1 = dict(zip((record.id for record in self.records), self.f1, strict=True))
        wrong = sorted((record for record in self.records if f1[record.id] < 1), key=lambda record: f1[record.id])
        shown = wrong[:EXAMPLES]
        caption = f"{len(shown)} of {len(wrong)} answers that are not exactly a reference, the worst first"
        return super().sections(name) + example_table(caption, shown, F1=lambda record: number(f1[record.id]))

    def texts(self) -> dict[str, str]:
        return {"answers": "lower case, without punctuation and English articles, as SQuAD's"}

    def terms(self) -> dict[str, str]:
        return {
            "Exact match": "Share of the answers that equal a reference after SQuAD's normalisation.",
            "Token F1": "Harmonic mean of precision and recall of the answer's tokens, with the reference that suits "
            "it best; mean over utterances. Where a script has no spaces, tokens are characters.",
            "Contained": "Share of the answers that have the tokens of a reference in a row.",
        }


def _within(reference: Sequence[str], hypothesis: Sequence[str]) -> bool:
    n = len(reference)
    return bool(n) and any(hypothesis[i : i + n] == reference for i in range(len(hypothesis) - n + 1))
