"""Scores of transcripts: error rates, and how they are shown in the terminal, in JSON and in the report."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from html import escape
from typing import Any, Self

import numpy as np

from rwkv_speech.scoring.formats import counted, duration, html_table, interval_text, number
from rwkv_speech.scoring.normalise import NORMALIZERS, lower_case, normaliser_name, normalizer_for
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import Metric, MetricKind, TaskScores, mean_metric, mean_of_groups, ratio
from rwkv_speech.scoring.words import (
    UNITS,
    WER,
    Aligned,
    Edits,
    Group,
    TextScores,
    by_length,
    by_speaker,
    leading_kind,
    worst,
)

SER = MetricKind("ser", "SER", higher_is_better=False)

LONGEST_RUN = 40  # units shown of one deletion or insertion: a run-away hypothesis must not bury the page


class TranscriptScores(TaskScores):
    """Errors of transcripts, in two forms of the texts. The order of the records changes nothing.

    normalizer: a name in NORMALIZERS, or `language`: that of each text's language.

    raw: errors of the lower-cased texts.
    normalised: errors of the texts after the normaliser.
    languages: the raw errors by language, where there are several.
    """

    title = "Error rates"
    caption = "Error rates of the corpus in percent"
    report_only = frozenset({"Units", "Mean utt.", "Normalised"})

    def __init__(self, records: Iterable[EvalRecord], normalizer: str = "language") -> None:
        self.records, self.normalizer = sorted(records, key=lambda record: record.id), normalizer
        self.raw = TextScores(self.records, lower_case, _lead(self.records))

    @cached_property
    def normalised(self) -> TextScores:
        return TextScores([self._normalise(record) for record in self.records], str, self.raw.lead)

    @cached_property
    def languages(self) -> dict[str, TextScores]:
        return {name: TextScores(part, lower_case, _lead(part)) for name, part in _by_language(self.records).items()}

    @cached_property
    def leading(self) -> Metric:
        """The corpus rate of the lower-cased texts: WER, or what suits their languages."""
        return self._metric(self.raw.lead)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        lead = self.raw.lead
        normalised = MetricKind(f"{lead.name}_normalised", f"{lead.label}, normalised", higher_is_better=False)
        return (
            self.leading,
            Metric(normalised, self.normalised.leading.rate, lambda: self.normalised.interval),
            *(self._metric(kind) for kind in self.raw.kinds[1:]),
            mean_metric(SER, self.raw.wrong),
        )

    def _metric(self, kind: MetricKind) -> Metric:
        return Metric(kind, self.raw.edits(kind).rate, lambda: self.raw.interval_of(kind))

    @property
    def headline(self) -> str:
        raw = self.raw
        words = "" if raw.lead == WER else f", WER {raw.words.rate:.2%}"
        return f"{raw.lead.label} {raw.leading.rate:.2%}{words}, mean of utterances {raw.mean_utterance_rate:.2%}"

    def rows(self) -> list[dict[str, str]]:
        """Two lines, raw above normalised, and one for each language and for their mean."""
        lines = [self._row(label, texts) for label, texts in (("raw", self.raw), ("normalised", self.normalised))]
        for name, texts in self.languages.items():
            after = TextScores([self._normalise(record) for record in texts.records], str, texts.lead)
            lines.append(self._row(name, texts) | {"Normalised": number(after.leading.rate)})
        if self.languages:
            kinds = self.raw.kinds
            lead, *rates = (self._mean_of_languages(kind) for kind in kinds)
            mean = {f"*{self.raw.lead.label}": number(lead.value), "95 % interval": interval_text(lead.interval)}
            mean |= {kind.label: number(rate.value) for kind, rate in zip(kinds[1:], rates, strict=True)}
            lines.append({"<Text": f"mean of {len(self.languages)}"} | mean)
        return lines

    def _row(self, label: str, texts: TextScores) -> dict[str, str]:
        lead = self.raw.lead
        edits = texts.edits(lead)
        return {
            "<Text": label,
            f"*{lead.label}": number(edits.rate),
            "95 % interval": interval_text(texts.interval_of(lead)),
            **_kinds(edits),
            "Units": f"{edits.length:,}",
            **{kind.label: number(texts.edits(kind).rate) for kind in self.raw.kinds[1:]},
            "SER": number(texts.sentence_error_rate, digits=1),
            "Mean utt.": number(texts.mean_utterance_rate),
        }

    def _mean_of_languages(self, kind: MetricKind) -> Metric:
        parts = [
            np.array([(u.edits.errors, u.edits.length) for u in texts.aligned_by(kind)])
            for texts in self.languages.values()
        ]
        return mean_of_groups(kind, parts, lambda sums: ratio(*sums.T))

    def _normalise(self, record: EvalRecord) -> EvalRecord:
        name = self.normalizer
        clean = NORMALIZERS[normalizer_for(record.language, record.reference) if name == "language" else name]
        return replace(record, reference=clean(record.reference), hypothesis=clean(record.hypothesis))

    def summary(self) -> dict[str, Any]:
        lead = self.raw.lead
        summary = {
            "raw": self.raw.summary(),
            "normalised": self.normalised.summary(),
            "by_length": [group.summary(lead) for group in self._by_length],
            "by_speaker": [group.summary(lead) for group in self._by_speaker],
        }
        if self.languages:
            summary["languages"] = {name: texts.summary() for name, texts in self.languages.items()}
            means = [self._mean_of_languages(kind).summary() for kind in self.raw.kinds]
            summary["mean_of_languages"] = means
        return summary

    def sections(self, name: str) -> str:
        """The leading rate, its breakdowns by length and by speaker, and the worst utterances unit by unit."""
        from rwkv_speech.scoring.plots import rate_by_length  # matplotlib takes its time

        raw = self.raw
        lead = raw.lead.label
        return (
            f'<p class="lead">{lead} <strong>{number(raw.leading.rate)} %</strong> over '
            f"{counted(raw.leading.length, UNITS[raw.lead])} (95 % interval {interval_text(raw.interval)}); "
            f"{number(self.normalised.leading.rate)} % after normalisation.</p><h3>By length</h3>"
            f"<figure>{rate_by_length(name, lead, self._by_length)}<figcaption>{lead} with its 95 % interval, by "
            "seconds of audio.</figcaption></figure><details><summary>The figures</summary>"
            f"{_groups('Errors by length', 'Audio length', raw.lead, self._by_length)}</details>"
            f"{_speakers(raw.lead, self._by_speaker)}{_worst(raw)}"
        )

    @classmethod
    def plot(cls, splits: Mapping[str, Self]) -> str:
        """The kinds of error of each split."""
        from rwkv_speech.scoring.plots import error_kinds

        plot = error_kinds({name: scores.raw for name, scores in splits.items()})
        return f"<figure>{plot}<figcaption>Raw texts; thin line: 95 % interval of the rate.</figcaption></figure>"

    def texts(self) -> dict[str, str]:
        names = {
            "language": f"{normaliser_name()} for English, its basic one with marks kept for other languages",
            "english": normaliser_name(),
            "basic": "Whisper's basic normaliser, marks kept",
            "none": "as written",
        }
        return {"raw": "lower-cased", "normalised": names[self.normalizer]}

    def terms(self) -> dict[str, str]:
        return {
            "WER, CER": "Substitutions, deletions and insertions per word (character, spaces included) of the "
            "reference, summed over the corpus. Alignments by jiwer. CER leads where a language is written without "
            "spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer); spaces count nothing there.",
            "MER": "Mixed error rate, where both kinds of script occur: a unit is each character of a script without "
            "spaces, and each other word.",
            "SER": "Share of the utterances with at least one error.",
            "Mean utt.": "Mean of the leading rate over utterances, however short they are. Not the corpus rate; for "
            "comparison only.",
            "Raw, normalised": "Raw texts are lower-cased, nothing else. Normalised ones have passed "
            f"{self.texts()['normalised']}. Plots, breakdowns, languages and worst utterances: raw.",
            "Empty references": "A hypothesis for one counts as insertions of the corpus; such utterances have no "
            "rate of their own.",
        }

    @cached_property
    def _by_length(self) -> list[Group]:
        return by_length(self.raw.aligned)

    @cached_property
    def _by_speaker(self) -> list[Group]:
        return by_speaker(self.raw.aligned)


def _lead(records: Iterable[EvalRecord]) -> MetricKind:
    return leading_kind((record.language, record.reference) for record in records)


def _by_language(records: Iterable[EvalRecord]) -> dict[str, list[EvalRecord]]:
    """Records by language, in the order of their names; none where there are not several."""
    found: dict[str, list[EvalRecord]] = {}
    for record in records:
        found.setdefault(record.language or "unknown", []).append(record)
    return dict(sorted(found.items())) if len(found) > 1 else {}


def _kinds(edits: Edits) -> dict[str, str]:
    return {"Subst.": f"{edits.substitutions:,}", "Del.": f"{edits.deletions:,}", "Ins.": f"{edits.insertions:,}"}


def _speakers(lead: MetricKind, speakers: Sequence[Group]) -> str:
    rates = [group.edits.rate for group in speakers if group.edits.length]
    if len(rates) < 2:
        return ""
    highest, median, lowest = (number(rates[i], digits=1) for i in (0, len(rates) // 2, -1))
    return (
        f"<h3>By speaker</h3><p>{counted(len(speakers), 'speaker')}, {lead.label} from {lowest} % to {highest} %, half "
        f"of them up to {median} %.</p><details><summary>Every speaker</summary>"
        f"{_groups('Errors by speaker, highest rate first', 'Speaker', lead, speakers)}</details>"
    )


def _groups(caption: str, first: str, lead: MetricKind, groups: Sequence[Group]) -> str:
    rows = {
        group.name: [
            {
                "Utterances": f"{group.utterances:,}",
                "Audio": duration(group.audio_seconds),
                "Units": f"{group.edits.length:,}",
                f"*{lead.label}": number(group.edits.rate),
                "95 % interval": interval_text(group.interval, digits=1),
                **_kinds(group.edits),
            }
        ]
        for group in groups
    }
    return html_table(caption, rows, first=first, ruled=False)


def _worst(texts: TextScores) -> str:
    utterances, noun = worst(texts.aligned), UNITS[texts.lead]
    if not utterances:
        return "<h3>Worst utterances</h3><p>None: all is right.</p>"
    share = sum(utterance.edits.errors for utterance in utterances) / texts.leading.errors
    return (
        f"<h3>Worst utterances</h3><p>The {counted(len(utterances), 'utterance')} with most errors: "
        f"{number(share, digits=0)} % of all errors. Reference above, hypothesis below.</p>"
        '<div class="aligned key">'
        f"<span>{_pair('sub', 'word', 'other')}substitution</span>"
        f"<span>{_pair('del', 'word', '')}deletion</span>"
        f"<span>{_pair('ins', '', 'word')}insertion</span></div>"
        f'<ol class="worst">{"".join(f"<li>{_facts(u, noun)}{_alignment(u, noun)}</li>" for u in utterances)}</ol>'
    )


def _facts(utterance: Aligned, noun: str) -> str:
    record, edits = utterance.record, utterance.edits
    facts = [f"{counted(edits.errors, 'error')} in {counted(edits.length, noun)}", duration(record.seconds)]
    if record.speaker is not None:
        facts.append(f"speaker {record.speaker}")
    if record.score is not None:
        facts.append(f"mean log-probability {f'{record.score:.2f}'.replace('-', '−')}")
    flags = [name for name, raised in (("loop", record.loop), ("empty", not record.hypothesis.strip())) if raised]
    return (
        f'<div><strong>{escape(record.id)}</strong> <span class="note">{escape(" · ".join(facts))}</span>'
        + "".join(f' <span class="flag">{flag}</span>' for flag in flags)
        + "</div>"
    )


def _alignment(utterance: Aligned, noun: str) -> str:
    """Reference above hypothesis, unit by unit; an error shows by tint, by line, and in words for screen readers."""
    pairs = []
    for operation, reference, hypothesis in utterance.steps:
        if operation == "equal":
            pairs += [_pair("", word, word) for word in reference]
        elif operation == "substitute":
            pairs += [_pair("sub", *words) for words in zip(reference, hypothesis, strict=True)]
        else:
            kind, words = ("del", reference) if operation == "delete" else ("ins", hypothesis)
            shown = words[:LONGEST_RUN]
            if len(words) > len(shown):
                shown = [*shown, f"… and {counted(len(words) - len(shown), noun)} more"]
            pairs += [_pair(kind, word, "") if kind == "del" else _pair(kind, "", word) for word in shown]
    return f'<div class="aligned">{" ".join(pairs)}</div>'


def _pair(kind: str, reference: str, hypothesis: str) -> str:
    reference, hypothesis = escape(reference), escape(hypothesis)
    if not kind:
        return (
            f'<span class="pair"><span class="ref">{reference}</span>'
            f'<span class="hyp" aria-hidden="true">{hypothesis}</span></span>'
        )
    blank = '<span aria-hidden="true">·</span>'
    spoken = {"sub": "recognised as", "del": "deleted", "ins": "inserted:"}[kind]
    return (
        f'<span class="pair {kind}"><span class="ref">{reference or blank}</span> '
        f'<span class="unseen">({spoken})</span> <span class="hyp">{hypothesis or blank}</span></span>'
    )
