"""Scores of conversations: each round by its number, as answers to questions are scored."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from rwkv_speech.scoring.answers import CONTAINED, EXACT_MATCH, TOKEN_F1, AnswerScores
from rwkv_speech.scoring.formats import interval_text, number
from rwkv_speech.scoring.records import EvalRecord
from rwkv_speech.scoring.scores import EXAMPLES, Metric, TaskScores, bootstrap_interval, example_table

OWN, WITH_REFERENCES = "hypothesis", "with_references"


class ConversationScores(TaskScores):
    """The answers with the model's own earlier ones in the state, and beside them those with the references there.

    The metrics are of all rounds together; their intervals by resampling conversations.

    records: a conversation each; `details` hold its rounds: `round`, `reference`, `hypothesis` and, where that was
        tried, `with_references`. One without is a conversation of one round.
    """

    title = "Conversations"
    caption = "Answers in percent, round by round; with references: those stand for the model's own earlier answers"
    report_only = frozenset({"Conversations", "Contained %"})

    def __init__(self, records: Iterable[EvalRecord]) -> None:
        self.records = sorted(records, key=lambda record: record.id)

    @property
    def leading(self) -> Metric:
        return self.metrics[0]

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        return _metrics(self._rounds(OWN))

    def _rounds(self, answers: str, number: int | None = None) -> list[list[EvalRecord]]:
        """The rounds of each conversation, those of one number where that is given, as records of their own."""
        found = []
        for record in self.records:
            alone = [{"round": 1, "reference": record.reference, OWN: record.hypothesis}]
            rounds = [
                replace(record, id=f"{record.id}, round {x['round']}", reference=x["reference"], hypothesis=x[answers])
                for x in record.details.get("rounds") or alone
                if answers in x and number in (None, x["round"])
            ]
            found += [rounds] * bool(rounds)
        return found

    @cached_property
    def _by_number(self) -> dict[int, tuple[Metric, ...]]:
        numbers = {x["round"] for record in self.records for x in record.details.get("rounds", ())} or {1}
        return {number: _metrics(self._rounds(OWN, number)) for number in sorted(numbers)}

    def rows(self) -> list[dict[str, str]]:
        """A line for all rounds, and one for each number."""
        return [self._row("all", None, self.metrics)] + [self._row(str(n), n, x) for n, x in self._by_number.items()]

    def _row(self, label: str, round: int | None, metrics: Sequence[Metric]) -> dict[str, str]:
        exact, *others = metrics
        beside, *_ = _metrics(self._rounds(WITH_REFERENCES, round))
        return {
            "<Round": label,
            "Conversations": f"{len(self._rounds(OWN, round)):,}",
            f"*{exact.kind.label} %": f"{number(exact.value)} ({interval_text(exact.interval)})",
            "With references %": number(beside.value),
            **{f"{metric.kind.label} %": number(metric.value) for metric in others},
        }

    def summary(self) -> dict[str, Any]:
        return {
            "rounds": [
                {
                    "round": round,
                    "conversations": len(self._rounds(OWN, round)),
                    "metrics": [metric.summary() for metric in metrics],
                    "with_references": [x.summary() for x in _metrics(self._rounds(WITH_REFERENCES, round))],
                }
                for round, metrics in self._by_number.items()
            ]
        }

    def sections(self, name: str) -> str:
        """The scores, and the answers that have least in common with the reference."""
        rounds = AnswerScores(record for conversation in self._rounds(OWN) for record in conversation)
        wrong = sorted((f1, i) for i, f1 in enumerate(rounds.f1) if f1 < 1)
        caption = f"{len(wrong[:EXAMPLES])} of {len(wrong)} answers that are not exactly the reference, the worst first"
        return super().sections(name) + example_table(caption, [rounds.records[i] for _, i in wrong[:EXAMPLES]])

    def texts(self) -> dict[str, str]:
        return AnswerScores(()).texts()

    def terms(self) -> dict[str, str]:
        return AnswerScores(()).terms() | {
            "Round": "By its number; the state carries what was said before, and what the model itself answered.",
            "With references": "Exact match where earlier rounds have left the references in the state instead.",
        }


def _metrics(conversations: Sequence[Sequence[EvalRecord]]) -> tuple[Metric, ...]:
    """What `AnswerScores` has, of all rounds of conversations; nan where there are none."""
    scores = [AnswerScores(rounds) for rounds in conversations]
    counts = [len(rounds) for rounds in conversations]
    metrics = []
    for kind, values in (
        (EXACT_MATCH, [x.exact for x in scores]),
        (TOKEN_F1, [x.f1 for x in scores]),
        (CONTAINED, [x.contained for x in scores]),
    ):
        sums = [math.fsum(x) for x in values]
        value = sum(sums) / sum(counts) if counts else math.nan
        metrics.append(Metric(kind, value, partial(bootstrap_interval, sums, counts)))
    return tuple(metrics)
