"""What every mission's scores offer: metrics with their intervals, what is shown of them, and the cost of a split."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np

from rwkv_speech.errors import UserError
from rwkv_speech.scoring.formats import html_table, interval_text, number
from rwkv_speech.scoring.records import EvalRecord

RESAMPLES = 2000
SEED = 0
CONFIDENCE = 0.95
BLOCK = 2**22  # drawn indices held at once, 32 MiB: bounds the memory of the bootstrap on large corpora
EXAMPLES = 20  # wrong or worst answers in a report

Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricKind:
    """What a metric is called, and how it is read.

    name: in file names, JSON and CSV columns, like `wer`.
    label: in tables and messages, like `WER`.
    percent: the value is a fraction, shown in percent.
    """

    name: str
    label: str
    higher_is_better: bool
    percent: bool = True

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`; any number is better than nan, which therefore serves as a first best."""
        return not math.isnan(a) and (math.isnan(b) or (a > b if self.higher_is_better else a < b))

    def text(self, value: float, digits: int = 2) -> str:
        """0.0813 -> `8.13 %`, or `0.08` where the kind isn't shown in percent."""
        return number(value, self.percent, digits) + " %" * self.percent


@dataclass(frozen=True, eq=False)
class Metric:
    """A figure of one split.

    value: nan where it is undefined.
    resample: computes the 95 % interval when that is first asked for; None: the metric has none.
    """

    kind: MetricKind
    value: float
    resample: Callable[[], Interval] | None = None

    @cached_property
    def interval(self) -> Interval | None:
        """95 % interval of the value."""
        return self.resample() if self.resample else None

    def summary(self) -> dict[str, Any]:
        """The metric as JSON holds it."""
        interval = self.interval and [defined(bound) for bound in self.interval]
        return {"name": self.kind.name, "value": defined(self.value), "interval": interval}


class TaskScores(ABC):
    """What a mission makes of the records of one split, and what is shown of it; `leading` alone must be given.

    `leading` is also asked for while records are still being written: intervals, breakdowns and the like should be
    computed when they are asked for.

    title: of the report.
    caption: of the report's table of all splits of the mission.
    report_only: columns of `rows` that the terminal has no room for.
    """

    title: ClassVar[str] = "Scores"
    caption: ClassVar[str] = "Scores and 95 % intervals"
    report_only: ClassVar[frozenset[str]] = frozenset()

    @property
    @abstractmethod
    def leading(self) -> Metric:
        """The metric that decides which model is best."""

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All metrics, the leading one first."""
        return (self.leading,)

    @property
    def headline(self) -> str:
        """The metrics in a line, without intervals."""
        return ", ".join(f"{metric.kind.label} {metric.kind.text(metric.value)}" for metric in self.metrics)

    def rows(self) -> list[dict[str, str]]:
        """The lines of this split in the tables of all splits: column -> figure; columns as `html_table` takes them."""
        cells = {}
        for metric in self.metrics:
            kind, interval = metric.kind, metric.interval
            shown = number(metric.value, kind.percent)
            shown += f" ({interval_text(interval, kind.percent)})" if interval else ""
            cells["*" * (metric is self.leading) + kind.label + " %" * kind.percent] = shown
        return [cells]

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds of the split besides its metrics and cost."""
        return {}

    def sections(self, name: str) -> str:
        """HTML: what the report shows of the split of this name."""
        return f'<p class="lead"><strong>{escape(self.headline)}</strong></p>'

    @classmethod
    def plot(cls, splits: Mapping[str, Self]) -> str:
        """HTML: a figure of all splits of the mission, under their table in the report."""
        return ""

    def texts(self) -> dict[str, str]:
        """The forms in which texts are compared: name -> how it is made."""
        return {}

    def terms(self) -> dict[str, str]:
        """Terms that the report explains: term -> explanation."""
        return {}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a split took, and how the decoder fared, whatever the mission.

    wall_seconds: time the utterances took, summed over processes; None where a record doesn't say.
    loops: utterances in which the decoder repeated itself.
    empty_outputs, empty_references: hypotheses and references without a word.
    left_out: utterances of the split that could not be used, as given by the caller; they count nowhere else.
    peak_memory: bytes, as measured by the caller.
    """

    utterances: int
    audio_seconds: float
    wall_seconds: float | None
    loops: int
    empty_outputs: int
    empty_references: int
    left_out: int = 0
    peak_memory: int | None = None

    @classmethod
    def of(cls, records: Iterable[EvalRecord], *, left_out: int = 0, peak_memory: int | None = None) -> Self:
        """The cost of a whole split, one record per utterance.

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
        return cls(
            utterances=len(records),
            audio_seconds=math.fsum(record.seconds for record in records),
            wall_seconds=None if None in walls else math.fsum(walls),
            loops=sum(record.loop for record in records),
            empty_outputs=sum(not record.hypothesis.strip() for record in records),
            empty_references=sum(not record.reference.strip() for record in records),
            left_out=left_out,
            peak_memory=peak_memory,
        )

    @property
    def real_time_factor(self) -> float | None:
        """Seconds of one process per second of audio."""
        return self.wall_seconds / self.audio_seconds if self.wall_seconds and self.audio_seconds else None

    @property
    def utterances_per_second(self) -> float | None:
        """Utterances that one process decodes in a second."""
        return self.utterances / self.wall_seconds if self.wall_seconds else None


@dataclass(frozen=True)
class SplitResult:
    """What is measured on one split: by which mission it is scored, how well it did, and what it took."""

    mission: str
    scores: TaskScores
    cost: Cost


def bootstrap(
    statistics: np.ndarray,
    value: Callable[[np.ndarray], np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """95 % percentile interval of a score that is computed from sums over utterances.

    Utterances are drawn with replacement, as many as there are, and the score is taken again (Bisani and Ney,
    "Bootstrap estimates for confidence intervals in ASR performance evaluation", ICASSP 2004). That takes
    utterances for independent: where few speakers say many of them, the true interval is wider.

    Args:
        statistics: (n, k), what the score is made of, of each utterance: its errors and its words, say.
        value: sums of many drawn corpora (r, k) -> their scores (r,), nan where undefined: those are left out.
        resamples: corpora drawn.
        seed: of the generator, so that the same records have the same interval.

    Returns:
        (low, high), nan where no corpus has a score.
    """
    statistics = np.asarray(statistics, dtype=float)
    n = len(statistics)
    generator = np.random.default_rng(seed)
    block = max(1, BLOCK // max(1, n))
    scores = []
    for start in range(0, resamples if n else 0, block):
        rows = min(block, resamples - start)
        drawn = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)  # how often each was drawn
        scores.append(value(times @ statistics))
    found = np.concatenate(scores) if scores else np.empty(0)
    found = found[~np.isnan(found)]
    if not len(found):
        return math.nan, math.nan
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found, (tail, 100 - tail))
    return float(low), float(high)


def bootstrap_interval(errors: Sequence[float], lengths: Sequence[float], **how: int) -> Interval:
    """The interval, by `bootstrap`, of a corpus rate sum(errors) / sum(lengths).

    errors: per utterance, (n,); or whatever else is counted, such as right answers.
    lengths: per utterance, (n,): reference words, say, or 1 for a share of utterances.
    """
    return bootstrap(np.column_stack([errors, lengths]), lambda sums: ratio(sums[:, 0], sums[:, 1]), **how)


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, nan where b is 0."""
    return np.divide(a, b, out=np.full(np.shape(b), math.nan), where=b != 0)


def mean_metric(kind: MetricKind, values: Sequence[float]) -> Metric:
    """The mean of a score that each utterance has, with its interval."""
    n = len(values)
    return Metric(kind, math.fsum(values) / n if n else math.nan, partial(bootstrap_interval, values, [1] * n))


def mean_of_groups(kind: MetricKind, groups: Sequence[np.ndarray], value: Callable[[np.ndarray], np.ndarray]) -> Metric:
    """The mean of a score over groups of utterances: languages, say.

    groups: statistics (n, k) of each, and
    value: what makes scores of their sums, as for `bootstrap`. In a resampled corpus, the mean is of the groups in it.
    """
    sizes, k = [len(group) for group in groups], groups[0].shape[1]
    statistics = np.zeros((sum(sizes), len(groups), k))
    for place, (start, group) in enumerate(zip(np.cumsum([0, *sizes]), groups, strict=False)):
        statistics[start : start + len(group), place] = group

    def mean(sums: np.ndarray) -> np.ndarray:
        scores = value(sums.reshape(-1, k)).reshape(-1, len(groups))
        defined = ~np.isnan(scores)
        return ratio(np.where(defined, scores, 0).sum(1), defined.sum(1))

    statistics = statistics.reshape(len(statistics), -1)
    total = float(mean(statistics.sum(0, keepdims=True))[0])
    return Metric(kind, total, lambda: bootstrap(statistics, mean))


def example_table(caption: str, records: Iterable[EvalRecord], **columns: Callable[[EvalRecord], str]) -> str:
    """HTML: some utterances with references and hypothesis, and what else `columns` tell of them; nothing for none."""
    lines = {
        record.id: [
            {name: tell(record) for name, tell in columns.items()}
            | {"<Reference": " | ".join(record.references), "<Hypothesis": record.hypothesis}
        ]
        for record in records
    }
    return html_table(caption, lines, first="Utterance") if lines else ""


def defined(value: float) -> float | None:
    """The value as JSON holds it: null for nan."""
    return None if math.isnan(value) else value
