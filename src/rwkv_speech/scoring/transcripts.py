"""Scores of transcripts: word error rate first, and how it is shown in the terminal, in JSON and in the report."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from html import escape
from typing import Any, Self

from rwkv_speech.scoring.formats import counted, duration, html_table, interval_text, number
from rwkv_speech.scoring.languages import spaced
from rwkv_speech.scoring.normalise import lower_case, normalise_english, normaliser_name
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import Metric, MetricKind, TaskScores
from rwkv_speech.scoring.words import Aligned, Edits, Group, TextScores, by_length, by_speaker, worst

WER = MetricKind("wer", "WER", higher_is_better=False)
NORMALISED_WER = MetricKind("wer_normalised", "WER, normalised", higher_is_better=False)
CER = MetricKind("cer", "CER", higher_is_better=False)
SER = MetricKind("ser", "SER", higher_is_better=False)

LONGEST_RUN = 40  # words shown of one deletion or insertion: a run-away hypothesis must not bury the page


def leading_kind(texts: Iterable[tuple[str | None, str]]) -> MetricKind:
    """What decides over texts and their languages: the CER where most don't space their words, else the WER."""
    are_spaced = [spaced(language, text) for language, text in texts]
    return WER if 2 * sum(are_spaced) >= len(are_spaced) else CER


class TranscriptScores(TaskScores):
    """Errors of transcripts, in two forms of the texts. The order of the records changes nothing.

    raw: errors of the lower-cased texts.
    normalised: errors of the texts after `normalise_english`.
    """

    title = "Word error rate"
    caption = "Error rates of the corpus in percent; errors counted in words"
    report_only = frozenset({"Words", "Mean WER"})

    def __init__(self, records: Iterable[EvalRecord]) -> None:
        records = sorted(records, key=lambda record: record.id)
        self.raw = TextScores(records, lower_case)
        self.normalised = TextScores(records, normalise_english)

    @cached_property
    def leading(self) -> Metric:
        """The corpus rate of the lower-cased texts: WER, or what suits their languages."""
        kind = leading_kind((record.language, record.reference) for record in self.raw.records)
        return self._cer if kind is CER else self._wer

    @property
    def _wer(self) -> Metric:
        return Metric(WER, self.raw.words.rate, lambda: self.raw.interval)

    @property
    def _cer(self) -> Metric:
        return Metric(CER, self.raw.characters.rate)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        normalised = Metric(NORMALISED_WER, self.normalised.words.rate, lambda: self.normalised.interval)
        others = [self._wer, normalised, self._cer, Metric(SER, self.raw.sentence_error_rate)]
        return (self.leading, *(metric for metric in others if metric.kind != self.leading.kind))

    @property
    def headline(self) -> str:
        first = f"CER {self.raw.characters.rate:.2%}, " if self.leading.kind is CER else ""
        return f"{first}WER {self.raw.words.rate:.2%}, mean of utterances {self.raw.mean_utterance_wer:.2%}"

    def rows(self) -> list[dict[str, str]]:
        """Two lines, raw above normalised."""
        return [
            {
                "<Text": label,
                "*WER": number(texts.words.rate),
                "95 % interval": interval_text(texts.interval),
                **_kinds(texts.words),
                "Words": f"{texts.words.length:,}",
                "CER": number(texts.characters.rate),
                "SER": number(texts.sentence_error_rate, digits=1),
                "Mean WER": number(texts.mean_utterance_wer),
            }
            for label, texts in (("raw", self.raw), ("normalised", self.normalised))
        ]

    def summary(self) -> dict[str, Any]:
        return {
            "raw": self.raw.summary(),
            "normalised": self.normalised.summary(),
            "by_length": [group.summary() for group in self._by_length],
            "by_speaker": [group.summary() for group in self._by_speaker],
        }

    def sections(self, name: str) -> str:
        """The WER, its breakdowns by length and by speaker, and the worst utterances word by word."""
        from rwkv_speech.scoring.plots import wer_by_length  # matplotlib takes its time

        raw = self.raw
        return (
            f'<p class="lead">WER <strong>{number(raw.words.rate)} %</strong> over '
            f"{counted(raw.words.length, 'word')} (95 % interval {interval_text(raw.interval)}); "
            f"{number(self.normalised.words.rate)} % after normalisation.</p><h3>By length</h3>"
            f"<figure>{wer_by_length(name, self._by_length)}<figcaption>WER with its 95 % interval, by seconds of "
            "audio.</figcaption></figure><details><summary>The figures</summary>"
            f"{_groups('Word errors by length', 'Audio length', self._by_length)}</details>"
            f"{_speakers(self._by_speaker)}{_worst(raw)}"
        )

    @classmethod
    def plot(cls, splits: Mapping[str, Self]) -> str:
        """The kinds of error of each split."""
        from rwkv_speech.scoring.plots import error_kinds

        plot = error_kinds({name: scores.raw for name, scores in splits.items()})
        return f"<figure>{plot}<figcaption>Raw texts; thin line: 95 % interval of the WER.</figcaption></figure>"

    @classmethod
    def texts(cls) -> dict[str, str]:
        return {"raw": "lower-cased", "normalised": normaliser_name()}

    @classmethod
    def terms(cls) -> dict[str, str]:
        return {
            "WER, CER": "Substitutions, deletions and insertions per word (character, spaces included) of the "
            "reference, summed over the corpus. Alignments by jiwer.",
            "SER": "Share of the utterances with at least one wrong word.",
            "Mean WER": "Mean over utterances, however short they are. Not the corpus WER; for comparison only.",
            "Raw, normalised": "Raw texts are lower-cased, nothing else. Normalised ones have passed "
            f"{normaliser_name()}, which is meant for English. Plots, breakdowns and worst utterances: raw.",
            "Empty references": "A hypothesis for one counts as insertions of the corpus; such utterances have no "
            "rate of their own.",
        }

    @cached_property
    def _by_length(self) -> list[Group]:
        return by_length(self.raw.aligned)

    @cached_property
    def _by_speaker(self) -> list[Group]:
        return by_speaker(self.raw.aligned)


def _kinds(words: Edits) -> dict[str, str]:
    return {"Subst.": f"{words.substitutions:,}", "Del.": f"{words.deletions:,}", "Ins.": f"{words.insertions:,}"}


def _speakers(speakers: Sequence[Group]) -> str:
    rates = [group.words.rate for group in speakers if group.words.length]
    if len(rates) < 2:
        return ""
    highest, median, lowest = (number(rates[i], digits=1) for i in (0, len(rates) // 2, -1))
    return (
        f"<h3>By speaker</h3><p>{counted(len(speakers), 'speaker')}, WER from {lowest} % to {highest} %, half of them "
        f"up to {median} %.</p><details><summary>Every speaker</summary>"
        f"{_groups('Word errors by speaker, highest rate first', 'Speaker', speakers)}</details>"
    )


def _groups(caption: str, first: str, groups: Sequence[Group]) -> str:
    rows = {
        group.name: [
            {
                "Utterances": f"{group.utterances:,}",
                "Audio": duration(group.audio_seconds),
                "Words": f"{group.words.length:,}",
                "*WER": number(group.words.rate),
                "95 % interval": interval_text(group.interval, digits=1),
                **_kinds(group.words),
            }
        ]
        for group in groups
    }
    return html_table(caption, rows, first=first, ruled=False)


def _worst(texts: TextScores) -> str:
    utterances = worst(texts.aligned)
    if not utterances:
        return "<h3>Worst utterances</h3><p>None: every word is right.</p>"
    share = sum(utterance.edits.errors for utterance in utterances) / texts.words.errors
    return (
        f"<h3>Worst utterances</h3><p>The {counted(len(utterances), 'utterance')} with most wrong words: "
        f"{number(share, digits=0)} % of all errors. Reference above, hypothesis below.</p>"
        '<div class="aligned key">'
        f"<span>{_pair('sub', 'word', 'other')}substitution</span>"
        f"<span>{_pair('del', 'word', '')}deletion</span>"
        f"<span>{_pair('ins', '', 'word')}insertion</span></div>"
        f'<ol class="worst">{"".join(f"<li>{_facts(u)}{_alignment(u)}</li>" for u in utterances)}</ol>'
    )


def _facts(utterance: Aligned) -> str:
    record, edits = utterance.record, utterance.edits
    facts = [f"{counted(edits.errors, 'error')} in {counted(edits.length, 'word')}", duration(record.seconds)]
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


def _alignment(utterance: Aligned) -> str:
    """Reference above hypothesis, word by word; an error shows by tint, by line, and in words for screen readers."""
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
                shown = [*shown, f"… and {counted(len(words) - len(shown), 'word')} more"]
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
