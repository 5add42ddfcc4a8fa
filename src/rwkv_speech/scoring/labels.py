"""Scores of labels: accuracy, macro-F1, and which labels are taken for which."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from rwkv_speech.scoring.formats import html_table, number
from rwkv_speech.scoring.normalise import lower_case
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import (
    EXAMPLES,
    Metric,
    MetricKind,
    TaskScores,
    bootstrap,
    defined,
    example_table,
    mean_metric,
    ratio,
)

ACCURACY = MetricKind("accuracy", "Accuracy", higher_is_better=True)
MACRO_F1 = MetricKind("macro_f1", "Macro-F1", higher_is_better=True)


class LabelScores(TaskScores):
    """How often the label is right, upper and lower case aside; F1 and confusions by scikit-learn.

    labels: all that occur as reference or hypothesis, sorted.
    """

    title = "Labels"
    caption = "Share of right labels, and the mean of the labels' F1, in percent"

    def __init__(self, records: Iterable[EvalRecord]) -> None:
        self.records = sorted(records, key=lambda record: record.id)
        self.truth = [lower_case(record.reference) for record in self.records]
        self.chosen = [lower_case(record.hypothesis) for record in self.records]

    @cached_property
    def leading(self) -> Metric:
        return mean_metric(ACCURACY, [a == b for a, b in zip(self.truth, self.chosen, strict=True)])

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.leading, self._macro_f1

    @cached_property
    def labels(self) -> list[str]:
        return sorted({*self.truth, *self.chosen})

    @cached_property
    def confusion(self) -> np.ndarray:
        """How often each label (row) was taken for each (column)."""
        from sklearn.metrics import confusion_matrix  # takes a second to import, as all of scikit-learn

        return confusion_matrix(self.truth, self.chosen, labels=self.labels)

    @cached_property
    def _macro_f1(self) -> Metric:
        from sklearn.metrics import f1_score

        value = f1_score(self.truth, self.chosen, average="macro", zero_division=0) if self.records else np.nan
        return Metric(MACRO_F1, float(value), self._macro_f1_interval)

    def _macro_f1_interval(self) -> tuple[float, float]:
        place = {label: index for index, label in enumerate(self.labels)}
        n, count = len(self.records), len(self.labels)
        truth, chosen = np.zeros((2, n, count))
        truth[range(n), [place[label] for label in self.truth]] = 1
        chosen[range(n), [place[label] for label in self.chosen]] = 1

        def macro_f1(sums: np.ndarray) -> np.ndarray:
            right, occurrences = np.split(sums, 2, axis=1)  # (r, count) each; 2 right / (references + hypotheses) is F1
            present = occurrences > 0
            return ratio(np.where(present, ratio(2 * right, occurrences), 0).sum(1), present.sum(1))

        return bootstrap(np.hstack([truth * chosen, truth + chosen]), macro_f1)

    def summary(self) -> dict[str, Any]:
        mean = [record.probability for record in self.records if record.probability is not None]
        return {
            "labels": self.labels,
            "confusion": self.confusion.tolist(),
            "mean_probability": defined(float(np.mean(mean)) if mean else np.nan),
        }

    def sections(self, name: str) -> str:
        """The scores, the confusions as a picture, each label's precision and recall, and the first wrong answers."""
        from rwkv_speech.scoring.plots import confusion_plot  # matplotlib takes its time

        wrong = [r for r, a, b in zip(self.records, self.truth, self.chosen, strict=True) if a != b]
        shown = wrong[:EXAMPLES]
        return (
            super().sections(name)
            + f"<h3>Confusions</h3><figure>{confusion_plot(name, self.labels, self.confusion)}</figure>"
            + f"<details><summary>Every label</summary>{self._by_label()}</details>"
            + example_table(
                f"{len(shown)} of {len(wrong)} wrong answers",
                shown,
                Probability=lambda record: number(np.nan if record.probability is None else record.probability, False),
            )
        )

    def _by_label(self) -> str:
        from sklearn.metrics import precision_recall_fscore_support

        columns = precision_recall_fscore_support(self.truth, self.chosen, labels=self.labels, zero_division=0)
        rows = {
            label: [
                {"Utterances": f"{n:,}", "Precision": number(precision), "Recall": number(recall), "*F1": number(f1)}
            ]
            for label, precision, recall, f1, n in zip(self.labels, *columns, strict=True)
        }
        return html_table("Precision, recall and F1 of each label in percent", rows, first="Label", ruled=False)

    def terms(self) -> dict[str, str]:
        return {
            "Accuracy": "Share of the utterances whose label is the right one.",
            "Macro-F1": "Mean over labels of the harmonic mean of precision and recall, however rare the label.",
            "Probability": "Of the label that was chosen, among all of the set.",
        }
