"""Word, character and mixed errors of a corpus: rates, alignments, and what they are by length and by speaker.

A corpus rate is the sum of the errors over the sum of the reference words: the figure that publications give.
The mean of per-utterance rates is another number, in which a short utterance weighs as much as a long one; it
is reported beside it, for comparison with those who report that.

An empty reference has no rate of its own: a hypothesis for it counts as insertions of the corpus, and the
utterance is left out of the mean of rates. A rate over no reference words at all is nan.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import jiwer

from rwkv_speech.scoring.languages import is_character, spaced, units, without_needless_spaces
from rwkv_speech.scoring.normalise import lower_case
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import Interval, MetricKind, bootstrap_interval, defined

WER = MetricKind("wer", "WER", higher_is_better=False)
CER = MetricKind("cer", "CER", higher_is_better=False)
MER = MetricKind("mer", "MER", higher_is_better=False)  # mixed: characters of scripts without spaces, and other words
UNITS = {WER: "word", CER: "character", MER: "unit"}  # what errors are counted in

LENGTH_EDGES = (0, 2, 5, 10, 15, 20, 30)  # seconds; the last range is open
LENGTH_RANGES = (*(f"{low}–{high} s" for low, high in pairwise(LENGTH_EDGES)), f"{LENGTH_EDGES[-1]} s and more")


@dataclass(frozen=True)
class Edits:
    """What turns references into hypotheses, counted in one kind of unit. Edits of parts add up."""

    hits: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def errors(self) -> int:
        """Substitutions + deletions + insertions."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def length(self) -> int:
        """Units of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per unit of the reference; above 1 where insertions abound, nan without a reference."""
        return self.errors / self.length if self.length else math.nan

    def __add__(self, other: "Edits") -> "Edits":
        return Edits(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@dataclass(frozen=True)
class Aligned:
    """One utterance, its reference and hypothesis laid beside each other.

    steps: (operation, units of the reference, of the hypothesis) from left to right; the operation is `equal`,
        `substitute`, `delete` or `insert`, and for the first two both lists are equally long.
    """

    record: EvalRecord
    steps: list[tuple[str, list[str], list[str]]]

    @cached_property
    def edits(self) -> Edits:
        """The edits of this utterance."""
        count = dict.fromkeys(("equal", "substitute", "delete", "insert"), 0)
        for operation, reference, hypothesis in self.steps:
            count[operation] += len(reference or hypothesis)
        return Edits(*count.values())


class TextScores:
    """The errors of some records in one form of their texts, by jiwer. Rates are fractions.

    Everything is computed when it is first asked for.

    clean: brings references and hypotheses into the form in which they are compared.
    lead: the rate that alignments, breakdowns and what else there is one of are about.
    """

    def __init__(
        self, records: Sequence[EvalRecord], clean: Callable[[str], str] = lower_case, lead: MetricKind = WER
    ) -> None:
        self.records, self.clean, self.lead = records, clean, lead
        self._outputs: dict[MetricKind, jiwer.WordOutput | jiwer.CharacterOutput] = {}
        self._aligned: dict[MetricKind, list[Aligned]] = {}

    def edits(self, kind: MetricKind) -> Edits:
        """Edits over all units of the corpus; their `rate` is the metric of this kind."""
        output = self._output(kind)
        return Edits(output.hits, output.substitutions, output.deletions, output.insertions)

    def interval_of(self, kind: MetricKind) -> Interval:
        """95 % bootstrap interval of the corpus rate of this kind."""
        return _interval(self.aligned_by(kind))

    @cached_property
    def interval(self) -> Interval:
        """95 % bootstrap interval of the leading rate."""
        return self.interval_of(self.lead)

    @property
    def leading(self) -> Edits:
        """Edits in the leading kind of unit."""
        return self.edits(self.lead)

    @property
    def words(self) -> Edits:
        """Edits over all words; `words.rate` is the corpus WER."""
        return self.edits(WER)

    @property
    def characters(self) -> Edits:
        """Edits over all characters, with the spaces, if the language has them."""
        return self.edits(CER)

    def aligned_by(self, kind: MetricKind) -> list[Aligned]:
        """Every utterance in this kind of unit, in the order of the records."""
        if kind not in self._aligned:
            found = self._output(kind)
            parts = zip(self.records, found.references, found.hypotheses, found.alignments, strict=True)
            self._aligned[kind] = [
                Aligned(
                    record,
                    [
                        (c.type, ref[c.ref_start_idx : c.ref_end_idx], hyp[c.hyp_start_idx : c.hyp_end_idx])
                        for c in chunks
                    ],
                )
                for record, ref, hyp, chunks in (parts if self.records else ())  # jiwer makes one utterance of none
            ]
        return self._aligned[kind]

    @property
    def aligned(self) -> list[Aligned]:
        """Every utterance in the leading kind of unit."""
        return self.aligned_by(self.lead)

    @property
    def mean_utterance_rate(self) -> float:
        """Mean of the leading rates of the utterances whose reference is not empty."""
        rates = [utterance.edits.rate for utterance in self.aligned if utterance.edits.length]
        return math.fsum(rates) / len(rates) if rates else math.nan

    @property
    def wrong(self) -> list[bool]:
        """Of each utterance, whether anything is wrong with it."""
        return [utterance.edits.errors > 0 for utterance in self.aligned]

    @property
    def sentence_error_rate(self) -> float:
        """Share of the utterances with at least one error."""
        return sum(self.wrong) / len(self.wrong) if self.records else math.nan

    @cached_property
    def is_mixed(self) -> bool:
        """Whether references hold both characters of scripts without spaces and other words."""
        found = (unit for reference in self._texts[0] for unit in units(reference) if any(map(str.isalnum, unit)))
        return len(set(map(is_character, found))) == 2

    @property
    def kinds(self) -> list[MetricKind]:
        """The rates to report, the leading one first."""
        return list(dict.fromkeys([self.lead, WER, CER, *([MER] if self.is_mixed else ())]))

    def summary(self) -> dict[str, Any]:
        """The errors as JSON holds them: the leading rate's counts beside the rates, others under their unit's name."""
        errors = {kind: _errors(kind, self.edits(kind), self.interval_of(kind)) for kind in self.kinds}
        summary = errors.pop(self.lead)
        for kind, found in errors.items():
            summary |= {name: found.pop(name) for name in (kind.name, f"{kind.name}_interval")}
            summary[f"{UNITS[kind]}s"] = {"length": found.pop(f"{UNITS[kind]}s"), **found}
        return summary | {
            f"mean_utterance_{self.lead.name}": defined(self.mean_utterance_rate),
            "sentence_error_rate": defined(self.sentence_error_rate),
        }

    @cached_property
    def _texts(self) -> tuple[list[str], list[str]]:
        """References and hypotheses, clean."""
        pairs = [(self.clean(record.reference), self.clean(record.hypothesis)) for record in self.records]
        return [reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs]

    def _output(self, kind: MetricKind) -> jiwer.WordOutput | jiwer.CharacterOutput:
        if kind not in self._outputs:
            references, hypotheses = self._texts
            if kind == WER:
                self._outputs[kind] = jiwer.process_words(references, hypotheses)
            elif kind == MER:
                joined = ([" ".join(units(text)) for text in texts] for texts in (references, hypotheses))
                self._outputs[kind] = jiwer.process_words(*joined)
            else:
                dense = [not spaced(record.language, record.reference) for record in self.records]
                joined = (
                    [without_needless_spaces(text) if x else text for text, x in zip(texts, dense, strict=True)]
                    for texts in (references, hypotheses)
                )
                self._outputs[kind] = jiwer.process_characters(*joined)
        return self._outputs[kind]


@dataclass(frozen=True)
class Group:
    """Some utterances of a split. The groups of a breakdown add up to the split.

    name: a range of seconds, or a speaker.
    edits: theirs.
    interval: 95 % bootstrap interval of their rate.
    """

    name: str
    utterances: int
    audio_seconds: float
    edits: Edits
    interval: Interval

    def summary(self, kind: MetricKind) -> dict[str, Any]:
        """The group as JSON holds it; kind: of the rate."""
        facts = {"name": self.name, "utterances": self.utterances, "audio_seconds": self.audio_seconds}
        return facts | _errors(kind, self.edits, self.interval)


def leading_kind(texts: Iterable[tuple[str | None, str]]) -> MetricKind:
    """The rate that suits some texts, each given with its language, if known.

    It is the WER where words are separated by spaces, the CER where they are not, and the MER for both together.
    """
    found = {spaced(language, text) for language, text in texts}
    return MER if len(found) > 1 else CER if found == {False} else WER


def align(records: Sequence[EvalRecord], clean: Callable[[str], str] = lower_case) -> list[Aligned]:
    """Align the words of every record, by jiwer, after passing both texts through `clean`."""
    return TextScores(records, clean).aligned


def by_length(aligned: Iterable[Aligned]) -> list[Group]:
    """The errors by duration of the audio, shortest first; a range holds its lower edge only."""

    def index(utterance: Aligned) -> int:
        return bisect_right(LENGTH_EDGES, utterance.record.seconds) - 1

    return _groups(sorted(aligned, key=index), lambda utterance: LENGTH_RANGES[index(utterance)])


def by_speaker(aligned: Iterable[Aligned]) -> list[Group]:
    """The errors by speaker, highest rate first; utterances without a speaker come as `unknown`."""
    groups = _groups(aligned, lambda utterance: utterance.record.speaker or "unknown")
    return sorted(groups, key=lambda group: (math.isnan(group.edits.rate), -group.edits.rate, group.name))


def worst(aligned: Iterable[Aligned], n: int = 20) -> list[Aligned]:
    """The n utterances that have most errors: most first, then highest rate, none that is faultless.

    By errors, not by rate: these are what the corpus rate is made of, and a rate would list the one-word
    utterances of any corpus.
    """
    wrong = [utterance for utterance in aligned if utterance.edits.errors]
    return sorted(wrong, key=lambda u: (-u.edits.errors, u.edits.length, u.record.id))[:n]


def _interval(aligned: Sequence[Aligned]) -> Interval:
    edits = [utterance.edits for utterance in aligned]
    return bootstrap_interval([e.errors for e in edits], [e.length for e in edits])


def _errors(kind: MetricKind, edits: Edits, interval: Interval) -> dict[str, Any]:
    bounds = [defined(bound) for bound in interval]
    rate = {kind.name: defined(edits.rate), f"{kind.name}_interval": bounds}
    return rate | {f"{UNITS[kind]}s": edits.length, **asdict(edits)}


def _groups(aligned: Iterable[Aligned], name: Callable[[Aligned], str]) -> list[Group]:
    """In the order in which their names first occur."""
    groups: dict[str, list[Aligned]] = {}
    for utterance in aligned:
        groups.setdefault(name(utterance), []).append(utterance)
    return [
        Group(
            name,
            utterances=len(part),
            audio_seconds=math.fsum(utterance.record.seconds for utterance in part),
            edits=sum((utterance.edits for utterance in part), Edits()),
            interval=_interval(part),
        )
        for name, part in groups.items()
    ]
