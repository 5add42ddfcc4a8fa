"""Word and character error rates of a corpus, and how far to trust them.

A corpus rate is the sum of the errors over the sum of the reference words: the figure that publications give.
The mean of per-utterance rates is another number, in which a short utterance weighs as much as a long one; it
is reported beside it, for comparison with those who report that.

An empty reference has no rate of its own: what the model says there counts as insertions of the corpus, and
the utterance is left out of the mean of rates. A rate over no reference words at all is nan.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import jiwer
import numpy as np

from ..errors import UserError
from .normalise import lower_case, normalise_english
from .records import EvalRecord

RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
BLOCK = 2**22  # drawn indices held at once, 32 MiB: bounds the memory of the bootstrap on large corpora


@dataclass(frozen=True, kw_only=True)
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
            hits=self.hits + other.hits,
            substitutions=self.substitutions + other.substitutions,
            deletions=self.deletions + other.deletions,
            insertions=self.insertions + other.insertions,
        )


@dataclass(frozen=True)
class Aligned:
    """One utterance, its reference and hypothesis laid beside each other.

    Attributes:
        record: what was aligned.
        steps: (operation, reference words, hypothesis words) from left to right; the operation is `equal`,
            `substitute`, `delete` or `insert`, and for the first two both lists are equally long.
    """

    record: EvalRecord
    steps: list[tuple[str, list[str], list[str]]]

    @property
    def edits(self) -> Edits:
        """Word edits of this utterance."""
        count = dict.fromkeys(("equal", "substitute", "delete", "insert"), 0)
        for operation, reference, hypothesis in self.steps:
            count[operation] += len(reference or hypothesis)
        return Edits(
            hits=count["equal"],
            substitutions=count["substitute"],
            deletions=count["delete"],
            insertions=count["insert"],
        )


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """The errors of a split, in one form of the texts (raw or normalised). Rates are fractions.

    Attributes:
        aligned: every utterance, ordered by id.
        words: edits over all words; `words.rate` is the corpus WER.
        characters: edits over all characters, spaces included; `characters.rate` is the corpus CER.
        interval: 95 % bootstrap interval of the corpus WER.
        mean_utterance_wer: mean of the WERs of the utterances whose reference is not empty.
        sentence_error_rate: share of the utterances with at least one wrong word.
    """

    aligned: list[Aligned]
    words: Edits
    characters: Edits
    interval: tuple[float, float]
    mean_utterance_wer: float
    sentence_error_rate: float


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Everything that is measured on one split.

    Attributes:
        raw: errors of the lower-cased texts.
        normalised: errors of the texts after `normalise_english`.
        utterances: how many there are.
        audio_seconds: how long they are together.
        wall_seconds: time they took, summed over processes; None where a record doesn't tell.
        loops: utterances in which the decoder repeated itself.
        empty_outputs: hypotheses without a word.
        empty_references: references without a word.
        left_out: utterances of the split that could not be used, as told by the caller; they count nowhere else.
        peak_memory: bytes, as measured by the caller.
    """

    raw: TextScores
    normalised: TextScores
    utterances: int
    audio_seconds: float
    wall_seconds: float | None
    loops: int
    empty_outputs: int
    empty_references: int
    left_out: int
    peak_memory: int | None

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of one process per second of audio."""
        return self.wall_seconds / self.audio_seconds if self.wall_seconds and self.audio_seconds else None

    @property
    def utterances_per_second(self) -> float | None:
        """Utterances that one process transcribes in a second."""
        return self.utterances / self.wall_seconds if self.wall_seconds else None


def score(records: Iterable[EvalRecord], *, left_out: int = 0, peak_memory: int | None = None) -> Scores:
    """Score one split. The order of the records changes nothing.

    Args:
        records: one per utterance.
        left_out: utterances that should have a record and have none, to be shown with the scores.
        peak_memory: bytes the decoding took at most, to be shown with the scores.

    Raises:
        UserError: no records, or an id that occurs twice.
    """
    records = sorted(records, key=lambda record: record.id)
    if not records:
        raise UserError("nothing to score: the split has no utterances; check --eval_split and the data")
    for before, record in pairwise(records):
        if before.id == record.id:
            raise UserError(f"utterance id {record.id!r} occurs twice in a split; ids must be unique")
    walls = [record.wall_seconds for record in records]
    return Scores(
        raw=_score_texts(records, lower_case),
        normalised=_score_texts(records, normalise_english),
        utterances=len(records),
        audio_seconds=math.fsum(record.seconds for record in records),
        wall_seconds=None if None in walls else math.fsum(walls),
        loops=sum(record.loop for record in records),
        empty_outputs=sum(not record.hypothesis.strip() for record in records),
        empty_references=sum(not record.reference.strip() for record in records),
        left_out=left_out,
        peak_memory=peak_memory,
    )


def align(records: Sequence[EvalRecord], clean: Callable[[str], str] = lower_case) -> list[Aligned]:
    """Align the words of every record, by jiwer, after passing both texts through `clean`."""
    if not records:  # jiwer makes one utterance of none
        return []
    output = jiwer.process_words(
        [clean(record.reference) for record in records], [clean(record.hypothesis) for record in records]
    )
    return [
        Aligned(
            record,
            [
                (
                    chunk.type,
                    reference[chunk.ref_start_idx : chunk.ref_end_idx],
                    hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx],
                )
                for chunk in chunks
            ],
        )
        for record, reference, hypothesis, chunks in zip(
            records, output.references, output.hypotheses, output.alignments, strict=True
        )
    ]


def bootstrap_interval(
    errors: Sequence[int], lengths: Sequence[int], *, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float]:
    """95 % percentile interval of the corpus rate sum(errors) / sum(lengths).

    Utterances are drawn with replacement, as many as there are, and the rate is taken again (Bisani and Ney,
    "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004). That takes
    utterances for independent: where few speakers say many of them, the truth is wider.

    Args:
        errors: per utterance, (n,).
        lengths: reference words per utterance, (n,).
        resamples: corpora drawn; those without a reference word are left out.
        seed: of the generator, so that the same records have the same interval.

    Returns:
        (low, high), nan where no utterance has a reference word.
    """
    errors, lengths = np.asarray(errors), np.asarray(lengths)
    if not lengths.any():
        return math.nan, math.nan
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // len(lengths))
    rates = []
    for start in range(0, resamples, block):
        drawn = generator.integers(len(lengths), size=(min(block, resamples - start), len(lengths)))
        words = lengths[drawn].sum(axis=1)
        rates.append(errors[drawn].sum(axis=1)[words > 0] / words[words > 0])
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(rates), (tail, 100 - tail))
    return float(low), float(high)


def interval_of(aligned: Sequence[Aligned]) -> tuple[float, float]:
    """`bootstrap_interval` of the WER over some utterances."""
    edits = [utterance.edits for utterance in aligned]
    return bootstrap_interval([e.errors for e in edits], [e.length for e in edits])


def _score_texts(records: Sequence[EvalRecord], clean: Callable[[str], str]) -> TextScores:
    aligned = align(records, clean)
    edits = [utterance.edits for utterance in aligned]
    rates = [e.rate for e in edits if e.length]
    characters = jiwer.process_characters(
        [clean(record.reference) for record in records], [clean(record.hypothesis) for record in records]
    )
    return TextScores(
        aligned=aligned,
        words=sum(edits, Edits()),
        characters=Edits(
            hits=characters.hits,
            substitutions=characters.substitutions,
            deletions=characters.deletions,
            insertions=characters.insertions,
        ),
        interval=interval_of(aligned),
        mean_utterance_wer=math.fsum(rates) / len(rates) if rates else math.nan,
        sentence_error_rate=sum(e.errors > 0 for e in edits) / len(edits),
    )
