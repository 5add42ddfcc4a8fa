"""The scores taken apart (by length, by speaker, the worst), and all of it as plain data."""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .normalise import normaliser_name
from .rates import CONFIDENCE, RESAMPLES, SEED, Aligned, Edits, Scores, TextScores, interval_of

LENGTH_EDGES = (0, 2, 5, 10, 15, 20, 30)  # seconds; the last bucket is open


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some utterances of a split. The groups of a breakdown add up to the split.

    Attributes:
        name: a range of seconds, or a speaker.
        utterances: how many.
        audio_seconds: how long they are together.
        words: their word edits.
        interval: 95 % bootstrap interval of their WER.
    """

    name: str
    utterances: int
    audio_seconds: float
    words: Edits
    interval: tuple[float, float]


def by_length(aligned: Iterable[Aligned]) -> list[Group]:
    """The word errors by duration of the audio, shortest first; a range holds its lower edge only."""

    def bucket(utterance: Aligned) -> int:
        return bisect_right(LENGTH_EDGES, utterance.record.seconds) - 1

    groups = _group(aligned, bucket)
    return [_summed(_range_name(index), groups[index]) for index in sorted(groups)]


def by_speaker(aligned: Iterable[Aligned]) -> list[Group]:
    """The word errors by speaker, highest WER first; utterances without a speaker come as `unknown`."""
    groups = _group(aligned, lambda utterance: utterance.record.speaker or "unknown")
    summed = [_summed(name, groups[name]) for name in sorted(groups)]
    return sorted(summed, key=lambda group: (math.isnan(group.words.rate), -group.words.rate))


def worst(aligned: Iterable[Aligned], n: int = 20) -> list[Aligned]:
    """The n utterances that cost most words: most errors first, then highest rate, none that is faultless.

    By errors, not by rate: these are what the corpus WER is made of, and a rate would list the one-word
    utterances of any corpus.
    """
    wrong = [utterance for utterance in aligned if utterance.edits.errors]
    return sorted(wrong, key=lambda u: (-u.edits.errors, u.edits.length, u.record.id))[:n]


def summary(splits: Mapping[str, Scores]) -> dict[str, Any]:
    """The scores of all splits as JSON holds them: rates are fractions, null where undefined.

    All that depends on the machine and the moment stands under `speed`; the rest follows from the records.
    """
    return {
        "texts": {"raw": "lower-cased", "normalised": normaliser_name()},
        "bootstrap": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "seed": SEED, "unit": "utterance"},
        "splits": {name: _split(scores) for name, scores in splits.items()},
    }


def _split(scores: Scores) -> dict[str, Any]:
    return {
        "utterances": scores.utterances,
        "audio_seconds": scores.audio_seconds,
        "loops": scores.loops,
        "empty_outputs": scores.empty_outputs,
        "empty_references": scores.empty_references,
        "left_out": scores.left_out,
        "raw": _texts(scores.raw),
        "normalised": _texts(scores.normalised),
        "by_length": [_row(group) for group in by_length(scores.raw.aligned)],
        "by_speaker": [_row(group) for group in by_speaker(scores.raw.aligned)],
        "speed": {
            "wall_seconds": scores.wall_seconds,
            "real_time_factor": scores.real_time_factor,
            "utterances_per_second": scores.utterances_per_second,
            "peak_memory_bytes": scores.peak_memory,
        },
    }


def _texts(texts: TextScores) -> dict[str, Any]:
    return {
        "wer": _defined(texts.words.rate),
        "wer_interval": [_defined(bound) for bound in texts.interval],
        "words": texts.words.length,
        **_counts(texts.words),
        "cer": _defined(texts.characters.rate),
        "characters": {"length": texts.characters.length, **_counts(texts.characters)},
        "mean_utterance_wer": _defined(texts.mean_utterance_wer),
        "sentence_error_rate": texts.sentence_error_rate,
    }


def _row(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "utterances": group.utterances,
        "audio_seconds": group.audio_seconds,
        "wer": _defined(group.words.rate),
        "wer_interval": [_defined(bound) for bound in group.interval],
        "words": group.words.length,
        **_counts(group.words),
    }


def _counts(edits: Edits) -> dict[str, int]:
    return {
        "hits": edits.hits,
        "substitutions": edits.substitutions,
        "deletions": edits.deletions,
        "insertions": edits.insertions,
    }


def _defined(rate: float) -> float | None:
    return None if math.isnan(rate) else rate


def _group(aligned: Iterable[Aligned], key: Callable[[Aligned], Any]) -> dict[Any, list[Aligned]]:
    groups: dict[Any, list[Aligned]] = {}
    for utterance in aligned:
        groups.setdefault(key(utterance), []).append(utterance)
    return groups


def _summed(name: str, aligned: Sequence[Aligned]) -> Group:
    return Group(
        name=name,
        utterances=len(aligned),
        audio_seconds=math.fsum(utterance.record.seconds for utterance in aligned),
        words=sum((utterance.edits for utterance in aligned), Edits()),
        interval=interval_of(aligned),
    )


def _range_name(index: int) -> str:
    edges = LENGTH_EDGES[index : index + 2]
    return f"{edges[0]}–{edges[1]} s" if len(edges) == 2 else f"{edges[0]} s and more"
