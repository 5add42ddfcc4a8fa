"""Scores of descriptions against several references: CIDEr-D, ROUGE-L, chrF; SPIDEr and FENSE where they can be had."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from rapidfuzz.distance import LCSseq

from rwkv_speech.scoring.formats import number
from rwkv_speech.scoring.languages import units
from rwkv_speech.scoring.normalise import normalise_basic
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import EXAMPLES, Metric, MetricKind, TaskScores, bootstrap, example_table, mean_metric
from rwkv_speech.scoring.translations import CorpusScore

log = logging.getLogger("rwkv_speech")

CIDER_D = MetricKind("cider_d", "CIDEr-D", higher_is_better=True, percent=False)
ROUGE_L = MetricKind("rouge_l", "ROUGE-L", higher_is_better=True)
CHRF = MetricKind("chrf", "chrF", higher_is_better=True, percent=False)

N = 4  # CIDEr-D: longest n-grams
SIGMA = 6.0  # and width of the penalty for a difference in length
BETA = 1.2  # weight of the recall in ROUGE-L, as captioning has it


def caption_tokens(text: str) -> list[str]:
    """Lower case, without punctuation; characters where a script has no spaces."""
    return units(normalise_basic(text))


def cider_d(hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    """CIDEr-D of each hypothesis against its references, all as tokens (Vedantam et al. 2015, with the factor of 10).

    Document frequencies are those of all references; with one utterance alone every n-gram weighs nothing.
    """
    counted = [[_ngrams(reference) for reference in of_one] for of_one in references]
    frequency = Counter(ngram for of_one in counted for ngram in set().union(*of_one))
    log_n = math.log(len(counted)) if counted else 0.0

    def weigh(ngrams: Counter) -> tuple[list[dict[tuple, float]], list[float]]:
        """tf-idf of the n-grams of each length, and their norms."""
        weights: list[dict[tuple, float]] = [{} for _ in range(N)]
        for ngram, times in ngrams.items():
            weights[len(ngram) - 1][ngram] = times * (log_n - math.log(max(1, frequency[ngram])))
        return weights, [math.sqrt(math.fsum(x * x for x in of.values())) for of in weights]

    def similarity(hypothesis: Counter, reference: Counter) -> float:
        """Mean over lengths of n-grams of the cosine of clipped weights."""
        difference = _pairs(hypothesis) - _pairs(reference)
        (of_h, norms_h), (of_r, norms_r) = weigh(hypothesis), weigh(reference)
        cosines = []
        for h, r, norm_h, norm_r in zip(of_h, of_r, norms_h, norms_r, strict=True):
            product = math.fsum(min(weight, r.get(ngram, 0.0)) * r.get(ngram, 0.0) for ngram, weight in h.items())
            cosines.append(product / (norm_h * norm_r) if norm_h * norm_r else 0.0)
        return math.exp(-(difference**2) / (2 * SIGMA**2)) * math.fsum(cosines) / N

    return [
        10 * math.fsum(similarity(_ngrams(hypothesis), reference) for reference in of_one) / len(of_one)
        for hypothesis, of_one in zip(hypotheses, counted, strict=True)
    ]


def _pairs(ngrams: Counter) -> int:
    """Pairs of words, which the authors' code takes for the length."""
    return sum(times for ngram, times in ngrams.items() if len(ngram) == 2)


def _ngrams(tokens: Sequence[str]) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, N + 1) for i in range(len(tokens) - n + 1))


def rouge_l(hypothesis: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """ROUGE-L by the longest common subsequence (Lin 2004), of the best precision and the best recall, as captioning's
    common code has it."""
    common = [LCSseq.similarity(hypothesis, reference) for reference in references]
    precision = max(common) / max(1, len(hypothesis))
    recall = max(n / max(1, len(reference)) for n, reference in zip(common, references, strict=True))
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision) if precision and recall else 0.0


class CaptionScores(TaskScores):
    """Each description against all of its references."""

    title = "Descriptions"
    caption = "CIDEr-D, ROUGE-L in percent and chrF of descriptions, with 95 % intervals"

    def __init__(self, records: Iterable[EvalRecord]) -> None:
        self.records = sorted(records, key=lambda record: record.id)

    @cached_property
    def cider(self) -> list[float]:
        """CIDEr-D of each record."""
        return cider_d([hypothesis for hypothesis, _ in self._tokens], [references for _, references in self._tokens])

    @cached_property
    def leading(self) -> Metric:
        return mean_metric(CIDER_D, self.cider)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        rouge = [rouge_l(hypothesis, references) for hypothesis, references in self._tokens]
        return self.leading, mean_metric(ROUGE_L, rouge), self._chrf, *self._more

    @cached_property
    def _tokens(self) -> list[tuple[list[str], list[list[str]]]]:
        return [
            (caption_tokens(record.hypothesis), [caption_tokens(reference) for reference in record.references])
            for record in self.records
        ]

    @property
    def _chrf(self) -> Metric:
        if not self.records:
            return Metric(CHRF, math.nan)
        statistics, scores = self._chrf_of.statistics, self._chrf_of.scores
        return Metric(CHRF, float(scores(statistics.sum(0)[None])[0]), lambda: bootstrap(statistics, scores))

    @cached_property
    def _chrf_of(self) -> CorpusScore:
        from sacrebleu import metrics

        return CorpusScore(metrics.CHRF(), self.records)

    @cached_property
    def _more(self) -> list[Metric]:
        """SPIDEr and FENSE, by aac-metrics: they need Java and sentence models, and both their downloads."""
        if not find_spec("aac_metrics"):
            log.info("SPIDEr and FENSE are left out: they need aac-metrics, Java and models (pip install aac-metrics)")
            return []
        found = []
        for name, label in (("spider", "SPIDEr"), ("fense", "FENSE")):
            try:
                from aac_metrics import functional

                hypotheses = [" ".join(hypothesis) for hypothesis, _ in self._tokens]
                references = [[" ".join(reference) for reference in of_one] for _, of_one in self._tokens]
                _, scores = getattr(functional, name)(hypotheses, references)
                kind = MetricKind(name, label, higher_is_better=True, percent=False)
                found.append(mean_metric(kind, scores[name].tolist()))
            except Exception as error:  # whatever a package, Java or a download may raise
                log.warning("%s is left out: aac-metrics says %s", label, (str(error) or repr(error)).splitlines()[0])
        return found

    def summary(self) -> dict[str, Any]:
        return {"signatures": {"chrF": self._chrf_of.signature}}

    def sections(self, name: str) -> str:
        """The scores, and the descriptions with the lowest CIDEr-D."""
        cider = dict(zip((record.id for record in self.records), self.cider, strict=True))
        worst = sorted(self.records, key=lambda record: cider[record.id])[:EXAMPLES]
        return (
            super().sections(name)
            + f'<p class="note">chrF: {self._chrf_of.signature}</p>'
            + example_table(
                f"The {len(worst)} descriptions with the lowest CIDEr-D",
                worst,
                **{"CIDEr-D": lambda record: number(cider[record.id], False)},
            )
        )

    def texts(self) -> dict[str, str]:
        return {"descriptions": "lower case, without punctuation; for chrF as they are"}

    def terms(self) -> dict[str, str]:
        return {
            "CIDEr-D": "Likeness of n-grams of words, weighted by how rare they are in the split's references "
            "(Vedantam et al. 2015). It depends on the whole split; for its interval the weights are kept.",
            "ROUGE-L": "Longest common subsequence of words: F of the best precision and the best recall, beta 1.2 "
            "(Lin 2004).",
            "chrF": "F of character n-grams over the corpus, by sacrebleu, from 0 to 100.",
        }
