"""Word and character errors of a corpus: rates, alignments, and what they are by length and by speaker.

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

from rwkv_speech.scoring.normalise import lower_case
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import Interval, bootstrap_interval, defined

LENGTH_EDGES = (0, 2, 5, 10, 15, 20, 30)  # seconds; the last range is open
LENGTH_RANGES = (*(f"{low}–{high} s" for low, high in pairwise(LENGTH_EDGES)), f"{LENGTH_EDGES[-1]} s and more")


@dataclass(frozen=True)
class Edits:
    """What turns references into hypotheses, counted in words or characters. Edits of parts add up."""

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
        """Words (characters) of the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference word (character); above 1 where insertions abound, nan without a reference."""
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

    steps: (operation, reference words, hypothesis words) from left to right; the operation is `equal`,
        `substitute`, `delete` or `insert`, and for the first two both lists are equally long.
    """

    record: EvalRecord
    steps: list[tuple[str, list[str], list[str]]]

    @cached_property
    def edits(self) -> Edits:
        """Word edits of this utterance."""
        count = dict.fromkeys(("equal", "substitute", "delete", "insert"), 0)
        for operation, reference, hypothesis in self.steps:
            count[operation] += len(reference or hypothesis)
        return Edits(*count.values())


class TextScores:
    """The errors of some records in one form of their texts, by jiwer. Rates are fractions.

    Everything is computed when it is first asked for, `words` the fastest.

    clean: brings references and hypotheses into the form in which they are compared.
    """

    def __init__(self, records: Sequence[EvalRecord], clean: Callable[[str], str]) -> None:
        self.records, self.clean = records, clean

    @cached_property
    def words(self) -> Edits:
        """Edits over all words; `words.rate` is the corpus WER."""
        return _edits(self._words)

    @cached_property
    def characters(self) -> Edits:
        """Edits over all characters, spaces included; `characters.rate` is the corpus CER."""
        return _edits(jiwer.process_characters(*self._texts))

    @cached_property
    def aligned(self) -> list[Aligned]:
        """Every utterance, in the order of the records."""
        if not self.records:  # jiwer makes one utterance of none
            return []
        found = self._words
        return [
            Aligned(
                record,
                [(c.type, ref[c.ref_start_idx : c.ref_end_idx], hyp[c.hyp_start_idx : c.hyp_end_idx]) for c in chunks],
            )
            for record, ref, hyp, chunks in zip(
                self.records, found.references, found.hypotheses, found.alignments, strict=True
            )
        ]

    @cached_property
    def interval(self) -> Interval:
        """95 % bootstrap interval of the corpus WER."""
        return _interval(self.aligned)

    @property
    def mean_utterance_wer(self) -> float:
        """Mean of the WERs of the utterances whose reference is not empty."""
        rates = [utterance.edits.rate for utterance in self.aligned if utterance.edits.length]
        return math.fsum(rates) / len(rates) if rates else math.nan

    @property
    def sentence_error_rate(self) -> float:
        """Share of the utterances with at least one wrong word."""
        wrong = sum(utterance.edits.errors > 0 for utterance in self.aligned)
        return wrong / len(self.aligned) if self.aligned else math.nan

    def summary(self) -> dict[str, Any]:
        """The errors as JSON holds them."""
        return {
            **_word_errors(self.words, self.interval),
            "cer": defined(self.characters.rate),
            "characters": {"length": self.characters.length, **asdict(self.characters)},
            "mean_utterance_wer": defined(self.mean_utterance_wer),
            "sentence_error_rate": defined(self.sentence_error_rate),
        }

    @cached_property
    def _texts(self) -> tuple[list[str], list[str]]:
        """References and hypotheses, clean."""
        pairs = [(self.clean(record.reference), self.clean(record.hypothesis)) for record in self.records]
        return [reference for reference, _ in pairs], [hypothesis for _, hypothesis in pairs]

    @cached_property
    def _words(self) -> jiwer.WordOutput:
        return jiwer.process_words(*self._texts)


@dataclass(frozen=True)
class Group:
    """Some utterances of a split. The groups of a breakdown add up to the split.

    name: a range of seconds, or a speaker.
    words: their word edits.
    interval: 95 % bootstrap interval of their WER.
    """

    name: str
    utterances: int
    audio_seconds: float
    words: Edits
    interval: Interval

    def summary(self) -> dict[str, Any]:
        """The group as JSON holds it."""
        facts = {"name": self.name, "utterances": self.utterances, "audio_seconds": self.audio_seconds}
        return facts | _word_errors(self.words, self.interval)


def align(records: Sequence[EvalRecord], clean: Callable[[str], str] = lower_case) -> list[Aligned]:
    """Align the words of every record, by jiwer, after passing both texts through `clean`."""
    return TextScores(records, clean).aligned


def by_length(aligned: Iterable[Aligned]) -> list[Group]:
    """The word errors by duration of the audio, shortest first; a range holds its lower edge only."""

    def index(utterance: Aligned) -> int:
        return bisect_right(LENGTH_EDGES, utterance.record.seconds) - 1

    return _groups(sorted(aligned, key=index), lambda utterance: LENGTH_RANGES[index(utterance)])


def by_speaker(aligned: Iterable[Aligned]) -> list[Group]:
    """The word errors by speaker, highest WER first; utterances without a speaker come as `unknown`."""
    groups = _groups(aligned, lambda utterance: utterance.record.speaker or "unknown")
    return sorted(groups, key=lambda group: (math.isnan(group.words.rate), -group.words.rate, group.name))


def worst(aligned: Iterable[Aligned], n: int = 20) -> list[Aligned]:
    """The n utterances that cost most words: most errors first, then highest rate, none that is faultless.

    By errors, not by rate: these are what the corpus WER is made of, and a rate would list the one-word
    utterances of any corpus.
    """
    wrong = [utterance for utterance in aligned if utterance.edits.errors]
    return sorted(wrong, key=lambda u: (-u.edits.errors, u.edits.length, u.record.id))[:n]


def _edits(output: jiwer.WordOutput | jiwer.CharacterOutput) -> Edits:
    return Edits(output.hits, output.substitutions, output.deletions, output.insertions)


def _interval(aligned: Sequence[Aligned]) -> Interval:
    edits = [utterance.edits for utterance in aligned]
    return bootstrap_interval([e.errors for e in edits], [e.length for e in edits])


def _word_errors(words: Edits, interval: Interval) -> dict[str, Any]:
    bounds = [defined(bound) for bound in interval]
    return {"wer": defined(words.rate), "wer_interval": bounds, "words": words.length, **asdict(words)}


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
            words=sum((utterance.edits for utterance in part), Edits()),
            interval=_interval(part),
        )
        for name, part in groups.items()
    ]
